"""All protocols over all subjects: from features to rows with intervals, baselines included.

A measure is (protocol, metric, k); each of its subjects gives one value per test picture. Figures
of the random initialisations are averaged; differences from them vary with which one it is.
"""

# N pictures, Q test pictures, C classes

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov3.config import EvalsConfig
from dinov3.evals.baselines import (
    MAJORITY,
    MODEL,
    RANDOM_INIT,
    RAW_PIXELS,
    SUBJECTS,
    constant_ranks,
    majority_scores,
)
from dinov3.evals.collection import Halves
from dinov3.evals.features import Features
from dinov3.evals.knn import knn_scores, leave_one_out_knn
from dinov3.evals.linear import LinearGrid, linear_scores
from dinov3.evals.logreg import LogregGrid, logreg_scores
from dinov3.evals.metrics import (
    Floats,
    Integers,
    Interval,
    bootstrap_interval,
    difference_from_copies,
    mean_per_class,
    top_hits,
)
from dinov3.evals.retrieval import retrieval_ranks

KNN = "k-NN"
LEAVE_ONE_OUT = "k-NN, leave one out"
LOGREG = "logistic regression"
LINEAR = "linear probe"
RETRIEVAL = "instance retrieval"
LABELLED_PROTOCOLS = (KNN, LEAVE_ONE_OUT, LOGREG, LINEAR)

TOP_1 = "top-1"
TOP_5 = "top-5"
PER_CLASS = "mean per class"
MAP = "mAP"

_CLASSES_FOR_TOP_5 = 6  # with five classes or fewer it is always 1


@dataclass(frozen=True, order=True)
class Measure:
    """One column of figures."""

    protocol: str
    metric: str
    k: int = 0  # neighbours; 0 where there are none


@dataclass
class Results:
    """Values per test picture: measure -> subject -> one array per seed."""

    values: dict[Measure, dict[str, list[npt.NDArray[np.float64]]]] = field(default_factory=dict)
    labels: dict[Measure, npt.NDArray[np.int64]] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)

    def add(self, measure: Measure, subject: str, per_sample: Floats) -> None:
        """Appends the values of one subject (or of one more random initialisation)."""
        kept = np.asarray(per_sample, dtype=np.float64)
        self.values.setdefault(measure, {}).setdefault(subject, []).append(kept)

    def add_scores(
        self, protocol: str, k: int, subject: str, scores: Floats, labels: Integers
    ) -> None:
        """Adds the accuracies that class scores [Q, C] give."""
        first = Measure(protocol, TOP_1, k)
        self.labels[first] = np.asarray(labels, dtype=np.int64)
        self.add(first, subject, top_hits(scores, labels))
        if scores.shape[1] >= _CLASSES_FOR_TOP_5:
            self.add(Measure(protocol, TOP_5, k), subject, top_hits(scores, labels, 5))


def judge_labelled(
    features: Mapping[str, Features],
    halves: Halves,
    config: EvalsConfig,
    results: Results,
    protocols: Collection[str] = LABELLED_PROTOCOLS,
) -> None:
    """Runs protocols that need labels, for every subject.

    Args:
        features: Subject (with its seed) -> features of all rows of the table.
        halves: The labelled halves.
        config: The recipe.
        results: Grows.
        protocols: Which of `LABELLED_PROTOCOLS`.
    """
    for name, all_features in features.items():
        train, test = all_features[halves.train], all_features[halves.test]
        subject = subject_of(name)
        for protocol, k, scores in _split_scores(
            name, train, test, halves, config, results, protocols
        ):
            results.add_scores(protocol, k, subject, scores, halves.test_labels)
    for measure in list(results.values):
        if measure.protocol in LABELLED_PROTOCOLS and measure.metric == TOP_1:
            guess = majority_scores(halves.train_labels, len(halves.test), halves.num_classes)
            results.add_scores(measure.protocol, measure.k, MAJORITY, guess, halves.test_labels)
    if LEAVE_ONE_OUT in protocols:
        _judge_leave_one_out(features, halves, config, results)


def judge_retrieval(
    first: Mapping[str, Features], second: Mapping[str, Features], results: Results
) -> None:
    """Instance retrieval for every subject.

    Args:
        first: Subject (with its seed) -> features of the first views, the gallery.
        second: Likewise of the second views, the queries.
        results: Grows.
    """
    num = 0
    for name, queries in second.items():
        ranks = retrieval_ranks(queries.cls, first[name].cls)
        num = len(ranks)
        _add_ranks(results, subject_of(name), ranks)
    _add_ranks(results, MAJORITY, constant_ranks(num))


def subject_of(name: str) -> str:
    """The subject a name belongs to: all random initialisations are one."""
    return RANDOM_INIT if name.startswith(RANDOM_INIT) else name


def rows_of(results: Results, config: EvalsConfig) -> list[dict[str, Any]]:
    """One row per measure and subject, with its interval."""
    return [
        row
        for measure, subjects in results.values.items()
        for subject in SUBJECTS
        if subject in subjects
        for row in _rows(measure, subject, subjects[subject], results, config)
    ]


