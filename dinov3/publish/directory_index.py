"""The index of a directory store: one small file an entry, each naming the one before it.

It only grows. A file is linked under the next free number, which fails if another took it.
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dinov3.errors import StoreError
from dinov3.publish.copying import link_new
from dinov3.publish.entry import Release, check_name
from dinov3.release.files import read_file
from dinov3.release.record import RecordError, canonical_json, parse_object
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.render import visible

SCHEMA = "dinov3.index/1"
RESTORE = "Restore the store from a copy."
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_SMALL = 2 << 20  # bytes of an entry or a withdrawal


@dataclass(frozen=True)
class Line:
    """One entry of the index: its own digest, and the release it makes visible."""

    digest: str
    model: str
    version: str
    release: str


class Index:
    """The entries of a store; who appends holds the store's lock."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def lines(self) -> list[Line]:
        """All entries, oldest first.

        They are read by number: a listing may show a new entry and miss the one made before it.

        Raises:
            StoreError: One is gone, malformed, or does not follow the one before it.
        """
        lines: list[Line] = []
        while (path := self._path(len(lines) + 1)).exists():
            data = read_small(self._root, f"index/{path.name}")
            lines.append(_read_line(path, data, lines[-1].digest if lines else None))
        later = any(other.name > path.name for other in path.parent.glob("*.json"))
        if later and not path.exists():
            msg = f"{path}: the index is broken: an entry is gone. {RESTORE}"
            raise StoreError(msg)
        return lines

    def head(self) -> str | None:
        """Digest of the last entry."""
        lines = self.lines()
        return lines[-1].digest if lines else None

    def append(self, release: Release, base: str | None, beside: Path) -> Line:
        """Makes a release visible.

        Args:
            release: Its content stands in its place already.
            base: The head when its publisher began.
            beside: A folder of the publisher, for the draft.
        """
        lines = self.lines()
        entry = {
            "schema": SCHEMA,
            "number": len(lines) + 1,
            "model": release.model,
            "version": release.version,
            "digest": release.digest,
            "base": base,
            "previous": lines[-1].digest if lines else None,
        }
        link_new(self._path(len(lines) + 1), canonical_json(entry), beside)
        return self.lines()[-1]

    def _path(self, number: int) -> Path:
        return self._root / "index" / f"{number:06}.json"


def read_small(root: Path, name: str) -> bytes:
    """A small file of the store: whatever was planted there, this neither waits nor grows."""
    try:
        return read_file(root, name, limit=_MAX_SMALL)
    except (Refused, CannotCheck) as error:
        msg = f"{root / name}: cannot be read: {visible(str(error))}. {RESTORE}"
        raise StoreError(msg) from error


def read_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object of a small file of the store.

    Raises:
        StoreError: It is none.
    """
    try:
        return parse_object(data)
    except RecordError as error:
        msg = f"{path}: cannot be read: {visible(str(error))}. {RESTORE}"
        raise StoreError(msg) from error


def _read_line(path: Path, data: bytes, previous: str | None) -> Line:
    raw = read_object(path, data)
    kinds = {"schema": str, "number": int, "model": str, "version": str, "digest": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(raw.get(name), kind)]
    if wrong or raw["schema"] != SCHEMA or not _DIGEST.fullmatch(raw["digest"]):
        msg = f"{path}: the index is broken: no entry of {SCHEMA}. {RESTORE}"
        raise StoreError(msg)
    if path.name != f"{raw['number']:06}.json" or raw.get("previous") != previous:
        msg = f"{path}: the index is broken: does not follow the entry before it. {RESTORE}"
        raise StoreError(msg)
    check_name(raw["model"], raw["version"])
    return Line(sha256(data).hexdigest(), raw["model"], raw["version"], raw["digest"])
