"""The DINO and iBOT projection head: MLP, L2-normalised bottleneck, prototypes.

The prototypes are a plain linear layer without bias: neither batch norm nor weight norm.
"""

# D width, H hidden width, Z bottleneck width, K prototypes

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import ConfigError


class ProjectionHead(nn.Module):
    """Maps features of width D to logits over K prototypes.

    Args:
        in_dim: D.
        num_prototypes: K.
        num_layers: Linear layers of the MLP; 1 is a single projection to the bottleneck.
        hidden_dim: H.
        bottleneck_dim: Z.
        mlp_bias: Whether the layers of the MLP have biases; the prototypes never do.
        device: Where the parameters live, `meta` included.
        dtype: Of the parameters.

    Raises:
        ConfigError: `num_layers` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_layers < 1:
            msg = f"num_layers: must be at least 1, got {num_layers}. Use 3, as the paper does."
            raise ConfigError(msg)
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        self.mlp = _build_mlp(widths, bias=mlp_bias, **factory)
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self, last_layer_gain: float = 1.0) -> None:
        """Draw truncated N(0, 0.02) weights and zero biases.

        Args:
            last_layer_gain: Factor on the initial prototypes. Above 1 it sharpens the first
                targets, which lets short runs leave the uniform plateau.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.last_layer.weight.mul_(last_layer_gain)

    def forward(
        self, x: Tensor, *, no_last_layer: bool = False, only_last_layer: bool = False
    ) -> Tensor:
        """Logits [..., K] of features [..., D].

        Args:
            x: Features; bottleneck features [..., Z] where `only_last_layer`.
            no_last_layer: Stop at the normalised bottleneck [..., Z].
            only_last_layer: Apply nothing but the prototypes.
        """
        if not only_last_layer:
            x = self.mlp(x)  # [..., Z]
            # 1e-12 is zero in fp16
            x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        if no_last_layer:
            return x
        logits: Tensor = self.last_layer(x)  # [..., K]
        return logits


def _build_mlp(widths: list[int], *, bias: bool, **factory: Any) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias, **factory), nn.GELU()]
    if len(layers) == 2:
        return layers[0]  # not a Sequential: published heads would call it `mlp.weight`
    return nn.Sequential(*layers[:-1])
