"""`images.bin`: which images a model was trained on, evaluated on, and which were left out.

    DINOIMG1 | u32 length | canonical JSON header | rows of 33 bytes: sha256 of the file, role

Rows are sorted by their bytes and none stands twice, so one digest is found by bisection on the
file and its several roles stand together. The header says what each role means; roles 1 to 3 always
mean the same, all others are of images that were left out. Standard library only, like all that
reads a release.
"""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from dinov3.release.atomic import atomic_write_parts
from dinov3.release.opening import open_regular
from dinov3.release.record import RecordError, canonical_json, parse_canonical
from dinov3.release.refusals import Refused

IMAGES_NAME = "images.bin"
SCHEMA = "dinov3.images/1"
ROLE_TRAINED = 1
ROLE_CLUSTERED = 2
ROLE_EVALUATED = 3
MEANINGS = {ROLE_TRAINED: "trained", ROLE_CLUSTERED: "clustered only", ROLE_EVALUATED: "evaluated"}

_MAGIC = b"DINOIMG1"
_DIGEST = 32  # bytes
_ROW = _DIGEST + 1
_MAX_HEADER = 1 << 16
_MAX_ROLE = 255
_LEFT_OUT = "excluded: "  # so begins the meaning of every other role
_ROWS_AT_ONCE = 1 << 14
_HEX = frozenset("0123456789abcdef")


def write_images(
    path: Path,
    rows: Iterable[tuple[bytes, int]],
    roles: Mapping[int, str],
    *,
    salt_sha256: str | None = None,
) -> None:
    """Writes the table whole: temporary name, fsync, rename. Equal rows in any order, equal bytes.

    Args:
        path: The file.
        rows: Digest and role of each image; a pair may come twice, a digest with several roles.
        roles: What each role means: the three of `MEANINGS`, and why others were left out.
        salt_sha256: sha256 of the salt where the digests are keyed, so that none reveals itself.

    Raises:
        ValueError: A digest is not of 32 bytes, or a role has no meaning.
    """
    buckets = [bytearray() for _ in range(256)]  # by first byte: sorted one at a time
    for digest, role in rows:
        if len(digest) != _DIGEST or role not in roles:
            msg = f"images: not a sha256 and a known role, got {digest!r} and {role}"
            raise ValueError(msg)
        bucket = buckets[digest[0]]
        bucket += digest
        bucket.append(role)
    sorted_rows = [_sorted_rows(bucket) for bucket in buckets]
    del buckets
    header = {
        "schema": SCHEMA,
        "roles": {str(role): meaning for role, meaning in roles.items()},
        "count": sum(map(len, sorted_rows)) // _ROW,
        "keyed": None if salt_sha256 is None else {"salt_sha256": salt_sha256},
    }
    _check_header(header, path.name)
    raw = canonical_json(header)
    atomic_write_parts(path, [_MAGIC, struct.pack("<I", len(raw)), raw, *sorted_rows])


def _sorted_rows(bucket: bytearray) -> bytes:
    rows = {bytes(bucket[at : at + _ROW]) for at in range(0, len(bucket), _ROW)}
    bucket.clear()
    return b"".join(sorted(rows))


@dataclass(frozen=True)
class Tally:
    """What one pass over all rows found."""

    counts: Mapping[int, int]  # rows by role
    overlap: int  # digests both trained and evaluated on
    first_overlap: bytes | None  # the first of them
    sha256: str  # of the bytes that were counted


