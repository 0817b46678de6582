"""Feed-forward networks of a block: the GELU MLP and SwiGLU (S+, L+, H+ and the 7B use SwiGLU).

SwiGLU has three matrices, so its hidden size is two thirds of the nominal one, rounded up to a
multiple that suits the matrix units: `swiglu64` rounds to 64.
"""

# T tokens, D width, F hidden size

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import ConfigError

SWIGLU_ALIGNMENTS = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}
FFN_KINDS = ("mlp", *SWIGLU_ALIGNMENTS)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(
        self,
        dim: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_size, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_size, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token alone."""
        transformed: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return transformed


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(
        self,
        dim: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_size, bias=bias, device=device, dtype=dtype)
        self.w2 = nn.Linear(dim, hidden_size, bias=bias, device=device, dtype=dtype)
        self.w3 = nn.Linear(hidden_size, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token alone."""
        transformed: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return transformed


def build_ffn(
    kind: str,
    dim: int,
    *,
    ratio: float,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the feed-forward network called `kind`; `ratio` is its nominal hidden size over `dim`.

    Raises:
        ConfigError: No feed-forward network has that name.
    """
    nominal = int(dim * ratio)
    if kind == "mlp":
        return Mlp(dim, nominal, bias=bias, device=device, dtype=dtype)
    if kind not in SWIGLU_ALIGNMENTS:
        msg = f"ffn: unknown kind, got {kind!r}. Use one of {', '.join(FFN_KINDS)}."
        raise ConfigError(msg)
    multiple = SWIGLU_ALIGNMENTS[kind]
    hidden_size = -(-int(nominal * 2 / 3) // multiple) * multiple
    return SwiGLU(dim, hidden_size, bias=bias, device=device, dtype=dtype)
