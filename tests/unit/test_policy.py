"""The gates' rules: what passes, what fails and why, and what can be waived."""

from typing import Any

import pytest

from dinov3.release.policy import (
    GATES,
    NEVER_WAIVED,
    ImageCounts,
    Policy,
    PolicyError,
    Threshold,
    contamination_of,
    held_out_faults,
    judge_chain,
    judge_clean_code,
    judge_contamination,
    judge_evaluation,
    judge_health,
    judge_licences,
    judge_manifest,
    may_be_waived,
    read_policy,
)
from dinov3.release.policy_terms import policy_text

RAW = {
    "evaluation": [{"protocol": "k-NN", "metric": "top-1", "k": 20, "at_least": 0.5}],
    "max_relative_threshold": 0.97,
    "max_self_threshold": 0.98,
    "licence": "MIT",
    "health": {"max_mean_cosine": 0.9, "min_rankme": 2.0},
    "waivable": ["evaluation", "licences"],
}
COUNTS = ImageCounts(num_trained=8, num_evaluated=4, num_overlap=0)
DEDUP = {"relative_threshold": 0.97, "self_threshold": 0.98}


def _policy(*thresholds: Threshold, **fields: Any) -> Policy:
    return Policy(**{**_FIELDS, "evaluation": thresholds, **fields})


_FIELDS: dict[str, Any] = {
    "max_relative_threshold": 0.97,
    "max_self_threshold": 0.98,
    "licence": "MIT",
}


def _row(low: float, k: int | None = 20, **fields: Any) -> dict[str, Any]:
    row = {"protocol": "k-NN", "metric": "top-1", "subject": "model", "low": low, **fields}
    return row if k is None else {**row, "k": k}


def _report(*rows: Any, differences: Any = (), contamination: str = "none") -> dict[str, Any]:
    dataset = {"contamination": contamination}
    return {"dataset": dataset, "rows": list(rows), "differences": list(differences)}


def test_policy_is_read_from_its_json() -> None:
    policy = read_policy(RAW)
    assert policy.evaluation == (Threshold("k-NN", "top-1", k=20, at_least=0.5),)
    assert policy.waivable == {"evaluation", "licences"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"more": 1}, "exactly the fields"),
        ({"evaluation": "k-NN"}, "not a list"),
        ({"evaluation": [{"protocol": "k-NN", "metric": "top-1"}]}, "asks for nothing"),
        ({"evaluation": [{"protocol": "k-NN", "at_least": 0.5}]}, "asks for nothing"),
        (
            {"evaluation": [{"protocol": "k-NN", "metric": "x", "at_least": 0.5, "against": "y"}]},
            "half of a difference",
        ),
        ({"evaluation": [{"protocol": "k-NN", "metric": "x", "at_least": "much"}]}, "wrong kind"),
        ({"evaluation": [{"protocol": "k-NN", "metric": "x", "least": 0.5}]}, "unknown field"),
        ({"max_self_threshold": "0.9"}, "not a finite number"),
        ({"max_self_threshold": True}, "not a finite number"),
        ({"licence": ""}, "not a text"),
        ({"health": {"mean_cosine": 0.9}}, "start with min_ or max_"),
        ({"health": {"max_mean_cosine": None}}, "not an object of numbers"),
        ({"waivable": ["contamination"]}, "can be waived"),
        ({"waivable": "evaluation"}, "can be waived"),
    ],
)
def test_policy_of_another_form_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        read_policy({**RAW, **change})


