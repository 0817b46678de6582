"""Figures and their uncertainty: accuracy, bootstrap intervals, paired differences, health.

Every interval is the percentile bootstrap over samples at 95 %; every draw has a stated seed.
"""

# N samples, Q queries, C classes, D width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov3.errors import DataError

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]

_LOW, _HIGH = 2.5, 97.5
_CHUNK = 4_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval around it."""

    mean: float
    low: float
    high: float


def top_hits(scores: Floats, labels: Integers, top: int = 1) -> npt.NDArray[np.float64]:
    """Whether the right class is among the `top` best scores, 1 or 0 per sample.

    A class without a positive score counts as not proposed. Equal scores are ordered by class.

    Args:
        scores: [Q, C], zero where a class has no support.
        labels: [Q].
        top: How many classes may be named.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]  # [Q, top]
    supported = np.take_along_axis(scores, order, axis=1) > 0
    hits = ((order == labels[:, None]) & supported).any(axis=1)
    return np.asarray(hits, dtype=np.float64)


def bootstrap_interval(per_sample: Floats, num: int, seed: int) -> Interval:
    """Mean of per-sample values with its percentile interval.

    Raises:
        DataError: There is no sample.
    """
    values = _checked(per_sample)
    means = np.concatenate([values[draw].mean(axis=1) for draw in _draws(len(values), num, seed)])
    return _interval(float(values.mean()), means)


def paired_difference(first: Floats, second: Floats, num: int, seed: int) -> Interval:
    """Mean of `first - second` over the same samples, resampled together.

    Raises:
        DataError: There is no sample, or the two do not pair.
    """
    if len(first) != len(second):
        msg = f"paired difference: sizes differ, got {len(first)} and {len(second)}. Pair them."
        raise DataError(msg)
    return bootstrap_interval(np.asarray(first) - np.asarray(second), num, seed)


def difference_from_copies(ours: Floats, copies: Sequence[Floats], num: int, seed: int) -> Interval:
    """Mean of `ours - copy` over the same samples, where copies differ by their seed alone.

    The interval also holds how far another copy could lie, see `copy_deviations`: over samples
    alone one untrained network would count as better than others that are no different. It is kept
    within what a difference can be, see `possible_differences`.

    Args:
        ours: [N], shares or hits, in [0, 1].
        copies: Each [N], likewise; of one the result is `paired_difference`.
        num: Draws.
        seed: Of the draws.

    Raises:
        DataError: There is no sample, or the sizes do not pair.
    """
    if any(len(copy) != len(ours) for copy in copies):
        sizes = [len(ours), *(len(copy) for copy in copies)]
        msg = f"difference: sizes differ, got {sizes}. Pair them."
        raise DataError(msg)
    between = _checked(np.asarray(ours) - np.mean(copies, axis=0))
    means = [between[draw].mean(axis=1) for draw in _draws(len(between), num, seed)]
    noise = copy_deviations([float(np.mean(copy)) for copy in copies], num, seed)
    drawn = possible_differences(np.concatenate(means) + noise)
    return _interval(float(between.mean()), drawn)


def possible_differences(drawn: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Drawn differences of two figures in [0, 1], kept within [-1, 1].

    Student's t has no bounds: of two copies its 95 % reach 12.7 deviations, beyond what any figure
    can be. The difference itself never lies there, so an interval that is cut to [-1, 1] covers it
    exactly as often as the uncut one. Means of figures need no cutting: they stay within [0, 1].
    """
    return np.clip(drawn, -1.0, 1.0)


def copy_deviations(figures: Sequence[float], num: int, seed: int) -> npt.NDArray[np.float64]:
    """Drawn distances of one more copy's figure from the mean of the figures of these, [num].

    Student's t as for the prediction of one more normal value; zeros where there is one copy.
    """
    size = len(figures)
    if size < 2:
        return np.zeros(num)
    spread = float(np.std(figures, ddof=1)) * (1 + 1 / size) ** 0.5
    return np.asarray(spread * np.random.default_rng([seed, size]).standard_t(size - 1, num))


def mean_per_class(per_sample: Floats, labels: Integers, num: int, seed: int) -> Interval:
    """Mean over classes of the class means; samples are resampled within their class.

    Raises:
        DataError: There is no sample.
    """
    values = _checked(per_sample)
    groups = [values[labels == label] for label in np.unique(labels)]
    total = np.zeros(num)
    for index, group in enumerate(groups):
        draws = _draws(len(group), num, seed * 1_000_003 + index)
        total += np.concatenate([group[draw].mean(axis=1) for draw in draws])
    return _interval(float(np.mean([group.mean() for group in groups])), total / len(groups))


def participation_ratio(features: Floats) -> float:
    """Effective rank: (sum of s^2)^2 / sum of s^4 over the singular values of centred features.

    Args:
        features: [N, D].
    """
    values = np.asarray(features, dtype=np.float64)
    squares = _singular_values(values - values.mean(axis=0)) ** 2
    total = float(squares.sum())
    return total**2 / float((squares**2).sum()) if total > 0 else 0.0


def rankme(features: Floats) -> float:
    """Effective rank: exp of the entropy of the singular values (RankMe, arXiv 2210.02885).

    The features are not centred, as RankMe defines it.

    Args:
        features: [N, D].
    """
    values = _singular_values(np.asarray(features, dtype=np.float64))
    if values.sum() <= 0:
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(features: Floats) -> float:
    """Mean cosine between different samples: 1 when every picture looks the same to the model."""
    unit = unit_rows(features)
    num = len(unit)
    if num < 2:
        return 1.0
    total = np.square(unit.sum(axis=0, dtype=np.float64)).sum()  # sum over all pairs, self included
    own = np.square(unit, dtype=np.float64).sum()
    return float((total - own) / (num * (num - 1)))


def unit_rows(features: Floats) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1; an all-zero row stays zero."""
    values = np.asarray(features, dtype=np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(norms, 1e-12), dtype=np.float32)


def _singular_values(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.svd(features, compute_uv=False), dtype=np.float64)


def _checked(per_sample: Floats) -> npt.NDArray[np.float64]:
    values = np.asarray(per_sample, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        msg = f"interval: needs at least one sample, got shape {values.shape}. Add pictures."
        raise DataError(msg)
    return values


def _draws(size: int, num: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Index sets drawn with replacement, [rows, size], in pieces of bounded memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // size)
    for start in range(0, num, rows):
        yield generator.integers(0, size, size=(min(rows, num - start), size))


def _interval(mean: float, means: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(means, [_LOW, _HIGH])
    return Interval(mean, float(low), float(high))
