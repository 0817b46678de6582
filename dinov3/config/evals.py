"""Recipes of the evaluation stages: protocols, and the choice of the Gram teacher."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov3.config.base import (
    Colour,
    Count,
    Fraction,
    InferenceRun,
    Ordered,
    Positive,
    ScaleRange,
    Section,
    Seed,
    Steps,
    require,
)
from dinov3.config.text_evals import TextEvalsConfig


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


class CompositesConfig(Section):
    """Scenes of cut-out pictures on photographs, with exact masks."""

    size: Count  # side of a scene, pixels; a multiple of the patch size
    num_train: Annotated[int, Field(ge=2)]
    num_test: Count
    num_objects: tuple[Count, Count]  # of a scene: fewest, most
    backgrounds: str | None  # source of photographs, kind:path; None: those of scikit-image

    @model_validator(mode="after")
    def _objects_in_order(self) -> Self:
        fewest, most = self.num_objects
        require(
            fewest <= most,
            f"num_objects: the first must not be above the second, got {fewest} and {most}. "
            "Swap them.",
        )
        return self


class SegmentationConfig(LogregConfig):
    """Linear segmentation over such a grid, chosen on a part of the training scenes."""


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
    composites: CompositesConfig
    segmentation: SegmentationConfig
    text: TextEvalsConfig
    num_random_inits: Count
    num_bootstrap: Count
    run: InferenceRun

    @model_validator(mode="after")
    def _cut_fits(self) -> Self:
        require(
            self.fit == "pad" or self.resize >= self.crop,
            f"resize: shorter than the cut of {self.crop} pixels, got {self.resize}. Raise it.",
        )
        return self


class GramTeacherConfig(Section):
    """`gram_teacher`: which EMA snapshot becomes the teacher of Gram anchoring."""

    phase: Literal["gram_teacher"]
    choose: Literal["step", "best_dense"]
    step: Steps | None  # of the snapshot, with choose: step
    otherwise: Literal["refuse", "earliest"]  # best_dense without labelled cut-outs to judge by
    seed: Seed
    exclude_labels: tuple[str, ...]
    min_per_class: Count
    composites: CompositesConfig
    segmentation: SegmentationConfig
    num_bootstrap: Count
    run: InferenceRun

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        by_step = self.choose == "step"
        require(
            by_step == (self.step is not None),
            f"step: {'needed with' if by_step else 'contradicts'} choose={self.choose}, got "
            f"{self.step}. {'Name one' if by_step else 'Leave it null'}.",
        )
        return self
