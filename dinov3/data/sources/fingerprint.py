"""One small file that says what a source holds, for dvc to watch instead of the source.

dvc cannot depend on pipes, loops, shards or lists of paths; it depends on this file. Its content is
a pure function of the images' bytes and descriptions, and it is rewritten only when that changes.
Hashes are kept by (size, mtime, ctime, inode), so asking again costs one stat an image; of a pinned
source the value itself is kept, and asking again costs nothing.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from dinov3.data.sources import Entry, ImageSource, open_source, require_images
from dinov3.data.sources.entries import StoredEntry
from dinov3.data.sources.paths import reason_of
from dinov3.errors import ConfigError, DataError
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, digest_of, file_sha256

RELATIVE_PATH = Path("data/raw_images/fingerprint.json")
RELATIVE_CACHE = Path(".cache/fingerprint.sqlite")

_SETTLED_NS = 2_000_000_000  # a file changed within its clock's tick would keep its stat
_COMMIT_EVERY = 5_000
_UNSAFE = frozenset('"$`\\\n')  # the pipeline writes the source between double quotes


class Fingerprint:
    """Collects the digest of a source while its entries pass by, in their order."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.num_files = 0
        self.num_bytes = 0
        self._digest = hashlib.sha256()

    def add(self, entry: Entry, identity: str, num_bytes: int) -> None:
        """Adds one entry; `identity` is the sha256 of its bytes, or why they cannot be read.

        Where the source has an address for them, that counts: it is known without reading.
        """
        self.num_files += 1
        self.num_bytes += num_bytes
        if isinstance(entry, StoredEntry):
            identity = entry.address
        row = [entry.path, entry.label, entry.caption, entry.licence, identity]
        self._digest.update(canonical_json(row))

    def value(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "source": self.kind,
            "num_files": self.num_files,
            "bytes": self.num_bytes,
            "sha256": self._digest.hexdigest(),
        }


def identify(source: ImageSource, entry: Entry) -> tuple[str, bytes | None]:
    """sha256 of an entry's bytes and the bytes, or the reason it has none and None."""
    if entry.refused is not None:
        return entry.refused, None
    try:
        data = source.read(entry.path)
    except OSError as error:
        return ": ".join(reason_of(error)), None
    return hashlib.sha256(data).hexdigest(), data


def refresh(spec: str, path: Path, cache: Path) -> dict[str, Any]:
    """Brings the fingerprint file up to date; it is left alone when nothing changed.

    Args:
        spec: The source, e.g. `folder:/my/pictures`.
        path: The fingerprint file.
        cache: SQLite file of known hashes; made when missing, remade when damaged.

    Raises:
        DataError: The source cannot be used or is empty, or a file cannot be written.
    """
    source = open_source(spec)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            value = _measure(source, cache)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            cache.unlink()  # not a database: begin again
            value = _measure(source, cache)
    except (OSError, sqlite3.Error) as error:
        place = getattr(error, "filename", None) or cache
        msg = f"{place}: cannot be used: {error}. Free the disk, or allow it."
        raise DataError(msg) from error
    require_images(spec, source, value["num_files"])
    content = canonical_json(value)
    if not path.is_file() or path.read_bytes() != content:
        atomic_write(path, content)
    return value


