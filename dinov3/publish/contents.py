"""Writes the files of a release directory, all but the list of their digests and the signature."""

import hashlib
import hmac
import tempfile
from pathlib import Path
from typing import Any

from dinov3.errors import LineageBroken
from dinov3.gates import stem
from dinov3.publish.bom import bill_of_materials
from dinov3.publish.card import render_card
from dinov3.publish.draft import Draft
from dinov3.publish.provenance import statement
from dinov3.publish.store import copy_stream
from dinov3.release.atomic import atomic_write
from dinov3.release.checks import Node
from dinov3.release.contents import (
    BOM_NAME,
    CARD_NAME,
    CHECKS_NAME,
    CONFIG_NAME,
    EVALS_NAME,
    HEADS_NAME,
    MODEL_NAME,
    PROVENANCE_NAME,
    RELEASE_NAME,
)
from dinov3.release.files import SUMS_NAME, format_sums, list_files
from dinov3.release.head import DIGEST_ONLY, LISTED, PLAIN, SCHEMA, UNKNOWN
from dinov3.release.images import IMAGES_NAME, read_images, write_images
from dinov3.release.record import (
    RECORD_NAME,
    RUN_NAME,
    canonical_json,
    digest_of,
    file_sha256,
    parse_json,
)
from dinov3.stage import EVENTS_NAME


def write_contents(folder: Path, draft: Draft) -> None:
    """Writes every file but the signature into an empty folder.

    Raises:
        LineageBroken: A file of the chain changed since the gates saw it.
    """
    _copy_weights(folder, draft)
    _copy_records(folder, draft)
    _write_images(folder, draft)
    for name, path in (draft.evidence.texts or {}).items():
        if path is not None:
            target = folder / "licences" / f"{name}.txt"
            target.parent.mkdir(exist_ok=True)
            atomic_write(target, path.read_bytes())
    atomic_write(folder / CHECKS_NAME, canonical_json(draft.checks))
    release = describe(draft)
    atomic_write(folder / RELEASE_NAME, canonical_json(release))
    digests = {name: file_sha256(folder / name) for name in list_files(folder)}
    documents = {
        PROVENANCE_NAME: canonical_json(statement(draft, digests)),
        BOM_NAME: bill_of_materials(draft, digests),
        CARD_NAME: render_card(draft).encode(),
    }
    for name, data in documents.items():
        atomic_write(folder / name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    atomic_write(folder / SUMS_NAME, format_sums(digests))


def describe(draft: Draft) -> dict[str, Any]:
    """The content of `release.json`."""
    evidence = draft.evidence
    outputs = evidence.final.record.outputs
    tensors = {MODEL_NAME: outputs[draft.weights].tensors}
    if HEADS_NAME in outputs:
        tensors[HEADS_NAME] = outputs[HEADS_NAME].tensors
    return {
        "schema": SCHEMA,
        "model": draft.model,
        "version": draft.version,
        "final": evidence.final.digest,
        "evaluation": evidence.evaluation.digest,
        "records": [[node.record.stage, node.digest] for node in evidence.nodes],
        "roots": [
            {
                "role": root.role,
                "name": root.name,
                "sha256": root.sha256,
                "licences": list(root.licences),
                "training_data": UNKNOWN if root.is_unknown else LISTED,
            }
            for root in evidence.roots
        ],
        "previous": draft.previous,
        "policy": dict(draft.policy),
        "policy_digest": digest_of(draft.policy),
        "licence": draft.licence,
        "tensors": tensors,
        "images": _describe_images(draft),
    }


def _describe_images(draft: Draft) -> dict[str, Any] | None:
    node, counts = draft.curated, draft.images
    if node is None or counts is None:
        return None
    return {
        "mode": draft.config.images,
        "sha256": node.record.outputs[IMAGES_NAME].sha256,
        "num_trained": counts.num_trained,
        "num_evaluated": counts.num_evaluated,
    }


def _copy_weights(folder: Path, draft: Draft) -> None:
    final = draft.evidence.final
    _copy(final, draft.weights, folder / MODEL_NAME)
    for name in (HEADS_NAME, CONFIG_NAME):
        if name in final.record.outputs:
            _copy(final, name, folder / name)
    _copy(draft.evidence.evaluation, "report.json", folder / EVALS_NAME)


def _copy_records(folder: Path, draft: Draft) -> None:
    for part in ("records", "runs", "events"):
        (folder / part).mkdir()
    for node in draft.evidence.nodes:
        _copy(node, RECORD_NAME, folder / "records" / f"{stem(node)}.json", node.digest)
        run = (node.folder / RUN_NAME).read_bytes()
        atomic_write(folder / "runs" / f"{stem(node)}.json", run)
        beside = parse_json(run).get("beside", {})
        if EVENTS_NAME in beside:
            target = folder / "events" / f"{stem(node)}.jsonl"
            _copy(node, EVENTS_NAME, target, beside[EVENTS_NAME])
    if not any((folder / "events").iterdir()):
        (folder / "events").rmdir()


def _write_images(folder: Path, draft: Draft) -> None:
    node = draft.curated
    if node is None or draft.config.images == DIGEST_ONLY:
        return
    if draft.config.images == PLAIN:
        _copy(node, IMAGES_NAME, folder / IMAGES_NAME)
        return
    salt = draft.salt or b""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = Path(scratch) / IMAGES_NAME
        _copy(node, IMAGES_NAME, plain)  # the very bytes that were hashed are keyed
        with read_images(plain) as images:
            write_images(
                folder / IMAGES_NAME,
                ((_keyed(salt, digest), role) for digest, role in images),
                images.roles,
                salt_sha256=hashlib.sha256(salt).hexdigest(),
            )


def _keyed(salt: bytes, digest: bytes) -> bytes:
    return hmac.digest(salt, digest, "sha256")


def _copy(node: Node, name: str, target: Path, sha256: str | None = None) -> None:
    """Copies a file of a stage; what was not hashed by the gates does not get in."""
    expected = node.record.outputs[name].sha256 if sha256 is None else sha256
    with (node.folder / name).open("rb") as source, target.open("wb") as copy:
        found = copy_stream(source, copy)
    if found != expected:
        msg = f"{node.folder / name}: changed while the release was built. Build it again."
        raise LineageBroken(msg)
