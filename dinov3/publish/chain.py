"""The chain of a release, gathered: every record behind the weights and their evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dinov3.errors import DataError, LineageBroken
from dinov3.gates import Evidence
from dinov3.publish.licence_texts import licence_texts
from dinov3.release.checks import Node, Nodes, load, locate
from dinov3.release.index import collect
from dinov3.release.record import RecordError


def gather(
    model: Path,
    report: Path,
    artifacts: Path,
    *,
    licence: str | None = None,
    texts: Sequence[Path | None] = (),
) -> Evidence:
    """Follows the records of weights and report to the roots.

    Args:
        model: Folder of the weights.
        report: Folder of their evaluation.
        artifacts: Folder below which every artifact of the chain lies.
        licence: Of the release; its text is looked for beside those of the inputs.
        texts: Folders of licence texts beyond those that ship with us, see `licence_texts`.

    Raises:
        DataError: A folder has no record, or there is no folder of artifacts.
        LineageBroken: A record of the two is unreadable.
    """
    if not artifacts.is_dir():
        msg = f"artifacts: no such folder, got {artifacts}. Name the one that holds all stages."
        raise DataError(msg)
    copies, unreadable = collect(artifacts)
    final, evaluation = _load(model), _load(report)
    for node in (final, evaluation):
        copies.setdefault(node.digest, []).insert(0, node)
    nodes = _reachable((final, evaluation), copies)
    edges = [edge for node in nodes for edge in node.record.inputs]
    is_cut = any(edge.record is not None and edge.record not in copies for edge in edges)
    missed = tuple(unreadable) if is_cut else ()  # one of them may be the record that is missed
    evidence = Evidence(tuple(nodes), copies, final, evaluation, missed)
    named = [*evidence.licences, *([] if licence is None else [licence])]
    return replace(evidence, texts=licence_texts(named, *texts))


def _load(folder: Path) -> Node:
    try:
        node = load(folder)
    except RecordError as error:
        raise LineageBroken(str(error)) from error
    if node is None:
        msg = f"{folder}: no record there. Make it first: dvc repro."
        raise DataError(msg)
    return node


def _reachable(ends: Sequence[Node], copies: Nodes) -> list[Node]:
    """All records above the given ones that are there, inputs first."""
    found: dict[str, Node] = {}
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node.digest in found:
            continue
        found[node.digest] = node
        for edge in node.record.inputs:
            if edge.record in copies:
                pending.append(_most_complete(copies[str(edge.record)]))
    return _sorted(found)


def _sorted(found: Mapping[str, Node]) -> list[Node]:
    """Each time the first by stage and digest of those whose inputs all stand before it."""
    left = dict(found)
    done: list[Node] = []
    while left:
        ready = (
            node
            for node in left.values()
            if all(edge.record not in left for edge in node.record.inputs)
        )
        first = min(ready, key=lambda node: (node.record.stage, node.digest))
        done.append(left.pop(first.digest))
    return done


def _most_complete(copies: Sequence[Node]) -> Node:
    """Of several folders with one record the one where most of its files lie."""
    return max(copies, key=_num_present)


def _num_present(node: Node) -> int:
    count = 0
    for name in node.record.outputs:
        try:
            count += locate(node.folder, name) is not None
        except RecordError:  # the chain's gate names it
            continue
    return count
