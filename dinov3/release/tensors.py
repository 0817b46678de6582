"""The tensor digest: identity of weights that does not depend on their container.

It is the sha256 of the canonical JSON list `[[name, dtype, shape, sha256(bytes)], …]`, sorted by
the UTF-8 bytes of the name, dtype in safetensors' own words. Read straight from a safetensors file,
without torch, in constant memory.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

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
        for name in sorted(header, key=lambda text: text.encode("utf-8")):
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
    _check_offsets(header, size - 8 - length)
    return header, 8 + length


def _check_offsets(header: dict[str, Any], size: int) -> None:
    """The byte ranges must tile the data exactly: no gap, no overlap, nothing left over."""
    try:
        ranges = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    except (KeyError, TypeError) as error:
        msg = f"safetensors header: an entry lacks data_offsets: {error}"
        raise RecordError(msg) from error
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
