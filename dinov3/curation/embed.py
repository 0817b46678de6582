"""Stage `image_embeddings`: one unit vector per row of the image table, in its order.

Rows stream through in batches: memory does not grow with their number. Every image's bytes are
compared with the sha256 of the table, so a source that changed since stops the stage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dinov3.config import EmbeddingsConfig, dump
from dinov3.curation.embedders import Embedder, open_embedder
from dinov3.curation.neighbours import Floats
from dinov3.data.decode import composite, decode_image
from dinov3.data.sources import open_source
from dinov3.data.sources.entries import ImageSource
from dinov3.data.sources.images import SourceImages
from dinov3.errors import DataError
from dinov3.release.record import file_sha256
from dinov3.stage import open_stage

EMBEDDINGS_NAME = "embeddings.parquet"
COLUMNS = ["path", "sha256", "width", "height"]
WHITE = (255, 255, 255)
_ROW_GROUP = 4096  # rows; not the batch size, which may not change the file


def make_embeddings(*, source: str, manifest: Path, output: Path, config: EmbeddingsConfig) -> None:
    """Embeds every image of a table into `embeddings.parquet`: path, sha256, embedding.

    Args:
        source: One-line specification of where the images are.
        manifest: `manifest.parquet` of `image_manifest`.
        output: Folder of the stage.
        config: Embedder, its weights and its size.

    Raises:
        ConfigError: No such embedder.
        DataError: The table is empty or an input is missing.
        LineageBroken: The table or an image differs from what is recorded.
    """
    with open_stage("image_embeddings", output, config=dump(config)) as stage:
        table = pq.ParquetFile(stage.read("manifest", manifest))
        if table.metadata.num_rows == 0:
            msg = f"{manifest}: holds no image, got 0 rows. Make image_manifest of another source."
            raise DataError(msg)
        embedder = open_embedder(config)
        if config.weights is not None:
            weights = Path(config.weights)
            stage.read_root("embedder", weights.name, file_sha256(weights), set())
        stage.seeds["embeddings"] = config.seed
        stage.facts = {
            "rows": table.metadata.num_rows,
            "embedder": embedder.name,
            "dim": embedder.dim,
        }
        _write(stage.path(EMBEDDINGS_NAME), table, open_source(source), embedder, config)


def read_images(source: ImageSource, rows: dict[str, list[Any]]) -> Iterator[Image.Image]:
    """The pictures of some rows of the table as RGB on white.

    Args:
        source: Where they are.
        rows: The columns `COLUMNS`.

    Raises:
        LineageBroken: An image's bytes differ from the table.
    """
    images = SourceImages(source, rows["path"], rows["sha256"])
    for index, (width, height) in enumerate(zip(rows["width"], rows["height"], strict=True)):
        decoded = decode_image(images.read(index), max_pixels=max(1, width * height))
        yield composite(decoded, WHITE)


def _write(
    path: Path,
    table: pq.ParquetFile,
    source: ImageSource,
    embedder: Embedder,
    config: EmbeddingsConfig,
) -> None:
    vector = pa.list_(pa.float32(), embedder.dim)
    schema = pa.schema([("path", pa.string()), ("sha256", pa.string()), ("embedding", vector)])
    with (
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
        _progress() as progress,
    ):
        task = progress.add_task("", total=table.metadata.num_rows)
        for group in table.iter_batches(_ROW_GROUP, columns=COLUMNS):
            parts = []
            for start in range(0, group.num_rows, config.run.batch_size):
                rows = group.slice(start, config.run.batch_size).to_pydict()
                parts.append(_checked(embedder, list(read_images(source, rows))))
                progress.advance(task, len(rows["path"]))
            flat = pa.array(np.concatenate(parts).ravel())
            columns = [
                group.column("path").cast(pa.string()),
                group.column("sha256").cast(pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, embedder.dim),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _checked(embedder: Embedder, images: list[Image.Image]) -> Floats:
    rows = embedder(images)
    if not np.isfinite(rows).all():
        msg = (
            f"embedder: gives non-finite values, got them from {embedder.name}. Use other weights."
        )
        raise DataError(msg)
    return rows


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
