"""Blocking checks: plain functions of the files a stage left in its folder.

A stage that refuses its own result exits with 3 and leaves its verdict behind; so from both front
doors nothing downstream is made, and here the verdict is read, not computed again.
"""

import math
from pathlib import Path
from typing import Any

from dinov3.release.record import RECORD_NAME, file_sha256, parse_json, read_record
from orchestration.runner import Judgement


def manifest_verdict(folder: Path) -> Judgement:
    """Great Expectations' verdict on the image manifest."""
    verdict = _read(folder / "verdict.json")
    if isinstance(verdict, Judgement):
        return verdict
    failed = [one for one in verdict["expectations"] if not one["passed"]]
    if verdict["passed"] and not failed:
        return Judgement(True, f"{len(verdict['expectations'])} expectations met.")
    told = [
        f"{one['name']} of {one['column']}: observed {one['observed']}, wanted {one['threshold']}"
        for one in failed
    ]
    return Judgement(False, "; ".join(told) or "refused without a failed expectation")


def curation_sane(folder: Path) -> Judgement:
    """Something is kept, and every row that is not has a reason."""
    import polars as pl

    path = folder / "curated.parquet"
    if not path.is_file():
        return _missing(path)
    rows = pl.read_parquet(path, columns=["kept", "reason"])
    kept = int(rows["kept"].sum())
    contradictory = rows.filter(pl.col("kept") == pl.col("reason").is_not_null()).height
    return Judgement(
        kept > 0 and contradictory == 0,
        f"{kept} of {rows.height} rows kept, {contradictory} rows with a reason that does not fit.",
        {"kept": kept, "rows": rows.height, "contradictory": contradictory},
    )


def training_health(folder: Path) -> Judgement:
    """The run's own health: no collapse, nothing non-finite."""
    health = _read(folder / "health.json")
    if isinstance(health, Judgement):
        return health
    metrics = health["metrics"]
    bad = sorted(name for name, value in metrics.items() if not _is_number(value))
    passed = health["passed"] is True and not bad
    reason = health["reason"] or (f"not finite: {', '.join(bad)}" if bad else "healthy")
    return Judgement(passed, str(reason), {**metrics, "thresholds": health["thresholds"]})


def report_bound(folder: Path) -> Judgement:
    """The report and its page are the ones the record names, made from the weights it names."""
    record_path = folder / RECORD_NAME
    for path in (record_path, folder / "report.json", folder / "report.html"):
        if not path.is_file():
            return _missing(path)
    record = read_record(record_path)
    changed = [
        name for name, one in record.outputs.items() if file_sha256(folder / name) != one.sha256
    ]
    if changed:
        return Judgement(False, f"bytes differ from the record: {', '.join(changed)}")
    weights = [edge for edge in record.inputs if edge.name == "backbone.safetensors"]
    model = parse_json((folder / "report.json").read_bytes())["model"]
    if [(edge.sha256, edge.record) for edge in weights] != [(model["sha256"], model["record"])]:
        return Judgement(False, "the report is of other weights than its record, got " + str(model))
    return Judgement(True, f"bound to weights {model['sha256']}")


def _read(path: Path) -> Any:
    """The JSON value, or the judgement that there is none."""
    return parse_json(path.read_bytes()) if path.is_file() else _missing(path)


def _missing(path: Path) -> Judgement:
    return Judgement(False, f"{path.name} is not there: the stage refused before it wrote it.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
