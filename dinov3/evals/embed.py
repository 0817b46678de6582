"""Features of any pictures as a parquet table: `python -m dinov3 embed FOLDER --model PATH`.

Columns: path, sha256 of the file, embedding (float32, the CLS feature after the final norm, not
normalised). Pictures stream; a batch at a time is in memory.
"""

# B pictures of a batch, D width

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov3.device import choose_device
from dinov3.errors import DataError
from dinov3.evals.candidate import open_candidate
from dinov3.evals.features import Preparation, extract
from dinov3.evals.folder import SourceImage, read_images

_WHITE = (255, 255, 255)


def embed_source(
    *,
    source: str,
    model: str,
    weights: Path | None,
    output: Path,
    size: int,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Writes the features of every decodable picture of a source.

    Args:
        source: `kind:path`.
        model: Folder of a trained model, or a name of `dinov3.hub`.
        weights: File of a hub model's weights; None for a folder.
        output: The parquet file.
        size: Side of the square the model sees, pixels; the short side is resized to 8/7 of it.
        batch_size: Pictures per forward pass.
        device: auto, cpu, cuda, …

    Returns:
        num_images, and unreadable (reason -> count), which is also said on standard error.

    Raises:
        DataError: No picture can be read, or the output cannot be written there.
        CheckpointError: The model cannot be used.
        ConfigError: The size is not a multiple of the patch size.
    """
    _check_place(output)
    place = choose_device(device)
    candidate = open_candidate(model, weights, place)
    replace(candidate, scale=1.0).require_divisible(size, "size")  # it is what the model sees
    mean, std = candidate.mean, candidate.std
    prepare = Preparation("crop", round(size * 8 / 7), size, _WHITE, mean, std)
    unreadable: Counter[str] = Counter()
    images = read_images(source, unreadable)

    def tables() -> Iterator[pa.Table]:
        while batch := list(islice(images, batch_size)):
            pictures = (found.image for found in batch)
            features = extract(candidate.backbone, pictures, prepare, batch_size, place)
            yield _table(batch, features.cls)

    num_images = _write(output, tables(), source)
    if unreadable:
        sys.stderr.write(f"embed: {unreadable.total()} not readable: {dict(unreadable)}\n")
    return {"num_images": num_images, "unreadable": dict(sorted(unreadable.items()))}


def _check_place(output: Path) -> None:
    """Before the work: a misspelt folder is not made, a folder is not overwritten."""
    if not output.parent.is_dir():
        msg = f"output: no such folder, got {output.parent}. Make it first, or choose another."
        raise DataError(msg)
    if output.is_dir():
        msg = f"output: a folder, got {output}. Give the name of a file in it."
        raise DataError(msg)


def _table(batch: list[SourceImage], cls: np.ndarray) -> pa.Table:
    width = cls.shape[1]
    values = pa.array(np.ascontiguousarray(cls, dtype=np.float32).ravel())  # [B*D]
    return pa.table(
        {
            "path": pa.array([found.path for found in batch], pa.string()),
            "sha256": pa.array([found.sha256 for found in batch], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, width),
        }
    )


def _write(output: Path, tables: Iterator[pa.Table], source: str) -> int:
    """Writes the tables one by one under a temporary name; returns the number of rows."""
    temporary = output.with_name(f".{output.name}.tmp")
    first = next(tables, None)
    if first is None:
        msg = f"source: no readable image, got {source}. Choose another source."
        raise DataError(msg)
    try:
        num_rows: int = first.num_rows
        with pq.ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
                num_rows += table.num_rows
        temporary.replace(output)
    except OSError as error:
        msg = f"{output}: cannot be written: {error}. Free the disk or choose another place."
        raise DataError(msg) from error
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows
