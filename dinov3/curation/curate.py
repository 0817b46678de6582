"""Stage `curated_dataset`: which images are trained on, and why each other one is not.

In this order: held-out images leave, exact duplicates, near-duplicates of held-out images, other
near-duplicates; what remains is clustered, and balanced sampling keeps `keep_fraction` of it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dinov3.config import CurationConfig, DedupConfig, dump
from dinov3.curation.dedup import Duplicates, exact_duplicates, relative_dedup, self_dedup
from dinov3.curation.kmeans import Clusters, hierarchical_kmeans
from dinov3.curation.neighbours import Floats, Ints
from dinov3.curation.sampling import balanced_sample
from dinov3.errors import ConfigError, DataError, LineageBroken
from dinov3.release.atomic import atomic_write
from dinov3.release.images import (
    MEANINGS,
    ROLE_CLUSTERED,
    ROLE_EVALUATED,
    ROLE_TRAINED,
    write_images,
)
from dinov3.release.record import RECORD_NAME, canonical_json, read_record
from dinov3.stage import Stage, open_stage

# N rows of the table, M of the pool that is clustered, D width

HELD_OUT = "held out for evaluation"
EXACT = "exact duplicate"
NEAR = "near-duplicate"
NEAR_HELD_OUT = "near-duplicate of a held-out image"
NOT_DRAWN = "not drawn by balanced sampling"
REASONS = (HELD_OUT, EXACT, NEAR_HELD_OUT, NEAR, NOT_DRAWN)

IMAGES = "images.bin"  # which images are in a model, readable without parquet
ROLES = {
    **MEANINGS,
    16: f"excluded: {EXACT}",
    17: f"excluded: {NEAR_HELD_OUT}",
    18: f"excluded: {NEAR}",
}
_ROLE_OF_REASON = (ROLE_TRAINED, ROLE_EVALUATED, 16, 17, 18, ROLE_CLUSTERED)  # as Curated.reason

Booleans = npt.NDArray[np.bool_]
_COLUMNS = ["path", "sha256", "split", "pixel_sha256", "label"]


@dataclass(frozen=True)
class Curated:
    """The decision on each of N rows; `reason` 0 is kept, else 1 + its place in REASONS."""

    reason: Ints
    duplicate_of: Ints  # row, or -1
    similarity: Floats  # NaN where there is none
    pool: Ints  # rows that were clustered
    levels: Sequence[Clusters]  # of the pool, lowest first
    largest_component: dict[str, int]  # by kind of duplicate

    @property
    def paths(self) -> Ints:
        """Cluster of each pool row at every level, top level first: [M, levels]."""
        columns: list[Ints] = []
        for clusters in self.levels:
            columns.append(clusters.assignment[columns[-1]] if columns else clusters.assignment)
        return np.stack(columns[::-1], axis=1)


def make_curated(*, manifest: Path, embeddings: Path, output: Path, config: CurationConfig) -> None:
    """Writes `curated.parquet`, one row per row of the manifest, `summary.json`, `images.bin`.

    Args:
        manifest: `manifest.parquet` of `image_manifest`.
        embeddings: `embeddings.parquet` of `image_embeddings` of the same table.
        output: Folder of the stage.
        config: Thresholds, clusters and the fraction to keep.

    Raises:
        ConfigError: The thresholds were calibrated for another embedder.
        DataError: A table lacks a column, or nothing would be left to train on.
        LineageBroken: The two tables do not speak of the same images, or differ from the record.
    """
    with open_stage("curated_dataset", output, config=dump(config)) as stage:
        table = _read_columns(stage.read("manifest", manifest), _COLUMNS, "an image table")
        vectors = _read_embeddings(stage.read("embeddings", embeddings), table)
        _check_embedder(embeddings, config)
        curated = curate(
            vectors,
            held_out=(table["split"] == "test").to_numpy(),
            digests=table["pixel_sha256"].to_list(),
            config=config,
        )
        stage.seeds["curation"] = config.seed
        _to_table(table, curated).write_parquet(stage.path("curated.parquet"))
        write_images(stage.path(IMAGES), image_roles(table["sha256"], curated.reason), ROLES)
        summary = _summary(table, curated, config)
        atomic_write(stage.path("summary.json"), canonical_json(summary))
        _tell(stage, summary)


def curate(
    vectors: Floats, *, held_out: Booleans, digests: Sequence[str], config: CurationConfig
) -> Curated:
    """Decides on every image.

    Args:
        vectors: [N, D] unit rows.
        held_out: [N], images kept for evaluation.
        digests: [N], equal for images of equal pixels.
        config: Thresholds, clusters and the fraction to keep.

    Raises:
        DataError: Nothing would be left to train on.
    """
    ledger = _Ledger(len(vectors))
    ledger.reason[held_out] = _code(HELD_OUT)
    pool = _deduplicate(ledger, vectors, held_out, digests, config.dedup)
    levels = hierarchical_kmeans(vectors[pool], seed=config.seed, **config.clustering.model_dump())
    target = max(1, round(config.keep_fraction * len(pool)))
    drawn = balanced_sample(levels, target, seed=config.seed, selection=config.selection)
    ledger.reason[np.delete(pool, drawn)] = _code(NOT_DRAWN)
    return Curated(
        ledger.reason, ledger.duplicate_of, ledger.similarity, pool, levels, ledger.largest
    )


def image_roles(digests: Iterable[str], reasons: Ints) -> Iterator[tuple[bytes, int]]:
    """Digest and role of every row; equal files in several rows may have several roles."""
    for digest, reason in zip(digests, reasons.tolist(), strict=True):
        yield bytes.fromhex(digest), _ROLE_OF_REASON[reason]


class _Ledger:
    """The decisions so far."""

    def __init__(self, count: int) -> None:
        self.reason: Ints = np.zeros(count, np.int64)
        self.duplicate_of: Ints = np.full(count, -1, np.int64)
        self.similarity: Floats = np.full(count, np.nan, np.float32)
        self.largest: dict[str, int] = {}

    def leave_out(self, why: str, rows: Ints, found: Duplicates, references: Ints) -> Ints:
        """Notes the duplicates among `rows`, which are of `references`; returns the others."""
        out = found.mask
        self.reason[rows[out]] = _code(why)
        self.duplicate_of[rows[out]] = references[found.of[out]]
        self.similarity[rows[out]] = found.similarity[out]
        self.largest[why] = found.largest_component
        return rows[~out]


def _deduplicate(
    ledger: _Ledger,
    vectors: Floats,
    held_out: Booleans,
    digests: Sequence[str],
    config: DedupConfig,
) -> Ints:
    """Leaves out duplicates of every kind; returns the rows of the pool that remains."""
    tests, pool = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    _check_some_left(
        pool, f"split: every image is held out, got {len(tests)}", "Lower split.test_fraction"
    )
    exact = exact_duplicates([digests[row] for row in pool.tolist()])
    pool = ledger.leave_out(EXACT, pool, exact, pool)
    relative = relative_dedup(
        vectors[pool],
        vectors[tests],
        threshold=config.relative_threshold,
        num_neighbours=config.num_neighbours,
        mode=config.mode,
    )
    pool = ledger.leave_out(NEAR_HELD_OUT, pool, relative, tests)
    _check_some_left(
        pool,
        f"dedup.relative_threshold: every image is too close to a held-out one, got "
        f"{config.relative_threshold}",
        "Calibrate it for this embedder: python -m dinov3 calibrate",
    )
    near = self_dedup(
        vectors[pool],
        threshold=config.self_threshold,
        num_neighbours=config.num_neighbours,
        mode=config.mode,
    )
    return ledger.leave_out(NEAR, pool, near, pool)


def _code(why: str) -> int:
    return 1 + REASONS.index(why)


def class_entropy(labels: Sequence[str | None]) -> float | None:
    """Entropy in bits of the labels' frequencies; None where there is no label."""
    counts = Counter(label for label in labels if label is not None)
    total = sum(counts.values())
    if total == 0:
        return None
    return sum(-count / total * math.log2(count / total) for count in counts.values()) + 0.0


