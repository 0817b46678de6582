"""Nearest neighbours by FAISS: which pictures stand close to each other on the unit sphere.

Up to `EXACT_LIMIT` rows the search is exact (flat inner product); above it an inverted file of
4 sqrt(N) lists is probed in 64 of them. Threads change no bit: FAISS itself rounds differently with
every number of them, so it gets one, and fixed blocks of rows are divided among threads of ours.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

# N rows of the base, Q queries, D width, K neighbours

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

EXACT_LIMIT = 200_000
_ONE_THREAD_WORK = 1_000_000_000  # multiplications below which starting threads does not pay
_BLOCK = 4096  # rows
_NUM_PROBES = 64


def nearest(queries: Floats, base: Floats, num_neighbours: int) -> tuple[Floats, Ints]:
    """The most similar rows of `base` for each query, best first.

    Args:
        queries: [Q, D] unit rows.
        base: [N, D] unit rows.
        num_neighbours: Clipped to N.

    Returns:
        Cosine similarities and row numbers, each [Q, K]; -1 where an approximate search found none.
    """
    count = min(num_neighbours, len(base))
    if count == 0 or len(queries) == 0:
        return np.empty((len(queries), count), np.float32), np.empty((len(queries), count), int)
    (index,) = _in_blocks(base, lambda _: _index_of(base), work=0, size=len(base))
    return search(index, queries, count)


def search(index: faiss.Index, queries: Floats, num_neighbours: int) -> tuple[Floats, Ints]:
    """What `index.search` gives, [Q, K] twice, by as many threads as pay."""
    found = _in_blocks(
        queries,
        lambda block: index.search(block, num_neighbours),
        work=queries.size * index.ntotal,
    )
    return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])


def squared_distances(queries: Floats, base: Floats) -> npt.NDArray[np.float64]:
    """Squared distances of every query to every row of the base: [Q, N]."""
    found = _in_blocks(
        base,
        lambda block: faiss.pairwise_distances(np.ascontiguousarray(queries), block),
        work=queries.size * len(base),
    )
    distances: npt.NDArray[np.float64] = np.concatenate(found, axis=1).astype(np.float64)
    return np.maximum(distances, 0)


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


def _in_blocks(
    rows: Floats, call: Callable[[Floats], Any], *, work: int, size: int = _BLOCK
) -> list[Any]:
    """Calls for each block of rows, in threads where FAISS sees one core; results in order."""
    blocks = [np.ascontiguousarray(rows[at : at + size]) for at in range(0, len(rows), size)]
    num_threads = 1 if work <= _ONE_THREAD_WORK else faiss.omp_get_max_threads()
    with ThreadPoolExecutor(
        num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(call, blocks))


def _index_of(base: Floats) -> faiss.Index:
    base = np.ascontiguousarray(base)
    width = base.shape[1]
    flat = faiss.IndexFlatIP(width)
    if len(base) <= EXACT_LIMIT:
        flat.add(base)
        return flat
    num_lists = int(4 * np.sqrt(len(base)))
    index = faiss.IndexIVFFlat(flat, width, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = _NUM_PROBES
    index.cp.niter, index.cp.max_points_per_centroid = 10, 64  # rough lists do for probing
    index.train(base)
    index.add(base)
    return index
