"""iBOT: cross-entropy on the patches that the student does not see (paper, L_iBOT)."""

# N images, P patches, M masked patches of all images, K prototypes

import torch
from torch import Tensor


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weights: Tensor,
    num_images: int,
    *,
    student_temperature: float = 0.1,
) -> Tensor:
    """Weighted cross-entropy of the masked patches, divided by the number of images.

    Args:
        student_logits: [M, K]; without masked patches the loss is 0.
        teacher_probs: [M, K], no gradient.
        weights: [M], see `mask_weights`.
        num_images: N, the images without masked patches included.
        student_temperature: Divides the student's logits.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 has 3 digits
    log_probs = (student_logits.to(wide) / student_temperature).log_softmax(dim=-1)
    losses = -(teacher_probs.to(wide) * log_probs).sum(dim=-1)  # [M]
    return (losses * weights.to(wide)).sum() / num_images


def mask_weights(masks: Tensor) -> Tensor:
    """Weight [M] of each masked patch, in row-major order: 1 / masked patches of its image.

    So every masked image counts the same, however much of it is masked.

    Args:
        masks: bool [N, P].
    """
    per_image = masks.sum(dim=1, keepdim=True)  # [N, 1]
    return per_image.float().reciprocal().expand_as(masks)[masks]  # [M]
