"""The vision transformer of DINOv3 (paper, section 3.2): registers, axial RoPE, untied norms.

The sequence is [CLS, registers, patches]. In a list of batches of different resolutions, entry 0
holds the global crops and entry 1 the local crops; an accelerator runs them packed, in one pass.
"""

# B images, C channels, H x W pixels, P patches (h x w), R registers, N = 1 + R + P tokens,
# T tokens of all batches, D width

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast, overload

import torch
from torch import Generator, Tensor, nn

from dinov3.layers.attention import SelfAttention, Shapes, pack, unpack
from dinov3.layers.block import Block, reset_layers, select_blocks
from dinov3.layers.ffn import FFN_KINDS, build_ffn
from dinov3.layers.norm import NORMS, LayerScale, build_norm
from dinov3.layers.patch_embed import PatchEmbed, mask_patches
from dinov3.layers.rope import (
    ROPE_DTYPES,
    ROPE_NORMALIZATIONS,
    RopeAugmentation,
    RotaryEmbedding,
    Rotation,
    check_periods,
)
from dinov3.models.features import Features, cls_tokens, mask_of_each
from dinov3.models.fields import config_of, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The architecture of one vision transformer; the values are checked on construction.

    Attributes:
        embed_dim: Width D; a multiple of 4 * num_heads.
        patch_size: Side of a patch in pixels.
        ffn_ratio: Nominal hidden size of the feed-forward network over the width.
        ffn: mlp, or swiglu with the multiple its hidden size is rounded up to.
        drop_path: Share of images whose residual is skipped in training, the same in every block.
        layerscale: Initial gain of each residual; None leaves LayerScale out.
        num_registers: Extra tokens without a position (`storage_tokens` in state dicts).
        mask_k_bias: Hold the key bias at zero.
        untie_cls_and_patch_norms: A final norm of its own for CLS and registers.
        untie_global_and_local_cls_norm: In training, a final norm of its own for those tokens of
            local crops.
        rope_base: Base of the periods, or None where rope_min_period and rope_max_period are set.
        rope_normalize: Each axis by its own length, or both by the shorter or the longer one.
        rope_shift: Training only: the coordinates move by up to this much, per axis.
        rope_jitter: Training only: each axis is stretched by up to this factor.
        rope_rescale: Training only: both axes are stretched by one factor up to this.
        rope_dtype: Precision of the tables, and of queries and keys while they are rotated.

    Raises:
        ConfigError: A value does not describe a model.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    in_chans: int = 3
    ffn_ratio: float = 4.0
    ffn: str = "mlp"
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    drop_path: float = 0.0
    layerscale: float | None = 1e-5
    norm: str = "layernormbf16"
    num_registers: int = 4
    mask_k_bias: bool = True
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    rope_base: float | None = 100.0
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    rope_normalize: str = "separate"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    rope_dtype: str = "fp32"

    def __post_init__(self) -> None:
        counts = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans")
        self._require("must be at least 1", lambda value: value >= 1, *counts)
        self._require("must not be negative", lambda value: value >= 0, "num_registers")
        self._require("must be positive", lambda value: value > 0, "ffn_ratio")
        self._require("must lie in [0, 1)", lambda value: 0 <= value < 1, "drop_path")
        rule = f"must be a multiple of 4 * num_heads = {4 * self.num_heads}"
        self._require(rule, lambda value: value % (4 * self.num_heads) == 0, "embed_dim")
        names = {"ffn": FFN_KINDS, "norm": NORMS, "rope_dtype": ROPE_DTYPES}
        for name, known in {**names, "rope_normalize": ROPE_NORMALIZATIONS}.items():
            self._require(f"must be one of {', '.join(known)}", known.__contains__, name)
        gain, stretch = ("layerscale", "rope_shift"), ("rope_jitter", "rope_rescale")
        self._require("must be positive or null", lambda v: v is None or v > 0, *gain)
        self._require("must be at least 1 or null", lambda v: v is None or v >= 1, *stretch)
        check_periods(self.rope_base, self.rope_min_period, self.rope_max_period)

    def _require(self, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(holds(value), name, rule, value)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a mapping, such as the `model` object of a config.json.

        Raises:
            ConfigError: A field is unknown, missing or has an impossible value.
        """
        return config_of(cls, fields, "a vision transformer")


class VisionTransformer(nn.Module):
    """A vision transformer; build it from a `ViTConfig`, on the meta device too.

    embed_dim, depth, num_heads, patch_size (= stride) and num_registers mirror the config.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.depth = config.embed_dim, config.depth
        self.num_heads, self.patch_size = config.num_heads, config.patch_size
        self.num_registers, self.stride = config.num_registers, config.patch_size
        self.set_generator(None)
        width = config.embed_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **factory))
        if config.num_registers:
            registers = torch.empty(1, config.num_registers, width, **factory)
            self.storage_tokens = nn.Parameter(registers)
        self.mask_token = nn.Parameter(torch.empty(1, width, **factory))
        self.patch_embed = PatchEmbed(
            patch_size=config.patch_size, in_chans=config.in_chans, embed_dim=width, **factory
        )
        self.rope_embed = RotaryEmbedding(
            width // config.num_heads,
            base=config.rope_base,
            min_period=config.rope_min_period,
            max_period=config.rope_max_period,
            normalize=config.rope_normalize,
            augmentation=RopeAugmentation(
                config.rope_shift, config.rope_jitter, config.rope_rescale
            ),
            dtype=ROPE_DTYPES[config.rope_dtype],
            device=device,
        )
        self.blocks = nn.ModuleList(_build_block(config, factory) for _ in range(self.depth))
        self.norm = build_norm(config.norm, width, **factory)
        if config.untie_cls_and_patch_norms:
            self.cls_norm = build_norm(config.norm, width, **factory)
        if config.untie_global_and_local_cls_norm:
            self.local_cls_norm = build_norm(config.norm, width, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and refill every buffer, as after `to_empty`.

        CLS and registers are N(0, 0.02), linear weights truncated N(0, 0.02), biases and the mask
        token zero, norms one, LayerScale its configured value, the patch projection uniform.
        """
        nn.init.normal_(self.cls_token, std=0.02)
        if self.num_registers:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        reset_layers(self)

    def set_generator(self, generator: Generator | None, depth: Generator | None = None) -> None:
        """Choose where training draws RoPE augmentation from, and stochastic depth if no `depth`.

        Ranks and micro-batches share `generator`; each has a `depth` of its own, so that they do
        not drop the same positions. One on the CPU serves every device; None is the default one.
        """
        self._generator, self._depth_generator = generator, depth or generator

    def forward(
        self, x: Any, masks: Any = None, *, is_training: bool = False
    ) -> Tensor | Features | list[Tensor] | list[Features]:
        """Return the CLS feature [B, D] of each image, or all features where `is_training`.

        Args:
            x: Images [B, C, H, W], or a list of such batches; a list gives a list.
            masks: As for `forward_features`.
            is_training: Return what `forward_features` returns.
        """
        features: Features | list[Features] = self.forward_features(x, masks)
        return features if is_training else cls_tokens(features)

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Features: ...
    @overload
    def forward_features(
        self, x: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Features]: ...
    def forward_features(self, x: Any, masks: Any = None) -> Features | list[Features]:
        """Compute the features of a batch, or of a list of batches of different resolutions.

        Args:
            x: Images [B, C, H, W], or a list: global crops first, then local crops.
            masks: Boolean [B, P], true where a patch is replaced by the mask token; one entry per
                batch, or None, where `x` is a list.

        Raises:
            DataError: Images or masks do not have such a shape.
        """
        if isinstance(x, Tensor):
            return self._packed_features([x], [masks])[0]
        all_masks = mask_of_each(x, masks)
        if x[0].device.type != "cpu":
            return self._packed_features(x, all_masks)
        pairs = zip(x, all_masks, strict=True)  # one after the other stays in a CPU's cache
        return [self._packed_features([a], [b], i)[0] for i, (a, b) in enumerate(pairs)]

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
        """Return the patch features of some blocks, in the order of the blocks.

        Args:
            x: Images [B, C, H, W].
            n: How many of the last blocks, or the indices of the blocks.
            reshape: Patches as maps [B, D, h, w] in place of [B, P, D].
            return_class_token: Each entry is (patches, CLS, ...).
            return_extra_tokens: Each entry is (patches, ..., registers).
            norm: Apply the final norm to every entry.

        Raises:
            ConfigError: A block is asked for twice or does not exist.
        """
        wanted = select_blocks(n, self.depth)
        tokens, grid = self._tokenize(x, None)
        packed, shapes = pack([tokens])
        outputs: list[tuple[Tensor, ...]] = []
        for index, output in self._run_blocks(packed, shapes, [grid]):
            if index not in wanted:
                continue
            hidden = unpack(output, shapes)[0]  # [B, N, D]
            prefix, patches = self._split_normed(hidden) if norm else self._split(hidden)
            if reshape:
                patches = patches.mT.unflatten(-1, grid).contiguous()  # [B, D, h, w]
            entry = [patches]
            if return_class_token:
                entry.append(prefix[:, 0])
            if return_extra_tokens:
                entry.append(prefix[:, 1:])
            outputs.append(tuple(entry))
            if index == wanted[-1]:
                break
        return tuple(entry[0] if len(entry) == 1 else entry for entry in outputs)

    def _packed_features(
        self, x: Sequence[Tensor], masks: Sequence[Tensor | None], first: int = 0
    ) -> list[Features]:
        """Compute all features in one pass; the first batch stands at index `first` of its list."""
        embedded = [self._tokenize(each, mask) for each, mask in zip(x, masks, strict=True)]
        packed, shapes = pack([tokens for tokens, _ in embedded])  # [T, D]
        for _, output in self._run_blocks(packed, shapes, [grid for _, grid in embedded]):
            packed = output
        results: list[Features] = []
        for index, hidden in enumerate(unpack(packed, shapes)):  # [B, N, D]
            prefix, patches = self._split_normed(hidden, is_local=first + index == 1)
            results.append(
                Features(
                    x_norm_clstoken=prefix[:, 0],
                    x_storage_tokens=prefix[:, 1:],
                    x_norm_patchtokens=patches,
                    x_prenorm=hidden,
                    masks=masks[index],
                )
            )
        return results

    def _tokenize(self, x: Tensor, masks: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        patches = self.patch_embed(x)  # [B, h, w, D]
        images, height, width = patches.shape[:3]
        patches = patches.flatten(1, 2)  # [B, P, D]
        cls_token: Tensor = self.cls_token
        if masks is None:
            cls_token = cls_token + 0 * self.mask_token  # keeps the mask token in the graph
        else:
            patches = mask_patches(patches, masks, self.mask_token)
        prefix = [cls_token, self.storage_tokens] if self.num_registers else [cls_token]
        tokens = torch.cat([*(each.expand(images, -1, -1) for each in prefix), patches], dim=1)
        return tokens, (height, width)  # [B, N, D]

    def _run_blocks(
        self, packed: Tensor, shapes: Shapes, grids: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the packed output [T, D] of each block."""
        for index, block in enumerate(cast(Iterator[Block], self.blocks)):
            if index == 0 or self.rope_embed.is_random:
                rotations = self._rotations(grids)  # random ones are drawn for every block
            kept = block.draw_kept(shapes, packed.device, self._depth_generator)
            packed = block(packed, shapes, rotations, kept)
            yield index, packed

    def _rotations(self, grids: Sequence[tuple[int, int]]) -> list[Rotation]:
        rotation, prefix = self.rope_embed.rotation, 1 + self.num_registers
        return [rotation(*grid, num_prefix=prefix, generator=self._generator) for grid in grids]

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Split [B, N, D] into CLS with registers [B, 1 + R, D] and patches [B, P, D]."""
        first = 1 + self.num_registers
        return tokens[:, :first], tokens[:, first:]

    def _split_normed(self, tokens: Tensor, *, is_local: bool = False) -> tuple[Tensor, Tensor]:
        if self.config.untie_global_and_local_cls_norm and self.training and is_local:
            prefix_norm = self.local_cls_norm
        elif self.config.untie_cls_and_patch_norms:
            prefix_norm = self.cls_norm
        else:
            return self._split(self.norm(tokens))
        prefix, patches = self._split(tokens)
        return prefix_norm(prefix), self.norm(patches)


def build_vit(
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> VisionTransformer:
    """Build a vision transformer from the fields of `ViTConfig`.

    Raises:
        ConfigError: A field is unknown, missing or has an impossible value.
    """
    return VisionTransformer(ViTConfig.from_fields(fields), device=device, dtype=dtype)


def _build_block(config: ViTConfig, factory: dict[str, Any]) -> Block:
    width, init = config.embed_dim, config.layerscale

    def scale() -> nn.Module:
        return nn.Identity() if init is None else LayerScale(width, init=init, **factory)

    return Block(
        norm1=build_norm(config.norm, width, **factory),
        attn=SelfAttention(
            width,
            config.num_heads,
            qkv_bias=config.qkv_bias,
            proj_bias=config.proj_bias,
            mask_k_bias=config.mask_k_bias,
            **factory,
        ),
        ls1=scale(),
        norm2=build_norm(config.norm, width, **factory),
        mlp=build_ffn(config.ffn, width, ratio=config.ffn_ratio, bias=config.ffn_bias, **factory),
        ls2=scale(),
        drop_path=config.drop_path,
    )
