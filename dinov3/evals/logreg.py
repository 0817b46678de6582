"""Logistic regression on frozen features (SPEC 5.2).

Protocol:
    Features: CLS of the last block after its norm, as it is (not normalised), in float64.
    Trained:  multinomial logistic regression with an L2 penalty, L-BFGS.
    Chosen:   C out of a logarithmic grid, by top-1, then by loss, on a validation part: 10 % of
              each class of the training pictures, at least one, drawn by the seed.
    Then:     fitted again on all training pictures with that C. The test pictures are seen once.
    Metric:   top-1 and, from six classes on, top-5 accuracy over the test pictures.
    Cost:     one fit per C; slow when a large C does not converge within max_iter.
    Controls: one-hot features score 1; random features or shuffled labels score chance.
"""

# N training pictures, Q queries, D width, C classes

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dinov3.errors import DataError
from dinov3.evals.metrics import Floats, Integers


@dataclass(frozen=True)
class LogregGrid:
    """The strengths of the penalty to choose from, and when a fit is done.

    Attributes:
        log10_c: Ends of the grid of C, as powers of ten.
        num_c: Points of the grid.
        max_iter: L-BFGS steps of one fit, at most.
        tolerance: Largest gradient component at which a fit is done (the reference: 1e-12).
        val_fraction: Share of each class for the choice.
    """

    log10_c: tuple[float, float]
    num_c: int
    max_iter: int
    tolerance: float
    val_fraction: float


@dataclass(frozen=True)
class LogregResult:
    """Scores of the test pictures and how they came about."""

    scores: npt.NDArray[np.float64]  # [Q, C], probabilities; zero for a class never trained on
    chosen_c: float
    val_accuracy: float
    converged: bool


def validation_part(labels: Integers, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Marks a part of each class for validation: at least one picture, never the only one.

    Args:
        labels: [N].
        fraction: Share of each class.
        seed: Of the draw.
    """
    marked = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(seed)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        wanted = max(1, round(fraction * len(members)))
        marked[members[: min(wanted, len(members) - 1)]] = True
    return marked


def logreg_scores(
    train: Floats,
    train_labels: Integers,
    queries: Floats,
    *,
    num_classes: int,
    grid: LogregGrid,
    seed: int,
) -> LogregResult:
    """Chooses C on a part of the training pictures, fits on all of them, scores the queries.

    Args:
        train: [N, D].
        train_labels: [N], in 0 … C-1.
        queries: [Q, D].
        num_classes: C.
        grid: What to choose from.
        seed: Of the validation draw.

    Raises:
        DataError: Fewer than two classes, or no class with two pictures.
    """
    features = np.asarray(train, dtype=np.float64)
    held = validation_part(train_labels, grid.val_fraction, seed)
    if len(np.unique(train_labels)) < 2 or not held.any():
        msg = (
            f"logistic regression: needs two classes and a class of two pictures, got "
            f"{len(features)} pictures of {len(np.unique(train_labels))} classes. Add pictures."
        )
        raise DataError(msg)
    fit = partial(_fit, max_iter=grid.max_iter, tolerance=grid.tolerance)
    best_c, best = 0.0, (-1.0, -np.inf)  # C, (accuracy, minus the loss)
    for c in np.logspace(*grid.log10_c, grid.num_c):
        model, _ = fit(features[~held], train_labels[~held], float(c))
        merit = _merit(model, features[held], train_labels[held])
        if merit > best:
            best_c, best = float(c), merit
    model, converged = fit(features, train_labels, best_c)
    scores = np.zeros((len(queries), num_classes))
    scores[:, model.classes_] = model.predict_proba(np.asarray(queries, dtype=np.float64))
    return LogregResult(scores, best_c, best[0], converged)


def _merit(
    model: LogisticRegression, features: npt.NDArray[np.float64], labels: Integers
) -> tuple[float, float]:
    """Accuracy, then minus the loss: few validation pictures often give equal accuracies."""
    probabilities = model.predict_proba(features)  # [N, C]
    columns = np.searchsorted(model.classes_, labels)  # every class has a picture in the fit
    of_right = probabilities[np.arange(len(labels)), columns]
    loss = -np.log(np.maximum(of_right, np.finfo(np.float64).tiny)).mean()
    accuracy = np.mean(model.classes_[probabilities.argmax(axis=1)] == labels)
    return float(accuracy), -float(loss)


def _fit(
    features: npt.NDArray[np.float64],
    labels: Integers,
    c: float,
    *,
    max_iter: int,
    tolerance: float,
) -> tuple[LogisticRegression, bool]:
    """A fitted model, and whether it converged: a large C on separable data need not."""
    model = LogisticRegression(C=c, max_iter=max_iter, tol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so instead
        model.fit(features, labels)
    return model, bool(model.n_iter_.max() < max_iter)
