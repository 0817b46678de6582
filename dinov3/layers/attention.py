"""Multi-head self-attention with rotary positions over packed tokens.

Crops of several resolutions run in one pass: their tokens lie one after the other in a single
[T, D] tensor, so that every linear layer runs once; only attention looks at each group alone.
"""

# T tokens of all groups, B images and N tokens of one group, D width, H heads, E features per head

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.rope import Rotation, rotate

Shapes = Sequence[tuple[int, int]]
"""Of each group of packed tokens: images, tokens per image."""


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """Lay groups of tokens [B, N, D] one after the other: [T, D]."""
    shapes = [(group.shape[0], group.shape[1]) for group in groups]
    return torch.cat([group.flatten(0, 1) for group in groups]), shapes


def unpack(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Split packed tokens [T, D] into their groups [B, N, D]."""
    parts = tokens.split([images * length for images, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


class KeyMaskedLinear(nn.Linear):
    """The joint query, key and value projection, with the bias of the keys held at zero.

    A key bias shifts all logits of a query alike, so softmax cannot see it, and nothing else keeps
    it from growing. The mask is a buffer of the state dict; NaN until `fill_mask` or a load.
    """

    bias_mask: Tensor

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, 3 * dim, device=device, dtype=dtype)
        self.register_buffer("bias_mask", torch.full_like(self.bias.detach(), torch.nan))

    def fill_mask(self) -> None:
        """Write ones for queries and values, zeros for keys."""
        width = self.in_features
        self.bias_mask.fill_(1)
        self.bias_mask[width : 2 * width].fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        """Project to 3 * D features."""
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    """Softmax attention within each image."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mask_k_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv: nn.Linear
        if qkv_bias and mask_k_bias:
            self.qkv = KeyMaskedLinear(dim, device=device, dtype=dtype)
            self.qkv.fill_mask()
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, shapes: Shapes, rotations: Sequence[Rotation]) -> Tensor:
        """Attend over packed tokens [T, D].

        Args:
            tokens: All groups, one after the other.
            shapes: Of each group.
            rotations: Rotary tables of each group.
        """
        qkv = self.qkv(tokens)  # [T, 3D]
        attended = [
            self._attend(group, rotation)
            for group, rotation in zip(unpack(qkv, shapes), rotations, strict=True)
        ]
        mixed: Tensor = self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))
        return mixed

    def _attend(self, qkv: Tensor, rotation: Rotation) -> Tensor:
        split = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, E]
        query, key, value = split.unbind(2)  # [B, N, H, E]
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )  # [B, H, N, E]
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)  # [B * N, D]
