"""The release gates: what must hold of a chain of artifacts before it is signed.

    chain  clean_code  training_health  manifest_verdict  evaluation  contamination  licences

Each takes evidence as it lies on disk and gives a `Verdict`. The rules are in
`dinov3.release.policy`, which whoever verifies the release applies again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov3.release.checks import Node, Nodes, chain_faults, faults, locate
from dinov3.release.images import (
    IMAGES_NAME,
    ROLE_EVALUATED,
    ROLE_TRAINED,
    read_images,
)
from dinov3.release.policy import (
    GATES,
    ImageCounts,
    Policy,
    PolicyError,
    Verdict,
    held_out_faults,
    judge_chain,
    judge_clean_code,
    judge_contamination,
    judge_evaluation,
    judge_health,
    judge_licences,
    judge_manifest,
)
from dinov3.release.policy_terms import NO_WEIGHTS
from dinov3.release.record import RUN_NAME, Record, RecordError, parse_object
from dinov3.release.record_rules import (
    HEALTH_NAME,
    datasets_of,
    record_faults,
    root_licences,
    trains,
)
from dinov3.release.refusals import Refused
from dinov3.stage import EVENTS_NAME

WEIGHTS_NAMES = ("backbone.safetensors", "dinotxt.safetensors")
MANIFEST_NAME = "manifest.parquet"
REPORT_NAME = "report.json"
VERDICT_NAME = "verdict.json"


@dataclass(frozen=True)
class Root:
    """Something that was not made here; `is_unknown` where nobody knows what it was trained on."""

    role: str
    name: str
    sha256: str
    licences: tuple[str, ...]
    is_unknown: bool


@dataclass(frozen=True)
class Evidence:
    """The chain that a release is made of.

    Attributes:
        nodes: Every record that the weights or their evaluation are made from, inputs first.
        copies: All records that were found, by digest.
        final: The record of the weights.
        evaluation: The record of their report.
        unreadable: Where the chain is cut, what is wrong with records that could not be read.
        texts: Where the text of each licence that is named lies; None where there is none.
    """

    nodes: tuple[Node, ...]
    copies: Nodes
    final: Node
    evaluation: Node
    unreadable: tuple[str, ...] = ()
    texts: Mapping[str, Path | None] | None = None

    @property
    def records(self) -> dict[str, Record]:
        """All of the chain, by digest."""
        return {node.digest: node.record for node in self.nodes}

    @property
    def licences(self) -> tuple[str, ...]:
        """Of the weights and of what they were judged by."""
        found: set[str] = set()
        for node in (self.final, self.evaluation):
            found.update(node.record.licences.get("out", ()))
        return tuple(sorted(found))

    @property
    def roots(self) -> tuple[Root, ...]:
        """Where the chain begins, each once, sorted."""
        found = root_licences(self.records)
        return tuple(
            Root(*key, tuple(sorted(licences)), is_unknown=key[0] not in NO_WEIGHTS)
            for key, licences in sorted(found.items())
        )

    @property
    def unknown_roots(self) -> tuple[str, ...]:
        """Names of those whose training data nobody knows."""
        return tuple(sorted({root.name for root in self.roots if root.is_unknown}))

    def writers_of(self, name: str) -> tuple[Node, ...]:
        """The nodes whose record names such a file among its outputs."""
        return tuple(node for node in self.nodes if name in node.record.outputs)


def stem(node: Node) -> str:
    """What a release calls a record: its stage and the beginning of its digest."""
    return f"{node.record.stage}-{node.digest[:12]}"


def weights_name(node: Node) -> str | None:
    """The file of weights among a record's outputs; None where there is none."""
    return next((name for name in WEIGHTS_NAMES if name in node.record.outputs), None)


def judge_all(evidence: Evidence, policy: Policy) -> list[Verdict]:
    """Every gate's verdict, in the fixed order."""
    return [_GATES[name](evidence, policy) for name in GATES]


def chain_gate(evidence: Evidence, _: Policy) -> Verdict:
    """Every record is there and every file that one names, with the bytes it names."""
    found = dict.fromkeys([*_chain_faults(evidence), *evidence.unreadable])
    return judge_chain(len(evidence.nodes), list(found))


def clean_code_gate(evidence: Evidence, _: Policy) -> Verdict:
    """Every stage ran with the code of a commit."""
    runs = {}
    for node in evidence.nodes:
        try:
            run = _read(node, RUN_NAME)
        except PolicyError:  # the chain's gate names it
            run = {}
        runs[stem(node)] = run
    return judge_clean_code(runs)


def health_gate(evidence: Evidence, policy: Policy) -> Verdict:
    """Every training run took all its steps and ended in health."""
    health, failed = {}, []
    for node in evidence.nodes:
        steps = node.record.steps
        if not trains(node.record):  # what wrote weights all the same, the chain's gate judges
            continue
        name, performed, planned = stem(node), steps.get("performed"), steps.get("planned")
        try:
            health[name] = _read_recorded(node, HEALTH_NAME)
        except PolicyError as error:
            health[name] = {"passed": False, "reason": str(error)}
        if performed != planned:
            failed.append(f"{name}: took {performed} of {planned} steps")
    return _also(judge_health(health, policy), failed)


def manifest_gate(evidence: Evidence, _: Policy) -> Verdict:
    """Every image table of the chain passed its own expectations."""
    verdict = judge_manifest(None)
    for node in evidence.writers_of(MANIFEST_NAME):
        try:
            verdict = judge_manifest(_read_recorded(node, VERDICT_NAME))
        except PolicyError as error:
            verdict = _also(judge_manifest({}), [str(error)])
        if not verdict.passed:
            break
    return verdict


