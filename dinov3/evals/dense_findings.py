"""What the dense evaluation found: rows with intervals over scenes, paired differences, classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov3.evals.baselines import MAJORITY, MODEL, RANDOM_INIT, RAW_PIXELS, SUBJECTS
from dinov3.evals.dense import DENSE_PROTOCOLS, FOREGROUND, SEGMENTATION, Dense, ScenePair
from dinov3.evals.metrics import (
    Interval,
    bootstrap_interval,
    copy_deviations,
    difference_from_copies,
    possible_differences,
)
from dinov3.evals.segmentation import (
    Counts,
    Figure,
    Floats,
    Masks,
    class_ious,
    foreground,
    interval_of,
    majority_counts,
    mean_ious,
    object_precision,
    pixel_accuracies,
    scene_draws,
)

MIOU = "mIoU"
PIXEL_ACCURACY = "pixel accuracy"
PRECISION = "average precision"  # of objects against the background, mean over scenes

_FIGURES: dict[str, Figure] = {MIOU: mean_ious, PIXEL_ACCURACY: pixel_accuracies}


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


def dense_choices(found: Mapping[str, Sequence[Dense]]) -> list[dict[str, Any]]:
    """What the probes of classes chose, by subject and seed."""
    return [
        {
            "protocol": SEGMENTATION,
            "subject": subject,
            "val_miou": one.classes.val_miou,
            "c": one.classes.chosen_c,
            "converged": one.classes.converged,
        }
        for subject, every in found.items()
        for one in every
    ]


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
