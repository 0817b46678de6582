"""What the phases see: patch features of the same pictures and scenes, a column for every model.

Per model one set of principal components over all pictures and sizes, turned to be as like the
first model's as a rotation makes them: components of different models have no order or sign in
common. Similarity is the cosine of every patch with the marked one.
"""

# B pictures, G patches a side, D width, M patches of all pictures and sizes

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from dinov3.config import EvalsConfig
from dinov3.evals.baselines import MODEL
from dinov3.evals.composites import BACKGROUND, IGNORED, Scenes
from dinov3.evals.dense_pictures import palette
from dinov3.evals.features import extract
from dinov3.evals.metrics import unit_rows
from dinov3.evals.phase_findings import Phase
from dinov3.evals.pictures import as_colours, data_uri, drawn, principal_scores
from dinov3.evals.study import Gallery, Study, preparation, scene_view

Maps = npt.NDArray[np.float32]  # [G, G, D]
Colours = npt.NDArray[np.uint8]

_NUM_PICTURES = 6
_NUM_SCENES = 3
_TIMES = (1, 2, 4)  # the evaluation's crop
_MAX_SIDE = 768  # pixels the largest may have
_NOT_BACKGROUND = 16  # of 255, in one channel
_SHOWN = 160  # pixels of the pictures themselves
_RAMP = ((26, 14, 60), (115, 30, 110), (205, 66, 84), (246, 148, 62), (252, 236, 170))


@dataclass(frozen=True)
class Strip:
    """One line of an exhibit: the picture as seen, then a cell for every model."""

    title: str
    shown: str  # data URI
    cells: tuple[str, ...]  # data URIs


@dataclass(frozen=True)
class Exhibit:
    """A picture or scene and what every model makes of it."""

    name: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class _Subject:
    """A picture to show, and the patch to compare the others with."""

    name: str
    image: Image.Image
    mark: tuple[float, float]  # row and column, as shares of the side
    scene: int | None  # its number; None for a picture


def phase_exhibits(
    phases: Sequence[Phase],
    studies: Mapping[str, Study],
    names: Sequence[str],
    pictures: Gallery,
    config: EvalsConfig,
    device: torch.device,
) -> list[Exhibit]:
    """Held-out pictures drawn by the seed and the first scenes, not selected.

    Args:
        phases: The models.
        studies: Their findings.
        names: Path of every row of the table.
        pictures: Images of the rows.
        config: The recipe.
        device: Where the models are.
    """
    subjects = _subjects(phases[0], studies[phases[0].name], names, pictures, config)
    sizes = [n * config.crop for n in _TIMES if n == 1 or n * config.crop <= _MAX_SIDE]
    maps = [[_maps(phase, subjects, size, config, device) for size in sizes] for phase in phases]
    colours = _common_colours(maps)
    exhibits = []
    for number, subject in enumerate(subjects):
        strips = []
        for place, size in enumerate(sizes):
            seen = [of_model[place][number] for of_model in colours]
            shown = _seen(phases[0], subject, size, config)
            strips.append(Strip(f"components, {size} px", _uri(shown), _uris(seen)))
        for place, size in enumerate(sizes):
            alike = [_similarity(of_model[place][number], subject.mark) for of_model in maps]
            shown = _marked(_seen(phases[0], subject, _SHOWN, config), subject.mark)
            strips.append(Strip(f"similarity, {size} px", _uri(shown), _uris(alike)))
        if subject.scene is not None:
            strips.append(_segmented(phases, studies, subject.scene))
        exhibits.append(Exhibit(subject.name, tuple(strips)))
    return exhibits


def _subjects(
    phase: Phase, study: Study, names: Sequence[str], pictures: Gallery, config: EvalsConfig
) -> list[_Subject]:
    rows = study.test if len(study.test) else study.places
    places = drawn(rows, _NUM_PICTURES, config.seed + 1)
    prepare = preparation(phase.candidate, config).enlarged(_SHOWN)
    subjects = [
        _Subject(names[place], image, _picture_mark(prepare.picture(image), config), None)
        for place, image in zip(places, pictures.load(places), strict=True)
    ]
    if study.dense is not None:
        scenes = study.dense.scenes.test
        subjects += [
            _Subject(f"scene {number}", image, _object_mark(scenes, number), number)
            for number, image in zip(range(_NUM_SCENES), scenes.images(), strict=False)
        ]
    return subjects


def _picture_mark(picture: Image.Image, config: EvalsConfig) -> tuple[float, float]:
    """The middle of what is not background colour."""
    distance = np.abs(np.asarray(picture).astype(int) - config.background).max(axis=-1)
    return _middle(distance > _NOT_BACKGROUND)


