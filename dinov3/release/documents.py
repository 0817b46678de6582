"""Provenance, bill of materials and model card: other people's words for what the records say.

They are made for other tools and for people; here nothing in them is believed that release.json,
evals.json and the records do not say too.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dinov3.release.card import find_words, render_body
from dinov3.release.card_facts import Facts, header_of
from dinov3.release.card_header import split_card
from dinov3.release.chain import Chain
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
    Contents,
)
from dinov3.release.head import Head
from dinov3.release.images import IMAGES_NAME
from dinov3.release.record import digest_of
from dinov3.release.refusals import Refused

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:x-dinov3:build:release:1"

_SUBJECTS = (MODEL_NAME, HEADS_NAME, CONFIG_NAME, EVALS_NAME)
_BYPRODUCTS = (CHECKS_NAME, RELEASE_NAME)
_SHOWN = 24  # letters on each side of a difference


def check_documents(
    contents: Contents, head: Head, chain: Chain, report: Mapping[str, Any]
) -> None:
    """Holds all three against the release.

    Raises:
        Refused: `provenance-differs`, `bom-differs` or `card-differs`.
    """
    for name, refusal, check in (
        (PROVENANCE_NAME, "provenance-differs", _check_provenance),
        (BOM_NAME, "bom-differs", _check_bom),
        (CARD_NAME, "card-differs", _check_card),
    ):
        try:
            why = next(check(contents, head, chain, report), None)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise Refused(
                refusal, name, f"lacks a field, or has one of another kind: {error}"
            ) from (error)
        if why is not None:
            raise Refused(refusal, name, why)


Faults = Iterator[str]
_Check = Callable[[Contents, Head, Chain, Mapping[str, Any]], Faults]


def _check_provenance(contents: Contents, head: Head, chain: Chain, _: Mapping[str, Any]) -> Faults:
    found = contents.read_object(PROVENANCE_NAME)
    definition = found["predicate"]["buildDefinition"]
    details = found["predicate"]["runDetails"]
    external, internal = definition["externalParameters"], definition["internalParameters"]
    subjects = _named_digests(found["subject"])
    stated = [
        ("its type", found["_type"], STATEMENT_TYPE),
        ("its predicate's type", found["predicateType"], PREDICATE_TYPE),
        ("buildType", definition["buildType"], BUILD_TYPE),
        ("the model", external["model"], head.model),
        ("the version", external["version"], head.version),
        ("the final record", details["metadata"]["invocationId"], chain.final.digest),
        ("config_digest", internal["config_digest"], chain.final.record.config_digest),
        ("policy_digest", internal["policy_digest"], _policy_digest(contents)),
        ("seeds", internal["seeds"], dict(chain.final.record.seeds)),
        ("its subjects", subjects, _digests(contents, _SUBJECTS)),
        ("its byproducts", _named_digests(details["byproducts"]), _digests(contents, _BYPRODUCTS)),
    ]
    for what, said, true in stated:
        if said != true:
            yield (
                f"{what} are not those of the release"
                if what.startswith("its ")
                else (f"{what} is not that of the release")
            )
    if not isinstance(details["builder"]["id"], str) or not details["builder"]["id"]:
        yield "names no builder"
    said = _pairs(definition["resolvedDependencies"])
    for name, digest in _dependencies(head, chain):
        if (name, digest) not in said:
            yield f"does not name {name} as a dependency, by its digest"
    if len(said) != len(set(_dependencies(head, chain))):
        yield "names a dependency that the records do not"


def _policy_digest(contents: Contents) -> str:
    return digest_of(contents.read_object(RELEASE_NAME)["policy"])


def _named_digests(resources: Any) -> dict[str, str]:
    found = {one["name"]: one["digest"]["sha256"] for one in resources}
    return found if len(found) == len(resources) else {}


def _digests(contents: Contents, names: tuple[str, ...]) -> dict[str, str]:
    return {name: contents.hashes[name].sha256 for name in names if name in contents.hashes}


def _pairs(dependencies: Any) -> set[tuple[str, str]]:
    """Name and digest of each; one without a digest has no place."""
    found = set()
    for one in dependencies:
        (digest,) = one["digest"].values()
        found.add((one["name"], digest))
    return found


def _dependencies(head: Head, chain: Chain) -> Iterator[tuple[str, str]]:
    """What went in, by the records."""
    if head.images is not None:
        yield IMAGES_NAME, head.images.sha256
    for link in chain.links.values():
        yield "code", link.record.code
        yield "requirements.lock", link.record.environment
        yield f"records/{link.stem}.json", link.digest
        if link.run.get("commit") is not None:
            yield "git commit", link.run["commit"]
    for root in chain.roots:
        yield f"{root.role}: {root.name}", root.sha256


def _check_bom(contents: Contents, head: Head, chain: Chain, report: Mapping[str, Any]) -> Faults:
    found = contents.read_object(BOM_NAME)
    component = found["metadata"]["component"]
    if (found["bomFormat"], found["specVersion"]) != ("CycloneDX", "1.6"):
        yield "is not CycloneDX 1.6"
    if component["type"] != "machine-learning-model":
        yield "its component is no model"
    if (component["name"], component["version"]) != (head.model, head.version):
        yield "is of another model or version"
    if _sha256(component) != contents.hashes[MODEL_NAME].sha256:
        yield "names other weights"
    if component["licenses"] != [{"expression": head.licence}]:
        yield "names another licence"
    card = component["modelCard"]
    if card["quantitativeAnalysis"]["performanceMetrics"] != list(_metrics(report)):
        yield "its metrics are not those of evals.json"
    yield from _unlisted(found, head, chain)


def _unlisted(found: Mapping[str, Any], head: Head, chain: Chain) -> Faults:
    """What the model was made of and the bill leaves out."""
    parts = {_sha256(one) for one in found.get("components", ()) if one.get("hashes")}
    for root in chain.roots:
        if root.sha256 not in parts:
            yield f"does not list {root.role} {root.name}"
    if head.images is not None and head.images.sha256 not in parts:
        yield "does not list the images"


def _sha256(component: Mapping[str, Any]) -> str | None:
    found = [one["content"] for one in component["hashes"] if one["alg"] == "SHA-256"]
    return found[0] if len(found) == 1 else None


def _metrics(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row of the report as the bill writes it."""
    for row in report["rows"]:
        parts = [f"subject: {row['subject']}"]
        parts += [f"{name}: {row[name]}" for name in ("k", "num_samples") if row.get(name)]
        yield {
            "type": f"{row['protocol']} {row['metric']}",
            "value": json.dumps(row["value"]),
            "slice": "; ".join(parts),
            "confidenceInterval": {
                "lowerBound": json.dumps(row["low"]),
                "upperBound": json.dumps(row["high"]),
            },
        }


