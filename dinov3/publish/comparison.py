"""Released figures beside those of today: what fell beyond its tolerance, what was not judged."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dinov3.config.reevaluation import ReevaluationConfig
from dinov3.errors import DataError
from dinov3.evals.baselines import MODEL
from dinov3.evals.dense import FOREGROUND, SEGMENTATION
from dinov3.evals.dense_findings import MIOU, PIXEL_ACCURACY, PRECISION
from dinov3.evals.protocols import LABELLED_PROTOCOLS, MAP, PER_CLASS, RETRIEVAL, TOP_1, TOP_5

Row = Mapping[str, Any]

# What each protocol may report, every one of them better when it is larger.
METRICS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(LABELLED_PROTOCOLS, (TOP_1, TOP_5, PER_CLASS)),
    RETRIEVAL: (TOP_1, MAP),
    SEGMENTATION: (MIOU, PIXEL_ACCURACY),
    FOREGROUND: (MIOU, PIXEL_ACCURACY, PRECISION),
}


def compare(
    released: Sequence[Row], measured: Sequence[Row], tolerances: Mapping[tuple[str, str], float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The model's figures beside the released ones, and what stands on one side only.

    Args:
        released: Rows of the release's evals.json.
        measured: Rows of today.
        tolerances: How far below its released value a metric may be; others are left out.

    Raises:
        DataError: A figure is no number, of which nobody could say that it holds.
    """
    before, now = (_of_model(rows, tolerances) for rows in (released, measured))
    metrics, uncompared = [], []
    for measure in {**before, **now}:
        protocol, metric, k = measure
        names = {"protocol": protocol, "metric": metric} | ({"k": k} if k else {})
        if measure not in before or measure not in now:
            sides = {"released": before.get(measure), "value": now.get(measure)}
            figures = {side: None if row is None else row["value"] for side, row in sides.items()}
            uncompared.append(names | figures)
            continue
        row, tolerance = now[measure], tolerances[protocol, metric]
        if not math.isfinite(row["value"]):
            msg = f"{protocol} {metric}: no number, got {row['value']}. Look into the pictures."
            raise DataError(msg)
        fall = round(before[measure]["value"] - row["value"], 6)
        metrics.append(
            names
            | {name: row[name] for name in ("value", "low", "high", "num_samples")}
            | {"released": before[measure]["value"], "fall": fall, "tolerance": tolerance}
            | {"regressed": fall > tolerance}
        )
    return metrics, uncompared


def describe(row: Row) -> str:
    """One compared metric in words."""
    k = f", k = {row['k']}" if "k" in row else ""
    moved = f"{row['value']:.4f} now, {row['released']:.4f} released"
    return f"{row['protocol']} {row['metric']}{k}: {moved}, may fall by {row['tolerance']:g}"


def require_known(config: ReevaluationConfig) -> None:
    """Refuses a protocol or a metric that no evaluation has: it would never be judged.

    Raises:
        DataError: There is one.
    """
    for protocol, metrics in config.protocols.items():
        if protocol not in METRICS:
            msg = f"protocols: unknown, got {protocol!r}. Use one of {', '.join(METRICS)}."
            raise DataError(msg)
        for metric in metrics or {}:
            if metric not in METRICS[protocol]:
                known = ", ".join(METRICS[protocol])
                msg = f"{protocol}: unknown metric, got {metric!r}. Use one of {known}."
                raise DataError(msg)


def require_judged(
    metrics: Sequence[Row], uncompared: Sequence[Row], missing: Sequence[Mapping[str, str]]
) -> None:
    """A released figure that cannot be judged again must not look like one that holds.

    Args:
        metrics: What was compared.
        uncompared: What stands on one side only.
        missing: Why protocols could not be run.

    Raises:
        DataError: There is such a figure, or nothing was compared at all.
    """
    lost = [row for row in uncompared if row["value"] is None]
    if lost:
        why = {one["protocol"]: one["reason"] for one in missing}
        protocol, metric = lost[0]["protocol"], lost[0]["metric"]
        msg = (
            f"benchmark: {protocol} {metric} was released and cannot be judged on these pictures, "
            f"got {why.get(protocol, 'no such figure')}. Choose others, or leave it out of the "
            "recipe."
        )
        raise DataError(msg)
    if not metrics:
        msg = "protocols: none of these was released, got nothing to compare with. Name others."
        raise DataError(msg)


def _of_model(
    rows: Sequence[Row], tolerances: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str, int], Row]:
    return {
        (row["protocol"], row["metric"], row.get("k", 0)): row
        for row in rows
        if row["subject"] == MODEL and (row["protocol"], row["metric"]) in tolerances
    }