def _check_some_left(pool: Ints, wrong: str, action: str) -> None:
    if len(pool) == 0:
        msg = f"{wrong}; nothing is left to train on. {action}."
        raise DataError(msg)


def _read_columns(path: Path, columns: Sequence[str], kind: str) -> pl.DataFrame:
    try:
        present = pl.read_parquet_schema(path)
        missing = [name for name in columns if name not in present]
        if missing:
            msg = f"{path}: not {kind}, got no column {', '.join(missing)}. Give the right file."
            raise DataError(msg)
        return pl.read_parquet(path, columns=list(columns))
    except pl.exceptions.PolarsError as error:
        msg = f"{path}: not a table of parquet, got {str(error)!r}. Make it anew."
        raise DataError(msg) from error


def _read_embeddings(path: Path, table: pl.DataFrame) -> Floats:
    embedded = _read_columns(path, ["path", "sha256", "embedding"], "a table of embeddings")
    if not embedded.select("path", "sha256").equals(table.select("path", "sha256")):
        msg = (
            f"{path}: speaks of other images than the manifest, got {len(embedded)} rows for "
            f"{len(table)}. Make image_embeddings anew."
        )
        raise LineageBroken(msg)
    return np.ascontiguousarray(embedded["embedding"].to_numpy(), dtype=np.float32)


