"""Instance retrieval: find the same picture again from another view of it.

Protocol:
    Features: CLS of the last block after its norm, L2-normalised.
    Views:    two random-resized crops of every picture (area and aspect ratio drawn per picture and
              view from the seed), without colour changes. Needs no labels.
    Trained:  nothing.
    Query:    the second view; gallery: the first views of all pictures; order: by cosine.
    Metric:   top-1, and mAP, which with one right answer is the mean of 1 / rank. Equal cosines
              count against the model: the right one is ranked last among its equals.
    Cost:     two passes of the backbone over the pictures, N x N x D multiplications.
    Controls: features that name the picture score 1; random features score chance, 1 / N.
"""

# N pictures, D width

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov3.evals.metrics import Floats, unit_rows

_MIN_RATIO, _MAX_RATIO = 3 / 4, 4 / 3
_TRIES = 10
_CHUNK = 1 << 24  # similarities held at once


def random_view(
    image: Image.Image, *, scale: tuple[float, float], seed: int, index: int, view: int
) -> Image.Image:
    """A random crop of a picture: a pure function of (seed, index, view).

    Args:
        image: Any picture.
        scale: Share of the area, drawn uniformly; the aspect ratio is drawn in log space.
        seed: Of all draws.
        index: Which picture.
        view: Which view of it.
    """
    generator = np.random.default_rng([seed, index, view])
    area = image.width * image.height
    for _ in range(_TRIES):
        wanted = area * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(_MIN_RATIO), math.log(_MAX_RATIO)))
        width, height = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(0, image.width - width + 1))
            top = int(generator.integers(0, image.height - height + 1))
            return image.crop((left, top, left + width, top + height))
    return image  # too long and narrow for any such crop


def retrieval_ranks(queries: Floats, gallery: Floats) -> npt.NDArray[np.int64]:
    """Rank, from 1, of the picture's own first view in the gallery: [N].

    Args:
        queries: Features of the second views, [N, D].
        gallery: Features of the first views, [N, D], in the same order.
    """
    sought, found = unit_rows(queries), unit_rows(gallery)
    rows = max(1, _CHUNK // max(1, len(found)))
    ranks = []
    for start in range(0, len(sought), rows):
        similarities = sought[start : start + rows] @ found.T  # [n, N]
        own = similarities[np.arange(len(similarities)), start + np.arange(len(similarities))]
        ranks.append((similarities >= own[:, None]).sum(axis=1))
    return np.concatenate(ranks).astype(np.int64)
