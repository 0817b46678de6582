"""A release held against itself: every check of the verifier, in order, and what each rests on.

First what is cheap and decides what may be opened at all, then the bytes, then who signed them, and
only then what the signed files say. The first thing that does not hold ends it with a `Refused`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov3.release.artifacts import check_artifacts
from dinov3.release.binding import check_evaluation, check_images, check_weights
from dinov3.release.chain import Chain, read_chain
from dinov3.release.contents import HEADS_NAME, MODEL_NAME, REQUIRED, Contents
from dinov3.release.documents import check_documents
from dinov3.release.envelope import open_among, read_unchecked
from dinov3.release.files import (
    SIGNATURE_NAME,
    SUMS_NAME,
    Listing,
    check_file,
    is_large,
    match_sums,
    release_digest,
)
from dinov3.release.gate_list import check_dedup, check_gates, check_licences, read_gates
from dinov3.release.head import Head, read_head
from dinov3.release.images import IMAGES_NAME
from dinov3.release.policy import GATES, MODEL, ImageCounts
from dinov3.release.policy_terms import policy_text
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import Refused
from dinov3.release.revoked import read_revoked
from dinov3.release.signature import Signer, verify_signature

_FOLDERS = {"records": ".json", "runs": ".json", "events": ".jsonl", "licences": ".txt"}
_TOP = {*REQUIRED, HEADS_NAME, IMAGES_NAME, SUMS_NAME, SIGNATURE_NAME}
_ON_WORD = ("training_health", "manifest_verdict")
_SLACK = 16 << 20  # bytes beyond what a record says: smaller lies are told by their own names
_ALWAYS_OPEN = (
    "that the training took place: records and logs agree with each other, no more",
    "when anything happened: every time in it is what some machine said",
    "that it is the newest and not withdrawn, and that nobody stole the key",
    "that pictures, labels and licences were what the image table says of them",
)


@dataclass(frozen=True)
class Question:
    """What is asked of a release.

    Attributes:
        key: Public key in PEM of who must have signed; None leaves the signer open.
        expect: `MODEL@VERSION` it must be.
        revoked: The list of revoked keys.
        artifacts: Folder of artifacts; those of the chain that lie there are hashed again.
        needs_artifacts: Whether it stays undecided where nothing of the chain lies there; of a lone
            file the folder was given to find releases in.
        images: `images.bin`, where the release holds its digest alone or keyed digests.
        withdrawals: Envelopes of a store; what is not asked of a store is None.
        published: Release digest by `MODEL@VERSION`, of a store.
        withdrawn: Why releases were withdrawn by a store's own word, by `MODEL@VERSION`.
    """

    key: bytes | None = None
    expect: str | None = None
    revoked: Path | None = None
    artifacts: Path | None = None
    needs_artifacts: bool = True
    images: Path | None = None
    withdrawals: Sequence[bytes] | None = None
    published: Mapping[str, str] | None = None
    withdrawn: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One thing that holds, and what it rests on."""

    what: str
    rests_on: str


@dataclass
class Audit:
    """What was found so far; complete once `audit_release` has returned."""

    name: str | None = None
    digest: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    signer: Signer = field(default_factory=lambda: Signer(None, None))
    holds: list[Line] = field(default_factory=list)
    waivers: list[str] = field(default_factory=list)
    obligations: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    roots: list[dict[str, Any]] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)

    def note(self, what: str, rests_on: str) -> None:
        """Adds a line."""
        self.holds.append(Line(what, rests_on))


def audit_release(folder: Path, question: Question, audit: Audit | None = None) -> Audit:
    """Holds a release directory against itself and against what is asked.

    Args:
        folder: The release.
        question: What else must hold.
        audit: Is filled as the checks go, so that a refusal leaves what came before it.

    Returns:
        What holds; `not_checked` is empty where nothing that decides was left open.

    Raises:
        Refused: With the name of what does not hold.
        CannotCheck: Something cannot be read, or is of a newer schema.
    """
    audit = Audit() if audit is None else audit
    listing = match_sums(folder)
    check_names(listing.sizes)
    # Before the bytes are hashed: who is no signer cannot make us hash for hours.
    audit.signer = verify_signature(folder, listing.sha256s, question.key)
    contents = _check_files(folder, listing, audit)
    _note_signer(audit)
    head = read_head(contents)
    audit.name = head.name
    _check_asked(head, question, audit)
    chain = _check_chain(contents, head, audit)
    check_weights(contents, head, chain)
    weights = contents.hashes[MODEL_NAME]
    audit.note(
        f"weights: sha256 {weights.sha256[:16]}, tensors {str(weights.tensors)[:16]}",
        f"their bytes, and what {chain.final.stem} wrote",
    )
    report = check_evaluation(contents, chain)
    _note_figures(report, audit)
    counts, open_ends = check_images(contents, head, chain, question.images)
    _note_images(counts, open_ends, audit)
    gates = _check_rules(contents, head, chain, report, counts, audit)
    check_documents(contents, head, chain, report)
    audit.note(
        "provenance, bill of materials and model card name the same weights and figures",
        "release.json and evals.json",
    )
    _check_artifacts(question, chain, gates, audit)
    audit.not_proven += _ALWAYS_OPEN
    return audit


