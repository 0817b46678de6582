"""The report for people: one self-contained HTML page out of `report.json` and some pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov3.evals.baselines import MODEL, RANDOM_INIT, RAW_PIXELS, SUBJECTS
from dinov3.evals.curves import HEIGHT, WIDTH, Curve
from dinov3.evals.dense_findings import MIOU, PRECISION
from dinov3.evals.pictures import NeighbourRow, PatchPicture, ScenePicture
from dinov3.evals.protocols import KNN, MAP, RETRIEVAL, TOP_1
from dinov3.evals.study import headline_k
from dinov3.evals.template import PAGE, STYLE
from dinov3.release.record import Edge

Row = Mapping[str, Any]

_MAIN = (TOP_1, MAP, MIOU, PRECISION)
_IN_FOREST = (TOP_1, MIOU)
_FOREST_WIDTH, _FOREST_LEFT, _FOREST_RIGHT = 720, 130, 20  # units of the drawing
_LINE, _GAP = 20, 30
_TICK_STEPS = (0.02, 0.05, 0.1, 0.2)
_MAX_TICKS = 6


@dataclass(frozen=True)
class Pieces:
    """What the page shows beside the figures."""

    neighbours: Sequence[NeighbourRow]
    patches: Sequence[PatchPicture]
    curves: Sequence[Curve]
    edges: Sequence[Edge]
    scenes: ScenePicture | None = None


def render_page(report: Mapping[str, Any], pieces: Pieces) -> bytes:
    """The page as UTF-8; everything that comes from data is escaped.

    Args:
        report: The content of `report.json`.
        pieces: Pictures, curves and inputs.
    """
    measures = _measures(report)
    main = [measure for measure in measures if measure["metric"] in _MAIN]
    columns = 1 + max((len(row.neighbours) for row in pieces.neighbours), default=0)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(PAGE).render(
        title=f"Evaluation: {report['stage']}",
        style=Markup(STYLE.replace("{columns}", str(columns))),
        report=report,
        subjects=SUBJECTS,
        headline=_headline(report),
        main=main,
        more=[measure for measure in measures if measure not in main],
        forest=_forest([measure for measure in main if _is_headline(measure, report)]),
        num_inits=report["num_random_inits"],
        has_labels=bool(report["per_class"]),
        neighbours=pieces.neighbours,
        patches=pieces.patches,
        scenes=pieces.scenes,
        curves=pieces.curves,
        size=(WIDTH, HEIGHT),
        provenance=_provenance(report, pieces.edges),
    )
    return text.encode("utf-8")


def _measures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: one per measure, its subjects and differences beside each other."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in report["rows"]:
        measure = found.setdefault(
            _key(row),
            {
                "protocol": row["protocol"],
                "metric": row["metric"],
                "k": row.get("k"),
                "cells": {},
                "differences": {},
            },
        )
        measure["cells"][row["subject"]] = row
    for row in report["differences"]:
        found[_key(row)]["differences"][row["against"]] = row
    return list(found.values())


def _key(row: Row) -> tuple[str, str, int]:
    return row["protocol"], row["metric"], row.get("k", 0)


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The k-NN of the largest k, and in words whether it beats its baselines."""
    k = headline_k(report["rows"])
    protocol, name = (KNN, f"k-NN top-1, k = {k}") if k else (RETRIEVAL, "Retrieval top-1")
    wanted = (protocol, TOP_1, k)
    tiles = [row for row in report["rows"] if _key(row) == wanted]
    if not tiles:
        return {"title": "Nothing could be judged", "tiles": [], "sentences": []}
    differences = {row["against"]: row for row in report["differences"] if _key(row) == wanted}
    sentences = [
        f"{_compare(differences[against])} {against}: {differences[against]['value']:+.3f} "
        f"({differences[against]['low']:+.3f} … {differences[against]['high']:+.3f})."
        for against in (RANDOM_INIT, RAW_PIXELS)
        if against in differences
    ]
    return {"title": name, "tiles": tiles, "sentences": [" ".join(sentences)]}


def _compare(difference: Row) -> str:
    if difference["low"] > 0:
        return "Better than"
    return "Worse than" if difference["high"] < 0 else "Not distinguishable from"


def _is_headline(measure: Row, report: Mapping[str, Any]) -> bool:
    return measure["metric"] in _IN_FOREST and measure["k"] in (None, headline_k(report["rows"]))


def _forest(measures: Sequence[Row]) -> dict[str, Any] | None:
    """Geometry of the interval plot: a dot and a line for every subject of a few measures."""
    rows = [row for measure in measures for row in measure["cells"].values()]
    if not rows:
        return None
    top = max(0.1, *(row["high"] for row in rows))
    inner = _FOREST_WIDTH - _FOREST_LEFT - _FOREST_RIGHT

    def x(value: float) -> float:
        return float(round(_FOREST_LEFT + inner * value / top, 1))

    groups, y = [], 18
    for measure in measures:
        k = f", k = {measure['k']}" if measure["k"] else ""
        marks = []
        for line, (subject, row) in enumerate(measure["cells"].items(), start=1):
            kind = "model" if subject == MODEL else "other"
            place = {"y": y + line * _LINE, "subject": subject, "kind": kind}
            marks.append(place | {name: x(row[name]) for name in ("low", "high")})
            marks[-1]["x"] = x(row["value"])
        groups.append({"name": measure["protocol"] + k, "y": y, "marks": marks})
        y += len(marks) * _LINE + _GAP
    step = next(step for step in _TICK_STEPS if top / step <= _MAX_TICKS)
    values = [step * index for index in range(int(top / step) + 1)]
    ticks = [{"x": x(value), "text": f"{value:.2f}"} for value in values]
    return {"width": _FOREST_WIDTH, "height": y + 6, "groups": groups, "ticks": ticks}


def _provenance(report: Mapping[str, Any], edges: Sequence[Edge]) -> list[dict[str, str]]:
    """Digests of what was judged, by what code, and the records it hangs on."""
    rows = [{"name": f"model {key}", "value": str(value)} for key, value in report["model"].items()]
    rows += [
        {"name": f"dataset {key}", "value": str(value)}
        for key, value in report["dataset"].items()
        if key == "sha256"
    ]
    rows += [{"name": name, "value": str(report[name])} for name in ("code", "config")]
    for edge in edges:
        origin = f"made by record {edge.record}" if edge.record else "the chain begins here"
        name = f"read {edge.role}"
        rows.append({"name": name, "value": f"{edge.name} {edge.sha256}, {origin}"})
    return rows
