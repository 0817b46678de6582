"""The event log of a training run: read line by line, held against the steps a record claims.

What is checked is that log, record and `run.json` agree with each other. Nobody can tell from them
that the training took place.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

from dinov3.release.opening import open_below
from dinov3.release.policy_terms import is_number
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import Refused

EVENTS_NAME = "events.jsonl"

_MAX_LINE = 1 << 20  # bytes
_BLOCK = 1 << 16
_FEWEST = 10  # lines of a long run
_USUAL = 1000  # steps that may pass without a line, however short the run


@dataclass(frozen=True)
class Events:
    """What one log holds.

    Attributes:
        num_lines: Lines in all.
        first: First step that was logged as taken; None where none was.
        last: Last such step.
        num_non_finite: Steps whose loss or gradient was not finite.
        sha256: Of the bytes that were read.
        widest: Most steps that passed from one line to the next.
        hole: The first two lines that stand further apart than the run's own interval of logging.
    """

    num_lines: int
    first: int | None
    last: int | None
    num_non_finite: int
    sha256: str
    widest: int = 0
    hole: tuple[int, int] | None = None


class _Spacing:
    """How far apart the lines of a log stand.

    A run logs every so many steps, and its last step. The interval is what lies between its first
    lines; where it was resumed, another may begin.
    """

    def __init__(self, start: int, resumed: Iterable[int]) -> None:
        self._at = start
        begun = {start} if start else set()  # an ancestor's interval may have been another
        self._resumed = deque(sorted(begun.union(step for step in resumed if step >= start)))
        self._interval: int | None = None
        self._first_gap: int | None = None  # is the interval if it does not end with the last step
        self.widest = 0
        self.hole: tuple[int, int] | None = None

    def add(self, step: int) -> None:
        """Goes on to the next line of a step that was taken."""
        before, self._at = self._at, step
        self._interval = self._interval or self._first_gap
        begun = []
        while self._resumed and self._resumed[0] < step:
            begun.append(self._resumed.popleft())
        if begun:
            self._check(before, step, is_hole=begun[0] - before >= (self._interval or step + 1))
            self._interval = self._first_gap = None
            self.widest = max(self.widest, begun[0] - before, step - begun[-1])
            return
        self.widest = max(self.widest, step - before)
        if self._interval is None:
            self._first_gap = step - before
        else:
            self._check(before, step, is_hole=step - before > self._interval)

    def _check(self, before: int, step: int, *, is_hole: bool) -> None:
        if is_hole and self.hole is None:
            self.hole = (before, step)


def read_events(folder: Path, name: str, *, start: int = 0, resumed: Iterable[int] = ()) -> Events:
    """Reads a log of any length in constant memory.

    A line of a step that was not finite bears the step before it, for nothing was updated.

    Args:
        folder: The release.
        name: Path of the log in it.
        start: Last step of the run that this one goes on from.
        resumed: Steps that this one was resumed at.

    Raises:
        Refused: `events-malformed`: not one JSON object per line with a step and a time, or the
            steps are not in order; `file-special`, `name-unsafe`.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    num_lines = num_non_finite = 0
    first: int | None = None
    last: int | None = None
    spacing = _Spacing(start, resumed)
    place = -1  # twice the step, and one more where it was not finite
    with open_below(folder, name) as stream:
        for line in _lines(stream, name, digest):
            num_lines += 1
            step, is_finite, is_note = _read_line(line, f"{name}:{num_lines}")
            if is_note:
                continue
            here = 2 * step + (not is_finite)
            if here <= place:
                raise Refused("events-malformed", name, f"line {num_lines}: step {step} too late")
            place = here
            if is_finite:
                first, last = step if first is None else first, step
                spacing.add(step)
            num_non_finite += not is_finite
    found = digest.hexdigest()
    return Events(num_lines, first, last, num_non_finite, found, spacing.widest, spacing.hole)


