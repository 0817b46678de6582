"""What a model card is made of, and its header, which the Hugging Face hub reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dinov3.release.chain import stem_of
from dinov3.release.licences import judge
from dinov3.release.markdown import visible
from dinov3.release.policy_terms import MODEL, NO_WEIGHTS
from dinov3.release.record import Edge, Record

_WEIGHT_ROLES = ("init", "teacher", "backbone")  # of edges to the weights it began from
# The hub's names of licences; others are "other", with their SPDX name and their text beside.
_HUB_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "BSD-2-Clause": "bsd-2-clause",
    "BSD-3-Clause": "bsd-3-clause",
    "CC0-1.0": "cc0-1.0",
    "CC-BY-4.0": "cc-by-4.0",
    "CC-BY-SA-4.0": "cc-by-sa-4.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CC-BY-NC-SA-4.0": "cc-by-nc-sa-4.0",
    "GPL-2.0-only": "gpl-2.0",
    "GPL-2.0-or-later": "gpl-2.0",
    "GPL-3.0-only": "gpl-3.0",
    "GPL-3.0-or-later": "gpl-3.0",
    "LGPL-3.0-only": "lgpl-3.0",
    "LGPL-3.0-or-later": "lgpl-3.0",
    "AGPL-3.0-only": "agpl-3.0",
    "AGPL-3.0-or-later": "agpl-3.0",
    "MPL-2.0": "mpl-2.0",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        name: `MODEL@VERSION`.
        licence: Of the release, an SPDX expression.
        network: Fields of the network in `config.json`.
        report: Content of `evals.json`.
        gates: Of `checks.json`.
        records: Every record by its digest, inputs first.
        final: Digest of the record of the weights.
        evaluation: Digest of the record of the report.
        num_images: Trained on and held out; None where nobody knows.
    """

    name: str
    licence: str
    network: Mapping[str, Any]
    report: Mapping[str, Any]
    gates: Sequence[Mapping[str, Any]]
    records: Mapping[str, Record]
    final: str
    evaluation: str
    num_images: tuple[int, int] | None

    @cached_property
    def roots(self) -> list[Edge]:
        """Edges to what was not made here, each once, sorted."""
        edges = (edge for record in self.records.values() for edge in record.inputs)
        found = {(edge.role, edge.name, edge.sha256): edge for edge in edges if edge.record is None}
        return [edge for _, edge in sorted(found.items(), key=lambda item: item[0])]

    @cached_property
    def unknown_roots(self) -> list[str]:
        """Names of those whose training data nobody knows."""
        return sorted({root.name for root in self.roots if root.role not in NO_WEIGHTS})

    @cached_property
    def obligations(self) -> Iterable[str]:
        """What whoever passes the release on has to do."""
        ends = (self.records[self.final], self.records[self.evaluation])
        names = sorted({name for end in ends for name in end.licences.get("out", ())})
        return judge(names, self.licence).obligations


def header_of(facts: Facts) -> dict[str, Any]:
    """What the Hugging Face hub reads: a mapping of texts, numbers and lists of them."""
    hub_name = _HUB_LICENCES.get(facts.licence)
    header: dict[str, Any] = {"license": hub_name or "other"}
    if hub_name is None:
        header |= {"license_name": visible(facts.licence), "license_link": "licences"}
    header |= {
        "library_name": "dinov3",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", "vision"],
        "base_model": [visible(name) for name in _base_models(facts)],
        "datasets": [visible(root.name) for root in facts.roots if root.role == "source"],
        "model-index": [{"name": facts.name, "results": _index(facts.report)}],
    }
    return {name: value for name, value in header.items() if value != []}


def protocol_of(row: Mapping[str, Any]) -> str:
    """The protocol of a row, with its k."""
    k = row.get("k")
    return str(row["protocol"]) if k is None else f"{row['protocol']}, k = {k}"


def _index(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model's own figures, each protocol with its metrics."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report.get("rows", ()):
        if row["subject"] == MODEL:
            name = f"{row['metric']} [{row['low']}, {row['high']}]"
            metric = {"type": visible(row["metric"]), "name": visible(name), "value": row["value"]}
            found.setdefault(protocol_of(row), []).append(metric)
    dataset = {"type": "held-out", "name": "held-out half of the source"}
    return [
        {
            "task": {"type": "image-feature-extraction", "name": visible(protocol)},
            "dataset": dict(dataset),
            "metrics": metrics,
        }
        for protocol, metrics in found.items()
    ]


def _base_models(facts: Facts) -> list[str]:
    """The weights it began from: outside ones by name, our own by stage and record."""
    found = list(facts.unknown_roots)
    for edge in facts.records[facts.final].inputs:
        if edge.role in _WEIGHT_ROLES and edge.record is not None and edge.record in facts.records:
            found.append(stem_of(facts.records[edge.record].stage, edge.record))
    return sorted(set(found))
