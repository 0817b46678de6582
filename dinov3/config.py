"""What a recipe may say: one typed, frozen tree per phase; unknown keys are refused.

`run:` cannot change results and stays outside the digest. `dinov3.recipe` reads the YAML files.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dinov3.release.record import digest_of


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("unordered", "The first must not be above the second")
    return pair


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
Ordered = AfterValidator(_ordered)
ScaleRange = Annotated[tuple[PositiveFraction, PositiveFraction], Ordered]


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SplitConfig(Section):
    """Which images are held out; a pure function of each image's own pixels and label."""

    test_fraction: Fraction  # of the labelled images
    unlabelled_test_fraction: Fraction
    never_test: tuple[str, ...]  # labels that are always trained on


class ExpectationsConfig(Section):
    """What the image table must satisfy for the stage to succeed (Great Expectations)."""

    min_images: Count
    max_unreadable_fraction: Fraction
    min_short_side: Count  # pixels
    max_small_fraction: Fraction  # of images below min_short_side
    max_duplicate_fraction: Fraction  # of images whose pixels stand in the table before


class ManifestConfig(Section):
    """`image_manifest`: one row per image of the source."""

    phase: Literal["manifest"]
    licence: str  # of sources that do not say themselves
    max_pixels: Count  # larger images are listed as decompression bombs
    split: SplitConfig
    expect: ExpectationsConfig


class InferenceRun(Section):
    """What cannot change features of a frozen model, nor figures about them."""

    batch_size: Count
    device: str


class EmbeddingsConfig(Section):
    """`image_embeddings`: one unit vector per image."""

    phase: Literal["embeddings"]
    embedder: str  # "pixels" or the name of a backbone in dinov3.hub
    weights: str | None  # local file of that backbone
    size: Count  # pixels of the square the embedder sees
    seed: Seed
    run: InferenceRun


class CalibrationConfig(Section):
    """The embedder that thresholds belong to, and how well they told planted copies apart."""

    embedder: str
    size: Count
    precision: Fraction  # of self_threshold
    recall: Fraction


class DedupConfig(Section):
    """Near-duplicates: cosine thresholds belong to the embedder (calibrate them)."""

    num_neighbours: Count
    self_threshold: Positive
    relative_threshold: Positive
    mode: Literal["component", "direct"]
    calibration: CalibrationConfig


class ClusteringConfig(Section):
    """Hierarchical k-means, lowest level first (PAPER: arXiv 2405.15613)."""

    num_clusters: tuple[Count, ...]
    num_resampled: tuple[Count, ...]  # members kept per cluster when resampling; 1 = off
    resampling_steps: Steps
    lloyd_steps: Count

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels, given = len(self.num_clusters), len(self.num_resampled)
        _require(
            levels == given,
            f"num_resampled: needs one entry per level, got {given} for {levels}. Even them.",
        )
        return self


class CurationConfig(Section):
    """`curated_dataset`: deduplicated, clustered, balanced."""

    phase: Literal["curation"]
    seed: Seed
    dedup: DedupConfig
    clustering: ClusteringConfig
    keep_fraction: Fraction  # of the deduplicated pool, drawn by balanced sampling
    selection: Literal["random", "closest"]  # inside a lowest-level cluster


class ModelConfig(Section):
    """The backbone's fields (see `dinov3.models.vit.ViTConfig`)."""

    embed_dim: Count
    depth: Count
    num_heads: Count
    patch_size: Count
    num_registers: Steps
    ffn: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"]
    ffn_ratio: Positive
    qkv_bias: bool
    mask_k_bias: bool
    norm: Literal["layernorm", "layernormbf16", "rmsnorm"]
    layerscale: Positive | None
    drop_path: BelowOne
    untie_global_and_local_cls_norm: bool
    rope_base: Positive | None
    rope_rescale: Positive | None
    rope_jitter: Positive | None
    rope_shift: Positive | None
    rope_dtype: Literal["fp32", "bf16"]


class HeadConfig(Section):
    """A projection head (DINO or iBOT)."""

    num_prototypes: Count
    num_layers: Count
    hidden_dim: Count
    bottleneck_dim: Count


class HeadsConfig(Section):
    """Both heads; `last_layer_gain` scales the initial prototypes."""

    dino: HeadConfig
    ibot: HeadConfig
    last_layer_gain: Positive


class CropsConfig(Section):
    """Multi-crop and augmentation. Blur values are the true probabilities (docs/deviations.md)."""

    global_size: Count
    local_size: Count
    num_local: Count
    global_scale: ScaleRange  # of the picture's area
    local_scale: ScaleRange
    horizontal_flip: Fraction
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]
    jitter: Fraction
    grayscale: Fraction
    blur: tuple[Fraction, Fraction, Fraction]  # global crop 1, global crop 2, local crops
    blur_sigma: Annotated[tuple[Positive, Positive], Ordered]
    solarize: Fraction  # global crop 2 only
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    backgrounds: tuple[Colour, ...]  # one is drawn per image with transparency
    cache_size: Count | None  # longest side in pixels an image is reduced to before cropping


class MasksConfig(Section):
    """Block masking of global crops for iBOT."""

    probability: Fraction
    ratio: Annotated[tuple[Fraction, Fraction], Ordered]


class LossesConfig(Section):
    """Weights of the objective (paper, L_Pre)."""

    dino: NonNegative
    ibot: NonNegative
    koleo: NonNegative
    koleo_group_size: Annotated[int, Field(ge=2)] | None  # rows; None = the whole batch of one crop
    student_temperature: Positive
    ignore_diagonal: bool


