"""Deduplication: who is left out, for whom, and how far chains reach."""

import numpy as np
import pytest

from dinov3.curation.dedup import exact_duplicates, relative_dedup, self_dedup


def _at(*degrees: float) -> np.ndarray:
    turned = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)


ABOVE_10_DEGREES = float(np.cos(np.deg2rad(10.5)))
CHAIN = _at(0, 10, 20, 30, 90)  # each of the first four is linked to the next only


def test_exact_duplicates_keep_the_first_of_equal_pixels():
    found = exact_duplicates(["a", "b", "a", "c", "b", "a"])
    assert found.of.tolist() == [-1, -1, 0, -1, 1, 0]
    assert found.largest_component == 3
    assert found.similarity[2] == 1
    assert np.isnan(found.similarity[0])


def test_exact_duplicates_of_nothing_are_none():
    found = exact_duplicates([])
    assert found.of.tolist() == []
    assert found.largest_component == 1


def test_component_mode_keeps_one_image_of_a_chain():
    found = self_dedup(CHAIN, threshold=ABOVE_10_DEGREES, num_neighbours=64, mode="component")
    assert found.of.tolist() == [-1, 0, 0, 0, -1]
    assert found.largest_component == 4
    assert found.similarity[3] == pytest.approx(np.cos(np.deg2rad(30)), abs=1e-6)


def test_direct_mode_leaves_out_only_what_is_linked_to_a_kept_image():
    found = self_dedup(CHAIN, threshold=ABOVE_10_DEGREES, num_neighbours=64, mode="direct")
    assert found.of.tolist() == [-1, 0, -1, 2, -1]
    assert found.largest_component == 4
    assert found.similarity[1] == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)


def test_direct_mode_names_the_most_similar_kept_image():
    rows = _at(0, 14, 8)  # the third is linked to both kept ones, and nearer to the second
    found = self_dedup(rows, threshold=ABOVE_10_DEGREES, num_neighbours=64, mode="direct")
    assert found.of.tolist() == [-1, -1, 1]


@pytest.mark.parametrize("mode", ["component", "direct"])
def test_more_equal_images_than_neighbours_still_leave_one(mode):
    found = self_dedup(_at(*[45] * 20), threshold=0.99, num_neighbours=19, mode=mode)
    assert found.of.tolist() == [-1] + [0] * 19


@pytest.mark.parametrize("mode", ["component", "direct"])
def test_distinct_images_all_stay(mode):
    found = self_dedup(_at(0, 40, 80), threshold=0.9, num_neighbours=64, mode=mode)
    assert not found.mask.any()
    assert found.largest_component == 1


def test_relative_dedup_names_the_reference():
    found = relative_dedup(
        CHAIN, _at(200, -10), threshold=ABOVE_10_DEGREES, num_neighbours=64, mode="direct"
    )
    assert found.of.tolist() == [1, -1, -1, -1, -1]
    assert found.similarity[0] == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)


def test_relative_dedup_in_component_mode_drops_all_that_hangs_on_a_reference():
    found = relative_dedup(
        CHAIN, _at(200, -10), threshold=ABOVE_10_DEGREES, num_neighbours=64, mode="component"
    )
    assert found.mask.tolist() == [True, True, True, True, False]
    assert found.largest_component == 5


@pytest.mark.parametrize("mode", ["component", "direct"])
def test_a_reference_hidden_behind_many_copies_is_still_found(mode):
    pool = _at(*[45] * 10)
    found = relative_dedup(pool, _at(46), threshold=0.99, num_neighbours=3, mode=mode)
    assert found.mask.all()


def test_without_references_nothing_is_left_out():
    empty = np.empty((0, 2), np.float32)
    found = relative_dedup(CHAIN, empty, threshold=0.1, num_neighbours=64, mode="component")
    assert not found.mask.any()
