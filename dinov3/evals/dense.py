"""Dense evaluation of one backbone: scenes from labelled pictures, two probes, rows with intervals.

The probes tell the classes from each other and from the background (`segmentation`), and any
object from the background (`foreground segmentation`).
"""

# N scenes, P patches (h x w), D width

import colorsys
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dinov3.config import CompositesConfig, SegmentationConfig
from dinov3.errors import DataError
from dinov3.evals.baselines import MAJORITY, MODEL, RANDOM_INIT, RAW_PIXELS, SUBJECTS
from dinov3.evals.collection import Places
from dinov3.evals.composites import (
    BACKGROUND,
    IGNORED,
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
from dinov3.evals.metrics import (
    Integers,
    Interval,
    bootstrap_interval,
    copy_deviations,
    difference_from_copies,
    possible_differences,
)
from dinov3.evals.protocols import subject_of
from dinov3.evals.segmentation import (
    Counts,
    Figure,
    Floats,
    Maps,
    Masks,
    Segmentation,
    SegmentationGrid,
    class_ious,
    foreground,
    interval_of,
    majority_counts,
    mean_ious,
    object_precision,
    patch_segmentation,
    pixel_accuracies,
    scene_draws,
)

SEGMENTATION = "segmentation"
FOREGROUND = "foreground segmentation"
DENSE_PROTOCOLS = (SEGMENTATION, FOREGROUND)
MIOU = "mIoU"
PIXEL_ACCURACY = "pixel accuracy"
PRECISION = "average precision"  # of objects against the background, mean over scenes
NEEDS_SHAPES = (
    "needs pictures with transparency, of one class or more in both halves: at least 5 % of the "
    "pixels clear (alpha of 5 % or less) and 5 % solid (alpha of 95 % or more)"
)

_GREY = 110
_FIGURES: dict[str, Figure] = {MIOU: mean_ious, PIXEL_ACCURACY: pixel_accuracies}


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


def dense_rows(
    found: Mapping[str, Sequence[Dense]], scenes: ScenePair, num_bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """One row per protocol, figure and subject, with its interval over scenes.

    Args:
        found: Subject -> its results, one per seed.
        scenes: That were judged.
        num_bootstrap: Draws.
        seed: Of the draws.
    """
    rows = []
    for protocol in DENSE_PROTOCOLS:
        runs = {name: [one.counts(protocol) for one in every] for name, every in found.items()}
        runs[MAJORITY] = [_majority(scenes, protocol)]
        for metric, figure in _FIGURES.items():
            for subject in (name for name in SUBJECTS if name in runs):
                draws = scene_draws(runs[subject], figure, num_bootstrap, seed)
                each = [scene_draws([run], figure, 0, seed)[0] for run in runs[subject]]
                row = _row(protocol, metric, interval_of(draws), len(scenes.test))
                rows.append(row | _of_subject(subject, each))
    precisions = _precisions(found) | {MAJORITY: [_guessed_precision(scenes.test.masks)]}
    for subject in (name for name in SUBJECTS if name in precisions):
        every = precisions[subject]
        interval = bootstrap_interval(np.mean(every, axis=0), num_bootstrap, seed)
        row = _row(FOREGROUND, PRECISION, interval, len(every[0]))
        rows.append(row | _of_subject(subject, [one.mean() for one in every]))
    return rows


def dense_differences(
    found: Mapping[str, Sequence[Dense]],
    num_bootstrap: int,
    seed: int,
    others: Sequence[str] = (RANDOM_INIT, RAW_PIXELS),
) -> list[dict[str, Any]]:
    """The model minus its untrained copies, minus raw patches or others, over the same draws.

    Intervals hold how far another untrained copy could lie, see `difference_from_copies`.

    Args:
        found: Subject -> its results; the model has one.
        num_bootstrap: Draws.
        seed: Of the draws.
        others: Subjects to compare with, where they are.
    """
    rows = []
    precisions = _precisions(found)
    for other in (name for name in others if name in found):
        names = {"subject": MODEL, "against": other}
        for protocol in DENSE_PROTOCOLS:
            for metric, figure in _FIGURES.items():
                ours, *theirs = (
                    scene_draws([one.counts(protocol)], figure, num_bootstrap, seed)
                    for one in (found[MODEL][0], *found[other])
                )
                num = len(found[MODEL][0].classes.counts)
                interval = interval_of(_from_copies(ours, theirs, seed))
                rows.append(_row(protocol, metric, interval, num) | names)
        (own,) = precisions[MODEL]
        interval = difference_from_copies(own, precisions[other], num_bootstrap, seed)
        rows.append(_row(FOREGROUND, PRECISION, interval, len(own)) | names)
    return rows


def dense_per_class(
    found: Mapping[str, Sequence[Dense]], scenes: ScenePair
) -> list[dict[str, Any]]:
    """IoU of every class by the probe of the classes, for every subject; background first."""
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(("background", *scenes.test.classes)):
        row: dict[str, Any] = {"label": label}
        for subject, every in found.items():
            ious = [class_ious(one.classes.counts)[index] for one in every]
            if not np.isnan(ious).any():
                row[subject] = float(np.mean(ious))
        rows.append(row)
    return rows


def scene_strips(
    found: Mapping[str, Sequence[Dense]], scenes: ScenePair, num: int
) -> npt.NDArray[np.uint8]:
    """The first test scenes for people: one row each, with its mask and every subject's.

    Args:
        found: Subject -> its results; of several seeds the first is shown.
        scenes: That were judged.
        num: Rows.

    Returns:
        [num*S, (2 + subjects)*S, 3]; background black, ignored white, classes in their hues, grey
        what only the probe of the objects sees.
    """
    colour_of = palette(len(scenes.test.classes))
    columns = [scenes.test.pictures[:num], colour_of[scenes.test.masks[:num]]]
    for every in found.values():
        classes, objects = (
            probe.predicted[:num] for probe in (every[0].classes, every[0].foreground)
        )
        colours = colour_of[classes]  # [num, S, S, 3]
        colours[(classes == BACKGROUND) & (objects != BACKGROUND)] = _GREY
        columns.append(colours)
    rows = np.concatenate(columns, axis=2)  # [num, S, columns*S, 3]
    return np.asarray(rows.reshape(-1, *rows.shape[2:]))


def palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """A colour for every value of a mask, [256, 3]."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(num_classes):
        rgb = colorsys.hsv_to_rgb(
            index / num_classes, 0.6 + 0.4 * (index % 2), 1 - 0.2 * (index % 3)
        )
        colours[index + 1] = [round(255 * value) for value in rgb]
    colours[IGNORED] = 255
    return colours


def _maps(
    model: Backbone, scenes: Scenes, transform: Transform, batch_size: int, device: torch.device
) -> Maps:
    found = extract(model, scenes.images(), transform, batch_size, device, patches=True)
    assert found.patches is not None
    num, count, width = found.patches.shape
    side = math.isqrt(count)  # scenes are square
    return found.patches.reshape(num, side, side, width)


def _from_copies(ours: Floats, copies: Sequence[Floats], seed: int) -> Floats:
    """Drawn figures, all in [0, 1], minus those of the copies, or of one more copy."""
    between: Floats = ours - np.mean(copies, axis=0)
    between[1:] += copy_deviations([float(copy[0]) for copy in copies], len(between) - 1, seed)
    return possible_differences(between)


def _precisions(found: Mapping[str, Sequence[Dense]]) -> dict[str, list[Floats]]:
    """Average precision of the objects in every scene that has one, by subject and seed."""
    every = {name: [one.foreground.precision for one in runs] for name, runs in found.items()}
    return {name: [one[~np.isnan(one)] for one in runs] for name, runs in every.items()}


def _guessed_precision(masks: Masks) -> Floats:
    """Of a guess that says the same of every pixel: the share of objects, scene by scene."""
    found = object_precision(masks, np.zeros(masks.shape, dtype=np.float32))
    return found[~np.isnan(found)]


def _of_subject(subject: str, per_seed: Sequence[float]) -> dict[str, Any]:
    """Whose row it is, with the figure of every untrained copy."""
    seeds = {"per_seed": [float(value) for value in per_seed]} if subject == RANDOM_INIT else {}
    return {"subject": subject, **seeds}


def _majority(scenes: ScenePair, protocol: str) -> Counts:
    train, test = scenes.train.masks, scenes.test.masks
    if protocol == FOREGROUND:
        return majority_counts(foreground(train), foreground(test), 2)
    return majority_counts(train, test, len(scenes.train.classes) + 1)


def _row(protocol: str, metric: str, interval: Interval, num: int) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "metric": metric,
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "num_samples": num,
    }
