"""k-NN classification on frozen features (SPEC 5.1; paper, k-NN tables).

Protocol:
    Features: CLS of the last block after its norm, L2-normalised; no augmentation.
    Trained:  nothing. Every training picture is kept as a neighbour.
    Votes:    the max(ks) most similar training pictures by cosine, weighted by softmax(cosine / T)
              over all retrieved ones; for each k the first k of them vote.
    Chosen:   nothing; every k of the recipe is reported. A k beyond the training set is cut to it.
    Metric:   top-1 and, from six classes on, top-5 accuracy over the test pictures.
    Leave-one-out: every picture is classified by all others (no split; small sets).
    Cost:     exact search, Q x N x D multiplications in pieces of bounded memory.
    Controls: one-hot features score 1; random features or shuffled labels score chance.
"""

# Q queries, N training pictures, D width, C classes, K retrieved neighbours

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov3.errors import DataError
from dinov3.evals.metrics import Floats, Integers, unit_rows

Scores = dict[int, npt.NDArray[np.float32]]

_CHUNK = 1 << 24  # similarities held at once


def clip_ks(ks: Sequence[int], num_train: int) -> list[int]:
    """The distinct ks in ascending order, none beyond the number of possible neighbours."""
    return sorted({min(k, num_train) for k in ks})


def knn_scores(
    train: Floats,
    train_labels: Integers,
    queries: Floats,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Scores:
    """Votes per class for each k: k -> [Q, C].

    Args:
        train: [N, D].
        train_labels: [N], in 0 … C-1.
        queries: [Q, D].
        num_classes: C.
        ks: Numbers of voting neighbours.
        temperature: Of the softmax over similarities.

    Raises:
        DataError: There is no training picture.
    """
    ks = _checked(ks, len(train))
    similarities, indices = nearest(train, queries, max(ks))
    return _vote(similarities, train_labels[indices], num_classes, ks, temperature)


def leave_one_out_knn(
    features: Floats,
    labels: Integers,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Scores:
    """Votes for every picture by all others: k -> [N, C].

    Raises:
        DataError: There are fewer than two pictures.
    """
    ks = _checked(ks, len(features) - 1)
    similarities, indices = nearest(features, features, max(ks), exclude_self=True)
    return _vote(similarities, labels[indices], num_classes, ks, temperature)


def nearest(
    train: Floats, queries: Floats, num: int, *, exclude_self: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Cosines and indices of the most similar training pictures, best first.

    Args:
        train: [N, D].
        queries: [Q, D]; with `exclude_self` the same rows as `train`.
        num: Neighbours per query, at most N.
        exclude_self: Whether row i may not find itself.

    Returns:
        Two arrays [Q, num].
    """
    gallery = torch.from_numpy(unit_rows(train)).T  # [D, N]
    sought = torch.from_numpy(unit_rows(queries))  # [Q, D]
    rows = max(1, _CHUNK // gallery.shape[1])
    found = []
    for start in range(0, len(sought), rows):
        similarities = sought[start : start + rows] @ gallery  # [q, N]
        if exclude_self:
            similarities.diagonal(start).fill_(-torch.inf)
        found.append(torch.topk(similarities, num, dim=1))
    values = torch.cat([part.values for part in found])
    indices = torch.cat([part.indices for part in found])
    return values.numpy(), indices.numpy()


def _vote(
    similarities: npt.NDArray[np.float32],
    labels: Integers,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Scores:
    weights = torch.softmax(torch.from_numpy(similarities) / temperature, dim=1)  # [Q, K]
    classes = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))  # [Q, K]
    return {k: _sum_by_class(weights[:, :k], classes[:, :k], num_classes) for k in ks}


def _sum_by_class(weights: Tensor, classes: Tensor, num_classes: int) -> npt.NDArray[np.float32]:
    votes = torch.zeros(len(weights), num_classes).scatter_add_(1, classes, weights)  # [Q, C]
    counted: npt.NDArray[np.float32] = votes.numpy()
    return counted


def _checked(ks: Sequence[int], num_train: int) -> list[int]:
    if num_train < 1:
        msg = (
            f"k-NN: needs at least one possible neighbour, got {num_train}. Add training pictures."
        )
        raise DataError(msg)
    return clip_ks(ks, num_train)
