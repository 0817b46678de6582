"""What the licences of inputs ask of a release: a table of rules, and a judgement by it.

Whether weights are a derived work of the pictures or weights they were made from is not settled in
law. Our rule is the careful reading: every condition of an input is taken to reach the release.
What a licence *says* (attribution, the same licence, no commerce, no changed copies) is in its
text; that it binds *weights* is a rule of ours, and no legal advice. The table is short on
purpose: a licence that is not in it is "unknown", and unknown is an error. Terms of somebody's own,
`LicenseRef-NAME`, cannot be judged: what was made from them goes out under the same terms alone,
with their text. What stands after WITH is known only where all it does is permit more: an input may
carry it, and a release adds none to what is share-alike.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dinov3.release.spdx import (
    All,
    Choice,
    Expression,
    Licence,
    LicenceError,
    licences_in,
    parse_expression,
    render_expression,
)


@dataclass(frozen=True)
class Rule:
    """What one licence asks.

    Attributes:
        attribution: Name the authors, keep the notice.
        share_alike: Pass on only under the same licence, or one of `also_under`.
        non_commercial: No use for money.
        forbids: Why nothing made from it may be released at all; None where it may.
        custom: Terms of its own, no standard licence: they are passed on whole.
        also_under: Other licences that satisfy `share_alike`.
    """

    attribution: bool = True
    share_alike: bool = False
    non_commercial: bool = False
    forbids: str | None = None
    custom: bool = False
    also_under: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Licensing:
    """Judgement of a release's licence over those of its inputs; each part is sorted text.

    Attributes:
        obligations: What whoever passes the release on has to do, `what: licence`.
        conflicts: Why the release's licence does not fit.
        unknown: Licences of inputs or release that the table does not know.
    """

    obligations: tuple[str, ...]
    conflicts: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the release may go out."""
        return not self.conflicts and not self.unknown


def _later(*names: str) -> frozenset[str]:
    return frozenset(names)


_FREE = Rule(attribution=False)
_NOTICE = Rule()
_OWN_NAME = re.compile(r"LicenseRef-[A-Za-z0-9.-]*[A-Za-z0-9]")
_OWN_TERMS = Rule(share_alike=True, custom=True)  # we cannot read them: the same terms, passed on
_NO_DERIVATIVES = Rule(forbids="it allows no adaptations")
_GPL_3 = _later("GPL-3.0-only", "GPL-3.0-or-later")
_GPL_2 = _later("GPL-2.0-only", "GPL-2.0-or-later")


