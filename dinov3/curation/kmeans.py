"""Hierarchical k-means with resampling (arXiv 2405.15613): clusters spread over the support.

Plain k-means puts its centroids where the data are dense. Clustering only the members nearest to
each centroid, again and again, and then clustering the centroids themselves flattens that.
Every draw is a pure function of (seed, level, resampling step, run); FAISS assigns, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array  # type: ignore[import-untyped]

from dinov3.curation.neighbours import Floats, Ints, search, squared_distances

# N rows, K clusters, D width, T greedy candidates

_CHUNK = 65_536  # rows whose float64 copy is held at once
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """A clustering: centroids [K, D], the cluster of each row [N], its squared distance [N]."""

    centroids: Floats
    assignment: Ints
    distance: Floats

    @property
    def potential(self) -> float:
        """Sum of squared distances, what k-means lowers."""
        return float(self.distance.sum(dtype=np.float64))

    def members(self) -> list[Ints]:
        """Rows of each cluster, nearest to the centroid first (ties by row)."""
        order = np.lexsort((self.distance, self.assignment))
        ends = np.cumsum(np.bincount(self.assignment, minlength=len(self.centroids)))
        return np.split(order, ends[:-1])


def kmeans(
    rows: Floats, num_clusters: int, *, seed: Sequence[int], lloyd_steps: int, num_init: int = 1
) -> Clusters:
    """k-means with greedy k-means++ seeding and exact Lloyd steps.

    Args:
        rows: [N, D].
        num_clusters: K, at most N.
        seed: Key of every draw, e.g. (seed, level, step).
        lloyd_steps: At most; it stops earlier when nothing changes any more.
        num_init: Runs, of which the one with the lowest potential is returned.
    """
    runs = []
    for run in range(num_init):
        rng = np.random.default_rng([*seed, run])
        runs.append(_lloyd(rows, seed_centroids(rows, num_clusters, rng), lloyd_steps))
    return min(runs, key=lambda clusters: clusters.potential)


def seed_centroids(rows: Floats, num_clusters: int, rng: np.random.Generator) -> Floats:
    """Greedy k-means++: of 2 + ln K candidates drawn by squared distance, the best one.

    Returns:
        [K, D], each a row of `rows`.
    """
    num_trials = 2 + int(np.log(num_clusters))
    chosen = [int(rng.integers(len(rows)))]
    nearest = squared_distances(rows[chosen], rows)[0]
    for _ in range(1, num_clusters):
        total = nearest.sum()
        if total > 0:
            drawn = np.searchsorted(np.cumsum(nearest), rng.random(num_trials) * total)
            candidates = np.minimum(drawn, len(rows) - 1)
        else:  # fewer distinct rows than clusters
            candidates = rng.integers(len(rows), size=num_trials)
        lowered = np.minimum(squared_distances(rows[candidates], rows), nearest)  # [T, N]
        best = int(lowered.sum(1).argmin())
        chosen.append(int(candidates[best]))
        nearest = lowered[best]
    return rows[chosen]


def hierarchical_kmeans(
    rows: Floats,
    num_clusters: Sequence[int],
    num_resampled: Sequence[int],
    *,
    resampling_steps: int,
    lloyd_steps: int,
    seed: int,
) -> list[Clusters]:
    """Clusters the rows, then the centroids, and so on; the lowest level comes first.

    A level asked for more clusters than it has rows gets as many as it has rows.

    Args:
        rows: [N, D], N at least 1.
        num_clusters: K of each level, lowest first.
        num_resampled: Members per cluster that a resampled set takes; 1 turns resampling off.
        resampling_steps: Times that a level is clustered anew on its resampled set.
        lloyd_steps: Of every k-means.
        seed: Of all draws.
    """
    levels: list[Clusters] = []
    for level, (count, kept) in enumerate(zip(num_clusters, num_resampled, strict=True)):
        key = (seed, level)
        clusters = kmeans(rows, min(count, len(rows)), seed=(*key, 0), lloyd_steps=lloyd_steps)
        for step in range(1, resampling_steps + 1 if kept > 1 else 1):
            subset = rows[np.concatenate([ids[:kept] for ids in clusters.members()])]
            size = min(count, len(subset))  # empty clusters have no member to offer
            anew = kmeans(subset, size, seed=(*key, step), lloyd_steps=lloyd_steps)
            clusters = assign(rows, anew.centroids)
        levels.append(clusters)
        rows = clusters.centroids
    return levels


def assign(rows: Floats, centroids: Floats) -> Clusters:
    """The nearest centroid of every row, by exact search."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    distance, assignment = search(index, rows, 1)
    return Clusters(centroids, assignment[:, 0], np.maximum(distance[:, 0], 0))


def _lloyd(rows: Floats, centroids: Floats, steps: int) -> Clusters:
    clusters = assign(rows, centroids)
    for _ in range(steps):
        moved = assign(rows, _means(rows, clusters))
        settled = np.array_equal(moved.assignment, clusters.assignment)
        clusters = moved
        if settled:
            break
    return clusters


def _means(rows: Floats, clusters: Clusters) -> Floats:
    """Mean of each cluster, summed in float64; an empty one stays where it was."""
    count = len(clusters.centroids)
    sums: Doubles = np.zeros((count, rows.shape[1]))
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].astype(np.float64)
        which = clusters.assignment[start : start + _CHUNK]
        ones = csr_array((np.ones(len(part)), which, np.arange(len(part) + 1)), (len(part), count))
        sums += ones.T @ part
    sizes = np.bincount(clusters.assignment, minlength=count)[:, None]
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), clusters.centroids)
    return means.astype(np.float32)
