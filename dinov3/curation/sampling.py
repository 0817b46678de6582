"""Hierarchical balanced sampling (arXiv 2405.15613): every cluster offers about as much.

From the top of the tree downwards each cluster divides what it must give among its children by
water filling: small ones give all, the others the same number. Lowest-level clusters draw images.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov3.curation.kmeans import Clusters
from dinov3.curation.neighbours import Ints

Selection = Literal["random", "closest"]


def alloc(
    sizes: Sequence[int] | Ints, target: int, rng: np.random.Generator, mult: int = 1
) -> Ints:
    """Divides `target` among clusters by integer water filling.

    Args:
        sizes: Images below each cluster.
        target: What is wanted in all.
        rng: Decides which of the clusters above the water line give one more.
        mult: How often an image may be taken.

    Returns:
        How many each cluster gives; the sum is `target`, or everything when that is less.
    """
    available = np.asarray(sizes, dtype=np.int64) * mult
    if available.sum() <= target:
        return available
    low, high = 0, int(available.max())  # filling to `low` fits, filling to `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = np.minimum(available, middle).sum() <= target
        low, high = (middle, high) if fits else (low, middle)
    given = np.minimum(available, low)
    above = np.flatnonzero(available > low)
    given[rng.choice(above, int(target - given.sum()), replace=False)] += 1
    return given


def balanced_sample(
    levels: Sequence[Clusters], target: int, *, seed: int, selection: Selection = "random"
) -> Ints:
    """Rows drawn from a tree of clusters, each at most once, in ascending order.

    Args:
        levels: Of `hierarchical_kmeans`, the lowest first.
        target: How many; all rows when there are no more.
        seed: Of all draws; each cluster's own are a function of (seed, level, cluster).
        selection: In a lowest-level cluster `random` members or the `closest` to its centroid.
    """
    members = [clusters.members() for clusters in levels]
    flat = _flat_sizes(members)
    top = len(levels) - 1
    wanted = alloc(flat[top], target, np.random.default_rng([seed, len(levels), 0]))
    for level in range(top, 0, -1):
        below = np.zeros(len(flat[level - 1]), np.int64)
        for cluster in np.flatnonzero(wanted):
            children = members[level][cluster]
            rng = np.random.default_rng([seed, level, int(cluster)])
            below[children] = alloc(flat[level - 1][children], int(wanted[cluster]), rng)
        wanted = below
    drawn = [
        _draw(members[0][cluster], int(wanted[cluster]), (seed, 0, int(cluster)), selection)
        for cluster in np.flatnonzero(wanted)
    ]
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)


def _flat_sizes(members: Sequence[Sequence[Ints]]) -> list[npt.NDArray[np.int64]]:
    """Images below every cluster of every level."""
    flat = [np.array([len(ids) for ids in members[0]], np.int64)]
    for clusters in members[1:]:
        flat.append(np.array([flat[-1][ids].sum() for ids in clusters], np.int64))
    return flat


def _draw(ids: Ints, count: int, key: tuple[int, int, int], selection: Selection) -> Ints:
    if selection == "closest" or count == len(ids):
        return ids[:count]
    return np.random.default_rng(list(key)).choice(ids, count, replace=False)
