"""What each phase of training did: figures of every model, and paired differences between them.

A phase is compared with the model it began from, a student with its teacher and with untrained
copies of itself, always on the same pictures and scenes. Intervals are of these weights, not of
another training run, and not corrected for the number of comparisons.
"""

# N held-out pictures, D width

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov3.config import EvalsConfig
from dinov3.evals.baselines import MAJORITY, MODEL, RANDOM_INIT
from dinov3.evals.candidate import Candidate
from dinov3.evals.dense import FOREGROUND, SEGMENTATION
from dinov3.evals.dense_findings import MIOU, PRECISION, dense_differences
from dinov3.evals.knn import nearest
from dinov3.evals.metrics import Floats, Interval, bootstrap_interval, difference_from_copies
from dinov3.evals.protocols import (
    KNN,
    LINEAR,
    MAP,
    RETRIEVAL,
    TOP_1,
    Results,
    differences_of,
    subject_of,
)
from dinov3.evals.study import Study, headline_k

PHASES_SCHEMA = "dinov3.phases/1"
BETTER, WORSE = "better", "worse"
HEADLINES = (
    (KNN, TOP_1),
    (LINEAR, TOP_1),
    (RETRIEVAL, MAP),
    (SEGMENTATION, MIOU),
    (FOREGROUND, MIOU),
    (FOREGROUND, PRECISION),
)

_NUM_NEIGHBOURS = 10

Row = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """A model in the order of training.

    Attributes:
        name: What the report calls it.
        candidate: The model.
        previous: The model it began from or was taught by; None for the first.
        is_student: Whether it was distilled.
    """

    name: str
    candidate: Candidate
    previous: str | None
    is_student: bool


def phase_rows(phases: Sequence[Phase], studies: Mapping[str, Study]) -> list[Row]:
    """Every figure of every model, of students' untrained copies, and once the constant guess."""
    rows = []
    for number, phase in enumerate(phases):
        for row in studies[phase.name].rows:
            if row["subject"] in (MODEL, RANDOM_INIT):
                rows.append({"model": phase.name, **row})
            elif number == 0 and row["subject"] == MAJORITY:
                rows.append({"model": None, **row})
    return rows


def phase_differences(
    phases: Sequence[Phase], studies: Mapping[str, Study], config: EvalsConfig
) -> list[Row]:
    """Each model minus the one before it and, for students, minus their untrained copies."""
    rows = []
    for phase in phases:
        others = [phase.previous] if phase.previous else []
        others += [RANDOM_INIT] if phase.is_student else []
        ours = studies[phase.name]
        theirs = studies.get(phase.previous or "")
        found = differences_of(_beside(ours, theirs, phase.previous), config, others)
        found += _dense_beside(ours, theirs, phase.previous, others, config)
        for row in found:
            names = {"model": phase.name, "verdict": verdict(row)}
            rows.append({**{key: row[key] for key in row if key != "subject"}, **names})
    return rows


def verdict(row: Mapping[str, Any]) -> str | None:
    """A word only where the interval of a difference leaves zero out."""
    if row["low"] > 0:
        return BETTER
    return WORSE if row["high"] < 0 else None


def nearness(
    phases: Sequence[Phase], studies: Mapping[str, Study], config: EvalsConfig
) -> list[Row]:
    """Whether a student sees the held-out pictures more like its teacher than untrained copies do.

    Widths differ, so features cannot be compared themselves; what can is which ten pictures are
    nearest to each picture: the share of them that two models have in common. Intervals are over
    pictures, their neighbours staying as they are; that of the difference also over copies.
    """
    rows = []
    for phase in phases:
        study = studies[phase.name]
        k = min(_NUM_NEIGHBOURS, len(study.test) - 2)
        if not phase.is_student or phase.previous is None or k < 1:
            continue
        teacher = _held_out(studies[phase.previous], MODEL)
        shares: dict[str, list[Floats]] = {}
        for name in study.features:
            share = shared_neighbours(_held_out(study, name), teacher, k)
            shares.setdefault(subject_of(name), []).append(share)
        means = {subject: np.mean(every, axis=0) for subject, every in shares.items()}
        draws = config.num_bootstrap, config.seed
        between = _figures(difference_from_copies(means[MODEL], shares[RANDOM_INIT], *draws))
        rows.append(
            {
                "model": phase.name,
                "teacher": phase.previous,
                "k": k,
                "num_samples": len(teacher),
                "chance": k / (len(teacher) - 1),
                "student": _figures(bootstrap_interval(means[MODEL], *draws)),
                "random_init": {
                    **_figures(bootstrap_interval(means[RANDOM_INIT], *draws)),
                    "per_seed": [float(share.mean()) for share in shares[RANDOM_INIT]],
                },
                "difference": {**between, "verdict": verdict(between)},
            }
        )
    return rows


