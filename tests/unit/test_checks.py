"""What the blocking checks say of files as stages leave them."""

import hashlib
import json

import polars as pl
import pytest

from assets.checks import (
    captions_whole,
    choice_bound,
    curation_sane,
    manifest_verdict,
    report_bound,
    training_health,
)
from assets.judged import CHECKS
from dinov3.release.record import Edge, Record
from dinov3.stage import open_stage

EXPECTATION = {"name": "unique", "column": "path", "observed": 3, "threshold": 0}
HEALTH = {"passed": True, "reason": None, "metrics": {"rank": 9.0}, "thresholds": {"rank": 7}}
WEIGHTS = "a" * 64
ABOVE = Record("above", (), {}, "e" * 64, "e" * 64, "e" * 64, {})
OTHER = "c" * 64
SNAPSHOT = b"weights of step 5"
PAIR = {"path": "a.png", "sha256": WEIGHTS, "caption": "a stamp", "split": "train"}


def leave(folder, name, value):
    (folder / name).write_text(json.dumps(value))
    return folder


def report_of(folder, weights):
    """A report stage's folder whose record names WEIGHTS; returns it."""
    model = {"sha256": weights, "record": "b" * 64}
    with open_stage("eval_reports_x", folder, config={}) as stage:
        stage.add_edge(Edge("weights", "backbone.safetensors", WEIGHTS, "b" * 64), ABOVE)
        stage.path("report.json").write_text(json.dumps({"model": model}))
        stage.path("report.html").write_text("<html>")
    return folder


def comparison_of(folder, *named):
    """A report of several models whose record names WEIGHTS and OTHER; returns its folder."""
    models = [{"sha256": weights, "record": record * 64} for weights, record in named]
    with open_stage("eval_reports_phases", folder, config={}) as stage:
        for weights, record in ((WEIGHTS, "b"), (OTHER, "d")):
            edge = Edge(f"model {record}", "backbone.safetensors", weights, record * 64)
            stage.add_edge(edge, ABOVE)
        stage.path("report.json").write_text(json.dumps({"models": models}))
        stage.path("report.html").write_text("<html>")
    return folder


def choice_of(folder, *, step=5, record="b", weights=SNAPSHOT):
    """A Gram teacher that read a checkpoint's snapshots of steps 2 and 5; returns its folder."""
    with open_stage("gram_teacher", folder, config={}) as stage:
        stage.add_edge(Edge("model config", "config.json", OTHER, "b" * 64), ABOVE)
        for known in (2, 5):
            sha256 = hashlib.sha256(b"weights of step %d" % known).hexdigest()
            name = f"snapshots/step_{known:09d}.safetensors"
            stage.add_edge(Edge(f"snapshot {known}", name, sha256, record * 64), ABOVE)
        choice = {"rule": "step", "step": step, "available": [2, 5]}
        stage.path("choice.json").write_text(json.dumps(choice))
    # not a stage's output here: its bytes are no tensors
    (folder / "backbone.safetensors").write_bytes(weights)
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


@pytest.mark.parametrize(
    "check",
    [
        manifest_verdict,
        curation_sane,
        training_health,
        choice_bound,
        captions_whole,
        report_bound,
    ],
)
def test_missing_file_is_red(tmp_path, check):
    judgement = check(tmp_path)
    assert not judgement.passed
    assert "is not there" in judgement.description


@pytest.mark.parametrize(
    ("stage", "check", "name"),
    [
        ("image_manifest", "verdict", "verdict.json"),
        ("curated_dataset", "sane", "curated.parquet"),
        ("pretrained_checkpoint", "health", "health.json"),
        ("gram_teacher", "choice", "choice.json"),
        ("caption_pairs", "whole", "pairs.parquet"),
        ("release_vits", "chain", "release/checks.json"),
    ],
)
@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_damaged_file_is_a_red_verdict_and_no_crash(tmp_path, stage, check, name, content):
    (tmp_path / "release").mkdir()
    for left in (name, "record.json", "backbone.safetensors"):
        (tmp_path / left).write_text(content)
    judgement = CHECKS[stage][check](tmp_path)
    assert not judgement.passed
    assert "is not as its stage writes it" in judgement.description


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
    assert training_health(leave(tmp_path, "health.json", HEALTH)).passed is True
    collapsed = {**HEALTH, "passed": False, "reason": "rank 1.0 below 7"}
    judgement = training_health(leave(tmp_path, "health.json", collapsed))
    assert (judgement.passed, judgement.description) == (False, "rank 1.0 below 7")
    unmeasured = {**HEALTH, "metrics": {"rank": None}}
    assert not training_health(leave(tmp_path, "health.json", unmeasured)).passed