def refresh_from_params(params: Path, spec: str | None = None) -> dict[str, Any]:
    """Refreshes `data/raw_images/fingerprint.json` beside `params.yaml` for the source it names.

    Args:
        params: The parameter file of the pipeline.
        spec: A source that takes the place of the one in the file.

    Raises:
        ConfigError: The file is missing, not YAML or names no source, or one that the shell would
            read as more than a path.
        DataError: See `refresh`.
    """
    if spec is None:
        try:
            tree = yaml.safe_load(params.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            msg = f"{params}: not readable: {error}. Restore it."
            raise ConfigError(msg) from error
        spec = tree.get("source") if isinstance(tree, dict) else None
    if not isinstance(spec, str):
        msg = f"{params}: source is not one line of text, got {spec!r}. Write source: kind:path."
        raise ConfigError(msg)
    if unsafe := sorted(_UNSAFE & set(spec)):
        msg = f"source: cannot stand in a command line, got {unsafe[0]!r} in {spec!r}. Rename it."
        raise ConfigError(msg)
    return refresh(spec, params.parent / RELATIVE_PATH, params.parent / RELATIVE_CACHE)


def _measure(source: ImageSource, cache: Path) -> dict[str, Any]:
    fingerprint = Fingerprint(source.kind)
    with _open_cache(cache) as known:
        if source.is_pinned and (found := known.value_of(source)) is not None:
            return found
        for entry in source.entries():
            identity, num_bytes = _identify_cached(source, entry, known)
            fingerprint.add(entry, identity, num_bytes)
        if source.is_pinned and fingerprint.num_files > 0:
            known.put_value(source, fingerprint.value())
    return fingerprint.value()


def _identify_cached(source: ImageSource, entry: Entry, known: "_Hashes") -> tuple[str, int]:
    if entry.refused is not None:
        return entry.refused, 0
    if isinstance(entry, StoredEntry):
        return entry.address, entry.size
    place = source.file_of(entry.path)
    try:
        before = _stat_key(place)
    except (OSError, ValueError):
        return identify(source, entry)[0], 0
    name = f"{place}\0{entry.path}"
    if (found := known.get(name, before)) is not None:
        return found
    identity, data = identify(source, entry)
    if data is None:
        return identity, 0
    if time.time_ns() - max(before[1], before[2]) > _SETTLED_NS and _is_still(place, before):
        known.put(name, before, identity, len(data))
    return identity, len(data)


def _stat_key(place: str) -> tuple[int, int, int, int]:
    found = os.stat(place)  # noqa: PTH116 - for every file
    inode = found.st_ino & 0x7FFF_FFFF_FFFF_FFFF  # SQLite's integers are signed
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, inode


def _is_still(place: str, key: tuple[int, int, int, int]) -> bool:
    try:
        return _stat_key(place) == key
    except OSError:
        return False


class _Hashes:
    """Known hashes by name and stat."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._new: list[tuple[bytes | str | int, ...]] = []
        connection.execute("PRAGMA synchronous = OFF")  # losing it costs time, not truth
        connection.execute(
            "CREATE TABLE IF NOT EXISTS hashes (name TEXT PRIMARY KEY, size, mtime, ctime, inode, "
            "sha256, bytes) WITHOUT ROWID"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS pinned (name TEXT PRIMARY KEY, value) WITHOUT ROWID"
        )

    def value_of(self, source: ImageSource) -> dict[str, Any] | None:
        """The value of a pinned source, when this code found it before."""
        query = "SELECT value FROM pinned WHERE name = ?"
        row = self._connection.execute(query, (_listing_key(source),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put_value(self, source: ImageSource, value: dict[str, Any]) -> None:
        """Keeps the value of a pinned source."""
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO pinned VALUES (?, ?)",
                (_listing_key(source), json.dumps(value)),
            )

    def get(self, name: str, key: tuple[int, int, int, int]) -> tuple[str, int] | None:
        """sha256 and length of the bytes, when the stat is the one they were read under."""
        query = "SELECT sha256, bytes, size, mtime, ctime, inode FROM hashes WHERE name = ?"
        row = self._connection.execute(query, (_storable(name),)).fetchone()
        return (row[0], row[1]) if row is not None and tuple(row[2:]) == key else None

    def put(self, name: str, key: tuple[int, int, int, int], sha256: str, num_bytes: int) -> None:
        """Keeps one hash."""
        self._new.append((_storable(name), *key, sha256, num_bytes))
        if len(self._new) >= _COMMIT_EVERY:
            self.commit()

    def commit(self) -> None:
        """Writes what was kept."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?, ?, ?)", self._new
            )
        self._new.clear()


@contextmanager
def _open_cache(path: Path) -> Iterator[_Hashes]:
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        known = _Hashes(connection)
        yield known
        known.commit()


def _listing_key(source: ImageSource) -> str:
    """Changes with the name and with the code that decides what is listed, and how."""
    code = [file_sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return digest_of([source.kind, code])


def _storable(name: str) -> bytes:
    return os.fsencode(name)