def shared_neighbours(first: Floats, second: Floats, k: int) -> npt.NDArray[np.float64]:
    """The share of each picture's k nearest that two models agree on, [N].

    Args:
        first: Features of the pictures, [N, D].
        second: Of another model, of any width.
        k: At most N - 1.
    """
    sets = [_neighbours(features, k) for features in (first, second)]
    shared = [len(np.intersect1d(one, other)) for one, other in zip(*sets, strict=True)]
    return np.array(shared, dtype=np.float64) / k


def headline_measures(report: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """The figures to look at first, that were judged: their name and (protocol, metric, k)."""
    k = headline_k(report["rows"])
    judged = {measure_of(row) for row in report["rows"]}
    for protocol, metric in HEADLINES:
        measure = protocol, metric, k if protocol == KNN else 0
        if measure in judged:
            suffix = f", k = {k}" if protocol == KNN else ""
            yield f"{protocol} {metric}{suffix}", measure


def measure_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """What a row is a figure of."""
    return row["protocol"], row["metric"], row.get("k", 0)


def comparisons(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(model, against) of every difference, in order."""
    return list(dict.fromkeys((row["model"], row["against"]) for row in report["differences"]))


def phases_table(report: Mapping[str, Any]) -> str:
    """Markdown: every model's headline figures, what each phase changed, students and teachers.

    Args:
        report: The content of `report.json`.
    """
    names = [model["name"] for model in report["models"]]
    rows = {(*measure_of(row), row["model"]): row for row in _of_models(report)}
    measures = list(headline_measures(report))
    figures = [
        [title, *(_figure(rows.get((*measure, name))) for name in names)]
        for title, measure in measures
    ]
    found = {(*measure_of(row), row["model"], row["against"]): row for row in report["differences"]}
    pairs = comparisons(report)
    changes = [
        [title, *(_change(found.get((*measure, *pair))) for pair in pairs)]
        for title, measure in measures
    ]
    parts = [
        _table(["", *names], figures),
        _table(["change", *(f"{name} - {against}" for name, against in pairs)], changes),
        "\n".join(_nearness_sentence(row) for row in report["nearness"]),
        "In brackets: bootstrap 95 % over pictures or scenes, of one comparison each and for these "
        "weights; against random inits also over their seeds. Bold: the interval leaves 0 out.",
    ]
    return "\n\n".join(part for part in parts if part)


def _of_models(report: Mapping[str, Any]) -> Iterator[Row]:
    return (row for row in report["rows"] if row["subject"] == MODEL)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['value']:.3f} ({row['low']:.3f} … {row['high']:.3f})"


def _change(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = f"{row['value']:+.3f} ({row['low']:+.3f} … {row['high']:+.3f})"
    return f"**{text} {row['verdict']}**" if row["verdict"] else text


def _nearness_sentence(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']} shares {_figure(row['student'])} of the {row['k']} nearest held-out "
        f"pictures with {row['teacher']}, its random inits {_figure(row['random_init'])}: "
        f"{_change(row['difference'])}."
    )


def _beside(ours: Study, theirs: Study | None, name: str | None) -> Results:
    """Values of one model with those of another under its name, where both were judged."""
    values = {}
    for measure, subjects in ours.results.values.items():
        values[measure] = dict(subjects)
        if theirs is not None and name is not None and measure in theirs.results.values:
            values[measure][name] = theirs.results.values[measure][MODEL]
    return Results(values=values)


def _dense_beside(
    ours: Study,
    theirs: Study | None,
    name: str | None,
    others: Sequence[str],
    config: EvalsConfig,
) -> list[Row]:
    if ours.dense is None:
        return []
    found = dict(ours.dense.found)
    if theirs is not None and theirs.dense is not None and name is not None:
        found[name] = theirs.dense.found[MODEL]
    return dense_differences(found, config.num_bootstrap, config.seed, others)


def _held_out(study: Study, name: str) -> npt.NDArray[np.float32]:
    """CLS features of all held-out pictures."""
    return study.features[name].cls[np.searchsorted(study.places, study.test)]


def _neighbours(features: Floats, k: int) -> npt.NDArray[np.int64]:
    """The k nearest other pictures of each, [N, k]."""
    _, found = nearest(features, features, k + 1)
    others = [row[row != place][:k] for place, row in enumerate(found)]
    return np.array(others, dtype=np.int64)


def _figures(interval: Interval) -> dict[str, Any]:
    return {"value": interval.mean, "low": interval.low, "high": interval.high}