def check_names(names: Collection[str]) -> None:
    """Every file has a place in a release, and those that each release needs are there.

    Raises:
        Refused: `file-missing` or `file-unlisted`.
    """
    for name in REQUIRED:
        if name not in names:
            raise Refused("file-missing", name, "a release needs it")
    for name in names:
        folder, _, rest = name.rpartition("/")
        known = name in _TOP if not folder else rest.endswith(_FOLDERS.get(folder, "\0"))
        if not known:
            raise Refused("file-unlisted", name, "has no place in a release")


def _check_files(folder: Path, listing: Listing, audit: Audit) -> Contents:
    """Hashes every file: first the small ones, whose records say how large the others may be."""
    expected = {**listing.sha256s}
    if audit.signer.sha256 is not None:
        expected[SIGNATURE_NAME] = audit.signer.sha256
    small = [name for name in listing.sizes if not is_large(name)]
    found = {name: check_file(folder, name, expected.get(name)) for name in small}
    _check_sizes(Contents(folder, found), listing)
    for name in listing.sizes.keys() - found.keys():
        found[name] = check_file(folder, name, expected.get(name))
    found = {name: found[name] for name in listing.sizes}
    audit.hashes = {name: one.sha256 for name, one in found.items()}
    audit.tensors = frozenset(one.tensors for one in found.values() if one.tensors)
    audit.digest = release_digest(found)
    size = sum(one.bytes for one in found.values())
    audit.note(f"{len(found)} files, {size} bytes, none more and none changed", "SHA256SUMS")
    return Contents(folder, found)


def _check_sizes(contents: Contents, listing: Listing) -> None:
    """No file of any size is larger than what some record says was written.

    Raises:
        Refused: `file-changed`.
    """
    written = [0]
    for name in contents.hashes:
        if name.startswith("records/"):
            written += _sizes_in(contents.read(name))
    for name, size in listing.sizes.items():
        if is_large(name) and size > max(written) + _SLACK:
            why = f"larger than anything the records speak of, {size} bytes"
            raise Refused("file-changed", name, why)


def _sizes_in(record: bytes) -> list[int]:
    """Sizes of the large outputs of a record; of a malformed one, which the chain names, none."""
    try:
        outputs = parse_json(record)["outputs"].items()
        sizes = [output["bytes"] for name, output in outputs if is_large(name)]
    except (RecordError, AttributeError, KeyError, TypeError):
        return []
    return [size for size in sizes if isinstance(size, int)]


def _note_signer(audit: Audit) -> None:
    signer = audit.signer
    if signer.fingerprint is not None:
        audit.note(f"signed by {signer.fingerprint}", "the key that was given")
    elif signer.hint is not None:
        audit.not_checked.append("who signed it: no --key was given")
    else:
        audit.not_checked.append("who made it: it is unsigned, and no --key was given")


def _check_asked(head: Head, question: Question, audit: Audit) -> None:
    """The name, the revoked keys, and what a store says of the release."""
    if question.expect is not None and question.expect != head.name:
        why = f"is {head.name}, {question.expect} was expected"
        raise Refused("wrong-release", "release.json", why)
    if question.revoked is not None:
        _check_revoked(question.revoked, audit)
    if question.published is not None:
        _check_store(head, question.published, audit)
    spoken = [
        _check_withdrawal(envelope, head, question.key, audit)
        for envelope in question.withdrawals or ()
    ]
    reason = question.withdrawn.get(head.name)
    if reason is not None and not any(spoken):
        audit.not_checked.append(f"whether it was withdrawn: the store says {reason}")


def _check_revoked(path: Path, audit: Audit) -> None:
    revoked = read_revoked(path)
    signer = audit.signer.fingerprint
    if signer is None:
        audit.not_checked.append("whether the key that signed was revoked: no --key was given")
        return
    found = revoked.get(signer)
    if found is not None:
        why = f"{signer} was revoked on {found.date}: {found.reason}"
        raise Refused("key-revoked", SIGNATURE_NAME, why)
    audit.note(f"the signer is none of {len(revoked)} revoked keys", path.name)


