"""The Gram teacher: where it comes from, when it is refreshed, what it sees (paper, section 4).

checkpoint  another artifact, loaded once
ema@STEP    a copy of this run's own EMA, taken before that step
ema         the living EMA itself
"""

# N images, P patches, D width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.config import GramConfig
from dinov3.train.ema import ema_update
from dinov3.train.objective import GramTerm


class GramTeacher:
    """Patch features to compare the student's with.

    Attributes:
        backbone: Frozen; None where the EMA itself is meant.
        term: The comparison.
        num_updates: How often it was replaced by the EMA.
    """

    def __init__(self, config: GramConfig, backbone: nn.Module | None) -> None:
        self.config = config
        self.backbone = backbone
        self.term = GramTerm(config.normalize, config.image_level, config.remove, config.tokens)
        self.num_updates = 0
        if backbone is not None:
            backbone.requires_grad_(False).eval()

    def is_ready(self, step: int) -> bool:
        """Whether there is a teacher at this step: a copy of the EMA may still be to come."""
        return self.config.copy_step is None or step >= self.config.copy_step

    def before_step(self, step: int, ema: nn.Module) -> None:
        """Takes the copy that `ema@STEP` asks for."""
        if self.backbone is not None and self.config.copy_step == step:
            ema_update(self.backbone, ema, 0.0)

    def after_step(self, step: int, ema: nn.Module) -> None:
        """Refreshes by the recipe's rule, after the EMA of that step."""
        rule, done = self.config.refresh, step + 1
        if rule is None or self.backbone is None or done < rule.first:
            return
        is_due = (done - rule.first) % rule.every == 0
        if is_due and (rule.max_updates is None or self.num_updates < rule.max_updates):
            ema_update(self.backbone, ema, 0.0)
            self.num_updates += 1

    @torch.no_grad()
    def patches(self, crops: Tensor, ema: nn.Module, grid: tuple[int, int]) -> Tensor:
        """Features [N, P, D] of the crops on the student's grid of patches.

        Args:
            crops: Of the Gram teacher's size [N, 3, H, W].
            ema: The EMA's backbone.
            grid: The student's rows and columns.
        """
        model: Any = ema if self.backbone is None else self.backbone
        features = model.forward_features(crops)["x_norm_patchtokens"].float()
        rows, columns = (side // model.stride for side in crops.shape[-2:])
        if (rows, columns) == grid:
            return features  # type: ignore[no-any-return]
        maps = features.mT.unflatten(-1, (rows, columns))  # [N, D, rows, columns]
        smooth = self.config.resize != "nearest"
        resized = F.interpolate(
            maps,
            grid,
            mode=self.config.resize,
            align_corners=False if smooth else None,
            antialias=self.config.antialias,
        )
        return resized.flatten(2).mT

    def tensors(self) -> dict[str, Tensor]:
        """The weights, where they are its own."""
        own = {} if self.backbone is None else self.backbone.state_dict()
        return {f"gram_teacher.{name}": tensor for name, tensor in own.items()}
