"""What a target names: a stage, a file of one, a release, a lone file, a root or a picture.

A target is a path, `MODEL@VERSION`, or a digest: of a file, of tensors, of a record, of a release,
of a picture. Digests may be shortened to 8 digits where one thing alone begins so.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov3.release.checks import Node, Nodes, known_names, load
from dinov3.release.files import SUMS_NAME, check_file, list_files
from dinov3.release.index import Index, Released, is_release
from dinov3.release.opening import open_regular
from dinov3.release.pictures import find_picture, tells_role
from dinov3.release.record import RECORD_NAME
from dinov3.release.refusals import Refused
from dinov3.release.tensors import WEIGHTS_SUFFIX, FileHash, hash_stream

DIGEST = re.compile(r"[0-9a-f]{8,64}")
_WHOLE = 64  # digits of a digest that is not shortened


class LineageError(ValueError):
    """Nothing to start from: no such path, digest or record."""


@dataclass(frozen=True)
class Answer:
    """Something said of the target, with facts to it; `is_marked` where it should catch the eye."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    is_marked: bool = False


@dataclass
class Start:
    """Where a chain is entered.

    Attributes:
        nodes: The records that made the target, nearest first.
        known: The records that they are followed through.
        digests: sha256 and tensor digest of the target's bytes, where it is a file.
        names: The outputs to hash again; None for all.
    """

    nodes: list[Node] = field(default_factory=list)
    known: Nodes = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    names: Collection[str] | None = None
    answers: list[Answer] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def find(target: str, root: Path, index: Index) -> Start:
    """Where the chain of a path or a digest is entered.

    Raises:
        LineageError: Nothing names it.
        RecordError: The record beside the path is unreadable.
        Refused: The release it lies in does not hold.
    """
    path = Path(target)
    if path.exists():
        found = _of_folder(path, index) if path.is_dir() else _of_file(path, index)
    elif DIGEST.fullmatch(target):
        found = _of_digest(target, index)
    else:
        found = _of_name(target, index)
    if found is None:
        msg = f"{target}: no record below {root} names it. Give another, --root or --store."
        raise LineageError(msg)
    return found


def hash_target(path: Path) -> FileHash:
    """Identity of a file anywhere, links followed; of weights their tensor digest too.

    Raises:
        LineageError: It is a pipe, a socket or a device: nothing is waited for.
        RecordError: It is named as weights and is not well formed.
    """
    try:
        stream = open_regular(path.resolve())
    except Refused as error:
        msg = f"{path}: {error.why}. Name a file of bytes that stay."
        raise LineageError(msg) from error
    with stream:
        return hash_stream(stream, weights=path.suffix == WEIGHTS_SUFFIX)


def _of_name(name: str, index: Index) -> Start | None:
    """`MODEL@VERSION`: the first that is here, or else in a store."""
    found = sorted(
        (one for one in index.releases if one.name == name), key=lambda one: not one.folder
    )
    return _inside(found[0]) if found else None


def _of_folder(path: Path, index: Index) -> Start | None:
    if not is_release(path):
        return _of_stage(path, index)
    release = index.add_release(path)
    return Start() if release is None else _inside(release)  # why is among the faults


def _other_faults(release: Released, folder: Path) -> Iterator[str]:
    """What is wrong with files of a release that no record of it speaks of."""
    hashes = release.contents.hashes
    try:
        present = list_files(folder)
    except Refused as error:
        yield f"{folder}: {error}"
        return
    for name in sorted(present.keys() - hashes.keys()):
        yield f"{folder / name}: unlisted, {SUMS_NAME} does not name it"
    spoken_of = {place for node in release.nodes for place in (node.places or {}).values()}
    for name in sorted(hashes.keys() - spoken_of):
        try:
            check_file(folder, name, hashes[name].sha256)
        except Refused as error:
            yield f"{folder / name}: {error.why}"


def _of_stage(folder: Path, index: Index) -> Start | None:
    """A folder with a record; outside the root it is followed through what is below the root."""
    every = [node for copies in index.nodes.values() for node in copies]
    found = [node for node in every if node.folder.resolve() == folder.resolve()]
    outside = None if found else load(folder)
    if outside is not None:
        index.nodes.setdefault(outside.digest, []).insert(0, outside)
        found = [outside]
    return Start(found[:1], index.nodes) if found else None


def _of_file(path: Path, index: Index) -> Start | None:
    """A file of a stage, of a release, or one that only its bytes tell of."""
    for folder in [path.parent, *path.parent.resolve().parents]:
        if is_release(folder):
            return _in_release(path, folder, index)
        if (folder / RECORD_NAME).exists():
            return _beside_record(path, folder, index)
    return _of_bytes(path, index)


def _beside_record(path: Path, folder: Path, index: Index) -> Start | None:
    """A file that lies in a stage's folder is not therefore the stage's."""
    start = _of_stage(folder, index)
    if start is not None:
        node = start.nodes[0]
        name = (path.parent.resolve() / path.name).relative_to(node.folder.resolve()).as_posix()
        if name not in known_names(node):
            why = "unrecorded, neither the record nor run.json beside it names it"
            start.wrong.append(f"{path}: {why}")
        wrote = node.record.outputs.get(name)
        if wrote is not None:
            start.digests = (wrote.sha256, *([wrote.tensors] if wrote.tensors else []))
    return start