def _check_store(head: Head, published: Mapping[str, str], audit: Audit) -> None:
    there = published.get(head.name)
    if there is None:
        audit.not_checked.append(f"the store: it has no {head.name}")
    elif there != audit.digest:
        why = f"the store has {head.name} with other bytes, release digest {there[:16]}"
        raise Refused("wrong-release", "release.json", why)
    else:
        audit.note(f"the store has {head.name} with these bytes", "the store's index")


def _check_withdrawal(envelope: bytes, head: Head, key: bytes | None, audit: Audit) -> bool:
    """A withdrawal counts if the key that is trusted signed it; else it is only told.

    Returns:
        Whether it speaks of this release.
    """
    try:
        said = read_unchecked(envelope, "withdraw")
    except Refused as error:  # what the store says of this release is asked apart from it
        audit.not_proven.append(f"a withdrawal in the store that cannot be read: {error}")
        return False
    if (said["model"], said["version"], said["release"]) != (
        head.model,
        head.version,
        audit.digest,
    ):
        return False
    try:
        open_among(envelope, [] if key is None else [key], "withdraw")
    except Refused:
        audit.not_checked.append(
            f"who withdrew it in the store: {said['signer']} says {said['reason']}"
        )
        return True
    raise Refused("withdrawn", head.name, str(said["reason"]))


def _check_chain(contents: Contents, head: Head, audit: Audit) -> Chain:
    chain = read_chain(contents, head)
    audit.note(
        f"{len(chain.links)} records lead from the weights and their evaluation to the roots",
        "the digest of each record and of what it wrote",
    )
    for link in chain.links.values():
        if link.events is not None:
            audit.note(
                f"{link.record.stage}: {link.events.last} steps, "
                f"{link.events.num_lines} lines of events",
                "record, run.json and events agree with each other",
            )
    for root in chain.roots:
        audit.roots.append(
            {
                "role": root.role,
                "name": root.name,
                "sha256": root.sha256,
                "licences": list(root.licences),
                "training_data": root.training_data,
            }
        )
    for name in chain.unknown_roots:
        audit.not_proven.append(f"anything below external root {name}: training data unknown")
    return chain


def _note_figures(report: Mapping[str, Any], audit: Audit) -> None:
    rows = report.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("subject") == MODEL:
            fields = ("protocol", "metric", "k", "value", "low", "high", "num_samples")
            figure = {name: row[name] for name in fields if name in row}
            contamination = report["dataset"]["contamination"]
            audit.figures.append({**figure, "contamination": contamination})
    audit.note(f"{len(audit.figures)} figures are of these weights", "evals.json and its record")


def _note_images(counts: ImageCounts | None, open_ends: Sequence[str], audit: Audit) -> None:
    if counts is not None:
        audit.note(
            f"{counts.num_trained} images trained on, {counts.num_evaluated} evaluated on, "
            "none of them both",
            f"{IMAGES_NAME} and the record of the curated dataset",
        )
        audit.not_proven += open_ends
    else:
        audit.not_checked += open_ends


def _check_rules(
    contents: Contents,
    head: Head,
    chain: Chain,
    report: Mapping[str, Any],
    counts: ImageCounts | None,
    audit: Audit,
) -> list[dict[str, Any]]:
    check_dedup(head, chain)
    audit.note(f"the policy asks: {policy_text(head.policy)}", "release.json, its signer's choice")
    audit.obligations += check_licences(contents, head, chain)
    gates = read_gates(contents)
    again, waivers = check_gates(gates, head, chain, report, counts)
    audit.waivers += waivers
    on_word = [name for name in GATES if name not in again]
    audit.note(f"gates judged again: {', '.join(again)}", "what is in the release")
    audit.note(f"gates that passed or were waived: {', '.join(on_word)}", "the signer's word")
    return gates


def _check_artifacts(
    question: Question, chain: Chain, gates: Sequence[Mapping[str, Any]], audit: Audit
) -> None:
    judged: frozenset[str] = frozenset()
    if question.artifacts is not None:
        here = check_artifacts(question.artifacts, chain, gates, audit.note)
        judged = here.judged
        is_open = question.needs_artifacts and not here.num_found
        open_ends = audit.not_checked if is_open else audit.not_proven
        open_ends += here.open_ends
    for name in _ON_WORD:
        if name not in judged:
            audit.not_proven.append(f"the gate {name}: its evidence is no part of a release")
