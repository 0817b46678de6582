"""Pictures of the report: nearest neighbours; patch features as colours (paper, PCA figures)."""

# B pictures, P patches (G x G), D width, Q queries

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from dinov3.config import EvalsConfig
from dinov3.data.decode import composite
from dinov3.evals.baselines import MODEL
from dinov3.evals.candidate import Candidate
from dinov3.evals.collection import Places
from dinov3.evals.dense_pictures import legend, scene_strips
from dinov3.evals.features import extract
from dinov3.evals.knn import nearest
from dinov3.evals.study import Gallery, SceneStudy, Study, preparation

_THUMBNAIL = 112  # pixels
_SHOWN = 256  # pixels of the pictures beside their patch features
_NUM_QUERIES = 8
_NUM_NEIGHBOURS = 5
_NUM_PATCH_PICTURES = 8
_NUM_SCENES = 6
_LOSSLESS = 720  # pixels of width above which a picture of many scenes is compressed
_ENLARGED = 4  # times the evaluation's resolution
_MAX_SIDE = 768  # pixels the enlarged picture may have
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    uri: str
    name: str
    label: str | None
    right: bool | None = None  # same label as the query; None for queries and without labels
    similarity: float | None = None


@dataclass(frozen=True)
class NeighbourRow:
    """A query and what the model finds most similar."""

    query: Shown
    neighbours: tuple[Shown, ...]


@dataclass(frozen=True)
class PatchPicture:
    """A picture and the first three principal components of its patch features as colours."""

    picture: Shown
    colours: str  # data URI, one pixel per patch


@dataclass(frozen=True)
class ScenePicture:
    """Scenes below each other, a column for the mask and one for every subject."""

    uri: str
    columns: tuple[str, ...]
    classes: tuple[tuple[str, str], ...]  # name, colour as CSS


def neighbour_rows(
    study: Study,
    names: Sequence[str],
    labels: Sequence[str | None],
    pictures: Gallery,
    config: EvalsConfig,
) -> list[NeighbourRow]:
    """Held-out queries drawn by the seed, not selected, with their nearest training pictures.

    Without labels the other held-out pictures are the gallery.

    Args:
        study: The findings.
        names: Path of every row of the table.
        labels: Label of every row of the table.
        pictures: Images of the rows.
        config: The recipe.
    """
    labelled = study.halves.usable
    test = study.halves.test if labelled else study.test
    gallery = study.halves.train if labelled else study.test
    num = min(_NUM_NEIGHBOURS, len(gallery) - (not labelled))
    if num < 1:
        return []
    queries = drawn(test, _NUM_QUERIES, config.seed)
    cls = study.features[MODEL].cls
    within = {int(place): row for row, place in enumerate(study.places)}
    sought = cls[[within[int(place)] for place in queries]]
    offered = cls[[within[int(place)] for place in gallery]]
    similarities, found = nearest(offered, sought, num + (not labelled))
    rows = []
    for query, cosines, indices in zip(queries, similarities, found, strict=True):
        near = [
            (gallery[i], c) for i, c in zip(indices, cosines, strict=True) if gallery[i] != query
        ]
        shown = list(_thumbnails(pictures, [query, *(place for place, _ in near[:num])], config))
        neighbours = tuple(
            Shown(
                uri,
                names[place],
                labels[place],
                labels[place] == labels[query] if labelled else None,
                float(cosine),
            )
            for uri, (place, cosine) in zip(shown[1:], near, strict=False)
        )
        rows.append(NeighbourRow(Shown(shown[0], names[query], labels[query]), neighbours))
    return rows


def patch_pictures(
    candidate: Candidate,
    study: Study,
    names: Sequence[str],
    labels: Sequence[str | None],
    pictures: Gallery,
    config: EvalsConfig,
    device: torch.device,
) -> list[PatchPicture]:
    """Patch features of some held-out pictures, seen larger than in training.

    The components are those of all shown pictures together, so colours compare across them.
    """
    rows = study.test if len(study.test) else study.places
    places = drawn(rows, _NUM_PATCH_PICTURES, config.seed + 1)
    times = max(1, min(_ENLARGED, _MAX_SIDE // config.crop))
    prepare = preparation(candidate, config).enlarged(candidate.side(times * config.crop))
    found = extract(candidate.backbone, pictures.load(places), prepare, 1, device, patches=True)
    assert found.patches is not None
    shown = prepare.enlarged(_SHOWN)
    return [
        PatchPicture(
            Shown(data_uri(shown.picture(image)), names[place], labels[place]),
            data_uri(Image.fromarray(colours), lossless=True),
        )
        for place, image, colours in zip(
            places, pictures.load(places), pca_colours(found.patches), strict=True
        )
    ]


def scene_picture(dense: SceneStudy) -> ScenePicture:
    """The first test scenes, their masks and what every subject made of them."""
    strips = scene_strips(dense.found, dense.scenes, _NUM_SCENES)
    uri = data_uri(Image.fromarray(strips), lossless=strips.shape[1] <= _LOSSLESS)
    return ScenePicture(uri, ("scene", "mask", *dense.found), legend(dense.scenes.test.classes))


def pca_colours(patches: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """First three principal components over all patches as RGB.

    Args:
        patches: [B, P, D], P a square number, row-major.

    Returns:
        [B, G, G, 3].
    """
    num, count, width = patches.shape
    grid = round(count**0.5)
    colours = as_colours(principal_scores(patches.reshape(-1, width)))
    return colours.reshape(num, grid, grid, 3)


def principal_scores(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The first three principal components, each of deviation 1 and of a fixed sign.

    Args:
        features: [M, D].

    Returns:
        [M, 3]; zeros where D is smaller.
    """
    centred = features.astype(np.float64)
    centred -= centred.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # [D, D], ascending eigenvalues
    directions = vectors[:, ::-1][:, :3]  # [D, 3]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    scores = centred @ directions  # [M, 3]
    found = np.zeros((len(scores), 3))
    found[:, : scores.shape[1]] = scores / np.maximum(scores.std(axis=0), 1e-12)
    return found


def as_colours(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Principal scores as red, green and blue."""
    return np.asarray((255 / (1 + np.exp(-2 * scores))).round(), dtype=np.uint8)


def data_uri(image: Image.Image, *, lossless: bool = False) -> str:
    """A picture as a data: URI; JPEG unless every pixel counts."""
    stream = io.BytesIO()
    kind = "png" if lossless else "jpeg"
    options = {} if lossless else {"quality": _JPEG_QUALITY, "subsampling": 0}
    image.save(stream, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _thumbnails(pictures: Gallery, places: Sequence[int], config: EvalsConfig) -> Iterator[str]:
    for image in pictures.load(places):
        size = (_THUMBNAIL, _THUMBNAIL)
        opaque = composite(image, config.background)
        yield data_uri(
            ImageOps.pad(opaque, size, Image.Resampling.BICUBIC, color=config.background)
        )


def drawn(places: Places, num: int, seed: int) -> Places:
    """Some rows, drawn without replacement, in ascending order."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.permutation(places)[:num])
