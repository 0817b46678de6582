"""Provenance, bill of materials and model card: other people's words for what the records say.

They are made for other tools and for people. Each is made again from the other files and compared:
beside their author's own words nothing in them may be otherwise.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from dinov3.release.bill import bill_of, in_order
from dinov3.release.card import find_words, render_body
from dinov3.release.card_facts import Facts, header_of
from dinov3.release.card_header import split_card
from dinov3.release.chain import Chain
from dinov3.release.contents import (
    BOM_NAME,
    CARD_NAME,
    CHECKS_NAME,
    CONFIG_NAME,
    PROVENANCE_NAME,
    Contents,
)
from dinov3.release.head import Head
from dinov3.release.refusals import Refused
from dinov3.release.statement import statement_of

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
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            why = f"lacks a field, or has one of another kind: {error}"
            raise Refused(refusal, name, why) from error
        if why is not None:
            raise Refused(refusal, name, why)


Faults = Iterator[str]


def _check_provenance(contents: Contents, head: Head, chain: Chain, _: Mapping[str, Any]) -> Faults:
    found = contents.read_object(PROVENANCE_NAME)
    yield from _differences(found, statement_of(contents, head, chain, found))


def _check_bom(contents: Contents, head: Head, chain: Chain, report: Mapping[str, Any]) -> Faults:
    found = contents.read_object(BOM_NAME)
    expected = bill_of(contents, head, chain, report, found)
    yield from _differences(in_order(found), in_order(expected))


def _differences(found: Any, expected: Any, where: str = "") -> Faults:
    """Places where a JSON value is not the expected one."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            below = f"{where}.{name}".lstrip(".")
            if name not in expected:
                yield f"{below}: the release's own files do not give it"
            elif name not in found:
                yield f"{below}: is left out"
            else:
                yield from _differences(found[name], expected[name], below)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{where}[{number}]")
    elif type(found) is not type(expected) or found != expected:
        yield f"{where}: is not what the release's own files give"


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
