"""Cheats on what is claimed about the release: gates, provenance, bill, card."""

from pathlib import Path
from typing import Any

from dinov3.release.record import digest_of
from tests.audit.changes import (
    REPORT,
    Edit,
    all_of,
    in_bytes,
    in_gate,
    in_json,
    insider,
    settled,
)
from tests.audit.insider import edit_json, edit_record


def _kinder_metric(report: Any) -> None:
    for row in report["rows"]:
        if row["subject"] == "model":
            row["value"] = 0.99


def _kinder_bom(bill: Any) -> None:
    card = bill["metadata"]["component"]["modelCard"]
    card["quantitativeAnalysis"]["performanceMetrics"][0]["value"] = "0.99"


def _drop_check(name: str) -> Edit:
    def change(content: Any) -> None:
        content["gates"] = [gate for gate in content["gates"] if gate["name"] != name]

    return change


_FORGED_WAIVER = {"who": "the builder", "why": "in a hurry", "until": "2999-12-31"}
_OLD_WAIVER = {"who": "the builder", "why": "in a hurry", "until": "2020-01-01"}


def _drop_dependency(statement: Any) -> None:
    statement["predicate"]["buildDefinition"]["resolvedDependencies"].pop()


def _add_subject(statement: Any) -> None:
    statement["subject"].append({"name": "more.safetensors", "digest": {"sha256": "0" * 64}})


def _other_source(statement: Any) -> None:
    parameters = statement["predicate"]["buildDefinition"]["externalParameters"]
    parameters["source"] = [{"name": "public domain", "sha256": "0" * 64}]


def _other_date(statement: Any) -> None:
    statement["predicate"]["runDetails"]["metadata"]["startedOn"] = "1999-12-31T00:00:00Z"


def _claim_level(statement: Any) -> None:
    statement["predicate"]["buildDefinition"]["internalParameters"]["slsa_level"] = 3


def _other_parts(**fields: Any) -> Edit:
    def change(bill: Any) -> None:
        for one in bill["components"]:
            if one["type"] == "data":
                one.update(fields)

    return change


def _other_network(bill: Any) -> None:
    card = bill["metadata"]["component"]["modelCard"]
    card["modelParameters"]["modelArchitecture"] = "ViT of depth 40 and width 4096"


def _another_part(bill: Any) -> None:
    bill["components"].append({"bom-ref": "x", "name": "more", "type": "data", "hashes": []})


def _no_builder(statement: Any) -> None:
    statement["predicate"]["runDetails"]["builder"]["id"] = ""


def _policy(**fields: Any) -> Edit:
    """The policy changed, its digest with it."""

    def change(content: Any) -> None:
        content["policy"].update(fields)
        content["policy_digest"] = digest_of(content["policy"])

    return change


_ROW = {"protocol": "k-NN", "metric": "top-1", "k": 5}
_VACUOUS = {**_ROW, "at_least": -9.0}
_BEYOND = {**_ROW, "at_least": 0.9}
_HIDDEN = {
    "passed": False,
    "threshold": [{**_BEYOND, "subject": "model"}],
    "result": {"contamination": "none", "values": [{"what": "k-NN top-1 k=5", "low": 0.65}]},
    "reason": "rounding",
}
_OF_A_BASELINE = {**_ROW, "subject": "raw pixels", "at_least": 0.1}


def _more_pictures(report: Any) -> None:
    report["dataset"].update(num_test=1000, num_held_out=1000)


def _twice(report: Any) -> None:
    """A kinder figure beside the true one, of which a table has room for one."""
    row = next(one for one in report["rows"] if one["subject"] == "model" and one.get("k") == 20)
    report["rows"].append({**row, "value": 0.99, "low": 0.98, "high": 1.0})


def _of_another(report: Any) -> None:
    """What a baseline is better by, in a list that speaks of the model."""
    row = report["differences"][0]
    report["differences"].append({**row, "subject": "raw pixels", "against": "majority class"})


def _contaminated(folder: Path) -> None:
    """The report owns to it, and somebody waives the evaluation."""
    edit_json(folder, "evals.json", lambda c: c["dataset"].update(contamination="found"))
    edit_record(folder, REPORT, lambda record: record["facts"].update(contamination="found"))
    edit_json(folder, "release.json", _policy(waivable=["evaluation"]))
    failed = {"passed": False, "reason": "contamination is 'found'", "waiver": _FORGED_WAIVER}
    in_gate("evaluation", **failed)(folder)


