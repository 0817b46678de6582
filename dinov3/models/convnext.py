"""The ConvNeXt students of DINOv3 (paper, section 5.2): four stages of depthwise 7 x 7 blocks.

The mean over the last map stands in for CLS; there are no registers and no mask token. Maps are
kept in the channels-last format, where norms and linear layers need no copy.
"""

# B images, C channels, H x W pixels, h x w = P positions of a map, D width of the last stage

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DataError
from dinov3.layers.block import select_blocks
from dinov3.models.features import Features, cls_tokens, mask_of_each
from dinov3.models.fields import config_of, require

NUM_STAGES = 4
_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
    """The architecture of one ConvNeXt; the values are checked on construction.

    Attributes:
        depths: Blocks of each of the four stages.
        dims: Width of each stage; the last one is the width of the features.
        in_chans: Channels of the images.
        drop_path: Share of images whose residual is skipped in training: this in the last block,
            growing linearly from 0 in the first.
        layerscale: Initial gain of each residual; None or 0 leaves the gain out.
        patch_size: `get_intermediate_layers` resizes its maps to the grid of such patches; None
            leaves every map as its stage made it.

    Raises:
        ConfigError: A value does not describe a model.
    """

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    in_chans: int = 3
    drop_path: float = 0.0
    layerscale: float | None = 1e-6
    patch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "dims"):
            values = tuple(getattr(self, name))  # a list where it comes from JSON
            object.__setattr__(self, name, values)
            rule = f"must be {NUM_STAGES} whole numbers of at least 1"
            self._require(rule, len(values) == NUM_STAGES and all(map(_is_count, values)), name)
        self._require("must be a whole number of at least 1", _is_count(self.in_chans), "in_chans")
        self._require("must lie in [0, 1)", 0 <= self.drop_path < 1, "drop_path")
        gain = self.layerscale
        self._require("must be finite or null", gain is None or abs(gain) < math.inf, "layerscale")
        rule = "must be a whole number of at least 1 or null"
        self._require(rule, self.patch_size is None or _is_count(self.patch_size), "patch_size")

    def _require(self, rule: str, holds: bool, name: str) -> None:
        require(holds, name, rule, getattr(self, name))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a mapping, such as the `model` object of a config.json.

        Raises:
            ConfigError: A field is unknown, missing or has an impossible value.
        """
        return config_of(cls, fields, "a ConvNeXt")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position alone."""
        normed: Tensor = super().forward(x.permute(0, 2, 3, 1))  # [B, h, w, C]
        return normed.permute(0, 3, 1, 2)  # [B, C, h, w]


