"""The tensor digest: identity of weights that does not depend on their container.

It is the sha256 of the canonical JSON list `[[name, dtype, shape, sha256(bytes)], …]`, sorted by
the UTF-8 bytes of the name, dtype in safetensors' own words. Read straight from a safetensors file,
without torch, in constant memory. A header that readers could take differently is refused.
"""

import hashlib
import math
import os
import reprlib
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

from dinov3.release.opening import open_regular
from dinov3.release.record import RecordError, digest_of, parse_json

WEIGHTS_SUFFIX = ".safetensors"

_MAX_HEADER = 16 << 20  # bytes; readers take 100 MB, but what is parsed takes many times its size
_MAX_DIMENSIONS = 32
_MAX_EXTENT = 2**63 - 1  # bytes and elements that other readers can count
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_CHUNK = 1 << 20

# Bytes of an element. Types of less than a byte are left out: readers pack them differently.
DTYPE_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True)
class Tensor:
    """One entry of a header; `begin` and `end` count bytes of the file from its start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors in the order of their bytes."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class FileHash:
    """Identity of a file; `tensors` is the tensor digest of a safetensors file, else None."""

    sha256: str
    bytes: int
    tensors: str | None = None


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        RecordError: The file is not a well-formed safetensors file.
    """
    with path.open("rb", buffering=0) as stream:
        return _read_header(stream)[0]


def tensor_digest(path: Path) -> str:
    """Digest of all tensors of one safetensors file.

    Raises:
        RecordError: The file is not a well-formed safetensors file.
    """
    with path.open("rb", buffering=0) as stream:
        header, raw = _read_header(stream)
        digests = _TensorDigests(header, len(raw))
        _feed(stream, len(raw), digests.update)
    return digests.result()


def hash_file(path: Path) -> FileHash:
    """Identity of a regular file from one pass over its bytes.

    Raises:
        RecordError: It is named `.safetensors` and is not well formed, or changes meanwhile.
        Refused: `file-special`, it is a link or no regular file.
        OSError: It is not there or cannot be read.
    """
    with open_regular(path) as stream:
        return hash_stream(stream, weights=path.suffix == WEIGHTS_SUFFIX)


def hash_stream(stream: FileIO, *, weights: bool) -> FileHash:
    """Identity of an open file in the time of about one digest, in constant memory.

    The two digests of weights are made in two threads, since hashlib lets go of the interpreter's
    lock. Each copies the bytes out of the page cache itself: to hand buffers from one core to the
    other takes longer. The file is read once, and must not change meanwhile.

    Args:
        stream: Of a regular file, unbuffered, at any position.
        weights: Whether it is a safetensors file and gets a tensor digest.

    Raises:
        RecordError: Its header is not well formed, or the file changes meanwhile.
    """
    before = os.fstat(stream.fileno())
    tensors = None
    if weights:
        stream.seek(0)
        header, raw = _read_header(stream)
        whole = hashlib.sha256(raw)
        digests = _TensorDigests(header, len(raw))
        with ThreadPoolExecutor(1, thread_name_prefix="tensors") as pool:
            beside = pool.submit(_feed, stream, len(raw), digests.update)
            seen = _feed(stream, len(raw), whole.update)
            beside.result()
        tensors = digests.result()
    else:
        whole = hashlib.sha256()
        seen = _feed(stream, 0, whole.update)
    if seen != before.st_size or _stamps(os.fstat(stream.fileno())) != _stamps(before):
        msg = f"the file changed while it was read, got {seen} of {before.st_size} bytes"
        raise RecordError(msg)
    return FileHash(whole.hexdigest(), seen, tensors)


def _feed(stream: FileIO, at: int, update: Callable[[memoryview], None]) -> int:
    """Gives all bytes of a file from a place on to a digest; returns where they end."""
    buffer = memoryview(bytearray(_CHUNK))
    while count := os.preadv(stream.fileno(), [buffer], at):
        update(buffer[:count])
        at += count
    return at


