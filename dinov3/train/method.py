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


@dataclass(frozen=True)
class Targets:
    """What the teacher assigns: CLS probabilities [G, B, K] and those of masked patches [M, K]."""

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Predictions:
    """The student's side: CLS logits [G+L, B, K], patch logits [M, K], global CLS [G*B, D]."""

    cls_logits: Tensor
    patch_logits: Tensor
    global_cls: Tensor


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
            local_crops: [L*B, 3, h, w], crop-major.
            masks: bool [G*B, P], True where the student sees the mask token.
            temperature: The teacher's.
        """
        targets = self.targets(global_crops, masks, temperature)
        predictions = self.predictions(global_crops, local_crops, masks)
        return self.terms(predictions, targets, masks)

    @torch.no_grad()
    def targets(self, global_crops: Tensor, masks: Tensor, temperature: float) -> Targets:
        """The teacher sees the global crops whole; Sinkhorn balances what it assigns."""
        features = self.teacher.backbone.forward_features(global_crops)
        cls_logits = self.teacher.dino_head(features["x_norm_clstoken"])  # [G*B, K]
        patch_logits = self.teacher.ibot_head(features["x_norm_patchtokens"][masks])  # [M, K]
        cls = sinkhorn_knopp(cls_logits, temperature=temperature)
        patches = sinkhorn_knopp(patch_logits, temperature=temperature)
        return Targets(cls.unflatten(0, (NUM_GLOBAL, -1)), patches)

    def predictions(self, global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> Predictions:
        """The student sees masked global crops and whole local ones."""
        of_global, of_local = self.student.backbone.forward_features(
            [global_crops, local_crops], [masks, None]
        )
        global_cls = of_global["x_norm_clstoken"]  # [G*B, D]
        cls_logits = self.student.dino_head(torch.cat([global_cls, of_local["x_norm_clstoken"]]))
        patch_logits = self.student.ibot_head(of_global["x_norm_patchtokens"][masks])  # [M, K]
        batch_size = len(global_crops) // NUM_GLOBAL
        return Predictions(cls_logits.unflatten(0, (-1, batch_size)), patch_logits, global_cls)

    def terms(self, predictions: Predictions, targets: Targets, masks: Tensor) -> dict[str, Tensor]:
        """DINO on global and local crops, iBOT, KoLeo, and their weighted sum."""
        aims = self.objective
        logits = predictions.cls_logits
        terms = {
            "dino_global": dino_loss(
                logits[:NUM_GLOBAL],
                targets.cls,
                student_temperature=aims.student_temperature,
                ignore_diagonal=aims.ignore_diagonal,
            ),
            "dino_local": dino_loss(
                logits[NUM_GLOBAL:], targets.cls, student_temperature=aims.student_temperature
            ),
            "ibot": ibot_loss(
                predictions.patch_logits,
                targets.patches,
                mask_weights(masks),
                num_images=len(masks),
                student_temperature=aims.student_temperature,
            ),
            "koleo": self._koleo(predictions.global_cls),
        }
        return {**terms, "loss": self._weighted(terms, len(logits) - NUM_GLOBAL)}

    def _koleo(self, global_cls: Tensor) -> Tensor:
        per_crop = [
            koleo_loss(cls, group_size=self.objective.koleo_group_size)
            for cls in global_cls.chunk(NUM_GLOBAL)
        ]
        return torch.stack(per_crop).mean()

    def _weighted(self, terms: dict[str, Tensor], num_local: int) -> Tensor:
        """Local and global DINO terms share their weight by the number of crop pairs."""
        aims = self.objective
        global_pairs = NUM_GLOBAL * (NUM_GLOBAL - aims.ignore_diagonal)
        local_pairs = NUM_GLOBAL * num_local
        by_pairs = global_pairs * terms["dino_global"] + local_pairs * terms["dino_local"]
        return (
            aims.dino * by_pairs / (global_pairs + local_pairs)
            + aims.ibot * terms["ibot"]
            + aims.koleo * NUM_GLOBAL * terms["koleo"]  # the reference sums it over global crops
        )


def _head(embed_dim: int, shape: HeadShape, device: torch.device | None) -> ProjectionHead:
    return ProjectionHead(
        embed_dim,
        shape.num_prototypes,
        num_layers=shape.num_layers,
        hidden_dim=shape.hidden_dim,
        bottleneck_dim=shape.bottleneck_dim,
        device=device,
    )