def _check_embedder(embeddings: Path, config: CurationConfig) -> None:
    """Thresholds of one embedder mean nothing for another."""
    made = read_record(embeddings.parent / RECORD_NAME).config
    calibrated = config.dedup.calibration
    found = (made.get("embedder"), made.get("size"))
    if found != (calibrated.embedder, calibrated.size):
        msg = (
            f"dedup.calibration: thresholds are of {calibrated.embedder} at size "
            f"{calibrated.size}, got embeddings of {found[0]} at size {found[1]}. "
            f"Calibrate anew: python -m dinov3 calibrate."
        )
        raise ConfigError(msg)


def _to_table(table: pl.DataFrame, curated: Curated) -> pl.DataFrame:
    paths = table["path"].to_list()
    names: list[str | None] = [None, *REASONS]
    clusters: list[list[int] | None] = [None] * len(table)
    for row, path in zip(curated.pool.tolist(), curated.paths.tolist(), strict=True):
        clusters[row] = path
    shown = pl.Series("similarity", curated.similarity, dtype=pl.Float32).fill_nan(None)
    return table.select("path", "sha256", "split").with_columns(
        pl.Series("kept", curated.reason == 0),
        pl.Series("reason", [names[code] for code in curated.reason], dtype=pl.String),
        pl.Series(
            "duplicate_of",
            [paths[row] if row >= 0 else None for row in curated.duplicate_of],
            dtype=pl.String,
        ),
        shown,
        pl.Series("cluster", clusters, dtype=pl.List(pl.Int32)),
    )


def _summary(table: pl.DataFrame, curated: Curated, config: CurationConfig) -> dict[str, Any]:
    labels = table["label"].to_list()
    training = np.flatnonzero(curated.reason != _code(HELD_OUT))
    kept = np.flatnonzero(curated.reason == 0)
    before, after = (class_entropy([labels[row] for row in rows]) for rows in (training, kept))
    return {
        "rows": len(table),
        "kept": len(kept),
        "left_out": {
            why: int((curated.reason == code).sum()) for code, why in enumerate(REASONS, 1)
        },
        "class_entropy_bits": {"before": before, "after": after},
        "images_per_label": {
            "before": _count(labels, training),
            "after": _count(labels, kept),
        },
        "largest_component": curated.largest_component,
        "dedup": config.dedup.model_dump(mode="json"),
        "cluster_sizes": [
            sorted(np.bincount(column).tolist(), reverse=True) for column in curated.paths.T
        ],
    }


def _count(labels: Sequence[str | None], rows: Ints) -> dict[str, int]:
    return dict(Counter(label for row in rows if (label := labels[row]) is not None))


def _tell(stage: Stage, summary: dict[str, Any]) -> None:
    names = ("rows", "kept", "left_out", "class_entropy_bits", "largest_component")
    stage.facts = {name: summary[name] for name in names}