class Images:
    """An open `images.bin`; made by `read_images`, used in a `with` statement or closed."""

    def __init__(self, stream: FileIO, where: str) -> None:
        self._stream = stream
        self._where = where
        header, self._head = self._read_header()
        self._start = len(self._head)
        self.count: int = header["count"]
        self.roles: dict[int, str] = {int(role): text for role, text in header["roles"].items()}
        self.salt_sha256: str | None = header["keyed"] and header["keyed"]["salt_sha256"]
        size = os.fstat(stream.fileno()).st_size
        if size != self._start + self.count * _ROW:
            self._refuse(f"{self.count} rows do not fill its {size} bytes")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Digest and role of every row, checked to be sorted, distinct and of known roles.

        Raises:
            Refused: `images-malformed`.
        """
        return self._walk(lambda rows: None)

    def _walk(self, on_bytes: Callable[[bytes], None]) -> Iterator[tuple[bytes, int]]:
        before = b""
        for at in range(0, self.count, _ROWS_AT_ONCE):
            rows = self._rows(at, min(_ROWS_AT_ONCE, self.count - at))
            on_bytes(rows)
            for start in range(0, len(rows), _ROW):
                row = rows[start : start + _ROW]
                if row <= before:
                    self._refuse(f"row {at + start // _ROW} is not after the one before it")
                if row[_DIGEST] not in self.roles:
                    self._refuse(f"row {at + start // _ROW} has an unknown role {row[_DIGEST]}")
                before = row
                yield row[:_DIGEST], row[_DIGEST]

    def find(self, digest: bytes) -> tuple[int, ...]:
        """The roles of a digest, none where it is not there; reads a few rows of the file only.

        Raises:
            Refused: `images-malformed`, a role of it is unknown.
        """
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if self._rows(middle, 1)[:_DIGEST] < digest:
                low = middle + 1
            else:
                high = middle
        found = []
        while low < self.count and (row := self._rows(low, 1))[:_DIGEST] == digest:
            if row[_DIGEST] not in self.roles or row[_DIGEST] in found:
                self._refuse(f"row {low} has an unknown role or stands twice")
            found.append(row[_DIGEST])
            low += 1
        return tuple(found)

    def tally(self) -> Tally:
        """Counts all rows in one pass, which also checks and hashes each of them.

        Raises:
            Refused: `images-malformed`.
        """
        counts: Counter[int] = Counter()
        overlap, first = 0, None
        trained = b""
        counted = hashlib.sha256(self._head)
        for digest, role in self._walk(counted.update):
            counts[role] += 1
            if role == ROLE_TRAINED:
                trained = digest
            elif role == ROLE_EVALUATED and digest == trained:  # roles of a digest are in order
                overlap += 1
                first = first or digest
        return Tally(dict(sorted(counts.items())), overlap, first, counted.hexdigest())

    def counts(self) -> dict[int, int]:
        """Rows by role, in one pass."""
        return dict(self.tally().counts)

    def overlap(self) -> int:
        """How many images were both trained and evaluated on, in one pass."""
        return self.tally().overlap

    def _rows(self, at: int, count: int) -> bytes:
        data = os.pread(self._stream.fileno(), count * _ROW, self._start + at * _ROW)
        if len(data) != count * _ROW:
            self._refuse("the file was shortened while it was read")
        return data

    def _read_header(self) -> tuple[dict[str, Any], bytes]:
        """The header and all bytes before the first row."""
        prefix = self._stream.read(len(_MAGIC) + 4)
        if prefix[: len(_MAGIC)] != _MAGIC or len(prefix) != len(_MAGIC) + 4:
            self._refuse(f"does not start with {_MAGIC.decode()}")
        (length,) = struct.unpack("<I", prefix[len(_MAGIC) :])
        if length > _MAX_HEADER:
            self._refuse(f"a header of more than {_MAX_HEADER} bytes, got {length}")
        raw = self._stream.read(length)
        try:
            header = parse_canonical(raw)
        except RecordError as error:
            raise Refused("images-malformed", self._where, str(error)) from error
        return _check_header(header, self._where), prefix + raw

    def _refuse(self, why: str) -> NoReturn:
        raise Refused("images-malformed", self._where, why)


def read_images(path: Path) -> Images:
    """Opens the table and checks its header and its size, not yet its rows.

    Raises:
        Refused: `images-malformed`, or `file-special`.
        OSError: It is not there or cannot be read.
    """
    stream = open_regular(path)
    try:
        return Images(stream, path.name)
    except BaseException:
        stream.close()
        raise


def _check_header(header: Any, where: str) -> dict[str, Any]:
    if not isinstance(header, dict) or header.keys() != {"schema", "roles", "count", "keyed"}:
        raise Refused("images-malformed", where, "its header lacks a field or has one too many")
    if header["schema"] != SCHEMA:
        raise Refused("images-malformed", where, f"its schema is not {SCHEMA}")
    count, roles, keyed = header["count"], header["roles"], header["keyed"]
    if type(count) is not int or count < 0:
        raise Refused("images-malformed", where, "its count is no number of rows")
    if not isinstance(roles, dict) or not all(_is_role(*pair) for pair in roles.items()):
        why = "its roles are not 1 to 255 with the meaning that each has"
        raise Refused("images-malformed", where, why)
    if keyed is not None and not _is_salt(keyed):
        raise Refused("images-malformed", where, "keyed by what is not the sha256 of a salt")
    return header


def _is_role(role: str, meaning: Any) -> bool:
    """Whether a role means what it has to: else one list could be counted in two ways."""
    known = role.isascii() and role.isdigit() and len(role) <= 3 and role == str(int(role))
    if not known or not 1 <= int(role) <= _MAX_ROLE or not isinstance(meaning, str):
        return False
    fixed = MEANINGS.get(int(role))
    return meaning.startswith(_LEFT_OUT) if fixed is None else meaning == fixed


def _is_salt(keyed: Any) -> bool:
    salt = keyed.get("salt_sha256") if isinstance(keyed, dict) and len(keyed) == 1 else None
    return isinstance(salt, str) and len(salt) == 64 and _HEX.issuperset(salt)
