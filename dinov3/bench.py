"""Speed as ratios, measured in one run on one thread.

    python -m dinov3.bench              what follows cropping against torchvision; a step's parts

Prints JSON. Times are the best of several alternating rounds: what else the machine does can only
slow a round down, and slows both sides.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dinov3.config import TrainConfig
from dinov3.data import colour
from dinov3.data.augment import Augmentation, Batch, CropParameters
from dinov3.data.loader import ImageSet, TrainingLoader
from dinov3.recipe import load_recipe
from dinov3.train.build import build_augmentation
from dinov3.train.timing import step_split

FLOAT_TOLERANCE = 1e-5  # of values in [0, 1]
_NUM_ROUNDS = 7
_NUM_STEPS = 40
_CHAIN_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class DrawnImages:
    """Smooth random pictures as PNG files in memory: the benchmark needs no download."""

    def __init__(self, num_images: int, size: int) -> None:
        self._files = [_drawn_picture(number, size) for number in range(num_images)]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """The file."""
        return self._files[index]

    def name(self, index: int) -> str:
        """What to call it."""
        return f"drawn picture {index}"


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
    seconds = _best_times(
        {
            "ours": lambda: augmentation.apply(batch, "cpu"),
            "torchvision_float": lambda: _chain_of_tensors(augmentation, batch),
            "torchvision_pil": lambda: _chain_of_pictures(augmentation, batch, pictures),
        }
    )
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


def main() -> None:
    """Runs the benchmark named on the command line and prints its figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m dinov3.bench", description=__doc__)
    parser.add_argument("part", nargs="?", choices=["all", "augmentation", "step"], default="all")
    part = parser.parse_args().part
    recipe = cast(TrainConfig, load_recipe("demo"))
    torch.set_num_threads(1)
    figures = {}
    if part in {"all", "augmentation"}:
        figures["augmentation"] = augmentation_ratio(
            DrawnImages(32, 96), build_augmentation(recipe)
        )
    if part in {"all", "step"}:
        split = step_split(recipe, DrawnImages(256, 96), num_steps=_NUM_STEPS)
        figures["training step"] = {name: round(value, 4) for name, value in split.items()}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


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


def _best_times(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the fastest of several rounds in turn, after one to warm up."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(_NUM_ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def _to_pil(crop: Tensor) -> Image.Image:
    return Image.fromarray(crop.permute(1, 2, 0).numpy())


def _drawn_picture(number: int, size: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    picture.save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
