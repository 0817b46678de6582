"""A backbone with its DINO and iBOT heads: the student, its EMA, a frozen teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinov3.heads.projection import ProjectionHead
from dinov3.models.backbone import build_backbone


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one projection head."""

    num_prototypes: int
    num_layers: int
    hidden_dim: int
    bottleneck_dim: int


class Network(nn.Module):
    """A backbone of either family with its two heads."""

    def __init__(
        self,
        model: dict[str, Any],
        dino: HeadShape,
        ibot: HeadShape,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(model, device=device)
        self.dino_head = build_head(self.backbone.embed_dim, dino, device)
        self.ibot_head = build_head(self.backbone.embed_dim, ibot, device)

    def reset_parameters(self, last_layer_gain: float) -> None:
        """Draws initial weights; the gain scales the prototypes."""
        self.backbone.reset_parameters()
        self.dino_head.reset_parameters(last_layer_gain)
        self.ibot_head.reset_parameters(last_layer_gain)

    def parts(self) -> dict[str, nn.Module]:
        """The sub-modules that are clipped, grouped and sharded on their own."""
        return {name: module for name, module in self.named_children()}


def build_head(
    embed_dim: int, shape: HeadShape, device: torch.device | str | None
) -> ProjectionHead:
    """A DINO or iBOT head over features of a backbone's width."""
    return ProjectionHead(
        embed_dim,
        shape.num_prototypes,
        num_layers=shape.num_layers,
        hidden_dim=shape.hidden_dim,
        bottleneck_dim=shape.bottleneck_dim,
        device=device,
    )
