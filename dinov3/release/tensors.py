"""The tensor digest: identity of weights that does not depend on their container.

It is the sha256 of the canonical JSON list `[[name, dtype, shape, sha256(bytes)], …]`, sorted by
the UTF-8 bytes of the name, dtype in safetensors' own words. Read straight from a safetensors file,
without torch, in constant memory.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from dinov3.release.record import RecordError, digest_of, parse_json

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_CHUNK = 1 << 20


def tensor_digest(path: Path) -> str:
    """Digest of all tensors of one safetensors file.

    Raises:
        RecordError: The file is not a well-formed safetensors file.
    """
    with path.open("rb") as stream:
        header, start = _read_header(stream, path.stat().st_size)
        rows = []
        for name in sorted(header, key=lambda text: text.encode()):
            entry = header[name]
            begin, end = entry["data_offsets"]
            rows.append([name, entry["dtype"], entry["shape"], _hash(stream, start, begin, end)])
    return digest_of(rows)


def _read_header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
    if length > min(_MAX_HEADER, size - 8):
        msg = f"safetensors header: length runs past the file, got {length} of {size} bytes"
        raise RecordError(msg)
    header = parse_json(stream.read(length))
    if not isinstance(header, dict):
        msg = "safetensors header: not an object"
        raise RecordError(msg)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(name, entry)
    _check_offsets(header, size - 8 - length)
    return header, 8 + length


def _check_entry(name: str, entry: Any) -> None:
    """A tensor has a name in UTF-8, a dtype, a shape and two offsets; its size is not judged."""
    if not _is_text(name):
        msg = f"safetensors header: a name is not Unicode, got {name!r}"
        raise RecordError(msg)
    fields = entry if isinstance(entry, dict) else {}
    offsets = fields.get("data_offsets")
    if not _is_text(fields.get("dtype")) or not _are_sizes(fields.get("shape")):
        msg = f"safetensors header: {name!r} lacks a dtype or a shape"
        raise RecordError(msg)
    if not _are_sizes(offsets) or len(offsets) != 2:
        msg = f"safetensors header: {name!r} lacks data_offsets of two integers"
        raise RecordError(msg)


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold, which a lone surrogate is not."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """A list of integers, none negative; JSON's true is an integer to Python."""
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _check_offsets(header: dict[str, Any], size: int) -> None:
    """The byte ranges must tile the data exactly: no gap, no overlap, nothing left over."""
    ranges = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    at = 0
    for begin, end in ranges:
        if begin != at or end < begin:
            msg = f"safetensors header: byte ranges do not tile the data, got {begin} after {at}"
            raise RecordError(msg)
        at = end
    if at != size:
        msg = f"safetensors header: {size - at} bytes belong to no tensor"
        raise RecordError(msg)


def _hash(stream: BinaryIO, start: int, begin: int, end: int) -> str:
    stream.seek(start + begin)
    digest = hashlib.sha256()
    left = end - begin
    while left:
        chunk = stream.read(min(_CHUNK, left))
        if not chunk:
            msg = "safetensors data ends early"
            raise RecordError(msg)
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
