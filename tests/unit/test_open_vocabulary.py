"""Open-vocabulary segmentation: an oracle's patches, windows, the background, and controls."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinov3.evals.aligned import AlignedModel
from dinov3.evals.composites import IGNORED, Scenes
from dinov3.evals.metrics import unit_rows
from dinov3.evals.open_vocabulary import (
    Window,
    class_maps,
    constant_counts,
    open_vocabulary_counts,
    patch_classes,
    segment_scenes,
    shuffled_counts,
)
from dinov3.evals.segmentation import confusion, mean_iou, patch_labels

PATCH, SIDE, NUM_CLASSES = 4, 32, 5  # with the background
CPU = torch.device("cpu")


class ColourModel(torch.nn.Module):
    """Its aligned patches are one-hot in the mean red value of the patch: an oracle of scenes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode_image_with_patch_tokens(self, images):
        self.seen.append(tuple(images.shape))
        red = F.avg_pool2d(images[:, 0], PATCH).flatten(1).round().long()  # [B, P]
        patches = 7 * F.one_hot(red.clamp(0, NUM_CLASSES - 1), NUM_CLASSES).float()
        return images.mean(dim=(2, 3)), patches, patches


def aligned(model=None):
    none = (0.0, 0.0, 0.0)
    return AlignedModel(model or ColourModel(), count_letters, PATCH, NUM_CLASSES, none, none)


def count_letters(texts):
    return torch.tensor([[len(text)] for text in texts])


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def scenes(num=6, cell=PATCH):
    """Scenes of square cells whose red value is their class; some pixels are ignored."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, NUM_CLASSES, (num, SIDE // cell, SIDE // cell), dtype=np.uint8)
    masks = small.repeat(cell, axis=1).repeat(cell, axis=2)
    pictures = np.stack([masks, masks * 0, masks * 0], axis=-1)
    masks[:, :2] = IGNORED
    return Scenes(("a", "b", "c", "d"), pictures, masks)


def run(window=None, cell=8, batch_size=4, model=None):
    return segment_scenes(
        aligned(model),
        scenes(cell=cell),
        np.eye(NUM_CLASSES, dtype=np.float32),
        to_tensor,
        window=window,
        batch_size=batch_size,
        device=CPU,
    )


def attainable():
    """What one-hot patches reach after the bilinear enlargement, computed without the model."""
    truth = scenes(cell=8).masks.copy()
    truth[:, :2] = truth[:, 2:4]  # the pictures show what the masks ignore there
    labels = torch.from_numpy(patch_labels(truth, (8, 8), NUM_CLASSES)).long()
    maps = F.one_hot(labels, NUM_CLASSES).permute(0, 3, 1, 2).float()
    large = F.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return large.argmax(dim=1).numpy()


def test_patches_that_are_their_class_reach_the_attainable():
    found = run()
    np.testing.assert_array_equal(found.classes, attainable())
    everything, objects = open_vocabulary_counts(scenes(cell=8).masks, found, NUM_CLASSES)
    assert mean_iou(everything) > 0.8
    assert mean_iou(objects) > mean_iou(everything)


def test_one_window_over_all_answers_as_the_whole():
    np.testing.assert_array_equal(run(Window(SIDE, 8)).classes, run().classes)
    np.testing.assert_array_equal(run(Window(4 * SIDE, 8)).classes, run().classes)


def test_windows_cover_every_pixel_and_find_what_the_whole_finds():
    model = ColourModel()
    found = run(Window(12, 8), batch_size=6, model=model)  # 12 does not divide 32
    assert model.seen == [(6, 3, 12, 12)] * 16
    agreement = (found.classes == scenes(cell=8).masks)[:, 2:].mean()
    assert agreement > 0.85


def test_windows_are_averaged_as_softmax():
    images = torch.stack([to_tensor(image) for image in scenes(num=2).images()])
    names = torch.eye(NUM_CLASSES)
    maps = class_maps(aligned(), images, names, Window(16, 16))
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, SIDE, SIDE))
    corner = class_maps(aligned(), images[..., :16, :16], names, None)
    large = F.interpolate(corner, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps[..., :16, :16], large.softmax(dim=1))


def test_a_picture_of_no_whole_number_of_patches_is_stretched():
    model = ColourModel()
    maps = class_maps(aligned(model), torch.zeros(1, 3, 30, 41), torch.eye(NUM_CLASSES), None)
    assert model.seen == [(1, 3, 32, 44)]
    assert maps.shape == (1, NUM_CLASSES, 8, 11)


def test_batches_do_not_change_the_answers():
    np.testing.assert_array_equal(run(batch_size=1).classes, run(batch_size=6).classes)


def test_objects_are_never_answered_with_the_background_and_it_does_not_count_there():
    found = run()
    assert found.objects.min() == 1
    masks = scenes(cell=8).masks
    everything, objects = open_vocabulary_counts(masks, found, NUM_CLASSES)
    assert everything.sum() == (masks != IGNORED).sum()
    assert objects.sum() == ((masks != IGNORED) & (masks != 0)).sum()
    assert objects[:, 0].sum() == objects[:, :, 0].sum() == 0


def test_shuffled_names_equal_shuffled_class_embeddings():
    found = run()
    masks = scenes(cell=8).masks
    counts, _ = open_vocabulary_counts(masks, found, NUM_CLASSES)
    generator = np.random.default_rng(3)
    for shuffled in shuffled_counts(counts, num_shuffles=4, seed=3):
        order = np.concatenate([[0], 1 + generator.permutation(NUM_CLASSES - 1)])
        again = segment_scenes(
            aligned(),
            scenes(cell=8),
            np.eye(NUM_CLASSES, dtype=np.float32)[order],
            to_tensor,
            window=None,
            batch_size=6,
            device=CPU,
        )
        np.testing.assert_array_equal(shuffled, confusion(masks, again.classes, NUM_CLASSES))


def test_shuffled_names_are_worse_than_right_ones():
    _, objects = open_vocabulary_counts(scenes(cell=8).masks, run(), NUM_CLASSES)
    merits = [mean_iou(one) for one in shuffled_counts(objects, num_shuffles=50, seed=0)]
    assert np.mean(merits) < 0.4 < mean_iou(objects)


def test_the_constant_answer_is_the_most_frequent_class():
    counts = np.zeros((2, 3, 3), dtype=np.int64)
    counts[0, 1, 0], counts[1, 1, 1], counts[1, 2, 2] = 5, 4, 6
    constant = constant_counts(counts)
    assert constant[:, :, 1].tolist() == [[0, 5, 0], [0, 4, 6]]
    assert constant.sum() == counts.sum()
    assert mean_iou(constant) == pytest.approx((9 / 15 + 0) / 2)


def test_classes_are_the_part_of_the_text_that_was_held_to_patches():
    embedded = np.random.default_rng(0).normal(size=(12, 10))
    sizes = [6, 2, 4]
    found = patch_classes(embedded, sizes, width=4)
    assert found.shape == (3, 4)
    first = unit_rows(unit_rows(embedded[:6, 6:]).mean(axis=0, keepdims=True))
    np.testing.assert_allclose(found[0], first[0], atol=1e-6)
    moved = np.concatenate([9 * embedded[:, :6] + 1, embedded[:, 6:]], axis=1)
    np.testing.assert_array_equal(patch_classes(moved, sizes, width=4), found)
