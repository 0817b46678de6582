"""Recipes: typed, frozen, refused when a key is unknown, dumped and hashed when resolved.

One YAML file per phase in `dinov3/recipes/<family>/<phase>.yaml`, each a diff of its parent by
`extends:`. `run:` holds only what cannot change results and stays outside the digest. Values pass
through JSON on their way to pydantic: strict mode then takes lists for tuples and ints for floats.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dinov3.errors import ConfigError
from dinov3.release.record import digest_of

RECIPES = Path(__file__).resolve().parent / "recipes"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Range = tuple[float, float]


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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


class EmbeddingsRun(Section):
    """What cannot change the embeddings."""

    batch_size: Count
    device: str


class EmbeddingsConfig(Section):
    """`image_embeddings`: one unit vector per image."""

    phase: Literal["embeddings"]
    embedder: str  # "pixels" or the name of a backbone in dinov3.hub
    weights: str | None  # local file of that backbone
    size: Count  # pixels of the square the embedder sees
    seed: int
    run: EmbeddingsRun


class DedupConfig(Section):
    """Near-duplicates: cosine thresholds belong to the embedder (calibrate them)."""

    num_neighbours: Count
    self_threshold: Positive
    relative_threshold: Positive
    mode: Literal["component", "direct"]


class ClusteringConfig(Section):
    """Hierarchical k-means, lowest level first (PAPER: arXiv 2405.15613)."""

    num_clusters: tuple[Count, ...]
    num_resampled: tuple[Count, ...]  # members kept per cluster when resampling; 1 = off
    resampling_steps: Steps
    lloyd_steps: Count

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.num_clusters) != len(self.num_resampled):
            msg = (
                f"num_resampled: needs one entry per level, got {len(self.num_resampled)} for "
                f"{len(self.num_clusters)} levels. Give both lists the same length."
            )
            raise ValueError(msg)
        return self


class CurationConfig(Section):
    """`curated_dataset`: deduplicated, clustered, balanced."""

    phase: Literal["curation"]
    seed: int
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
    drop_path: Fraction
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
    global_scale: Range
    local_scale: Range
    horizontal_flip: Fraction
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]
    jitter: Fraction
    grayscale: Fraction
    blur: tuple[Fraction, Fraction, Fraction]  # global crop 1, global crop 2, local crops
    blur_sigma: Range
    solarize: Fraction  # global crop 2 only
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    backgrounds: tuple[tuple[int, int, int], ...]  # one is drawn per image with transparency
    cache_size: Count | None  # longest side in pixels an image is reduced to before cropping


class MasksConfig(Section):
    """Block masking of global crops for iBOT."""

    probability: Fraction
    ratio: tuple[Fraction, Fraction]


class LossesConfig(Section):
    """Weights of the objective (paper, L_Pre)."""

    dino: NonNegative
    ibot: NonNegative
    koleo: NonNegative
    koleo_group_size: Count | None  # rows; None = the whole batch of one crop
    student_temperature: Positive
    ignore_diagonal: bool


class OptimConfig(Section):
    """AdamW and its groups."""

    batch_size: Count  # images per step, all ranks together
    betas: tuple[Fraction, Fraction]
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


class HealthConfig(Section):
    """Thresholds that stop a collapsed run; judged on the EMA teacher's CLS features."""

    num_images: Count  # probe images
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
    seed: int
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
        patch = self.model.patch_size
        for name in ("global_size", "local_size"):
            size = getattr(self.crops, name)
            if size % patch:
                msg = (
                    f"crops.{name}: not a multiple of the patch size {patch}, got {size}. Round it."
                )
                raise ValueError(msg)
        if self.model.embed_dim % (4 * self.model.num_heads):
            msg = (
                f"model.embed_dim: must be a multiple of 4 x num_heads (axial RoPE), got "
                f"{self.model.embed_dim} with {self.model.num_heads} heads. Change one."
            )
            raise ValueError(msg)
        group = self.losses.koleo_group_size
        if group is not None and self.optim.batch_size % group:
            msg = (
                f"losses.koleo_group_size: must divide the batch of {self.optim.batch_size}, "
                f"got {group}. Choose a divisor."
            )
            raise ValueError(msg)
        return self


class EvalsRun(Section):
    """What cannot change the figures."""

    batch_size: Count
    device: str


class KnnConfig(Section):
    """Weighted k-NN (released protocol: temperature .07, votes softmax over all retrieved)."""

    ks: tuple[Count, ...]
    temperature: Positive


class LogregConfig(Section):
    """Logistic regression over a grid of C, chosen on a part of the training half."""

    log10_c: Range
    num_c: Count
    max_iter: Count
    val_fraction: Fraction


class LinearConfig(Section):
    """Linear probes trained by SGD over a grid of learning rates."""

    learning_rates: tuple[Positive, ...]
    num_steps: Count
    batch_size: Count
    val_fraction: Fraction


