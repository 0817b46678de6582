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
from dinov3.evals.features import extract
from dinov3.evals.knn import nearest
from dinov3.evals.study import Gallery, Study, preparation

_THUMBNAIL = 112  # pixels
_SHOWN = 256  # pixels of the pictures beside their patch features
_NUM_QUERIES = 8
_NUM_NEIGHBOURS = 5
_NUM_PATCH_PICTURES = 8
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
    queries = _drawn(test, _NUM_QUERIES, config.seed)
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
    places = _drawn(rows, _NUM_PATCH_PICTURES, config.seed + 1)
    side = max(config.crop, min(_ENLARGED * config.crop, _MAX_SIDE))
    side -= side % candidate.patch_size
    prepare = preparation(candidate, config).enlarged(side)
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


def pca_colours(patches: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """First three principal components over all patches as RGB.

    Args:
        patches: [B, P, D], P a square number, row-major.

    Returns:
        [B, G, G, 3].
    """
    num, count, width = patches.shape
    centred = patches.reshape(-1, width).astype(np.float64)
    centred -= centred.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # [D, D], ascending eigenvalues
    directions = vectors[:, ::-1][:, :3]  # [D, 3]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    scores = centred @ directions  # [B*P, 3]
    scores = scores / np.maximum(scores.std(axis=0), 1e-12)
    colours = np.zeros((len(scores), 3))
    colours[:, : scores.shape[1]] = 1 / (1 + np.exp(-2 * scores))
    grid = round(count**0.5)
    return (colours * 255).round().astype(np.uint8).reshape(num, grid, grid, 3)


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


def _drawn(places: Places, num: int, seed: int) -> Places:
    """Some rows, drawn without replacement, in ascending order."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.permutation(places)[:num])
