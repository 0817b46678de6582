"""Distillation from a teacher without heads: its features take the prototypes' place."""

# b images of a micro-batch, G global crops (2), L local crops, m masked patches, D teacher's width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.train.method import SelfDistillation, Share
from dinov3.train.network import Network
from dinov3.train.objective import NUM_GLOBAL


class FeatureMatching(SelfDistillation):
    """For a teacher without heads: the student's features, mapped, follow the teacher's direction.

    Each pair of crops that DINO would compare costs 1 - cosine of the CLS features, and each masked
    patch 1 - cosine of its own; KoLeo as ever.
    """

    def terms(self, predictions: Any, target: Any, share: Share) -> dict[str, Tensor]:
        """The same names as those of the objective with heads."""
        logits = F.normalize(predictions.cls_logits.float(), dim=-1)  # [G+L, b, D]
        teacher = F.normalize(target.cls.float(), dim=-1)  # [G, b, D]
        far = 1 - torch.einsum("sbd,tbd->st", logits, teacher) / logits.shape[1]
        same = F.cosine_similarity(
            predictions.patch_logits.float(), target.patches.float(), dim=-1
        )  # [m]
        per_image = share.masks.sum(dim=1, keepdim=True).clamp(min=1)
        weights = (1 / per_image.float()).expand_as(share.masks)[share.masks]
        return {
            "dino_global": far[:NUM_GLOBAL].mean(),
            "dino_local": far[NUM_GLOBAL:].mean(),
            "ibot": ((1 - same) * weights).sum() / len(share.masks),
        }


def replace_heads(network: Network, teacher_dim: int, seed: int) -> None:
    """Linear maps onto the teacher's features in place of both heads, drawn from the seed."""
    width = network.backbone.embed_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.dino_head = nn.Linear(width, teacher_dim)  # type: ignore[assignment]
        network.ibot_head = nn.Linear(width, teacher_dim)  # type: ignore[assignment]
