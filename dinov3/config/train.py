"""Recipes of self-distillation: pre-training, Gram anchoring, high-resolution adaptation."""

import re
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from dinov3.config.base import (
    Colour,
    Count,
    Fraction,
    NonNegative,
    Ordered,
    Positive,
    PositiveFraction,
    ScaleRange,
    Section,
    Seed,
    require,
)
from dinov3.config.models import HeadsConfig, VitModel
from dinov3.config.schedules import (
    ComputeConfig,
    HealthConfig,
    OptimConfig,
    ScheduleConfig,
    SchedulesConfig,
    TrainRun,
    check_lengths,
)

Sizes = Count | Annotated[tuple[Count, ...], Field(min_length=1)]


class Resolution(NamedTuple):
    """Sides of the crops of one step, in pixels, and how often it is drawn."""

    global_size: int
    local_size: int
    gram_size: int | None  # None: the Gram teacher sees the global crops
    probability: float


class PictureConfig(Section):
    """How a picture becomes a crop: what every training phase has in common."""

    horizontal_flip: Fraction
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    backgrounds: tuple[Colour, ...]  # one is drawn per image with transparency
    cache_size: Count | None  # longest side in pixels an image is reduced to before cropping


class MultiCropConfig(PictureConfig):
    """Multi-crop and augmentation. Blur values are the true probabilities (docs/deviations.md)."""

    num_local: Count
    global_scale: ScaleRange  # of the picture's area
    local_scale: ScaleRange
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]
    jitter: Fraction
    grayscale: Fraction
    blur: tuple[Fraction, Fraction, Fraction]  # global crop 1, global crop 2, local crops
    blur_sigma: Annotated[tuple[Positive, Positive], Ordered]
    solarize: Fraction  # global crop 2 only


class CropsConfig(MultiCropConfig):
    """Crops of one resolution, or of a mixture: lists of equal length, one entry per resolution."""

    global_size: Sizes
    local_size: Sizes
    gram_size: Sizes | None  # crops of the Gram teacher; None: it sees the global crops
    probabilities: tuple[PositiveFraction, ...] | None  # of the resolutions of a mixture
    gram_distortions: bool  # whether the Gram teacher's crops are distorted like the student's

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """Every resolution of the mixture."""
        count = len(self.probabilities or (1.0,))
        columns = [
            value if isinstance(value, tuple) else (value,) * count
            for value in (self.global_size, self.local_size, self.gram_size)
        ]
        return tuple(
            Resolution(*row) for row in zip(*columns, self.probabilities or (1.0,), strict=True)
        )

    @model_validator(mode="after")
    def _mixture_agrees(self) -> Self:
        given = self.probabilities
        for name in ("global_size", "local_size", "gram_size"):
            value = getattr(self, name)
            wanted = len(given or ())
            require(
                not isinstance(value, tuple) or len(value) == wanted,
                f"crops.{name}: a list needs one entry per entry of crops.probabilities, got "
                f"{value} for {given}. Even them.",
            )
        require(
            given is None or abs(sum(given) - 1) < 1e-6,
            f"crops.probabilities: must sum to 1, got {given}. Correct them.",
        )
        for size in self.resolutions:
            require(
                not (self.gram_distortions and size.gram_size)
                or (size.gram_size or 0) >= size.global_size,
                f"crops.gram_size: distorted crops are reduced to the global size, got "
                f"{size.gram_size} below {size.global_size}. Enlarge it.",
            )
        return self


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


class RefreshConfig(Section):
    """When the Gram teacher is replaced by the EMA: at step `first`, then `every` so many."""

    first: Count
    every: Count
    max_updates: Count | None