class RetrievalConfig(Section):
    """Instance retrieval: find the other view of the same picture."""

    scale: Range  # of the random views
    num_images: Count | None


class EvalsConfig(Section):
    """`eval_reports_*`: protocols, baselines, intervals."""

    phase: Literal["evals"]
    seed: int
    resize: Count
    crop: Count
    exclude_labels: tuple[str, ...]
    min_per_class: Count
    knn: KnnConfig
    logreg: LogregConfig
    linear: LinearConfig
    retrieval: RetrievalConfig
    num_random_inits: Count
    num_bootstrap: Count
    run: EvalsRun


type_of_phase: dict[str, type[Section]] = {
    "manifest": ManifestConfig,
    "embeddings": EmbeddingsConfig,
    "curation": CurationConfig,
    "pretrain": TrainConfig,
    "evals": EvalsConfig,
}


def load_recipe(name: str, overrides: Iterable[str] = (), *, phase: str = "pretrain") -> Section:
    """Resolves a recipe to its typed tree.

    Args:
        name: A family (`demo`), a family and phase (`demo/pretrain`) or the path of a YAML file.
        overrides: `key=value` with dotted keys, laid over the recipe in order.
        phase: Which file of the family, where `name` says only the family.

    Raises:
        ConfigError: Unknown, duplicate or contradictory keys; a missing recipe or parent.
    """
    path = _recipe_path(name, phase)
    tree = _resolve(path, ())
    for override in overrides:
        _apply(tree, override)
    kind = type_of_phase.get(tree.get("phase", ""))
    if kind is None:
        msg = f"{path.name}: phase is not one of {', '.join(type_of_phase)}, got {tree.get('phase')!r}."
        raise ConfigError(f"{msg} Set it.")
    if "/" not in name and not name.endswith(".yaml") and tree["phase"] != phase:
        msg = f"{path}: phase must be {phase}, got {tree['phase']!r}. Move the recipe."
        raise ConfigError(msg)
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, name)) from error


def dump(config: Section) -> dict[str, Any]:
    """The resolved tree as JSON values, without `run`: what determines the result."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree.pop("run", None)
    return tree


def config_digest(config: Section) -> str:
    """sha256 of the resolved tree without `run`."""
    return digest_of(dump(config))


def recipe_families() -> list[str]:
    """Names of the recipe families that ship with the package."""
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir())


def _recipe_path(name: str, phase: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = RECIPES / (f"{name}.yaml" if "/" in name else f"{name}/{phase}.yaml")
    if not path.is_file():
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
        near = difflib.get_close_matches(name, [*recipe_families(), *known], 1, 0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        msg = f"recipe: no such recipe, got {name!r} (phase {phase}). {hint}"
        raise ConfigError(msg)
    return path


def _resolve(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe laid over its parents, the farthest first."""
    if path in seen:
        chain = " -> ".join(p.stem for p in (*seen, path))
        msg = f"{path}: extends itself, got {chain}. Break the circle."
        raise ConfigError(msg)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path}: not readable as YAML: {error}. Mend the line it names."
        raise ConfigError(msg) from error
    if not isinstance(tree, dict):
        msg = f"{path}: not a mapping of keys to values, got {type(tree).__name__}. Write `key: value`."
        raise ConfigError(msg)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = path.parent / str(parent)
    parent_path = beside if beside.is_file() else _recipe_path(str(parent), path.stem)
    return _merge(_resolve(parent_path, (*seen, path)), tree)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        msg = f"override: not of the form key=value, got {override!r}. Write e.g. optim.batch_size=64."
        raise ConfigError(msg)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        msg = f"override {key}: value is not YAML, got {text!r}. Quote it."
        raise ConfigError(msg) from error
    *parents, last = key.split(".")
    node: dict[str, Any] = tree
    for part in parents:
        below = node.get(part)
        if not isinstance(below, dict):
            raise ConfigError(_unknown(key, key, node, part))
        node = below
    if last not in node:
        raise ConfigError(_unknown(key, key, node, last))
    node[last] = _merge(node[last], value) if isinstance(value, dict) else value


def _unknown(where: str, got: str, valid: Iterable[str], part: str) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(part, names, 1, 0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(names)}."
    return f"{where}: unknown key, got {got!r}. {hint}"


def _explain(error: ValidationError, kind: type[Section], name: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            *parents, last = item["loc"]
            lines.append(_unknown(where, where, _fields(kind, parents), str(last)))
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines.append(text)
        elif item["type"] == "missing":
            lines.append(f"{where}: missing. Set it, or extend a recipe that does.")
        else:
            lines.append(f"{where}: {item['msg']}, got {item['input']!r}. Change it.")
    return f"recipe {name}: " + "; ".join(lines)


def _fields(kind: type[BaseModel], parents: Iterable[Any]) -> list[str]:
    current: Any = kind
    for part in parents:
        field = getattr(current, "model_fields", {}).get(str(part))
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                msg = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, msg, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)
