"""One pre-norm transformer block, with stochastic depth that skips the work it drops.

A dropped residual is not computed and then multiplied by zero: each group keeps a random subset of
its images, computes the residual for those alone and adds it back, scaled to the same expectation.
Which images are kept is drawn outside the block, so that it is a pure function of its inputs and
may be computed twice (activation checkpointing).
"""

# T tokens of all groups, B images and N tokens of one group, D width

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3.errors import ConfigError
from dinov3.layers.attention import KeyMaskedLinear, Shapes
from dinov3.layers.norm import LayerScale, RMSNorm
from dinov3.layers.patch_embed import PatchEmbed
from dinov3.layers.rope import RotaryEmbedding, Rotation


class KeptImages(NamedTuple):
    """The random part of the packed tokens whose residual is computed."""

    rows: Tensor  # [T'] positions in the packed tokens
    shapes: Shapes
    scale: Tensor  # [T', 1] images / kept images of the group


KeptPair = tuple[KeptImages, KeptImages]
"""Of the attention branch and of the feed-forward branch."""


class Block(nn.Module):
    """x += ls1(attn(norm1(x))), then x += ls2(mlp(norm2(x))), over packed tokens."""

    def __init__(
        self,
        *,
        norm1: nn.Module,
        attn: nn.Module,
        ls1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        ls2: nn.Module,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = norm1, attn, ls1
        self.norm2, self.mlp, self.ls2 = norm2, mlp, ls2
        self.drop_path = drop_path

    def draw_kept(
        self, shapes: Shapes, device: torch.device, generator: torch.Generator | None
    ) -> KeptPair | None:
        """Draw the images kept by either branch in this pass; None where nothing is dropped.

        Args:
            shapes: Of each group of the packed tokens.
            device: Of the tokens.
            generator: Source of the draws; the default generator if None.
        """
        if not (self.training and self.drop_path > 0):
            return None
        rate = self.drop_path
        attended = draw_kept_images(shapes, rate, device, generator)
        return attended, draw_kept_images(shapes, rate, device, generator)

    def forward(
        self,
        tokens: Tensor,
        shapes: Shapes,
        rotations: Sequence[Rotation],
        kept: KeptPair | None = None,
    ) -> Tensor:
        """Transform packed tokens [T, D].

        Args:
            tokens: All groups, one after the other.
            shapes: Of each group.
            rotations: Rotary tables of each group.
            kept: What `draw_kept` gave for this pass; None keeps every image.
        """

        def attend(part: Tensor, part_shapes: Shapes) -> Tensor:
            attended: Tensor = self.attn(self.norm1(part), part_shapes, rotations)
            return attended

        def transform(part: Tensor, _: Shapes) -> Tensor:
            transformed: Tensor = self.mlp(self.norm2(part))
            return transformed

        if kept is None:
            tokens = add_scaled(tokens, attend(tokens, shapes), self.ls1)
            return add_scaled(tokens, transform(tokens, shapes), self.ls2)
        tokens = add_for_kept(tokens, kept[0], attend, self.ls1)
        return add_for_kept(tokens, kept[1], transform, self.ls2)


def add_scaled(tokens: Tensor, residual: Tensor, scale: nn.Module) -> Tensor:
    """Add scale(residual), in one operation where the dtypes allow it."""
    if isinstance(scale, LayerScale) and tokens.dtype == residual.dtype == scale.gamma.dtype:
        return torch.addcmul(tokens, residual, scale.gamma)
    total: Tensor = tokens + scale(residual)
    return total


def draw_kept_images(
    shapes: Shapes, rate: float, device: torch.device, generator: torch.Generator | None
) -> KeptImages:
    """Choose max(floor(B * (1 - rate)), 1) images of each group."""
    source = generator.device if generator is not None else torch.device("cpu")
    rows, kept_shapes, scales = [], [], []
    start = 0
    for images, length in shapes:
        count = min(max(int(images * (1 - rate)), 1), images)  # a group may be empty
        chosen = torch.randperm(images, generator=generator, device=source)[:count].to(device)
        within = torch.arange(length, device=device)
        rows.append((start + chosen[:, None] * length + within).flatten())
        scales.append(torch.full((count * length, 1), images / max(count, 1), device=device))
        kept_shapes.append((count, length))
        start += images * length
    return KeptImages(torch.cat(rows), kept_shapes, torch.cat(scales))


def add_for_kept(
    tokens: Tensor,
    kept: KeptImages,
    residual: Callable[[Tensor, Shapes], Tensor],
    scale: nn.Module,
) -> Tensor:
    """Add the residual of the kept images to their tokens; the others stay as they are."""
    part = scale(residual(tokens.index_select(0, kept.rows), kept.shapes))  # [T', D]
    return tokens.index_add(0, kept.rows, (part * kept.scale).to(tokens.dtype))


def select_blocks(n: int | Sequence[int], depth: int) -> list[int]:
    """Turn the last `n` blocks, or the named ones, into increasing indices.

    Raises:
        ConfigError: A block is asked for twice or does not exist.
    """
    wanted = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
    found = [index for index in range(depth) if index in wanted]
    if not wanted or len(found) != len(wanted):
        msg = (
            f"n: only {len(found)} / {len(wanted)} blocks found, got {n} for blocks 0 to "
            f"{depth - 1}. Name each existing block once."
        )
        raise ConfigError(msg)
    return found


def reset_layers(model: nn.Module) -> None:
    """Draw new weights of every layer of a transformer, and refill its buffers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, KeyMaskedLinear):
                module.fill_mask()
        elif isinstance(module, nn.LayerNorm | RMSNorm | LayerScale | PatchEmbed | RotaryEmbedding):
            module.reset_parameters()
