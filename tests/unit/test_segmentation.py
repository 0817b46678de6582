"""Linear segmentation: labels of patches, counts, oracle and negative control, intervals."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score
from torch.nn import functional as F

from dinov3.errors import DataError
from dinov3.evals.composites import IGNORED
from dinov3.evals.segmentation import (
    RawPatches,
    SegmentationGrid,
    class_ious,
    confusion,
    foreground,
    interval_of,
    majority_counts,
    mean_iou,
    mean_ious,
    object_precision,
    one_hot_maps,
    patch_labels,
    patch_segmentation,
    pixel_accuracies,
    scene_draws,
    segment,
)

GRID = SegmentationGrid((-3.0, 0.0), 4, max_iter=200, tolerance=1e-3, val_fraction=0.25)
NUM_CLASSES = 4
PATCHES = (12, 12)


def scenes(num, seed):
    """Masks with three rectangles of random classes and an ignored border around each."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((num, 48, 48), dtype=np.uint8)
    for mask in masks:
        for _ in range(3):
            y, x = generator.integers(2, 26, 2)
            height, width = generator.integers(12, 20, 2)
            mask[y - 1 : y + height + 1, x - 1 : x + width + 1] = IGNORED
            mask[y : y + height, x : x + width] = generator.integers(1, NUM_CLASSES)
    return masks


TRAIN, TEST = scenes(40, 0), scenes(30, 1)


def oracle(masks):
    return one_hot_maps(patch_labels(masks, PATCHES, NUM_CLASSES), NUM_CLASSES)


def noise(masks, seed, width=8):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((len(masks), *PATCHES, width)).astype(np.float32)


def run(train, test, **changes):
    settings = {"num_classes": NUM_CLASSES, "grid": GRID, "seed": 0} | changes
    return patch_segmentation(train, TRAIN, test, TEST, **settings)


def test_a_patch_has_the_most_frequent_of_its_known_classes():
    mask = np.zeros((1, 4, 8), dtype=np.uint8)
    mask[0, :, :4] = [[255, 255, 255, 255], [255, 255, 1, 1], [2, 2, 2, 0], [255, 255, 1, 0]]
    mask[0, :, 4:] = IGNORED
    assert patch_labels(mask, (1, 2), 3).tolist() == [[[1, IGNORED]]]
    assert patch_labels(mask, (2, 4), 3).tolist() == [
        [[IGNORED, 1, IGNORED, IGNORED], [2, 0, IGNORED, IGNORED]]
    ]


def test_patches_that_do_not_tile_the_mask_are_refused():
    with pytest.raises(DataError, match=r"got 48 x 48 pixels for 5 x 6 patches\. Change the size"):
        patch_labels(TRAIN, (5, 6), NUM_CLASSES)


def test_logits_are_enlarged_as_the_reference_enlarges_them():
    logits = np.array([[[[0.0, 1.0], [1.0, -1.0]]]], dtype=np.float32)  # two patches side by side
    found = segment(logits, 4, 8)[0]
    # class 1 leads by 1, 1, 2/8, … -2 at the centres of the pixels: equal between columns 2 and 3
    assert found[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert (found == found[0]).all()


def test_counts_and_ious_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    predicted = generator.integers(0, NUM_CLASSES, TEST.shape).astype(np.uint8)
    counts = confusion(TEST, predicted, NUM_CLASSES)
    known = TEST[0] != IGNORED
    labels = list(range(NUM_CLASSES))
    expected = confusion_matrix(TEST[0][known], predicted[0][known], labels=labels)
    assert counts[0].tolist() == expected.tolist()
    known = TEST != IGNORED
    ious = jaccard_score(TEST[known], predicted[known], labels=labels, average=None)
    np.testing.assert_allclose(class_ious(counts), ious, atol=1e-12)
    assert mean_iou(counts) == pytest.approx(ious.mean())
    accuracy = scene_draws([counts], pixel_accuracies, 0, 0)
    assert accuracy == pytest.approx([(predicted == TEST)[known].mean()])


def test_a_class_that_is_nowhere_does_not_count_but_a_wrongly_seen_one_does():
    mask = np.zeros((1, 2, 2), dtype=np.uint8)
    seen = np.array([[[0, 0], [0, 2]]], dtype=np.uint8)
    counts = confusion(mask, seen, 3)
    np.testing.assert_array_equal(class_ious(counts), [0.75, np.nan, 0])
    assert mean_iou(counts) == pytest.approx(0.375)


def test_oracle_features_reach_the_attainable_miou():
    found = run(oracle(TRAIN), oracle(TEST))
    attainable = mean_iou(confusion(TEST, segment(oracle(TEST), 48, 48), NUM_CLASSES))
    assert attainable > 0.8
    assert mean_iou(found.counts) == pytest.approx(attainable, abs=0.03)
    assert found.converged


def test_random_features_are_no_better_than_the_majority_class():
    found = run(noise(TRAIN, 0), noise(TEST, 1))
    majority = majority_counts(TRAIN, TEST, NUM_CLASSES)
    assert mean_iou(found.counts) < mean_iou(majority) + 0.02
    difference = scene_draws([found.counts], mean_ious, 500, 0) - scene_draws(
        [oracle_counts()], mean_ious, 500, 0
    )
    assert interval_of(difference).high < -0.3


def oracle_counts():
    return run(oracle(TRAIN), oracle(TEST)).counts


def test_features_of_other_scenes_are_no_better_than_the_majority_class():
    shuffled = np.roll(oracle(TRAIN), 1, axis=0)
    found = run(shuffled, oracle(TEST))
    majority = majority_counts(TRAIN, TEST, NUM_CLASSES)
    assert mean_iou(found.counts) < mean_iou(majority) + 0.1
    assert mean_iou(found.counts) < mean_iou(oracle_counts()) - 0.4


def test_the_majority_guess_is_the_most_frequent_class_of_the_training_scenes():
    masks = np.full((2, 4, 4), 2, dtype=np.uint8)
    counts = majority_counts(masks, np.array([[[2, 1], [0, IGNORED]]], dtype=np.uint8), 3)
    assert counts[0].tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]


