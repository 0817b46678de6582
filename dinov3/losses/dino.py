"""DINO: cross-entropy between the student's and the teacher's CLS assignments (paper, L_DINO)."""

# S student crops, T teacher crops, B images, K prototypes

import torch
from torch import Tensor

from dinov3.errors import ConfigError


def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> Tensor:
    """Mean cross-entropy over all pairs of a student and a teacher crop of the same image.

    Args:
        student_logits: [S, B, K].
        teacher_probs: [T, B, K], no gradient.
        student_temperature: Divides the student's logits.
        ignore_diagonal: Leave out pairs of a crop with itself (same index on both sides).

    Raises:
        ConfigError: Leaving out the diagonal leaves no pair.
    """
    num_student, batch_size, _ = student_logits.shape
    num_teacher = teacher_probs.shape[0]
    num_pairs = num_student * num_teacher
    wide = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 has 3 digits
    with torch.autocast(student_logits.device.type, enabled=False):
        log_probs = (student_logits.to(wide) / student_temperature).log_softmax(dim=-1)
        losses = -log_probs.flatten(1) @ teacher_probs.to(wide).flatten(1).T  # [S, T]
    total = losses.sum()
    if ignore_diagonal:
        num_pairs -= min(num_student, num_teacher)
        if num_pairs == 0:
            msg = "ignore_diagonal: leaves no pair of crops, got one crop on either side. Unset it."
            raise ConfigError(msg)
        total = total - losses.diagonal().sum()
    return total / (batch_size * num_pairs)
