"""Waivers of gates and the log of attempts: data in git, and part of what is released.

`waivers.yaml` is a list of {gate, model, version, who, why, until}; one that is malformed or
expired does not count, and is named. `attempts.jsonl` gets one line per run of the gates, each
with the sha256 of the line before: attempts that failed cannot silently be left out.
"""

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov3.errors import DataError, LineageBroken
from dinov3.publish.signed_log import locked, replace_whole
from dinov3.release.policy import GATES, NEVER_WAIVED, Policy, Verdict, may_be_waived
from dinov3.release.record import RecordError, canonical_json, parse_json

WAIVERS_NAME = "waivers.yaml"
ATTEMPTS_NAME = "attempts.jsonl"

_FIELDS = ("gate", "model", "version", "who", "why", "until")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Waiver:
    """Lets one gate of one version through; somebody answers for it, until a day."""

    gate: str
    model: str
    version: str
    who: str
    why: str
    until: datetime.date

    def as_json(self) -> dict[str, str]:
        """As `checks.json` carries it."""
        return {"who": self.who, "why": self.why, "until": self.until.isoformat()}


@dataclass(frozen=True)
class Waivers:
    """Those that count for one version, by gate, and why others do not."""

    valid: Mapping[str, Waiver]
    void: tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """A line of the log: how often this version was tried by then, and the line's sha256."""

    count: int
    digest: str

    def as_json(self) -> dict[str, Any]:
        """As `checks.json` carries it."""
        return {"count": self.count, "digest": self.digest}


def read_waivers(path: Path, model: str, version: str, today: datetime.date) -> Waivers:
    """The waivers of one version; no file holds none.

    Args:
        path: `waivers.yaml`.
        model: Name of the model.
        version: Of the release.
        today: A waiver holds on its last day.

    Raises:
        DataError: The file is no list in YAML.
    """
    if not path.exists():
        return Waivers({}, ())
    if not path.is_file():
        msg = f"{path}: not a file, got something else of that name. Write a list of waivers there."
        raise DataError(msg)
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), _Loader) or []
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        msg = f"{path}: not readable as YAML, got {' '.join(str(error).split())}. Mend it."
        raise DataError(msg) from error
    if not isinstance(entries, list):
        msg = f"{path}: not a list of waivers, got {type(entries).__name__}. Write `- gate: …`."
        raise DataError(msg)
    valid: dict[str, Waiver] = {}
    void = []
    for number, entry in enumerate(entries, 1):
        waiver = _parse(entry)
        if isinstance(waiver, str):
            void.append(f"waiver {number} of {path.name}: {waiver}")
        elif (waiver.model, waiver.version) != (model, version):
            continue
        elif waiver.until < today:
            void.append(f"waiver {number} of {path.name}: expired on {waiver.until}")
        else:
            valid[waiver.gate] = waiver
    return Waivers(valid, tuple(void))


def lets_through(verdict: Verdict, waivers: Waivers, policy: Policy) -> Waiver | None:
    """The waiver that lets a failed gate through; None where there is none, or none may."""
    if verdict.passed or not may_be_waived(verdict.as_json(), policy):
        return None
    return waivers.valid.get(verdict.name)


def idle_waivers(failed: Sequence[Verdict], waivers: Waivers, policy: Policy) -> tuple[str, ...]:
    """Why whole waivers of failed gates let nothing through."""
    return tuple(_idle(one, policy) for one in failed if one.name in waivers.valid)


def _idle(verdict: Verdict, policy: Policy) -> str:
    waiver = f"the waiver of {verdict.name} does not count"
    if verdict.name not in policy.waivable:
        open_to = ", ".join(sorted(policy.waivable)) or "none"
        return f"{waiver}: the policy opens no such gate (policy.waivable: {open_to})"
    return f"{waiver}: a licence that is unknown or not stated cannot be waived"


def note_attempt(
    log: Path, *, model: str, version: str, failed: Sequence[str], judged: str, day: datetime.date
) -> Attempt:
    """Appends a line for one run of the gates.

    Args:
        log: Folder of the log of releases; made when absent.
        model: Name of the model.
        version: Of the release.
        failed: Gates that no waiver let through.
        judged: Digest of what was judged.
        day: Of the run.

    Raises:
        LineageBroken: The log was cut or rewritten.
        DataError: It cannot be written.
    """
    path = log / ATTEMPTS_NAME
    try:
        log.mkdir(parents=True, exist_ok=True)
        with locked(log):  # several releases may be built at once
            before = path.read_bytes() if path.exists() else b""
            attempts = read_attempts(before, str(path))
            line = canonical_json(
                {
                    "model": model,
                    "version": version,
                    "verdict": "refused" if failed else "passed",
                    "failed": sorted(failed),
                    "judged": judged,
                    "date": day.isoformat(),
                    "previous": _last_digest(before),
                }
            )
            replace_whole(path, before + line)
    except OSError as error:
        msg = f"{path}: cannot be written: {error}. Free the disk, or mend its rights."
        raise DataError(msg) from error
    same = [one for one in attempts if (one.get("model"), one.get("version")) == (model, version)]
    return Attempt(len(same) + 1, hashlib.sha256(line).hexdigest())


def _last_digest(data: bytes) -> str | None:
    lines = data.splitlines(keepends=True)
    return hashlib.sha256(lines[-1]).hexdigest() if lines else None


def read_attempts(data: bytes, where: str) -> list[dict[str, Any]]:
    """The lines of a log of attempts.

    Raises:
        LineageBroken: A line is torn, malformed, or does not follow the one before it.
    """
    lines, previous = [], None
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            attempt = parse_json(line)
        except RecordError as error:
            raise _broken(where, number, str(error)) from error
        if not isinstance(attempt, dict) or canonical_json(attempt) != line:
            raise _broken(where, number, "not canonical JSON")
        if attempt.get("previous") != previous:
            raise _broken(where, number, "does not follow the line before it")
        previous = hashlib.sha256(line).hexdigest()
        lines.append(attempt)
    return lines


class _Loader(yaml.BaseLoader):
    """YAML whose values are all text and whose keys stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key twice", node.start_mark)
        return found


def _parse(entry: Any) -> Waiver | str:
    """The waiver, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
        return f"needs exactly the fields {', '.join(_FIELDS)}"
    if not all(isinstance(value, str) and value.strip() for value in entry.values()):
        return "a field is empty or no text"
    if entry["gate"] not in GATES:
        return f"no such gate, got {entry['gate']!r}"
    if entry["gate"] in NEVER_WAIVED:
        return f"{entry['gate']} can never be waived"
    try:
        if not _DATE.fullmatch(entry["until"]):
            raise ValueError(entry["until"])
        until = datetime.date.fromisoformat(entry["until"])
    except ValueError:
        return f"until is no date as 2030-12-31, got {entry['until']!r}"
    return Waiver(**{**entry, "until": until})


def _broken(where: str, number: int, why: str) -> LineageBroken:
    return LineageBroken(f"{where}: line {number}: {why}. Restore the log from git.")
