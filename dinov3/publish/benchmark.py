"""Labelled pictures to judge released weights on, and proof that these were not trained on them.

Either a table with its splits (`image_manifest`, with or without the curated dataset of the same
pictures), or just a source: then every picture falls into a half by the digest of its own pixels.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dinov3.config import EvalsConfig
from dinov3.errors import DataError
from dinov3.evals.collection import Halves, Pictures, labelled_halves, require_no_overlap
from dinov3.evals.folder import source_table
from dinov3.evals.report import read_collection, read_table
from dinov3.release.images import IMAGES_NAME, ROLE_TRAINED, read_images
from dinov3.release.record import digest_of, file_sha256
from dinov3.stage import UNKNOWN, Stage

_NAME = "reevaluation"


@dataclass(frozen=True)
class Benchmark:
    """Where the pictures are.

    Attributes:
        source: `kind:path`.
        manifest: Their table with splits; None makes one of all pictures of the source.
        dataset: What of them was trained on, with `manifest` only.
    """

    source: str
    manifest: Path | None = None
    dataset: Path | None = None


@dataclass(frozen=True)
class Collection:
    """The pictures, opened; `sha256` identifies them as evaluation reports do."""

    table: pl.DataFrame
    halves: Halves
    pictures: Pictures
    sha256: str


def open_benchmark(benchmark: Benchmark, config: EvalsConfig) -> Collection:
    """Reads the table, or makes it; no picture is judged that is also looked at.

    Args:
        benchmark: Where it is.
        config: Says which classes count.

    Raises:
        DataError: Something is missing, nothing can be read, or the halves overlap.
        LineageBroken: A table differs from the record beside it.
    """
    if benchmark.dataset is not None and benchmark.manifest is None:
        msg = f"dataset: needs the manifest of its pictures, got {benchmark.dataset}. Give both."
        raise DataError(msg)
    table, halves, sha256 = _read(benchmark, config)
    return Collection(table, halves, Pictures(benchmark.source, table), sha256)


def contamination(release: Path, head: Mapping[str, Any], table: pl.DataFrame) -> str:
    """`none` where all images trained on are known and none of them is held out, else `unknown`.

    Args:
        release: The folder, verified.
        head: Content of its release.json.
        table: The benchmark's.

    Raises:
        DataError: The weights were trained on a held-out picture.
    """
    images = head["images"]
    if images is None or images["mode"] != "plain":
        return UNKNOWN
    held_out = table.filter(pl.col("split") == "test")
    with read_images(release / IMAGES_NAME) as known:
        shared = [
            path
            for path, digest in held_out.select("path", "sha256").iter_rows()
            if ROLE_TRAINED in known.find(bytes.fromhex(digest))
        ]
    if shared:
        msg = (
            f"benchmark: {len(shared)} held-out pictures were trained on, got {shared[0]!r} first. "
            "Choose pictures that the release has not seen."
        )
        raise DataError(msg)
    unknown = any(root["training_data"] == UNKNOWN for root in head["roots"])
    return UNKNOWN if unknown else "none"


def _read(benchmark: Benchmark, config: EvalsConfig) -> tuple[pl.DataFrame, Halves, str]:
    if benchmark.manifest is None:
        table = source_table(benchmark.source, None, Counter())
        return table, _halves(table, config), digest_of(table.select("path", "sha256").rows())
    stage = Stage(_NAME, benchmark.manifest.parent, {})  # reads and checks; makes nothing
    if benchmark.dataset is None:
        table = read_table(stage.read("manifest", benchmark.manifest))
        halves = _halves(table, config)
    else:
        table, halves = read_collection(stage, benchmark.manifest, benchmark.dataset, config)
    return table, halves, file_sha256(benchmark.manifest)


def _halves(table: pl.DataFrame, config: EvalsConfig) -> Halves:
    halves = labelled_halves(
        table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
    )
    require_no_overlap(table, halves)
    return halves