def resumed_at(run: Mapping[str, Any], where: str) -> list[int]:
    """The steps at which a run was resumed.

    Args:
        run: Its `run.json`.
        where: Name of the record.

    Raises:
        Refused: `steps-differ`: an interruption names no step.
    """
    return [step for name, step in _interruptions(run, where) if name == "resumed_at_step"]


def check_steps(
    events: Events | None, steps: Mapping[str, Any], run: Mapping[str, Any], where: str
) -> None:
    """Holds what a record claims to have trained against its log.

    Args:
        events: The log; None where the record has none.
        steps: Of the record.
        run: `run.json` of the record.
        where: Name of the record.

    Raises:
        Refused: `steps-differ`.
    """
    if (events is None) != ("performed" not in steps):
        fault = "claims steps without a log of events" if events is None else "has a log, no steps"
        raise Refused("steps-differ", where, fault)
    if events is None:
        return
    planned, performed = steps.get("planned"), steps.get("performed")
    if not _is_count(planned) or not _is_count(performed):
        raise Refused("steps-differ", where, f"planned {planned!r}, performed {performed!r}")
    if events.last != performed:
        why = f"claims {performed} steps, its log of events ends at {events.last}"
        raise Refused("steps-differ", where, why)
    if planned != performed:
        why = f"performed {performed} of {planned} planned steps, and was written all the same"
        raise Refused("steps-differ", where, why)
    for _, step in _interruptions(run, where):
        if not 0 <= step <= performed:
            raise Refused("steps-differ", where, f"interrupted at step {step} of {performed}")
    _check_spacing(events, performed, where)


def _check_spacing(events: Events, performed: int, where: str) -> None:
    """Few lines prove few steps: a log has none missing, and more than a handful."""
    if events.hole is not None:
        before, after = events.hole
        why = (
            f"its log of events goes from step {before} to {after}, further than from line to line"
        )
        raise Refused("steps-differ", where, why)
    if events.widest > max(_USUAL, performed // _FEWEST):
        why = f"claims {performed} steps, {events.widest} of them on one line of its log of events"
        raise Refused("steps-differ", where, why)


def _lines(stream: FileIO, name: str, digest: "hashlib._Hash") -> Iterator[bytes]:
    rest = b""
    left = os.fstat(stream.fileno()).st_size
    while left > 0:
        block = stream.read(min(_BLOCK, left))
        if not block:
            break
        left -= len(block)
        digest.update(block)
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > _MAX_LINE:
            raise Refused("events-malformed", name, f"a line of more than {_MAX_LINE} bytes")
        yield from whole
    if rest:
        raise Refused("events-malformed", name, "the last line has no end")


def _read_line(line: bytes, where: str) -> tuple[int, bool, bool]:
    """Step of a line, whether it was finite, whether it is a mere note."""
    try:
        event = parse_json(line, max_bytes=_MAX_LINE)
    except RecordError as error:
        raise Refused("events-malformed", where, str(error)) from error
    step = event.get("step") if isinstance(event, dict) else None
    if not _is_count(step) or not is_number(event.get("time")):
        raise Refused("events-malformed", where, "no step, or no time")
    for key, value in event.items():
        fits = isinstance(value, str) if key == "note" else value is None or is_number(value)
        if not fits:
            raise Refused("events-malformed", where, f"{key!r} is no number")
    return step, "non_finite" not in event, "note" in event


def _interruptions(run: Mapping[str, Any], where: str) -> Iterator[tuple[str, int]]:
    """Name and step of each."""
    found = run.get("interruptions", [])
    if not isinstance(found, list):
        raise Refused("steps-differ", where, "its interruptions are no list")
    for one in found:
        fields = one.items() if isinstance(one, dict) else ()
        steps = [(name, value) for name, value in fields if name.endswith("_at_step")]
        if not steps or not all(_is_count(step) for _, step in steps):
            raise Refused("steps-differ", where, "an interruption without a step")
        yield from steps


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
