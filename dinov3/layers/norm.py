"""Normalisation and the learned residual scale (LayerScale).

The names are those of the published configurations: "layernormbf16" is LayerNorm with the larger
epsilon that training in bfloat16 needs, and is what every released model uses.
"""

# D width

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dinov3.errors import ConfigError


class RMSNorm(nn.Module):
    """Root mean square norm, computed in fp32 and returned in the input's dtype."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()  # fp32: the mean of squares loses small features in bf16
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


class LayerScale(nn.Module):
    """A learned gain per feature on a residual branch, small at the start."""

    def __init__(
        self,
        dim: int,
        *,
        init: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every gain to the initial value."""
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension."""
        return x * self.gamma


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": RMSNorm,
}


def build_norm(
    kind: str,
    dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the norm called `kind`: layernorm, layernormbf16 or rmsnorm.

    Raises:
        ConfigError: No norm has that name.
    """
    if kind not in NORMS:
        msg = f"norm: unknown kind, got {kind!r}. Use one of {', '.join(NORMS)}."
        raise ConfigError(msg)
    return NORMS[kind](dim, device=device, dtype=dtype)
