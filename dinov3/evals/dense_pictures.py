"""Scenes, masks and what the probes of patches made of them, in colours."""

# S side of a scene, pixels

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dinov3.evals.composites import BACKGROUND, IGNORED
from dinov3.evals.dense import Dense, ScenePair

_GREY = 110


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


def legend(classes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Classes, in the order of their masks, each with its colour as CSS writes it."""
    colours = palette(len(classes))[1 : len(classes) + 1].tolist()
    return tuple(
        (name, f"rgb{tuple(colour)}") for name, colour in zip(classes, colours, strict=True)
    )