class ConvBlock(nn.Module):
    """x += gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))."""

    gamma: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        layerscale: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layerscale = layerscale or 0.0
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gain = nn.Parameter(torch.empty(dim, **factory)) if self.layerscale > 0 else None
        self.register_parameter("gamma", gain)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, **factory)
        self.norm = nn.LayerNorm(dim, eps=_EPS, **factory)
        self.pwconv1 = nn.Linear(dim, 4 * dim, **factory)
        self.pwconv2 = nn.Linear(4 * dim, dim, **factory)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Transform a map [B, C, h, w].

        Args:
            x: The map.
            kept: Factor of each image's residual [B, 1, 1, 1]; None stands for ones.
        """
        residual = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # [B, h, w, C]
        residual = self.pwconv2(F.gelu(self.pwconv1(residual)))
        if self.gamma is not None:
            residual = residual * self.gamma
        if kept is not None:
            residual = residual * kept.to(residual.dtype)
        total: Tensor = x + residual.permute(0, 3, 1, 2)  # [B, C, h, w]
        return total


class ConvNeXt(nn.Module):
    """A ConvNeXt with the interface of `VisionTransformer`; it builds on the meta device too.

    Attributes:
        embed_dim: Width D of the features.
        stride: Pixels between neighbouring positions of `forward_features`: 32.
        patch_size: As in the config; it concerns `get_intermediate_layers` alone.
        num_registers: 0.
    """

    def __init__(
        self,
        config: ConvNeXtConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.patch_size = config.dims[-1], config.patch_size
        self.stride, self.num_registers = _stride(NUM_STAGES - 1), 0
        self._generator: torch.Generator | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (config.in_chans, *config.dims)
        self.downsample_layers = nn.ModuleList(
            _build_downsampling(widths[stage], widths[stage + 1], is_stem=stage == 0, **factory)
            for stage in range(NUM_STAGES)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(dim, layerscale=config.layerscale, **factory) for _ in range(depth)
            )
            for depth, dim in zip(config.depths, config.dims, strict=True)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=_EPS, **factory)
        # published state dicts hold the final norm under both names
        unnormed = (nn.Identity() for _ in range(NUM_STAGES - 1))
        self.norms = nn.ModuleList([*unnormed, self.norm])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as after `to_empty`.

        Weights of convolutions and linear layers are truncated N(0, 0.02), biases zero, norms one,
        the residual gains their configured value.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvBlock) and module.gamma is not None:
                nn.init.constant_(module.gamma, module.layerscale)

    def set_generator(
        self, generator: torch.Generator | None, depth: torch.Generator | None = None
    ) -> None:
        """Choose where training draws stochastic depth from: `depth`, or else `generator`.

        A generator on the CPU serves every device; None stands for the default one.
        """
        self._generator = depth or generator

    def forward(
        self, x: Any, masks: Any = None, *, is_training: bool = False
    ) -> Tensor | Features | list[Tensor] | list[Features]:
        """Return the pooled feature [B, D] of each image, or all features where `is_training`.

        Args:
            x: Images [B, C, H, W], or a list of such batches; a list gives a list.
            masks: As for `forward_features`.
            is_training: Return what `forward_features` returns.
        """
        features: Features | list[Features] = self.forward_features(x, masks)
        return features if is_training else cls_tokens(features)

    @overload
    def forward_features(self, x: Tensor, masks: None = None) -> Features: ...
    @overload
    def forward_features(
        self, x: Sequence[Tensor], masks: Sequence[None] | None = None
    ) -> list[Features]: ...
    def forward_features(self, x: Any, masks: Any = None) -> Features | list[Features]:
        """Compute the features of a batch, or of a list of batches of different resolutions.

        x_norm_clstoken is the normed mean over the map, x_storage_tokens is empty [B, 0, D], and
        x_prenorm holds the positions alone [B, P, D].

        Args:
            x: Images [B, C, H, W], or a list of batches. In training both sides are multiples of
                the stride, since a floored map would not lie on a teacher's patches; in evaluation
                the reference's rule holds: pixels that fill no position are cut off.
            masks: None, or None per batch: a ConvNeXt has no mask token.

        Raises:
            DataError: The images have no such shape, or a mask is given.
        """
        if isinstance(x, Tensor):
            return self._features(x, masks)
        pairs = zip(x, mask_of_each(x, masks), strict=True)
        return [self._features(each, mask) for each, mask in pairs]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Return the maps of some stages, in the order of the stages, each with its own width C.

        Only the last stage has a norm. With a `patch_size`, every map is resized to the grid of
        such patches; otherwise stage s has one position per 4 * 2^s pixels.

        Args:
            x: Images [B, C, H, W] of any size with at least one position in each map.
            n: How many of the last stages, or the indices of the stages.
            reshape: Maps [B, C, h, w] in place of [B, P, C].
            return_class_token: Each entry is (positions, mean over the map before resizing, ...).
            return_extra_tokens: Each entry is (positions, ..., [B, 0, C]).
            norm: Apply the final norm to the last stage.

        Raises:
            ConfigError: A stage is asked for twice or does not exist.
            DataError: The images have no such shape.
        """
        wanted = select_blocks(n, NUM_STAGES)
        self._check_images(x, max(_stride(wanted[-1]), self.patch_size or 1))
        outputs: list[tuple[Tensor, ...]] = []
        for stage, output in self._run_stages(x, wanted[-1]):
            if stage not in wanted:
                continue
            pooled = output.mean((2, 3))  # [B, C]
            resized = self._resize(output, x.shape[-2:])  # [B, C, h, w]
            positions = resized.flatten(2).mT  # [B, P, C]
            if norm:
                pooled, positions = self.norms[stage](pooled), self.norms[stage](positions)
            entry = [positions.contiguous()]
            if reshape:
                entry = [positions.mT.unflatten(-1, resized.shape[-2:]).contiguous()]
            if return_class_token:
                entry.append(pooled)
            if return_extra_tokens:
                entry.append(positions[:, :0])
            outputs.append(tuple(entry))
        return tuple(entry[0] if len(entry) == 1 else entry for entry in outputs)

    def _features(self, x: Tensor, masks: Tensor | None) -> Features:
        if masks is not None:
            got = list(masks.shape) if isinstance(masks, Tensor) else masks
            msg = f"masks: a ConvNeXt has no mask token, got masks of {got}. Pass None."
            raise DataError(msg)
        self._check_images(x, self.stride, whole=self.training)
        for _, output in self._run_stages(x):
            last = output  # [B, D, h, w]
        positions = last.flatten(2).mT  # [B, P, D]
        pooled = last.mean((2, 3)).unsqueeze(1)  # [B, 1, D]
        normed = self.norm(torch.cat([pooled, positions], dim=1))  # [B, 1 + P, D]
        return Features(
            x_norm_clstoken=normed[:, 0],
            x_storage_tokens=normed[:, 1:1],
            x_norm_patchtokens=normed[:, 1:],
            x_prenorm=positions,
            masks=None,
        )

    def _run_stages(self, x: Tensor, last: int = NUM_STAGES - 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the map [B, C, h, w] of each stage up to the last one wanted."""
        kept = iter(self._draw_kept(x))
        output = x.contiguous(memory_format=torch.channels_last)
        for stage in range(last + 1):
            output = self.downsample_layers[stage](output)
            for block in self.stages[stage].children():
                output = block(output, next(kept))
            yield stage, output

    def _draw_kept(self, x: Tensor) -> Sequence[Tensor | None]:
        """One factor [B, 1, 1, 1] per block: 0 for a skipped image, 1 / share kept otherwise."""
        num_blocks, rate = sum(self.config.depths), self.config.drop_path
        if not (self.training and rate > 0):
            return [None] * num_blocks
        source = self._generator.device if self._generator is not None else torch.device("cpu")
        shares = 1 - torch.linspace(0, rate, num_blocks, device=source)[:, None]
        draws = torch.rand(num_blocks, len(x), generator=self._generator, device=source)
        kept = (draws < shares) / shares  # [blocks, B]
        return kept[:, :, None, None, None].to(x.device).unbind()

    def _resize(self, output: Tensor, size: torch.Size) -> Tensor:
        if self.patch_size is None:
            return output
        grid = [side // self.patch_size for side in size]
        wide = output.float()  # antialiasing is not made for half precision on a CPU
        return F.interpolate(wide, size=grid, mode="bilinear", antialias=True).to(output.dtype)

    def _check_images(self, x: Tensor, least: int, *, whole: bool = False) -> None:
        channels = self.config.in_chans
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
            msg = (
                f"images: not a batch of shape [B, {channels}, H, W] with sides of at least "
                f"{least} pixels, got {list(x.shape)}. Reshape or enlarge them."
            )
            raise DataError(msg)
        if whole and any(side % least for side in x.shape[2:]):
            msg = (
                f"images: sides must be multiples of the stride {least} in training, got "
                f"{list(x.shape[2:])}. Change the crop size."
            )
            raise DataError(msg)


def build_convnext(
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> ConvNeXt:
    """Build a ConvNeXt from the fields of `ConvNeXtConfig`.

    Raises:
        ConfigError: A field is unknown, missing or has an impossible value.
    """
    return ConvNeXt(ConvNeXtConfig.from_fields(fields), device=device, dtype=dtype)


def _stride(stage: int) -> int:
    """Pixels between neighbouring positions after a stage."""
    return 4 << stage


def _build_downsampling(width: int, next_width: int, *, is_stem: bool, **factory: Any) -> nn.Module:
    if is_stem:
        stem = nn.Conv2d(width, next_width, kernel_size=4, stride=4, **factory)
        return nn.Sequential(stem, ChannelNorm(next_width, eps=_EPS, **factory))
    halving = nn.Conv2d(width, next_width, kernel_size=2, stride=2, **factory)
    return nn.Sequential(ChannelNorm(width, eps=_EPS, **factory), halving)
