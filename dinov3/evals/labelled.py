"""The protocols that need labels, one after the other, each said as it begins."""

from collections.abc import Collection, Mapping

from dinov3.config import EvalsConfig
from dinov3.evals.collection import Halves
from dinov3.evals.features import Features
from dinov3.evals.progress import EvaluationProgress
from dinov3.evals.protocols import KNN, LEAVE_ONE_OUT, LINEAR, LOGREG, Results, judge_labelled

ONE_BY_ONE = (KNN, LOGREG, LINEAR, LEAVE_ONE_OUT)  # in the order of a report


def judge_one_by_one(
    features: Mapping[str, Features],
    halves: Halves,
    config: EvalsConfig,
    results: Results,
    protocols: Collection[str],
    progress: EvaluationProgress,
) -> None:
    """As `judge_labelled`; what is found stands as if all had run at once.

    Args:
        features: Subject (with its seed) -> features of all rows of the table.
        halves: The labelled halves.
        config: The recipe.
        results: Grows; holds no choices yet.
        protocols: Which of `ONE_BY_ONE`.
        progress: Told of each.
    """
    extent = f"{len(features)} models on {len(halves.train)} + {len(halves.test)} pictures"
    for protocol in (name for name in ONE_BY_ONE if name in protocols):
        progress.begin(protocol, extent)
        found = Results()
        judge_labelled(features, halves, config, found, {protocol})
        results.values |= found.values
        results.labels |= found.labels
        results.choices += found.choices
    subjects = list(features)
    results.choices.sort(key=lambda choice: subjects.index(choice["subject"]))
