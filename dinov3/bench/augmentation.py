"""What follows cropping, against torchvision's functions picture by picture."""

from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dinov3.bench.rounds import times_in_turns
from dinov3.data import colour
from dinov3.data.augment import Augmentation, Batch, CropParameters
from dinov3.data.loader import ImageSet, TrainingLoader

FLOAT_TOLERANCE = 1e-5  # of values in [0, 1]
_NUM_ROUNDS = 7
_CHAIN_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def augmentation_ratio(
    images: ImageSet, augmentation: Augmentation, *, batch_size: int = 32
) -> dict[str, float]:
    """Times all that follows decoding and cropping against torchvision's functions per image.

    Both sides get the same crops and the same drawn parameters. torchvision's chain runs once on
    float tensors, where results must be equal, and once on PIL images, where it rounds to 8 bits
    after every operation.

    Returns:
        Milliseconds per image, ratios and the largest difference of values in [0, 1].

    Raises:
        RuntimeError: The results differ.
    """
    torch.set_num_threads(1)
    loader = TrainingLoader(
        images,
        augmentation=augmentation,
        batch_size=batch_size,
        seed=0,
        start_step=0,
        num_steps=1,
        num_workers=0,
    )
    batch = next(iter(loader))
    difference = _difference(augmentation, batch)
    if not difference <= FLOAT_TOLERANCE:
        msg = f"augmentation differs from torchvision by {difference}, more than {FLOAT_TOLERANCE}"
        raise RuntimeError(msg)
    pictures = [_to_pil(crop) for crops in _groups(batch) for crop in crops[0]]
    times = times_in_turns(
        {
            "ours": lambda: augmentation.apply(batch, "cpu"),
            "torchvision_float": lambda: _chain_of_tensors(augmentation, batch),
            "torchvision_pil": lambda: _chain_of_pictures(augmentation, batch, pictures),
        },
        _NUM_ROUNDS,
    )
    seconds = {name: min(values) for name, values in times.items()}  # others can only slow it
    result = {f"{name}_ms_per_image": 1e3 * value / batch_size for name, value in seconds.items()}
    fastest_chain = min(seconds["torchvision_float"], seconds["torchvision_pil"])
    result["ratio"] = fastest_chain / seconds["ours"]
    result["largest_difference"] = difference
    return result


def torchvision_chain(
    augmentation: Augmentation, crop: Any, drawn: CropParameters, row: int, threshold: float
) -> Tensor:
    """One crop through torchvision's functions with what was drawn for it, in its own order.

    Args:
        augmentation: The pipeline.
        crop: Float tensor [3, H, W] in [0, 1], or a PIL image.
        drawn: Parameters.
        row: Which of them.
        threshold: Of solarization, on the scale of the crop's values.
    """
    if drawn.flip[row]:
        crop = F.horizontal_flip(crop)
    if drawn.jitter[row]:
        for number in drawn.order[row]:
            crop = _CHAIN_JITTER[number](crop, float(drawn.factors[row, number]))
    if drawn.grayscale[row]:
        crop = F.rgb_to_grayscale(crop, num_output_channels=3)
    if drawn.blur[row]:
        crop = F.gaussian_blur(crop, [colour.BLUR_TAPS] * 2, [float(drawn.sigma[row])] * 2)
    if drawn.solarize[row]:
        crop = F.solarize(crop, threshold)
    if isinstance(crop, Image.Image):
        crop = F.to_dtype(F.pil_to_tensor(crop), torch.float32, scale=True)
    mean, std = list(augmentation.mean), list(augmentation.std)
    return cast(Tensor, F.normalize(crop, mean, std))


def _groups(batch: Batch) -> tuple[tuple[Tensor, CropParameters], ...]:
    split = len(batch.global_crops)
    return (
        (batch.global_crops, batch.parameters[:split]),
        (batch.local_crops, batch.parameters[split:]),
    )


def _chain_of_tensors(augmentation: Augmentation, batch: Batch) -> list[Tensor]:
    return [
        torch.stack(
            [
                torchvision_chain(
                    augmentation,
                    F.to_dtype(crop, torch.float32, scale=True),
                    drawn,
                    row,
                    colour.SOLARIZE_THRESHOLD,
                )
                for row, crop in enumerate(crops)
            ]
        )
        for crops, drawn in _groups(batch)
    ]


def _chain_of_pictures(
    augmentation: Augmentation, batch: Batch, pictures: list[Image.Image]
) -> list[Tensor]:
    results = [
        torchvision_chain(augmentation, picture, batch.parameters, row, 128)
        for row, picture in enumerate(pictures)
    ]
    split = len(batch.global_crops)
    return [torch.stack(results[:split]), torch.stack(results[split:])]


def _difference(augmentation: Augmentation, batch: Batch) -> float:
    """Largest difference of the two sides, on values in [0, 1] before normalisation."""
    std = torch.tensor(augmentation.std).view(3, 1, 1)
    pairs = zip(
        augmentation.apply(batch, "cpu"), _chain_of_tensors(augmentation, batch), strict=True
    )
    return max(float(((ours - theirs) * std).abs().max()) for ours, theirs in pairs)


def _to_pil(crop: Tensor) -> Image.Image:
    return Image.fromarray(crop.permute(1, 2, 0).numpy())
