"""Print the chain of records from an artifact to the roots, re-hashing what is there.

    python -m dinov3 lineage data/pretrained_checkpoint
    python -m dinov3 lineage 3b5d… --root data

Standard library only: an auditor needs neither torch nor an orchestrator.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dinov3.release.checks import Node, Nodes, chain_faults, faults, known_names, load, locate
from dinov3.release.record import RECORD_NAME, RecordError

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


class LineageError(ValueError):
    """Nothing to start from: no such path, digest or record."""


@dataclass
class Findings:
    """What an audit saw: the chain with its depths, differences, and what it could not check."""

    chain: list[tuple[int, Node]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 when something differs, else 2 when something could not be checked, else 0."""
        return 1 if self.wrong else 2 if self.unchecked else 0


def collect(root: Path) -> tuple[dict[str, list[Node]], list[str]]:
    """All records below a folder by their digest, and what is wrong with the unreadable ones.

    Hidden folders are passed over: what lies beside resumable state is a copy.
    """
    nodes: dict[str, list[Node]] = {}
    unreadable = []
    for path in sorted(root.rglob(RECORD_NAME)):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        try:
            node = load(path.parent)
        except RecordError as error:
            unreadable.append(str(error))
            continue
        if node is not None:
            nodes.setdefault(node.digest, []).append(node)
    return nodes, unreadable


def find(target: str, root: Path, nodes: Nodes) -> Node:
    """The record that made a path or a digest (of a file, of tensors, of a record).

    Raises:
        LineageError: No record names it.
        RecordError: The record beside the path is unreadable.
    """
    every = [node for copies in nodes.values() for node in copies]
    if Path(target).exists():
        folder = _folder_of(Path(target))
        found = [node for node in every if node.folder.resolve() == folder.resolve()]
        outside = None if found else load(folder)
        found += [] if outside is None else [outside]
    elif _DIGEST.fullmatch(target):
        found = [node for node in every if _names(node, target)]
    else:
        found = []
    if not found:
        msg = f"{target}: no record below {root} names it. Give a path, a digest, or --root."
        raise LineageError(msg)
    digests = {node.digest for node in found}
    if len(digests) > 1:
        msg = f"{target}: names {len(digests)} records. Give more digits."
        raise LineageError(msg)
    return found[0]


def _folder_of(path: Path) -> Path:
    """A folder itself; of a file the nearest folder above it that has a record."""
    if path.is_dir():
        return path
    above = [path.parent, *path.parent.resolve().parents]
    return next((folder for folder in above if (folder / RECORD_NAME).exists()), path.parent)


def unrecorded(target: str, node: Node) -> Iterator[str]:
    """A file that lies in a stage's folder is not therefore the stage's."""
    path = Path(target)
    if path.exists() and not path.is_dir():
        name = (path.parent.resolve() / path.name).relative_to(node.folder.resolve()).as_posix()
        if name not in known_names(node):
            yield f"{path}: unrecorded, neither the record nor run.json beside it names it"


def walk(node: Node, nodes: Nodes) -> list[tuple[int, Node]]:
    """The node and its ancestors with their depth, each folder once, nearest first."""
    depths = {node.digest: 0}
    queue = [node]
    for current in queue:
        above = {edge.record for edge in current.record.inputs if edge.record in nodes}
        for digest in sorted(above - depths.keys(), key=str):
            depths[str(digest)] = depths[current.digest] + 1
            queue.append(nodes[str(digest)][0])
    return [(depths[one.digest], copy) for one in queue for copy in nodes[one.digest]]


def audit(target: str, root: Path) -> Findings:
    """Follows a target to the roots and checks every record on the way."""
    findings = Findings()
    try:
        nodes, findings.wrong = collect(root)
        start = find(target, root, nodes)
        if start not in nodes.get(start.digest, ()):
            nodes.setdefault(start.digest, []).insert(0, start)
        findings.wrong.extend(unrecorded(target, start))
        findings.chain = walk(start, nodes)
    except RecordError as error:
        findings.wrong.append(str(error))
    except (LineageError, OSError) as error:
        findings.unchecked.append(str(error))
    chain = {node.digest for _, node in findings.chain}
    for _, node in findings.chain:
        try:
            findings.wrong.extend(faults(node))
            findings.wrong.extend(chain_faults(node, nodes, chain))
        except OSError as error:
            findings.unchecked.append(str(error))
    return findings


def describe(depth: int, node: Node) -> Iterator[str]:
    """Lines that show one record; control characters of any field are escaped."""
    pad = "  " * depth
    record = node.record
    yield f"{pad}{_plain(record.stage)}  record {node.digest[:16]}  {_plain(str(node.folder))}"
    for name, output in sorted(record.outputs.items()):
        tensors = f"  tensors {output.tensors[:16]}" if output.tensors else ""
        shown = f"{output.sha256[:16]}  {output.bytes} bytes{tensors}{_absence(node, name)}"
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
    findings = audit(options.target, options.root)
    for depth, node in findings.chain:
        print("\n".join(describe(depth, node)))
    for fault in dict.fromkeys([*findings.wrong, *findings.unchecked]):
        print(f"lineage: {_plain(fault)}", file=sys.stderr)
    return findings.exit_code


def _absence(node: Node, name: str) -> str:
    try:
        return "" if locate(node.folder, name) else "  (not here, not checked)"
    except (RecordError, OSError):  # named among the faults
        return "  (not checked)"


def _names(node: Node, digest: str) -> bool:
    known = [node.digest]
    known += [output.sha256 for output in node.record.outputs.values()]
    known += [output.tensors for output in node.record.outputs.values() if output.tensors]
    return any(value.startswith(digest) for value in known)


def _plain(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
