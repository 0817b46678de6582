"""Calibration: where an embedder's cosine separates copies of a picture from other pictures.

Copies are planted: resized (x 0.3-1.5), JPEG of quality 30-95, crops that keep 80-100 % of the
area. Against each planted pair stands the hardest real one, a picture and its nearest distinct
neighbour. At a threshold, recall is the share of planted pairs above it (mean over the kinds),
false the share of pictures whose nearest distinct neighbour is above it, and
precision = recall / (recall + false).
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from dinov3.config import EmbeddingsConfig
from dinov3.curation.embed import COLUMNS, read_images
from dinov3.curation.embedders import Embedder, open_embedder
from dinov3.curation.neighbours import Floats, nearest
from dinov3.data.sources import open_source
from dinov3.errors import DataError

# N pictures, P planted ones

SELF_PRECISION = 0.975  # few pictures of the training set are lost for a copy
RELATIVE_PRECISION = 0.95  # stricter: a copy of a held-out picture costs more than a picture
NUM_PLANTED = 400
MAX_IMAGES = 5000
_SAME = 1 - 1e-6  # cosine at which two pictures of the pool are the same one, not distinct


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy at 0.3 to 1.5 times the size, its short side 24 pixels or more if it was."""
    short = min(image.size)
    scale = max(float(rng.uniform(0.3, 1.5)), min(1.0, 24 / short))
    width, height = (max(1, round(side * scale)) for side in image.size)
    kinds = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    return image.resize((width, height), kinds[int(rng.integers(len(kinds)))])


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy that went through JPEG at quality 30 to 95."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(rng.integers(30, 96)))
    return Image.open(stream).convert("RGB")


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A cut-out that keeps 80 to 100 % of the area, of any shape and place."""
    kept = float(rng.uniform(0.8, 1))
    across = float(np.exp(rng.uniform(np.log(kept), 0)))  # share of the width
    width = max(1, round(image.width * across))
    height = max(1, round(image.height * kept / across))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "resize": resized,
    "jpeg": recompressed,
    "crop": cropped,
}


def calibrate(embedder: Embedder, images: Sequence[Image.Image], *, seed: int) -> dict[str, Any]:
    """Finds the similarity thresholds of an embedder on a set of RGB pictures.

    Args:
        embedder: What is calibrated.
        images: Pictures, read once and in order (they may be read lazily).
        seed: Of the choice of pictures and of every copy.

    Returns:
        `self_threshold` and `relative_threshold`, and for each its precision, its recall (in all
        and per kind of copy) and the share of pictures wrongly linked.

    Raises:
        DataError: Fewer than two distinct pictures, or copies that cannot be told from others.
    """
    rows, planted = _embed(embedder, images, seed)
    distinct = rows[np.unique(_group(rows))]
    if len(distinct) < 2:
        msg = f"images: two distinct pictures are needed, got {len(distinct)}. Add pictures."
        raise DataError(msg)
    hardest = nearest(distinct, distinct, 2)[0][:, 1]
    report: dict[str, Any] = {
        "embedder": embedder.name,
        "num_images": len(distinct),
        "num_planted": sum(len(found) for found in planted.values()),
    }
    for name, precision in (("self", SELF_PRECISION), ("relative", RELATIVE_PRECISION)):
        threshold = _threshold(planted, hardest, precision)
        report[f"{name}_threshold"] = threshold
        report[name] = _measure(planted, hardest, threshold)
    return report


def run_calibration(source: str, manifest: Path, config: EmbeddingsConfig) -> dict[str, Any]:
    """Calibrates the embedder of a recipe on the training images of a table.

    Args:
        source: Where the images are.
        manifest: `manifest.parquet`; of more than 5000 training images a sample is taken.
        config: The embedder.

    Raises:
        DataError: There are too few pictures, or the embedder does not separate them.
        LineageBroken: An image differs from the table.
    """
    table = pl.scan_parquet(manifest).filter(pl.col("split") == "train").select(COLUMNS).collect()
    if len(table) > MAX_IMAGES:
        rng = np.random.default_rng([config.seed, len(table)])
        table = table[np.sort(rng.choice(len(table), MAX_IMAGES, replace=False))]
    images = _LazyImages(source, table)
    return {"size": config.size, **calibrate(open_embedder(config), images, seed=config.seed)}


class _LazyImages(Sequence[Image.Image]):
    """Pictures of a table, decoded when asked for."""

    def __init__(self, source: str, table: pl.DataFrame) -> None:
        self._source = open_source(source)
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        rows = self._table[int(index) : int(index) + 1].to_dict(as_series=False)
        if not rows["path"]:
            raise IndexError(index)
        return next(read_images(self._source, rows))


def _embed(
    embedder: Embedder, images: Sequence[Image.Image], seed: int
) -> tuple[Floats, dict[str, Floats]]:
    """Embeddings [N, D], and per kind the similarity of each planted copy to its picture [P]."""
    order = np.random.default_rng([seed, 0]).permutation(len(images))
    chosen = set(order[:NUM_PLANTED].tolist())
    rows: list[Floats] = []
    planted: dict[str, list[float]] = {kind: [] for kind in COPIES}
    for index, image in enumerate(images):
        copies = list(_copies(image, seed, index)) if index in chosen else []
        found = embedder([image, *copies])
        rows.append(found[0])
        for kind, copy in zip(planted if copies else (), found[1:], strict=True):
            planted[kind].append(float(copy @ found[0]))
    similarity = {kind: np.array(found, np.float32) for kind, found in planted.items()}
    return np.stack(rows) if rows else np.empty((0, embedder.dim), np.float32), similarity


def _copies(image: Image.Image, seed: int, index: int) -> Iterator[Image.Image]:
    for number, copy in enumerate(COPIES.values()):
        yield copy(image, np.random.default_rng([seed, 1, index, number]))


def _group(rows: Floats) -> Any:
    """For each row the first that it equals: copies already in the pool are no negatives."""
    similarity, index = nearest(rows, rows, 64)
    same = np.where((similarity > _SAME) & (index >= 0), index, len(rows))
    return np.minimum(same.min(1, initial=len(rows)), np.arange(len(rows)))


def _threshold(planted: dict[str, Floats], hardest: Floats, precision: float) -> float:
    """Of the thresholds with that precision, in steps of .001, the one of highest recall.

    Equal recalls: the highest threshold, since pictures not seen here may be closer than these.
    """
    found = [(_measure(planted, hardest, step / 1000), step / 1000) for step in range(1, 1000)]
    precise = [
        (measured["recall"], threshold)
        for measured, threshold in found
        if measured["recall"] > 0 and measured["precision"] >= precision
    ]
    if not precise:
        msg = (
            f"embedder: its cosine does not tell copies from other pictures at precision "
            f"{precision}, got no such threshold. Use another embedder or a larger size."
        )
        raise DataError(msg)
    return max(precise)[1]


def _measure(planted: dict[str, Floats], hardest: Floats, threshold: float) -> dict[str, Any]:
    kinds = {kind: float((found > threshold).mean()) for kind, found in planted.items()}
    recall = float(np.mean(list(kinds.values())))
    false = float((hardest > threshold).mean())
    precision = recall / (recall + false) if recall + false > 0 else 0.0
    return {
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "recall_by_kind": {kind: round(value, 4) for kind, value in kinds.items()},
        "wrongly_linked": round(false, 4),
    }
