"""Logs of events are read as the trainer writes them, and held against records."""

import json
from pathlib import Path
from typing import Any

import pytest

from dinov3.release.events import Events, check_steps, read_events
from dinov3.release.refusals import Refused
from dinov3.train.events import EventLog

STEPS = {"planned": 3, "performed": 3}


def _write(folder: Path, *lines: dict[str, Any] | bytes) -> Path:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in raw))
    return folder


def _line(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "time": 1.0, "loss": 0.5, **fields}


def _refusal(folder: Path) -> str:
    with pytest.raises(Refused, match=r".") as caught:
        read_events(folder, "events.jsonl")
    return caught.value.name


def test_log_of_the_trainer_is_read(tmp_path: Path) -> None:
    with EventLog(tmp_path, size=0, step=0) as log:
        for step in (1, 2, 3):
            log.numbers(step, {"loss": 1 / step})
    found = read_events(tmp_path, "events.jsonl")
    assert (found.num_lines, found.first, found.last, found.num_non_finite) == (3, 1, 3, 0)


def test_steps_that_were_not_finite_stand_before_what_followed_them(tmp_path: Path) -> None:
    with EventLog(tmp_path, size=0, step=0) as log:
        log.numbers(1, {"loss": 1.0})
        log.numbers(1, {"loss": float("nan"), "non_finite": 1.0})
        log.numbers(2, {"loss": 1.0})
        log.numbers(2, {"loss": float("inf"), "non_finite": 1.0})
        log.numbers(3, {"loss": 1.0})
    found = read_events(tmp_path, "events.jsonl")
    assert (found.num_lines, found.last, found.num_non_finite) == (5, 3, 2)


def test_resumed_log_is_cut_back_and_has_each_step_once(tmp_path: Path) -> None:
    with EventLog(tmp_path, size=0, step=0) as log:
        log.numbers(1, {"loss": 1.0})
        size = log.size
        log.numbers(2, {"loss": 1.0})
    with EventLog(tmp_path, size=size, step=1) as log:
        for step in (2, 3):
            log.numbers(step, {"loss": 1.0})
    assert read_events(tmp_path, "events.jsonl").num_lines == 3


def test_notes_take_no_step(tmp_path: Path) -> None:
    with EventLog(tmp_path, size=0, step=0) as log:
        log.numbers(1, {"loss": 1.0})
        log.note(1, "the disk is nearly full")
        log.numbers(2, {"loss": 1.0})
    assert read_events(tmp_path, "events.jsonl").last == 2


def test_empty_log_has_no_step(tmp_path: Path) -> None:
    assert read_events(_write(tmp_path), "events.jsonl").last is None


def test_log_longer_than_any_buffer_is_read_to_its_end(tmp_path: Path) -> None:
    _write(tmp_path, *(_line(step) for step in range(1, 4000)))
    assert read_events(tmp_path, "events.jsonl").last == 3999


def _spaced(folder: Path, *steps: int, start: int = 0, resumed: tuple[int, ...] = ()) -> Events:
    _write(folder, *map(_line, steps))
    return read_events(folder, "events.jsonl", start=start, resumed=resumed)


@pytest.mark.parametrize(
    ("steps", "start", "resumed"),
    [
        ((5,), 0, ()),
        ((10, 15), 0, ()),
        ((10, 20, 25), 0, ()),
        ((10, 20, 24, 28, 32), 0, (22,)),  # goes on with another interval of logging
        ((2, 4, 6, 7, 14, 20), 0, (6,)),
        ((10, 20, 30), 0, (20,)),
        ((50, 60), 0, (9, 19, 45)),
        ((301, 308, 310), 300, (300,)),  # goes on from a finished run
        ((310,), 300, (120, 300)),
        ((303, 304, 305), 300, ()),
    ],
)
def test_log_of_a_run_that_was_resumed_or_goes_on_has_no_hole(
    steps: tuple[int, ...], start: int, resumed: tuple[int, ...], tmp_path: Path
) -> None:
    assert _spaced(tmp_path, *steps, start=start, resumed=resumed).hole is None