def test_the_test_scenes_do_not_take_part_in_the_choice():
    train = oracle(TRAIN) + 0.5 * noise(TRAIN, 2, NUM_CLASSES)
    one, other = run(train, oracle(TEST)), run(train, noise(TEST, 3, NUM_CLASSES))
    assert (one.chosen_c, one.val_miou) == (other.chosen_c, other.val_miou)
    assert not np.array_equal(one.counts, other.counts)


def test_the_choice_is_made_on_whole_scenes_that_were_not_fitted():
    # each scene is of one class and wears its name: patches of it give the others away
    masks = np.repeat(np.arange(16, dtype=np.uint8) % 4, 48 * 48).reshape(16, 48, 48)
    names = np.repeat(np.eye(16, dtype=np.float32), 144, axis=0).reshape(16, 12, 12, 16)
    found = patch_segmentation(names, masks, names, masks, num_classes=4, grid=GRID, seed=0)
    assert mean_iou(found.counts) == 1
    assert found.val_miou < 0.5


def test_the_chosen_penalty_is_the_best_one_of_the_grid():
    few = TRAIN[:8]
    train = noise(few, 4, 120)
    train[..., :NUM_CLASSES] += 2 * oracle(few)  # a few telling features among noise

    def fitted(low, high, num):
        grid = SegmentationGrid((low, high), num, 300, 1e-5, 0.25)
        return patch_segmentation(train, few, train, few, num_classes=4, grid=grid, seed=0)

    single = {c: fitted(c, c, 1) for c in (-4.0, -1.0, 2.0)}
    merits = {c: found.val_miou for c, found in single.items()}
    assert max(merits, key=merits.__getitem__) == -1
    assert mean_iou(single[2.0].counts) > mean_iou(single[-1.0].counts)  # fits, yet is worse
    found = fitted(-4.0, 2.0, 3)
    assert found.chosen_c == pytest.approx(0.1)
    assert found.val_miou == pytest.approx(merits[-1.0], abs=1e-3)


def test_the_scale_of_a_feature_does_not_matter():
    scale = np.array([1e-3, 1, 1e3, 10], dtype=np.float32)
    train = oracle(TRAIN) + noise(TRAIN, 6, NUM_CLASSES)
    test = oracle(TEST) + noise(TEST, 7, NUM_CLASSES)
    one, other = run(train, test), run(scale * train + 5, scale * test + 5)
    assert one.chosen_c == other.chosen_c
    assert mean_iou(one.counts) == pytest.approx(mean_iou(other.counts), abs=5e-3)


def test_foreground_is_every_class_and_leaves_the_ignored_ignored():
    mask = np.array([[[0, 1], [7, IGNORED]]], dtype=np.uint8)
    assert foreground(mask).tolist() == [[[0, 1], [1, IGNORED]]]
    found = patch_segmentation(
        oracle(TRAIN),
        foreground(TRAIN),
        oracle(TEST),
        foreground(TEST),
        num_classes=2,
        grid=GRID,
        seed=0,
    )
    assert class_ious(found.counts)[1] > 0.85


