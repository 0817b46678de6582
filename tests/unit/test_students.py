"""Ranks shared out among students, and images dealt to ranks: exact, even, optimal."""

from itertools import product

import pytest

from dinov3.errors import ConfigError
from dinov3.recipe import load_recipe
from dinov3.train.students import group_sizes, share_ranks, student_cost, teacher_rows
from tests.small_training import VIT

CONVNEXT = {
    "arch": "convnext",
    "depths": (1, 1, 1, 1),
    "dims": (8, 8, 16, 16),
    "layerscale": 0.1,
    "drop_path": 0.0,
    "patch_size": 8,
}
DEALINGS = [
    (sizes, batch)
    for count in (1, 2, 3)
    for sizes in product((1, 2, 3, 4, 6), repeat=count)
    for batch in (12, 24, 36, 48, 60)
    if not any(batch % size for size in sizes)
]


def group_of_rank(sizes):
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def test_every_image_is_shown_once_by_a_rank_that_holds_it_and_ranks_are_even():
    """Three groups of up to six ranks each: all of them, at several batch sizes."""
    for sizes, batch in DEALINGS:
        rows = teacher_rows(sizes, batch)
        assert sorted(image for part in rows for image in part) == list(range(batch))
        counts = [len(part) for part in rows]
        assert max(counts) - min(counts) <= 1, (sizes, batch, counts)
        groups = group_of_rank(sizes)
        for rank, part in enumerate(rows):
            group = groups[rank]
            share = batch // sizes[group]
            first = (rank - sum(sizes[:group])) * share
            assert set(part) <= set(range(first, first + share)), (sizes, batch)


def test_the_images_of_a_rank_are_in_order():
    assert all(part == sorted(part) for part in teacher_rows((6, 2, 2), 12))


def test_ranks_without_images_are_only_those_beyond_the_batch():
    counts = [len(part) for part in teacher_rows((2, 2, 2), 2)]
    assert sorted(counts) == [0, 0, 0, 0, 1, 1]


def test_one_group_shows_what_it_holds():
    assert teacher_rows((2,), 6) == [[0, 1, 2], [3, 4, 5]]


def test_all_ranks_train_every_student_where_those_are_more_or_only_one():
    config = load_recipe("smoke_cpu/distill")
    names = list(config.students)
    assert len(names) > 1
    assert group_sizes(config, 1) == [1]
    assert group_sizes(config, len(names)) == [1] * len(names)
    alone = config.model_copy(update={"students": {names[0]: config.students[names[0]]}})
    assert group_sizes(alone, 4) == [4]


def slowest(costs, split):
    return max(cost / size for cost, size in zip(costs, split, strict=True))


def splits(count, world, batch):
    sizes = [size for size in range(1, world + 1) if batch % size == 0]
    return [split for split in product(sizes, repeat=count) if sum(split) == world]


@pytest.mark.parametrize("batch", [12, 16, 30])
@pytest.mark.parametrize(
    "costs", [(1.0,), (1.0, 1.0), (5.0, 2.0), (7.0, 2.0, 1.0), (1.0, 9.0, 3.0)]
)
def test_the_slowest_student_is_as_fast_as_any_split_allows(costs, batch):
    """Against all splits, tried one by one."""
    for world in range(len(costs), 13):
        possible = splits(len(costs), world, batch)
        if not possible:
            with pytest.raises(ConfigError, match=f"students: {world} ranks cannot be split"):
                share_ranks(costs, [None] * len(costs), world, batch)
            continue
        found = share_ranks(costs, [None] * len(costs), world, batch)
        assert tuple(found) in possible
        assert slowest(costs, found) == min(slowest(costs, one) for one in possible)


def test_ranks_that_the_recipe_fixes_stay_and_the_rest_is_optimal():
    costs = (1.0, 8.0, 4.0)
    found = share_ranks(costs, [2, None, None], 8, 24)
    possible = [one for one in splits(3, 8, 24) if one[0] == 2]
    assert found[0] == 2
    assert slowest(costs, found) == min(slowest(costs, one) for one in possible)


@pytest.mark.parametrize(
    ("wanted", "world", "batch"),
    [
        ([None, None], 1, 8),  # fewer ranks than students
        ([3, None], 3, 12),  # nothing left for the second
        ([1, 1], 4, 8),  # ranks without a student
        ([3, 1], 4, 8),  # 3 does not divide the batch
        ([None, None], 7, 2),  # groups of at most 2
    ],
)
def test_what_cannot_be_split_is_refused(wanted, world, batch):
    message = rf"students: {world} ranks cannot be split among 2 students whose groups divide the "
    with pytest.raises(ConfigError, match=message):
        share_ranks([1.0, 1.0], wanted, world, batch)


def test_the_cost_of_a_student_is_that_of_its_matrices():
    """Counted by hand; a multiplication and an addition are two operations."""
    global_tokens, local_tokens = 16 + 2, 4 + 2  # CLS and one register
    tokens, patches = 2 * global_tokens + 2 * local_tokens, 2 * 16 + 2 * 4
    linear = 2 * tokens * (4 + 2 * 4) * 32**2  # of a block: q, k, v, projection, two of the MLP
    attention = 2 * 2 * 32 * (2 * global_tokens**2 + 2 * local_tokens**2)
    embedding = 2 * patches * 3 * 8**2 * 32
    assert student_cost(VIT, 32, 16, 2) == 2 * (linear + attention) + embedding


def test_deeper_larger_and_more_crops_cost_more():
    small = student_cost(VIT, 32, 16, 2)
    assert student_cost({**VIT, "depth": 4}, 32, 16, 2) > 1.8 * small
    assert student_cost(VIT, 64, 32, 2) > 3.5 * small
    assert student_cost(VIT, 32, 16, 8) > small


def test_the_cost_of_a_convnext_is_counted_too():
    assert student_cost(CONVNEXT, 128, 64, 2) > student_cost(CONVNEXT, 64, 64, 2) > 0
