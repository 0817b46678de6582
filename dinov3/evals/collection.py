"""The pictures of an evaluation: two labelled halves, what is held out, and proof of no overlap.

The training half is what k-NN and probes may look at, the test half is only judged. Both come from
a table with one row per image: path, sha256, pixel_sha256, label, split.
"""

# N pictures, C classes

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from PIL import Image

from dinov3.data.decode import decode_image
from dinov3.data.sources import open_source
from dinov3.data.sources.images import SourceImages
from dinov3.errors import DataError

COLUMNS = ("path", "sha256", "pixel_sha256", "label", "split")
KEPT_COLUMNS = ("path", "sha256", "kept")  # of a curated dataset
Places = npt.NDArray[np.int64]  # rows of the table


@dataclass(frozen=True)
class Halves:
    """The labelled part of a table, cut in two."""

    classes: tuple[str, ...]
    train: Places
    test: Places
    train_labels: npt.NDArray[np.int64]  # indices of classes
    test_labels: npt.NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    @property
    def usable(self) -> bool:
        """Whether label-dependent protocols make sense."""
        return len(np.unique(self.train_labels)) > 1 and len(self.test) > 0


def read_columns(path: Path, columns: Sequence[str], kind: str) -> pl.DataFrame:
    """These columns of a table.

    Args:
        path: A parquet file.
        columns: By name.
        kind: What the table should be, for messages.

    Raises:
        DataError: It is no parquet, or a column is missing.
    """
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


def labelled_halves(
    table: pl.DataFrame, *, exclude_labels: Iterable[str], min_per_class: int
) -> Halves:
    """Rows of classes that are not excluded and have enough images, both halves together.

    Args:
        table: One row per image, see `COLUMNS`.
        exclude_labels: Classes left out.
        min_per_class: Fewer images than this leave a class out.
    """
    labels = table["label"].to_list()
    excluded = set(exclude_labels)
    counts = Counter(label for label in labels if label is not None and label not in excluded)
    classes = tuple(sorted(label for label, count in counts.items() if count >= min_per_class))
    index_of = {label: index for index, label in enumerate(classes)}
    indices = np.array([index_of.get(label, -1) for label in labels], dtype=np.int64)
    is_test = (table["split"] == "test").to_numpy()
    train = np.flatnonzero((indices >= 0) & ~is_test)
    test = np.flatnonzero((indices >= 0) & is_test)
    return Halves(classes, train, test, indices[train], indices[test])


def require_no_overlap(
    table: pl.DataFrame, halves: Halves, kept: pl.DataFrame | None = None
) -> None:
    """Proves that no held-out image was looked at, by its bytes and by its pixels.

    Args:
        table: One row per image.
        halves: Its labelled part.
        kept: The rows a model was trained on, with sha256 and pixel_sha256.

    Raises:
        DataError: An image stands on both sides.
    """
    held_out = table.filter(pl.col("split") == "test")
    for column in ("sha256", "pixel_sha256"):
        _refuse_shared(table[halves.train], table[halves.test], column, "the training half")
        if kept is not None:
            _refuse_shared(kept, held_out, column, "the training data")


class Pictures:
    """Decoded pictures of the rows of a table, read when asked for."""

    def __init__(self, source: str, table: pl.DataFrame) -> None:
        """Opens the source; the bytes of every picture must have the sha256 of its row."""
        paths, digests = table["path"].to_list(), table["sha256"].to_list()
        self._images = SourceImages(open_source(source), paths, digests)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, places: Iterable[int]) -> Iterator[Image.Image]:
        """Pictures of some rows, in the order asked for, one at a time.

        Raises:
            LineageBroken: A file changed since the table was made.
        """
        for place in places:
            yield decode_image(self._images.read(int(place)))


class JoinedPictures:
    """Several collections as one: the rows of the second follow those of the first."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        """Keeps the parts."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def load(self, places: Iterable[int]) -> Iterator[Image.Image]:
        """Pictures of some rows, in the order asked for, one at a time."""
        for place in places:
            number = int(np.searchsorted(self._ends, place, side="right"))
            before = int(self._ends[number - 1]) if number else 0
            yield from self._parts[number].load([int(place) - before])


def _refuse_shared(seen: pl.DataFrame, held_out: pl.DataFrame, column: str, name: str) -> None:
    shared = held_out.filter(pl.col(column).is_in(seen[column].unique().implode()))
    if shared.height:
        first = shared["path"][0]
        msg = (
            f"{column}: {shared.height} held-out images are also in {name}, got {first!r} first. "
            f"Remove the copies or curate again."
        )
        raise DataError(msg)