def _asking(**fields: Any) -> dict[str, Any]:
    return {"evaluation": [{"protocol": "k-NN", "metric": "top-1", **fields}]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"evaluation": []}, "asks nothing of the model"),
        (_asking(at_least=0.1, subject="raw pixels"), "asks nothing of the model"),
        (_asking(at_least=-0.1), "at_least: from 0 to 1"),
        (_asking(at_least=1.5), "at_least: from 0 to 1"),
        (_asking(against="x", difference_low_at_least=-9), "difference_low_at_least: from -1 to 1"),
        ({"max_relative_threshold": 1.5}, "max_relative_threshold: a cosine"),
        ({"max_self_threshold": 9999}, "max_self_threshold: a cosine"),
        ({"max_self_threshold": 0}, "max_self_threshold: a cosine"),
    ],
)
def test_policy_that_could_refuse_nothing_is_none(change: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        read_policy({**RAW, **change})


def test_thresholds_are_told_in_words() -> None:
    asked = _asking(at_least=0.25, against="random init", difference_low_at_least=-0.5)
    assert policy_text(read_policy({**RAW, **asked})) == (
        "k-NN top-1 at least 0.25; k-NN top-1 over random init at least -0.5; "
        "health max_mean_cosine 0.9; health min_rankme 2; duplicates above 0.97 of held-out "
        "pictures and 0.98 among trained ones left out"
    )


DATASET = {"rows": 14, "left_out": {"held out for evaluation": 5}}


def _judged(**counts: Any) -> dict[str, Any]:
    return {"dataset": {"num_train": 9, "num_test": 3, "num_held_out": 5, **counts}}


def test_report_judges_the_pictures_that_are_held_out() -> None:
    assert not [*held_out_faults(_judged(), 5, DATASET)]
    assert not [*held_out_faults(_judged(), 4, DATASET)]  # two files of the same bytes
    assert not [*held_out_faults({"dataset": {"num_train": 8, "num_test": 4}}, 5, DATASET)]
    assert not [*held_out_faults(_judged(num_held_out=4), 4, {"rows": 14})]


@pytest.mark.parametrize(
    ("counts", "num_evaluated", "dataset"),
    [
        ({"num_held_out": 1000}, 5, DATASET),
        ({"num_held_out": 4}, 5, DATASET),
        ({"num_held_out": None}, 5, DATASET),
        ({"num_test": 6}, 5, DATASET),
        ({"num_test": "3"}, 5, DATASET),
        ({"num_train": 10}, 5, DATASET),
        ({"num_train": True}, 5, DATASET),
        ({}, 6, DATASET),
        ({}, 4, {"rows": 14}),
        ({}, 5, {"left_out": {}}),
    ],
)
def test_report_of_other_pictures_is_found(
    counts: dict[str, Any], num_evaluated: int, dataset: dict[str, Any]
) -> None:
    assert [*held_out_faults(_judged(**counts), num_evaluated, dataset)]


def test_low_end_of_the_interval_decides() -> None:
    policy = _policy(Threshold("k-NN", "top-1", at_least=0.5))
    assert judge_evaluation(_report(_row(0.5)), policy).passed
    verdict = judge_evaluation(_report(_row(0.49)), policy)
    assert not verdict.passed
    assert verdict.reason == "k-NN top-1 k=20: interval starts at 0.49, below 0.5"


def test_without_k_every_row_must_hold() -> None:
    policy = _policy(Threshold("k-NN", "top-1", at_least=0.5))
    assert not judge_evaluation(_report(_row(0.6, 5), _row(0.4, 20)), policy).passed
    chosen = _policy(Threshold("k-NN", "top-1", k=5, at_least=0.5))
    assert judge_evaluation(_report(_row(0.6, 5), _row(0.4, 20)), chosen).passed


def test_row_that_is_not_there_fails() -> None:
    policy = _policy(Threshold("k-NN", "top-1", k=5, at_least=0.0))
    verdict = judge_evaluation(_report(_row(0.6, 20)), policy)
    assert verdict.reason == "k-NN top-1 k=5: no such row"


def test_baselines_are_not_taken_for_the_model() -> None:
    policy = _policy(Threshold("k-NN", "top-1", at_least=0.5))
    report = _report(_row(0.9, subject="random init"))
    assert not judge_evaluation(report, policy).passed


def test_difference_is_asked_of_the_named_baseline() -> None:
    asked = Threshold("k-NN", "top-1", against="random init", difference_low_at_least=0.0)
    better, worse = _row(0.1, against="random init"), _row(-0.1, against="raw pixels")
    report = _report(differences=[better, worse])
    assert judge_evaluation(report, _policy(asked)).passed
    other = Threshold("k-NN", "top-1", against="raw pixels", difference_low_at_least=0.0)
    assert not judge_evaluation(report, _policy(other)).passed


@pytest.mark.parametrize("low", [None, "0.9", float("nan"), 10**400])
def test_figure_that_is_no_number_is_an_error(low: Any) -> None:
    policy = _policy(Threshold("k-NN", "top-1", at_least=0.5))
    with pytest.raises(PolicyError, match="not a finite number"):
        judge_evaluation(_report(_row(low)), policy)


def test_report_below_outside_weights_must_say_unknown() -> None:
    claims = _report(contamination="none")
    assert not judge_evaluation(claims, _policy(), unknown_roots=["outside.pth"]).passed
    honest = _report(contamination="unknown")
    assert judge_evaluation(honest, _policy(), unknown_roots=["outside.pth"]).passed
    assert contamination_of(honest) == "unknown"


def test_report_that_found_contamination_fails() -> None:
    assert not judge_evaluation(_report(contamination="found"), _policy()).passed


def test_report_that_says_nothing_of_contamination_is_an_error() -> None:
    with pytest.raises(PolicyError, match="not a word"):
        judge_evaluation({"rows": [], "differences": []}, _policy())


def test_contamination_gate_counts_and_compares() -> None:
    verdict = judge_contamination(COUNTS, DEDUP, _policy())
    assert verdict.passed
    assert verdict.result["contamination"] == "none"
    assert verdict.result["num_trained"] == 8


def test_image_of_both_kinds_fails() -> None:
    verdict = judge_contamination(ImageCounts(8, 4, 1), DEDUP, _policy())
    assert not verdict.passed
    assert verdict.result["contamination"] == "found"


@pytest.mark.parametrize("name", ["relative_threshold", "self_threshold"])
def test_looser_deduplication_fails_and_stricter_passes(name: str) -> None:
    loose = judge_contamination(COUNTS, {**DEDUP, name: 0.99}, _policy())
    assert f"dedup.{name} is 0.99" in str(loose.reason)
    assert judge_contamination(COUNTS, {**DEDUP, name: 0.5}, _policy()).passed


def test_no_list_of_images_passes_only_below_outside_weights() -> None:
    assert not judge_contamination(None, None, _policy()).passed
    verdict = judge_contamination(None, None, _policy(), unknown_roots=["outside.pth"])
    assert verdict.passed
    assert verdict.result["contamination"] == "unknown"


def test_missing_threshold_of_deduplication_is_an_error() -> None:
    with pytest.raises(PolicyError, match="self_threshold"):
        judge_contamination(COUNTS, {"relative_threshold": 0.9}, _policy())


def test_licences_of_the_inputs_are_judged() -> None:
    assert judge_licences(["MIT"], _policy()).passed
    assert not judge_licences(["GPL-2"], _policy()).passed
    assert not judge_licences([], _policy()).passed
    assert "unknown to the table" in str(judge_licences(["mystery"], _policy()).reason)


@pytest.mark.parametrize("dirty", [True, None, "no"])
def test_code_of_no_commit_fails(dirty: Any) -> None:
    runs = {"a": {"dirty": False, "commit": "c0ffee"}, "b": {"dirty": dirty, "commit": None}}
    verdict = judge_clean_code(runs)
    assert not verdict.passed
    assert verdict.result == {"dirty": ["b"], "commits": ["c0ffee"]}


def test_health_is_asked_of_every_training() -> None:
    policy = _policy(health={"max_mean_cosine": 0.9, "min_rankme": 2.0})
    good = {"passed": True, "metrics": {"mean_cosine": 0.9, "rankme": 2.0}}
    assert judge_health({"teacher": good, "student": good}, policy).passed
    alike = {"passed": True, "metrics": {"mean_cosine": 0.95, "rankme": 2.0}}
    flat = {"passed": True, "metrics": {"mean_cosine": 0.5, "rankme": None}}
    diverged = {"passed": False, "reason": "collapsed", "metrics": good["metrics"]}
    for bad in (alike, flat, diverged, {}):
        assert not judge_health({"teacher": good, "student": bad}, policy).passed


def test_manifest_passes_by_its_expectations() -> None:
    good = {"name": "a", "passed": True}
    assert judge_manifest({"passed": True, "rows": 3, "expectations": [good]}).passed
    bad = {"name": "b", "passed": False}
    assert not judge_manifest({"passed": True, "rows": 3, "expectations": [good, bad]}).passed
    assert not judge_manifest({"passed": False, "rows": 3, "expectations": [good]}).passed
    assert judge_manifest(None).passed


def test_chain_passes_without_faults() -> None:
    assert judge_chain(6, []).passed
    assert judge_chain(6, ["b", "a"]).reason == "a; b"


def _entry(name: str, **result: Any) -> dict[str, Any]:
    return {"name": name, "passed": False, "result": result}


def test_waivers_are_limited() -> None:
    policy = read_policy({**RAW, "waivable": [name for name in GATES if name not in NEVER_WAIVED]})
    waivable = {name for name in GATES if may_be_waived(_entry(name, inputs=["MIT"]), policy)}
    assert waivable == set(GATES) - NEVER_WAIVED
    assert not may_be_waived(_entry("licences", unknown=["x"], inputs=["x"]), policy)
    assert not may_be_waived(_entry("licences", inputs=[]), policy)
    assert not may_be_waived(_entry("evaluation"), _policy())
