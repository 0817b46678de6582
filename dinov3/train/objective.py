"""The objective between a student's predictions and a teacher's targets (paper, L_Pre and L_Ref).

Most terms are means over the images of a micro-batch, and the mean over micro-batches and ranks is
then that of the whole batch. Two are not: KoLeo in groups larger than a micro-batch, and the Gram
matrix of a whole batch. `WholeBatch` computes those once over everything and hands their gradient
to the micro-batches.
"""

# B images, G global crops (2), L local crops, K prototypes, D width, M masked patches, P patches

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3.distributed import Group, gather_rows, world_size
from dinov3.losses.dino import dino_loss
from dinov3.losses.gram import gram_loss
from dinov3.losses.ibot import ibot_loss, mask_weights
from dinov3.losses.koleo import koleo_loss

NUM_GLOBAL = 2


@dataclass(frozen=True)
class Objective:
    """Weights and temperature of the loss terms."""

    dino: float
    ibot: float
    koleo: float
    koleo_group_size: int | None
    student_temperature: float
    ignore_diagonal: bool


@dataclass(frozen=True)
class GramTerm:
    """How patch similarities are compared, in plain values."""

    normalize: bool
    image_level: bool
    remove: str
    tokens: str

    def loss(self, student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
        """Gram distance of patches [N, P, D], of those that `masks` [N, P] leaves in."""
        if self.tokens != "all":
            chosen = masks if self.tokens == "masked" else ~masks
            student, teacher = student[chosen], teacher[chosen]
        return gram_loss(
            student,
            teacher,
            normalize=self.normalize,
            image_level=self.image_level,
            remove_negatives=self.remove == "negatives",
            remove_teacher_negatives=self.remove == "teacher_negatives",
        )


@dataclass(frozen=True)
class Weights:
    """What is scheduled: factors of the DINO term on local crops and of the Gram term."""

    local: float = 1.0
    gram: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What the teacher assigns: CLS probabilities [G, B, K] and those of masked patches [M, K]."""

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Predictions:
    """The student's side.

    CLS logits [G+L, B, K], patch logits [M, K], global CLS [G, B, D], global patches [G*B, P, D].
    """

    cls_logits: Tensor
    patch_logits: Tensor
    global_cls: Tensor
    patches: Tensor


def ssl_terms(
    aims: Objective, predictions: Predictions, targets: Targets, masks: Tensor
) -> dict[str, Tensor]:
    """The terms that are means over images: DINO on global and on local crops, iBOT."""
    logits = predictions.cls_logits
    return {
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
    }


def koleo_of_crops(global_cls: Tensor, group_size: int | None) -> Tensor:
    """KoLeo of each global crop's CLS features [G, B, D] by itself, averaged."""
    return torch.stack([koleo_loss(cls, group_size=group_size) for cls in global_cls]).mean()


def weighted_sum(
    aims: Objective, terms: dict[str, Tensor], num_local: int, weights: Weights
) -> Tensor:
    """The objective; local and global DINO terms share their weight by the number of crop pairs."""
    global_pairs = NUM_GLOBAL * (NUM_GLOBAL - aims.ignore_diagonal)
    local_pairs = NUM_GLOBAL * num_local
    by_pairs = global_pairs * terms["dino_global"]
    by_pairs = by_pairs + weights.local * local_pairs * terms["dino_local"]
    total = (
        aims.dino * by_pairs / (global_pairs + local_pairs)
        + aims.ibot * terms["ibot"]
        + aims.koleo * NUM_GLOBAL * terms["koleo"]  # the reference sums it over global crops
    )
    return total + weights.gram * terms["gram"] if "gram" in terms else total


class WholeBatch:
    """A term over features of all micro-batches and ranks, as a term of each micro-batch.

    Args:
        features: Of each micro-batch in turn, images in dimension `dim`.
        loss: Of the features of the whole batch.
        dim: Which dimension holds the images.
        group: The ranks.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        *,
        dim: int = 0,
        group: Group = None,
    ) -> None:
        self._dim = dim
        self._counts = [part.shape[dim] for part in features]
        own = torch.cat([part.detach().float() for part in features], dim=dim).requires_grad_()
        with torch.enable_grad():
            rows = gather_rows(own.movedim(dim, 0), group).movedim(0, dim)
            value = loss(rows)
        (self._gradient,) = torch.autograd.grad(value, own)
        self._value = value.detach()

    def of(self, number: int, features: Tensor) -> Tensor:
        """The term with the gradient of micro-batch `number`; averaging them gives it whole."""
        part = self._gradient.split(self._counts, dim=self._dim)[number]
        slope = (features.float() * part).sum() * len(self._counts)
        term: Tensor = self._value + slope - slope.detach()
        return term


def spans_micro_batches(group_size: int | None, num_rows: int, *, is_whole: bool) -> bool:
    """Whether groups of `group_size` rows reach beyond a micro-batch of `num_rows`.

    Args:
        group_size: Consecutive rows of the global batch; all if None.
        num_rows: Of one micro-batch.
        is_whole: Whether that micro-batch is all there is.
    """
    if group_size is None:
        return not is_whole
    return num_rows % group_size != 0


def is_whole_batch(num_shares: int, group: Group) -> bool:
    """Whether one micro-batch of one rank is the whole batch."""
    return num_shares == 1 and world_size(group) == 1
