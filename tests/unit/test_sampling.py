"""Water filling equals the golden numbers; samples are balanced, exact and repeatable."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinov3.curation.kmeans import hierarchical_kmeans
from dinov3.curation.sampling import alloc, balanced_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "GOLDEN_EVALS.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["alloc"]


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['sizes']}->{case['target']}")
def test_alloc_equals_the_golden_numbers(case):
    given = alloc(case["sizes"], case["target"], _rng())
    assert sorted(given.tolist()) == case["sorted_result"]


@pytest.mark.parametrize("seed", range(20))
def test_alloc_gives_exactly_the_target_and_never_more_than_there_is(seed):
    rng = _rng(seed)
    sizes = rng.integers(0, 50, 30)
    target = int(rng.integers(0, sizes.sum() + 1))
    given = alloc(sizes, target, rng)
    assert given.sum() == target
    assert (given <= sizes).all()
    cut = sizes > given  # what could give more gives as much as anyone, up to one
    assert not cut.any() or given[cut].min() >= given.max() - 1


def test_alloc_spreads_the_rest_at_random():
    seen = {tuple(alloc([5, 5, 5], 7, _rng(seed)).tolist()) for seed in range(50)}
    assert seen == {(2, 2, 3), (2, 3, 2), (3, 2, 2)}


def test_alloc_may_take_images_several_times():
    assert alloc([2, 10], 12, _rng(), mult=3).tolist() == [6, 6]


def _tree(sizes: list[int], num_clusters: tuple[int, int] = (12, 4)):
    rng = _rng()
    centres = 10 * rng.standard_normal((len(sizes), 3))
    rows = [c + rng.standard_normal((n, 3)) for c, n in zip(centres, sizes, strict=True)]
    stacked = np.concatenate(rows).astype(np.float32)
    return hierarchical_kmeans(
        stacked, num_clusters, (4, 2), resampling_steps=3, lloyd_steps=30, seed=0
    )


SIZES = [400, 20, 20, 20]


@pytest.mark.parametrize("selection", ["random", "closest"])
def test_a_sample_has_the_asked_size_and_no_image_twice(selection):
    drawn = balanced_sample(_tree(SIZES), 100, seed=0, selection=selection)
    assert len(set(drawn.tolist())) == len(drawn) == 100
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn.min() <= drawn.max() < sum(SIZES)


def test_balancing_cuts_the_large_group_and_spares_the_small_ones():
    drawn = balanced_sample(_tree(SIZES), 100, seed=0)
    groups = np.repeat(np.arange(4), SIZES)
    shares = np.bincount(groups[drawn], minlength=4)
    assert shares[0] < 0.6 * 100  # 87 % of the pool
    assert shares[1:].min() >= 12


def test_closest_takes_the_nearest_of_each_lowest_cluster():
    levels = _tree(SIZES)
    drawn = set(balanced_sample(levels, 100, seed=0, selection="closest").tolist())
    for ids in levels[0].members():
        taken = [int(row) in drawn for row in ids]
        assert taken == sorted(taken, reverse=True)


def test_asking_for_all_or_more_gives_all():
    levels = _tree(SIZES)
    for target in (460, 1000):
        assert balanced_sample(levels, target, seed=0).tolist() == list(range(460))


def test_nothing_asked_nothing_drawn():
    assert balanced_sample(_tree(SIZES), 0, seed=0).tolist() == []


def test_same_seed_same_sample():
    levels = _tree(SIZES)
    first, again, other = (balanced_sample(levels, 100, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
