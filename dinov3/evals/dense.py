"""Dense evaluation of one backbone: scenes from labelled pictures, two probes of its patches.

The probes tell the classes from each other and from the background (`segmentation`), and any
object from the background (`foreground segmentation`).
"""

# N scenes, P patches (h x w), D width

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dinov3.config import CompositesConfig, SegmentationConfig
from dinov3.errors import DataError
from dinov3.evals.collection import Places
from dinov3.evals.composites import (
    Half,
    Layout,
    Scenes,
    build_composites,
    cut_outs,
    packaged_photographs,
    photographs_digest,
    shared_classes,
    source_photographs,
    split_photographs,
)
from dinov3.evals.features import Backbone, Transform, extract
from dinov3.evals.metrics import Integers
from dinov3.evals.protocols import subject_of
from dinov3.evals.segmentation import (
    Counts,
    Floats,
    Maps,
    Segmentation,
    SegmentationGrid,
    foreground,
    mean_ious,
    patch_segmentation,
    scene_draws,
)

SEGMENTATION = "segmentation"
FOREGROUND = "foreground segmentation"
DENSE_PROTOCOLS = (SEGMENTATION, FOREGROUND)
NEEDS_SHAPES = (
    "needs pictures with transparency, of one class or more in both halves: at least 5 % of the "
    "pixels clear (alpha of 5 % or less) and 5 % solid (alpha of 95 % or more)"
)


@dataclass(frozen=True)
class ScenePair:
    """Scenes to learn from and others to be judged on: no picture, no photograph in both."""

    train: Scenes
    test: Scenes
    photographs: str  # what identifies the backgrounds


@dataclass(frozen=True)
class Dense:
    """What the two probes of one backbone did."""

    classes: Segmentation
    foreground: Segmentation

    def counts(self, protocol: str) -> Counts:
        """Of the scenes to be judged on, by one of `DENSE_PROTOCOLS`."""
        return (self.classes if protocol == SEGMENTATION else self.foreground).counts


@dataclass(frozen=True)
class Pool:
    """Labelled pictures of one half."""

    places: Places
    labels: Integers


def scene_pair(
    load: Callable[[Iterable[int]], Iterator[Image.Image]],
    classes: Sequence[str],
    train: Pool,
    test: Pool,
    config: CompositesConfig,
    seed: int,
) -> ScenePair | None:
    """Scenes of both halves; None where no class has transparent pictures in both.

    Args:
        load: Decoded pictures by their places.
        classes: What the labels index.
        train: To learn from.
        test: To be judged on.
        config: The recipe.
        seed: Of all draws.

    Raises:
        DataError: The backgrounds cannot be used, or a picture is in both halves.
    """
    if shared := np.intersect1d(train.places, test.places).tolist():
        msg = f"composites: a picture is in both halves, got row {shared[0]}. Split them."
        raise DataError(msg)
    spec = config.backgrounds
    photographs = packaged_photographs() if spec is None else source_photographs(spec)
    first, second = (
        Half(cut_outs(load(pool.places), pool.labels, len(classes), config.size), photos)
        for pool, photos in zip((train, test), split_photographs(photographs, seed), strict=True)
    )
    names, first, second = shared_classes(classes, first, second)
    if not names:
        return None
    layout = Layout(config.size, config.num_objects)
    return ScenePair(
        build_composites(names, first, layout, config.num_train, seed=seed, stream=0),
        build_composites(names, second, layout, config.num_test, seed=seed, stream=1),
        photographs_digest(photographs),
    )


def judge_dense(
    model: Backbone,
    scenes: ScenePair,
    transform: Transform,
    config: SegmentationConfig,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> Dense:
    """Trains both probes on one frozen backbone's patches and segments the test scenes.

    Args:
        model: On `device`, in evaluation mode.
        scenes: Of both halves.
        transform: Normalisation; must keep the size.
        config: The recipe.
        batch_size: Scenes per forward pass.
        device: Where the model is.
        seed: Of the validation draw.
    """
    train, test = (
        _maps(model, half, transform, batch_size, device) for half in (scenes.train, scenes.test)
    )
    grid = SegmentationGrid(**config.model_dump())
    masks = scenes.train.masks, scenes.test.masks
    num_classes = len(scenes.train.classes) + 1
    classes = patch_segmentation(
        train, masks[0], test, masks[1], num_classes=num_classes, grid=grid, seed=seed
    )
    masks = foreground(masks[0]), foreground(masks[1])
    objects = patch_segmentation(
        train, masks[0], test, masks[1], num_classes=2, grid=grid, seed=seed
    )
    return Dense(classes, objects)


def judge_subjects(
    models: Mapping[str, Backbone],
    scenes: ScenePair,
    transform: Transform,
    config: SegmentationConfig,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> dict[str, list[Dense]]:
    """Every subject on the same scenes.

    Args:
        models: By name: the model, untrained copies of it, `RawPatches` as raw pixels.
        scenes: Of both halves.
        transform: Normalisation; may scale, must not cut.
        config: The recipe.
        batch_size: Scenes per forward pass.
        device: Where the models are.
        seed: Of the validation draws.

    Returns:
        Subject -> its results, one per seed.
    """
    found: dict[str, list[Dense]] = {}
    for name, model in models.items():
        one = judge_dense(
            model, scenes, transform, config, batch_size=batch_size, device=device, seed=seed
        )
        found.setdefault(subject_of(name), []).append(one)
    return found


def dense_score(found: Dense, num_bootstrap: int, seed: int) -> Floats:
    """Mean of both mIoUs over drawn scenes, see `scene_draws`."""
    draws = [
        scene_draws([found.counts(protocol)], mean_ious, num_bootstrap, seed)
        for protocol in DENSE_PROTOCOLS
    ]
    return np.asarray(np.mean(draws, axis=0))


def _maps(
    model: Backbone, scenes: Scenes, transform: Transform, batch_size: int, device: torch.device
) -> Maps:
    found = extract(model, scenes.images(), transform, batch_size, device, patches=True)
    assert found.patches is not None
    num, count, width = found.patches.shape
    side = math.isqrt(count)  # scenes are square
    return found.patches.reshape(num, side, side, width)
