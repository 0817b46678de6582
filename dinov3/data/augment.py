"""Multi-crop augmentation (DINO, arXiv 2104.14294, section 3.1; DINOv2, appendix B).

Two global crops and several local ones per image. Every random value is a pure function of
(seed, step, position in the global batch, crop); where it is used makes no difference:

    worker:   decode -> composite -> crop and resize          (PIL, per image, uint8)
    trainer:  flip -> jitter -> grey -> blur -> solarize -> normalise   (tensors, whole batch)

Batches are crop-major: all first crops, then all second crops, and so on.
"""

# B images, C crops per image, N = C * B crops, H x W pixels

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov3.data import colour
from dinov3.data.samplers import WORDS_PER_COUNT, philox_words
from dinov3.errors import ConfigError

Floats = NDArray[np.float64]

_STREAM = int.from_bytes(b"augment")  # keeps these draws apart from others of the same seed
_NUM_TRIES = 10  # boxes tried before the central one is taken
_COUNTS_PER_CROP = 9  # 36 words, of which 34 are used
_COLOURS = 2 * _NUM_TRIES + 2  # the words before it draw the box
_BACKGROUND = 33
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)  # [24, 4]
_CONTRAST, _SATURATION, _HUE, _NOTHING = 1, 2, 3, 4  # columns of factors; 0 is brightness


