"""`wds:PATTERN`: pictures in tar shards (WebDataset). PATTERN takes `*` and `{000..123}`, `{a,b}`.

Members that share a name up to its first dot are one sample: `.cls` is the label, `.txt` the
caption, `.json` may hold both. A member is named `<shard>!<member>` and read by its offset, never
by unpacking. Damaged, missing and compressed shards are listed.
"""

import bisect
import errno
import glob
import hashlib
import json
import os
import re
import stat
import tarfile
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.data.sources.entries import Entry, ImageSource, clean_text, suffix_of
from dinov3.data.sources.paths import (
    IMAGE_SUFFIXES,
    MAX_FILE_SIZE,
    decode_path,
    encode_path,
    reason_of,
)
from dinov3.errors import DataError

_SIDES = {".cls": "label", ".txt": "caption", ".json": "json"}
_MAX_SIDE_SIZE = 2**20  # bytes of a label or caption
_MAX_INDEXES = 1024  # shards whose member offsets stay in memory (24 bytes a member)
_MAX_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a shard: `refused` or its place."""

    name: str
    offset: int
    size: int
    refused: str | None = None


class ShardSource(ImageSource):
    """Pictures in tar files."""

    kind = "wds"

    def __init__(self, pattern: str) -> None:
        super().__init__()
        shards = sorted(set(_expand(pattern)))
        if not any(os.path.isfile(shard) for shard in shards):  # noqa: PTH113
            msg = f"source: no such shard, got wds:{pattern}. Give a pattern that names tar files."
            raise DataError(msg)
        self.root = os.path.abspath(_fixed_folder(pattern))  # noqa: PTH100 - keeps links
        names = {_encode_shard(os.path.relpath(shard, self.root)): shard for shard in shards}
        self._shards = {name: os.path.abspath(names[name]) for name in names}  # noqa: PTH100
        self._indexes: OrderedDict[str, _Index] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def entries(self) -> Iterator[Entry]:
        """All pictures of all shards; see `ImageSource.entries`."""
        self.ignored.clear()
        for name in sorted(self._shards, key=lambda name: f"{name}!"):
            members: list[Member] = []
            try:
                with _open_shard(self._shards[name]) as file:
                    damage = scan(file, members)
                    if damage is not None:
                        yield Entry(name, refused=damage)
                    yield from self._samples(name, members, file)
            except OSError as error:
                reason, detail = reason_of(error)
                yield Entry(name, refused=f"{reason}: shard: {detail}")

    def read(self, path: str) -> bytes:
        """The bytes of one member."""
        shard, _, name = path.partition("!")
        with _open_shard(self._shards[shard]) as file:
            if shard not in self._indexes:
                members: list[Member] = []
                scan(file, members)
                self._indexes[shard] = _Index(members)
                if len(self._indexes) > _MAX_INDEXES:
                    self._indexes.popitem(last=False)
            offset, size = self._indexes[shard].find(decode_path(name))
            return _read_part(file, offset, size)

    def file_of(self, path: str) -> str:
        """The shard that holds the member."""
        return self._shards[path.partition("!")[0]]

    def _samples(self, shard: str, members: list[Member], file: Any) -> Iterator[Entry]:
        sides: defaultdict[str, dict[str, Member]] = defaultdict(dict)
        pictures: list[tuple[str, Member]] = []
        for member in members:
            suffix = suffix_of(member.name)
            if suffix in IMAGE_SUFFIXES or member.refused is not None:
                pictures.append((f"{shard}!{encode_path(member.name)}", member))
            elif suffix in _SIDES:
                sides[_sample_of(member.name)][_SIDES[suffix]] = member
            else:
                self.ignore(suffix or "no suffix")
        before = None
        for path, member in sorted(pictures, key=lambda pair: pair[0]):
            if member.refused is not None or path == before:
                yield Entry(path, refused=member.refused or "named twice")
                continue
            before = path
            yield Entry(path, **self._describe(sides.get(_sample_of(member.name), {}), file))

    def _describe(self, sides: dict[str, Member], file: Any) -> dict[str, str | None]:
        """Label, caption and licence of a sample from the members beside its picture."""
        found: dict[str, str | None] = {}
        for side, member in sides.items():
            if member.size > _MAX_SIDE_SIZE:
                self.ignore(f"{side} larger than {_MAX_SIDE_SIZE} bytes")
                continue
            text = _read_part(file, member.offset, member.size).decode("utf-8", "backslashreplace")
            if side != "json":
                found[side] = clean_text(text)
                continue
            try:
                found = {**_from_json(json.loads(text)), **found}
            except (ValueError, RecursionError):
                self.ignore("damaged .json")
        return found


class _Index:
    """Offsets of a shard's members by a 64-bit digest of their names."""

    def __init__(self, members: list[Member]) -> None:
        usable: dict[int, Member] = {}
        for member in members:
            if member.refused is None:
                usable.setdefault(_name_key(member.name), member)
        keys = sorted(usable)
        self._keys = array("Q", keys)
        self._offsets = array("Q", [usable[key].offset for key in keys])
        self._sizes = array("Q", [usable[key].size for key in keys])

    def find(self, name: str) -> tuple[int, int]:
        """Offset and size of a member."""
        key = _name_key(name)
        at = bisect.bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            raise OSError(errno.ENOENT, "no such member")
        return self._offsets[at], self._sizes[at]


