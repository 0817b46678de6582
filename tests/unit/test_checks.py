"""What the blocking checks say of files as stages leave them."""

import json

import polars as pl
import pytest

from assets.checks import curation_sane, manifest_verdict, report_bound, training_health
from dinov3.release.record import Edge
from dinov3.stage import open_stage

EXPECTATION = {"name": "unique", "column": "path", "observed": 3, "threshold": 0}
HEALTH = {"passed": True, "reason": None, "metrics": {"rank": 9.0}, "thresholds": {"rank": 7}}
WEIGHTS = "a" * 64


def leave(folder, name, value):
    (folder / name).write_text(json.dumps(value))
    return folder


def report_of(folder, weights):
    """A report stage's folder whose record names WEIGHTS; returns it."""
    model = {"sha256": weights, "record": "b" * 64}
    with open_stage("eval_reports_x", folder, config={}) as stage:
        stage.add_edge(Edge("weights", "backbone.safetensors", WEIGHTS, "b" * 64), ())
        stage.path("report.json").write_text(json.dumps({"model": model}))
        stage.path("report.html").write_text("<html>")
    return folder


def test_met_expectations_pass(tmp_path):
    verdict = {"passed": True, "rows": 3, "expectations": [{**EXPECTATION, "passed": True}]}
    judgement = manifest_verdict(leave(tmp_path, "verdict.json", verdict))
    assert (judgement.passed, judgement.description) == (True, "1 expectations met.")


@pytest.mark.parametrize("passed", [True, False])
def test_failed_expectation_is_named_whatever_the_verdict_says(tmp_path, passed):
    verdict = {"passed": passed, "rows": 3, "expectations": [{**EXPECTATION, "passed": False}]}
    judgement = manifest_verdict(leave(tmp_path, "verdict.json", verdict))
    assert not judgement.passed
    assert judgement.description == "unique of path: observed 3, wanted 0"


@pytest.mark.parametrize("check", [manifest_verdict, curation_sane, training_health, report_bound])
def test_missing_file_is_red(tmp_path, check):
    judgement = check(tmp_path)
    assert not judgement.passed
    assert "is not there" in judgement.description


@pytest.mark.parametrize(
    ("kept", "reasons", "passed"),
    [
        ([True, False], [None, "exact duplicate"], True),
        ([True, False], [None, None], False),
        ([True, True], [None, "exact duplicate"], False),
        ([False, False], ["exact duplicate", "exact duplicate"], False),
    ],
)
def test_curation_keeps_something_and_says_why_not_the_rest(tmp_path, kept, reasons, passed):
    rows = pl.DataFrame({"kept": kept, "reason": pl.Series(reasons, dtype=pl.String)})
    rows.write_parquet(tmp_path / "curated.parquet")
    assert curation_sane(tmp_path).passed is passed


def test_health_is_as_the_run_left_it(tmp_path):
    assert training_health(leave(tmp_path, "health.json", HEALTH)).passed
    collapsed = {**HEALTH, "passed": False, "reason": "rank 1.0 below 7"}
    judgement = training_health(leave(tmp_path, "health.json", collapsed))
    assert (judgement.passed, judgement.description) == (False, "rank 1.0 below 7")
    unmeasured = {**HEALTH, "metrics": {"rank": None}}
    assert not training_health(leave(tmp_path, "health.json", unmeasured)).passed


def test_report_must_name_the_weights_of_its_record(tmp_path):
    assert report_bound(report_of(tmp_path / "bound", WEIGHTS)).passed
    judgement = report_bound(report_of(tmp_path / "other", "c" * 64))
    assert "of other weights than its record" in judgement.description
    assert not judgement.passed


def test_changed_report_is_red(tmp_path):
    folder = report_of(tmp_path / "report", WEIGHTS)
    (folder / "report.html").write_text("<html>better")
    judgement = report_bound(folder)
    assert (judgement.passed, judgement.description) == (
        False,
        "bytes differ from the record: report.html",
    )
