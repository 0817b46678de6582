"""How a release came about: an in-toto Statement v1 with SLSA's provenance predicate v1.

It says what the records say, in the words that supply-chain tools read. Who made it claims no
more than Build L1: the builder is whoever ran the command and holds the key.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from dinov3 import __version__
from dinov3.gates import Root, stem
from dinov3.publish.draft import Draft
from dinov3.release.images import IMAGES_NAME
from dinov3.release.record import digest_of
from dinov3.release.statement import (
    BUILD_TYPE,
    BYPRODUCTS,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    SUBJECTS,
    resources_of,
)

BUILDER = "urn:x-dinov3:builder:local"


def statement(draft: Draft, digests: Mapping[str, str]) -> dict[str, Any]:
    """The statement as JSON values.

    Args:
        draft: The release.
        digests: sha256 of its files by path, of those that are written already.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(resources_of(digests, SUBJECTS)),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": draft.model,
                    "version": draft.version,
                    "recipe": draft.recipe,
                    "overrides": list(draft.overrides),
                    "source": [
                        _named(root) for root in draft.evidence.roots if root.role == "source"
                    ],
                },
                "internalParameters": {
                    "config_digest": draft.evidence.final.record.config_digest,
                    "policy_digest": digest_of(draft.policy),
                    "seeds": dict(draft.evidence.final.record.seeds),
                },
                "resolvedDependencies": list(_dependencies(draft)),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"dinov3": __version__}},
                "metadata": {
                    "invocationId": draft.evidence.final.digest,
                    "startedOn": _timestamp(draft.began),
                    "finishedOn": _timestamp(draft.made),
                },
                "byproducts": list(resources_of(digests, BYPRODUCTS)),
            },
        },
    }


def _dependencies(draft: Draft) -> Iterator[dict[str, Any]]:
    """Everything that went in, each with a digest: list of images, code, lock, records, roots."""
    if draft.curated is not None:
        images = draft.curated.record.outputs[IMAGES_NAME]
        yield {"name": IMAGES_NAME, "digest": {"sha256": images.sha256}}
    nodes = draft.evidence.nodes
    for code in sorted({node.record.code for node in nodes}):
        yield {"name": "code", "digest": {"sha256": code}}
    for lock in sorted({node.record.environment for node in nodes}):
        yield {"name": "requirements.lock", "digest": {"sha256": lock}}
    yield from _commits(draft.runs)
    for node in nodes:
        yield {"name": f"records/{stem(node)}.json", "digest": {"sha256": node.digest}}
    for root in draft.evidence.roots:
        yield {"name": f"{root.role}: {root.name}", "digest": {"sha256": root.sha256}}


def _commits(runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Commits of the code, and whether a stage ran with more than what was committed."""
    for commit in sorted({str(run["commit"]) for run in runs if run.get("commit") is not None}):
        found: dict[str, Any] = {"name": "git commit", "digest": {"gitCommit": commit}}
        if any(run.get("dirty") for run in runs if run.get("commit") == commit):
            found["annotations"] = {"uncommitted_changes": True}
        yield found


def _named(root: Root) -> dict[str, Any]:
    return {"name": root.name, "sha256": root.sha256}


def _timestamp(moment: datetime) -> str:
    """RFC 3339; by the clock of the machine, which nobody vouches for."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
