"""Block masking for iBOT: which patches of which global crops the student does not see.

Masks are a pure function of (seed, step, position in the global batch), drawn from raw words of
Philox: workers, ranks, restarts and versions of numpy cannot change them.
"""

# B images, H x W patch grid

import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinov3.data.samplers import WORDS_PER_COUNT, philox_words
from dinov3.errors import ConfigError

BoolArray = NDArray[np.bool_]

_STREAM = int.from_bytes(b"masking")  # keeps these draws apart from others of the same seed
_ORDER = 2**64 - 1  # in place of a position: the draw of how much is masked where
_BLOCK = 64  # words fetched at a time
_NUM_TRIES = 10  # per block


class Draws(Protocol):
    """Where block masks are drawn from: `PhiloxDraws`, or any numpy Generator."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def integers(self, low: int, high: int, /) -> Any:
        """Uniform integer, `high` excluded."""

    def permutation(self, x: int, /) -> Any:
        """The numbers 0 to x - 1 in random order."""


class PhiloxDraws:
    """The draws of one place: seed of the run, step, position in the global batch."""

    def __init__(self, seed: int, step: int, position: int) -> None:
        self._uniforms = _uniforms(seed, step, position)

    def random(self) -> float:
        """Uniform in [0, 1)."""
        return next(self._uniforms)

    def integers(self, low: int, high: int, /) -> int:
        """Uniform integer, `high` excluded."""
        return low + int(self.random() * (high - low))

    def permutation(self, x: int, /) -> NDArray[np.int64]:
        """The numbers 0 to x - 1 in random order: the ranks of random numbers."""
        return np.argsort(list(itertools.islice(self._uniforms, x)), kind="stable")


def block_mask(
    num_masked: int,
    grid: tuple[int, int],
    rng: Draws,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
    circular_shift: bool = False,
) -> BoolArray:
    """Mask exactly `num_masked` patches: rectangles first, single patches for the rest.

    Args:
        num_masked: Of the H*W patches.
        grid: (H, W).
        rng: Source of all draws.
        min_patches: Smallest area that is drawn for a rectangle.
        max_patches: Largest number of patches that one rectangle may add; H//2 * W if None.
        min_aspect: Rectangles are between this and its reciprocal in height/width.
        circular_shift: Roll the mask by a random offset, so that rectangles wrap around.

    Returns:
        bool [H, W], True where masked.

    Raises:
        ConfigError: `num_masked` is not between 0 and H*W.
    """
    height, width = grid
    if not 0 <= num_masked <= height * width:
        msg = f"num_masked: must lie in 0..{height * width}, got {num_masked}. Lower the ratio."
        raise ConfigError(msg)
    largest = height // 2 * width if max_patches is None else max_patches
    mask = np.zeros(grid, dtype=np.bool_)
    count = 0
    while count < num_masked:
        budget = min(num_masked - count, largest)
        added = _add_rectangle(mask, rng, (min_patches, budget), min_aspect)
        if not added:
            break
        count += added
    if count < num_masked:
        free = np.flatnonzero(~mask)
        mask.flat[free[rng.permutation(len(free))[: num_masked - count]]] = True
    if circular_shift:
        mask = np.roll(mask, (rng.integers(0, height), rng.integers(0, width)), axis=(0, 1))
    return mask


def sample_masks(
    num_images: int,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    seed: int,
    step: int,
    circular_shift: bool = False,
) -> BoolArray:
    """Masks of all global crops of one step, those of all ranks together.

    A fixed share of the images is masked, by ratios spaced evenly over the range; which image gets
    which ratio is drawn.

    Args:
        num_images: Global crops of the step.
        grid: (H, W) patches of a crop.
        probability: Share of images with a mask.
        ratio: Lowest and highest share of masked patches; the lowest itself is not used.
        seed: Of the run.
        step: Of the run.
        circular_shift: As for `block_mask`.

    Returns:
        bool [B, H*W], True where masked.
    """
    size = grid[0] * grid[1]
    masks = np.zeros((num_images, size), dtype=np.bool_)
    order = PhiloxDraws(seed, step, _ORDER).permutation(num_images)
    counts = _mask_counts(num_images, size, probability, ratio)[order]
    for position in np.flatnonzero(counts):
        draws = PhiloxDraws(seed, step, int(position))
        mask = block_mask(int(counts[position]), grid, draws, circular_shift=circular_shift)
        masks[position] = mask.ravel()
    return masks


def _mask_counts(
    num_images: int, size: int, probability: float, ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """Masked patches of each image, the masked ones first, in rising order."""
    num_masked = int(num_images * probability)
    # fp32: in fp64 a ratio such as .25 can come out a hair lower and lose a patch to the floor
    ratios = np.linspace(*ratio, num_masked + 1, dtype=np.float32)[1:]
    counts = np.zeros(num_images, dtype=np.int64)
    counts[:num_masked] = (ratios * np.float32(size)).astype(np.int64)
    return counts


def _uniforms(seed: int, step: int, position: int) -> Iterator[float]:
    for block in itertools.count(0, _BLOCK // WORDS_PER_COUNT):
        words = philox_words(seed, _STREAM, (block, position, step), _BLOCK)
        yield from ((words >> np.uint64(11)) * 2.0**-53).tolist()


def _add_rectangle(
    mask: BoolArray, rng: Draws, area_range: tuple[int, int], min_aspect: float
) -> int:
    """Mask one random rectangle in place; returns how many patches it added, 0 if none fitted."""
    height, width = mask.shape
    lowest, budget = area_range
    log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
    for _ in range(_NUM_TRIES):
        area = lowest + (budget - lowest) * rng.random()
        aspect = math.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * rng.random())
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall >= height or wide >= width:
            continue
        top = int(rng.integers(0, height - tall + 1))
        left = int(rng.integers(0, width - wide + 1))
        rectangle = mask[top : top + tall, left : left + wide]
        added = tall * wide - int(rectangle.sum())
        if 0 < added <= budget:
            rectangle[:] = True
            return added
    return 0
