"""Waivers count only while they are whole, of this very version, and not over; attempts chain."""

import datetime
import hashlib
import json
import multiprocessing
import os

import pytest

from dinov3.errors import DataError, LineageBroken
from dinov3.publish.waivers import (
    idle_waivers,
    lets_through,
    note_attempt,
    read_attempts,
    read_waivers,
)
from dinov3.release.policy import Verdict, read_policy

TODAY = datetime.date(2026, 11, 21)
WHOLE = """\
- gate: evaluation
  model: vits
  version: 0.1.0
  who: the release author
  why: measured on another set
  until: 2026-11-21
"""


def read(tmp_path, text, model="vits", version="0.1.0", today=TODAY):
    path = tmp_path / "waivers.yaml"
    path.write_text(text)
    return read_waivers(path, model, version, today)


def policy(*waivable):
    return read_policy(
        {
            "evaluation": [{"protocol": "k-NN", "metric": "top-1", "k": 20, "at_least": 0.5}],
            "max_relative_threshold": 0.9,
            "max_self_threshold": 0.9,
            "licence": "MIT",
            "health": {},
            "waivable": list(waivable),
        }
    )


def test_whole_waiver_counts_on_its_last_day(tmp_path):
    found = read(tmp_path, WHOLE)
    assert found.void == ()
    assert found.valid["evaluation"].as_json() == {
        "who": "the release author",
        "why": "measured on another set",
        "until": "2026-11-21",
    }


def test_pipe_in_place_of_the_waivers_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "waivers.yaml")
    with pytest.raises(DataError, match=r"waivers\.yaml: not a file"):
        read_waivers(tmp_path / "waivers.yaml", "vits", "0.1.0", TODAY)


def test_waiver_is_over_the_day_after_and_is_named(tmp_path):
    found = read(tmp_path, WHOLE, today=TODAY + datetime.timedelta(days=1))
    assert found.valid == {}
    assert found.void == ("waiver 1 of waivers.yaml: expired on 2026-11-21",)


@pytest.mark.parametrize(("model", "version"), [("vits", "0.1.1"), ("convnext", "0.1.0")])
def test_waiver_of_another_release_does_not_count(tmp_path, model, version):
    assert read(tmp_path, WHOLE, model, version).valid == {}


@pytest.mark.parametrize(
    ("was", "is_", "why"),
    [
        ("  why: measured on another set\n", "", "needs exactly the fields"),
        ("  why: measured", "  whence: x\n  why: measured", "needs exactly the fields"),
        ("the release author", "' '", "a field is empty"),
        ("the release author", "[a, b]", "a field is empty or no text"),
        ("gate: evaluation", "gate: evaluations", "no such gate, got 'evaluations'"),
        ("gate: evaluation", "gate: chain", "chain can never be waived"),
        ("gate: evaluation", "gate: contamination", "contamination can never be waived"),
        ("2026-11-21", "next week", "until is no date"),
        ("2026-11-21", "20261121", "until is no date"),
        ("2026-11-21", "2026-02-30", "until is no date"),
    ],
)
def test_malformed_waiver_does_not_count_and_is_named(tmp_path, was, is_, why):
    found = read(tmp_path, WHOLE.replace(was, is_, 1))
    assert found.valid == {}
    assert why in found.void[0]


@pytest.mark.parametrize("text", ["gate: evaluation", "3", "- a: [", "- {a: 1, a: 2}", "\0"])
def test_file_that_is_no_list_in_yaml_is_an_error(tmp_path, text):
    with pytest.raises(DataError, match=r"waivers\.yaml: not"):
        read(tmp_path, text)


def test_no_file_and_an_empty_one_hold_no_waivers(tmp_path):
    assert read_waivers(tmp_path / "waivers.yaml", "vits", "0.1.0", TODAY).valid == {}
    assert read(tmp_path, "# none\n").valid == {}


