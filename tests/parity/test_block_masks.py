"""Block masks equal the reference's, given its generators."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dinov3.data.masking import block_mask, sample_masks

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "GOLDEN.json").read_text(encoding="utf-8")
)["mask"]


class ReferenceDraws:
    """Rectangles from the standard library, single patches from numpy's old generator."""

    def __init__(self, seed: int) -> None:
        self._rectangles = random.Random(seed)
        self._patches = np.random.RandomState(seed)

    def random(self):
        return self._rectangles.random()

    def integers(self, low, high):
        return self._rectangles.randint(low, high - 1)

    def permutation(self, x):
        return self._patches.permutation(x)


def test_mask_of_seed_0_matches():
    mask = block_mask(40, (14, 14), ReferenceDraws(0))
    assert np.flatnonzero(mask).tolist() == GOLDEN["seed0_n40"]


def test_the_default_size_of_a_rectangle_matches():
    explicit = block_mask(180, (14, 14), ReferenceDraws(3), max_patches=int(GOLDEN["max"]))
    looser = block_mask(180, (14, 14), ReferenceDraws(3), max_patches=14 * 14)
    default = block_mask(180, (14, 14), ReferenceDraws(3))
    assert np.array_equal(default, explicit)
    assert not np.array_equal(default, looser)


@pytest.mark.parametrize("count", GOLDEN["counts"])
def test_counts_are_exact(count):
    assert block_mask(count, (14, 14), ReferenceDraws(0)).sum() == count


def test_counts_of_a_batch_of_eight_images_match():
    masks = sample_masks(16, (14, 14), seed=0, step=0)
    assert sorted(masks.sum(1)) == [*[0] * 8, 29, 39, 49, 58, 68, 78, 88, 98]
