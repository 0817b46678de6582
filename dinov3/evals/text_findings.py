"""Figures of a model of pictures and texts beside those of its baselines, and their differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dinov3.evals.baselines import MAJORITY, MODEL
from dinov3.evals.metrics import (
    Floats,
    Integers,
    Interval,
    bootstrap_interval,
    mean_per_class,
    paired_difference,
)
from dinov3.evals.segmentation import Counts, interval_of, mean_ious, scene_draws

SHUFFLED = "shuffled text"
CHANCE = "chance"
TEXT_SUBJECTS = (MODEL, SHUFFLED, MAJORITY, CHANCE)

_DIGITS = 6  # of every figure; rounding of the last bits must not change the bytes


@dataclass
class Findings:
    """Rows with intervals, and what the model has over each baseline, sample by sample."""

    num_bootstrap: int
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)

    def add_samples(self, protocol: str, metric: str, values: Mapping[str, Floats]) -> None:
        """Takes one value per sample and subject; the samples pair."""
        for subject, own in values.items():
            figure = bootstrap_interval(own, self.num_bootstrap, self.seed)
            over = paired_difference(values[MODEL], own, self.num_bootstrap, self.seed)
            self._add(_row(protocol, metric, figure, len(own)), subject, over)

    def add_balanced(
        self, protocol: str, metric: str, values: Mapping[str, Floats], labels: Integers
    ) -> None:
        """Takes one value per sample and subject; every class weighs the same."""
        for subject, own in values.items():
            figure = mean_per_class(own, labels, self.num_bootstrap, self.seed)
            between = values[MODEL] - own
            over = mean_per_class(between, labels, self.num_bootstrap, self.seed)
            self._add(_row(protocol, metric, figure, len(own)), subject, over)

    def add_counts(self, protocol: str, metric: str, runs: Mapping[str, Sequence[Counts]]) -> None:
        """Takes pixel counts per scene and subject; the mIoU's scenes are drawn together."""
        draws = {
            subject: scene_draws(own, mean_ious, self.num_bootstrap, self.seed)
            for subject, own in runs.items()
        }
        for subject, own in draws.items():
            row = _row(protocol, metric, interval_of(own), len(runs[subject][0]))
            self._add(row, subject, interval_of(draws[MODEL] - own))

    def _add(self, row: dict[str, Any], subject: str, over: Interval) -> None:
        """Takes a figure, and by how much the model is above it."""
        self.rows.append(row | {"subject": subject})
        if subject != MODEL:
            names = {"subject": MODEL, "against": subject}
            self.differences.append(row | _figures(over) | names)


def rounded(value: float) -> float:
    """A figure as the report writes it."""
    return round(float(value), _DIGITS)


def _row(protocol: str, metric: str, figure: Interval, num: int) -> dict[str, Any]:
    return {"protocol": protocol, "metric": metric, **_figures(figure), "num_samples": num}


def _figures(figure: Interval) -> dict[str, float]:
    return {
        "value": rounded(figure.mean),
        "low": rounded(figure.low),
        "high": rounded(figure.high),
    }
