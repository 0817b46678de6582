"""The dino.txt step: image-text contrast, perhaps with the text-Gram term (arXiv 2412.16334).

Every pair is a candidate of every other, so micro-batches cannot each take their own loss. A batch
in parts is therefore encoded twice: first without a graph, for the loss of the whole batch and its
gradient at the features, then part by part with one, to bring that gradient to the parameters.
"""

# b pairs of one rank, N token ids, P patches, E width of the shared space

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3.distributed import Group
from dinov3.losses.contrastive import contrastive_loss, text_gram_loss
from dinov3.models.dinotxt import DinoTxt

Pairs = tuple[Tensor, Tensor]
"""Images [b, 3, H, W] and the token ids [b, N] of their captions."""


def alignment_losses(
    model: DinoTxt,
    images: Tensor,
    tokens: Tensor,
    *,
    gram_weight: float = 0.0,
    gram_indices: Tensor | None = None,
    gram_normalize: bool = True,
    group: Group = None,
) -> dict[str, Tensor]:
    """The terms of one batch and their weighted sum `loss`.

    Args:
        model: Both towers, in training mode.
        images: This rank's images [b, 3, H, W].
        tokens: Their captions [b, N].
        gram_weight: Of `text_gram`, which is left out at 0.
        gram_indices: Patches it compares, the same in all images; all if None.
        gram_normalize: Whether it compares cosines.
        group: The ranks whose pairs are candidates; all if None.

    Raises:
        ConfigError: Images and captions are not pairs.
        DataError: A caption has more tokens than the model has positions.
    """
    image, text, scale, patches, backbone_patches = model(images, tokens)
    terms = {"contrastive": contrastive_loss(image, text, scale, group=group)}
    loss = terms["contrastive"]
    if gram_weight > 0:
        terms["text_gram"] = text_gram_loss(
            patches, backbone_patches, normalize=gram_normalize, indices=gram_indices
        )
        loss = loss + gram_weight * terms["text_gram"]
    return {"loss": loss, **terms}


def backward_in_parts(
    model: DinoTxt,
    parts: Sequence[Pairs],
    *,
    seed_part: Callable[[int], None],
    gram_weight: float = 0.0,
    gram_indices: Tensor | None = None,
    gram_normalize: bool = True,
    group: Group = None,
) -> dict[str, Tensor]:
    """Adds the gradient of `alignment_losses` of all parts together; returns its values.

    Args:
        model: Both towers, in training mode.
        parts: This rank's pairs, in micro-batches.
        seed_part: Called with the number of a part before each of its two forward passes: sets the
            model's generator, so that both drop the same residuals.
        gram_weight: As for `alignment_losses`, and so on.
        gram_indices: As there.
        gram_normalize: As there.
        group: As there.

    Raises:
        ConfigError, DataError: As there.
    """
    contrast = _contrast_parts(model, parts, seed_part, group)
    terms = {"contrastive": contrast.loss}
    num_pairs = sum(len(images) for images, _ in parts)
    for number, (images, tokens) in enumerate(parts):
        seed_part(number)
        image, text, scale, patches, backbone_patches = model(images, tokens)
        share = len(images) / num_pairs
        slope = (image * contrast.image[number]).sum() + (text * contrast.text[number]).sum()
        slope = slope + share * (scale * contrast.scale).sum()
        if gram_weight > 0:
            gram = share * text_gram_loss(
                patches, backbone_patches, normalize=gram_normalize, indices=gram_indices
            )
            terms["text_gram"] = terms.get("text_gram", 0) + gram.detach()
            slope = slope + gram_weight * gram
        slope.backward()
    return {"loss": contrast.loss + gram_weight * terms.get("text_gram", 0), **terms}


class _Contrast(NamedTuple):
    """The loss of all parts, and its gradients: at the features of each part, and at the scale."""

    loss: Tensor
    image: Sequence[Tensor]
    text: Sequence[Tensor]
    scale: Tensor


def _contrast_parts(
    model: DinoTxt, parts: Sequence[Pairs], seed_part: Callable[[int], None], group: Group
) -> _Contrast:
    features = []
    with torch.no_grad():
        for number, pairs in enumerate(parts):
            seed_part(number)
            features.append(model(*pairs)[:3])
    images, texts, scales = zip(*features, strict=True)
    leaves = [torch.cat(images), torch.cat(texts), scales[0]]
    leaves = [each.requires_grad_() for each in leaves]
    loss = contrastive_loss(*leaves, group=group)
    image, text, scale = torch.autograd.grad(loss, leaves)
    sizes = [len(each) for each in images]
    return _Contrast(loss.detach(), image.split(sizes), text.split(sizes), scale)
