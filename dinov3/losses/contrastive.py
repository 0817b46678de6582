"""Losses of dino.txt: image-text contrast over all ranks, and the Gram matrix of the patches.

The contrast is exact over the whole batch although no rank ever holds it: captions travel around
the ring of ranks, each with its running log-sum-exp over the images seen, and come home after W
hops. A rank keeps one b x b chunk of logits at a time. In the backward pass captions travel again
and collect their gradients. W ranks, gradients averaged over them: the gradient of the mean loss.
"""

# b pairs of one rank, W ranks, E width of the shared space, P patches, D widths of patches

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov3.distributed import Group, rank, world_size
from dinov3.errors import ConfigError
from dinov3.losses.gram import gram_loss


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, *, group: Group = None) -> Tensor:
    """Mean cross-entropy of finding the caption of an image and the image of a caption.

    Every rank passes equally many pairs and gets the mean over its own ones; the candidates are
    the pairs of all ranks. The gradients suit averaging over ranks, as FSDP and DDP do.

    Args:
        image: Unit image features [b, E].
        text: Unit features [b, E] of their captions.
        scale: Inverse temperature, one value.
        group: The ranks; all if None.

    Raises:
        ConfigError: Images and captions are not pairs.
    """
    if image.shape != text.shape or image.ndim != 2 or not len(image) or scale.numel() != 1:
        got = f"{tuple(image.shape)}, {tuple(text.shape)} and {tuple(scale.shape)}"
        msg = f"contrastive: image, text and scale must be [b, E], [b, E] and [1], got {got}. Pair"
        raise ConfigError(f"{msg} every image with one caption.")
    # fp32: at scale 100 the rounding of a cosine in bf16 is most of the loss
    wide = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    loss: Tensor = _Ring.apply(image.to(wide), text.to(wide), scale.to(wide), group)
    return loss


class _Ring(torch.autograd.Function):
    """Both cross-entropies and their gradients, one chunk of captions at a time."""

    @staticmethod
    def forward(context: Any, *inputs: Any) -> Tensor:
        image, text, scale, group = inputs
        # log-sum-exp of each image over captions, and of each caption over images [b]; the latter
        # travels with its caption
        over_texts = image.new_full(image.shape[:1], -torch.inf)
        over_images, positive, visitors = over_texts.clone(), over_texts, text
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(world_size(group)):
                logits = scale * (image @ visitors.mT)  # [b, b]
                if hop == 0:  # the captions at home; rounded as in the sums, so the loss is >= 0
                    positive = logits.diagonal().clone()
                over_texts = torch.logaddexp(over_texts, logits.logsumexp(1))
                over_images = torch.logaddexp(over_images, logits.logsumexp(0))
                visitors, over_images = _pass_on(visitors, over_images, group=group)
        context.save_for_backward(image, text, scale, over_texts, over_images)
        context.group = group
        loss: Tensor = (over_texts + over_images - 2 * positive).mean() / 2
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, over_texts, over_images = context.saved_tensors
        image_grad, visitors_grad = torch.zeros_like(image), torch.zeros_like(text)
        scale_grad = torch.zeros_like(scale)
        visitors = text
        with torch.autocast(image.device.type, enabled=False):
            for hop in range(world_size(context.group)):
                cosines = image @ visitors.mT  # [b, b]
                logits = scale * cosines
                pull = (logits - over_texts[:, None]).exp() + (logits - over_images).exp()
                if hop == 0:  # the captions at home
                    pull.diagonal().sub_(2)
                image_grad += pull @ visitors
                visitors_grad += pull.mT @ image
                scale_grad += (cosines * pull).sum()
                visitors, over_images, visitors_grad = _pass_on(
                    visitors, over_images, visitors_grad, group=context.group
                )
        factor = gradients[0] / (2 * len(image))
        return (
            factor * scale * image_grad,
            factor * scale * visitors_grad,
            factor * scale_grad,
            None,
        )


def _pass_on(*rows: Tensor, group: Group) -> list[Tensor]:
    """Hand tensors [b, ...] to the next rank of the ring, and take those of the one before."""
    size, ours = world_size(group), rank(group)
    if size == 1:
        return list(rows)
    packet = torch.cat([each.reshape(len(each), -1) for each in rows], dim=1)
    arrived = torch.empty_like(packet)
    peers = [(ours + 1) % size, (ours - 1) % size]
    if group is not None:
        peers = [dist.get_global_rank(group, peer) for peer in peers]
    send = dist.P2POp(dist.isend, packet, peers[0], group)
    receive = dist.P2POp(dist.irecv, arrived, peers[1], group)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    parts = arrived.split([each[0].numel() for each in rows], dim=1)
    return [part.reshape(each.shape) for part, each in zip(parts, rows, strict=True)]


def text_gram_loss(
    patches: Tensor,
    backbone_patches: Tensor,
    *,
    normalize: bool = True,
    indices: Tensor | None = None,
) -> Tensor:
    """Hold the similarities between the patches of an image to those in the frozen backbone.

    Args:
        patches: P' [B, P, D] after the vision head.
        backbone_patches: The same patches [B, P, D'] of the backbone; they get no gradient.
        normalize: Compare cosines instead of dot products.
        indices: Patches that are compared, the same in all images; all if None.
    """
    if indices is not None:
        patches = patches.index_select(1, indices)
        backbone_patches = backbone_patches.index_select(1, indices)
    return gram_loss(patches, backbone_patches.detach(), normalize=normalize)
