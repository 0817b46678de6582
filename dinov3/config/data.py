"""Recipes of the data stages: image table, embeddings, curation, captions."""

from typing import Literal, Self

from pydantic import model_validator

from dinov3.config.base import (
    Count,
    Fraction,
    InferenceRun,
    Positive,
    Section,
    Seed,
    Steps,
    require,
)


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
        require(
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