def _in_release(path: Path, folder: Path, index: Index) -> Start:
    release = index.add_release(folder)
    if release is None:
        return Start()
    start = _inside(release)
    name = (path.parent.resolve() / path.name).relative_to(folder.resolve()).as_posix()
    if name in release.contents.hashes:
        start.digests = (release.contents.hashes[name].sha256,)
    return start


def _of_bytes(path: Path, index: Index) -> Start | None:
    """A lone file: known by its bytes, by its tensors, or as a picture."""
    found = hash_target(path)
    for digest in (found.sha256, found.tensors):
        start = None if digest is None else _of_digest(digest, index)
        if start is not None:
            start.digests = (found.sha256, *([found.tensors] if found.tensors else []))
            return start
    return None


def _of_digest(digest: str, index: Index) -> Start | None:
    """Stages know it, else releases, else it is a root, else a picture."""
    every = [node for copies in index.nodes.values() for node in copies]
    return (
        _one_chain(digest, [node for node in every if names(node, digest)], index)
        or _release_of(digest, index)
        or _root_of(digest, index)
        or _picture_of(digest, index)
    )


def _one_chain(digest: str, found: Sequence[Node], index: Index) -> Start | None:
    distinct = _makers(digest, {node.digest: node for node in found}.values())
    if len(distinct) > 1 and len(digest) < _WHOLE:
        msg = f"{digest}: names {len(distinct)} records. Give more digits."
        raise LineageError(msg)
    return Start(distinct, index.nodes, (digest,)) if distinct else None


def _makers(digest: str, found: Collection[Node]) -> list[Node]:
    """The records that made some bytes, where others only copied them, as a release does."""
    sha256s = {
        output.sha256
        for node in found
        for output in node.record.outputs.values()
        if output.sha256.startswith(digest) or (output.tensors or "").startswith(digest)
    }
    made = [
        node for node in found if not any(edge.sha256 in sha256s for edge in node.record.inputs)
    ]
    return made or list(found)


def _release_of(digest: str, index: Index) -> Start | None:
    found = [one for one in index.releases if _release_names(one, digest)]
    if len({one.digest for one in found}) > 1 and len(digest) < _WHOLE:
        msg = f"{digest}: names {len(found)} releases. Give more digits."
        raise LineageError(msg)
    if not found:
        return None
    here = next((one for one in found if one.folder is not None), found[0])
    start = _inside(here)
    start.digests = (digest,)
    return start


def _root_of(digest: str, index: Index) -> Start | None:
    readers = [
        (node, edge)
        for node in index.everywhere().values()
        for edge in node.record.inputs
        if edge.record is None and edge.sha256.startswith(digest)
    ]
    if not readers:
        return None
    answers = [
        Answer(
            f"a root: {node.record.stage} read it as {edge.role}",
            {"name": edge.name, "sha256": edge.sha256, "record": node.digest},
        )
        for node, edge in readers
    ]
    return Start(answers=answers)


def _picture_of(digest: str, index: Index) -> Start | None:
    if len(digest) != _WHOLE:
        return None
    seen = find_picture(bytes.fromhex(digest), index)
    if not any(tells_role(one.facts) for one in seen.found):
        seen.unchecked.extend(seen.silent)
    if not seen.found and not seen.wrong and not seen.unchecked:
        return None
    answers = [Answer(one.title, one.facts, "withdrawn" in one.facts) for one in seen.found]
    known = {key: [node] for key, node in index.everywhere().items()}
    # What the answer was read from is hashed already; the chain is shown, its bytes are not read.
    return Start(seen.nodes, known, (), (), answers, seen.wrong, seen.unchecked)


def _inside(release: Released) -> Start:
    """The chain within a release: of its weights, then of their evaluation."""
    nodes = release.by_digest
    ends = [nodes[digest][0] for digest in (release.head.final, release.head.evaluation)]
    wrong = [] if release.folder is None else list(_other_faults(release, release.folder))
    return Start(ends, nodes, (release.digest,), wrong=wrong)


def matches(release: Released, digests: Collection[str]) -> Iterator[str]:
    """How a release holds what one of some digests begins with."""
    if any(release.digest.startswith(digest) for digest in digests):
        yield "the release itself"
    for name, known in release.contents.hashes.items():
        if any(known.sha256.startswith(digest) for digest in digests):
            yield f"same bytes as {name}"
    for name, tensors in release.head.tensors.items():
        if any(tensors.startswith(digest) for digest in digests):
            yield f"same tensors as {name}, other bytes"


def _release_names(release: Released, digest: str) -> bool:
    if next(matches(release, [digest]), None) is not None:
        return True
    return any(names(node, digest) for node in release.nodes)


def names(node: Node, digest: str) -> bool:
    """Whether a record is, or wrote, what a digest begins with."""
    known = [node.digest]
    known += [output.sha256 for output in node.record.outputs.values()]
    known += [output.tensors for output in node.record.outputs.values() if output.tensors]
    return any(value.startswith(digest) for value in known)
