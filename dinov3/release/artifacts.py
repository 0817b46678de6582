"""The artifacts behind a release, where they are at hand: hashed again, and judged again."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.release.chain import Chain, Link
from dinov3.release.checks import Node, faults, load, locate, read_found
from dinov3.release.contents import CHECKS_NAME
from dinov3.release.policy import judge_manifest
from dinov3.release.record import RECORD_NAME, RUN_NAME, RecordError, parse_json
from dinov3.release.record_rules import HEALTH_NAME, VERDICT_NAME
from dinov3.release.refusals import CannotCheck, Refused

_DEEPEST = 8  # folders below the root


@dataclass(frozen=True)
class Here:
    """What of a chain was found.

    Attributes:
        judged: The gates whose whole evidence was here.
        num_found: Records that lie there.
        open_ends: What of the chain does not, in words.
    """

    judged: frozenset[str]
    num_found: int
    open_ends: tuple[str, ...]


def check_artifacts(
    root: Path,
    chain: Chain,
    gates: Sequence[Mapping[str, Any]],
    note: Callable[[str, str], None],
) -> Here:
    """Hashes what is there of the chain, and holds it against the gates that rest on it.

    Args:
        root: Folder of artifacts.
        chain: Records of the release.
        gates: Of `checks.json`.
        note: Told what holds and what that rests on.

    Raises:
        Refused: `artifact-changed`, or `check-differs`.
        CannotCheck: Something there cannot be read.
    """
    stages: set[str] = set()
    copies = _copies(root, chain, stages)
    num_files = num_here = 0
    try:
        found = {digest: _checked(nodes, chain) for digest, nodes in copies.items()}
        for node in found.values():
            num_files += len(node.record.outputs)
            num_here += _num_present(node)
        by_name = {gate["name"]: gate for gate in gates}
        judged = [
            *_check_health(found, chain, by_name["training_health"]),
            *_check_manifest(found, chain, by_name["manifest_verdict"]),
        ]
    except OSError as error:
        msg = f"{root}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    note(
        f"{num_here} of {num_files} artifacts of {len(found)} of {len(chain.links)} records "
        "are here and unchanged",
        "their bytes",
    )
    lost = [
        f"{link.stem}: no such record is below {root}"
        + (", another of its stage is" if link.record.stage in stages else "")
        for link in _absent(found, chain)
    ]
    if lost and _has_links(root):
        lost.append(f"what lies behind links below {root}: they are not followed")
    return Here(frozenset(judged), len(found), tuple(lost))


def _absent(found: Mapping[str, Node], chain: Chain) -> Iterator[Link]:
    return (link for digest, link in chain.links.items() if digest not in found)


def _copies(root: Path, chain: Chain, stages: set[str]) -> dict[str, list[Node]]:
    """Folders that hold a record of the chain, by its digest, in the chain's order.

    The stages of other records are added to `stages`.
    """
    found: dict[str, list[Node]] = {digest: [] for digest in chain.links}
    for folder in _walk(root):
        try:
            node = _load(folder, chain, stages)
        except OSError as error:
            msg = f"{folder}: cannot be read: {error}"
            raise CannotCheck(msg) from error
        if node is not None:
            found[node.digest].append(node)
    return {digest: nodes for digest, nodes in found.items() if nodes}


def _load(folder: Path, chain: Chain, stages: set[str]) -> Node | None:
    """The record of a folder where it is of the chain.

    A folder whose `run.json` names a record of the chain is that record's, whatever stands in the
    record's place by now.
    """
    why = "another record stands in its place"
    try:
        node = load(folder)
    except RecordError as error:
        node, why = None, str(error)
    if node is not None and node.digest in chain.links:
        return node
    named = _record_named_in(folder)
    if named in chain.links:
        raise Refused("artifact-changed", chain.links[named].stem, f"{folder}: {why}")
    if node is not None:
        stages.add(node.record.stage)
    return None


def _record_named_in(folder: Path) -> str:
    try:
        path = locate(folder, RUN_NAME)
        run = None if path is None else parse_json(read_found(path))
    except RecordError:
        return ""
    named = run.get("record") if isinstance(run, dict) else None
    return named if isinstance(named, str) else ""


def _checked(nodes: Sequence[Node], chain: Chain) -> Node:
    """Every copy of a record holds; the fullest of them is evidence.

    Raises:
        Refused: `artifact-changed`.
    """
    for node in nodes:
        wrong = next(faults(node), None)
        if wrong is not None:
            raise Refused("artifact-changed", chain.links[node.digest].stem, wrong)
    return max(nodes, key=_num_present)


def _has_links(root: Path) -> bool:
    return any(
        (Path(above) / name).is_symlink() for above, names, _ in os.walk(root) for name in names
    )


def _walk(root: Path) -> Iterator[Path]:
    """Folders with a record, hidden ones passed over, links not followed."""
    if not root.is_dir():
        msg = f"{root}: no such folder of artifacts"
        raise CannotCheck(msg)
    for above, folders, files in os.walk(root):
        depth = len(Path(above).relative_to(root).parts)
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        if depth >= _DEEPEST:
            folders.clear()
        if {RECORD_NAME, RUN_NAME} & {*files, *folders}:
            yield Path(above)


def _num_present(node: Node) -> int:
    return sum(locate(node.folder, name) is not None for name in node.record.outputs)


def _check_health(
    found: Mapping[str, Node], chain: Chain, gate: Mapping[str, Any]
) -> Iterator[str]:
    """What the gate says of each training's health is what that training wrote."""
    trained = [link for link in chain.links.values() if link.events is not None]
    said = gate["result"] if isinstance(gate["result"], dict) else {}
    num_seen = 0
    for link in trained:
        health = _read(found.get(link.digest), HEALTH_NAME)
        if health is None:
            continue
        num_seen += 1
        is_healthy = health.get("passed") is True
        if said.get(link.stem) != health.get("metrics") or (gate["passed"] and not is_healthy):
            why = f"training_health: {link.stem} ended otherwise than is said"
            raise Refused("check-differs", CHECKS_NAME, why)
    if num_seen == len(trained):
        yield "training_health"


def _check_manifest(
    found: Mapping[str, Node], chain: Chain, gate: Mapping[str, Any]
) -> Iterator[str]:
    """What the gate says of the image table is what the table's own stage found."""
    writers = chain.writers_of(VERDICT_NAME)
    verdicts = [_read(found.get(link.digest), VERDICT_NAME) for link in writers]
    known = [judge_manifest(verdict) for verdict in verdicts if verdict is not None]
    if known and (
        gate["result"] not in [one.result for one in known]
        or (gate["passed"] and not all(one.passed for one in known))
    ):
        why = "manifest_verdict: the image table was found otherwise than is said"
        raise Refused("check-differs", CHECKS_NAME, why)
    if len(known) == len(writers):
        yield "manifest_verdict"


def _read(node: Node | None, name: str) -> dict[str, Any] | None:
    """A JSON object that the record names and that is here, with the digest that it names."""
    if node is None or name not in node.record.outputs:
        return None
    path = locate(node.folder, name)
    if path is None:
        return None
    try:
        data = read_found(path)
        value = parse_json(data)
    except RecordError as error:
        raise Refused("artifact-changed", str(path), str(error)) from error
    if hashlib.sha256(data).hexdigest() != node.record.outputs[name].sha256:
        raise Refused("artifact-changed", str(path), "changed after it was hashed")
    return value if isinstance(value, dict) else None
