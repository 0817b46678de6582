"""Which image stands where: counter-based order and the raw numbers behind every random draw.

The p-th image of a run is number `p mod n` of the permutation of pass `p div n`; a step is a slice
of that endless row. All draws are raw words of Philox4x64, whose stream is fixed by its definition,
so an order outlives versions of numpy, restarts, workers and ranks.
"""

# B images of a batch, N images of the dataset

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WORDS_PER_COUNT = 4  # 64-bit words that Philox makes from one value of its counter

_STREAM = int.from_bytes(b"order")  # keeps these draws apart from others of the same seed


def philox_words(
    seed: int, stream: int, counter: tuple[int, int, int], num_words: int
) -> NDArray[np.uint64]:
    """Random 64-bit words as a pure function of all arguments.

    Args:
        seed: Of the run.
        stream: Purpose of the draws.
        counter: The lowest part advances by one every four words; overlapping ranges of it repeat
            the same words, which makes the words of one place independent of where a range begins.
        num_words: How many.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    start = np.array([*counter, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=start).random_raw(num_words)


def sample_index(seed: int, position: int, num_images: int) -> int:
    """The image at a position of the endless row: position = step * batch size + place."""
    return int(_permutation(seed, position // num_images, num_images)[position % num_images])


def batch_indices(seed: int, step: int, batch_size: int, num_images: int) -> NDArray[np.int64]:
    """The images of one step, int64 [B]; the batch may be larger than the dataset."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    passes, places = np.divmod(positions, num_images)
    indices = np.empty(batch_size, dtype=np.int64)
    for number in np.unique(passes):
        chosen = passes == number
        indices[chosen] = _permutation(seed, int(number), num_images)[places[chosen]]
    return indices


@lru_cache(maxsize=2)  # a batch straddles two passes
def _permutation(seed: int, number: int, num_images: int) -> NDArray[np.int64]:
    """Order of one pass, int64 [N]: the ranks of random words, equally likely permutations."""
    words = philox_words(seed, _STREAM, (0, number, 0), num_images)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order
