"""Gram anchoring: keep the similarities between patches as an earlier teacher had them.

Paper, section 4, L_Gram: the squared distance of the Gram matrices, here as a mean over entries.
"""

# B images, N patches of an image, D width (may differ between student and teacher)

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import ConfigError


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    image_level: bool = True,
    remove_negatives: bool = False,
    remove_teacher_negatives: bool = False,
) -> Tensor:
    """Mean squared difference of the patch similarities of student and teacher.

    Args:
        student: Patch features [B, N, D], or a selection [n, D].
        teacher: The same patches of the Gram teacher, no gradient.
        normalize: Compare cosines instead of dot products.
        image_level: Compare patches within each image; otherwise within the whole batch.
        remove_negatives: Count negative similarities as 0 on both sides.
        remove_teacher_negatives: Count the teacher's negative similarities as 0, and the
            student's where both are negative.

    Raises:
        ConfigError: Both kinds of removal, or different patches on the two sides.
    """
    if remove_negatives and remove_teacher_negatives:
        msg = "gram: at most one kind of negatives can be removed, got both. Unset one."
        raise ConfigError(msg)
    if student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        msg = f"gram: student and teacher patches differ, got {shapes}. Resize the teacher's map."
        raise ConfigError(msg)
    ours = _similarities(student, normalize=normalize, image_level=image_level)
    theirs = _similarities(teacher, normalize=normalize, image_level=image_level)
    if remove_negatives:
        ours, theirs = ours.clamp(min=0), theirs.clamp(min=0)
    elif remove_teacher_negatives:
        # the student is judged before the teacher is clamped; the released code does it after,
        # when no teacher entry is negative any more
        ours = ours.masked_fill((ours < 0) & (theirs < 0), 0)
        theirs = theirs.clamp(min=0)
    return F.mse_loss(ours, theirs)


def _similarities(features: Tensor, *, normalize: bool, image_level: bool) -> Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(wide)
        if normalize:
            features = F.normalize(features, dim=-1)
        if not image_level:
            features = features.flatten(0, -2)  # [B*N, D]
        return features @ features.mT  # [B, N, N] or [B*N, B*N]