def differences_of(
    results: Results, config: EvalsConfig, others: Sequence[str] = (RANDOM_INIT, RAW_PIXELS)
) -> list[dict[str, Any]]:
    """The model minus its untrained copies, minus raw pixels or others, picture by picture."""
    rows = []
    for measure, subjects in results.values.items():
        for other in others:
            if MODEL in subjects and other in subjects:
                ours = np.mean(subjects[MODEL], axis=0)
                interval = difference_from_copies(
                    ours, subjects[other], config.num_bootstrap, config.seed
                )
                names = {"subject": MODEL, "against": other}
                rows.append(_row(measure, interval, len(ours)) | names)
    return rows


def _split_scores(
    name: str,
    train: Features,
    test: Features,
    halves: Halves,
    config: EvalsConfig,
    results: Results,
    protocols: Collection[str],
) -> Iterator[tuple[str, int, Floats]]:
    """Scores of the test half by every protocol with a split: (protocol, k, [Q, C])."""
    labels, num_classes = halves.train_labels, halves.num_classes
    if KNN in protocols:
        votes = knn_scores(
            train.cls, labels, test.cls, num_classes=num_classes, **config.knn.model_dump()
        )
        for k, scores in votes.items():
            yield KNN, k, scores
    if np.bincount(labels, minlength=num_classes).max() < 2:
        return  # nothing to choose a probe on
    if LOGREG in protocols:
        logistic = logreg_scores(
            train.cls,
            labels,
            test.cls,
            num_classes=num_classes,
            grid=LogregGrid(**config.logreg.model_dump()),
            seed=config.seed,
        )
        chosen = {"c": logistic.chosen_c, "converged": logistic.converged}
        results.choices.append(_choice(LOGREG, name, logistic.val_accuracy, chosen))
        yield LOGREG, 0, logistic.scores
    if LINEAR in protocols:
        probe = linear_scores(
            train.cls_and_patches,
            labels,
            test.cls_and_patches,
            num_classes=num_classes,
            grid=LinearGrid(**config.linear.model_dump()),
            seed=config.seed,
        )
        chosen = {"learning_rate": probe.chosen_lr}
        results.choices.append(_choice(LINEAR, name, probe.val_accuracy, chosen))
        yield LINEAR, 0, probe.scores


def _choice(
    protocol: str, name: str, val_accuracy: float, chosen: dict[str, Any]
) -> dict[str, Any]:
    return {"protocol": protocol, "subject": name, "val_accuracy": val_accuracy, **chosen}


def _judge_leave_one_out(
    features: Mapping[str, Features], halves: Halves, config: EvalsConfig, results: Results
) -> None:
    places = np.concatenate([halves.train, halves.test])
    labels = np.concatenate([halves.train_labels, halves.test_labels])
    num_classes = halves.num_classes
    ks: list[int] = []
    for name, all_features in features.items():
        votes = leave_one_out_knn(
            all_features.cls[places], labels, num_classes=num_classes, **config.knn.model_dump()
        )
        ks = list(votes)
        for k, scores in votes.items():
            results.add_scores(LEAVE_ONE_OUT, k, subject_of(name), scores, labels)
    for k in ks:
        guess = majority_scores(labels, len(labels), num_classes)
        results.add_scores(LEAVE_ONE_OUT, k, MAJORITY, guess, labels)


def _add_ranks(results: Results, subject: str, ranks: Integers) -> None:
    results.add(Measure(RETRIEVAL, TOP_1), subject, ranks == 1)
    results.add(Measure(RETRIEVAL, MAP), subject, 1 / ranks)


def _rows(
    measure: Measure,
    subject: str,
    arrays: list[npt.NDArray[np.float64]],
    results: Results,
    config: EvalsConfig,
) -> Iterator[dict[str, Any]]:
    per_sample = np.mean(arrays, axis=0)
    interval = bootstrap_interval(per_sample, config.num_bootstrap, config.seed)
    yield _with_seeds(measure, subject, interval, arrays, np.mean)
    labels = results.labels.get(measure)
    if labels is not None:
        interval = mean_per_class(per_sample, labels, config.num_bootstrap, config.seed)
        balanced = Measure(measure.protocol, PER_CLASS, measure.k)
        yield _with_seeds(balanced, subject, interval, arrays, lambda row: _balanced(row, labels))


def _with_seeds(
    measure: Measure,
    subject: str,
    interval: Interval,
    arrays: list[npt.NDArray[np.float64]],
    summary: Callable[[npt.NDArray[np.float64]], Any],
) -> dict[str, Any]:
    row = _row(measure, interval, len(arrays[0])) | {"subject": subject}
    if subject == RANDOM_INIT:
        row["per_seed"] = [float(summary(values)) for values in arrays]
    return row


def _balanced(per_sample: npt.NDArray[np.float64], labels: Integers) -> float:
    return float(np.mean([per_sample[labels == label].mean() for label in np.unique(labels)]))


def _row(measure: Measure, interval: Interval, num_samples: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "protocol": measure.protocol,
        "metric": measure.metric,
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "num_samples": num_samples,
    }
    return row | ({"k": measure.k} if measure.k else {})