def test_health_shows_metrics_beside_the_limits_of_the_recipe(tmp_path):
    thresholds = {"min_rank": 7, "max_cosine": 0.5, "num_images": 4, "non_finite": "stop"}
    health = {**HEALTH, "metrics": {"rank": 9.0, "cosine": 0.25}, "thresholds": thresholds}
    judgement = training_health(leave(tmp_path, "health.json", health))
    assert judgement.description == "healthy; rank 9, at least 7; cosine 0.25, at most 0.5"
    assert judgement.facts == {
        "rank": 9.0,
        "cosine": 0.25,
        "threshold/min_rank": 7,
        "threshold/max_cosine": 0.5,
        "threshold/num_images": 4,
        "threshold/non_finite": "stop",
    }


def test_short_run_is_not_called_healthy_before_its_limits_hold(tmp_path):
    thresholds = {"max_cosine": 0.5, "after_step": 100}
    health = {**HEALTH, "metrics": {"cosine": 0.9}, "thresholds": thresholds, "step": 5}
    judgement = training_health(leave(tmp_path, "health.json", health))
    assert judgement.passed
    said = "step 5, limits hold from step 100 on; cosine 0.9, at most 0.5"
    assert judgement.description == said
    judgement = training_health(leave(tmp_path, "health.json", {**health, "step": 100}))
    assert judgement.description.startswith("healthy")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "the snapshot of step 5"),
        ({"step": 4}, "no snapshot of the checkpoint it read, got step 4"),
        ({"record": "e"}, "no snapshot of the checkpoint it read, got step 5"),
        ({"step": 2}, "the weights are not those of the snapshot of step 2"),
        ({"weights": b"edited"}, "the weights are not those of the snapshot of step 5"),
    ],
)
def test_chosen_teacher_is_a_snapshot_of_the_checkpoint_it_read(tmp_path, changed, said):
    judgement = choice_bound(choice_of(tmp_path / "teacher", **changed))
    assert (judgement.passed, judgement.description) == (not changed, said)


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({}, True),
        ({"caption": None}, False),
        ({"caption": " "}, False),
        ({"path": ""}, False),
        ({"sha256": None}, False),
        ({"split": "test"}, False),
    ],
)
def test_caption_pairs_have_both_sides_and_something_to_train_on(tmp_path, changed, passed):
    pair = {**PAIR, **changed}
    pl.DataFrame([pair], schema=dict.fromkeys(pair, pl.String)).write_parquet(
        tmp_path / "pairs.parquet"
    )
    assert captions_whole(tmp_path).passed is passed


@pytest.mark.parametrize(
    ("named", "passed"),
    [
        (((WEIGHTS, "b"), (OTHER, "d")), True),
        (((OTHER, "d"), (WEIGHTS, "b")), True),
        (((WEIGHTS, "b"),), False),
        (((WEIGHTS, "d"), (OTHER, "b")), False),
        (((WEIGHTS, "b"), (OTHER, "d"), ("f" * 64, "d")), False),
        ((), False),
    ],
)
def test_comparison_names_exactly_the_models_of_its_record(tmp_path, named, passed):
    assert report_bound(comparison_of(tmp_path / "phases", *named)).passed is passed


def test_report_must_name_the_weights_of_its_record(tmp_path):
    assert report_bound(report_of(tmp_path / "bound", WEIGHTS)).passed
    judgement = report_bound(report_of(tmp_path / "other", OTHER))
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
