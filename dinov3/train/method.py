"""Self-distillation: one step from crops to an update (paper, L_Pre; with a Gram teacher L_Ref).

crops ──► EMA teacher (global crops) ──► Sinkhorn targets ──┐
  ├─────► student (masked global + local crops) ────────────┴─► DINO + iBOT + KoLeo ─┐
  └─────► Gram teacher (larger global crops) ──► patch similarities ─► Gram ─────────┴─► update
"""

# B images, b of a micro-batch, G global crops (2), L local crops, K prototypes, P patches, D width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.data.samplers import philox_words
from dinov3.distributed import Group, gather_rows, mean_over_ranks
from dinov3.losses.sinkhorn import sinkhorn_knopp
from dinov3.train.gram_teacher import GramTeacher
from dinov3.train.learner import Learner, Outcome
from dinov3.train.objective import (
    NUM_GLOBAL,
    Objective,
    Predictions,
    Targets,
    Weights,
    WholeBatch,
    is_whole_batch,
    koleo_of_crops,
    spans_micro_batches,
    ssl_terms,
    weighted_sum,
)

_STREAM = int.from_bytes(b"network")  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class Share:
    """A micro-batch as the networks see it.

    Attributes:
        global_crops: [G*b, 3, H, W], crop-major.
        local_crops: [L*b, 3, h, w], crop-major.
        masks: bool [G*b, P], True where the student sees the mask token, or where iBOT looks.
        gram_crops: What the Gram teacher sees instead of the global crops, if anything.
        position: Place of the first image in the global batch.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    gram_crops: Tensor | None = None
    position: int = 0

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.global_crops) // NUM_GLOBAL


class SelfDistillation:
    """The student, its EMA teacher, perhaps a Gram teacher, and the objective between them."""

    def __init__(
        self,
        learner: Learner,
        objective: Objective,
        *,
        seed: int,
        gram: GramTeacher | None = None,
        masks_input: bool = True,
    ) -> None:
        """Sets student and teacher to their modes.

        Args:
            learner: The student and its EMA.
            objective: Weights of the terms.
            seed: Of the run.
            gram: The Gram teacher, if there is one.
            masks_input: Whether the student sees the mask token where iBOT looks; a student of a
                frozen teacher sees its crops whole.
        """
        self.masks_input = masks_input
        self.learner = learner
        self.objective = objective
        self.seed = seed
        self.gram = gram
        self.student: Any = learner.student
        self.teacher: Any = learner.ema
        self.student.train()
        if self.teacher is not None:
            self.teacher.eval()

    def step(self, step: int, shares: Sequence[Share]) -> Outcome:
        """One update on this rank's micro-batches."""
        now = self.learner.at(step)
        if self.gram is not None:
            self.gram.before_step(step, self.teacher.backbone)
        weights = Weights(now["local_loss_weight"], now.get("gram_weight", 0.0))
        targets = self.targets(shares, now["teacher_temperature"])
        outcome = self.learn(step, shares, targets, weights)
        if self.gram is not None and outcome.is_finite:
            self.gram.after_step(step, self.teacher.backbone)
        return outcome

    def learn(
        self, step: int, shares: Sequence[Share], targets: Sequence[Any], weights: Weights
    ) -> Outcome:
        """Gradients, guard and update, with targets that are given."""
        terms = self.backward(step, shares, targets, weights)
        return self.learner.update(step, mean_over_ranks(terms, self.learner.group))

    def backward(
        self, step: int, shares: Sequence[Share], targets: Sequence[Any], weights: Weights
    ) -> dict[str, Tensor]:
        """Gradients of the objective; returns its terms and their sum `loss` on this rank.

        Args:
            step: Counted from 0; stochastic depth and RoPE augmentation are drawn from it.
            shares: The micro-batches; their gradients are averaged.
            targets: Of each micro-batch.
            weights: This step's.
        """
        anchors = [self._anchor(step, share) for share in shares]
        spanning = self._spanning(shares, anchors)
        whole: dict[str, WholeBatch] = {}
        if spanning and len(shares) > 1:
            features = self._features_of_global_crops(step, shares)
            whole = self._whole_batch_terms(spanning, features, shares, anchors)
        totals: dict[str, Tensor] = {}
        for number, share in enumerate(shares):
            predictions = self.predictions(step, share)
            if spanning and len(shares) == 1:
                own = ([predictions.global_cls], [predictions.patches])
                whole = self._whole_batch_terms(spanning, own, shares, anchors)
            terms = self.terms(predictions, targets[number], share)
            terms["koleo"] = self._koleo(whole.get("koleo"), number, predictions)
            anchor = anchors[number]
            if self.gram is not None and anchor is not None:
                over_batch = whole.get("gram")
                terms["gram"] = (
                    self.gram.term.loss(predictions.patches, anchor, share.masks)
                    if over_batch is None
                    else over_batch.of(number, predictions.patches)
                )
            num_local = len(share.local_crops) // share.num_images
            terms["loss"] = weighted_sum(self.objective, terms, num_local, weights) / len(shares)
            terms["loss"].backward()
            for name, value in terms.items():
                part = value.detach() if name == "loss" else value.detach() / len(shares)
                totals[name] = totals.get(name, torch.zeros_like(part)) + part
        return totals

    def rehearse(self, shares: Sequence[Share], temperature: float) -> None:
        """Does the work of one step and changes nothing but gradients."""
        self.backward(0, shares, self.targets(shares, temperature), Weights())

    @torch.no_grad()
    def targets(self, shares: Sequence[Share], temperature: float) -> list[Targets]:
        """The teacher sees the global crops whole; Sinkhorn balances all it assigns together."""
        cls_logits, patch_logits = [], []
        for share in shares:
            features = self.teacher.backbone.forward_features(share.global_crops)
            cls_logits.append(self.teacher.dino_head(features["x_norm_clstoken"]))  # [G*b, K]
            masked = features["x_norm_patchtokens"][share.masks]  # [m, D]
            patch_logits.append(self.teacher.ibot_head(masked))
        return balanced_targets(cls_logits, patch_logits, temperature, self.learner.group)

    def predictions(self, step: int, share: Share) -> Predictions:
        """Both heads over what the student sees."""
        of_global, of_local = self._see(step, share)
        return predict(self.student, of_global, of_local, share.masks)

    def _see(self, step: int, share: Share) -> Any:
        """The student sees masked global crops and whole local ones; equal calls see the same."""
        self._reseed(step, share)
        return self.student.backbone.forward_features(
            [share.global_crops, share.local_crops], [self._input_masks(share), None]
        )

    def terms(self, predictions: Predictions, target: Any, share: Share) -> dict[str, Tensor]:
        """The terms that are means over images."""
        return ssl_terms(self.objective, predictions, target, share.masks)

    def _input_masks(self, share: Share) -> Tensor | None:
        return share.masks if self.masks_input else None

    def _koleo(self, whole: WholeBatch | None, number: int, predictions: Predictions) -> Tensor:
        if whole is not None:
            return whole.of(number, predictions.global_cls)
        return koleo_of_crops(predictions.global_cls, self.objective.koleo_group_size)

    def _anchor(self, step: int, share: Share) -> Tensor | None:
        """The Gram teacher's patches of a micro-batch [G*b, P, D]."""
        if self.gram is None or not self.gram.is_ready(step):
            return None
        crops = share.global_crops if share.gram_crops is None else share.gram_crops
        rows, columns = (
            side // self.student.backbone.stride for side in share.global_crops.shape[-2:]
        )
        return self.gram.patches(crops, self.teacher.backbone, (rows, columns))

    def _spanning(self, shares: Sequence[Share], anchors: Sequence[Tensor | None]) -> set[str]:
        """The terms that look beyond a micro-batch."""
        is_whole = is_whole_batch(len(shares), self.learner.group)
        group_size, num_rows = self.objective.koleo_group_size, shares[0].num_images
        found = set()
        if spans_micro_batches(group_size, num_rows, is_whole=is_whole):
            found.add("koleo")
        has_anchor = self.gram is not None and anchors[0] is not None
        if has_anchor and not is_whole and not self.gram.config.image_level:  # type: ignore[union-attr]
            found.add("gram")
        return found

    def _whole_batch_terms(
        self,
        names: set[str],
        features: tuple[Sequence[Tensor], Sequence[Tensor]],
        shares: Sequence[Share],
        anchors: Sequence[Tensor | None],
    ) -> dict[str, WholeBatch]:
        """Those terms over CLS features and patches of all micro-batches and ranks."""
        cls, patches = features
        group, group_size = self.learner.group, self.objective.koleo_group_size
        found = {}
        if "koleo" in names:
            found["koleo"] = WholeBatch(
                cls, lambda rows: koleo_of_crops(rows, group_size), dim=1, group=group
            )
        if "gram" in names:
            found["gram"] = WholeBatch(patches, self._gram_of_all(shares, anchors), group=group)
        return found

    @torch.no_grad()
    def _features_of_global_crops(
        self, step: int, shares: Sequence[Share]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One more forward pass of the student: what a term over several micro-batches costs."""
        cls, patches = [], []
        for share in shares:
            # packed on an accelerator, local crops take part in the draws of stochastic depth
            features, _ = self._see(step, share)
            cls.append(features["x_norm_clstoken"].float().unflatten(0, (NUM_GLOBAL, -1)))
            patches.append(features["x_norm_patchtokens"].float())
        return cls, patches

    def _gram_of_all(
        self, shares: Sequence[Share], anchors: Sequence[Tensor | None]
    ) -> Callable[[Tensor], Tensor]:
        gram, group = self.gram, self.learner.group
        assert gram is not None
        teacher = gather_rows(torch.cat([one for one in anchors if one is not None]), group)
        masks = gather_rows(torch.cat([share.masks for share in shares]), group)
        return lambda student: gram.term.loss(student, teacher, masks)

    def _reseed(self, step: int, share: Share) -> None:
        """RoPE augmentation is drawn by (seed, step), stochastic depth by the share's place too."""
        generator, depth = (
            torch.Generator().manual_seed(_draw_seed(self.seed, step, place))
            for place in (0, share.position + 1)
        )
        self.student.backbone.set_generator(generator, depth)


def _draw_seed(seed: int, step: int, place: int) -> int:
    return int(philox_words(seed, _STREAM, (place, step, 0), 1)[0] >> np.uint64(1))


def balanced_targets(
    cls_logits: Sequence[Tensor],
    patch_logits: Sequence[Tensor],
    temperature: float,
    group: Group,
) -> list[Targets]:
    """Sinkhorn over the logits of all micro-batches and ranks; one `Targets` per micro-batch."""
    cls = sinkhorn_knopp(torch.cat(list(cls_logits)), temperature=temperature, group=group)
    patches = sinkhorn_knopp(torch.cat(list(patch_logits)), temperature=temperature, group=group)
    parts = zip(
        cls.split([len(part) for part in cls_logits]),
        patches.split([len(part) for part in patch_logits]),
        strict=True,
    )
    return [Targets(of_cls.unflatten(0, (NUM_GLOBAL, -1)), rest) for of_cls, rest in parts]


def predict(student: Any, of_global: Any, of_local: Any, masks: Tensor) -> Predictions:
    """Both heads over the features of global and local crops."""
    global_cls = of_global["x_norm_clstoken"]  # [G*b, D]
    cls_logits = student.dino_head(torch.cat([global_cls, of_local["x_norm_clstoken"]]))
    patch_logits = student.ibot_head(of_global["x_norm_patchtokens"][masks])  # [m, K]
    num_images = len(global_cls) // NUM_GLOBAL
    return Predictions(
        cls_logits.unflatten(0, (-1, num_images)),
        patch_logits,
        global_cls.unflatten(0, (NUM_GLOBAL, -1)),
        of_global["x_norm_patchtokens"],
    )