def _same(*also_under: str | frozenset[str], non_commercial: bool = False) -> Rule:
    names: set[str] = set()
    for one in also_under:
        names |= {one} if isinstance(one, str) else one
    return Rule(share_alike=True, non_commercial=non_commercial, also_under=frozenset(names))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("CC0-1.0", "PDDL-1.0", "Unlicense", "0BSD", "WTFPL"), _FREE),
    **dict.fromkeys(
        ("MIT", "ISC", "Zlib", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0"), _NOTICE
    ),
    **dict.fromkeys(("CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "ODC-By-1.0"), _NOTICE),
    "CC-BY-SA-2.0": _same("CC-BY-SA-2.5", "CC-BY-SA-3.0", "CC-BY-SA-4.0"),
    "CC-BY-SA-2.5": _same("CC-BY-SA-3.0", "CC-BY-SA-4.0"),
    "CC-BY-SA-3.0": _same("CC-BY-SA-4.0"),
    "CC-BY-SA-4.0": _same(_GPL_3),  # one way, by Creative Commons' list of compatible licences
    **dict.fromkeys(("CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0"), Rule(non_commercial=True)),
    **dict.fromkeys(
        ("CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0"), _same(non_commercial=True)
    ),
    **dict.fromkeys(
        (
            *("CC-BY-ND-2.0", "CC-BY-ND-3.0", "CC-BY-ND-4.0"),
            *("CC-BY-NC-ND-2.0", "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0"),
        ),
        _NO_DERIVATIVES,
    ),
    "GPL-2.0-only": _same("GPL-2.0-or-later"),
    "GPL-2.0-or-later": _same("GPL-2.0-only", _GPL_3, "AGPL-3.0-only", "AGPL-3.0-or-later"),
    "GPL-3.0-only": _same("GPL-3.0-or-later"),
    "GPL-3.0-or-later": _same("GPL-3.0-only"),
    "LGPL-2.1-only": _same("LGPL-2.1-or-later", _GPL_2, _GPL_3),
    "LGPL-2.1-or-later": _same(
        "LGPL-2.1-only", "LGPL-3.0-only", "LGPL-3.0-or-later", _GPL_2, _GPL_3
    ),
    "LGPL-3.0-only": _same("LGPL-3.0-or-later", _GPL_3),
    "LGPL-3.0-or-later": _same("LGPL-3.0-only", _GPL_3),
    "AGPL-3.0-only": _same("AGPL-3.0-or-later"),
    "AGPL-3.0-or-later": _same("AGPL-3.0-only"),
    "MPL-2.0": _same(_GPL_2, _GPL_3),
    "ODbL-1.0": _same(),
    "LicenseRef-DINOv3": Rule(share_alike=True, custom=True),
    "LicenseRef-AllRightsReserved": Rule(forbids="all rights are reserved"),
}

# Names that are no SPDX identifiers but mean exactly one; compared without regard to case.
ALIASES: dict[str, str] = {
    "gpl-2": "GPL-2.0-only",  # Debian's names: a bare number is that version alone
    "gpl-2+": "GPL-2.0-or-later",
    "gpl-3": "GPL-3.0-only",
    "gpl-3+": "GPL-3.0-or-later",
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-2.1+": "LGPL-2.1-or-later",
    "lgpl-3": "LGPL-3.0-only",
    "lgpl-3+": "LGPL-3.0-or-later",
    "gpl-2.0": "GPL-2.0-only",  # identifiers that SPDX has since deprecated
    "gpl-2.0+": "GPL-2.0-or-later",
    "gpl-3.0": "GPL-3.0-only",
    "gpl-3.0+": "GPL-3.0-or-later",
    "lgpl-3.0": "LGPL-3.0-only",
    "lgpl-3.0+": "LGPL-3.0-or-later",
    "agpl-3.0": "AGPL-3.0-only",
    "agpl-3.0+": "AGPL-3.0-or-later",
    "cc0": "CC0-1.0",
    "expat": "MIT",
    "bsd-2": "BSD-2-Clause",
    "bsd-3": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "dinov3": "LicenseRef-DINOv3",
    "dinov3-license": "LicenseRef-DINOv3",
    "all rights reserved": "LicenseRef-AllRightsReserved",
}
_SPELLING = {name.lower(): name for name in RULES}
_PERMISSIONS = {  # SPDX exceptions that take nothing away
    "autoconf-exception-3.0",
    "bison-exception-2.2",
    "classpath-exception-2.0",
    "font-exception-2.0",
    "gcc-exception-3.1",
    "llvm-exception",
}


def normal_form(text: str) -> str:
    """The expression in SPDX's spelling, aliases replaced.

    Raises:
        LicenceError: It is no licence expression.
    """
    return render_expression(_read(text))


def unknown_in(text: str) -> set[str]:
    """What nobody here knows in a licence text: identifiers, exceptions, or the text as a whole."""
    try:
        named = licences_in(_read(text))
    except LicenceError:
        return {text}
    exceptions = {licence.exception for licence in named if licence.exception}
    unknown = {one for one in exceptions if one.lower() not in _PERMISSIONS}
    return unknown | {licence.name for licence in named if _rule(licence.name) is None}


def rule_of(name: str) -> Rule:
    """What a known licence asks; of terms of somebody's own, that their text is kept to.

    Raises:
        KeyError: The table does not know it.
    """
    rule = _rule(name)
    if rule is None:
        raise KeyError(name)
    return rule


def _rule(name: str) -> Rule | None:
    return RULES.get(name, _OWN_TERMS if _OWN_NAME.fullmatch(name) else None)


def identifiers(text: str) -> set[str]:
    """The identifiers an expression names, in the table's spelling.

    Raises:
        LicenceError: It is no licence expression.
    """
    return {licence.name for licence in licences_in(_read(text))}


def judge(inputs: Collection[str], release: str) -> Licensing:
    """Holds the licences of a release's inputs against the licence it is given out under.

    Of an input under `A OR B` the alternative is chosen that fits; of a release under `A OR B`
    every alternative must fit, for its receiver may choose any.

    Args:
        inputs: Licence texts as the records carry them.
        release: SPDX expression of the release.
    """
    unknown = {name for text in (*inputs, release) for name in unknown_in(text)}
    readable = sorted(text for text in set(inputs) if not unknown_in(text))
    if unknown_in(release):
        return Licensing((), (), tuple(sorted(unknown)))
    given = _read(release)
    obligations: set[str] = set()
    conflicts: set[str] = set()
    for text in readable:
        duties, clashes = _best(_read(text), given)
        obligations.update(duties)
        conflicts.update(clashes)
    return Licensing(tuple(sorted(obligations)), tuple(sorted(conflicts)), tuple(sorted(unknown)))


def _best(source: Expression, given: Expression) -> tuple[set[str], set[str]]:
    """Duties and clashes of one input; of alternatives those with the fewest clashes."""
    if isinstance(source, Licence):
        return set(_duties(source)), set(_clashes(source, given))
    found = [_best(part, given) for part in source.parts]
    if isinstance(source, Choice):
        return min(found, key=lambda pair: (len(pair[1]), len(pair[0]), sorted(pair[0])))
    duties = {duty for pair in found for duty in pair[0]}
    return duties, {clash for pair in found for clash in pair[1]}


def _duties(licence: Licence) -> Iterator[str]:
    rule, name = rule_of(licence.name), licence.name
    if rule.attribution:
        yield f"attribution: {name}"
    if rule.share_alike:
        yield f"share alike: {name}"
    if rule.non_commercial:
        yield f"non-commercial: {name}"
    if rule.custom:
        yield f"pass on its terms: {name}"


def _clashes(licence: Licence, given: Expression) -> Iterator[str]:
    rule, name = rule_of(licence.name), licence.name
    if rule.forbids is not None:
        yield f"{name}: {rule.forbids}"
        return
    shown = render_expression(given)
    if rule.share_alike and not _holds(given, {name, *rule.also_under}):
        yield f"{name}: asks for the same licence, the release is under {shown}"
    if rule.non_commercial and not _holds(given, _NON_COMMERCIAL):
        yield f"{name}: forbids commerce, {shown} allows it"
    if rule.share_alike:
        kept = {name, *rule.also_under}
        for other in sorted(one.name for one in licences_in(given)):
            if other not in kept and _restricts(rule_of(other)) and not rule.non_commercial:
                yield f"{name}: allows no further restrictions, {other} adds some"


def _holds(given: Expression, names: Collection[str]) -> bool:
    """Whether every alternative of a release carries one of these licences."""
    if isinstance(given, Licence):
        return given.name in names and given.exception is None
    if isinstance(given, All):
        return any(_holds(part, names) for part in given.parts)
    return all(_holds(part, names) for part in given.parts)


def _restricts(rule: Rule) -> bool:
    return rule.non_commercial or rule.custom or rule.forbids is not None


_NON_COMMERCIAL = frozenset(name for name, rule in RULES.items() if rule.non_commercial)


def _read(text: str) -> Expression:
    whole = ALIASES.get(text.strip().lower())
    return _spelt(parse_expression(whole or text))


def _spelt(expression: Expression) -> Expression:
    """Identifiers in the table's spelling, aliases replaced, `+` folded into the identifier."""
    if isinstance(expression, Licence):
        return _spelt_licence(expression)
    parts = tuple(_spelt(part) for part in expression.parts)
    return All(parts) if isinstance(expression, All) else Choice(parts)


def _spelt_licence(licence: Licence) -> Licence:
    written = licence.name.lower() + ("+" if licence.or_later else "")
    alias = ALIASES.get(written)
    if alias is not None:
        return Licence(alias, False, licence.exception)
    name = _SPELLING.get(licence.name.lower(), licence.name)
    later = name.removesuffix("-only") + "-or-later"
    if licence.or_later and later in RULES:
        return Licence(later, False, licence.exception)
    return Licence(name, licence.or_later, licence.exception)