class OptimConfig(Section):
    """AdamW and its groups."""

    batch_size: Annotated[int, Field(ge=2)]  # images per step, all ranks together
    betas: tuple[BelowOne, BelowOne]
    clip: Positive  # gradient norm per sub-module
    layerwise_decay: Positive
    patch_embed_lr_mult: Positive
    lr_scaling: Literal["none", "sqrt_wrt_1024", "linear_wrt_256"]
    freeze_last_layer_steps: Steps


class ScheduleConfig(Section):
    """Linear from start to peak, cosine from peak to end, then constant."""

    start: NonNegative
    peak: NonNegative
    end: NonNegative
    warmup_steps: Steps
    cosine_steps: Steps | None  # None = all that remain


class SchedulesConfig(Section):
    """All schedules of a run, in steps."""

    num_steps: Count
    lr: ScheduleConfig
    weight_decay: ScheduleConfig
    teacher_temperature: ScheduleConfig
    momentum: ScheduleConfig

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        for name, part in self:
            if isinstance(part, ScheduleConfig):
                needed = part.warmup_steps + (part.cosine_steps or 0)
                _require(
                    needed <= self.num_steps,
                    f"schedules.{name}: warm-up and cosine take {needed} steps, got num_steps="
                    f"{self.num_steps}. Shorten schedules.{name}.warmup_steps.",
                )
        return self


class HealthConfig(Section):
    """Thresholds that stop a collapsed run; judged on the EMA teacher's CLS features."""

    num_images: Annotated[int, Field(ge=2)]  # of the probe; one alone has no neighbour
    min_participation_ratio: NonNegative
    max_mean_cosine: float
    min_prototype_entropy: NonNegative
    after_step: Steps  # judged from this step on
    non_finite: Literal["stop", "skip"]
    max_consecutive_non_finite: Count


class TrainRun(Section):
    """What cannot change the weights."""

    device: str  # auto, cpu, cuda, cuda:1, …
    threads: Count | None  # None: as many as torch chooses; part of the resume key
    num_workers: Steps
    log_every: Count
    health_every: Count
    picture_every: Count
    checkpoint_every: Count
    keep_checkpoints: Count


class TrainConfig(Section):
    """A training phase."""

    phase: Literal["pretrain"]
    seed: Seed
    model: ModelConfig
    heads: HeadsConfig
    crops: CropsConfig
    masks: MasksConfig
    losses: LossesConfig
    optim: OptimConfig
    schedules: SchedulesConfig
    health: HealthConfig
    run: TrainRun

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        patch, width, heads = self.model.patch_size, self.model.embed_dim, self.model.num_heads
        batch, group = self.optim.batch_size, self.losses.koleo_group_size
        for name, size in (("global", self.crops.global_size), ("local", self.crops.local_size)):
            _require(
                size % patch == 0,
                f"crops.{name}_size: not a multiple of patch size {patch}, got {size}. Round it.",
            )
        _require(
            width % (4 * heads) == 0,
            f"model.embed_dim: not a multiple of 4 x {heads} heads (RoPE), got {width}. Round it.",
        )
        _require(
            group is None or batch % group == 0,
            f"losses.koleo_group_size: must divide the batch of {batch}, got {group}. Change one.",
        )
        return self


class KnnConfig(Section):
    """Weighted k-NN (released protocol: temperature .07, votes softmax over all retrieved)."""

    ks: tuple[Count, ...]
    temperature: Positive


class LogregConfig(Section):
    """Logistic regression over a grid of C, chosen on a part of the training half."""

    log10_c: Annotated[tuple[float, float], Ordered]
    num_c: Count
    max_iter: Count
    tolerance: Positive  # largest gradient component at which L-BFGS stops
    val_fraction: Fraction


class LinearConfig(Section):
    """Linear probes trained by SGD over a grid of learning rates."""

    learning_rates: tuple[Positive, ...]
    num_steps: Count
    batch_size: Count
    val_fraction: Fraction


class RetrievalConfig(Section):
    """Instance retrieval: find the other view of the same picture."""

    scale: ScaleRange  # of the random views
    num_images: Count | None


class EvalsConfig(Section):
    """`eval_reports_*`: protocols, baselines, intervals."""

    phase: Literal["evals"]
    seed: Seed
    fit: Literal["crop", "pad"]  # centre crop, or padded to a square
    resize: Count  # crop: short side before the cut; pad: the long side is reduced to this at most
    crop: Count  # side of the square the model sees
    background: Colour  # shows through transparency and fills the padding
    exclude_labels: tuple[str, ...]
    min_per_class: Count
    knn: KnnConfig
    logreg: LogregConfig
    linear: LinearConfig
    retrieval: RetrievalConfig
    num_random_inits: Count
    num_bootstrap: Count
    run: InferenceRun

    @model_validator(mode="after")
    def _cut_fits(self) -> Self:
        _require(
            self.fit == "pad" or self.resize >= self.crop,
            f"resize: shorter than the cut of {self.crop} pixels, got {self.resize}. Raise it.",
        )
        return self


type_of_phase: dict[str, type[Section]] = {
    "manifest": ManifestConfig,
    "embeddings": EmbeddingsConfig,
    "curation": CurationConfig,
    "pretrain": TrainConfig,
    "evals": EvalsConfig,
}


def dump(config: Section) -> dict[str, Any]:
    """The resolved tree as JSON values, without `run`: what determines the result."""
    return config.model_dump(mode="json", exclude={"run"})


def config_digest(config: Section) -> str:
    """sha256 of the resolved tree without `run`."""
    return digest_of(dump(config))
