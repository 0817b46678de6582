"""From an artifact, a release or a picture up to the roots: what it is and what it is made of.

What is here is hashed again; what is not is shown as unchecked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dinov3.release.checks import Node, Nodes, chain_faults, faults
from dinov3.release.index import Index, Released
from dinov3.release.record import RecordError
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.targets import Answer, LineageError, Start, find, matches


@dataclass
class Findings:
    """What was asked and seen.

    Attributes:
        target: As it was given.
        answers: What the target is, or who used it.
        chain: Records with their depth below the target, or those that used it.
        wrong: What differs.
        unchecked: What could not be checked.
        releases: Those that may hold records of the chain.
        is_reverse: Whether the chain is of users, not of sources.
        note: What the reader should know of how it was checked.
    """

    target: str
    answers: list[Answer] = field(default_factory=list)
    chain: list[tuple[int, Node]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    releases: list[Released] = field(default_factory=list)
    is_reverse: bool = False
    note: str | None = None

    @property
    def exit_code(self) -> int:
        """1 when something differs, else 2 when something could not be checked, else 0."""
        return 1 if self.wrong else 2 if self.unchecked else 0


def audit(target: str, root: Path, index: Index) -> Findings:
    """Follows a target to the roots and checks every record on the way."""
    findings = Findings(target, wrong=index.wrong, unchecked=index.unchecked)
    try:
        start = find(target, root, index)
    except (RecordError, Refused) as error:
        findings.wrong.append(str(error))
        return findings
    except (LineageError, CannotCheck, OSError) as error:
        findings.unchecked.append(str(error))
        return findings
    findings.wrong.extend(start.wrong)
    findings.unchecked.extend(start.unchecked)
    findings.chain = walk(start.nodes, start.known)
    if start.names is not None:
        findings.note = "Hashed again: the records, and the files the answer was read from."
    findings.releases = index.releases
    findings.answers = [*start.answers, *_released(start, index.releases)]
    chain = {node.digest for _, node in findings.chain}
    for _, node in findings.chain:
        try:
            findings.wrong.extend(faults(node, start.names))
            findings.wrong.extend(chain_faults(node, start.known, chain))
        except OSError as error:
            findings.unchecked.append(str(error))
    return findings


def walk(starts: Sequence[Node], nodes: Nodes) -> list[tuple[int, Node]]:
    """Records and their ancestors with their depth, each folder once, nearest first."""
    depths = {node.digest: 0 for node in starts}
    queue = list({node.digest: node for node in starts}.values())
    for current in queue:
        above = {edge.record for edge in current.record.inputs if edge.record in nodes}
        for digest in sorted(above - depths.keys(), key=str):
            depths[str(digest)] = depths[current.digest] + 1
            queue.append(nodes[str(digest)][0])
    return [(depths[one.digest], copy) for one in queue for copy in nodes[one.digest]]


def _released(start: Start, releases: Sequence[Released]) -> Iterator[Answer]:
    """Which releases hold the target."""
    ends = {node.digest for node in start.nodes}
    for release in releases:
        facts = {
            "release digest": release.digest,
            "where": release.where,
            "licence": release.head.licence,
            "signature": release.signature,
            "withdrawn": release.withdrawn,
        }
        title = f"released as {release.name}"
        if not release.is_signed:
            title = f"unsigned, calls itself {release.name}"
        is_marked = release.withdrawn is not None
        match = next(matches(release, start.digests), None)
        if match is not None:
            yield Answer(title, {"match": match, **facts}, is_marked)
        elif not start.answers and release.head.final in ends:
            yield Answer(title, {"match": "record", **facts}, is_marked)
