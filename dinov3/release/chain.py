"""The records of a release, followed from the weights and their evaluation to the roots.

Every record stands under its own digest, every edge names the digest of the record above it and of
the bytes that one wrote: whoever changes a record has to change all that is made from it.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinov3.release.contents import Contents, check_schema
from dinov3.release.events import EVENTS_NAME, Events, check_steps, read_events, resumed_at
from dinov3.release.head import LISTED, UNKNOWN, Head, Root
from dinov3.release.policy_terms import NO_WEIGHTS
from dinov3.release.record import SCHEMA, Edge, Record, RecordError, digest_of, parse_record
from dinov3.release.record_rules import (
    RESUME,
    record_faults,
    root_licences,
)
from dinov3.release.refusals import CannotCheck, Refused

_DIGITS = 12  # of a record's digest in its file's name
_MOST = (
    1000  # inputs of a record, and licences: each of the ones is held against each of the others
)


@dataclass(frozen=True)
class Link:
    """One record of the chain with what lies beside it; `events` only where it trained."""

    digest: str
    record: Record
    run: Mapping[str, Any]
    events: Events | None

    @property
    def stem(self) -> str:
        """Name of its files in the release, without folder and ending."""
        return stem_of(self.record.stage, self.digest)


@dataclass(frozen=True)
class Chain:
    """All records, inputs first, and what they begin with."""

    links: Mapping[str, Link]
    final: Link
    evaluation: Link
    roots: tuple[Root, ...]

    @property
    def unknown_roots(self) -> tuple[str, ...]:
        """Names of outside weights, whose training data nobody here knows."""
        return tuple(sorted({one.name for one in self.roots if one.training_data == UNKNOWN}))

    def above(self, start: Link) -> Iterator[Link]:
        """A record and all it is made from, each once."""
        seen, pending = {start.digest}, [start]
        while pending:
            link = pending.pop()
            yield link
            for edge in link.record.inputs:
                if edge.record is not None and edge.record not in seen:
                    seen.add(edge.record)
                    pending.append(self.links[edge.record])

    def writers_of(self, name: str) -> list[Link]:
        """The records that name such a file among their outputs."""
        return [link for link in self.links.values() if name in link.record.outputs]


def stem_of(stage: str, digest: str) -> str:
    """Name of a record's files in a release."""
    return f"{stage}-{digest[:_DIGITS]}"


def read_chain(contents: Contents, head: Head) -> Chain:
    """Reads every record, and checks each edge and all that lies beside it.

    Raises:
        Refused: `record-missing`, `record-unlisted`, `record-malformed`, `edge-broken`,
            `run-differs`, `events-malformed`, `steps-differ`, `licence`, `root-undeclared`,
            `images-differ` or `weights-differ`.
        CannotCheck: A record is of a newer schema.
    """
    records = {
        digest: _read_record(contents, stage, digest) for stage, digest in _listed(contents, head)
    }
    _check_reached(records, head)
    links: dict[str, Link] = {}
    for _, digest in head.records:
        record = records[digest]
        for edge in record.inputs:
            if edge.record is not None:
                _check_edge(stem_of(record.stage, digest), edge, records[edge.record])
        _check_inheritance(stem_of(record.stage, digest), record, records)
        for refusal, why in record_faults(record, records):
            raise Refused(refusal, stem_of(record.stage, digest), why)
        links[digest] = _read_beside(contents, digest, record, links)
    _check_continued(links)
    roots = _check_roots(records, head)
    return Chain(links, links[head.final], links[head.evaluation], roots)


