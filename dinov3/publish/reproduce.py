"""A release made again from its records: the same code, recipes and pictures, in a scratch folder.

    records, inputs first ──► command of dvc.yaml, recorded config ──► artifact ──► same digests?

On a CPU with one process the same bits must come out, so tensor digests are compared. Elsewhere
they need not, and the figures of a new evaluation are compared with the released intervals.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.errors import DataError
from dinov3.evals.baselines import MODEL
from dinov3.publish.workshop import SOURCE, Link, Workshop
from dinov3.release.record import Record, parse_json, read_record
from dinov3.stage import environment_digest

TENSORS, METRICS = "tensor digests", "metrics"

_REPORT = "report.json"
_KNOWN_ROOTS = {SOURCE, "backgrounds"}  # the pictures, and what the recipe itself names

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """One thing that was compared: what the release says, what was made, whether they agree."""

    name: str
    released: str
    made: str
    agrees: bool


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Attributes:
        compared: `TENSORS` or `METRICS`.
        reason: Why by metrics; empty for tensors.
        findings: About the released weights, or about the figures of their evaluation.
        drifted: Stages of which an output differs from the recorded one, in the order made.
        notes: What may explain a difference.
    """

    compared: str
    reason: str
    findings: tuple[Finding, ...]
    drifted: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether something was compared and all of it agrees."""
        return bool(self.findings) and all(finding.agrees for finding in self.findings)


def reproduce(
    folder: Path, source: str, *, scratch: Path, say: Say, is_trusted: bool
) -> Reproduction:
    """Makes the weights of a verified release again and compares them.

    Args:
        folder: The release.
        source: Where its pictures are, `kind:path`, absolute.
        scratch: An empty folder.
        say: Told what is going on, a line at a time.
        is_trusted: Whether its signer is known, so that code which it carries may be run.

    Raises:
        DataError: Something of the chain is not here: the code, the pictures, outside weights.
        ConfigError: The recorded code has no command for an artifact.
    """
    head = parse_json((folder / "release.json").read_bytes())
    links = read_chain(folder, head)
    reason = bits_may_differ([links[digest] for digest in ancestors(links, head["final"])])
    ends = [head["final"]] if reason is None else [head["final"], head["evaluation"]]
    wanted = {digest: links[digest] for digest in ancestors(links, *ends)}
    _require_makeable(list(wanted.values()))
    limits = {"device": "auto" if reason else "cpu", "threads": _threads(wanted)}
    workshop = Workshop(scratch, source, limits=limits, is_trusted=is_trusted)
    for link in wanted.values():
        workshop.code_of(link)  # what is not here is said before hours are spent
    drifted, made = [], {}
    for digest, link in wanted.items():
        began = time.monotonic()
        say(f"{link.record.stage}: being made")
        made[digest] = workshop.make(link)
        different = differing_outputs(link.record, made[digest])
        drifted += [link.record.stage] if different else []
        verdict = f"differs: {', '.join(different)}" if different else "same"
        say(f"{link.record.stage}: {verdict} ({time.monotonic() - began:.0f} s)")
    notes = _notes(list(wanted.values()))
    if reason is None:
        weights = _tensor_findings(links[head["final"]].record, made[head["final"]])
        return Reproduction(TENSORS, "", tuple(weights), tuple(drifted), notes)
    figures = _metric_findings(folder, workshop.folder_of(links[head["evaluation"]].record))
    return Reproduction(METRICS, reason, tuple(figures), tuple(drifted), notes)


def read_chain(folder: Path, head: Mapping[str, Any]) -> dict[str, Link]:
    """The records of a release by digest, inputs first.

    Args:
        folder: The release, verified.
        head: Content of its release.json.
    """
    found = {}
    for stage, digest in head["records"]:
        stem = f"{stage}-{digest[:12]}"
        run = parse_json((folder / "runs" / f"{stem}.json").read_bytes())
        found[digest] = Link(read_record(folder / "records" / f"{stem}.json"), run)
    return found


def ancestors(links: Mapping[str, Link], *ends: str) -> list[str]:
    """Digests of some records and all they came from, inputs first."""
    needed, pending = set(ends), list(ends)
    while pending:
        above = {edge.record for edge in links[pending.pop()].record.inputs if edge.record}
        pending += above - needed
        needed |= above
    return [digest for digest in links if digest in needed]


def bits_may_differ(chain: Sequence[Link]) -> str | None:
    """Why the same bits need not come out here; None where they must."""
    here = f"{platform.system()}-{platform.machine()}".lower()
    for link in chain:
        stage, run = link.record.stage, link.run
        if run.get("device", "cpu") != "cpu":
            return f"{stage} was trained on {run['device']}"
        if run.get("world_size", 1) != 1:
            return f"{stage} was trained by {run['world_size']} processes"
        made_on = str(run.get("host_class", here)).rpartition("-")[0] or here
        if "host_class" in run and made_on != here:
            return f"{stage} was made on {made_on}, this is {here}"
    return None


def differing_outputs(recorded: Record, made: Record) -> list[str]:
    """Outputs that are not the recorded ones; of weights the tensors count, not the file."""

    def identity(record: Record, name: str) -> str | None:
        output = record.outputs.get(name)
        return None if output is None else output.tensors or output.sha256

    names = sorted({*recorded.outputs, *made.outputs})
    return [name for name in names if identity(recorded, name) != identity(made, name)]


def compare_figures(
    released: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Each released figure of the model: whether the one made lies in its interval.

    Args:
        released: Rows of the release's evals.json.
        made: Rows of the new report.
    """
    values = {_measure(row): row["value"] for row in made if row["subject"] == MODEL}
    findings = []
    for row in released:
        if row["subject"] != MODEL:
            continue
        value = values.get(_measure(row))
        inside = value is not None and row["low"] <= value <= row["high"]
        stated = f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        found = "not judged" if value is None else f"{value:.4f}"
        findings.append(Finding(_measure(row), stated, found, inside))
    return findings


