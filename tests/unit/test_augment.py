"""Augmentation parameters are pure functions of (seed, step, position, crop, image size)."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import colour
from dinov3.data.augment import (
    Augmentation,
    Batch,
    CropParameters,
    CropRecipe,
    View,
    cut,
    draw_parameters,
)
from dinov3.errors import ConfigError

GLOBAL = CropRecipe(16, (0.4, 1.0))
LOCAL = CropRecipe(8, (0.1, 0.4), blur_probability=0.5)
SECOND = dataclasses.replace(GLOBAL, blur_probability=0.9, solarize_probability=0.2)
PLAIN = Augmentation((GLOBAL, GLOBAL), (LOCAL,) * 3)
FULL = dataclasses.replace(
    PLAIN, global_crops=(GLOBAL, SECOND), backgrounds=((255, 255, 255), (0, 0, 0), (9, 9, 9))
)
NUM_CROPS = len(FULL.crops)


def sizes(num_images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, (num_images, 2))


def draw(num_images: int = 2000, **options: object) -> CropParameters:
    options = {"seed": 0, "step": 0, "sizes": sizes(num_images), **options}
    return draw_parameters(FULL, **options)


def fields_of(drawn: CropParameters) -> dict[str, np.ndarray]:
    """Arrays by name, [C, B, …]."""
    return {
        field.name: (value := getattr(drawn, field.name)).reshape(NUM_CROPS, -1, *value.shape[1:])
        for field in dataclasses.fields(drawn)
    }


def batch_of(crops: torch.Tensor, drawn: CropParameters) -> Batch:
    return Batch(0, np.arange(len(crops)), crops, crops[:0], drawn)


def noise(num_crops: int, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_crops, 3, size, size), dtype=torch.uint8, generator=generator)


def test_parameters_of_an_image_do_not_depend_on_which_others_are_drawn():
    whole = fields_of(draw(20))
    part = fields_of(draw(20, sizes=sizes(20)[7:12], first_position=7))
    for name, expected in whole.items():
        assert np.array_equal(part[name], expected[:, 7:12]), name


def test_the_size_of_an_image_changes_its_boxes_alone():
    before, after = (fields_of(draw(20, sizes=sizes(20, seed))) for seed in (0, 1))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["box"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"first_position": 2000}])
def test_other_seeds_steps_and_positions_draw_otherwise(other):
    before, after = fields_of(draw()), fields_of(draw(**other))
    for name in before:
        assert not np.array_equal(before[name], after[name]), name


def test_crops_of_an_image_are_drawn_apart_but_share_the_background():
    drawn = fields_of(draw())
    assert (drawn["background"] == drawn["background"][0]).all()
    correlations = np.corrcoef(drawn["sigma"])
    assert np.abs(correlations - np.eye(NUM_CROPS)).max() < 0.1


def test_probabilities_are_what_the_recipe_says():
    drawn = {name: value.mean(1) for name, value in fields_of(draw(4000)).items()}
    close = {"rtol": 0, "atol": 0.035}
    np.testing.assert_allclose(drawn["blur"], [0, 0.9, 0.5, 0.5, 0.5], **close)
    np.testing.assert_allclose(drawn["solarize"], [0, 0.2, 0, 0, 0], **close)
    np.testing.assert_allclose(drawn["flip"], [0.5] * NUM_CROPS, **close)
    np.testing.assert_allclose(drawn["jitter"], [0.8] * NUM_CROPS, **close)
    np.testing.assert_allclose(drawn["grayscale"], [0.2] * NUM_CROPS, **close)


def test_values_fill_their_ranges():
    drawn = draw(4000)
    low, high = [0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1]
    np.testing.assert_allclose(drawn.factors.min(0), low, atol=1e-3)
    np.testing.assert_allclose(drawn.factors.max(0), high, atol=1e-3)
    assert drawn.sigma.min() == pytest.approx(0.1, abs=1e-3)
    assert drawn.sigma.max() == pytest.approx(2.0, abs=1e-3)
    assert set(drawn.background) == {0, 1, 2}


def test_all_orders_of_the_colour_operations_are_equally_likely():
    orders, counts = np.unique(draw(4000).order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_boxes_lie_inside_and_have_the_drawn_area_and_shape():
    shape = np.tile([200, 150], (1000, 1))
    box = draw(sizes=shape).box.reshape(NUM_CROPS, -1, 4)
    left, top, width, height = np.moveaxis(box, -1, 0)
    assert min(left.min(), top.min()) >= 0
    assert (left + width).max() <= 200
    assert (top + height).max() <= 150
    share = (width * height) / (200 * 150)
    assert share[:2].min() == pytest.approx(0.4, abs=0.02)
    assert share[2:].min() == pytest.approx(0.1, abs=0.02)
    assert share[2:].max() == pytest.approx(0.4, abs=0.02)
    ratio = width / height
    assert 0.72 < ratio.min() < 0.78
    assert 1.29 < ratio.max() < 1.38


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 1), [0, 0, 1, 1]),
        ((90, 1), [44, 0, 1, 1]),
        ((1000, 30), [480, 0, 40, 30]),
        ((30, 1000), [0, 480, 30, 40]),
    ],
)
def test_images_too_long_for_any_box_give_the_central_one(size, box):
    recipe = CropRecipe(8, (0.9, 1.0))
    drawn = draw_parameters(
        Augmentation((recipe,), (recipe,)), seed=0, step=0, sizes=np.array([size])
    )
    assert drawn.box.tolist() == [box, box]


def test_a_cut_of_one_pixel_has_its_colour():
    picture = Image.new("RGB", (5, 5), "black")
    picture.putpixel((3, 2), (10, 20, 30))
    assert (cut(picture, (3, 2, 1, 1), 8) == [10, 20, 30]).all()


def test_undistorted_crops_are_only_normalised():
    augmentation = dataclasses.replace(PLAIN, jitter=0.0, grayscale=0.0, horizontal_flip=0.0)
    crops = noise(4)
    drawn = draw_parameters(augmentation, seed=0, step=0, sizes=sizes(2))[:4]
    result, _ = augmentation.apply(batch_of(crops, drawn), "cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PLAIN.mean, PLAIN.std))
    torch.testing.assert_close(result, (crops / 255 - mean) / std)
    assert result.is_contiguous()


def test_a_crop_comes_out_the_same_whatever_stands_beside_it():
    crops, drawn = noise(40), draw(20)[:40]
    whole, _ = FULL.apply(batch_of(crops, drawn), "cpu")
    for row in (0, 21, 39):
        one = slice(row, row + 1)
        alone, _ = FULL.apply(batch_of(crops[one], drawn[one]), "cpu")
        torch.testing.assert_close(whole[one], alone, rtol=0, atol=1e-5)


def test_the_batch_itself_stays_as_it_is():
    crops, drawn = noise(10), draw(5)[:10]
    before = crops.clone()
    first, _ = FULL.apply(batch_of(crops, drawn), "cpu")
    second, _ = FULL.apply(batch_of(crops, drawn), "cpu")
    assert torch.equal(crops, before)
    assert torch.equal(first, second)


def test_the_order_of_the_colour_operations_matters_and_is_kept():
    crops, drawn = noise(2), draw(2)[:2]
    fixed = {"jitter": np.ones(2, bool), "flip": np.zeros(2, bool), "grayscale": np.zeros(2, bool)}
    factors = np.tile(np.float32([1.4, 0.6, 1.2, 0.1]), (2, 1))
    order = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    drawn = dataclasses.replace(drawn, **fixed, factors=factors, order=order)
    crops[1] = crops[0]
    result, _ = PLAIN.apply(batch_of(crops, drawn), "cpu")
    assert (result[0] - result[1]).abs().max() > 0.1


def test_strengths_of_zero_change_nothing():
    still = dataclasses.replace(
        PLAIN, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, jitter=1.0, grayscale=0.0
    )
    drawn = draw_parameters(still, seed=0, step=0, sizes=sizes(2))[:4]
    drawn = dataclasses.replace(drawn, flip=np.zeros(4, bool))
    result, _ = still.apply(batch_of(noise(4), drawn), "cpu")
    expected = colour.normalize(colour.to_planes(noise(4)), still.mean, still.std)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_blur_keeps_the_mean_of_a_crop_and_mirrors_at_its_border():
    planes = colour.to_planes(noise(3))
    flat = colour.blur_(torch.full_like(planes, 0.25), torch.tensor([0.1, 1.0, 2.0]))
    torch.testing.assert_close(flat, torch.full_like(planes, 0.25))
    identity = colour.blur_(planes.clone(), torch.full((3,), 0.1))
    torch.testing.assert_close(identity, planes)


def test_crops_of_several_sizes_are_refused():
    other = dataclasses.replace(GLOBAL, size=32)
    with pytest.raises(ConfigError, match=r"global_crops: .*got \[16, 32\]"):
        Augmentation((GLOBAL, other), (LOCAL,))
    with pytest.raises(ConfigError, match=r"local_crops: .*got \[\]"):
        Augmentation((GLOBAL, GLOBAL), ())


def test_an_empty_list_of_backgrounds_is_refused():
    with pytest.raises(ConfigError, match="backgrounds: at least one"):
        dataclasses.replace(PLAIN, backgrounds=())


def batch_with(view: View) -> tuple[Augmentation, Batch]:
    """Two images, whose view has the very crops the recipe makes too."""
    pipeline = dataclasses.replace(FULL, views=(view,))
    drawn = draw(2)
    global_crops, local_crops = noise(4, 16), noise(6, 8)
    views = {view: global_crops if view.kind == "global" else local_crops}
    return pipeline, Batch(0, np.arange(2), global_crops, local_crops, drawn, views)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_a_view_is_distorted_as_its_crops_are(kind):
    view = View(kind, 16 if kind == "global" else 8)
    pipeline, batch = batch_with(view)
    expected = dict(zip(("global", "local"), pipeline.apply(batch, "cpu"), strict=True))[kind]
    torch.testing.assert_close(pipeline.apply_view(batch, view, "cpu"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_an_undistorted_view_is_only_mirrored_and_normalised(kind):
    view = View(kind, 16 if kind == "global" else 8, is_distorted=False)
    pipeline, batch = batch_with(view)
    split = len(batch.global_crops)
    flips = batch.parameters.flip[:split] if kind == "global" else batch.parameters.flip[split:]
    assert 0 < flips.sum() < len(flips)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (pipeline.mean, pipeline.std))
    found = pipeline.apply_view(batch, view, "cpu")
    for crop, is_flipped, own in zip(batch.views[view], flips, found, strict=True):
        expected = (crop.flip(-1) if is_flipped else crop) / 255
        torch.testing.assert_close(own, (expected - mean) / std, rtol=1e-4, atol=1e-5)
