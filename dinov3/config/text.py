"""Recipes of the text side: caption pairs and dino.txt."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov3.config.base import (
    BelowOne,
    Count,
    Fraction,
    NonNegative,
    Positive,
    ScaleRange,
    Section,
    Seed,
    Steps,
)
from dinov3.config.schedules import ComputeConfig, ScheduleConfig, TrainRun, check_lengths
from dinov3.config.train import PictureConfig


class CaptionsConfig(Section):
    """`caption_pairs`: pictures with a line of text each."""

    phase: Literal["captions"]
    min_characters: Count  # shorter captions are left out, and counted
    max_characters: Count
    min_pairs: Count  # fewer are refused


class TextModel(Section):
    """The text tower's fields (see `dinov3.models.text.TextConfig`)."""

    context_length: Count
    embed_dim: Count
    depth: Count
    num_heads: Count
    ffn_ratio: Positive
    causal: bool
    pooler: Literal["first", "last", "argmax"]


class AlignmentModel(Section):
    """Both towers over the frozen backbone (see `dinov3.models.dinotxt.DinoTxtConfig`)."""

    embed_dim: Count
    num_head_blocks: Steps
    head_drop_path: BelowOne
    use_class_token: bool
    use_patch_tokens: bool
    pooler: Literal["mean", "max"]
    text: TextModel


class AlignmentCrops(PictureConfig):
    """One crop per picture."""

    size: Count
    scale: ScaleRange  # of the picture's area


class AlignmentLosses(Section):
    """Contrastive loss, and optionally the Gram matrix of the patches held to the backbone's."""

    text_gram: NonNegative
    text_gram_rate: Fraction  # of the patches that are compared
    text_gram_normalize: bool


class AlignmentOptim(Section):
    """AdamW; vectors, norms and the logit scale are not decayed."""

    batch_size: Annotated[int, Field(ge=2)]
    betas: tuple[BelowOne, BelowOne]
    weight_decay: NonNegative
    clip: Positive | None


class AlignmentSchedules(Section):
    """Learning rate over the run."""

    num_steps: Count
    lr: ScheduleConfig


class AlignmentHealth(Section):
    """What ends a run."""

    non_finite: Literal["stop", "skip"]
    max_consecutive_non_finite: Count


class DinotxtConfig(Section):
    """`dinotxt`: text aligned with a frozen backbone (dino.txt, arXiv 2412.16334)."""

    phase: Literal["dinotxt"]
    seed: Seed
    model: AlignmentModel
    crops: AlignmentCrops
    losses: AlignmentLosses
    optim: AlignmentOptim
    schedules: AlignmentSchedules
    compute: ComputeConfig
    health: AlignmentHealth
    run: TrainRun

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        check_lengths({"schedules.lr": self.schedules.lr}, self.schedules.num_steps)
        return self