def _listed(contents: Contents, head: Head) -> tuple[tuple[str, str], ...]:
    """What `release.json` lists, after it was compared with the files that are here."""
    digests = [digest for _, digest in head.records]
    if len(set(digests)) != len(digests):
        raise Refused("record-unlisted", "release.json", "lists a record twice")
    for digest in (head.final, head.evaluation):
        if digest not in digests:
            raise Refused("record-missing", "release.json", f"does not list record {digest[:16]}")
    for stage, digest in head.records:
        name = f"records/{stem_of(stage, digest)}.json"
        if name not in contents.hashes:
            raise Refused("record-missing", name, "release.json lists it")
        if contents.hashes[name].sha256 != digest:
            raise Refused("record-missing", name, "another record stands in its place")
    stems = {stem_of(stage, digest) for stage, digest in head.records}
    if len(stems) != len(digests):
        raise Refused("record-unlisted", "release.json", "two records of one name")
    for name in contents.hashes:
        folder, _, rest = name.partition("/")
        if folder in ("records", "runs", "events") and rest.rpartition(".")[0] not in stems:
            raise Refused("record-unlisted", name, "release.json lists no such record")
    return head.records


def _read_record(contents: Contents, stage: str, digest: str) -> Record:
    name = f"records/{stem_of(stage, digest)}.json"
    raw, data = contents.read_object(name), contents.read(name)
    check_schema(raw.get("schema"), SCHEMA, name)
    try:
        record = parse_record(data, name)
    except RecordError as error:
        raise Refused("record-malformed", name, str(error)) from error
    if record.to_bytes() != data:
        raise Refused("record-malformed", name, "fields are left out that a record always has")
    if max(map(len, (record.inputs, *record.licences.values()))) > _MOST:
        raise Refused("record-malformed", name, f"more than {_MOST} inputs, or licences")
    if record.stage != stage:
        raise Refused("record-malformed", name, f"its stage is {record.stage!r}, not {stage}")
    if digest_of(record.config) != record.config_digest:
        raise Refused("record-malformed", name, "config_digest is not the digest of its config")
    return record


def _check_reached(records: Mapping[str, Record], head: Head) -> None:
    """The list is what both ends lead to, no more, in the one order that is right."""
    reached: set[str] = set()
    pending = [head.final, head.evaluation]
    while pending:
        digest = pending.pop()
        if digest in reached:
            continue
        reached.add(digest)
        for edge in records[digest].inputs:
            if edge.record is None:
                continue
            if edge.record not in records:
                where = stem_of(records[digest].stage, digest)
                why = f"its input {edge.name} is of record {edge.record[:16]}, which is not here"
                raise Refused("record-missing", where, why)
            pending.append(edge.record)
    for digest in records.keys() - reached:
        where = stem_of(records[digest].stage, digest)
        raise Refused("record-unlisted", where, "neither weights nor evaluation lead to it")
    if [digest for _, digest in head.records] != _in_order(records):
        raise Refused("record-unlisted", "release.json", "its records are not in order")


def _in_order(records: Mapping[str, Record]) -> list[str]:
    """Each time the first by stage and digest of those whose inputs all stand before it."""
    waits = {
        digest: {edge.record for edge in record.inputs if edge.record is not None}
        for digest, record in records.items()
    }
    below: dict[str, list[str]] = {digest: [] for digest in records}
    for digest, above in waits.items():
        for one in above:
            below[one].append(digest)
    ready = [(records[digest].stage, digest) for digest, above in waits.items() if not above]
    heapq.heapify(ready)
    done: list[str] = []
    while ready:
        _, digest = heapq.heappop(ready)
        done.append(digest)
        for one in below[digest]:
            waits[one].discard(digest)
            if not waits[one]:
                heapq.heappush(ready, (records[one].stage, one))
    return done


def _check_edge(where: str, edge: Edge, above: Record) -> None:
    wrote = above.outputs.get(edge.name)
    if wrote is None:
        raise Refused("edge-broken", where, f"{above.stage} never wrote {edge.name!r}")
    if wrote.sha256 != edge.sha256:
        raise Refused("edge-broken", where, f"{edge.name!r} is not what {above.stage} wrote")