def _object_mark(scenes: Scenes, number: int) -> tuple[float, float]:
    """The middle of the largest class."""
    mask = scenes.masks[number]
    classes = mask[(mask != BACKGROUND) & (mask != IGNORED)]
    return _middle(mask == (np.bincount(classes).argmax() if len(classes) else IGNORED))


def _middle(inside: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The pixel inside that is nearest to the centre of them all; without one the middle."""
    pixels = np.argwhere(inside)  # [pixels, 2]
    if not len(pixels):
        return 0.5, 0.5
    place = pixels[np.square(pixels - pixels.mean(axis=0)).sum(axis=1).argmin()]
    row, column = ((place + 0.5) / len(inside)).tolist()
    return row, column


def _maps(
    phase: Phase,
    subjects: Sequence[_Subject],
    size: int,
    config: EvalsConfig,
    device: torch.device,
) -> list[Maps]:
    """Patch features of every subject at a size; larger pictures go one by one."""
    side = phase.candidate.side(size)
    found = []
    for is_scene in (False, True):
        images = [one.image for one in subjects if (one.scene is not None) == is_scene]
        if not images:
            continue
        view = scene_view if is_scene else preparation
        prepare = view(phase.candidate, config).enlarged(side)
        features = extract(phase.candidate.backbone, images, prepare, 1, device, patches=True)
        assert features.patches is not None
        grid = round(features.patches.shape[1] ** 0.5)
        found += [one.reshape(grid, grid, -1) for one in features.patches]
    return found


def _common_colours(maps: Sequence[Sequence[Sequence[Maps]]]) -> list[list[list[Colours]]]:
    """Principal components as colours: model by model, size by size, picture by picture."""
    found: list[list[list[Colours]]] = []
    first: npt.NDArray[np.float64] | None = None
    for of_model in maps:
        flat = [one.reshape(-1, one.shape[-1]) for of_size in of_model for one in of_size]
        scores = principal_scores(np.concatenate(flat))  # [M, 3]
        if first is None:
            first = scores
        elif first.shape == scores.shape:
            scores = _turned(scores, first)
        colours = iter(np.split(as_colours(scores), np.cumsum([len(one) for one in flat])[:-1]))
        found.append(
            [[next(colours).reshape(*one.shape[:2], 3) for one in of_size] for of_size in of_model]
        )
    return found


def _turned(
    scores: npt.NDArray[np.float64], like: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The rotation or reflection of `scores` that is nearest to `like` (Procrustes)."""
    left, _, right = np.linalg.svd(scores.T @ like)
    return np.asarray(scores @ left @ right)


def _similarity(maps: Maps, mark: tuple[float, float]) -> Colours:
    """Cosine with the marked patch: brightest at 1, darkest at the smallest of the map."""
    grid = len(maps)
    unit = unit_rows(maps.reshape(grid * grid, -1))
    row, column = (min(int(share * grid), grid - 1) for share in mark)
    cosines = unit @ unit[row * grid + column]
    low = float(cosines.min())
    share = (cosines - low) / max(1 - low, 1e-6)
    ends = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(share, ends, [colour[c] for colour in _RAMP]) for c in range(3)]
    return np.asarray(np.stack(channels, axis=-1).round(), dtype=np.uint8).reshape(grid, grid, 3)


def _segmented(phases: Sequence[Phase], studies: Mapping[str, Study], number: int) -> Strip:
    """The mask of a scene, and what the probe of the classes on each model's patches found."""
    judged = [dense for phase in phases if (dense := studies[phase.name].dense) is not None]
    scenes = judged[0].scenes.test
    colour_of = palette(len(scenes.classes))
    masks = [dense.found[MODEL][0].classes.predicted[number] for dense in judged]
    shown = Image.fromarray(colour_of[scenes.masks[number]])
    return Strip("segmentation", _uri(shown), _uris([colour_of[mask] for mask in masks]))


def _seen(phase: Phase, subject: _Subject, size: int, config: EvalsConfig) -> Image.Image:
    view = preparation if subject.scene is None else scene_view
    return view(phase.candidate, config).enlarged(size).picture(subject.image)


def _marked(image: Image.Image, mark: tuple[float, float]) -> Image.Image:
    marked = image.copy()
    y, x = (share * image.width for share in mark)
    radius = image.width / 24
    circle = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(marked).ellipse(circle, outline=(255, 0, 90), width=max(1, image.width // 60))
    return marked


def _uri(image: Image.Image) -> str:
    return data_uri(image, lossless=image.width <= _SHOWN)


def _uris(cells: Sequence[Colours]) -> tuple[str, ...]:
    return tuple(data_uri(Image.fromarray(cell), lossless=True) for cell in cells)
