"""Optimizer, schedules, numerics, health and housekeeping: what every training phase has."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov3.config.base import (
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Section,
    Steps,
    require,
)


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


def check_lengths(schedules: Mapping[str, ScheduleConfig], num_steps: int) -> None:
    """Refuses a schedule longer than the run."""
    for name, part in schedules.items():
        needed = part.warmup_steps + (part.cosine_steps or 0)
        require(
            needed <= num_steps,
            f"{name}: warm-up and cosine take {needed} steps, got num_steps={num_steps}. "
            f"Shorten {name}.warmup_steps.",
        )


class SchedulesConfig(Section):
    """All schedules of a run, in steps."""

    num_steps: Count
    lr: ScheduleConfig
    weight_decay: ScheduleConfig
    teacher_temperature: ScheduleConfig
    momentum: ScheduleConfig
    local_loss_weight: ScheduleConfig  # factor of the DINO term on local crops

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        parts = {f"schedules.{n}": p for n, p in self if isinstance(p, ScheduleConfig)}
        check_lengths(parts, self.num_steps)
        return self


class ComputeConfig(Section):
    """Numerics and memory of the networks; everything here changes the last bits of a result."""

    dtype: Literal["fp32", "bf16"]  # of parameters in use; gradients are reduced in fp32
    compile: bool  # torch.compile, block by block
    checkpointing: Literal["none", "selective", "full"]  # of activations, block by block
    fp8: bool  # linear layers of the blocks, where the hardware has it


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
    """What cannot change the result but in its last bits, and in which residuals are dropped."""

    device: str  # auto, cpu, cuda, cuda:1, …
    processes: Count  # ranks started on this machine; a launch by torchrun has its own number
    micro_batches: Count  # a rank's share of the batch is taken in so many parts
    threads: Count | None  # None: as many as torch chooses; part of the resume key
    num_workers: Steps
    log_every: Count
    health_every: Count
    picture_every: Count
    checkpoint_every: Count
    keep_checkpoints: Count
