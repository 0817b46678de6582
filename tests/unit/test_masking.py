"""Masks depend on seed, step and position alone, and keep their promised counts."""

import numpy as np
import pytest

from dinov3.data.masking import PhiloxDraws, block_mask, sample_masks
from dinov3.errors import ConfigError

GRID = (6, 6)


def masks(**changes):
    arguments = {"num_images": 16, "grid": GRID, "seed": 1, "step": 7, **changes}
    return sample_masks(arguments.pop("num_images"), arguments.pop("grid"), **arguments)


def test_masks_are_a_function_of_seed_and_step():
    np.random.default_rng().random()
    assert np.array_equal(masks(), masks())
    assert not np.array_equal(masks(), masks(step=8))
    assert not np.array_equal(masks(), masks(seed=2))


def test_masks_of_seed_and_step_stay_what_they_are():
    """A changed draw would silently change every resumed run."""
    drawn = [np.flatnonzero(each).tolist() for each in masks(num_images=4, grid=(4, 4))]
    assert drawn == [[5, 6, 9, 10, 11, 13, 14, 15], [5, 6, 7, 12], [], []]


def test_no_two_masked_images_share_their_draws():
    drawn = masks(num_images=64, probability=1.0, ratio=(0.5, 0.5), grid=(14, 14))
    assert len({each.tobytes() for each in drawn}) == 64


def test_blocks_of_words_do_not_repeat():
    draws = PhiloxDraws(seed=1, step=7, position=0)
    assert len({draws.random() for _ in range(200)}) == 200


def test_draws_are_uniform():
    draws = PhiloxDraws(seed=1, step=7, position=0)
    counts = np.bincount([draws.integers(3, 7) for _ in range(4000)], minlength=7)
    assert not counts[:3].any()
    assert np.abs(counts[3:] - 1000).max() < 150
    assert sorted(draws.permutation(100)) == list(range(100))


def test_which_images_are_masked_changes_from_step_to_step():
    masked = np.array([masks(step=step).any(1) for step in range(40)])
    assert (masked.sum(1) == 8).all()
    assert (masked.mean(0) > 0.2).all()
    assert (masked.mean(0) < 0.8).all()


@pytest.mark.parametrize(("probability", "num_masked"), [(0.0, 0), (0.5, 8), (0.55, 8), (1.0, 16)])
def test_the_share_of_masked_images_is_exact(probability, num_masked):
    assert masks(probability=probability).any(1).sum() == num_masked


def test_ratios_are_spread_evenly_and_floored():
    counts = sorted(masks(num_images=8, ratio=(0.1, 0.5), grid=(10, 10)).sum(1))
    assert counts == [0, 0, 0, 0, 20, 30, 40, 50]


def test_an_exact_ratio_loses_no_patch_to_rounding():
    for num_images in (16, 32, 64):
        counts = masks(num_images=num_images, grid=(14, 14)).sum(1)
        assert counts.max() == 98


def test_a_ratio_of_nothing_masks_nothing():
    assert not masks(ratio=(0.0, 0.0)).any()


def test_a_full_mask_is_possible():
    assert masks(ratio=(1.0, 1.0), probability=1.0).all()


@pytest.mark.parametrize("grid", [(1, 1), (2, 7), (3, 3), (14, 5)])
def test_any_grid_gives_exact_counts(grid):
    for count in range(grid[0] * grid[1] + 1):
        assert block_mask(count, grid, np.random.default_rng(count)).sum() == count


def test_blocks_are_made_of_rectangles_rather_than_dust():
    def neighbour_share(mask):
        return (mask[1:] & mask[:-1]).sum() / mask.sum()

    rng = np.random.default_rng(0)
    blocks = np.mean([neighbour_share(block_mask(60, (14, 14), rng)) for _ in range(50)])
    dust = rng.permuted(np.arange(196) < 60, axis=0).reshape(14, 14)
    assert blocks > 0.6 > 0.5 > neighbour_share(dust)


def test_a_circular_shift_wraps_blocks_around_and_keeps_counts():
    plain = masks(grid=(14, 14))
    shifted = masks(grid=(14, 14), circular_shift=True)
    assert np.array_equal(plain.sum(1), shifted.sum(1))
    assert not np.array_equal(plain, shifted)
    position = int(plain.sum(1).argmax())
    before, after = plain[position].reshape(14, 14), shifted[position].reshape(14, 14)
    rolls = [np.roll(before, (y, x), (0, 1)) for y in range(14) for x in range(14)]
    assert any(np.array_equal(roll, after) for roll in rolls)


@pytest.mark.parametrize("count", [-1, 37])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ConfigError, match=rf"num_masked: must lie in 0..36, got {count}"):
        block_mask(count, GRID, np.random.default_rng(0))
