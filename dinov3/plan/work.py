"""Floating-point operations of a forward pass, and what it keeps for the backward pass.

A matrix costs two operations per number and token, attention 4 N^2 D per block (so counts the
paper's table of GFLOPs). Kernels are taken not to store the attention matrix; norms, rotations and
activations are kept where nothing is checkpointed.
"""

# N tokens of an image, D width, F hidden size of a block, C channels, P positions of a map

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dinov3.heads.projection import ProjectionHead
from dinov3.layers.ffn import Mlp, SwiGLU
from dinov3.models.backbone import Backbone
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer

Checkpointing = Literal["none", "selective", "full"]
FORWARDS_OF_BACKWARD = 2  # one for the inputs, one for the weights


@dataclass(frozen=True)
class Pass:
    """One forward pass of one image or token row.

    Attributes:
        flops: Of the pass.
        kept: Numbers kept for the backward pass, whatever their dtype.
    """

    flops: float
    kept: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.flops + other.flops, self.kept + other.kept)

    def __mul__(self, count: float) -> "Pass":
        return Pass(self.flops * count, self.kept * count)


NOTHING = Pass(0.0, 0.0)


def backbone_pass(
    model: Backbone, size: int, *, checkpointing: Checkpointing = "none", train: bool = False
) -> Pass:
    """One image of `size` pixels.

    Args:
        model: On the meta device.
        size: Side of the image.
        checkpointing: Of blocks.
        train: Stochastic depth leaves work out.
    """
    if isinstance(model, ConvNeXt):
        return _convnext_pass(model, size, checkpointing)
    return _vit_pass(model, size, checkpointing, train=train)


def blocks_pass(
    blocks: Sequence[nn.Module], num_tokens: int, checkpointing: Checkpointing, keep: float = 1.0
) -> Pass:
    """Transformer blocks of equal shape over one sequence; `keep` is the share that is computed."""
    if not blocks:
        return NOTHING
    matrices = _matrices(blocks[0])
    width = _width(blocks[0])
    flops = 2.0 * num_tokens * matrices + 4.0 * num_tokens**2 * width
    kept = _kept_per_token(blocks[0], width, checkpointing) * keep + width * (1 - keep)
    return Pass(flops * keep, kept * num_tokens) * len(blocks)


def largest_block(model: Backbone, size: int) -> float:
    """Numbers that the largest block keeps of one image, where nothing is checkpointed."""
    if isinstance(model, ConvNeXt):
        widest = zip(model.config.dims, range(len(model.config.dims)), strict=True)
        return float(max(12 * dim * (size // (4 * 2**index)) ** 2 for dim, index in widest))
    num_tokens = 1 + model.num_registers + (size // model.patch_size) ** 2
    return blocks_pass([model.blocks[0]], num_tokens, "none").kept


def head_pass(head: ProjectionHead) -> Pass:
    """One row through a projection head; logits are kept in half and in full precision."""
    matrices = [p for p in head.parameters() if p.ndim > 1]
    kept = sum(2 * p.shape[0] for p in matrices[:-1]) + 3 * matrices[-1].shape[0]
    return Pass(2.0 * sum(p.numel() for p in matrices), float(kept))


def _vit_pass(
    model: VisionTransformer, size: int, checkpointing: Checkpointing, *, train: bool
) -> Pass:
    num_patches = (size // model.patch_size) ** 2
    num_tokens = 1 + model.num_registers + num_patches
    embedding = sum(p.numel() for p in model.patch_embed.parameters() if p.ndim > 1)
    keep = 1 - model.config.drop_path if train else 1.0
    blocks = blocks_pass(list(model.blocks), num_tokens, checkpointing, keep)
    ends = Pass(2.0 * num_patches * embedding, 3.0 * num_tokens * model.embed_dim)
    return blocks + ends


def _convnext_pass(model: ConvNeXt, size: int, checkpointing: Checkpointing) -> Pass:
    total, positions = NOTHING, 0
    for index, (down, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        positions = (size // (4 * 2**index)) ** 2
        dim = model.config.dims[index]
        per_block = {"none": 12, "selective": 7, "full": 1}[checkpointing] * dim
        numbers = _matrices(down) + _matrices(stage)
        kept = positions * (3 * dim + per_block * len(list(stage.children())))
        total += Pass(2.0 * positions * numbers, float(kept))
    return total + Pass(0.0, 3.0 * positions * model.embed_dim)  # the final norm


def _kept_per_token(block: nn.Module, width: int, checkpointing: Checkpointing) -> float:
    """Numbers that one token leaves in one block.

    none: both inputs and norms (4 D), the joint projection that the values are a view of (3 D),
    rotated queries and keys (2 D), attention (D), both residuals before LayerScale (2 D), hidden
    layer before and after its activation. selective: what matrices and attention put out, and the
    input. full: the input.
    """
    if checkpointing == "full":
        return float(width)
    hidden, is_gated = _hidden(block)
    if checkpointing == "selective":
        return float(7 * width + (2 if is_gated else 1) * hidden)
    return float(12 * width + (4 if is_gated else 2) * hidden)


def _hidden(block: nn.Module) -> tuple[int, bool]:
    for module in block.modules():
        if isinstance(module, SwiGLU):
            return module.w1.out_features, True
        if isinstance(module, Mlp):
            return module.fc1.out_features, False
    return 0, False


def _width(block: nn.Module) -> int:
    return min(p.shape[-1] for p in block.parameters() if p.ndim > 1)


def _matrices(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters() if p.ndim > 1)
