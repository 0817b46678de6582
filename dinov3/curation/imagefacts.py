"""What one image file is: the facts of its row in the image table, found by worker processes.

Workers import neither torch nor polars, die with the process that started them, and return rows
in the order they were asked for. Images in flight are bounded, and so is the memory.
"""

import ctypes
import hashlib
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import NamedTuple

from PIL import Image

from dinov3.data.decode import UndecodableImage, composite, decode_image, pixel_digest
from dinov3.data.sources import Entry, ImageSource
from dinov3.data.sources.paths import reason_of
from dinov3.errors import DataError

CHUNK_SIZE = 64  # entries a worker gets at once
_IN_FLIGHT = 3  # chunks per worker
_PR_SET_PDEATHSIG = 1
_WHITE = (255, 255, 255)

_source: ImageSource | None = None  # of a worker process, set once by _start_worker
_max_pixels = 0


class Facts(NamedTuple):
    """What is known of one entry: `reason` is None when it is an image."""

    sha256: str | None
    bytes: int
    reason: str | None
    detail: str | None
    width: int = 0
    height: int = 0
    mode: str = ""
    pixel_sha256: str = ""
    phash: str = ""

    @property
    def identity(self) -> str:
        """What the fingerprint of the source says of this entry."""
        return self.sha256 or (f"{self.reason}: {self.detail}" if self.detail else str(self.reason))


def find_facts(source: ImageSource, entry: Entry, max_pixels: int) -> Facts:
    """Reads and decodes one entry; never raises for what an image file can be."""
    if entry.refused is not None:
        reason, _, detail = entry.refused.partition(": ")
        return Facts(None, 0, reason, detail or None)
    try:
        data = source.read(entry.path)
    except OSError as error:
        return Facts(None, 0, *reason_of(error))
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except UndecodableImage as error:
        return Facts(sha256, len(data), error.reason, error.detail)
    pixels = pixel_digest(image).hex()
    found = (*image.size, image.mode, pixels, difference_hash(image))
    return Facts(sha256, len(data), None, None, *found)


def difference_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits: is each cell of an 8 x 9 grey picture darker than the next?

    Equal pictures at other sizes or qualities differ in few bits. Transparency is seen on white.
    """
    grey = composite(image, _WHITE).convert("L")
    cells = grey.resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=2.0).tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            at = 9 * row + column
            bits = bits << 1 | (cells[at] < cells[at + 1])
    return f"{bits:016x}"


def examine(
    source: ImageSource, *, max_pixels: int, num_workers: int | None = None
) -> Iterator[tuple[Entry, Facts]]:
    """Facts of all entries of a source, in its order, found in parallel.

    Raises:
        DataError: A worker died (out of memory, or a fault in an image library).
    """
    workers = num_workers or min(len(os.sched_getaffinity(0)), 8)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # a fork would copy the threads of polars and arrow
        initializer=_start_worker,
        initargs=(source, max_pixels, os.getpid()),
    )
    entries = source.entries()
    pending: deque[tuple[list[Entry], Future[list[Facts]]]] = deque()
    try:
        while True:
            while len(pending) < workers * _IN_FLIGHT:
                chunk = list(islice(entries, CHUNK_SIZE))
                if not chunk:
                    break
                pending.append((chunk, pool.submit(_examine_chunk, chunk)))
            if not pending:
                return
            yield from zip(pending[0][0], pending[0][1].result(), strict=True)
            pending.popleft()
    except BrokenProcessPool as error:
        raise DataError(_blame(pending)) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _blame(pending: "deque[tuple[list[Entry], Future[list[Facts]]]]") -> str:
    first, last = pending[0][0][0].path, pending[-1][0][-1].path
    return (
        f"image_manifest: a worker process died (out of memory, or a fault in an image library), "
        f"got images from {first!r} to {last!r}. Free memory, or move the image at fault away."
    )


def _start_worker(source: ImageSource, max_pixels: int, parent: int) -> None:
    global _source, _max_pixels
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
    _source, _max_pixels = source, max_pixels


def _examine_chunk(entries: list[Entry]) -> list[Facts]:
    if _source is None:
        msg = "called outside a worker process"
        raise RuntimeError(msg)
    return [find_facts(_source, entry, _max_pixels) for entry in entries]