def evaluation_gate(evidence: Evidence, policy: Policy) -> Verdict:
    """The report is of these very weights, and its intervals are as good as asked."""
    try:
        report = _read_recorded(evidence.evaluation, REPORT_NAME)
        verdict = judge_evaluation(report, policy, unknown_roots=evidence.unknown_roots)
    except PolicyError as error:
        return Verdict("evaluation", False, None, None, str(error))
    return _also(verdict, list(_unbound(evidence, report)))


def contamination_gate(evidence: Evidence, policy: Policy) -> Verdict:
    """No image was both trained and evaluated on, and near-duplicates left as strictly as asked."""
    writers = evidence.writers_of(IMAGES_NAME)
    try:
        if len(writers) > 1:
            msg = f"one curated dataset is needed, got {len(writers)} in the chain"
            raise PolicyError(msg)
        counts = count_images(writers[0]) if writers else None
        dedup = writers[0].record.config.get("dedup") if writers else None
        verdict = judge_contamination(counts, dedup, policy, unknown_roots=evidence.unknown_roots)
        return _also(verdict, list(_other_images(evidence, writers, counts)))
    except PolicyError as error:
        return Verdict("contamination", False, None, None, str(error))


def _other_images(
    evidence: Evidence, writers: Sequence[Node], counts: ImageCounts | None
) -> Iterator[str]:
    """How training or evaluation used other images than those that are listed."""
    listed = {node.digest for node in writers}
    for node in evidence.nodes:
        if not datasets_of(node.record) <= listed:
            yield f"{stem(node)}: read a dataset whose images are not listed"
    if counts is not None:
        report = _read_recorded(evidence.evaluation, REPORT_NAME)
        yield from held_out_faults(report, counts.num_evaluated, writers[0].record.facts)


def licences_gate(evidence: Evidence, policy: Policy) -> Verdict:
    """The licence of the release suits those of its inputs, and each text goes along."""
    texts = evidence.texts or {}
    absent = [f"{name}: no text of this licence" for name in sorted(texts) if texts[name] is None]
    return _also(judge_licences(evidence.licences, policy), absent)


def count_images(node: Node) -> ImageCounts:
    """Images of each kind in a curated dataset's list.

    Raises:
        PolicyError: It is not there or malformed.
    """
    try:
        with read_images(node.folder / IMAGES_NAME) as images:
            tally = images.tally()
    except (OSError, Refused) as error:
        msg = f"{node.record.stage}: {IMAGES_NAME}: {error}"
        raise PolicyError(msg) from error
    counts = tally.counts
    return ImageCounts(counts.get(ROLE_TRAINED, 0), counts.get(ROLE_EVALUATED, 0), tally.overlap)


_GATES: Mapping[str, Callable[[Evidence, Policy], Verdict]] = {
    "chain": chain_gate,
    "clean_code": clean_code_gate,
    "training_health": health_gate,
    "manifest_verdict": manifest_gate,
    "evaluation": evaluation_gate,
    "contamination": contamination_gate,
    "licences": licences_gate,
}


def _chain_faults(evidence: Evidence) -> Iterator[str]:
    digests, records = {node.digest for node in evidence.nodes}, evidence.records
    for node in evidence.nodes:
        yield from faults(node)
        yield from chain_faults(node, evidence.copies, digests)
        yield from (f"{stem(node)}: {why}" for _, why in record_faults(node.record, records))
        yield from _absences(node)


def _absences(node: Node) -> Iterator[str]:
    """What a record names must be here: nothing is vouched for that was not hashed again."""
    names = [RUN_NAME, *node.record.outputs]
    try:
        run = _read(node, RUN_NAME)
    except PolicyError:
        run = {}
    beside = run.get("beside", {})
    names += [name for name in (EVENTS_NAME,) if name in beside or "performed" in node.record.steps]
    for name in names:
        try:
            if locate(node.folder, name) is None:
                yield f"{node.folder / name}: is not there"
        except RecordError as error:
            yield str(error)


def _unbound(evidence: Evidence, report: Mapping[str, Any]) -> Iterator[str]:
    """How the report fails to be of the weights that are to be released."""
    model = report.get("model")
    named = model if isinstance(model, Mapping) else {}
    name = weights_name(evidence.final)
    if name is None or named.get("sha256") != evidence.final.record.outputs[name].sha256:
        yield "the report is of other weights"
    if named.get("record") != evidence.final.digest:
        yield "the report is of weights with another record"
    if all(edge.record != evidence.final.digest for edge in evidence.evaluation.record.inputs):
        yield "the report's record was not made from these weights"


def _read(node: Node, name: str) -> dict[str, Any]:
    """A JSON object beside a record.

    Raises:
        PolicyError: It is not there or not readable.
    """
    try:
        path = locate(node.folder, name)
        if path is None:
            msg = "not there"
            raise RecordError(msg)
        return parse_object(path.read_bytes())
    except (OSError, RecordError) as error:
        msg = f"{node.record.stage}: {name}: {error}"
        raise PolicyError(msg) from error


def _read_recorded(node: Node, name: str) -> dict[str, Any]:
    """A JSON object that the record itself names.

    Raises:
        PolicyError: The record does not, or it is not there or not readable.
    """
    if name not in node.record.outputs:
        msg = f"{node.record.stage}: its record names no {name}"
        raise PolicyError(msg)
    return _read(node, name)


def _also(verdict: Verdict, failed: Sequence[str]) -> Verdict:
    """The verdict with more reasons to fail."""
    if not failed:
        return verdict
    reasons = [*([verdict.reason] if verdict.reason else []), *failed]
    return replace(verdict, passed=False, reason="; ".join(reasons))
