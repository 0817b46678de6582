"""A chain, or the users of something, as text, JSON, DOT and HTML."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dinov3.release.checks import Node
from dinov3.release.head import LISTED, UNKNOWN
from dinov3.release.policy_terms import NO_WEIGHTS
from dinov3.release.record import Edge, RecordError
from dinov3.release.record_rules import TRAINING_DATA
from dinov3.release.render import Arrow, Box, Graph, plain, to_dot, to_html, to_json
from dinov3.release.targets import Answer
from dinov3.release.trace import Findings

SCHEMA = "dinov3.lineage/1"
_SHORT = 16  # digits of a digest in text and drawings


def as_text(findings: Findings) -> str:
    """Lines for a terminal; foreign words are escaped."""
    return "\n".join(plain(line) for line in _lines(findings))


def as_json(findings: Findings) -> str:
    """Everything that was found, digests whole."""
    return to_json(
        {
            "schema": SCHEMA,
            "target": findings.target,
            "exit_code": findings.exit_code,
            "is_reverse": findings.is_reverse,
            "note": findings.note,
            "answers": [
                {"title": one.title, "facts": one.facts, "is_marked": one.is_marked}
                for one in findings.answers
            ],
            "chain": [{"depth": depth, **_facts(node)} for depth, node in findings.chain],
            "wrong": list(dict.fromkeys(findings.wrong)),
            "unchecked": list(dict.fromkeys(findings.unchecked)),
        }
    )


def as_dot(findings: Findings) -> str:
    """The graph in the language of Graphviz."""
    return to_dot(graph_of(findings))


def as_html(findings: Findings) -> str:
    """One page without scripts that needs nothing else."""
    sections = {
        "Answer": [line for answer in findings.answers for line in _say(answer)],
        "Wrong": list(dict.fromkeys(findings.wrong)),
        "Not checked": list(dict.fromkeys(findings.unchecked)),
        "Note": [] if findings.note is None else [findings.note],
        "Records": [line for depth, node in findings.chain for line in describe(depth, node)],
    }
    return to_html(f"Lineage of {findings.target}", graph_of(findings), sections)


FORMS: Mapping[str, Callable[[Findings], str]] = {
    "text": as_text,
    "json": as_json,
    "dot": as_dot,
    "html": as_html,
}


def graph_of(findings: Findings) -> Graph:
    """Records, the roots they begin with, and the releases that hold them."""
    nodes = {node.digest: node for _, node in reversed(findings.chain)}
    depths = {node.digest: depth for depth, node in reversed(findings.chain)}
    boxes = {key: _box(node, is_asked=depths[key] == 0) for key, node in nodes.items()}
    labels: dict[tuple[str, str], list[str]] = {}
    for node in nodes.values():
        for edge in node.record.inputs:
            key = edge.record or f"root {edge.sha256}"
            if edge.record is None:
                boxes[key] = Box(key, "root", edge.role, (edge.name, edge.sha256[:_SHORT]))
            labels.setdefault((key, node.digest), []).append(f"{edge.role}: {edge.name}")
    for release in findings.releases:
        if release.head.final in nodes:
            is_marked = release.withdrawn is not None
            odd = {"withdrawn": is_marked, "unsigned": not release.is_signed}
            said = (release.digest[:_SHORT], *(word for word, is_so in odd.items() if is_so))
            key = f"release {release.digest}"
            boxes[key] = Box(key, "release", release.name, said, is_marked)
            labels[release.head.final, key] = ["released as"]
    arrows = (Arrow(tail, head, ", ".join(said)) for (tail, head), said in labels.items())
    return Graph(tuple(boxes.values()), tuple(arrows))


def describe(depth: int, node: Node) -> Iterator[str]:
    """Lines that tell of one record, foreign words in them unescaped."""
    pad = "  " * depth
    record = node.record
    yield f"{pad}{record.stage}  record {node.digest[:_SHORT]}  {node.folder}"
    for name, output in sorted(record.outputs.items()):
        tensors = f"  tensors {output.tensors[:_SHORT]}" if output.tensors else ""
        shown = f"{output.sha256[:_SHORT]}  {output.bytes} bytes{tensors}{_absence(node, name)}"
        yield f"{pad}  wrote {name}  {shown}"
    for edge in record.inputs:
        origin = f"record {edge.record[:_SHORT]}" if edge.record else _beginning(edge)
        yield f"{pad}  read {edge.role}: {edge.name}  {edge.sha256[:_SHORT]}  {origin}"
    if record.facts.get(TRAINING_DATA) == UNKNOWN:
        yield f"{pad}  training data unknown: weights from outside are above"
    if record.licences.get("out"):
        yield f"{pad}  licences {', '.join(record.licences['out'])}"


def _beginning(edge: Edge) -> str:
    """Pictures are listed by digest; what outside weights were trained on nobody here knows."""
    known = "" if edge.role in NO_WEIGHTS else ", training data unknown"
    return f"the chain begins here{known}"


def _lines(findings: Findings) -> Iterator[str]:
    for answer in findings.answers:
        yield from _say(answer)
    if findings.is_reverse:  # the answers name every user already
        return
    if findings.answers and findings.chain:
        yield ""
    for depth, node in findings.chain:
        yield from describe(depth, node)
    if findings.note is not None:
        yield findings.note


def _say(answer: Answer) -> Iterator[str]:
    yield f"{answer.title}{'  WITHDRAWN' if answer.is_marked else ''}"
    for name, value in answer.facts.items():
        if value is not None:
            yield f"  {name}: {value}"


def _facts(node: Node) -> dict[str, Any]:
    record = node.record
    return {
        "stage": record.stage,
        "record": node.digest,
        "folder": str(node.folder),
        "config_digest": record.config_digest,
        "code": record.code,
        "environment": record.environment,
        "training_data": UNKNOWN if record.facts.get(TRAINING_DATA) == UNKNOWN else LISTED,
        "licences": {side: list(names) for side, names in record.licences.items()},
        "outputs": [
            {
                "name": name,
                "sha256": output.sha256,
                "bytes": output.bytes,
                "tensors": output.tensors,
                "is_here": _is_here(node, name),
            }
            for name, output in sorted(record.outputs.items())
        ],
        "inputs": [
            {"role": edge.role, "name": edge.name, "sha256": edge.sha256, "record": edge.record}
            for edge in record.inputs
        ],
    }


def _box(node: Node, *, is_asked: bool) -> Box:
    licences = ", ".join(node.record.licences.get("out", ()))
    kind = "asked" if is_asked else "record"
    return Box(node.digest, kind, node.record.stage, (node.digest[:_SHORT], licences))


def _is_here(node: Node, name: str) -> bool | None:
    """None where it is not told, since the name or the file is none."""
    try:
        return node.find(name) is not None
    except (RecordError, OSError):  # named among the faults
        return None


def _absence(node: Node, name: str) -> str:
    is_here = _is_here(node, name)
    if is_here is None:
        return "  (not checked)"
    return "" if is_here else "  (not here, not checked)"