def test_waiver_lets_through_only_what_the_policy_leaves_open(tmp_path):
    waivers = read(tmp_path, WHOLE)
    failed = Verdict("evaluation", False, None, [], "too low")
    assert lets_through(failed, waivers, policy("evaluation")) is waivers.valid["evaluation"]
    assert lets_through(failed, waivers, policy("clean_code")) is None
    other = Verdict("clean_code", False, None, [], "dirty")
    assert lets_through(other, waivers, policy("clean_code")) is None


def test_unknown_licence_cannot_be_waived_even_where_licences_can(tmp_path):
    waivers = read(tmp_path, WHOLE.replace("evaluation", "licences"))
    for unknown, passes in (["who knows"], False), ([], True):
        result = {"inputs": ["MIT"], "unknown": unknown, "conflicts": ["MIT: does not suit"]}
        verdict = Verdict("licences", False, result, "MIT", "…")
        assert (lets_through(verdict, waivers, policy("licences")) is not None) == passes


def test_waiver_that_lets_nothing_through_says_why(tmp_path):
    waivers = read(tmp_path, WHOLE)
    failed = [Verdict("evaluation", False, None, [], "too low")]
    assert idle_waivers(failed, waivers, policy("clean_code", "licences")) == (
        "the waiver of evaluation does not count: the policy opens no such gate "
        "(policy.waivable: clean_code, licences)",
    )
    (said,) = idle_waivers(failed, waivers, policy())
    assert said.endswith("(policy.waivable: none)")
    assert idle_waivers([Verdict("clean_code", False, None, [], "")], waivers, policy()) == ()

    waivers = read(tmp_path, WHOLE.replace("evaluation", "licences"))
    unknown = {"inputs": ["who knows"], "unknown": ["who knows"], "conflicts": []}
    (said,) = idle_waivers(
        [Verdict("licences", False, unknown, "MIT", "…")], waivers, policy("licences")
    )
    assert said.endswith("a licence that is unknown or not stated cannot be waived")


def note(log, version="0.1.0", failed=(), model="vits"):
    return note_attempt(
        log, model=model, version=version, failed=failed, judged="0" * 64, day=TODAY
    )


def test_attempts_are_counted_by_version_and_each_names_the_one_before(tmp_path):
    log = tmp_path / "log"
    counts = [
        note(log, failed=["licences", "chain"]).count,
        note(log, version="0.2.0").count,
        note(log).count,
    ]
    assert counts == [1, 1, 2]
    lines = (log / "attempts.jsonl").read_bytes().splitlines(keepends=True)
    attempts = [json.loads(line) for line in lines]
    assert [one["verdict"] for one in attempts] == ["refused", "passed", "passed"]
    assert attempts[0]["failed"] == ["chain", "licences"]
    digests = [hashlib.sha256(line).hexdigest() for line in lines]
    assert [one["previous"] for one in attempts] == [None, *digests[:2]]
    assert (
        note(log).digest
        == hashlib.sha256(
            (log / "attempts.jsonl").read_bytes().splitlines(keepends=True)[-1]
        ).hexdigest()
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.split(b"\n", 1)[1],
        lambda data: data.replace(b"refused", b"passed"),
        lambda data: data[:-3],
        lambda data: data + b"{}\n",
        lambda data: b"\n".join(reversed(data.splitlines())) + b"\n",
    ],
)
def test_cut_rewritten_torn_or_reordered_log_is_refused(tmp_path, spoil):
    for failed in (["chain"], [], []):
        note(tmp_path, failed=failed)
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(LineageBroken, match=r"attempts\.jsonl: line \d+: .* Restore the log"):
        note(tmp_path)


def test_processes_at_once_leave_one_chain(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=note, args=(tmp_path, "0.1.0")) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read_attempts((tmp_path / "attempts.jsonl").read_bytes(), "log")) == 8


def test_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "attempts.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        note(tmp_path)