def _require_makeable(chain: Sequence[Link]) -> None:
    """Raises DataError for what no command here can make."""
    stages = [link.record.stage for link in chain]
    twice = sorted({stage for stage in stages if stages.count(stage) > 1})
    if twice:
        msg = f"{twice[0]}: made twice in one chain, got an extended run. Make it by hand."
        raise DataError(msg)
    for link in chain:
        for edge in link.record.inputs:
            if edge.record is None and edge.role not in _KNOWN_ROOTS:
                msg = (
                    f"{link.record.stage}: began from outside, got {edge.role} {edge.name}. "
                    "Only what was made here can be made again."
                )
                raise DataError(msg)


def _threads(chain: Mapping[str, Link]) -> int:
    """As many as training had: sums in another order end in other bits."""
    found = [link.run["threads"] for link in chain.values() if "threads" in link.run]
    return int(found[-1]) if found else 1


def _tensor_findings(recorded: Record, made: Record) -> list[Finding]:
    found = []
    for name, output in recorded.outputs.items():
        if output.tensors is None or "/" in name:  # snapshots are not released
            continue
        again = made.outputs.get(name)
        digest = "none" if again is None else str(again.tensors)
        found.append(Finding(name, output.tensors, digest, digest == output.tensors))
    return found


def _metric_findings(folder: Path, report: Path) -> list[Finding]:
    released = parse_json((folder / "evals.json").read_bytes())["rows"]
    return compare_figures(released, parse_json((report / _REPORT).read_bytes())["rows"])


def _measure(row: Mapping[str, Any]) -> str:
    k = f", k = {row['k']}" if "k" in row else ""
    return f"{row['protocol']} {row['metric']}{k}"


def _notes(chain: Sequence[Link]) -> tuple[str, ...]:
    """What else than the code may explain a difference."""
    own = environment_digest()
    other = [link.record.stage for link in chain if link.record.environment != own]
    python = platform.python_version()
    said = f"{', '.join(other)}: made with other versions of libraries (this is Python {python})"
    return (said,) if other else ()
