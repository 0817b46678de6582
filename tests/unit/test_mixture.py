"""A mixture of resolutions: the size of a step is a function of (seed, step) alone."""

import numpy as np
import pytest
import torch

from dinov3.data.augment import Augmentation, CropRecipe
from dinov3.data.loader import TrainingLoader
from dinov3.data.mixture import Mixture
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.train.build import build_pipeline
from tests.small_training import VIT, drawn_images

PROBABILITIES = (0.3, 0.5, 0.2)


def a_pipeline(size):
    globals_ = (CropRecipe(size, (0.4, 1.0)),) * 2
    return Augmentation(globals_, (CropRecipe(size // 2, (0.1, 0.4)),), cache_size=48)


MIXTURE = Mixture(tuple(a_pipeline(size) for size in (16, 24, 32)), PROBABILITIES)


def sizes_of(mixture, steps, seed=0):
    return [mixture.of_step(seed, step).global_crops[0].size for step in steps]


def test_sizes_are_drawn_with_the_given_frequencies():
    """3000 steps: within 4.5 standard deviations of each."""
    sizes = np.array(sizes_of(MIXTURE, range(3000)))
    for size, wanted in zip((16, 24, 32), PROBABILITIES, strict=True):
        spread = (wanted * (1 - wanted) / len(sizes)) ** 0.5
        assert abs((sizes == size).mean() - wanted) < 4.5 * spread


def test_the_size_of_a_step_does_not_tell_that_of_the_next():
    sizes = np.array(sizes_of(MIXTURE, range(3000)))
    after_small = sizes[1:][sizes[:-1] == 16]
    assert abs((after_small == 24).mean() - 0.5) < 4.5 * 0.5 / len(after_small) ** 0.5


def test_the_size_of_a_step_is_a_function_of_seed_and_step():
    later = sizes_of(MIXTURE, range(50, 100))
    assert sizes_of(MIXTURE, range(100))[50:] == later
    assert sizes_of(MIXTURE, range(50, 100), seed=1) != later


def test_a_certain_resolution_is_always_drawn():
    pipelines = MIXTURE.pipelines[:2]
    assert set(sizes_of(Mixture(pipelines, (1.0, 0.0)), range(200))) == {16}
    assert set(sizes_of(Mixture(pipelines, (0.0, 1.0)), range(200))) == {24}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn_images(tmp_path_factory.mktemp("images"), 6)


def batches(images, **options):
    plain = {
        "augmentation": MIXTURE,
        "batch_size": 4,
        "seed": 0,
        "start_step": 0,
        "num_steps": 8,
        "num_workers": 0,
    }
    return list(TrainingLoader(images, **{**plain, **options}))


def shapes(found):
    return [
        (batch.step, batch.global_crops.shape[-1], batch.local_crops.shape[-1]) for batch in found
    ]


def test_a_whole_batch_has_one_size_and_steps_have_several(images):
    found = batches(images)
    assert all(batch.local_crops.shape[-1] * 2 == batch.global_crops.shape[-1] for batch in found)
    assert {batch.global_crops.shape[-1] for batch in found} == {16, 24, 32}
    assert [batch.global_crops.shape[-1] for batch in found] == sizes_of(MIXTURE, range(8))


def test_a_resumed_run_sees_the_sizes_it_would_have_seen(images):
    assert shapes(batches(images, start_step=3, num_steps=5)) == shapes(batches(images))[3:]


def test_ranks_and_workers_change_no_size(images):
    expected = shapes(batches(images))
    assert shapes(batches(images, num_workers=1)) == expected
    for rows in (range(2), range(2, 4)):
        assert shapes(batches(images, rows=rows)) == expected


def test_a_recipe_with_lists_is_a_mixture_and_without_them_one_pipeline():
    mixed = build_pipeline(load_recipe("smoke_cpu", phase="highres"))
    assert mixed.probabilities == (0.5, 0.5)
    assert [one.global_crops[0].size for one in mixed.pipelines] == [32, 48]
    assert [one.local_crops[0].size for one in mixed.pipelines] == [16, 24]
    assert [one.views[0].size for one in mixed.pipelines] == [48, 64]
    single = build_pipeline(load_recipe("smoke_cpu"))
    assert isinstance(single, Augmentation)
    assert single.views == ()


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (8, 72)])
def test_features_of_pictures_that_are_not_square_follow_the_picture(size):
    """Rotary positions know rows from columns: a transposed picture gives other features."""
    torch.manual_seed(0)
    model = build_backbone(VIT).eval()
    height, width = size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        features = model.forward_features(images)["x_norm_patchtokens"]
        turned = model.forward_features(images.mT)["x_norm_patchtokens"]
        maps = model.get_intermediate_layers(images, n=1, reshape=True)[0]
    rows, columns = height // 8, width // 8
    assert features.shape == (2, rows * columns, 32)
    assert maps.shape == (2, 32, rows, columns)
    torch.testing.assert_close(maps.flatten(2).mT, features)
    back = turned.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)
    assert not torch.allclose(back, features, atol=1e-3)


def test_each_axis_of_a_picture_has_its_own_positions():
    """Moving one patch along either axis of a wide picture moves what the features see."""
    torch.manual_seed(0)
    model = build_backbone({**VIT, "layerscale": 1.0}).eval()
    blank = torch.zeros(1, 3, 32, 64)
    found = []
    for row, column in ((0, 0), (1, 0), (0, 1), (3, 7)):
        picture = blank.clone()
        picture[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 3.0
        with torch.no_grad():
            features = model.forward_features(picture)["x_norm_patchtokens"]
        found.append(features.unflatten(1, (4, 8))[0, 2, 4])
    distances = [(one - found[0]).abs().max().item() for one in found[1:]]
    assert min(distances) > 1e-4