def test_average_precision_of_objects_is_one_for_the_oracle_and_their_share_for_noise():
    found = run(oracle(TRAIN), oracle(TEST))
    assert found.precision.shape == (len(TEST),)
    assert found.precision.mean() > 0.95
    share = [(mask[mask != IGNORED] > 0).mean() for mask in TEST]
    constant = object_precision(TEST, np.zeros(TEST.shape, dtype=np.float32))
    np.testing.assert_allclose(constant, share)
    blind = run(np.ones_like(oracle(TRAIN)), np.ones_like(oracle(TEST)))
    np.testing.assert_allclose(blind.precision, share, atol=0.01)  # rounding when enlarged
    known = TEST[0] != IGNORED
    scores = np.random.default_rng(0).random(TEST.shape).astype(np.float32)
    expected = average_precision_score(TEST[0][known] > 0, scores[0][known])
    assert object_precision(TEST, scores)[0] == pytest.approx(expected)


def test_a_scene_without_objects_has_no_average_precision():
    masks = np.zeros((2, 4, 4), dtype=np.uint8)
    masks[1, 0, 0] = 3
    found = object_precision(masks, np.ones((2, 4, 4), dtype=np.float32))
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(1 / 16)


def test_a_class_missing_from_the_training_scenes_is_never_predicted():
    train = np.where(TRAIN == 2, 3, TRAIN).astype(np.uint8)
    found = patch_segmentation(
        oracle(train), train, oracle(TEST), TEST, num_classes=NUM_CLASSES, grid=GRID, seed=0
    )
    assert found.counts[:, :, 2].sum() == 0
    assert found.counts[:, :, 3].sum() > 0


def test_one_class_or_one_scene_teaches_nothing():
    empty = np.zeros_like(TRAIN)
    with pytest.raises(DataError, match="needs patches of two classes, got one"):
        patch_segmentation(
            noise(empty, 0), empty, noise(TEST, 0), TEST, num_classes=4, grid=GRID, seed=0
        )
    with pytest.raises(DataError, match="needs two training scenes, got 1"):
        patch_segmentation(
            noise(TRAIN[:1], 0), TRAIN[:1], noise(TEST, 0), TEST, num_classes=4, grid=GRID, seed=0
        )


def test_intervals_hold_the_figure_and_differences_pair_scene_by_scene():
    generator = np.random.default_rng(8)
    right = generator.random(TEST.shape) < np.linspace(0.5, 0.95, len(TEST))[:, None, None]
    better = generator.random(TEST.shape) < 0.05
    one = confusion(TEST, np.where(right, TEST, 0).astype(np.uint8) % NUM_CLASSES, NUM_CLASSES)
    both = np.where(right | better, TEST, 0).astype(np.uint8) % NUM_CLASSES
    other = confusion(TEST, both, NUM_CLASSES)
    first, second = (scene_draws([counts], mean_ious, 800, 0) for counts in (one, other))
    alone, paired = interval_of(first), interval_of(second - first)
    assert alone.mean == pytest.approx(mean_iou(one))
    assert alone.low < alone.mean < alone.high
    assert 0 < paired.low < paired.mean < paired.high
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    assert np.ptp(first - scene_draws([one], mean_ious, 800, 0)) == 0


def test_the_figure_of_several_seeds_is_their_mean():
    counts = [run(noise(TRAIN, seed), noise(TEST, seed)).counts for seed in (0, 1)]
    draws = scene_draws([oracle_counts(), counts[0]], mean_ious, 10, 0)
    assert draws[0] == pytest.approx((mean_iou(oracle_counts()) + mean_iou(counts[0])) / 2)


def test_raw_patches_are_the_pixels_of_each_patch():
    picture = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    ((patches, cls),) = RawPatches(2).get_intermediate_layers(picture, return_class_token=True)
    assert patches.shape == (2, 6, 12)
    expected = picture[1, :, 2:4, 4:6].flatten()  # the last patch, row by row
    assert torch.equal(patches[1, 5], expected)
    torch.testing.assert_close(cls, patches.mean(dim=1))


def test_raw_patches_of_enlarged_pictures_are_those_of_the_pictures():
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32))
    small = F.interpolate(picture, (16, 16), mode="bilinear", align_corners=False)
    large = F.interpolate(small, (64, 64), mode="bicubic", align_corners=False)
    ((expected, _),) = RawPatches(8).get_intermediate_layers(small)
    ((found, _),) = RawPatches(8, 4.0).get_intermediate_layers(large)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.05
