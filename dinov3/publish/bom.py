"""`mlbom.cdx.json`: the bill of materials of a release, CycloneDX 1.6 with a model card.

The library has no class for model cards, so the card is laid into its JSON. Serial number, time
and references come from the release alone: equal releases have equal bytes.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dinov3.errors import DataError
from dinov3.gates import Root
from dinov3.publish.draft import Draft
from dinov3.release.bill import model_card_of
from dinov3.release.contents import MODEL_NAME
from dinov3.release.images import IMAGES_NAME
from dinov3.release.licences import normal_form
from dinov3.release.record import canonical_json, digest_of
from dinov3.release.spdx import LicenceError
from dinov3.stage import CHECKOUT, environment_digest

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

_PINNED = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)  # a line of the lock
# Libraries that the numbers of weights and figures hang on.
_LIBRARIES = ("faiss-cpu", "numpy", "pillow", "safetensors", "scikit-learn", "torch", "torchvision")


def bill_of_materials(draft: Draft, digests: Mapping[str, str]) -> bytes:
    """The bytes of the bill.

    Args:
        draft: The release.
        digests: sha256 of its files by path, of those that are written already.

    Raises:
        DataError: It is no valid CycloneDX 1.6.
    """
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    bom = _bom(draft, digests)
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    bill: dict[str, Any] = json.loads(outputter.output_as_string())
    bill["metadata"]["component"]["modelCard"] = _model_card(draft)
    data = canonical_json(bill)
    _validate(data)
    return data


def _bom(draft: Draft, digests: Mapping[str, str]) -> "Bom":
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType

    content = digest_of(sorted([name, digest] for name, digest in digests.items()))
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=draft.model,
        version=draft.version,
        bom_ref=f"model:{draft.name}",
        licenses=_licences([draft.licence]),
        hashes=_hashes(digests[MODEL_NAME]),
        description=draft.config.card.summary,
    )
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:x-dinov3:release:{content}"),
        metadata=BomMetaData(component=model, timestamp=draft.made),
        components=[*_datasets(draft), *_outside(draft), *_libraries(draft)],
    )
    bom.register_dependency(model, bom.components)
    return bom


def _datasets(draft: Draft) -> Iterator["Component"]:
    """What was trained on, and where that came from."""
    from cyclonedx.model.component import Component, ComponentType

    node = draft.curated
    if node is not None:
        yield Component(
            type=ComponentType.DATA,
            name="training images",
            bom_ref="data:images",
            description="The list of images by their digests, with the role of each.",
            hashes=_hashes(node.record.outputs[IMAGES_NAME].sha256),
            licenses=_licences(node.record.licences.get("out", ())),
        )
    for number, root in enumerate(_of_data(draft.evidence.roots)):
        yield Component(
            type=ComponentType.DATA,
            name=root.name,
            bom_ref=f"data:{root.role}:{number}",
            description=f"{root.role}, as it was read from outside.",
            hashes=_hashes(root.sha256),
            licenses=_licences(root.licences),
        )


def _outside(draft: Draft) -> Iterator["Component"]:
    """Weights that were made elsewhere; nobody here knows what they were trained on."""
    from cyclonedx.model.component import Component, ComponentType

    for number, root in enumerate(root for root in draft.evidence.roots if root.is_unknown):
        yield Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=root.name,
            bom_ref=f"weights:{root.role}:{number}",
            description="Weights from outside; their training data is unknown.",
            hashes=_hashes(root.sha256),
            licenses=_licences(root.licences),
        )


def _libraries(draft: Draft) -> Iterator["Component"]:
    """Versions from the lock, where it is the very lock that the weights were made with."""
    from cyclonedx.model.component import Component, ComponentType

    if environment_digest() != draft.evidence.final.record.environment:
        return
    lock = CHECKOUT / "requirements.lock"
    pinned = dict(_PINNED.findall(lock.read_text(encoding="utf-8") if lock.is_file() else ""))
    for name in _LIBRARIES:
        if name in pinned:
            yield Component(
                type=ComponentType.LIBRARY,
                name=name,
                version=pinned[name],
                bom_ref=f"pypi:{name}@{pinned[name]}",
            )


def _of_data(roots: Sequence[Root]) -> Iterator[Root]:
    return (root for root in roots if not root.is_unknown)


def _hashes(sha256: str) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _licences(texts: Sequence[str]) -> list[Any]:
    """One expression that holds all of them; what is no expression is a name."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

    try:
        forms = sorted({normal_form(text) for text in texts})
    except LicenceError:
        return [DisjunctiveLicense(name=text) for text in sorted(set(texts))]
    if not forms:
        return []
    joined = forms if len(forms) == 1 else [f"({one})" if " OR " in one else one for one in forms]
    return [LicenseExpression(" AND ".join(joined))]


def _model_card(draft: Draft) -> dict[str, Any]:
    return model_card_of(
        draft.name,
        draft.network,
        draft.report,
        has_images=draft.curated is not None,
        unknown=draft.evidence.unknown_roots,
        uses=draft.config.card.intended_uses,
        limits=draft.config.card.limitations,
    )


def _validate(data: bytes) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode())
    if error is not None:
        msg = f"bill of materials: not CycloneDX 1.6, got {str(error)[:200]}. Mend the recipe."
        raise DataError(msg)