def _check_inheritance(where: str, record: Record, records: Mapping[str, Record]) -> None:
    """Licences are handed down."""
    entering, leaving = (set(record.licences.get(side, ())) for side in ("in", "out"))
    inherited: set[str] = set()
    for edge in record.inputs:
        if edge.record is not None:
            inherited.update(records[edge.record].licences.get("out", ()))
    lost = (inherited - entering) | (entering - leaving)
    if lost:
        raise Refused("licence", where, f"drops licences of its inputs: {', '.join(sorted(lost))}")


def _read_beside(
    contents: Contents, digest: str, record: Record, links: Mapping[str, Link]
) -> Link:
    """`run.json` and the log of events, which the record does not bind but they bind each other."""
    stem = stem_of(record.stage, digest)
    run = contents.read_object(f"runs/{stem}.json")
    beside = run.get("beside")
    if run.get("record") != digest:
        raise Refused("run-differs", f"runs/{stem}.json", "names another record")
    if not isinstance(beside, dict):
        raise Refused("run-differs", f"runs/{stem}.json", "names no files beside the record")
    name = f"events/{stem}.jsonl"
    here = contents.hashes.get(name)
    if (None if here is None else here.sha256) != beside.get(EVENTS_NAME):
        raise Refused(
            "run-differs", f"runs/{stem}.json", "names another log of events than is here"
        )
    events = None
    if here is not None:
        start = max((_last_step(links[one]) for one in _ancestors(record)), default=0)
        events = _read_log(contents, name, start, resumed_at(run, stem))
    check_steps(events, record.steps, run, stem)
    planned = _planned(record)
    if events is not None and planned is not None and planned != record.steps.get("planned"):
        why = f"plans {record.steps.get('planned')} steps, its config says {planned}"
        raise Refused("steps-differ", stem, why)
    return Link(digest, record, run, events)


def _read_log(contents: Contents, name: str, start: int, resumed: Sequence[int]) -> Events:
    try:
        events = read_events(contents.folder, name, start=start, resumed=resumed)
    except OSError as error:
        msg = f"{name}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    if events.sha256 != contents.hashes[name].sha256:
        raise Refused("file-changed", name, "changed while it was read")
    return events


def _planned(record: Record) -> Any:
    schedules = record.config.get("schedules")
    return schedules.get("num_steps") if isinstance(schedules, dict) else None


def _ancestors(record: Record) -> list[str]:
    """The finished runs that a run goes on from."""
    return [edge.record for edge in record.inputs if edge.role == RESUME and edge.record]


def _last_step(link: Link) -> int:
    return 0 if link.events is None else link.events.last or 0


def _check_continued(links: Mapping[str, Link]) -> None:
    """A run that goes on from a finished one logs what came after that, and took more steps."""
    for link in links.values():
        for ancestor in _ancestors(link.record) if link.events is not None else ():
            last = _last_step(links[ancestor])
            first = None if link.events is None else link.events.first
            if first is None or first <= last:
                why = f"goes on after step {last}, its log begins at {first}"
                raise Refused("steps-differ", link.stem, why)


def _check_roots(records: Mapping[str, Record], head: Head) -> tuple[Root, ...]:
    """What enters from outside is what `release.json` declares, no better known than it is."""
    found = root_licences(records)
    declared = {(root.role, root.name, root.sha256): root for root in head.roots}
    if declared.keys() != found.keys() or len(declared) != len(head.roots):
        odd = sorted(declared.keys() ^ found.keys())
        named = f"{odd[0][0]}: {odd[0][1]}" if odd else "a root stands twice"
        raise Refused("root-undeclared", "release.json", f"its roots are not the chain's: {named}")
    for key, root in declared.items():
        expected = LISTED if root.role in NO_WEIGHTS else UNKNOWN
        if root.training_data != expected:
            why = f"training data of {root.name!r} is said to be {root.training_data}"
            raise Refused("root-undeclared", "release.json", why)
        if set(root.licences) != found[key]:
            known = ", ".join(sorted(found[key])) or "none"
            why = f"licences of {root.name!r} are not those that its record carries: {known}"
            raise Refused("licence", "release.json", why)
    return head.roots
