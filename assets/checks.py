"""Blocking checks: plain functions of the files a stage left in its folder.

A stage that refuses its own result exits with 3 and leaves its verdict behind; so from both front
doors nothing downstream is made, and here the verdict is read, not computed again.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3.release.record import RECORD_NAME, file_sha256, parse_json, read_record
from orchestration.runner import Judgement

_DINOTXT = "dinotxt.safetensors"
_BACKBONE = "backbone.safetensors"


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
    """The run's own health: no collapse, nothing non-finite; shown beside the recipe's limits."""
    health = _read(folder / "health.json")
    if isinstance(health, Judgement):
        return health
    metrics = health["metrics"]
    bad = sorted(name for name, value in metrics.items() if not _is_number(value))
    passed = health["passed"] is True and not bad
    limits = health["thresholds"]
    step, start = health.get("step", 0), limits.get("after_step", 0)
    state = "healthy" if step >= start else f"step {step}, limits hold from step {start} on"
    reason = health["reason"] or (
        f"not finite: {', '.join(bad)}" if bad else "; ".join([state, *_beside(metrics, limits)])
    )
    shown = {f"threshold/{name}": limit for name, limit in limits.items()}
    return Judgement(passed, str(reason), {**metrics, **shown})


def choice_bound(folder: Path) -> Judgement:
    """The choice names a snapshot of the checkpoint it read; the weights are that snapshot's."""
    choice = _read(folder / "choice.json")
    if isinstance(choice, Judgement):
        return choice
    for path in (folder / RECORD_NAME, folder / _BACKBONE):
        if not path.is_file():
            return _missing(path)
    record = read_record(folder / RECORD_NAME)
    step = choice["step"]
    chosen = [edge for edge in record.inputs if edge.role == f"snapshot {step}"]
    checkpoint = {edge.record for edge in record.inputs if edge.role == "model config"}
    if step not in choice["available"] or {edge.record for edge in chosen} != checkpoint:
        return Judgement(False, f"no snapshot of the checkpoint it read, got step {step}")
    if [edge.sha256 for edge in chosen] != [file_sha256(folder / _BACKBONE)]:
        return Judgement(False, f"the weights are not those of the snapshot of step {step}")
    facts = {"rule": choice["rule"], "step": step, "available": choice["available"]}
    score = {"score": choice["score"]["value"]} if "score" in choice else {}
    return Judgement(True, f"the snapshot of step {step}", {**facts, **score})


def captions_whole(folder: Path) -> Judgement:
    """Every row has an image and a caption, and there are rows to train on."""
    import polars as pl

    path = folder / "pairs.parquet"
    if not path.is_file():
        return _missing(path)
    rows = pl.read_parquet(path, columns=["path", "sha256", "caption", "split"])
    texts = pl.col("path", "sha256", "caption").str.strip_chars()
    incomplete = rows.filter(pl.any_horizontal(texts.is_null() | (texts == ""))).height
    num_train = rows.filter(split="train").height
    return Judgement(
        num_train > 0 and incomplete == 0,
        f"{rows.height} pairs, {num_train} to train on, {incomplete} without image or caption.",
        {"rows": rows.height, "train": num_train, "incomplete": incomplete},
    )


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
    named = _models(parse_json((folder / "report.json").read_bytes()))
    names = {edge.name for edge in record.inputs}
    judged = _DINOTXT if _DINOTXT in names else _BACKBONE  # dino.txt is judged with its backbone
    read = {(edge.sha256, edge.record) for edge in record.inputs if edge.name == judged}
    if not named or named != read:
        strange = ", ".join(sorted(str(sha256) for sha256, _ in named ^ read)) or "none"
        return Judgement(False, f"the report is of other weights than its record, got {strange}")
    bound = sorted(str(sha256) for sha256, _ in named)
    return Judgement(True, f"bound to weights {', '.join(bound)}", {"models": len(named)})


def _models(report: Mapping[str, Any]) -> set[tuple[str | None, str | None]]:
    """Weights and record of the model, or of the models of a report that compares several."""
    models = report["models"] if "models" in report else [report["model"]]
    return {(model["sha256"], model["record"]) for model in models}


def _beside(metrics: Mapping[str, float], limits: Mapping[str, Any]) -> list[str]:
    """The metrics that have a limit, in words."""
    words = {"min": "at least", "max": "at most"}
    told = []
    for name, limit in limits.items():
        side, _, metric = name.partition("_")
        if side in words and metric in metrics:
            told.append(f"{metric} {metrics[metric]:.4g}, {words[side]} {limit:g}")
    return told


def _read(path: Path) -> Any:
    """The JSON value, or the judgement that there is none."""
    return parse_json(path.read_bytes()) if path.is_file() else _missing(path)


def _missing(path: Path) -> Judgement:
    return Judgement(False, f"{path.name} is not there: the stage refused before it wrote it.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
