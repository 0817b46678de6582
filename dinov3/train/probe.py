"""Probe images: a few training pictures, seen whole, on which health is measured and shown."""

# B images, N crops, P patches, D width

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinov3.data.decode import composite, decode_image
from dinov3.data.loader import ImageSet

_WHITE = (255, 255, 255)
_GALLERY_SIZE, _GALLERY_COLUMNS = 64, 8


def load_probe(
    images: ImageSet, num_images: int, size: int, normalize: tuple[Sequence[float], Sequence[float]]
) -> Tensor:
    """Every n-th picture, padded to a square on white: float [B, 3, size, size], normalised."""
    num_images = min(num_images, len(images))
    chosen = np.linspace(0, len(images) - 1, num_images).round().astype(int)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalize)
    stack = []
    for index in chosen:
        picture = composite(decode_image(images.read(int(index))), _WHITE)
        square = ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, color=_WHITE)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255  # [3, size, size]
        stack.append((pixels - mean) / std)
    return torch.stack(stack)


@torch.no_grad()
def patch_colours(model: Any, pictures: Tensor, *, enlarge: int = 4) -> Tensor:
    """First three principal components of the patch features as colours, beside the pictures.

    Args:
        model: Any backbone.
        pictures: Normalised pictures [B, 3, S, S].
        enlarge: Pictures are enlarged so many times, which makes the patch grid finer.

    Returns:
        uint8 [3, 2*S, B*S]: pictures above, components below.
    """
    size = pictures.shape[-1]
    large = torch.nn.functional.interpolate(
        pictures, scale_factor=enlarge, mode="bicubic", antialias=False
    )
    patches = model.forward_features(large)["x_norm_patchtokens"].float()  # [B, P, D]
    centred = patches.flatten(0, 1) - patches.flatten(0, 1).mean(0)
    # a picture must not end a run, the health of these features does: they are grey
    centred = centred.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].T  # [B*P, 3]
    scores = torch.sigmoid(2 * scores / scores.std(0).clamp(min=1e-6))
    grid = int(patches.shape[1] ** 0.5)
    colours = scores.view(-1, grid, grid, 3).permute(0, 3, 1, 2)
    colours = torch.nn.functional.interpolate(colours, (size, size), mode="nearest")
    low, high = pictures.amin(), pictures.amax()
    shown = (pictures - low) / (high - low)
    rows = [torch.cat(list(part), dim=2) for part in (shown, colours)]
    return (torch.cat(rows, dim=1).clamp(0, 1) * 255).to(torch.uint8)


def gallery(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The first 64 normalised crops [N, 3, H, W] as one picture, uint8 [3, rows * H, 8 * W]."""
    scale, offset = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    colours = crops[:_GALLERY_SIZE].detach().float().cpu() * scale + offset
    shown = colours.clamp(0, 1).mul(255).round().to(torch.uint8)
    missing = -len(shown) % _GALLERY_COLUMNS
    shown = torch.cat([shown, shown.new_zeros(missing, *shown.shape[1:])])
    grid: Tensor = shown.unflatten(0, (-1, _GALLERY_COLUMNS))  # [rows, columns, 3, H, W]
    return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