@pytest.mark.parametrize(
    ("steps", "resumed", "hole"),
    [
        ((1, 2, 5), (), (2, 5)),
        ((10, 20, 31), (), (20, 31)),
        ((10, 20, 40, 50), (), (20, 40)),
        ((10, 20, 40, 50), (30,), (20, 40)),  # step 30 was taken before
        ((10, 20, 30, 31, 32, 35), (30,), (32, 35)),
    ],
)
def test_log_with_lines_cut_out_has_a_hole(
    steps: tuple[int, ...], resumed: tuple[int, ...], hole: tuple[int, int], tmp_path: Path
) -> None:
    assert _spaced(tmp_path, *steps, resumed=resumed).hole == hole


def test_most_steps_on_one_line_are_counted(tmp_path: Path) -> None:
    assert _spaced(tmp_path, 10**6).widest == 10**6
    assert _spaced(tmp_path, 310, start=300).widest == 10
    assert _spaced(tmp_path, 900, 1000, resumed=(10,)).widest == 890


@pytest.mark.parametrize(
    "lines", [{"widest": 1001, "hole": None}, {"widest": 1, "hole": (1, 3)}], ids=["few", "hole"]
)
def test_few_lines_prove_few_steps(lines: dict[str, Any]) -> None:
    events = Events(num_lines=3, first=1, last=3, num_non_finite=0, sha256="0" * 64, **lines)
    with pytest.raises(Refused, match="log of events") as caught:
        check_steps(events, STEPS, {}, "student")
    assert caught.value.name == "steps-differ"


def test_long_run_may_log_seldom() -> None:
    events = Events(10, 10**5, 10**6, 0, "0" * 64, widest=10**5)
    check_steps(events, {"planned": 10**6, "performed": 10**6}, {}, "teacher")


@pytest.mark.parametrize(
    "lines",
    [
        (_line(2), _line(1)),
        (_line(1), _line(1)),
        (_line(2), _line(1, non_finite=1.0)),
        (_line(-1),),
        (_line(1) | {"step": True},),
        (_line(1) | {"step": 1.5},),
        ({"step": 1},),
        (_line(1, loss="low"),),
        (_line(1, loss=[1]),),
        (b"[1]",),
        (b"not json",),
        (b'{"step":1,"time":1,"step":2}',),
        (b'{"step":1,"time":NaN}',),
        (_line(1), b""),
        (b" " * (2 << 20),),
    ],
)
def test_log_of_another_form_is_refused(lines: Any, tmp_path: Path) -> None:
    assert _refusal(_write(tmp_path, *lines)) == "events-malformed"


def test_last_line_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(json.dumps(_line(1)).encode())
    assert _refusal(tmp_path) == "events-malformed"


def _events(last: int | None = 3) -> Events:
    return Events(num_lines=3, first=1, last=last, num_non_finite=0, sha256="0" * 64)


def test_record_that_agrees_with_its_log_passes() -> None:
    run = {"interruptions": [{"stopped_at_step": 2, "signal": "SIGTERM"}, {"resumed_at_step": 2}]}
    check_steps(_events(), STEPS, run, "student")
    check_steps(None, {}, {}, "manifest")
    check_steps(None, {"chosen": 5}, {}, "gram teacher")


@pytest.mark.parametrize(
    ("events", "steps", "run"),
    [
        (_events(2), STEPS, {}),
        (_events(None), STEPS, {}),
        (_events(), {"planned": 5, "performed": 3}, {}),
        (_events(), {"performed": 3}, {}),
        (_events(), {"planned": "3", "performed": 3}, {}),
        (_events(), {}, {}),
        (None, STEPS, {}),
        (_events(), STEPS, {"interruptions": [{"resumed_at_step": 4}]}),
        (_events(), STEPS, {"interruptions": [{"signal": "SIGTERM"}]}),
        (_events(), STEPS, {"interruptions": {"resumed_at_step": 1}}),
    ],
)
def test_record_that_contradicts_its_log_is_refused(
    events: Events | None, steps: dict[str, Any], run: dict[str, Any]
) -> None:
    with pytest.raises(Refused, match=r".") as caught:
        check_steps(events, steps, run, "student")
    assert caught.value.name == "steps-differ"
