"""Colours, crops and the whole chain equal torchvision's on the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F1
from torchvision.transforms.v2 import functional as F

from dinov3.bench import FLOAT_TOLERANCE, DrawnImages, augmentation_ratio, torchvision_chain
from dinov3.data import colour
from dinov3.data.augment import Augmentation, CropRecipe, cut, draw_parameters
from dinov3.data.loader import TrainingLoader

FLOATS = {"rtol": 0, "atol": 2e-6}  # values in [0, 1]: a few roundings of fp32
SIZES = ((48, 48), (24, 24), (20, 31))


def crops(height: int, width: int) -> torch.Tensor:
    """Noise, and what hue and blends treat specially: grey, black, white and tied colours."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (10, 3, height, width), dtype=torch.uint8, generator=generator)
    images[0] = images[0, :1]
    images[1, :, : height // 2] = 0
    images[2, :, : height // 2] = 255
    images[3, 0] = images[3, 1]
    images[4, 1] = images[4, 2]
    images[5, 2] = images[5, 0]
    images[6, 0], images[6, 1] = 255, 0
    return images


def values(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, 10)


def blend(planes: torch.Tensor, kind: str, factor: torch.Tensor) -> torch.Tensor:
    none = torch.zeros_like(factor)
    weights = {
        "brightness": (factor, none, none),
        "saturation": (factor, 1 - factor, none),
        "contrast": (factor, none, 1 - factor),
    }
    return colour.blend_(planes, *weights[kind])


OPERATIONS = {
    "brightness": (
        lambda planes: blend(planes, "brightness", values(0.4, 1.8)),
        lambda crop, n: F.adjust_brightness(crop, float(values(0.4, 1.8)[n])),
    ),
    "contrast": (
        lambda planes: blend(planes, "contrast", values(0.0, 1.8)),
        lambda crop, n: F.adjust_contrast(crop, float(values(0.0, 1.8)[n])),
    ),
    "saturation": (
        lambda planes: blend(planes, "saturation", values(0.0, 2.5)),
        lambda crop, n: F.adjust_saturation(crop, float(values(0.0, 2.5)[n])),
    ),
    "hue": (
        lambda planes: colour.adjust_hue_(planes, values(-0.1, 0.1)),
        lambda crop, n: F.adjust_hue(crop, float(values(-0.1, 0.1)[n])),
    ),
    "large hue": (
        lambda planes: colour.adjust_hue_(planes, values(-0.5, 0.5)),
        lambda crop, n: F.adjust_hue(crop, float(values(-0.5, 0.5)[n])),
    ),
    "grey": (colour.to_grey_, lambda crop, n: F.rgb_to_grayscale(crop, 3)),
    "blur": (
        lambda planes: colour.blur_(planes, values(0.1, 2.0)),
        lambda crop, n: F.gaussian_blur(crop, [9, 9], [float(values(0.1, 2.0)[n])] * 2),
    ),
    "solarize": (colour.solarize_, lambda crop, n: F.solarize(crop, 0.5)),
    "mirror": (lambda planes: planes.flip(-1), lambda crop, n: F.horizontal_flip(crop)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision_on_floats(name, size):
    ours, theirs = OPERATIONS[name]
    images = crops(*size)
    expected = [theirs(F.to_dtype(crop, scale=True), n) for n, crop in enumerate(images)]
    result = ours(colour.to_planes(images)).transpose(0, 1)
    torch.testing.assert_close(result, torch.stack(expected), **FLOATS)


@pytest.mark.parametrize(
    ("name", "levels"),
    # PIL cuts hue and shift to 8 bits each: two steps, each of up to 6 levels of a colour
    {"brightness": 1, "contrast": 2, "saturation": 2, "hue": 15, "grey": 1, "blur": 1}.items(),
)
def test_operation_is_within_grey_levels_of_pil(name, levels):
    ours, theirs = OPERATIONS[name]
    images = crops(48, 48)
    pictures = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in images]
    expected = torch.stack([F.pil_to_tensor(theirs(p, n)) for n, p in enumerate(pictures)])
    result = ours(colour.to_planes(images)).transpose(0, 1) * 255
    assert (result - expected).abs().max() <= levels


def test_solarize_inverts_the_eight_bit_values_that_torchvision_inverts():
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256).contiguous()
    expected = F.solarize(ramp, 128)
    result = colour.solarize_(colour.to_planes(ramp)).transpose(0, 1)
    assert torch.equal((result * 255).round().to(torch.uint8), expected)


def test_normalize_equals_torchvision():
    images, mean, std = crops(24, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = F.normalize(F.to_dtype(images, scale=True), list(mean), list(std))
    result = colour.normalize(colour.to_planes(images), mean, std)
    torch.testing.assert_close(result, expected, **FLOATS)


@pytest.mark.parametrize("box", [(0, 0, 90, 70), (10, 5, 13, 31), (89, 69, 1, 1), (3, 0, 80, 70)])
@pytest.mark.parametrize("size", [24, 48])
def test_cut_equals_resized_crop_to_the_pixel(box, size):
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    left, top, width, height = box
    expected = F1.resized_crop(
        picture, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    assert np.array_equal(cut(picture, box, size), np.asarray(expected))


@pytest.mark.parametrize("size", [(100, 80), (300, 40), (50, 200)])
def test_boxes_are_distributed_as_those_of_random_resized_crop(size):
    recipe = CropRecipe(24, (0.3, 1.0))
    augmentation = Augmentation((recipe,), (recipe,))
    picture = Image.new("RGB", size)
    num_boxes = 4000
    torch.manual_seed(0)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(picture, [0.3, 1.0], [3 / 4, 4 / 3])
            for _ in range(num_boxes)
        ]
    )[:, [1, 0, 3, 2]]
    drawn = draw_parameters(
        augmentation, seed=0, step=0, sizes=np.tile(np.array(size), (num_boxes, 1))
    )
    ours = drawn.box[:num_boxes]
    error = np.hypot(ours.std(0), theirs.std(0)) / np.sqrt(num_boxes)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * error + 1e-9).all()
    assert np.abs(ours.std(0) - theirs.std(0)).max() <= 0.06 * max(size)


@pytest.mark.parametrize("step", [0, 7])
def test_whole_pipeline_equals_the_chain_of_torchvision_per_image(step):
    augmentation = Augmentation(
        global_crops=(
            CropRecipe(48, (0.4, 1.0)),
            CropRecipe(48, (0.4, 1.0), blur_probability=0.9, solarize_probability=0.5),
        ),
        local_crops=(CropRecipe(24, (0.15, 0.5), blur_probability=0.5),) * 4,
    )
    loader = TrainingLoader(
        DrawnImages(16, 80),
        augmentation=augmentation,
        batch_size=16,
        seed=1,
        start_step=step,
        num_steps=1,
        num_workers=0,
    )
    batch = next(iter(loader))
    results = augmentation.apply(batch, "cpu")
    split = len(batch.global_crops)
    parts = ((batch.global_crops, slice(split)), (batch.local_crops, slice(split, None)))
    for (given, rows), result in zip(parts, results, strict=True):
        drawn = batch.parameters[rows]
        expected = [
            torchvision_chain(augmentation, F.to_dtype(crop, scale=True), drawn, row, 0.5)
            for row, crop in enumerate(given)
        ]
        torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=2e-5)


def test_the_benchmark_compares_equal_results():
    small = Augmentation((CropRecipe(16, (0.4, 1.0)),) * 2, (CropRecipe(8, (0.1, 0.4)),))
    figures = augmentation_ratio(DrawnImages(4, 32), small, batch_size=4)
    assert figures["largest_difference"] <= FLOAT_TOLERANCE
    chains = [figures[f"torchvision_{kind}_ms_per_image"] for kind in ("float", "pil")]
    assert figures["ratio"] == pytest.approx(min(chains) / figures["ours_ms_per_image"])


def test_the_benchmark_refuses_results_that_differ(monkeypatch):
    monkeypatch.setattr(colour, "to_grey_", lambda planes: planes.mul_(0.99))
    grey = Augmentation(
        (CropRecipe(16, (0.4, 1.0)),) * 2, (CropRecipe(8, (0.1, 0.4)),), grayscale=1.0
    )
    with pytest.raises(RuntimeError, match=r"augmentation differs from torchvision by 0\.\d+"):
        augmentation_ratio(DrawnImages(4, 32), grey, batch_size=4)
