"""The bill of materials of a release, made again from its own files: CycloneDX 1.6, a model card.

Whoever verifies a release writes the bill anew. Only its serial number, the description, uses and
limits (which the card holds too) and the versions of libraries are the signer's own words.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from dinov3.release.card import architecture_of
from dinov3.release.chain import Chain
from dinov3.release.contents import CONFIG_NAME, MODEL_NAME, Contents
from dinov3.release.head import UNKNOWN, Head, Root
from dinov3.release.images import IMAGES_NAME
from dinov3.release.licences import normal_form

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"


def bill_of(
    contents: Contents,
    head: Head,
    chain: Chain,
    report: Mapping[str, Any],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """What the bill of a release has to say.

    Args:
        contents: The release.
        head: Its `release.json`.
        chain: Its records.
        report: Its evaluation.
        found: The bill that is there, for its signer's own words.

    Raises:
        ValueError: Those words are of the wrong kind.
    """
    components = [*_images(head, chain), *_roots(chain), *_libraries(found)]
    refs = sorted(one["bom-ref"] for one in components)
    said = found["metadata"]["component"]
    model = {
        "bom-ref": f"model:{head.name}",
        "type": "machine-learning-model",
        "name": head.model,
        "version": head.version,
        "hashes": _hashes(contents.hashes[MODEL_NAME].sha256),
        "licenses": [{"expression": head.licence}],
        "modelCard": _model_card(contents, head, chain, report, said),
        **_description(said),
    }
    return {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": _text(found["serialNumber"], "its serial number"),
        "metadata": {"timestamp": _made(chain), "component": model},
        "components": components,
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": refs},
            *({"ref": ref} for ref in refs),
        ],
    }


def in_order(bill: Mapping[str, Any]) -> dict[str, Any]:
    """The bill with its lists of components and dependencies in the one order to compare them."""
    sorts = {"components": "bom-ref", "dependencies": "ref"}
    return {
        name: sorted(value, key=lambda one: str(one[sorts[name]])) if name in sorts else value
        for name, value in bill.items()
    }


def _images(head: Head, chain: Chain) -> Iterator[dict[str, Any]]:
    """What was trained on."""
    if head.images is not None:
        (link,) = chain.writers_of(IMAGES_NAME)
        yield {
            "bom-ref": "data:images",
            "type": "data",
            "name": "training images",
            "description": "The list of images by their digests, with the role of each.",
            "hashes": _hashes(head.images.sha256),
            **_licences(link.record.licences.get("out", ())),
        }


def _roots(chain: Chain) -> Iterator[dict[str, Any]]:
    """Where that came from, and weights that were made elsewhere."""
    listed = [root for root in chain.roots if root.training_data != UNKNOWN]
    for number, root in enumerate(listed):
        said = f"{root.role}, as it was read from outside."
        yield _root(root, f"data:{root.role}:{number}", "data", said)
    for number, root in enumerate(root for root in chain.roots if root not in listed):
        said = "Weights from outside; their training data is unknown."
        yield _root(root, f"weights:{root.role}:{number}", "machine-learning-model", said)


def _root(root: Root, ref: str, kind: str, said: str) -> dict[str, Any]:
    return {
        "bom-ref": ref,
        "type": kind,
        "name": root.name,
        "description": said,
        "hashes": _hashes(root.sha256),
        **_licences(root.licences),
    }


def _libraries(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Names and versions as the signer states them: records hold the lock's digest alone."""
    for one in found["components"]:
        if one["type"] == "library":
            name, version = _text(one["name"], "a library"), _text(one["version"], "a version")
            ref = f"pypi:{name}@{version}"
            yield {"bom-ref": ref, "type": "library", "name": name, "version": version}


def _model_card(
    contents: Contents,
    head: Head,
    chain: Chain,
    report: Mapping[str, Any],
    component: Mapping[str, Any],
) -> dict[str, Any]:
    said = component["modelCard"]["considerations"]
    limits = _texts(said["technicalLimitations"])
    return model_card_of(
        head.name,
        contents.read_object(CONFIG_NAME, canonical=False)["model"],
        report,
        has_images=head.images is not None,
        unknown=chain.unknown_roots,
        uses=_texts(said["useCases"]),
        limits=limits[: len(limits) - len(chain.unknown_roots)],
    )


def model_card_of(
    name: str,
    network: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    has_images: bool,
    unknown: Collection[str],
    uses: Collection[str],
    limits: Collection[str],
) -> dict[str, Any]:
    """The bill's model card.

    Args:
        name: `MODEL@VERSION`.
        network: Fields of the network in `config.json`.
        report: Content of `evals.json`.
        has_images: Whether a list of images is known.
        unknown: Names of roots whose training data nobody knows.
        uses: The signer's words on what it is for.
        limits: Likewise on what it is not.
    """
    family, architecture = architecture_of(network)
    parameters: dict[str, Any] = {
        "approach": {"type": "self-supervised"},
        "task": "image feature extraction",
        "architectureFamily": family,
        "modelArchitecture": architecture,
        "inputs": [{"format": "image"}],
        "outputs": [{"format": "features"}],
    }
    if has_images:
        parameters["datasets"] = [{"ref": "data:images"}]
    unknowns = [f"Training data of {one}: unknown." for one in unknown]
    return {
        "bom-ref": f"card:{name}",
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(metrics_of(report))},
        "considerations": {
            "useCases": list(uses),
            "technicalLimitations": [*limits, *unknowns],
        },
    }


def metrics_of(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row of a report as a performance metric; figures keep their digits."""
    for row in report.get("rows", ()):
        parts = [f"subject: {row['subject']}"]
        counts = ("k", "num_samples")
        parts += [f"{name}: {row[name]}" for name in counts if row.get(name) is not None]
        yield {
            "type": f"{row['protocol']} {row['metric']}",
            "value": json.dumps(row["value"]),
            "slice": "; ".join(parts),
            "confidenceInterval": {
                "lowerBound": json.dumps(row["low"]),
                "upperBound": json.dumps(row["high"]),
            },
        }


def _made(chain: Chain) -> str:
    """When the last stage had finished, by its own clock."""
    finished = max(float(link.run.get("finished", 0)) for link in chain.links.values())
    return datetime.fromtimestamp(int(finished), UTC).isoformat()


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _licences(texts: Collection[str]) -> dict[str, Any]:
    """One expression that holds all of them."""
    forms = sorted({normal_form(text) for text in texts})
    if len(forms) > 1:
        forms = [f"({one})" if " OR " in one else one for one in forms]
    return {"licenses": [{"expression": " AND ".join(forms)}]} if forms else {}


def _description(component: Mapping[str, Any]) -> dict[str, str]:
    said = component.get("description")
    return {} if said is None else {"description": _text(said, "its description")}


def _texts(values: Any) -> list[str]:
    return [_text(one, "a use or a limit") for one in values]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        msg = f"{what} is no text"
        raise ValueError(msg)
    return value
