"""What on disk differs from a record, and which edges of a chain do not hold.

A record is data of unknown origin: names in it are looked up only below its own folder, and only
regular files are ever opened.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.release.opening import open_regular
from dinov3.release.record import (
    MAX_DOCUMENT,
    RECORD_NAME,
    RUN_NAME,
    Edge,
    Output,
    Record,
    RecordError,
    digest_of,
    parse_json,
    parse_record,
)
from dinov3.release.refusals import Refused
from dinov3.release.tensors import FileHash, hash_stream


@dataclass(frozen=True)
class Node:
    """A record on disk: its folder, its own digest, its content.

    In a release records and files stand elsewhere: `name` and `run` are those of the two records,
    `places` tells which outputs are here and under which names; None says all under their own.
    """

    folder: Path
    digest: str
    record: Record
    name: str = RECORD_NAME
    run: str = RUN_NAME
    places: Mapping[str, str] | None = None

    @property
    def path(self) -> Path:
        """The record's file."""
        return self.folder / self.name

    def find(self, name: str) -> Path | None:
        """Where a file that the record or `run.json` names lies; None when it is not here.

        Raises:
            RecordError: As `locate`.
        """
        if self.places is None:
            return locate(self.folder, name)
        place = self.places.get(name)
        return None if place is None else locate(self.folder, place)


Nodes = Mapping[str, Sequence[Node]]  # by the record's digest: copies lie in several folders


def locate(folder: Path, name: str) -> Path | None:
    """The regular file of a name below a folder; None when nothing is there.

    Raises:
        RecordError: The name leads out of the folder, or to something that is no regular file.
    """
    path = folder / name
    if _leaves(name):
        msg = f"{folder}: a name leaves the folder or is no name, got {name!r}"
        raise RecordError(msg)
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except RuntimeError as error:
        msg = f"{path}: a loop of symbolic links"
        raise RecordError(msg) from error
    if not inside:
        msg = f"{path}: a symbolic link that leaves the folder"
        raise RecordError(msg)
    if path.is_file():
        return path
    if path.is_symlink() or path.exists():
        msg = f"{path}: not a regular file"
        raise RecordError(msg)
    return None


def load(folder: Path) -> Node | None:
    """The record of a folder; None when it has none.

    Raises:
        RecordError: It is unreadable or no regular file.
    """
    path = locate(folder, RECORD_NAME)
    if path is None:
        return None
    data = read_found(path)  # once: what is believed is what its digest is of
    return Node(folder, hashlib.sha256(data).hexdigest(), parse_record(data, str(path)))


def read_found(path: Path) -> bytes:
    """The bytes of a document that `locate` found; of one that is too large only enough to tell.

    Raises:
        RecordError: By now it is a pipe or a device, which is not waited for.
    """
    with _open(path) as stream:
        return stream.read(MAX_DOCUMENT + 1)


def _open(path: Path) -> FileIO:
    try:
        return open_regular(path.resolve())
    except Refused as error:
        msg = f"{path}: {error.why}"
        raise RecordError(msg) from error


def faults(node: Node, names: Collection[str] | None = None) -> Iterator[str]:
    """What is wrong with one record: within itself, its files, and `run.json` beside it.

    Args:
        node: The record.
        names: The outputs to be hashed; by default all.
    """
    record = node.record
    if digest_of(record.config) != record.config_digest:
        yield f"{node.path}: config_digest is not the digest of its config"
    lost = set(record.licences.get("in", ())) - set(record.licences.get("out", ()))
    if lost:
        yield f"{node.path}: its outputs drop licences of its inputs: {_listed(lost)}"
    for name, output in record.outputs.items():
        if names is not None and name not in names:
            continue
        try:
            yield from _output_faults(node, name, output)
        except RecordError as error:
            yield str(error)
    yield from _run_faults(node)


def _output_faults(node: Node, name: str, output: Output) -> Iterator[str]:
    weights = PurePosixPath(name).suffix == ".safetensors"
    if weights and output.tensors is None:
        yield f"{node.path}: no tensor digest of {name}"
    path = node.find(name)
    if path is None:
        return  # shown as absent; what is not here cannot be checked
    found, malformed = _hash(path, weights=output.tensors is not None)
    if found.sha256 != output.sha256:
        yield f"{path}: changed, its sha256 is {found.sha256}, the record says {output.sha256}"
    elif found.bytes != output.bytes:
        yield f"{path}: has {found.bytes} bytes, the record says {output.bytes}"
    elif malformed is not None:
        yield f"{path}: {malformed}"
    elif output.tensors is not None and found.tensors != output.tensors:
        yield f"{path}: the record's tensor digest does not belong to these bytes"


