"""Preparation of pictures and extraction of features."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov3.device import choose_device
from dinov3.errors import ConfigError, DataError
from dinov3.evals.baselines import RAW_PIXELS, RawPixels, baseline_models, majority_scores
from dinov3.evals.features import Preparation, extract, extract_all
from dinov3.models.vit import VisionTransformer, ViTConfig
from dinov3.recipe import load_recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = Preparation("crop", 40, 32, (255, 255, 255), MEAN, STD)
PAD = Preparation("pad", 64, 32, (255, 255, 255), MEAN, STD)
CPU = torch.device("cpu")


def _tiny(seed):
    torch.manual_seed(seed)
    model = VisionTransformer(
        ViTConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, layerscale=0.5)
    )
    model.reset_parameters()
    return model.eval()


def _pictures(num):
    generator = np.random.default_rng(0)
    for index in range(num):
        size = (30 + 7 * index, 45, 3)
        yield Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))


def test_features_are_those_of_the_model():
    model, pictures = _tiny(0), list(_pictures(5))
    found = extract(model, pictures, CROP, 2, CPU, patches=True)
    with torch.no_grad():
        expected = model.forward_features(torch.stack([CROP(picture) for picture in pictures]))
    np.testing.assert_allclose(found.cls, expected["x_norm_clstoken"], atol=1e-5)
    np.testing.assert_allclose(found.patches, expected["x_norm_patchtokens"], atol=1e-5)
    np.testing.assert_allclose(found.mean_patch, expected["x_norm_patchtokens"].mean(1), atol=1e-5)
    assert found.cls_and_patches.shape == (5, 64)


def test_batch_size_does_not_change_features():
    model = _tiny(0)
    one, other = (extract(model, _pictures(5), PAD, size, CPU) for size in (1, 4))
    np.testing.assert_allclose(one.cls, other.cls, atol=1e-5)


def test_several_last_blocks_stand_side_by_side_in_order():
    model, pictures = _tiny(0), list(_pictures(3))
    last = extract(model, pictures, CROP, 4, CPU)
    both = extract(model, pictures, CROP, 4, CPU, num_blocks=2)
    assert both.cls.shape == (3, 64)
    np.testing.assert_allclose(both.cls[:, 32:], last.cls, atol=1e-5)
    assert np.abs(both.cls[:, :32] - last.cls).max() > 1e-3


def test_one_pass_over_a_stream_feeds_every_model():
    models = baseline_models(_tiny, 2)
    stream = _pictures(6)
    found = extract_all(models, stream, CROP, 4, CPU)
    assert list(found) == ["random init 0", "random init 1", RAW_PIXELS]
    assert {len(features) for features in found.values()} == {6}
    assert next(stream, None) is None
    assert np.abs(found["random init 0"].cls - found["random init 1"].cls).max() > 1e-2


def test_raw_pixels_are_the_picture():
    picture = torch.rand(1, 3, 16, 16)
    ((patches, cls),) = RawPixels().get_intermediate_layers(picture)
    torch.testing.assert_close(cls.view(1, 3, 16, 16), picture)
    torch.testing.assert_close(patches[0, 17], picture[0, :, 1, 1])


def test_majority_is_the_same_guess_for_everyone():
    scores = majority_scores(np.array([0, 2, 2, 1]), 3, 4)
    assert scores.argmax(1).tolist() == [2, 2, 2]
    assert scores[0].tolist() == [0.25, 0.25, 0.5, 0.0]


def test_crop_equals_torchvision():
    reference = v2.Compose(
        [
            v2.Resize(40, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    for picture in _pictures(4):
        torch.testing.assert_close(CROP(picture), torch.as_tensor(reference(picture)))


def test_pad_keeps_the_whole_picture_on_the_background():
    wide = Image.new("RGB", (128, 32), (255, 0, 0))
    square = np.asarray(PAD.picture(wide))
    assert square.shape == (32, 32, 3)
    assert (square[:8] == 255).all()
    assert (square[-8:] == 255).all()
    assert (square[14:18] == (255, 0, 0)).all()


def test_transparency_shows_the_background():
    ghost = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    grey = Preparation("pad", 64, 32, (120, 120, 120), MEAN, STD)
    assert (np.asarray(grey.picture(ghost)) == 120).all()


def test_a_cut_larger_than_the_resized_picture_is_refused():
    with pytest.raises(ConfigError, match="resize: shorter than the cut of 224 pixels, got 200"):
        load_recipe("default", ["resize=200"], phase="evals")


@pytest.mark.parametrize("prepare", [CROP, PAD])
@pytest.mark.parametrize("side", [24, 128])
def test_another_resolution_shows_the_same_part_of_the_picture(prepare, side):
    smooth = np.linspace(0, 255, 60 * 90).reshape(60, 90).astype(np.uint8)
    picture = Image.fromarray(np.stack([smooth] * 3, axis=-1))
    other = prepare.enlarged(side).picture(picture)
    assert other.size == (side, side)
    same = np.asarray(other.resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert np.abs(same - np.asarray(prepare.picture(picture), dtype=float)).mean() < 6


def test_no_picture_is_refused():
    with pytest.raises(DataError, match="got 0 pictures"):
        extract(_tiny(0), [], CROP, 2, CPU)


def test_unknown_device_is_refused_and_auto_is_some_device():
    assert choose_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(ConfigError, match=r"run\.device: not usable here"):
        choose_device("abacus")


def test_a_device_that_computes_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"run\.device: computes nothing, got 'meta'"):
        choose_device("meta")
