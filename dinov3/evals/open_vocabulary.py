"""Open-vocabulary segmentation: every patch takes the class whose sentences it is nearest (4.4).

Protocol:
    Classes:  as in zero-shot classification, of the half of the text embedding that training held
              to the patches; the background has names of its own, averaged into one class.
    Features: the aligned patch tokens, L2-normalised; cosine with every class. No training.
    Whole:    the picture at once, cosines bilinear to pixels.
    Sliding:  windows that overlap; softmax of each window's cosines, averaged where they overlap.
    Metric:   mIoU over all classes and the background, and over objects alone, where background
              pixels are ignored and cannot be answered. 255 is ignored.
    Controls: one-hot patches score the attainable; the best constant answer; shuffled names.
"""

# B pictures, N scenes, P patches (h x w), C classes, K classes with the background, E' width
# H W pixels

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3.evals.aligned import AlignedModel, Embeddings, Transform, picture_batches
from dinov3.evals.composites import BACKGROUND, IGNORED, Scenes
from dinov3.evals.metrics import Floats
from dinov3.evals.progress import watched
from dinov3.evals.segmentation import Counts, Masks, confusion
from dinov3.evals.zeroshot import class_embeddings


@dataclass(frozen=True)
class Window:
    """Sliding windows.

    Attributes:
        side: Of a window, pixels; a smaller picture is one window.
        stride: From one to the next, pixels.
    """

    side: int
    stride: int


@dataclass(frozen=True)
class Segmented:
    """Answers for every pixel: once of all classes, once of the objects alone; [N, H, W]."""

    classes: Masks  # 0 background, 1 ... C
    objects: Masks  # 1 ... C


def patch_classes(embedded: Floats, sizes: Sequence[int], width: int) -> Embeddings:
    """The background and C classes as unit vectors beside the patches, [K, E'].

    Args:
        embedded: Of all sentences, class by class, the background's first, [M, E].
        sizes: Sentences of each; M together.
        width: E', the last so many of E, as training joined them to the patches.
    """
    return class_embeddings(embedded[:, -width:], sizes)


def segment_scenes(
    aligned: AlignedModel,
    scenes: Scenes,
    classes: Embeddings,
    transform: Transform,
    *,
    window: Window | None,
    batch_size: int,
    device: torch.device,
) -> Segmented:
    """Answers for every pixel of the scenes.

    Args:
        aligned: The model.
        scenes: To segment.
        classes: Unit vectors, the background first, [K, E'].
        transform: From a scene to what the model sees, of any size.
        window: None shows each scene whole.
        batch_size: Scenes per forward pass.
        device: Where the model is.
    """
    names = torch.from_numpy(classes).to(device)
    height, width = scenes.masks.shape[1:]
    every, objects = [], []
    shown = watched(scenes.images(), len(scenes), "scenes")
    for batch in picture_batches(shown, transform, batch_size):
        maps = class_maps(aligned, batch.to(device), names, window)  # [B, K, H', W']
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        every.append(maps.argmax(dim=1).to(torch.uint8).cpu().numpy())
        objects.append((maps[:, 1:].argmax(dim=1) + 1).to(torch.uint8).cpu().numpy())
    return Segmented(np.concatenate(every), np.concatenate(objects))


@torch.inference_mode()
def class_maps(
    aligned: AlignedModel, images: Tensor, classes: Tensor, window: Window | None
) -> Tensor:
    """How well every class fits every place: [B, K, h, w] of patches, or [B, K, H, W] by windows.

    Args:
        aligned: The model.
        images: Normalised, [B, 3, H, W].
        classes: Unit vectors, [K, E'].
        window: None gives the cosines of all patches; else softmax averaged over windows.
    """
    height, width = images.shape[-2:]
    if window is None:
        return _cosines(aligned, images, classes)
    total = images.new_zeros(len(images), len(classes), height, width)
    count = images.new_zeros(1, 1, height, width)
    for top in _starts(height, window):
        for left in _starts(width, window):
            rows, columns = slice(top, top + window.side), slice(left, left + window.side)
            part = images[..., rows, columns]
            maps = _cosines(aligned, part, classes)
            large = F.interpolate(maps, part.shape[-2:], mode="bilinear", align_corners=False)
            total[..., rows, columns] += large.softmax(dim=1)
            count[..., rows, columns] += 1
    return total / count


def open_vocabulary_counts(
    masks: Masks, found: Segmented, num_classes: int
) -> tuple[Counts, Counts]:
    """Pixels by class and answer, scene by scene: of everything, and of objects alone.

    Args:
        masks: The truth.
        found: The answers.
        num_classes: K, the background included.
    """
    only = np.where(masks == BACKGROUND, IGNORED, masks).astype(np.uint8)
    everything = confusion(masks, found.classes, num_classes)
    return everything, confusion(only, found.objects, num_classes)


def shuffled_counts(counts: Counts, *, num_shuffles: int, seed: int) -> list[Counts]:
    """The counts if the classes had answered to each other's names; the background keeps its own.

    The best of permuted columns is the permuted best, so nothing is segmented anew.
    """
    generator = np.random.default_rng(seed)
    orders = [1 + generator.permutation(counts.shape[1] - 1) for _ in range(num_shuffles)]
    return [counts[:, :, np.concatenate([[BACKGROUND], order])] for order in orders]


def constant_counts(counts: Counts) -> Counts:
    """The best constant answer: the most frequent class of these very scenes, everywhere."""
    pixels = counts.sum(axis=2)  # [N, K]
    constant = np.zeros_like(counts)
    constant[:, :, pixels.sum(axis=0).argmax()] = pixels
    return constant


def _cosines(aligned: AlignedModel, images: Tensor, classes: Tensor) -> Tensor:
    """Cosines of patches and classes, [B, K, h, w]."""
    height, width = images.shape[-2:]
    rows, columns = (-(-side // aligned.stride) for side in (height, width))
    fitting = rows * aligned.stride, columns * aligned.stride
    if fitting != (height, width):
        images = F.interpolate(images, fitting, mode="bicubic", align_corners=False)
    _, patches, _ = aligned.model.encode_image_with_patch_tokens(images)
    unit = F.normalize(patches.float(), dim=-1)  # [B, P, E']
    cosines: Tensor = unit @ classes.T  # [B, P, K]
    maps: Tensor = cosines.mT.unflatten(-1, (rows, columns))  # [B, K, h, w]
    return maps


def _starts(length: int, window: Window) -> list[int]:
    """Where windows begin along one side; the last one ends where the picture does."""
    last = max(0, length - window.side)
    return sorted({*range(0, last, window.stride), last})