class GramConfig(Section):
    """Gram anchoring (paper, section 4).

    `teacher` says where the Gram teacher comes from: `checkpoint` (another artifact), `ema@STEP` (a
    copy of this run's own EMA taken before that step) or `ema` (the living EMA itself).
    """

    teacher: str
    refresh: RefreshConfig | None  # None: it stays as it is
    weight: ScheduleConfig
    normalize: bool
    image_level: bool
    remove: Literal["none", "negatives", "teacher_negatives"]  # counted as zero similarity
    tokens: Literal["all", "masked", "unmasked"]
    resize: Literal["bicubic", "bilinear", "nearest"]  # of the teacher's map to the student's grid
    antialias: bool

    @property
    def copy_step(self) -> int | None:
        """The step before which the EMA is copied, or None."""
        return int(self.teacher[4:]) if self.teacher.startswith("ema@") else None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        require(
            re.fullmatch(r"checkpoint|ema|ema@\d+", self.teacher) is not None,
            f"gram.teacher: must be checkpoint, ema or ema@STEP, got {self.teacher!r}. Choose one.",
        )
        require(
            self.teacher != "ema" or self.refresh is None,
            "gram.refresh: the living EMA is never refreshed, got both. Set one of them only.",
        )
        require(
            self.tokens == "all" or not self.image_level,
            f"gram.tokens: {self.tokens} patches differ in number from image to image, got "
            "image_level=true. Set gram.image_level=false.",
        )
        require(
            not self.antialias or self.resize != "nearest",
            "gram.antialias: needs bicubic or bilinear, got resize=nearest. Unset it.",
        )
        return self


class SnapshotsConfig(Section):
    """EMA snapshots kept beside the result, for a Gram teacher to be chosen from.

    The last step always is one; steps beyond it are not reached.
    """

    steps: tuple[Count, ...]


class TrainConfig(Section):
    """A phase of self-distillation.

    `init`: `random`, or from another artifact: `continue` takes its student and its EMA as they
    are, `teacher` starts both from its EMA.
    """

    phase: Literal["pretrain", "gram", "highres"]
    seed: Seed
    init: Literal["random", "continue", "teacher"]
    model: VitModel
    heads: HeadsConfig
    crops: CropsConfig
    masks: MasksConfig
    losses: LossesConfig
    gram: GramConfig | None
    optim: OptimConfig
    schedules: SchedulesConfig
    snapshots: SnapshotsConfig | None
    compute: ComputeConfig
    health: HealthConfig
    run: TrainRun

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        patch, width, heads = self.model.patch_size, self.model.embed_dim, self.model.num_heads
        batch, group = self.optim.batch_size, self.losses.koleo_group_size
        for resolution in self.crops.resolutions:
            for name in ("global_size", "local_size", "gram_size"):
                size = getattr(resolution, name) or patch
                require(
                    size % patch == 0,
                    f"crops.{name}: not a multiple of patch size {patch}, got {size}. Round it.",
                )
        require(
            width % (4 * heads) == 0,
            f"model.embed_dim: not a multiple of 4 x {heads} heads (RoPE), got {width}. Round it.",
        )
        require(
            group is None or batch % group == 0,
            f"losses.koleo_group_size: must divide the batch of {batch}, got {group}. Change one.",
        )
        return self

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """After which the EMA is kept, ascending."""
        if self.snapshots is None:
            return ()
        last = self.schedules.num_steps
        return tuple(sorted({step for step in self.snapshots.steps if step < last} | {last}))

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.gram is not None:
            last = self.schedules.num_steps
            check_lengths({"gram.weight": self.gram.weight}, last)
            require(
                (self.gram.copy_step or 0) < last,
                f"gram.teacher: the run ends before its EMA is copied, got {self.gram.teacher} for "
                f"{last} steps. Name an earlier step.",
            )
        return self

    @model_validator(mode="after")
    def _gram_fits(self) -> Self:
        has_size = self.crops.gram_size is not None
        require(
            self.gram is not None or not has_size,
            f"crops.gram_size: there is no Gram teacher, got {self.crops.gram_size}. "
            "Set gram, or crops.gram_size=null.",
        )
        require(
            self.gram is None or self.gram.teacher != "ema" or not has_size,
            f"crops.gram_size: the living EMA sees the global crops, got {self.crops.gram_size}. "
            "Set crops.gram_size=null.",
        )
        return self
