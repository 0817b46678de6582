"""The verifier's answer, for a terminal and as JSON; every foreign word in it is escaped.

The JSON is an object of these fields, which stay:

    schema       "dinov3.verification/1"
    verdict      "verified", "refused" or "undecided"; exit is 0, 1 or 2 accordingly
    refusal      null or {name, where, why}; name is one of the fixed list
    fault        null, or why nothing could be decided
    target       what was asked about
    file         null, or of a lone file {sha256, bytes, tensors, releases, same_tensors_only}
    release      null or {name, digest, signer}; signer is the fingerprint that was checked, or null
    holds        list of {what, rests_on}
    figures      rows of the model: protocol, metric, k, value, low, high, contamination
    roots        where the chain begins: role, name, sha256, licences, training_data
    obligations, waivers, not_checked, not_proven   lists of sentences
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from dinov3.release.audit import Audit
from dinov3.release.head import UNKNOWN
from dinov3.release.refusals import REFUSALS, Refused
from dinov3.release.render import plain, to_json

SCHEMA = "dinov3.verification/1"


@dataclass
class LoneFile:
    """A file of weights that was asked about, and the releases that hold it."""

    sha256: str
    bytes: int
    tensors: str | None
    releases: list[str] = field(default_factory=list)
    same_tensors_only: bool = False


@dataclass
class Verdict:
    """What was asked, what was found, and what decides."""

    target: str
    audit: Audit = field(default_factory=Audit)
    refusal: Refused | None = None
    fault: str | None = None
    file: LoneFile | None = None

    @property
    def exit_code(self) -> int:
        """0 verified, 1 refused, 2 undecided."""
        if self.refusal is not None:
            return 1
        return 2 if self.fault is not None or self.audit.not_checked else 0

    @property
    def word(self) -> str:
        """The verdict."""
        return ("verified", "refused", "undecided")[self.exit_code]


def to_json_text(verdict: Verdict) -> str:
    """The answer as JSON in ASCII."""
    audit, refusal = verdict.audit, verdict.refusal
    release = {
        "name": audit.name,
        "digest": audit.digest,
        "signer": audit.signer.fingerprint,
    }
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": verdict.word,
        "exit": verdict.exit_code,
        "refusal": None
        if refusal is None
        else {"name": refusal.name, "where": refusal.where, "why": refusal.why},
        "fault": verdict.fault,
        "target": verdict.target,
        "file": None if verdict.file is None else asdict(verdict.file),
        "release": None if audit.digest is None else release,
        "holds": [asdict(line) for line in audit.holds],
        "figures": audit.figures,
        "roots": audit.roots,
        "obligations": audit.obligations,
        "waivers": audit.waivers,
        "not_checked": audit.not_checked,
        "not_proven": audit.not_proven,
    }
    return to_json(content)


def to_text(verdict: Verdict) -> str:
    """The answer for a person at a terminal, in printable ASCII."""
    audit = verdict.audit
    lines = [f"release    {audit.name or verdict.target}"]
    if verdict.file is not None:
        lines = [f"file       {verdict.target}", *_file_lines(verdict.file), *lines]
    if audit.digest is not None:
        lines.append(f"digest     {audit.digest}")
    for line in audit.holds:
        lines += [f"  ok  {line.what}", f"        by {line.rests_on}"]
    lines += _section("its figures, with 95 % intervals:", map(_figure, audit.figures))
    lines += _section("the chain begins at:", map(_root, audit.roots))
    lines += _section("waived:", audit.waivers)
    lines += _section("who passes it on owes:", audit.obligations)
    lines += _section("not checked:", audit.not_checked)
    if verdict.exit_code == 0:
        lines += _section("not proven by any of this:", audit.not_proven)
    return "\n".join(plain(line) for line in [*lines, _last_line(verdict)])


def _file_lines(file: LoneFile) -> list[str]:
    lines = [f"sha256     {file.sha256}"]
    if file.tensors is not None:
        lines.append(f"tensors    {file.tensors}")
    if file.same_tensors_only:
        lines.append("           the same tensors in another container than the release's")
    return lines


def _section(title: str, sentences: Any) -> list[str]:
    found = [f"  -   {sentence}" for sentence in sentences]
    return [title, *found] if found else []


def _figure(row: dict[str, Any]) -> str:
    k = f" k={row['k']}" if "k" in row else ""
    known = "" if row["contamination"] != UNKNOWN else ", contamination: unknown"
    interval = f"[{row.get('low')}, {row.get('high')}]"
    return f"{row.get('protocol')} {row.get('metric')}{k}: {row.get('value')} {interval}{known}"


def _root(root: dict[str, Any]) -> str:
    licences = ", ".join(root["licences"]) or "no licence of its own"
    unknown = root["training_data"] == UNKNOWN
    kind = "external root" if unknown else root["role"]
    data = ", training data unknown" if unknown else ""
    return f"{kind} {root['name']}, sha256 {root['sha256'][:16]} ({licences}){data}"


def _last_line(verdict: Verdict) -> str:
    refusal = verdict.refusal
    if refusal is not None:
        return f"REFUSED {refusal.name}: {refusal}  ({REFUSALS[refusal.name]})"
    if verdict.fault is not None:
        return f"UNDECIDED: {verdict.fault}"
    if verdict.audit.not_checked:
        return f"UNDECIDED, though intact: not checked {verdict.audit.not_checked[0]}"
    unknown = [root["name"] for root in verdict.audit.roots if root["training_data"] == UNKNOWN]
    limit = (
        f", down to external root {', '.join(unknown)}, training data unknown" if unknown else ""
    )
    return f"VERIFIED {verdict.audit.name}{limit}"
