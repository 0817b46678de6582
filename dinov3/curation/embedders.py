"""Embedders: a picture to a unit vector, alike pictures to close ones.

`pixels` needs no weights. It is made to survive copying (resize, JPEG, crops): a picture is looked
at in a frame set by its own ink, the distance from white, and not by its borders, which a crop
moves. Any backbone of `dinov3.hub` may stand in its place, from a local file of weights.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3 import hub
from dinov3.config import EmbeddingsConfig
from dinov3.curation.neighbours import Floats
from dinov3.errors import ConfigError

# B pictures, D width of the embedding, S side of the small picture

_RASTER = 96  # long side, pixels, of the copy on which the ink is measured
_REACH = 1.5  # half side of the frame in standard deviations of the ink
_ISOTROPY = 0.5  # 0 normalises width and height apart, 1 keeps the aspect: half a thin shape's
_BASE = 1e-3  # ink of white: an all-white picture has its frame in the middle
_SHADES = 4  # per colour of the palette
_STRIDES = np.array([_SHADES**2, _SHADES, 1])
_PALETTE_SHARE = 0.8  # of the squared norm; chosen on the training half of the demo's pictures


class Embedder(Protocol):
    """Maps RGB pictures to rows of unit norm: [B, D]."""

    name: str
    dim: int

    def __call__(self, images: Sequence[Image.Image]) -> Floats:
        """Embeds a batch; the rows do not depend on each other."""


class PixelEmbedder:
    """Palette and layout of a picture inside the frame of its ink.

    The layout is the small picture without its mean; it tells which copy is whose. The palette is
    a histogram of colours; it bears crops, and it gathers pictures of one kind where the layout
    alone scatters drawings as widely as everything else.
    """

    def __init__(self, size: int) -> None:
        self.name = "pixels"
        self.size = size
        self.dim = 3 * size * size + _SHADES**3

    def __call__(self, images: Sequence[Image.Image]) -> Floats:
        """Embeds RGB pictures of any size: [B, 3 S^2 + 64] of unit norm."""
        return np.stack([self._embed(image) for image in images])

    def _embed(self, image: Image.Image) -> Floats:
        cut = _ink_frame(_shrink(image))
        small = cut(self.size)  # [S, S, 3] in 0..1
        layout = (small - small.mean()).ravel()
        layout /= max(float(np.linalg.norm(layout)), 1e-6)  # one flat colour has no layout
        palette = np.sqrt(_PALETTE_SHARE * _palette(cut(2 * self.size)))
        row = np.concatenate([np.sqrt(1 - _PALETTE_SHARE) * layout, palette])
        unit: Floats = (row / np.linalg.norm(row)).astype(np.float32)
        return unit


class BackboneEmbedder:
    """The CLS feature of a backbone."""

    def __init__(self, name: str, model: torch.nn.Module, size: int, device: torch.device) -> None:
        self.name = name
        self._model = model.to(device).eval()
        self._device = device
        self._transform: Callable[[Image.Image], Tensor] = hub.transform(size)
        self.dim = int(self._model.config.embed_dim)  # type: ignore[union-attr, arg-type]

    def __call__(self, images: Sequence[Image.Image]) -> Floats:
        """Embeds RGB pictures of any size: [B, D] of unit norm."""
        batch = torch.stack([self._transform(image) for image in images])  # [B, 3, S, S]
        with torch.inference_mode():
            cls = self._model(batch.to(self._device)).float()  # [B, D]
        rows: Floats = torch.nn.functional.normalize(cls, dim=-1).cpu().numpy()
        return rows


def open_embedder(config: EmbeddingsConfig) -> Embedder:
    """The embedder a recipe names.

    Raises:
        ConfigError: No embedder has that name, or `pixels` is given weights.
        CheckpointError: The weights are missing or are not this backbone's.
    """
    if config.embedder == "pixels":
        if config.weights is not None:
            msg = f"weights: the embedder pixels has none, got {config.weights}. Set it to null."
            raise ConfigError(msg)
        return PixelEmbedder(config.size)
    if config.embedder not in hub.ARCHITECTURES:
        near = difflib.get_close_matches(config.embedder, ["pixels", *hub.ARCHITECTURES], 1, 0.4)
        hint = f"Did you mean {near[0]}?" if near else "Use pixels or a backbone of dinov3.hub."
        msg = f"embedder: no such embedder, got {config.embedder!r}. {hint}"
        raise ConfigError(msg)
    if config.weights is None:
        msg = (
            f"weights: {config.embedder} needs a local file, got null. Set weights=PATH to it, "
            f"or use embedder=pixels."
        )
        raise ConfigError(msg)
    model = hub.load_backbone(Path(config.weights), config.embedder)
    return BackboneEmbedder(config.embedder, model, config.size, _device(config.run.device))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _shrink(image: Image.Image) -> Image.Image:
    scale = _RASTER / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's is antialiased


def _ink_frame(image: Image.Image) -> Callable[[int], Floats]:
    """Finds the frame `mean ± reach x deviation` of the ink, white where it leaves the picture.

    Returns:
        Cuts the frame out at a side of S pixels: [S, S, 3] in 0..1.
    """
    ink = (255.0 - np.asarray(image, np.float32)).sum(2) / 255 + _BASE  # [height, width]
    spans = [_span(ink.sum(0)), _span(ink.sum(1))]  # x, y
    both = np.sqrt(spans[0][1] * spans[1][1])
    reach = [_REACH * own ** (1 - _ISOTROPY) * both**_ISOTROPY for _, own in spans]
    left, top = (spans[axis][0] - reach[axis] for axis in (0, 1))
    right, bottom = (spans[axis][0] + reach[axis] for axis in (0, 1))
    margin = 1 + int(np.ceil(max(0.0, -left, -top, right - image.width, bottom - image.height)))
    sides = (image.width + 2 * margin, image.height + 2 * margin)
    canvas = Image.new("RGB", sides, (255, 255, 255))
    canvas.paste(image, (margin, margin))
    box = (left + margin, top + margin, right + margin, bottom + margin)

    def cut(size: int) -> Floats:
        square = canvas.resize((size, size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(square, np.float32) / np.float32(255)

    return cut


def _palette(picture: Floats) -> Floats:
    """Share of each of 4 x 4 x 4 colours; every pixel is divided among the 8 around it: [64]."""
    place = picture.reshape(-1, 3) * (_SHADES - 1)  # [P, 3]
    low = np.minimum(place.astype(np.int64), _SHADES - 2)
    part = place - low
    shares = np.zeros(_SHADES**3)
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.where(corner, part, 1 - part).prod(1)
        shares += np.bincount((low + corner) @ _STRIDES, weight, _SHADES**3)
    palette: Floats = (shares / shares.sum()).astype(np.float32)
    return palette


def _span(ink: Floats) -> tuple[float, float]:
    """Mean and deviation of the ink along one axis, in pixels, half a pixel at least."""
    weights = ink.astype(np.float64) / ink.sum(dtype=np.float64)
    at = np.arange(len(ink)) + 0.5
    mean = float((weights * at).sum())
    return mean, float(np.sqrt((weights * (at - mean) ** 2).sum())) + 0.5