def _check_card(contents: Contents, head: Head, chain: Chain, report: Mapping[str, Any]) -> Faults:
    """The card is made again: beside the author's own words nothing in it may be otherwise."""
    try:
        text = contents.read(CARD_NAME).decode("utf-8")
    except UnicodeDecodeError:
        yield "is not UTF-8"
        return
    header, body = split_card(text, CARD_NAME)
    images = head.images
    facts = Facts(
        name=head.name,
        licence=head.licence,
        network=contents.read_object(CONFIG_NAME, canonical=False)["model"],
        report=report,
        gates=contents.read_object(CHECKS_NAME)["gates"],
        records={digest: link.record for digest, link in chain.links.items()},
        final=head.final,
        evaluation=head.evaluation,
        num_images=None if images is None else (images.num_trained, images.num_evaluated),
    )
    expected = header_of(facts)
    for name in sorted(header.keys() | expected.keys()):
        if header.get(name) != expected.get(name):
            yield f"its header says otherwise than the release of {name}"
    made_again = render_body(facts, find_words(facts, body))
    if body != made_again:
        pairs = itertools.zip_longest(body.split("\n"), made_again.split("\n"))
        odd, right = next(pair for pair in pairs if pair[0] != pair[1])
        yield f"says {_around(odd, right)}, the release's own files give {_around(right, odd)}"


def _around(line: str | None, other: str | None) -> str:
    """The part of a line where another one begins to differ."""
    if line is None:
        return "nothing more"
    pairs = enumerate(zip(line, other or "", strict=False))
    same = min(len(line), len(other or ""))
    at = next((place for place, (one, two) in pairs if one != two), same)
    return repr(line[max(0, at - _SHOWN) : at + _SHOWN])
