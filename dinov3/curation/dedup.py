"""Deduplication: exact copies, near-duplicates, near-duplicates of held-out pictures.

Procedure of DINOv2's data pipeline (arXiv 2304.07193, App. A) over a k-NN graph of embeddings. The
thresholds belong to the embedder; `dinov3.curation.calibrate` finds them. Rows come in the order
of their paths, so the one kept of several is always the one whose path sorts first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from dinov3.curation.neighbours import Floats, Ints, nearest, similar_pairs

# N images of the pool, R references (held-out images), D width

Mode = Literal["component", "direct"]


@dataclass(frozen=True)
class Duplicates:
    """For each of N images: the row it duplicates or -1, and the similarity to it (else NaN).

    `largest_component` counts the images of the largest group of connected duplicates, 1 when
    there are none: chains of pairs can join pictures that are not alike.
    """

    of: Ints
    similarity: Floats
    largest_component: int

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which images are left out."""
        return self.of >= 0


def exact_duplicates(digests: Sequence[str]) -> Duplicates:
    """Images whose decoded pixels equal those of an earlier row."""
    first: dict[str, int] = {}
    keeper = np.array([first.setdefault(key, row) for row, key in enumerate(digests)], np.int64)
    of = np.where(keeper == np.arange(len(keeper)), -1, keeper)
    sizes = np.bincount(keeper) if len(keeper) else np.zeros(1, np.int64)
    similarity = np.where(of >= 0, 1.0, np.nan).astype(np.float32)
    return Duplicates(of, similarity, max(1, int(sizes.max())))


def self_dedup(
    embeddings: Floats, *, threshold: float, num_neighbours: int, mode: Mode
) -> Duplicates:
    """Near-duplicates inside the pool; the first row of each group is kept.

    Args:
        embeddings: [N, D] unit rows.
        threshold: Cosine above which two images are linked.
        num_neighbours: Neighbours looked at per image.
        mode: `component` keeps one image per connected component (the published procedure);
            `direct` leaves out only images linked to a kept one, so that chains do not grow.
    """
    low, high, similarity = similar_pairs(embeddings, threshold, num_neighbours)
    component = _components(len(embeddings), low, high)
    if mode == "component":
        of = _first_of(component)
    else:
        of = _linked_to_kept(len(embeddings), low, high, similarity)
    of = np.where(of == np.arange(len(of)), -1, of)
    return Duplicates(of, _similarity_to(embeddings, embeddings, of), _largest(component))


def relative_dedup(
    embeddings: Floats,
    references: Floats,
    *,
    threshold: float,
    num_neighbours: int,
    mode: Mode,
) -> Duplicates:
    """Images of the pool that are too close to a reference; `of` are rows of `references`.

    Args:
        embeddings: [N, D] unit rows of the pool.
        references: [R, D] unit rows of held-out images.
        threshold: Cosine above which two images are linked.
        num_neighbours: Neighbours looked at per image.
        mode: `component` also leaves out what is linked to a reference through other images;
            `direct` only what is itself linked to one.
    """
    count = len(embeddings)
    if count == 0 or len(references) == 0:
        return Duplicates(np.full(count, -1), np.full(count, np.nan, np.float32), 1)
    similarity, index = (found[:, 0] for found in nearest(embeddings, references, 1))
    linked = similarity > threshold
    joined = np.concatenate([embeddings, references])
    low, high, _ = similar_pairs(joined, threshold, num_neighbours)
    # the graph keeps K neighbours; the nearest reference must never fall out of it
    low = np.concatenate([low, np.flatnonzero(linked)])
    high = np.concatenate([high, index[linked] + count])
    component = _components(len(joined), low, high)
    if mode == "component":
        linked = np.isin(component[:count], component[count:])
    of = np.where(linked, index, -1)
    shown = np.where(linked, similarity, np.nan).astype(np.float32)
    tainted = component[np.isin(component, component[:count])]
    return Duplicates(of, shown, _largest(tainted))


def _components(count: int, low: Ints, high: Ints) -> Ints:
    """Label of each node's connected component."""
    graph = coo_array((np.ones(len(low), np.int8), (low, high)), shape=(count, count))
    labels: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _largest(component: Ints) -> int:
    return int(np.bincount(component).max()) if len(component) else 1


def _first_of(component: Ints) -> Ints:
    """The first row of every row's component."""
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    firsts: Ints = first[inverse].astype(np.int64)
    return firsts


def _linked_to_kept(count: int, low: Ints, high: Ints, similarity: Floats) -> Ints:
    """Rows in order: left out when an earlier kept row is linked, for the most similar such."""
    of = np.arange(count)
    best = np.full(count, -np.inf)
    order = np.lexsort((low, high))  # all links of a row before any row after it
    for i, j, value in zip(low[order], high[order], similarity[order], strict=True):
        if of[i] == i and value > best[j]:
            of[j], best[j] = i, value
    return of


def _similarity_to(embeddings: Floats, others: Floats, of: Ints) -> Floats:
    shown = np.full(len(of), np.nan, np.float32)
    rows = np.flatnonzero(of >= 0)
    shown[rows] = np.einsum("ij,ij->i", embeddings[rows], others[of[rows]])
    return shown
