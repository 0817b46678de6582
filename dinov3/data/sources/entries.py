"""What every source of images offers: entries in a fixed order, and the bytes of each.

`entries()` streams in ascending order of `path` and keeps no entry, so a source may be of any
length; what must be sorted is sorted in runs on disk.
"""

import heapq
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

RUN_SIZE = 100_000  # strings sorted in memory at once
_MAX_IGNORED_KINDS = 50
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing the source offers as an image.

    `refused` says why it can never be one ("reason" or "reason: detail"); else it is None and the
    bytes decide.
    """

    path: str
    label: str | None = None
    caption: str | None = None
    licence: str | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class StoredEntry(Entry):
    """An entry of `size` bytes that the source identifies by an address: nobody must read them."""

    address: str = field(kw_only=True)
    size: int = field(kw_only=True)


class ImageSource(ABC):
    """Images somewhere outside; `ignored` counts what the last `entries()` passed over, by kind.

    `is_pinned`: the name of the source can never stand for other images.
    """

    kind: str
    is_pinned = False

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All entries in ascending order of `path`, each path once unless refused."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of one entry.

        Raises:
            OSError: They cannot be read (see `paths.reason_of`).
        """

    @abstractmethod
    def file_of(self, path: str) -> str:
        """The file that holds the bytes of an entry: it changes when they do."""

    def ignore(self, kind: str) -> None:
        """Counts something passed over."""
        known = kind in self.ignored or len(self.ignored) < _MAX_IGNORED_KINDS
        self.ignored[kind if known else "other"] += 1


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot; empty without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - ten times faster, for every file


def clean_text(text: str) -> str | None:
    """A label or caption as one line that any UTF-8 file can hold; None when empty.

    Control characters count as space: shown on a terminal, they would steer it.
    """
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line.encode("utf-8", "backslashreplace").decode("utf-8") or None


def sort_lines(lines: Iterable[str], run_size: int = RUN_SIZE) -> Iterator[str]:
    """Strings without newlines in ascending order, never more than `run_size` of them in memory."""
    remaining = iter(lines)
    first = sorted(islice(remaining, run_size))
    runs: list[IO[str]] = []
    try:
        while chunk := sorted(islice(remaining, run_size)):
            runs.append(_write_run(chunk))
        if not runs:
            yield from first
            return
        runs.append(_write_run(first))
        del first
        for line in heapq.merge(*runs):
            yield line[:-1]
    finally:
        for run in runs:
            run.close()


def _write_run(lines: list[str]) -> IO[str]:
    run = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115 - outlives this
    run.writelines(f"{line}\n" for line in lines)
    run.seek(0)
    return run
