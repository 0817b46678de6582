"""The order of images is a pure function of (seed, step, position)."""

import numpy as np
import pytest

from dinov3.data.samplers import batch_indices, philox_words, sample_index


def run(seed: int, num_steps: int, batch_size: int, num_images: int) -> np.ndarray:
    return np.concatenate(
        [batch_indices(seed, step, batch_size, num_images) for step in range(num_steps)]
    )


def test_every_pass_holds_every_image_once():
    order = run(seed=3, num_steps=10, batch_size=14, num_images=70).reshape(2, 70)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(70), (2, 1)))
    assert not np.array_equal(order[0], order[1])


def test_batches_straddle_passes():
    order = run(seed=0, num_steps=7, batch_size=10, num_images=7)
    assert (np.bincount(order) == 10).all()


@pytest.mark.parametrize(("batch_size", "num_images"), [(32, 1), (32, 5), (8, 1000)])
def test_any_size_of_dataset_works(batch_size, num_images):
    indices = batch_indices(0, 12, batch_size, num_images)
    assert indices.shape == (batch_size,)
    assert indices.dtype == np.int64
    assert 0 <= indices.min() <= indices.max() < num_images


def test_a_batch_is_the_images_at_its_positions():
    expected = [sample_index(5, 6 * 9 + place, 20) for place in range(9)]
    assert batch_indices(5, 6, 9, 20).tolist() == expected


def test_batch_size_only_cuts_the_order():
    assert np.array_equal(run(1, 8, 5, 17), run(1, 4, 10, 17))


def test_a_step_does_not_depend_on_those_before_it():
    late = batch_indices(9, 1234, 8, 100)
    for step in range(5):
        batch_indices(9, step, 8, 100)
    assert np.array_equal(late, batch_indices(9, 1234, 8, 100))


def test_seeds_give_other_orders():
    orders = {tuple(run(seed, 1, 50, 50)) for seed in (0, 1, 2, 2**40, -1)}
    assert len(orders) == 5


def test_every_place_is_equally_likely():
    places = np.array([sample_index(seed, 0, 6) for seed in range(1200)])
    assert np.abs(np.bincount(places, minlength=6) - 200).max() < 4 * np.sqrt(200)


def test_the_order_is_this_one_for_ever():
    assert batch_indices(0, 0, 8, 100).tolist() == [24, 61, 51, 63, 75, 12, 23, 81]
    assert batch_indices(7, 30, 8, 100).tolist() == [16, 34, 31, 26, 93, 25, 58, 65]


def test_words_of_one_place_do_not_depend_on_where_a_range_begins():
    whole = philox_words(1, 2, (0, 3, 4), 40)
    part = philox_words(1, 2, (5, 3, 4), 12)
    assert np.array_equal(whole[20:32], part)
    assert len(np.unique(whole)) == 40