def scan(file: Any, members: list[Member]) -> str | None:
    """Appends the members of an open shard; returns what is wrong with the shard, or None."""
    start = file.read(4)
    file.seek(0)
    if start[:2] == b"\x1f\x8b" or start[:3] in (b"BZh", b"\xfd7z") or start == b"\x28\xb5\x2f\xfd":
        return "compressed shard: unpack it to a plain .tar"
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=tarfile.TarInfo) as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if found.size < 0:  # the next header would be one that was read before
                    msg = "a member of negative size"
                    raise tarfile.ReadError(msg)
                if not found.isdir():
                    members.append(_member(found))
            end = tar.offset  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        return f"damaged shard: after {len(members)} members: {error}"
    # tarfile stops without a word at a header it cannot read
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        return f"damaged shard: after {len(members)} members: header not readable"
    return None


def _member(found: tarfile.TarInfo) -> Member:
    refused = None
    if not found.isreg() or found.issparse():
        refused = "not a regular file: special member of a shard"
    elif found.size > MAX_FILE_SIZE:
        refused = f"file too large: {found.size} bytes, the limit is {MAX_FILE_SIZE}"
    return Member(found.name, found.offset_data, found.size, refused)


def _open_shard(path: str) -> Any:
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a plain string
        raise OSError(errno.EINVAL, "neither a file nor a link to one")
    return Path(path).open("rb")


def _read_part(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(size)
    if len(data) != size:
        raise OSError(errno.EIO, f"shard ends after {len(data)} of {size} bytes")
    return data


def _from_json(tree: Any) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    names = {
        "label": ("label", "cls", "class"),
        "caption": ("caption", "text"),
        "licence": ("licence", "license"),
    }
    for field, keys in names.items():
        value = next((tree[key] for key in keys if isinstance(tree, dict) and key in tree), None)
        if isinstance(value, (str, int)):
            found[field] = clean_text(str(value))
    return found


def _sample_of(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _name_key(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _encode_shard(name: str) -> str:
    return encode_path(name).replace("!", "\\x21")


def _expand(pattern: str) -> Iterator[str]:
    """Shards a pattern names: braces are a promise (kept in the list when missing), `*` is not."""
    count = 0
    for piece in _expand_braces(pattern):
        for shard in glob.iglob(piece, recursive=True) if glob.has_magic(piece) else (piece,):  # noqa: PTH207
            count += 1
            if count > _MAX_SHARDS:
                msg = f"source: names more than {_MAX_SHARDS} shards, got wds:{pattern}. Split it."
                raise DataError(msg)
            yield shard


def _expand_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inside = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        choices: Iterator[str] = iter(inside.split(","))
    else:
        low, high = numbers.groups()
        choices = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _fixed_folder(pattern: str) -> str:
    """The folder before the first part of a pattern that varies."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return os.path.dirname(fixed) or "."  # noqa: PTH120 - not yet a path