@dataclass(frozen=True)
class CropRecipe:
    """One of the crops that are cut from every image.

    Attributes:
        size: Side of the square crop in pixels.
        scale: Range of the area cut out, as a share of the image's.
        ratio: Range of width / height of the area cut out.
        blur_probability: Of being blurred; really so (the released code inverts its own).
        solarize_probability: Of being solarized.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    blur_probability: float = 0.0
    solarize_probability: float = 0.0


class View(NamedTuple):
    """A further picture of the global or the local crops: the same cuts at a size of its own."""

    kind: Literal["global", "local"]
    size: int
    is_distorted: bool = True  # otherwise only mirrored, as its crop is, and normalised


@dataclass(frozen=True)
class CropParameters:
    """What was drawn for every crop, crop-major.

    Attributes:
        box: int64 [N, 4], left, top, width and height in pixels of the image.
        background: int64 [N], which background the image is laid on.
        flip: bool [N], mirrored left to right.
        jitter: bool [N], whether brightness, contrast, saturation and hue change at all.
        order: int64 [N, 4], which of those four comes first, second, third and last.
        factors: float32 [N, 4], factors of the first three; the hue's shift in turns.
        grayscale: bool [N].
        blur: bool [N].
        sigma: float32 [N], of the blur, in pixels.
        solarize: bool [N].
    """

    box: NDArray[np.int64]
    background: NDArray[np.int64]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float32]
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "CropParameters":
        return CropParameters(*(getattr(self, one.name)[rows] for one in fields(self)))


@dataclass(frozen=True)
class Batch:
    """The crops of one step as the workers leave them.

    Attributes:
        step: Of the run.
        indices: int64 [B], which images.
        global_crops: uint8 [G * B, 3, H, W], G being 2 in self-distillation.
        local_crops: uint8 [(C - G) * B, 3, h, w].
        parameters: Of all crops, the global ones first.
        views: uint8 [N, 3, size, size] of each further view, crop-major like its kind.
    """

    step: int
    indices: NDArray[np.int64]
    global_crops: Tensor
    local_crops: Tensor
    parameters: CropParameters
    views: Mapping[View, Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> "Batch":
        """The crops of images that stand one after the other."""
        return self.pick(slice(start, stop))

    def pick(self, images: slice | list[int]) -> "Batch":
        """The crops of some of the images."""
        num_images = len(self.indices)

        def part(crops: Tensor) -> Tensor:
            chosen: Tensor = crops.unflatten(0, (-1, num_images))[:, images]
            return chosen.flatten(0, 1)

        places = np.arange(len(self.parameters.box)).reshape(-1, num_images)[:, images]
        return Batch(
            step=self.step,
            indices=self.indices[images],
            global_crops=part(self.global_crops),
            local_crops=part(self.local_crops),
            parameters=self.parameters[places.ravel()],
            views={view: part(crops) for view, crops in self.views.items()},
        )


@dataclass(frozen=True)
class Augmentation:
    """The whole pipeline; its defaults are those of the released code.

    Attributes:
        global_crops: Recipes of one size.
        local_crops: Recipes of one size; None where a method looks at global crops alone.
        horizontal_flip: Probability.
        brightness, contrast, saturation: A factor is drawn from 1 - value to 1 + value.
        hue: A shift is drawn from -value to value, in turns; at most 1/2.
        jitter: Probability that those four are applied.
        grayscale: Probability.
        blur_sigma: Range in pixels.
        mean, std: Of each colour, for the normalisation.
        backgrounds: One of these colours is drawn for each image with transparency.
        cache_size: Longest side in pixels an image is reduced to before it is cropped, or None.
        views: What else is made of the same cuts.
    """

    global_crops: tuple[CropRecipe, ...]
    local_crops: tuple[CropRecipe, ...] | None
    horizontal_flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    grayscale: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    backgrounds: tuple[tuple[int, int, int], ...] = ((255, 255, 255),)
    cache_size: int | None = None
    views: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be stacked into one batch.

        Raises:
            ConfigError: No crops, crops of several sizes, or no background.
        """
        for name in ("global_crops", "local_crops"):
            recipes = getattr(self, name)
            if name == "local_crops" and recipes is None:
                continue
            sizes = sorted({recipe.size for recipe in recipes})
            if len(sizes) != 1:
                msg = f"{name}: crops need one common size, got {sizes}. Give all the same size."
                raise ConfigError(msg)
        if not self.backgrounds:
            msg = "backgrounds: at least one colour is needed, got none. Add [255, 255, 255]."
            raise ConfigError(msg)

    @property
    def crops(self) -> tuple[CropRecipe, ...]:
        """All recipes, the global ones first."""
        return self.global_crops + (self.local_crops or ())

    def of_step(self, seed: int, step: int) -> "Augmentation":
        """This very pipeline at every step; a mixture of resolutions would choose one."""
        return self

    def apply(self, batch: Batch, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Flips, colours and normalises a batch.

        Returns:
            float [G * B, 3, H, W] global and [(C - G) * B, 3, h, w] local crops on the device.
        """
        return self.apply_kind(batch, "global", device), self.apply_kind(batch, "local", device)

    def apply_kind(self, batch: Batch, kind: str, device: torch.device | str) -> Tensor:
        """Likewise the crops of one kind alone."""
        split = len(batch.global_crops)
        if kind == "global":
            return self._apply(batch.global_crops.to(device), batch.parameters[:split])
        return self._apply(batch.local_crops.to(device), batch.parameters[split:])

    def apply_view(self, batch: Batch, view: View, device: torch.device | str) -> Tensor:
        """Likewise one of the further views, float [N, 3, size, size]."""
        split = len(batch.global_crops)
        rows = slice(0, split) if view.kind == "global" else slice(split, None)
        crops, drawn = batch.views[view].to(device), batch.parameters[rows]
        if view.is_distorted:
            return self._apply(crops, drawn)
        planes = colour.to_planes(crops)
        _on_rows(planes, drawn.flip, lambda chosen: chosen.flip(-1))
        return colour.normalize(planes, self.mean, self.std)

    def _apply(self, crops: Tensor, drawn: CropParameters) -> Tensor:
        """uint8 [N, 3, H, W] to float of the same shape."""
        planes = colour.to_planes(crops)  # [3, N, H, W]
        _on_rows(planes, drawn.flip, lambda chosen: chosen.flip(-1))
        for place in range(drawn.order.shape[1]):
            operation = np.where(drawn.jitter, drawn.order[:, place], _NOTHING)
            weights = _blend_weights(operation, drawn.factors)
            colour.blend_(planes, *(torch.from_numpy(part).to(planes.device) for part in weights))
            _on_rows(planes, operation == _HUE, colour.adjust_hue_, drawn.factors[:, _HUE])
        _on_rows(planes, drawn.grayscale, colour.to_grey_)
        _on_rows(planes, drawn.blur, colour.blur_, drawn.sigma)
        _on_rows(planes, drawn.solarize, colour.solarize_)
        return colour.normalize(planes, self.mean, self.std)


def draw_parameters(
    augmentation: Augmentation,
    *,
    seed: int,
    step: int,
    sizes: NDArray[np.int64],
    first_position: int = 0,
) -> CropParameters:
    """Draws everything for a run of images of one step.

    Args:
        augmentation: The pipeline.
        seed: Of the run.
        step: Of the run.
        sizes: int64 [B, 2], width and height of each image.
        first_position: Place of the first image in the global batch.

    Returns:
        Parameters of C * B crops; those of one image depend on its own place and size alone.
    """
    recipes, num_images = augmentation.crops, len(sizes)
    counts = (first_position * _COUNTS_PER_CROP, num_images * _COUNTS_PER_CROP)
    words = np.stack(
        [
            philox_words(seed, _STREAM, (counts[0], crop, step), counts[1] * WORDS_PER_COUNT)
            for crop in range(len(recipes))
        ]
    )
    draws = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
    u = np.moveaxis(draws.reshape(len(recipes) * num_images, -1), 1, 0)  # [36, N]

    def of_recipe(name: str) -> Floats:
        values = np.array([getattr(recipe, name) for recipe in recipes], dtype=np.float64)
        return np.repeat(values, num_images, axis=0)

    background = u[_BACKGROUND].reshape(len(recipes), -1)[0]  # one per image, not per crop
    return CropParameters(
        box=_draw_boxes(
            u[:_COLOURS], np.tile(sizes, (len(recipes), 1)), of_recipe("scale"), of_recipe("ratio")
        ),
        background=np.tile(
            (background * len(augmentation.backgrounds)).astype(np.int64), len(recipes)
        ),
        flip=u[22] < augmentation.horizontal_flip,
        jitter=u[23] < augmentation.jitter,
        order=_ORDERS[(u[24] * len(_ORDERS)).astype(np.int64)],
        factors=_draw_factors(augmentation, u[25:29]),
        grayscale=u[29] < augmentation.grayscale,
        blur=u[30] < of_recipe("blur_probability"),
        sigma=_between(augmentation.blur_sigma, u[31]).astype(np.float32),
        solarize=u[32] < of_recipe("solarize_probability"),
    )


def cut(image: Image.Image, box: Sequence[int], size: int) -> NDArray[np.uint8]:
    """A part of the image as a square, uint8 [size, size, 3]: bicubic, antialiased.

    The part is cut out first: `resize(box=…)` would look at pixels beyond its border.
    """
    left, top, width, height = (int(value) for value in box)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def _on_rows(
    planes: Tensor,
    chosen: NDArray[np.bool_],
    operation: Callable[..., Tensor],
    values: NDArray[np.float32] | None = None,
) -> None:
    """Applies an operation to the chosen crops alone, with the value of each where it takes one."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return
    index = torch.from_numpy(rows).to(planes.device)
    arguments = () if values is None else (torch.from_numpy(values[rows]).to(planes.device),)
    planes.index_copy_(1, index, operation(planes.index_select(1, index), *arguments))


def _blend_weights(
    operation: NDArray[np.int64], factors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weights of `colour.blend_`, [3, N]; those of nothing where the operation is no blend."""
    factor = np.take_along_axis(factors, operation[:, None] % factors.shape[1], axis=1)[:, 0]
    own = np.where(operation < _HUE, factor, np.float32(1))
    luma = np.where(operation == _SATURATION, 1 - factor, np.float32(0))
    mean_luma = np.where(operation == _CONTRAST, 1 - factor, np.float32(0))
    return np.stack([own, luma, mean_luma])


def _draw_boxes(
    u: Floats,
    sizes: NDArray[np.int64],
    scale: Floats,
    ratio: Floats,
) -> NDArray[np.int64]:
    """Random areas of random shapes: the first of ten that fits, or the central one.

    Args:
        u: [22, N] uniform: ten areas, ten ratios, left, top.
        sizes: [N, 2].
        scale: [N, 2].
        ratio: [N, 2].

    Returns:
        int64 [N, 4]: left, top, width, height.
    """
    limits = sizes.T[:, None]  # [2, 1, N]
    area = sizes.prod(1) * _between(scale.T, u[:_NUM_TRIES])  # [tries, N]
    aspect = np.exp(_between(np.log(ratio.T), u[_NUM_TRIES : 2 * _NUM_TRIES]))
    sides = np.rint(np.sqrt(np.stack([area * aspect, area / aspect])))  # [2, tries, N]
    fits = ((sides > 0) & (sides <= limits)).all(0)
    first = np.take_along_axis(sides, fits.argmax(0)[None, None], axis=1)[:, 0]  # [2, N]
    is_drawn = fits.any(0)
    chosen = np.where(is_drawn, first, _largest(sizes, ratio))
    room = sizes.T - chosen
    corner = np.where(is_drawn, np.floor(u[-2:] * (room + 1)), room // 2)
    return np.concatenate([corner, chosen]).T.astype(np.int64)


def _largest(sizes: NDArray[np.int64], ratio: Floats) -> Floats:
    """Width and height [2, N] of the largest area of an allowed shape."""
    width, height = sizes.T
    narrow, wide = ratio.T
    return np.stack(
        [
            np.maximum(np.minimum(width, np.rint(height * wide)), 1),
            np.maximum(np.minimum(height, np.rint(width / narrow)), 1),
        ]
    )


def _draw_factors(augmentation: Augmentation, u: Floats) -> NDArray[np.float32]:
    """[N, 4]: three factors around 1 and a shift around 0."""
    around_one = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    factors = [
        _between((max(0.0, 1 - strength), 1 + strength), draw)
        for strength, draw in zip(around_one, u[:3], strict=True)
    ]
    shift = _between((-augmentation.hue, augmentation.hue), u[3])
    return np.stack([*factors, shift], axis=1).astype(np.float32)


def _between(limits: Sequence[float] | Floats, u: Floats) -> Floats:
    low, high = limits
    return np.asarray(low + (high - low) * u)
