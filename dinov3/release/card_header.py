"""The header of a model card: the part of YAML that our cards are written in, and no more.

Block mappings and sequences; every scalar is a number or a text in double quotes, on one line.
Anchors, tags, flow, folded and plain text are refused: two readers could take them differently.
"""

import re
from typing import Any

from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import Refused

_KEY = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(?: (.*))?")
_SIGNS = {
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "t": "\t",
    "n": "\n",
    "v": "\v",
    "f": "\f",
    "r": "\r",
    "e": "\x1b",
    " ": " ",
    '"': '"',
    "/": "/",
    "\\": "\\",
    "N": "\x85",
    "_": "\xa0",
    "L": "\u2028",
    "P": "\u2029",
}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_QUOTED = re.compile(
    r'"((?:[^"\\\x00-\x1f\x7f]'
    r'|\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0abtnvfre "/\\N_LP]))*)"'
)
_MAX_DEPTH = 12

Lines = list[tuple[int, str]]  # spaces before, content


def split_card(text: str, where: str) -> tuple[dict[str, Any], str]:
    """Header and body of a card.

    Args:
        text: The card.
        where: What to call it in a refusal.

    Raises:
        Refused: `card-differs`: it has no header, or one in other words than ours.
    """
    start, end = "---\n", "\n---\n"
    if not text.startswith(start) or end not in text:
        raise Refused("card-differs", where, "it has no header")
    header, _, body = text.removeprefix(start).partition(end)
    return _Reader(header, where).read(), body


class _Reader:
    """Reads one header from its first line to its last."""

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        self._lines: Lines = [
            (len(line) - len(line.lstrip(" ")), line.lstrip(" ")) for line in text.split("\n")
        ]
        self._at = 0

    def read(self) -> dict[str, Any]:
        """The whole header, a mapping."""
        found = self._mapping(0, 0)
        if self._at != len(self._lines):
            raise self._error()
        return found

    def _mapping(self, indent: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self._here(indent) and not self._content().startswith("- "):
            match = _KEY.fullmatch(self._content())
            if match is None or match[1] in found or depth > _MAX_DEPTH:
                raise self._error()
            if match[2]:
                found[match[1]] = self._scalar(match[2])
                self._at += 1
            else:
                self._at += 1
                found[match[1]] = self._below(indent, depth + 1)
        return found

    def _below(self, indent: int, depth: int) -> Any:
        """What stands under a key: a sequence may stand as far left as its key."""
        if self._at == len(self._lines):
            raise self._error()
        inner, content = self._lines[self._at]
        if content.startswith("- ") and inner >= indent:
            return self._sequence(inner, depth)
        if inner > indent:
            return self._mapping(inner, depth)
        raise self._error()

    def _sequence(self, indent: int, depth: int) -> list[Any]:
        found: list[Any] = []
        while self._here(indent) and self._content().startswith("- "):
            content = self._content()[2:]
            if depth > _MAX_DEPTH:
                raise self._error()
            if _KEY.fullmatch(content):
                self._lines[self._at] = (indent + 2, content)
                found.append(self._mapping(indent + 2, depth + 1))
            else:
                found.append(self._scalar(content))
                self._at += 1
        return found

    def _here(self, indent: int) -> bool:
        return self._at < len(self._lines) and self._lines[self._at][0] == indent

    def _content(self) -> str:
        return self._lines[self._at][1]

    def _scalar(self, text: str) -> str | float:
        quoted = _QUOTED.fullmatch(text)
        try:
            value = parse_json(text.encode()) if quoted is None else _unescape(quoted[1])
        except (RecordError, UnicodeEncodeError, OverflowError, ValueError) as error:
            raise self._error() from error
        if quoted is None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._error()
        found: str | float = value
        return found

    def _error(self) -> Refused:
        why = f"line {self._at + 2} of its header is in other words than a card is written in"
        return Refused("card-differs", self._where, why)


def _unescape(text: str) -> str:
    return _ESCAPE.sub(_letter, text)


def _letter(match: re.Match[str]) -> str:
    sign = match[1]
    return _SIGNS[sign] if sign in _SIGNS else chr(int(sign[1:], 16))
