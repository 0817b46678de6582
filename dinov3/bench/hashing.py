"""What the second digest of a file of weights costs: both in one pass, against one digest alone."""

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from dinov3.release.tensors import hash_file

_BLOCK = 1 << 20  # bytes of content, which is repeated


def hashing_ratio(
    folder: Path, *, num_bytes: int = 256 << 20, num_tensors: int = 200, num_rounds: int = 5
) -> dict[str, float]:
    """Times `hash_file` against one `hashlib.file_digest` over the same bytes, in turns.

    Args:
        folder: Where the file of weights is written and removed again.
        num_bytes: Its size, without the header.
        num_tensors: Of equal size.
        num_rounds: How often each is timed.

    Returns:
        `ratio` of the medians, `best_ratio` of the fastest rounds, `bytes_per_second` of the one
        digest alone, `num_cores` that could be used: on one core the ratio is about 2.
    """
    path = _write_weights(folder / "weights.safetensors", num_bytes, num_tensors)
    try:
        _seconds(_digest_once, path)  # from here on the file is in the page cache
        rounds = [
            (_seconds(_digest_once, path), _seconds(hash_file, path)) for _ in range(num_rounds)
        ]
    finally:
        path.unlink()
    once, both = zip(*rounds, strict=True)
    return {
        "ratio": median(both) / median(once),
        "best_ratio": min(both) / min(once),
        "bytes_per_second": num_bytes / median(once),
        "num_cores": len(os.sched_getaffinity(0)),
    }


def _write_weights(path: Path, num_bytes: int, num_tensors: int) -> Path:
    size = num_bytes // num_tensors
    header = {
        f"blocks.{number}.weight": {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(num_tensors)
    }
    raw = json.dumps(header).encode()
    block = os.urandom(_BLOCK)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for at in range(0, size * num_tensors, _BLOCK):
            stream.write(block[: size * num_tensors - at])
    return path


def _digest_once(path: Path) -> None:
    with path.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")


def _seconds(call: Callable[[Path], object], path: Path) -> float:
    began = time.perf_counter()
    call(path)
    return time.perf_counter() - began
