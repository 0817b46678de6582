"""Axial rotary position embedding with coordinates in [-1, 1] (paper, section 3.2).

Patch centres are normalised to [-1, 1] on both axes, so that a position means the same at every
resolution; in training the coordinates may be shifted, stretched per axis (jitter) and rescaled.
Nothing is learned, but the periods are a buffer: they belong to the state dict.
"""

# P patches, h x w = P, N tokens = prefix + P, E features per head

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3.errors import ConfigError

ROPE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROPE_NORMALIZATIONS = ("separate", "min", "max")


class RopeAugmentation(NamedTuple):
    """Random changes of the coordinates in training; None leaves one out."""

    shift: float | None = None  # adds U(-shift, shift) to each axis
    jitter: float | None = None  # multiplies each axis by exp U(-ln jitter, ln jitter)
    rescale: float | None = None  # multiplies both axes by one exp U(-ln rescale, ln rescale)


class Rotation(NamedTuple):
    """Tables [N, E] that rotate the queries and keys of one grid of patches."""

    cos: Tensor
    signed_sin: Tensor  # the first half negated, so that rotating is two products and a roll


class RotaryEmbedding(nn.Module):
    """Sine and cosine tables of a grid of patches.

    Either `base` or both `min_period` and `max_period` must be given.
    """

    periods: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize: str = "separate",
        augmentation: RopeAugmentation = RopeAugmentation(),  # noqa: B008 - immutable
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_periods(base, min_period, max_period)
        self.base = base
        self.min_period, self.max_period = min_period, max_period
        self.normalize = normalize
        self.augmentation = augmentation
        self.register_buffer("periods", torch.empty(head_dim // 4, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def is_random(self) -> bool:
        """Whether two calls give different tables: in training, with any augmentation."""
        return self.training and any(value is not None for value in self.augmentation)

    def reset_parameters(self) -> None:
        """Compute the periods, in the dtype of the tables as the reference does."""
        count, device, dtype = len(self.periods), self.periods.device, self.periods.dtype
        if self.min_period is None or self.max_period is None:
            assert self.base is not None  # check_periods saw to it
            exponents = 2 * torch.arange(count, device=device, dtype=dtype) / (2 * count)
            periods = self.base**exponents
        else:
            span = self.max_period / self.min_period
            exponents = torch.linspace(0, 1, count, device=device, dtype=dtype)
            periods = span**exponents / span * self.max_period
        with torch.no_grad():
            self.periods.copy_(periods)

    def forward(
        self, height: int, width: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the sine and cosine tables [P, E] of a grid of `height` x `width` patches.

        Args:
            height: Patches per column.
            width: Patches per row.
            generator: Source of the augmentation in training; the default generator if None.
        """
        coords = self._coordinates(height, width)  # [P, 2]
        if self.is_random:
            coords = self._augment(coords, generator)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # [P, 2, E/4]
        angles = angles.flatten(1).tile(2)  # [P, E]
        return angles.sin(), angles.cos()

    def rotation(
        self, height: int, width: int, *, num_prefix: int, generator: torch.Generator | None = None
    ) -> Rotation:
        """Lay the tables out for `rotate`, with an identity row for each of `num_prefix` tokens."""
        sin, cos = self(height, width, generator)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        return Rotation(
            cos=torch.cat([cos.new_ones(num_prefix, 2 * half), cos]),  # [N, E]
            signed_sin=torch.cat([sin.new_zeros(num_prefix, 2 * half), signed_sin]),  # [N, E]
        )

    def _coordinates(self, height: int, width: int) -> Tensor:
        per_axis = {
            "separate": (height, width),
            "max": (max(height, width),) * 2,
            "min": (min(height, width),) * 2,
        }[self.normalize]
        rows, columns = (
            torch.arange(0.5, size, device=self.periods.device, dtype=self.periods.dtype) / scale
            for size, scale in zip((height, width), per_axis, strict=True)
        )
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # [h, w, 2]
        return 2 * grid.flatten(0, 1) - 1  # [P, 2], rows first

    def _augment(self, coords: Tensor, generator: torch.Generator | None) -> Tensor:
        shift, jitter, rescale = self.augmentation
        # drawn where the generator lives and moved: the same numbers on every device
        source = generator.device if generator is not None else torch.device("cpu")

        def uniform(bound: float, count: int) -> Tensor:
            draw = torch.empty(count, device=source, dtype=torch.float32)
            return draw.uniform_(-bound, bound, generator=generator).to(coords)

        if shift is not None:
            coords = coords + uniform(shift, 2)
        if jitter is not None:
            coords = coords * uniform(math.log(jitter), 2).exp()
        if rescale is not None:
            coords = coords * uniform(math.log(rescale), 1).exp()
        return coords


def check_periods(base: float | None, shortest: float | None, longest: float | None) -> None:
    """Refuse anything but a base alone or a range of periods alone.

    Raises:
        ConfigError: Both, neither or half of them are given.
    """
    if base is not None:
        holds = base > 0 and shortest is None and longest is None
    else:
        holds = shortest is not None and longest is not None and 0 < shortest < longest
    if not holds:
        msg = (
            "rope_base: exactly one of rope_base > 0 | 0 < rope_min_period < rope_max_period must "
            f"be set, got {base} | {shortest}, {longest}. Set the others to null."
        )
        raise ConfigError(msg)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys [B, N, H, E] by their positions, in the dtype of the tables."""
    cos, signed_sin = (table[:, None] for table in rotation)  # [N, 1, E]
    wide = x.to(cos.dtype)
    turned = wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * signed_sin
    return turned.to(x.dtype)
