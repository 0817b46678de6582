"""Nearest neighbours by FAISS: which pictures stand close to each other on the unit sphere.

Up to `EXACT_LIMIT` rows the search is exact (flat inner product); above it an inverted file of
4 sqrt(N) lists is probed in 64 of them. FAISS takes one thread for small inputs: its OpenMP and
torch's share the cores badly, and starting threads costs more than the search.
"""

import contextlib
from collections.abc import Iterator

import faiss
import numpy as np
import numpy.typing as npt

# N rows of the base, Q queries, D width, K neighbours

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

EXACT_LIMIT = 200_000
_ONE_THREAD_WORK = 1_000_000_000  # multiplications below which one thread is enough
_NUM_PROBES = 64


@contextlib.contextmanager
def threads_for(work: int) -> Iterator[None]:
    """One FAISS thread inside the block if `work` multiplications are few, else those set."""
    before = faiss.omp_get_max_threads()
    if work <= _ONE_THREAD_WORK:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest(queries: Floats, base: Floats, num_neighbours: int) -> tuple[Floats, Ints]:
    """The most similar rows of `base` for each query, best first.

    Args:
        queries: [Q, D] unit rows.
        base: [N, D] unit rows.
        num_neighbours: Clipped to N.

    Returns:
        Cosine similarities and row numbers, each [Q, K]; -1 where an approximate search found none.
    """
    queries, base = np.ascontiguousarray(queries), np.ascontiguousarray(base)
    count = min(num_neighbours, len(base))
    if count == 0 or len(queries) == 0:
        return np.empty((len(queries), count), np.float32), np.empty((len(queries), count), int)
    with threads_for(queries.size * len(base)):
        similarity, index = _index_of(base).search(queries, count)
    return similarity, index


def similar_pairs(
    embeddings: Floats, threshold: float, num_neighbours: int
) -> tuple[Ints, Ints, Floats]:
    """Edges of the k-NN graph above a similarity, each pair once: (smaller row, larger row, cos).

    Args:
        embeddings: [N, D] unit rows.
        threshold: Only similarities above it.
        num_neighbours: K of each row, itself not counted.
    """
    similarity, index = nearest(embeddings, embeddings, num_neighbours + 1)
    rows = np.broadcast_to(np.arange(len(embeddings))[:, None], index.shape)
    found = (similarity > threshold) & (index >= 0) & (index != rows)
    low = np.minimum(rows[found], index[found])
    high = np.maximum(rows[found], index[found])
    _, first = np.unique(low * len(embeddings) + high, return_index=True)
    return low[first], high[first], similarity[found][first]


def _index_of(base: Floats) -> faiss.Index:
    width = base.shape[1]
    flat = faiss.IndexFlatIP(width)
    if len(base) <= EXACT_LIMIT:
        flat.add(base)
        return flat
    lists = int(4 * np.sqrt(len(base)))
    index = faiss.IndexIVFFlat(flat, width, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = _NUM_PROBES
    index.train(base)
    index.add(base)
    return index
