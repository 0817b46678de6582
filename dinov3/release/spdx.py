"""SPDX licence expressions: `MIT AND (GPL-2.0-only OR CC-BY-4.0)`, read without the SPDX list.

Grammar (SPDX specification, annex "SPDX license expressions"): WITH binds tightest, then AND, then
OR; `+` after an identifier means "or any later version". Operators and identifiers are compared
without regard to case, as the specification asks.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

_TOKEN = re.compile(r"\s*(?:(?P<sign>[()])|(?P<word>[A-Za-z0-9.:-]+\+?))")
_OPERATORS = {"AND", "OR", "WITH"}
_MAX_LENGTH = 2000  # characters
_MAX_DEPTH = 50  # parentheses within parentheses


class LicenceError(ValueError):
    """A text that is no licence expression."""


@dataclass(frozen=True)
class Licence:
    """One licence: its identifier, whether later versions are allowed too, its exception."""

    name: str
    or_later: bool = False
    exception: str | None = None


@dataclass(frozen=True)
class All:
    """Every part applies (AND)."""

    parts: "tuple[Expression, ...]"


@dataclass(frozen=True)
class Choice:
    """The receiver chooses one part (OR)."""

    parts: "tuple[Expression, ...]"


Expression: TypeAlias = Licence | All | Choice


def parse_expression(text: str) -> Expression:
    """Reads an SPDX licence expression; whether its licences are known is another question.

    Raises:
        LicenceError: It is not one.
    """
    if len(text) > _MAX_LENGTH:
        msg = f"licence expression: longer than {_MAX_LENGTH} characters, got {len(text)}"
        raise LicenceError(msg)
    parser = _Parser(_tokens(text), text)
    found = parser.choice(0)
    if parser.peek() is not None:
        raise parser.error()
    return found


def render_expression(expression: Expression) -> str:
    """The expression as text, with parentheses only where they are needed."""
    if isinstance(expression, Licence):
        plus = "+" if expression.or_later else ""
        exception = f" WITH {expression.exception}" if expression.exception else ""
        return f"{expression.name}{plus}{exception}"
    if isinstance(expression, Choice):
        return " OR ".join(render_expression(part) for part in expression.parts)
    return " AND ".join(
        f"({render_expression(part)})" if isinstance(part, Choice) else render_expression(part)
        for part in expression.parts
    )


def licences_in(expression: Expression) -> set[Licence]:
    """Every licence an expression names."""
    if isinstance(expression, Licence):
        return {expression}
    return {licence for part in expression.parts for licence in licences_in(part)}


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, tokens: list[str], text: str) -> None:
        self._tokens = tokens
        self._at = 0
        self._text = text

    def peek(self) -> str | None:
        """The next token; None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def choice(self, depth: int) -> Expression:
        """Parts joined by OR."""
        parts = [self._both(depth)]
        while self._takes("OR"):
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else Choice(_flat(parts, Choice))

    def error(self) -> LicenceError:
        """What stands where it should not."""
        found = self.peek()
        shown = "the end" if found is None else repr(found)
        return LicenceError(f"licence expression: unexpected {shown} in {self._text[:80]!r}")

    def _both(self, depth: int) -> Expression:
        parts = [self._single(depth)]
        while self._takes("AND"):
            parts.append(self._single(depth))
        return parts[0] if len(parts) == 1 else All(_flat(parts, All))

    def _single(self, depth: int) -> Expression:
        if self._takes("("):
            if depth >= _MAX_DEPTH:
                msg = f"licence expression: parentheses deeper than {_MAX_DEPTH}"
                raise LicenceError(msg)
            inner = self.choice(depth + 1)
            if not self._takes(")"):
                raise self.error()
            return inner
        name = self._name()
        exception = self._name() if self._takes("WITH") else None
        if exception is not None and exception.endswith("+"):
            self._at -= 1
            raise self.error()
        return Licence(name.removesuffix("+"), name.endswith("+"), exception)

    def _name(self) -> str:
        found = self.peek()
        if found is None or found in "()" or found.upper() in _OPERATORS:
            raise self.error()
        self._at += 1
        return found

    def _takes(self, token: str) -> bool:
        found = self.peek()
        if found is None or found.upper() != token:
            return False
        self._at += 1
        return True


def _tokens(text: str) -> list[str]:
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            msg = f"licence expression: no identifier at {text[at : at + 20]!r}"
            raise LicenceError(msg)
        found.append(match["sign"] or match["word"])
        at = match.end()
    return found


def _flat(parts: list[Expression], kind: type[All] | type[Choice]) -> tuple[Expression, ...]:
    """`A OR (B OR C)` is `A OR B OR C`."""
    flat: list[Expression] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, kind) else [part])
    return tuple(flat)
