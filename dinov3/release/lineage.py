"""Print the chain of records from an artifact to the roots, re-hashing what is there.

    python -m dinov3 lineage data/pretrained_checkpoint
    python -m dinov3 lineage 3b5d… --root data

Standard library only: an auditor needs neither torch nor an orchestrator.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dinov3.release.record import (
    RECORD_NAME,
    RUN_NAME,
    Edge,
    Record,
    RecordError,
    file_sha256,
    parse_json,
    read_record,
)
from dinov3.release.tensors import tensor_digest

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Node:
    """A record on disk: its folder, its own digest, its content."""

    folder: Path
    digest: str
    record: Record


class LineageError(ValueError):
    """Nothing to start from: no such path, digest or record."""


def collect(root: Path) -> tuple[dict[str, Node], list[str]]:
    """All records below a folder by their digest, and what is wrong with the unreadable ones."""
    nodes, unreadable = {}, []
    for path in sorted(root.rglob(RECORD_NAME)):
        digest = file_sha256(path)
        try:
            nodes[digest] = Node(path.parent, digest, read_record(path))
        except RecordError as error:
            unreadable.append(str(error))
    return nodes, unreadable


def find(target: str, root: Path, nodes: dict[str, Node]) -> Node:
    """The record that made a path or a digest (of a file, of tensors, of a record).

    Raises:
        LineageError: No record names it.
    """
    path = Path(target)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        found = [node for node in nodes.values() if node.folder.resolve() == folder.resolve()]
        if not found:
            found = [node for node in collect(folder)[0].values() if node.folder == folder]
    elif _DIGEST.fullmatch(target):
        found = [node for node in nodes.values() if _names(node, target)]
    else:
        found = []
    if not found:
        msg = f"{target}: no record below {root} names it. Give a path, a digest, or --root."
        raise LineageError(msg)
    if len({node.digest for node in found}) > 1:
        msg = f"{target}: names {len(found)} records. Give more digits."
        raise LineageError(msg)
    return found[0]


def faults(node: Node) -> Iterator[str]:
    """What on disk differs from a record, file by file."""
    for name, output in node.record.outputs.items():
        path = node.folder / name
        if not path.is_file():
            continue  # shown as absent; what is not here cannot be checked
        if (found := file_sha256(path)) != output.sha256:
            yield f"{path}: changed, its sha256 is {found}, the record says {output.sha256}"
        elif output.tensors is not None and tensor_digest(path) != output.tensors:
            yield f"{path}: the record's tensor digest does not belong to these bytes"
    yield from _run_faults(node)


def _run_faults(node: Node) -> Iterator[str]:
    """`run.json` names its record and the files beside it that inputs do not determine."""
    path = node.folder / RUN_NAME
    if not path.is_file():
        return
    try:
        run = parse_json(path.read_bytes())
        named, beside = run["record"], run["beside"].items()
    except (RecordError, KeyError, TypeError, AttributeError) as error:
        yield f"{path}: not readable: {error}"
        return
    if named != node.digest:
        yield f"{node.folder / RECORD_NAME}: changed, {RUN_NAME} beside it names another record"
    for name, sha256 in beside:
        found = node.folder / name
        if found.is_file() and file_sha256(found) != sha256:
            yield f"{found}: changed, {RUN_NAME} beside it names other bytes"


def chain_faults(node: Node, nodes: dict[str, Node]) -> Iterator[str]:
    """Edges that lead nowhere, or to a record that does not vouch for the bytes."""
    for edge in node.record.inputs:
        if edge.record is None:
            continue
        above = nodes.get(edge.record)
        if above is None:
            yield _lost_record(node, edge, nodes)
        elif edge.name not in above.record.outputs:
            yield f"{node.folder / RECORD_NAME}: {above.record.stage} never wrote {edge.name}"
        elif above.record.outputs[edge.name].sha256 != edge.sha256:
            yield f"{node.folder / RECORD_NAME}: {edge.name} is not what {above.record.stage} wrote"


def _lost_record(node: Node, edge: Edge, nodes: dict[str, Node]) -> str:
    for other in nodes.values():
        output = other.record.outputs.get(edge.name)
        if output is not None and output.sha256 == edge.sha256:
            changed = other.folder / RECORD_NAME
            return f"{changed}: changed, {node.record.stage} was made from another record"
    return f"{node.folder / RECORD_NAME}: the record of its input {edge.name} is not there"


def walk(node: Node, nodes: dict[str, Node]) -> list[tuple[int, Node]]:
    """The node and its ancestors with their depth, each once, nearest first."""
    seen: dict[str, tuple[int, Node]] = {}
    queue = [(0, node)]
    while queue:
        depth, current = queue.pop(0)
        if current.digest in seen:
            continue
        seen[current.digest] = (depth, current)
        above = {edge.record for edge in current.record.inputs if edge.record in nodes}
        queue += [(depth + 1, nodes[digest]) for digest in sorted(above, key=str)]
    return list(seen.values())


def describe(depth: int, node: Node) -> Iterator[str]:
    """Lines that show one record; control characters of any field are escaped."""
    pad = "  " * depth
    record = node.record
    yield f"{pad}{_plain(record.stage)}  record {node.digest[:16]}  {_plain(str(node.folder))}"
    for name, output in sorted(record.outputs.items()):
        tensors = f"  tensors {output.tensors[:16]}" if output.tensors else ""
        absent = "" if (node.folder / name).is_file() else "  (not here, not checked)"
        shown = f"{output.sha256[:16]}  {output.bytes} bytes{tensors}{absent}"
        yield f"{pad}  wrote {_plain(name)}  {shown}"
    for edge in record.inputs:
        origin = f"record {edge.record[:16]}" if edge.record else "the chain begins here"
        yield f"{pad}  read {_plain(edge.role)}: {_plain(edge.name)}  {edge.sha256[:16]}  {origin}"
    if record.licences.get("out"):
        yield f"{pad}  licences {', '.join(_plain(name) for name in record.licences['out'])}"


def main(arguments: list[str] | None = None) -> int:
    """Entry of `dinov3 lineage`.

    Returns:
        0 when everything holds, 1 when something differs, 2 when it could not be checked.
    """
    parser = argparse.ArgumentParser(prog="dinov3 lineage", description=__doc__)
    parser.add_argument("target", help="file, folder of a stage, or digest (8 digits or more)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the records lie")
    options = parser.parse_args(arguments)
    wrong: list[str] = []
    try:
        nodes, wrong = collect(options.root)
        start = find(options.target, options.root, nodes)
        ancestry = walk(start, nodes | {start.digest: start})
        wrong += [fault for _, node in ancestry for fault in faults(node)]
        wrong += [fault for _, node in ancestry for fault in chain_faults(node, nodes)]
    except (LineageError, RecordError, OSError) as error:
        for fault in [*wrong, str(error)]:
            print(f"lineage: {_plain(fault)}", file=sys.stderr)
        return 1 if wrong else 2
    for depth, node in ancestry:
        print("\n".join(describe(depth, node)))
    for fault in wrong:
        print(f"lineage: {_plain(fault)}", file=sys.stderr)
    return 1 if wrong else 0


def _names(node: Node, digest: str) -> bool:
    known = [node.digest]
    known += [output.sha256 for output in node.record.outputs.values()]
    known += [output.tensors for output in node.record.outputs.values() if output.tensors]
    return any(value.startswith(digest) for value in known)


def _plain(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
