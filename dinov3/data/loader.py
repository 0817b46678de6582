"""Batches of cropped images, built by worker processes that only decode and crop.

One item of the underlying loader is one whole step, so the order of batches cannot depend on the
workers. An image is first reduced to `cache_size` if the recipe says so: that belongs to the
pipeline and happens whether or not the reduced image then stays in memory.
"""

# B images, N crops, H x W pixels

import atexit
import ctypes
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3.data.augment import (
    Augmentation,
    Batch,
    cut,
    draw_parameters,
)
from dinov3.data.decode import UndecodableImage, composite, decode_image
from dinov3.data.samplers import batch_indices
from dinov3.errors import DataError, DinoError

__all__ = ["Batch", "ImageSet", "TrainingLoader"]

_CACHE_BYTES = 512 * 2**20  # of all workers together
_PR_SET_PDEATHSIG = 1


class Pipeline(Protocol):
    """Says how the crops of a step are made; an `Augmentation` says the same at every step."""

    @property
    def cache_size(self) -> int | None:
        """Longest side in pixels an image is reduced to before it is cropped, or None."""

    def of_step(self, seed: int, step: int) -> Augmentation:
        """The pipeline of one step."""


class ImageSet(Protocol):
    """Images by number; must be picklable where workers are used."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    """The interpreter would wait for ever for workers that nobody asked to end."""
    for worker in list(_workers):
        worker.kill()


class TrainingLoader:
    """The batches of a range of steps, in order."""

    def __init__(
        self,
        images: ImageSet,
        *,
        augmentation: Pipeline,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        num_workers: int,
        rows: range | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            images: To train on.
            augmentation: The pipeline.
            batch_size: Images per step.
            seed: Of the run.
            start_step: First step.
            num_steps: How many steps.
            num_workers: Processes; with 0 the batches are built in this one.
            rows: Places of the global batch that are wanted here, one after the other; all if None.

        Raises:
            DataError: There are no images.
        """
        if len(images) == 0:
            msg = "training images: at least one is needed, got 0. Check the curated dataset."
            raise DataError(msg)
        share = _CACHE_BYTES // max(num_workers, 1)
        self._steps = range(start_step, start_step + num_steps)
        pictures = _Pictures(images, augmentation.cache_size, share)
        wanted = range(batch_size) if rows is None else rows
        self._batches = _Batches(pictures, augmentation, batch_size, wanted, seed)
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yields every step's batch.

        Raises:
            DataError: An image cannot be decoded; it is named.
            LineageBroken: An image is no longer what its table says.
        """
        iterator, workers = self._start()
        try:
            for item in iterator:
                if isinstance(item, DinoError):
                    raise item
                yield item
        except (RuntimeError, EOFError, OSError) as error:
            # a dead worker shows as any of these: as a worker, or at the other end of a batch
            if not wait([worker.sentinel for worker in workers], timeout=1):
                raise
            msg = (
                f"training images: a loading process died, got {type(error).__name__}. "
                f"Free memory, or lower run.num_workers."
            )
            raise DataError(msg) from error
        finally:
            del iterator  # asks the workers to end, also where a traceback keeps this frame

    def _start(self) -> tuple[Iterator[Batch | DinoError], list[BaseProcess]]:
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._steps,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            worker_init_fn=partial(_start_worker, os.getpid()),
            # a fork would copy the locks of whatever threads the trainer has by now
            multiprocessing_context="spawn" if self._num_workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        others = set(active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's own would raise wherever the trainer is when a worker dies, be it amid saving
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        workers = [child for child in active_children() if child not in others]
        _workers.update(workers)
        return iterator, workers


class _Pictures:
    """Decoded images, reduced to the cache size; kept in memory until the limit is reached."""

    def __init__(self, images: ImageSet, cache_size: int | None, cache_bytes: int) -> None:
        self.images = images
        self.cache_size = cache_size
        self._kept: dict[int, Image.Image] = {}
        self._bytes_left = cache_bytes

    def __getitem__(self, index: int) -> Image.Image:
        """RGB or RGBA.

        Raises:
            DataError: It cannot be decoded.
        """
        image = self._kept.get(index)
        if image is None:
            image = self._decode(index)
            size = image.width * image.height * len(image.getbands())
            # what is once kept stays: every image comes equally often, so none is worth replacing
            if self.cache_size is not None and size <= self._bytes_left:
                self._bytes_left -= size
                self._kept[index] = image
        return image

    def _decode(self, index: int) -> Image.Image:
        try:
            image = decode_image(self.images.read(index))
        except UndecodableImage as error:
            msg = (
                f"{self.images.name(index)}: cannot be decoded, got {error}. "
                f"Make image_manifest anew."
            )
            raise DataError(msg) from error
        longest = max(image.size)
        if self.cache_size is None or longest <= self.cache_size:
            return image
        width, height = (max(1, round(side * self.cache_size / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


class _Batches(Dataset[Batch | DinoError]):
    """The batch of a step; an error is returned, since a loader would bury it in a traceback."""

    def __init__(
        self,
        pictures: _Pictures,
        augmentation: Pipeline,
        batch_size: int,
        rows: range,
        seed: int,
    ) -> None:
        self.pictures = pictures
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.rows = rows
        self.seed = seed

    def __getitem__(self, step: int) -> Batch | DinoError:
        try:
            return self._build(step)
        except DinoError as error:
            return error

    def _build(self, step: int) -> Batch:
        recipe = self.augmentation.of_step(self.seed, step)
        indices = batch_indices(self.seed, step, self.batch_size, len(self.pictures.images))
        indices = indices[self.rows.start : self.rows.stop]
        pictures = [self.pictures[int(index)] for index in indices]
        sizes = np.array([picture.size for picture in pictures])
        drawn = draw_parameters(
            recipe, seed=self.seed, step=step, sizes=sizes, first_position=self.rows.start
        )
        opaque = [
            composite(picture, recipe.backgrounds[number])
            for picture, number in zip(pictures, drawn.background[: len(pictures)], strict=True)
        ]
        split = len(recipe.global_crops) * len(pictures)
        boxes = {"global": drawn.box[:split], "local": drawn.box[split:]}
        local_crops = recipe.local_crops or recipe.global_crops  # without any, no row has the size
        return Batch(
            step=step,
            indices=indices,
            global_crops=_cut_all(opaque, boxes["global"], recipe.global_crops[0].size),
            local_crops=_cut_all(opaque, boxes["local"], local_crops[0].size),
            parameters=drawn,
            views={view: _cut_all(opaque, boxes[view.kind], view.size) for view in recipe.views},
        )


def _cut_all(images: list[Image.Image], boxes: NDArray[np.int64], size: int) -> Tensor:
    """uint8 [N, 3, size, size], crop-major."""
    crops = np.empty((len(boxes), size, size, 3), dtype=np.uint8)
    for row, box in enumerate(boxes):
        crops[row] = cut(images[row % len(images)], box, size)
    return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(parent: int, worker: int) -> None:
    """Dies with the trainer and leaves signals to it: it still wants batches while it saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
