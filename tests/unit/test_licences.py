"""Licence expressions are read as others read them, and judged by the table alone."""

import random

import pytest
from license_expression import Licensing as Oracle  # type: ignore[import-untyped]

from dinov3.release.licences import ALIASES, RULES, identifiers, judge, normal_form, unknown_in
from dinov3.release.spdx import (
    All,
    Choice,
    Licence,
    LicenceError,
    parse_expression,
    render_expression,
)

NAMES = ("MIT", "Apache-2.0", "GPL-2.0-only", "CC-BY-4.0", "LicenseRef-DINOv3", "BSD-3-Clause")


def _random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(NAMES)
    parts = [_random_expression(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    joined = f" {rng.choice(('AND', 'OR', 'and', 'or'))} ".join(parts)
    return f"({joined})" if rng.random() < 0.6 else joined


def test_parser_agrees_with_the_reference_on_random_expressions() -> None:
    rng, oracle = random.Random(0), Oracle(list(NAMES))
    for _ in range(400):
        text = _random_expression(rng, 3)
        assert oracle.is_equivalent(render_expression(parse_expression(text)), text), text


def test_parser_accepts_nothing_that_the_reference_refuses() -> None:
    """The reference is the laxer one: it lets `MIT OR` pass."""
    rng, oracle = random.Random(1), Oracle(list(NAMES))
    num_refused = num_accepted = 0
    for _ in range(600):
        words = [rng.choice((*NAMES, "AND", "OR", "(", ")")) for _ in range(rng.randint(1, 6))]
        text = " ".join(words)
        try:
            ours = render_expression(parse_expression(text))
        except LicenceError:
            num_refused += 1
            continue
        assert oracle.is_equivalent(ours, text), text
        num_accepted += 1
    assert num_refused > 100
    assert num_accepted > 50


def test_and_binds_tighter_than_or() -> None:
    mit, bsd, cc0 = Licence("MIT"), Licence("BSD-3-Clause"), Licence("CC0-1.0")
    assert parse_expression("MIT OR BSD-3-Clause AND CC0-1.0") == Choice((mit, All((bsd, cc0))))
    assert parse_expression("(MIT OR BSD-3-Clause) AND CC0-1.0") == All((Choice((mit, bsd)), cc0))


def test_with_names_an_exception_of_one_licence() -> None:
    found = parse_expression("GPL-2.0-or-later WITH Classpath-exception-2.0 AND MIT")
    exception = Licence("GPL-2.0-or-later", exception="Classpath-exception-2.0")
    assert found == All((exception, Licence("MIT")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MIT AND",
        "OR MIT",
        "MIT BSD-3-Clause",
        "(MIT",
        "MIT)",
        "()",
        "MIT WITH",
        "MIT WITH AND",
        "MIT WITH x+",
        "CC BY 4.0",
        "caf\u00e9",
        "MIT; rm -rf",
        "(" * 60 + "MIT" + ")" * 60,
        "MIT OR " * 400 + "MIT",
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(LicenceError, match="licence expression"):
        parse_expression(text)
    assert unknown_in(text) == {text}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-2+", "GPL-2.0-or-later"),
        ("gpl-2.0+", "GPL-2.0-or-later"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("mit", "MIT"),
        ("cc-by-sa-4.0", "CC-BY-SA-4.0"),
        ("dinov3-license", "LicenseRef-DINOv3"),
        ("GPL-2 OR cc0", "GPL-2.0-only OR CC0-1.0"),
        ("All rights reserved", "LicenseRef-AllRightsReserved"),
        ("Apache-2.0+", "Apache-2.0+"),
    ],
)
def test_aliases_and_spellings_have_one_form(text: str, name: str) -> None:
    assert normal_form(text) == name
    assert normal_form(name) == name


def test_aliases_lead_to_the_table() -> None:
    assert set(ALIASES.values()) <= RULES.keys()
    assert all(name == name.lower() for name in ALIASES)


def test_identifiers_are_those_an_expression_names() -> None:
    assert identifiers("(mit OR GPL-2+) AND CC0-1.0") == {"MIT", "GPL-2.0-or-later", "CC0-1.0"}


@pytest.mark.parametrize(
    ("inputs", "release"),
    [
        (["CC0-1.0"], "MIT"),
        (["MIT", "BSD-3-Clause", "CC-BY-4.0"], "Apache-2.0"),
        (["GPL-2"], "GPL-2.0-only"),
        (["GPL-2.0-or-later"], "GPL-3.0-or-later"),
        (["LGPL-2.1-only"], "GPL-2.0-only"),
        (["CC-BY-SA-4.0"], "CC-BY-SA-4.0 AND MIT"),
        (["CC-BY-SA-4.0"], "GPL-3.0-only"),
        (["CC-BY-NC-4.0"], "CC-BY-NC-SA-4.0"),
        (["GPL-2.0-only OR MIT"], "Apache-2.0"),
        (["LicenseRef-DINOv3", "MIT"], "LicenseRef-DINOv3"),
    ],
)
def test_release_that_honours_its_inputs_passes(inputs: list[str], release: str) -> None:
    assert judge(inputs, release).passed


@pytest.mark.parametrize(
    ("inputs", "release", "why"),
    [
        (["GPL-2"], "MIT", "asks for the same licence"),
        (["GPL-2"], "GPL-2.0-only OR MIT", "asks for the same licence"),
        (["GPL-2.0-only"], "GPL-3.0-only", "asks for the same licence"),
        (["GPL-3.0-only"], "CC-BY-SA-4.0", "asks for the same licence"),
        (["CC-BY-NC-4.0"], "CC-BY-4.0", "forbids commerce"),
        (["CC-BY-NC-4.0"], "CC-BY-NC-4.0 OR MIT", "forbids commerce"),
        (["GPL-2", "CC-BY-NC-4.0"], "GPL-2.0-only AND CC-BY-NC-4.0", "no further restrictions"),
        (["LicenseRef-DINOv3"], "Apache-2.0", "asks for the same licence"),
        (["CC-BY-ND-4.0"], "CC-BY-ND-4.0", "allows no adaptations"),
        (["all rights reserved"], "MIT", "all rights are reserved"),
        (["GPL-2.0-only AND MIT"], "MIT", "asks for the same licence"),
        (["GPL-2.0-only OR CC-BY-NC-4.0"], "MIT", "GPL-2.0-only|CC-BY-NC-4.0"),
    ],
)
def test_release_that_does_not_honour_its_inputs_is_in_conflict(
    inputs: list[str], release: str, why: str
) -> None:
    found = judge(inputs, release)
    assert not found.passed
    assert any(part in conflict for conflict in found.conflicts for part in why.split("|"))


@pytest.mark.parametrize("text", ["unknown", "CC BY 4.0", "LicenseRef-", "NOASSERTION", ""])
def test_unknown_licence_is_an_error_on_either_side(text: str) -> None:
    assert judge([text, "MIT"], "MIT").unknown == (text,)
    assert judge(["MIT"], text).unknown == (text,)
    assert not judge([text], "MIT").passed


def test_obligations_name_what_is_owed() -> None:
    found = judge(["CC-BY-NC-SA-4.0", "CC0-1.0"], "CC-BY-NC-SA-4.0")
    assert found.obligations == (
        "attribution: CC-BY-NC-SA-4.0",
        "non-commercial: CC-BY-NC-SA-4.0",
        "share alike: CC-BY-NC-SA-4.0",
    )


def test_terms_of_dinov3_are_passed_on() -> None:
    found = judge(["LicenseRef-DINOv3"], "LicenseRef-DINOv3")
    assert "pass on its terms: LicenseRef-DINOv3" in found.obligations


def test_of_alternatives_the_one_that_fits_is_taken() -> None:
    assert judge(["GPL-2.0-only OR MIT"], "MIT").obligations == ("attribution: MIT",)
    assert "share alike: GPL-2.0-only" in judge(["GPL-2.0-only OR ODbL-1.0"], "GPL-2").obligations


def test_judgement_does_not_depend_on_order() -> None:
    rng = random.Random(2)
    names = [*RULES, "unknown", "MIT OR GPL-2.0-only"]
    for _ in range(100):
        inputs = rng.sample(names, 4)
        release = rng.choice(list(RULES))
        assert judge(inputs, release) == judge(inputs[::-1], release)


def test_terms_of_somebodys_own_go_out_under_the_same_terms_alone() -> None:
    own = "LicenseRef-internal"
    same = judge([own, "MIT"], own)
    assert same.passed
    assert f"pass on its terms: {own}" in same.obligations
    assert judge([own], f"{own} AND MIT").passed
    for other in ("MIT", "LicenseRef-internal-2", f"{own} OR MIT", "GPL-3.0-or-later"):
        assert not judge([own], other).passed
    assert not judge(["GPL-3.0-or-later"], own).passed
    assert not judge(["CC-BY-NC-4.0"], own).passed
    assert judge(["MIT"], own).passed


def test_reserved_rights_stay_reserved_whatever_the_spelling() -> None:
    assert not judge(["LicenseRef-allRIGHTSreserved"], "LicenseRef-allRIGHTSreserved").passed
    assert unknown_in("LicenseRef-") == {"LicenseRef-"}


@pytest.mark.parametrize("addition", ["Commons-Clause", "LicenseRef-AllRightsReserved"])
def test_addition_that_may_take_rights_away_is_unknown(addition: str) -> None:
    found = judge([f"MIT WITH {addition}"], "MIT")
    assert found.unknown == (addition,)
    assert judge(["MIT"], f"MIT WITH {addition}").unknown == (addition,)


def test_exception_that_permits_more_is_known_and_is_not_added_to_others_work() -> None:
    permitting = "GPL-2.0-only WITH classpath-exception-2.0"
    assert judge([permitting], "GPL-2.0-only").passed
    assert judge(["GPL-2.0-only"], permitting).conflicts
