"""The provenance of a release, made again from its own files: SLSA's predicate v1, in in-toto's v1.

Whoever verifies a release writes the statement anew. Only the recipe, what was laid over it and the
builder are the signer's own words.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from dinov3.release.chain import Chain
from dinov3.release.contents import (
    CHECKS_NAME,
    CONFIG_NAME,
    EVALS_NAME,
    HEADS_NAME,
    MODEL_NAME,
    RELEASE_NAME,
    Contents,
)
from dinov3.release.head import Head
from dinov3.release.images import IMAGES_NAME
from dinov3.release.record import digest_of

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:x-dinov3:build:release:1"

SUBJECTS = (MODEL_NAME, HEADS_NAME, CONFIG_NAME, EVALS_NAME)
BYPRODUCTS = (CHECKS_NAME, RELEASE_NAME)


def statement_of(
    contents: Contents, head: Head, chain: Chain, found: Mapping[str, Any]
) -> dict[str, Any]:
    """What the statement of a release has to say.

    Args:
        contents: The release.
        head: Its `release.json`.
        chain: Its records.
        found: The statement that is there, for its signer's own words.

    Raises:
        ValueError: Those words are of the wrong kind.
    """
    predicate = found["predicate"]
    parameters = predicate["buildDefinition"]["externalParameters"]
    record = chain.final.record
    digests = {name: one.sha256 for name, one in contents.hashes.items()}
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(resources_of(digests, SUBJECTS)),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": _parameters(head, parameters),
                "internalParameters": {
                    "config_digest": record.config_digest,
                    "policy_digest": digest_of(contents.read_object(RELEASE_NAME)["policy"]),
                    "seeds": dict(record.seeds),
                },
                "resolvedDependencies": list(_dependencies(head, chain)),
            },
            "runDetails": {
                "builder": _builder(predicate["runDetails"]["builder"]),
                "metadata": {"invocationId": chain.final.digest, **_times(chain)},
                "byproducts": list(resources_of(digests, BYPRODUCTS)),
            },
        },
    }


def _parameters(head: Head, said: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for."""
    sources = [root for root in head.roots if root.role == "source"]
    return {
        "model": head.model,
        "version": head.version,
        "recipe": _text(said["recipe"], "its recipe"),
        "overrides": [_text(one, "an override") for one in said["overrides"]],
        "source": [{"name": root.name, "sha256": root.sha256} for root in sources],
    }


def _times(chain: Chain) -> dict[str, str]:
    """When the first stage began and the last one ended."""
    runs = [link.run for link in chain.links.values()]
    return {
        "startedOn": _moment(min(float(run.get("started", 0)) for run in runs)),
        "finishedOn": _moment(max(float(run.get("finished", 0)) for run in runs)),
    }


def _moment(seconds: float) -> str:
    """RFC 3339, whole seconds, UTC; by the clock of the machine, which nobody vouches for."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def resources_of(digests: Mapping[str, str], names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Those of the files that are there, as in-toto writes them; `digests` are sha256 by name."""
    for name in names:
        if name in digests:
            yield {"name": name, "digest": {"sha256": digests[name]}}


def _dependencies(head: Head, chain: Chain) -> Iterator[dict[str, Any]]:
    """Everything that went in, each with a digest: list of images, code, lock, records, roots."""
    if head.images is not None:
        yield _dependency(IMAGES_NAME, head.images.sha256)
    links = chain.links.values()
    for code in sorted({link.record.code for link in links}):
        yield _dependency("code", code)
    for lock in sorted({link.record.environment for link in links}):
        yield _dependency("requirements.lock", lock)
    yield from _commits([link.run for link in links])
    for link in links:
        yield _dependency(f"records/{link.stem}.json", link.digest)
    for root in chain.roots:
        yield _dependency(f"{root.role}: {root.name}", root.sha256)


def _dependency(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _commits(runs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Commits of the code, and whether a stage ran with more than what was committed."""
    dirty: dict[str, bool] = {}
    for run in runs:
        if run.get("commit") is not None:
            commit = str(run["commit"])
            dirty[commit] = dirty.get(commit, False) or bool(run.get("dirty"))
    for commit in sorted(dirty):
        found: dict[str, Any] = {"name": "git commit", "digest": {"gitCommit": commit}}
        if dirty[commit]:
            found["annotations"] = {"uncommitted_changes": True}
        yield found


def _builder(found: Mapping[str, Any]) -> dict[str, Any]:
    versions = {name: _text(version, name) for name, version in found["version"].items()}
    return {"id": _text(found["id"], "its builder"), "version": versions}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        msg = f"{what} is no text"
        raise ValueError(msg)
    return value