def _run_faults(node: Node) -> Iterator[str]:
    """`run.json` names its record and the files beside it that inputs do not determine."""
    try:
        run = read_run(node)
    except RecordError as error:
        yield str(error)
        return
    if run is None:
        return
    if run["record"] != node.digest:
        yield f"{node.path}: changed, {RUN_NAME} beside it names another record"
    for name, sha256 in run["beside"].items():
        try:
            found = node.find(name)
            if found is not None and _hash(found, weights=False)[0].sha256 != sha256:
                yield f"{found}: changed, {RUN_NAME} beside it names other bytes"
        except RecordError as error:
            yield str(error)


def known_names(node: Node) -> set[str]:
    """The files of a stage's folder that its record and `run.json` speak of."""
    try:
        run = read_run(node)
    except RecordError:  # a fault of the node already
        run = None
    beside = set() if run is None else set(run["beside"])
    return {RECORD_NAME, RUN_NAME, *node.record.outputs, *beside}


def chain_faults(node: Node, nodes: Nodes, chain: Collection[str]) -> Iterator[str]:
    """Edges that lead nowhere, or to a record that does not vouch for the bytes.

    Args:
        node: The record whose edges are followed.
        nodes: All records.
        chain: Digests of the records that the chain is made of.
    """
    for edge in node.record.inputs:
        if edge.record is None:
            continue
        above = nodes.get(edge.record)
        if above:
            yield from _edge_faults(node, edge, above[0].record)
            yield from _stood_in(node, edge, nodes, chain)
        else:
            yield _lost_record(node, edge, nodes)


def _edge_faults(node: Node, edge: Edge, above: Record) -> Iterator[str]:
    output = above.outputs.get(edge.name)
    if output is None:
        yield f"{node.path}: {above.stage} never wrote {edge.name}"
    elif output.sha256 != edge.sha256:
        yield f"{node.path}: {edge.name} is not what {above.stage} wrote"
    lost = set(above.licences.get("out", ())) - set(node.record.licences.get("in", ()))
    if lost:
        yield f"{node.path}: drops licences of its input {edge.name}: {_listed(lost)}"


def _stood_in(node: Node, edge: Edge, nodes: Nodes, chain: Collection[str]) -> Iterator[str]:
    """A bare copy of the old record must not hide that the one with the files was changed."""
    above = nodes[str(edge.record)]
    if any(_is_there(one, edge.name) for one in above):
        return
    stage = above[0].record.stage
    for other in _all(nodes):
        wrote = other.record.outputs.get(edge.name)
        if other.digest in chain or wrote is None:
            continue
        if other.record.stage == stage or wrote.sha256 == edge.sha256:
            yield f"{other.path}: changed, {node.record.stage} was made from another record"


def _lost_record(node: Node, edge: Edge, nodes: Nodes) -> str:
    for other in _all(nodes):
        output = other.record.outputs.get(edge.name)
        if output is not None and output.sha256 == edge.sha256:
            return f"{other.path}: changed, {node.record.stage} was made from another record"
    return f"{node.path}: the record of its input {edge.name} is not there"


def _all(nodes: Nodes) -> Iterator[Node]:
    for copies in nodes.values():
        yield from copies


def read_run(node: Node) -> dict[str, Any] | None:
    """`run.json` of a record; None when it is not here.

    Raises:
        RecordError: It is unreadable, or names no record.
    """
    path = locate(node.folder, node.run)
    if path is None:
        return None
    try:
        run = parse_json(read_found(path))
    except RecordError as error:
        msg = f"{path}: {error}"
        raise RecordError(msg) from error
    if not isinstance(run, dict) or not isinstance(run.get("beside"), dict) or "record" not in run:
        msg = f"{path}: not readable: names no record, or no files beside it"
        raise RecordError(msg)
    return run


def _hash(path: Path, *, weights: bool) -> tuple[FileHash, str | None]:
    """Identity of a file, and why it has no tensor digest although it is of weights."""
    with _open(path) as stream:
        try:
            return hash_stream(stream, weights=weights), None
        except RecordError as error:
            return hash_stream(stream, weights=False), str(error)


def _is_there(node: Node, name: str) -> bool:
    try:
        return node.find(name) is not None
    except RecordError:  # a fault of the node already
        return False


def _leaves(name: str) -> bool:
    """Judged by the words alone, before the file system is asked."""
    pure = PurePosixPath(name)
    odd = "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name)
    return odd or pure.is_absolute() or ".." in pure.parts or not pure.parts


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
