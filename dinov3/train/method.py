"""Self-distillation: one step from crops to the weighted objective (paper, L_Pre).

crops ──► teacher (EMA, global crops) ──► Sinkhorn targets ─┐
  └─────► student (masked global + local crops) ────────────┴─► DINO + iBOT + KoLeo
"""

# B images, G global crops (2), L local crops, K prototypes, D width, M masked patches

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov3.heads.projection import ProjectionHead
from dinov3.losses.dino import dino_loss
from dinov3.losses.ibot import ibot_loss, mask_weights
from dinov3.losses.koleo import koleo_loss
from dinov3.losses.sinkhorn import sinkhorn_knopp
from dinov3.models.vit import VisionTransformer, ViTConfig

NUM_GLOBAL = 2


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one projection head."""

    num_prototypes: int
    num_layers: int
    hidden_dim: int
    bottleneck_dim: int


@dataclass(frozen=True)
class Objective:
    """Weights and temperature of the loss terms."""

    dino: float
    ibot: float
    koleo: float
    koleo_group_size: int | None
    student_temperature: float
    ignore_diagonal: bool


class Network(nn.Module):
    """A backbone with its DINO and iBOT heads: the student, and again the EMA teacher."""

    def __init__(
        self, vit: ViTConfig, dino: HeadShape, ibot: HeadShape, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.backbone = VisionTransformer(vit, device=device)
        self.dino_head = _head(vit.embed_dim, dino, device)
        self.ibot_head = _head(vit.embed_dim, ibot, device)

    def reset_parameters(self, last_layer_gain: float) -> None:
        """Initial weights of SPEC's recipe; the gain scales the prototypes."""
        self.backbone.reset_parameters()
        self.dino_head.reset_parameters(last_layer_gain)
        self.ibot_head.reset_parameters(last_layer_gain)

    def parts(self) -> dict[str, nn.Module]:
        """The sub-modules that are clipped and grouped on their own."""
        return {
            "backbone": self.backbone,
            "dino_head": self.dino_head,
            "ibot_head": self.ibot_head,
        }


class SelfDistillation:
    """The student, its EMA teacher and the objective between them."""

    def __init__(self, student: Network, teacher: Network, objective: Objective) -> None:
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.objective = objective
        self.student.train()
        self.teacher.eval()

    def losses(
        self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """All terms and their weighted sum under `loss`.

        Args:
            global_crops: [G*B, 3, H, W], crop-major.
            local_crops: [L*B, 3, h, w], crop-major; L may be 0.
            masks: bool [G*B, P], True where the student sees the mask token.
            temperature: The teacher's.
        """
        masked = masks.flatten().nonzero().squeeze(1)  # [M]
        cls_targets, patch_targets = self._targets(global_crops, masked, temperature)
        return self._student_losses(global_crops, local_crops, masks, cls_targets, patch_targets)

    @torch.no_grad()
    def _targets(
        self, global_crops: Tensor, masked: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        features = self.teacher.backbone.forward_features(global_crops)
        cls_logits = self.teacher.dino_head(features["x_norm_clstoken"])  # [G*B, K]
        cls_targets = sinkhorn_knopp(cls_logits, temperature=temperature)
        patches = features["x_norm_patchtokens"].flatten(0, 1)[masked]  # [M, D]
        patch_logits = self.teacher.ibot_head(patches)  # [M, K]
        patch_targets = sinkhorn_knopp(patch_logits, temperature=temperature)
        return cls_targets.unflatten(0, (NUM_GLOBAL, -1)), patch_targets

    def _student_losses(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: Tensor,
        cls_targets: Tensor,
        patch_targets: Tensor,
    ) -> dict[str, Tensor]:
        aims = self.objective
        student = self.student
        of_global, of_local = student.backbone.forward_features(
            [global_crops, local_crops], [masks, None]
        )
        global_cls = of_global["x_norm_clstoken"]  # [G*B, D]
        logits = student.dino_head(torch.cat([global_cls, of_local["x_norm_clstoken"]]))
        batch_size = cls_targets.shape[1]
        crops = logits.unflatten(0, (-1, batch_size))  # [G+L, B, K]
        terms = {
            "dino_global": dino_loss(
                crops[:NUM_GLOBAL],
                cls_targets,
                student_temperature=aims.student_temperature,
                ignore_diagonal=aims.ignore_diagonal,
            ),
            "koleo": self._koleo(global_cls, batch_size),
            "ibot": self._ibot(of_global["x_norm_patchtokens"], masks, patch_targets),
        }
        num_local = crops.shape[0] - NUM_GLOBAL
        if num_local:
            terms["dino_local"] = dino_loss(
                crops[NUM_GLOBAL:], cls_targets, student_temperature=aims.student_temperature
            )
        return {**terms, "loss": self._weighted(terms, num_local)}

    def _koleo(self, global_cls: Tensor, batch_size: int) -> Tensor:
        per_crop = [
            koleo_loss(cls, group_size=self.objective.koleo_group_size)
            for cls in global_cls.split(batch_size)
        ]
        return torch.stack(per_crop).mean()

    def _ibot(self, patches: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        masked = masks.flatten().nonzero().squeeze(1)
        logits = self.student.ibot_head(patches.flatten(0, 1)[masked])  # [M, K]
        return ibot_loss(
            logits,
            targets,
            mask_weights(masks),
            num_images=masks.shape[0],
            student_temperature=self.objective.student_temperature,
        )

    def _weighted(self, terms: dict[str, Tensor], num_local: int) -> Tensor:
        """Local and global DINO terms share their weight by the number of crop pairs."""
        aims = self.objective
        global_pairs = NUM_GLOBAL * (NUM_GLOBAL - aims.ignore_diagonal)
        local_pairs = NUM_GLOBAL * num_local
        pairs = global_pairs + local_pairs
        loss = aims.dino * global_pairs / pairs * terms["dino_global"]
        if num_local:
            loss = loss + aims.dino * local_pairs / pairs * terms["dino_local"]
        loss = loss + aims.ibot * terms["ibot"]
        # the reference sums KoLeo over the global crops
        return loss + aims.koleo * NUM_GLOBAL * terms["koleo"]


def _head(embed_dim: int, shape: HeadShape, device: torch.device | None) -> ProjectionHead:
    return ProjectionHead(
        embed_dim,
        shape.num_prototypes,
        num_layers=shape.num_layers,
        hidden_dim=shape.hidden_dim,
        bottleneck_dim=shape.bottleneck_dim,
        device=device,
    )
