"""`list:FILE` (path, label, caption; tab-separated) and `parquet:FILE` (pictures or their paths).

A parquet file holds a column `image` (bytes, or a struct with `bytes`) or `path`, and optionally
`label`, `caption`, `licence`. Paths are relative to the folder of the table. A picture inside a
table is named `<file>!<row>`.
"""

import bisect
import errno
import os
from abc import abstractmethod
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from dinov3.data.sources.entries import Entry, ImageSource, clean_text, sort_lines
from dinov3.data.sources.paths import decode_path, encode_path, read_regular
from dinov3.errors import DataError

_EXTRAS = ("label", "caption", "licence")
_BATCH_ROWS = 4096


class PathTable(ImageSource):
    """Images named one by one by their paths; base of the two kinds of table."""

    def __init__(self, table: Path) -> None:
        super().__init__()
        if not table.is_file():
            msg = f"source: no such file, got {self.kind}:{table}. Give the path of a file."
            raise DataError(msg)
        self.table = table.absolute()
        self.root = str(self.table.parent)

    @abstractmethod
    def _rows(self) -> Iterator[tuple[bytes, str, str, str]]:
        """Path, label, caption and licence as written; empty where there is none."""

    def entries(self) -> Iterator[Entry]:
        """All named images; see `ImageSource.entries`."""
        self.ignored.clear()
        before = None
        for line in sort_lines(self._lines()):
            path, label, caption, licence = line.split("\0")
            refused = "named twice" if path == before else None
            before = path
            yield Entry(path, label or None, caption or None, licence or None, refused)

    def read(self, path: str) -> bytes:
        """The bytes of one image file."""
        return read_regular(self.file_of(path))

    def file_of(self, path: str) -> str:
        """Where the image lies."""
        return os.path.join(self.root, decode_path(path))  # noqa: PTH118 - a plain string

    def _lines(self) -> Iterator[str]:
        for written, *extras in self._rows():
            place = os.path.normpath(os.path.join(self.root, os.fsdecode(written)))  # noqa: PTH118
            relative = place.removeprefix(f"{self.root}/")
            texts = (clean_text(text) or "" for text in extras)
            yield "\0".join([encode_path(relative), *texts])


class ListSource(PathTable):
    """A text file with one path a line and, after tabs, a label and a caption."""

    kind = "list"

    def _rows(self) -> Iterator[tuple[bytes, str, str, str]]:
        try:
            stream = self.table.open("rb")
        except OSError as error:
            msg = f"source: cannot be read: {error.strerror}, got list:{self.table}. Allow it."
            raise DataError(msg) from error
        with stream:
            for line in stream:
                path, _, rest = line.rstrip(b"\r\n").partition(b"\t")
                if not path.strip():
                    self.ignore("empty line")
                    continue
                label, _, caption = rest.decode("utf-8", "backslashreplace").partition("\t")
                yield path, label, caption, ""


class ParquetPaths(PathTable):
    """A parquet table with a column of paths."""

    kind = "parquet"

    def _rows(self) -> Iterator[tuple[bytes, str, str, str]]:
        for row in _read_columns(self.table, ("path", *_EXTRAS)):
            path = row.get("path")
            if path is None:
                self.ignore("row without a path")
                continue
            written = path if isinstance(path, bytes) else str(path).encode("utf-8")
            label, caption, licence = (_text(row.get(name)) or "" for name in _EXTRAS)
            yield written, label, caption, licence


class ParquetImages(ImageSource):
    """A parquet table that holds the pictures themselves; one row group is in memory at a time."""

    kind = "parquet"

    def __init__(self, table: Path) -> None:
        super().__init__()
        self.table = table.absolute()
        self._name = encode_path(table.name).replace("!", "\\x21")
        self._group: tuple[int, Any] = (-1, None)
        self._starts: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": (-1, None)}

    def entries(self) -> Iterator[Entry]:
        """All rows; see `ImageSource.entries`."""
        self.ignored.clear()
        for index, row in enumerate(_read_columns(self.table, _EXTRAS)):
            texts = (_text(row.get(name)) for name in _EXTRAS)
            yield Entry(f"{self._name}!{index:012d}", *texts)

    def read(self, path: str) -> bytes:
        """The bytes of the picture in one row."""
        index = int(path.rpartition("!")[2])
        import pyarrow as pa

        try:
            value = self._cell(index)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise OSError(errno.EIO, f"row group not readable: {error}") from error
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise OSError(errno.ENOENT, "row without a picture")
        return value

    def file_of(self, path: str) -> str:
        """The table."""
        return str(self.table)

    def _cell(self, index: int) -> Any:
        import pyarrow.parquet as pq

        if not self._starts:
            metadata = pq.read_metadata(self.table)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._starts = [0, *accumulate(sizes)][:-1]
        group = bisect.bisect_right(self._starts, index) - 1
        if self._group[0] != group:
            self._group = (-1, None)  # two groups never stay in memory
            with pq.ParquetFile(self.table, memory_map=True) as file:
                self._group = (group, file.read_row_group(group, columns=["image"]).column(0))
        return self._group[1][index - self._starts[group]].as_py()


def open_parquet(table: Path) -> ImageSource:
    """The source a parquet table is, by its columns.

    Raises:
        DataError: Not a parquet file, or without a column `image` or `path`.
    """
    if not table.is_file():
        msg = f"source: no such file, got parquet:{table}. Give the path of a file."
        raise DataError(msg)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(table).names
    except (pa.ArrowException, OSError) as error:
        msg = f"source: not readable as parquet ({error}), got parquet:{table}. Write it anew."
        raise DataError(msg) from error
    if "image" in names:
        return ParquetImages(table)
    if "path" in names:
        return ParquetPaths(table)
    msg = f"source: no column image or path, got {', '.join(names)} in {table}. Rename one."
    raise DataError(msg)


def _read_columns(table: Path, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of the named columns, as far as the table has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            present = [name for name in names if name in file.schema_arrow.names]
            if not present:
                yield from ({} for _ in range(file.metadata.num_rows))
                return
            for batch in file.iter_batches(_BATCH_ROWS, columns=present):
                yield from batch.to_pylist()
    # text that is not UTF-8, a date that no calendar has
    except (pa.ArrowException, ValueError, OverflowError) as error:
        msg = f"source: {table} is damaged: {error}. Write it anew."
        raise DataError(msg) from error


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return clean_text(text)