def _stamps(facts: os.stat_result) -> tuple[int, int, int]:
    """What differs after any write; the last of them nobody can set."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


class _TensorDigests:
    """Digests of the tensors of a file whose bytes come in order, after those of the header."""

    def __init__(self, header: Header, start: int) -> None:
        self._tensors = header.tensors
        self._digests: list[str] = []
        self._hash = hashlib.sha256()
        self._at = start  # bytes of the file seen so far

    def update(self, chunk: memoryview) -> None:
        """Takes the bytes that follow those before."""
        start = self._at
        self._at += len(chunk)
        while len(self._digests) < len(self._tensors):
            tensor = self._tensors[len(self._digests)]
            first, last = max(tensor.begin - start, 0), min(tensor.end - start, len(chunk))
            if first < last:
                self._hash.update(chunk[first:last])
            if tensor.end > self._at:
                return
            self._digests.append(self._hash.hexdigest())
            self._hash = hashlib.sha256()

    def result(self) -> str:
        """The tensor digest, once all bytes were seen.

        Raises:
            RecordError: Bytes are missing.
        """
        self.update(memoryview(b""))  # tensors without elements at the end
        if len(self._digests) < len(self._tensors):
            msg = "safetensors data ends early"
            raise RecordError(msg)
        rows = [
            [tensor.name, tensor.dtype, list(tensor.shape), sha256]
            for tensor, sha256 in zip(self._tensors, self._digests, strict=True)
        ]
        return digest_of(sorted(rows, key=lambda row: str(row[0]).encode()))


def _read_header(stream: FileIO) -> tuple[Header, bytes]:
    """The header and the bytes it was read from; the stream then stands at the data."""
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        msg = f"safetensors header: length runs past the file, got {length} of {size} bytes"
        raise RecordError(msg)
    if length > _MAX_HEADER:
        msg = f"safetensors header: longer than {_MAX_HEADER} bytes, got {length}"
        raise RecordError(msg)
    raw = prefix + stream.read(length)
    entries = _parse_header(raw[8:])
    metadata = _check_metadata(entries.pop(_METADATA, {}))
    start = len(raw)
    tensors = tuple(
        sorted(
            (_tensor(name, entry, start) for name, entry in entries.items()),
            key=lambda tensor: (tensor.begin, tensor.end),
        )
    )
    _check_tiling(tensors, start, size)
    return Header(tensors, metadata), raw


def _parse_header(raw: bytes) -> dict[str, Any]:
    """The header as an object; only spaces may follow it, nothing stands before it."""
    if raw[:1] != b"{":
        msg = f"safetensors header: not an object, it starts with {raw[:8]!r}"
        raise RecordError(msg)
    entries = parse_json(raw.rstrip(b" "))
    if raw.rstrip(b" ")[-1:] != b"}":
        msg = f"safetensors header: padded with other bytes than spaces, got {raw[-8:]!r}"
        raise RecordError(msg)
    return dict(entries)


def _check_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        msg = f"safetensors header: {_METADATA} is not an object of strings"
        raise RecordError(msg)
    return value


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    """A tensor has a dtype, a shape and two offsets, nothing else, and they agree."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    shown = reprlib.repr(name)
    if not isinstance(dtype, str) or not _are_sizes(shape):
        msg = f"safetensors header: {shown} lacks a dtype or a shape"
        raise RecordError(msg)
    if not _are_sizes(offsets) or len(offsets) != 2:
        msg = f"safetensors header: {shown} lacks data_offsets of two integers"
        raise RecordError(msg)
    if unknown := fields.keys() - _FIELDS:
        msg = f"safetensors header: {shown} has an unknown field {reprlib.repr(min(unknown))}"
        raise RecordError(msg)
    if dtype not in DTYPE_SIZES:
        msg = f"safetensors header: {shown} is of an unknown dtype, got {reprlib.repr(dtype)}"
        raise RecordError(msg)
    begin, end = offsets
    if end - begin != _num_bytes(shown, shape, DTYPE_SIZES[dtype]):
        msg = f"safetensors header: {shown} of {dtype} {shape} does not fill {begin} to {end}"
        raise RecordError(msg)
    return Tensor(name, dtype, tuple(shape), start + begin, start + end)


def _num_bytes(shown: str, shape: list[int], size: int) -> int:
    """Size of the data; strides must fit 64 bits too, even of a tensor without elements."""
    if (
        len(shape) > _MAX_DIMENSIONS
        or math.prod(max(dim, 1) for dim in shape) > _MAX_EXTENT // size
    ):
        msg = f"safetensors header: {shown} has a shape no reader can hold"
        raise RecordError(msg)
    return math.prod(shape) * size


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """A list of integers, none negative; JSON's true is an integer to Python."""
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _check_tiling(tensors: tuple[Tensor, ...], start: int, size: int) -> None:
    """The byte ranges must tile the data exactly: no gap, no overlap, nothing left over."""
    at = start
    for tensor in tensors:
        if tensor.begin != at:
            msg = (
                f"safetensors header: byte ranges do not tile the data, "
                f"got {tensor.begin - start} after {at - start}"
            )
            raise RecordError(msg)
        at = tensor.end
    if at != size:
        msg = f"safetensors header: {size - at} bytes belong to no tensor"
        raise RecordError(msg)
