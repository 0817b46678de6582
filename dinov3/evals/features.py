"""Features for evaluation: prepare pictures, run frozen backbones over them (SPEC 5, plumbing).

Pictures stream: they are decoded once, a batch at a time, for all backbones together. A picture is
either cropped (short side resized, centre crop: the reference's transform) or padded to a square.
"""

# B pictures of a batch, N pictures, P patches, D width, L blocks, S side in pixels

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from dinov3.data.decode import composite
from dinov3.errors import DataError

Transform = Callable[[Image.Image], Tensor]


class Backbone(Protocol):
    """What an evaluation asks of a model: our transformers, and raw pixels dressed as one."""

    def get_intermediate_layers(
        self, x: Tensor, *, n: int = 1, return_class_token: bool = False
    ) -> tuple[Any, ...]:
        """Normed patch tokens [B, P, D] and CLS [B, D] of the last n blocks."""
        ...


@dataclass(frozen=True)
class Features:
    """Features of N pictures, float32."""

    cls: npt.NDArray[np.float32]  # [N, L*D], the last L blocks in ascending order
    mean_patch: npt.NDArray[np.float32]  # [N, D], last block
    patches: npt.NDArray[np.float32] | None = None  # [N, P, D], last block, row-major

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, rows: npt.NDArray[Any]) -> Self:
        """The features of some pictures."""
        patches = None if self.patches is None else self.patches[rows]
        return replace(self, cls=self.cls[rows], mean_patch=self.mean_patch[rows], patches=patches)

    @property
    def cls_and_patches(self) -> npt.NDArray[np.float32]:
        """CLS and mean patch side by side: the linear probe's input, [N, (L+1)*D]."""
        return np.concatenate([self.cls, self.mean_patch], axis=1)


@dataclass(frozen=True)
class Preparation:
    """From a decoded picture to what a backbone sees.

    Attributes:
        fit: `crop`: short side to `resize`, then a centre crop. `pad`: long side to at most
            `resize`, padded to a square, then scaled to the crop size. Bicubic throughout.
        resize: See fit, pixels.
        crop: Side of the result, pixels.
        background: Shows through transparency and fills the padding.
        mean: Of the normalisation the backbone was trained with.
        std: Likewise.
    """

    fit: Literal["crop", "pad"]
    resize: int
    crop: int
    background: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def picture(self, image: Image.Image) -> Image.Image:
        """The square RGB picture, before normalisation."""
        opaque = composite(image, self.background)
        if self.fit == "pad":
            squared = self._padded(opaque)
            return squared.resize((self.crop, self.crop), Image.Resampling.BICUBIC)
        resized = vision.resize(opaque, [self.resize], interpolation=InterpolationMode.BICUBIC)
        cropped: Image.Image = vision.center_crop(resized, [self.crop, self.crop])
        return cropped

    def __call__(self, image: Image.Image) -> Tensor:
        """The normalised picture, float32 [3, S, S]."""
        pixels = torch.from_numpy(np.array(self.picture(image))).permute(2, 0, 1)  # [3, S, S]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def enlarged(self, crop: int) -> Self:
        """The same view in another resolution."""
        resize = self.resize * crop // self.crop
        if self.fit == "pad":
            resize = max(self.resize, resize)  # a limit, which must not blur what was sharp
        return replace(self, crop=crop, resize=resize)

    def _padded(self, image: Image.Image) -> Image.Image:
        if max(image.size) > self.resize:
            image = image.copy()
            image.thumbnail((self.resize, self.resize), Image.Resampling.BICUBIC)
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def extract(
    model: Backbone,
    images: Iterable[Image.Image],
    transform: Transform,
    batch_size: int,
    device: torch.device,
    *,
    num_blocks: int = 1,
    patches: bool = False,
) -> Features:
    """Features of one frozen backbone; see `extract_all`."""
    found = extract_all(
        {"model": model},
        images,
        transform,
        batch_size,
        device,
        num_blocks=num_blocks,
        patches=patches,
    )
    return found["model"]


def extract_all(
    models: Mapping[str, Backbone],
    images: Iterable[Image.Image],
    transform: Transform,
    batch_size: int,
    device: torch.device,
    *,
    num_blocks: int = 1,
    patches: bool = False,
) -> dict[str, Features]:
    """Features of several frozen backbones in one pass over the pictures.

    Args:
        models: Backbones on `device`, in evaluation mode.
        images: Decoded pictures; read once, never held all at once.
        transform: From a picture to a normalised tensor [3, S, S].
        batch_size: Pictures per forward pass; does not change the features beyond rounding.
        device: Where the backbones are.
        num_blocks: CLS features of so many last blocks, side by side.
        patches: Whether to keep the patch features (P times the memory).

    Raises:
        DataError: There is no picture.
    """
    parts: dict[str, list[Features]] = {name: [] for name in models}
    for batch in _batches(images, transform, batch_size):
        pictures = batch.to(device)
        for name, model in models.items():
            parts[name].append(_run(model, pictures, num_blocks, patches))
    if models and not all(parts.values()):
        msg = "features: nothing to look at, got 0 pictures. Choose a source with pictures."
        raise DataError(msg)
    return {name: _join(pieces) for name, pieces in parts.items()}


def _batches(
    images: Iterable[Image.Image], transform: Transform, batch_size: int
) -> Iterator[Tensor]:
    stream = iter(images)
    while pictures := [transform(image) for image in islice(stream, batch_size)]:
        yield torch.stack(pictures)  # [B, 3, S, S]


@torch.inference_mode()
def _run(model: Backbone, pictures: Tensor, num_blocks: int, keep_patches: bool) -> Features:
    layers = model.get_intermediate_layers(pictures, n=num_blocks, return_class_token=True)
    last = layers[-1][0].float()  # [B, P, D]
    cls = torch.cat([cls.float() for _, cls in layers], dim=1)  # [B, L*D]
    patches = last.cpu().numpy() if keep_patches else None
    return Features(cls.cpu().numpy(), last.mean(dim=1).cpu().numpy(), patches)


def _join(pieces: list[Features]) -> Features:
    kept = [piece.patches for piece in pieces if piece.patches is not None]
    return Features(
        np.concatenate([piece.cls for piece in pieces]),
        np.concatenate([piece.mean_patch for piece in pieces]),
        np.concatenate(kept) if kept else None,
    )
