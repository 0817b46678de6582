"""Pictures for the report of a model of pictures and texts: what it retrieved and segmented."""

# S side in pixels

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dinov3.config import EvalsConfig
from dinov3.data.decode import composite
from dinov3.evals.composites import BACKGROUND, IGNORED
from dinov3.evals.metrics import unit_rows
from dinov3.evals.pictures import data_uri
from dinov3.evals.study import Gallery
from dinov3.evals.text_retrieval import nearest_answers
from dinov3.evals.text_study import RetrievalPieces, SegmentationPieces

_THUMBNAIL = 112  # pixels
_NUM_QUERIES = 8
_NUM_ANSWERS = 5
_NUM_SCENES = 6
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Answer:
    """One of the nearest texts, or of the nearest pictures."""

    text: str
    uri: str | None
    right: bool
    similarity: float


@dataclass(frozen=True)
class Query:
    """A picture or a text, and what the model finds nearest, best first."""

    text: str
    uri: str | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SceneRow:
    """A scene, its mask and the answers, as data URIs."""

    picture: str
    truth: str
    found: str


def picture_queries(pieces: RetrievalPieces, pictures: Gallery, config: EvalsConfig) -> list[Query]:
    """Held-out pictures drawn by the seed, not selected, with the texts nearest to them."""
    corpus = pieces.corpus
    drawn = _drawn(len(corpus.pictures), config.seed)
    own = _answers_of(corpus.pairs, drawn)
    rows = _nearest(pieces.pictures[drawn], pieces.texts)
    uris = _thumbnails(pictures, pieces.places[drawn], config)
    return [
        Query(
            " / ".join(corpus.texts[text] for text in sorted(right)),
            uri,
            tuple(Answer(corpus.texts[text], None, text in right, cosine) for text, cosine in row),
        )
        for right, row, uri in zip(own, rows, uris, strict=True)
    ]


def text_queries(pieces: RetrievalPieces, pictures: Gallery, config: EvalsConfig) -> list[Query]:
    """Captions drawn by the seed, not selected, with the pictures nearest to them."""
    corpus = pieces.corpus
    drawn = _drawn(len(corpus.texts), config.seed + 1)
    own = _answers_of(corpus.reversed_pairs, drawn)
    rows = _nearest(pieces.texts[drawn], pieces.pictures)
    caption_of = {int(picture): corpus.texts[text] for picture, text in corpus.pairs}
    queries = []
    for text, right, row in zip(drawn, own, rows, strict=True):
        places = [int(pieces.places[picture]) for picture, _ in row]
        answers = tuple(
            Answer(caption_of[picture], uri, picture in right, cosine)
            for (picture, cosine), uri in zip(
                row, _thumbnails(pictures, places, config), strict=True
            )
        )
        queries.append(Query(corpus.texts[text], None, answers))
    return queries


def scene_rows(pieces: SegmentationPieces) -> list[SceneRow]:
    """The first scenes: as they are, as they should be named, as they were named."""
    colours = class_colours(len(pieces.scenes.classes))
    shown = min(_NUM_SCENES, len(pieces.scenes))
    return [
        SceneRow(
            data_uri(Image.fromarray(pieces.scenes.pictures[scene])),
            data_uri(_painted(pieces.scenes.masks[scene], colours), lossless=True),
            data_uri(_painted(pieces.found.classes[scene], colours), lossless=True),
        )
        for scene in range(shown)
    ]


def class_colours(num_classes: int) -> list[tuple[int, int, int]]:
    """Colours of the classes 1 … C, evenly around the circle of hues."""
    hues = [index / max(1, num_classes) for index in range(num_classes)]
    triples = [colorsys.hsv_to_rgb(hue, 0.75, 0.6 + 0.35 * (i % 2)) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in triples]


def _painted(mask: npt.NDArray[np.uint8], colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """A mask in colours: the background white, ignored pixels grey, [S, S, 3]."""
    table = np.full((256, 3), _GREY, dtype=np.uint8)
    table[BACKGROUND], table[IGNORED] = (255, 255, 255), _GREY
    table[1 : len(colours) + 1] = colours
    return Image.fromarray(table[mask])


def _nearest(
    queries: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]
) -> list[list[tuple[int, float]]]:
    """Places and cosines of the nearest of the gallery for each query."""
    found = nearest_answers(queries, gallery, _NUM_ANSWERS)
    cosines = np.take_along_axis(unit_rows(queries) @ unit_rows(gallery).T, found, axis=1)
    return [
        list(zip(places, values, strict=True))
        for places, values in zip(found.tolist(), cosines.tolist(), strict=True)
    ]


def _answers_of(pairs: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> list[set[int]]:
    return [set(pairs[pairs[:, 0] == query, 1].tolist()) for query in queries]


def _drawn(num: int, seed: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng(seed).permutation(num)[:_NUM_QUERIES]
    return np.sort(order).astype(np.int64)


def _thumbnails(
    pictures: Gallery, places: Sequence[int] | npt.NDArray[np.int64], config: EvalsConfig
) -> Iterator[str]:
    for image in pictures.load(int(place) for place in places):
        opaque, size = composite(image, config.background), (_THUMBNAIL, _THUMBNAIL)
        yield data_uri(
            ImageOps.pad(opaque, size, Image.Resampling.BICUBIC, color=config.background)
        )