CHEATS = [
    settled(
        "a metric changed, its record with it", in_json("evals.json", _kinder_metric), "bom-differs"
    ),
    insider(
        "a check dropped", in_json("checks.json", _drop_check("contamination")), "check-missing"
    ),
    insider(
        "checks reordered", in_json("checks.json", lambda c: c["gates"].reverse()), "check-missing"
    ),
    insider(
        "the attempts dropped", in_json("checks.json", lambda c: c.pop("attempts")), "check-missing"
    ),
    insider("a threshold of a check changed", in_gate("evaluation", threshold=[]), "check-differs"),
    insider("a result of a check changed", in_gate("contamination", result={}), "check-differs"),
    insider(
        "a failed check without a waiver", in_gate("training_health", passed=False), "check-failed"
    ),
    insider(
        "a waiver of what cannot be waived",
        in_gate("contamination", passed=False, waiver=_FORGED_WAIVER),
        "check-failed",
    ),
    insider(
        "a waiver that had ended",
        in_gate("training_health", passed=False, waiver=_OLD_WAIVER),
        "check-failed",
    ),
    insider(
        "a waiver nobody signed for",
        in_gate("training_health", passed=False, waiver={**_FORGED_WAIVER, "who": " "}),
        "check-failed",
    ),
    insider(
        "a waiver beside a gate that passed",
        in_gate("training_health", waiver=_FORGED_WAIVER),
        "check-differs",
    ),
    insider(
        "a waived gate of which nobody says why it failed",
        all_of(
            in_json("release.json", _policy(waivable=["training_health"])),
            in_gate("training_health", passed=False, waiver=_FORGED_WAIVER),
        ),
        "check-differs",
    ),
    settled("a figure given twice", in_json("evals.json", _twice), "evaluation-unbound"),
    settled(
        "a difference that is not of the model",
        in_json("evals.json", _of_another),
        "evaluation-unbound",
    ),
    settled("contamination that was found, and waived", _contaminated, "evaluation-unbound"),
    settled(
        "a waived gate that hides why it failed",
        all_of(
            in_json("release.json", _policy(evaluation=[_BEYOND])),
            in_gate("evaluation", **_HIDDEN, waiver=_FORGED_WAIVER),
        ),
        "check-differs",
    ),
    insider("health of a training unsaid", in_gate("training_health", result={}), "check-differs"),
    insider(
        "health of a training that was not",
        in_gate("training_health", result={"best": {"mean_cosine": 0.0}}),
        "check-differs",
    ),
    settled(
        "a report of more pictures than are held out",
        in_json("evals.json", _more_pictures),
        "evaluation-unbound",
    ),
    insider(
        "deduplication that leaves nothing out",
        in_json("release.json", _policy(max_self_threshold=9999.0)),
        "release-malformed",
    ),
    insider(
        "a threshold that refuses nothing",
        in_json("release.json", _policy(evaluation=[_VACUOUS])),
        "release-malformed",
    ),
    insider(
        "a threshold on a baseline alone",
        in_json("release.json", _policy(evaluation=[_OF_A_BASELINE])),
        "release-malformed",
    ),
    insider(
        "thresholds without end",
        in_json("release.json", _policy(evaluation=[{**_ROW, "at_least": 0.1}] * 1001)),
        "release-malformed",
    ),
    insider(
        "no threshold at all",
        in_json("release.json", _policy(evaluation=[])),
        "release-malformed",
    ),
    insider(
        "a dependency dropped",
        in_json("provenance.intoto.json", _drop_dependency),
        "provenance-differs",
    ),
    insider(
        "a subject added", in_json("provenance.intoto.json", _add_subject), "provenance-differs"
    ),
    insider(
        "an empty statement",
        in_bytes("provenance.intoto.json", lambda _: b"{}\n"),
        "provenance-differs",
    ),
    insider(
        "another source in the statement",
        in_json("provenance.intoto.json", _other_source),
        "provenance-differs",
    ),
    insider(
        "another date in the statement",
        in_json("provenance.intoto.json", _other_date),
        "provenance-differs",
    ),
    insider(
        "a level claimed", in_json("provenance.intoto.json", _claim_level), "provenance-differs"
    ),
    insider(
        "a bill of kinder licences",
        in_json("mlbom.cdx.json", _other_parts(licenses=[{"expression": "CC0-1.0"}])),
        "bom-differs",
    ),
    insider(
        "a bill of other pictures",
        in_json("mlbom.cdx.json", _other_parts(name="public domain")),
        "bom-differs",
    ),
    insider("a bill with a part more", in_json("mlbom.cdx.json", _another_part), "bom-differs"),
    insider("a bill of another network", in_json("mlbom.cdx.json", _other_network), "bom-differs"),
    insider("no builder", in_json("provenance.intoto.json", _no_builder), "provenance-differs"),
    insider("a metric of the bill changed", in_json("mlbom.cdx.json", _kinder_bom), "bom-differs"),
    insider(
        "a bill of other weights",
        in_json(
            "mlbom.cdx.json",
            lambda b: b["metadata"]["component"]["hashes"][0].update(content="0" * 64),
        ),
        "bom-differs",
    ),
    insider(
        "a metric of the card's header changed",
        in_bytes("README.md", lambda d: d.replace(b"value: 0.75", b"value: 0.99", 1)),
        "card-differs",
    ),
    insider(
        "a metric of the card's table changed",
        in_bytes("README.md", lambda d: d.replace(b"0.750 [", b"0.990 [", 1)),
        "card-differs",
    ),
    insider(
        "a card of another licence",
        in_bytes("README.md", lambda d: d.replace(b"`GPL-2.0-or-later`, whose", b"`MIT`, whose")),
        "card-differs",
    ),
]
