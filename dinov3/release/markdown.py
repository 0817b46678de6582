"""Foreign text in Markdown: names, labels and reasons come from people, and must not be markup."""

import re
import unicodedata

_MARKUP = re.compile(r"([\\`*_{}\[\]()#!|~:^@$])")
_AT_START = re.compile(r"^(\d*)([-+=.])")  # of lists and underlines
_HOST = re.compile(r"(?i)(www)\.")  # some readers make links of bare names
_ESCAPED = re.compile(r"\\(.)")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">"}
_ENTITY = re.compile(r"&(amp|lt|gt);")
_TICKS = re.compile(r"`+")
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def code(text: str, *, in_table: bool = False) -> str:
    """Foreign text as a code span, in which Markdown and HTML mean nothing.

    Args:
        text: Line ends and invisible characters are shown by their code points.
        in_table: Whether it stands in a cell: rows are cut at bars before spans are looked for.
    """
    shown = visible(text).replace("|", "\\|") if in_table else visible(text)
    longest = max((len(run) for run in _TICKS.findall(shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) or not shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def prose(text: str) -> str:
    """Foreign text as running words: every sign of Markdown and HTML is escaped."""
    shown = " ".join(visible(text).split())  # four spaces at a beginning are markup too
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _HOST.sub(r"\1\\.", _AT_START.sub(r"\1\\\2", _MARKUP.sub(r"\\\1", shown)))


def plain_words(shown: str) -> str:
    """The text that `prose` made running words of, up to its spaces."""
    bare = _ESCAPED.sub(r"\1", shown)
    return _ENTITY.sub(lambda match: _ENTITIES[match[1]], bare)


def visible(text: str) -> str:
    """Text with every control, format or separating character written as its code point."""
    return "".join(
        f"U+{ord(one):04X}" if unicodedata.category(one) in _HIDDEN else one for one in text
    )
