"""Foreign words made safe for a terminal, JSON, DOT and HTML; a chain drawn in the last two.

A name, a caption or a licence may come from anyone. Whatever could steer a terminal, end a string
or open a tag is written out, and whatever is not seen (control, direction, joining) as an escape.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BOX_WIDTH, _BOX_HEIGHT = 230, 62  # pixels of the drawing
_GAP_ACROSS, _GAP_DOWN = 40, 56
_MARGIN = 90  # beside the boxes, for arrows that pass others by
_MAX_IN_BOX = 34  # characters
_COLOURS = {"record": "#eef3fb", "root": "#eef8ee", "release": "#fdf3dc", "asked": "#e3d9f7"}
_DOT_SHAPES = {"record": "box", "root": "ellipse", "release": "folder", "asked": "box"}
_WRONG = "#c62828"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}
ul{padding-left:1.2rem}li{overflow-wrap:anywhere}.wrong{color:#c62828}
code{font:13px ui-monospace,monospace}.scroll{overflow:auto;border:1px solid #ddd;padding:1rem}
"""


@dataclass(frozen=True)
class Box:
    """One thing drawn; `kind` is record, root, release or asked; `is_marked` shows it red."""

    key: str
    kind: str
    title: str
    lines: tuple[str, ...] = ()
    is_marked: bool = False


@dataclass(frozen=True)
class Arrow:
    """From what was read to what was made of it, by keys of boxes."""

    tail: str
    head: str
    label: str


@dataclass(frozen=True)
class Graph:
    """Boxes and the arrows between them; an arrow to a box that is not there is not drawn."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def plain(text: str) -> str:
    """Text for a terminal: printable ASCII alone, all else as Python writes it in a string."""
    return text.encode("unicode_escape", "surrogatepass").decode("ascii")


def printable(text: str) -> str:
    """Text whose foreign parts may be escaped already; what steers a terminal is escaped here."""
    return "".join(letter if letter.isprintable() else plain(letter) for letter in text)


def visible(text: str) -> str:
    """Text with its letters of any language; what is not seen, and the backslash, as escapes."""
    return "".join(
        letter if letter.isprintable() and letter != "\\" else plain(letter) for letter in text
    )


def to_json(value: Any) -> str:
    """JSON in printable ASCII, so that it can be shown as well as read."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    return text.replace("\x7f", "\\u007f")


def html_text(text: str) -> str:
    """Text for HTML and SVG, between tags or in a quoted attribute; ASCII."""
    return html.escape(visible(text)).encode("ascii", "xmlcharrefreplace").decode("ascii")


def dot_text(text: str) -> str:
    """A quoted DOT string; DOT reads a backslash as an escape and an ampersand as an entity."""
    escaped = visible(text).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped.encode("ascii", "xmlcharrefreplace").decode("ascii")}"'


def to_dot(graph: Graph) -> str:
    """The graph in the language of Graphviz; no name of it comes from the content."""
    keys = {box.key: f"n{number}" for number, box in enumerate(graph.boxes)}
    lines = ["digraph lineage {", "  node [style=filled, fontsize=11];", "  edge [fontsize=9];"]
    for box in graph.boxes:
        label = "\\n".join(dot_text(line)[1:-1] for line in (box.title, *box.lines))
        colour = f', color="{_WRONG}", fontcolor="{_WRONG}"' if box.is_marked else ""
        shape = f'shape={_DOT_SHAPES[box.kind]}, fillcolor="{_COLOURS[box.kind]}"'
        lines.append(f'  {keys[box.key]} [label="{label}", {shape}{colour}];')
    for arrow in _drawn(graph):
        label = dot_text(arrow.label)
        lines.append(f"  {keys[arrow.tail]} -> {keys[arrow.head]} [label={label}];")
    return "\n".join([*lines, "}"])


def to_html(title: str, graph: Graph, sections: Mapping[str, Sequence[str]]) -> str:
    """A page that needs nothing else: the drawing, then sections of lines of text.

    Args:
        title: Of the page.
        graph: Drawn with roots at the top.
        sections: Heading -> lines; leading spaces of a line indent it; empty ones are left out.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    shown = html_text(title)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{shown}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{shown}</h1>",
    ]
    if graph.boxes:
        parts.append(f'<div class="scroll">{to_svg(graph)}</div>')
    for heading, lines in sections.items():
        if lines:
            parts.extend(_section(heading, lines))
    return "\n".join([*parts, "</body></html>"])


def _section(heading: str, lines: Sequence[str]) -> Iterable[str]:
    mark = ' class="wrong"' if heading in ("Wrong", "Not checked") else ""
    yield f"<h2>{html_text(heading)}</h2>"
    yield f"<ul{mark}>"
    for line in lines:
        inner = line.lstrip(" ")
        depth = (len(line) - len(inner)) * 0.6
        yield f'<li style="margin-left:{depth:.1f}rem">{html_text(inner)}</li>'
    yield "</ul>"


def to_svg(graph: Graph) -> str:
    """The graph as a picture in rows: each box stands below all that it was made from."""
    places = _layout(graph)
    across = 1 + max((column for column, _ in places.values()), default=0)
    down = 1 + max((row for _, row in places.values()), default=0)
    width = across * (_BOX_WIDTH + _GAP_ACROSS) + _MARGIN
    height = down * (_BOX_HEIGHT + _GAP_DOWN) - _GAP_DOWN + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" font-family="system-ui,sans-serif">'
    ]
    for arrow in _drawn(graph):
        tail, head = places[arrow.tail], places[arrow.head]
        draw = _straight if head[1] - tail[1] == 1 else _around
        line = f'd="{draw(_corner(tail), _corner(head))}" fill="none" stroke="#8a94a6"'
        parts.append(f"<path {line}><title>{html_text(arrow.label)}</title></path>")
    for box in graph.boxes:
        parts.append(_svg_box(box, _corner(places[box.key])))
    return "".join([*parts, "</svg>"])


def _straight(tail: tuple[float, float], head: tuple[float, float]) -> str:
    """From below one box to above the next row's."""
    x, y = tail[0] + _BOX_WIDTH / 2, tail[1] + _BOX_HEIGHT
    to_x, to_y = head[0] + _BOX_WIDTH / 2, head[1]
    middle = (y + to_y) / 2
    path = f"M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
    return f"{path}m-4 -7l4 7l4 -7"


def _around(tail: tuple[float, float], head: tuple[float, float]) -> str:
    """From side to side, past the boxes of the rows between, which would hide it."""
    x, y = tail[0] + _BOX_WIDTH, tail[1] + _BOX_HEIGHT / 2
    to_x, to_y = head[0] + _BOX_WIDTH, head[1] + _BOX_HEIGHT / 2
    out = max(x, to_x) + min(_MARGIN, 20 + abs(to_y - y) / 8)
    path = f"M{x:.0f} {y:.0f}C{out:.0f} {y:.0f} {out:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}"
    return f"{path}m7 -4l-7 4l7 4"


def _svg_box(box: Box, corner: tuple[float, float]) -> str:
    x, y = corner
    ink = _WRONG if box.is_marked else "#33415c"
    texts = [
        f'<text x="{x + 10:.0f}" y="{y + 19 + 15 * number:.0f}" '
        f'font-size="{11 if number else 13}" font-weight="{400 if number else 600}" '
        f'fill="{ink}">{html_text(_clip(line))}</text>'
        for number, line in enumerate((box.title, *box.lines)[:3])
    ]
    whole = html_text("; ".join((box.title, *box.lines)))
    return (
        f'<g><title>{whole}</title><rect x="{x:.0f}" y="{y:.0f}" width="{_BOX_WIDTH}" '
        f'height="{_BOX_HEIGHT}" rx="7" fill="{_COLOURS[box.kind]}" stroke="{ink}"/>'
        f"{''.join(texts)}</g>"
    )


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_IN_BOX else f"{text[: _MAX_IN_BOX - 1]}…"


def _corner(place: tuple[float, int]) -> tuple[float, float]:
    column, row = place
    return column * (_BOX_WIDTH + _GAP_ACROSS) + 2, row * (_BOX_HEIGHT + _GAP_DOWN) + 2


def _drawn(graph: Graph) -> list[Arrow]:
    keys = {box.key for box in graph.boxes}
    return [arrow for arrow in graph.arrows if arrow.tail in keys and arrow.head in keys]


def _layout(graph: Graph) -> dict[str, tuple[float, int]]:
    """Column and row of each box: rows by the longest way from above, centred over each other."""
    arrows = _drawn(graph)
    rows = {box.key: 0 for box in graph.boxes}
    for _ in graph.boxes:  # as often as a way can be long, should records ever form a ring
        before = dict(rows)
        for arrow in arrows:
            rows[arrow.head] = max(rows[arrow.head], rows[arrow.tail] + 1)
        if rows == before or max(rows.values()) > len(rows):
            break
    in_row: dict[int, list[str]] = {}
    for box in graph.boxes:
        in_row.setdefault(rows[box.key], []).append(box.key)
    widest = max(map(len, in_row.values()), default=1)
    tails: dict[str, list[str]] = {}
    for arrow in arrows:
        tails.setdefault(arrow.head, []).append(arrow.tail)
    places: dict[str, tuple[float, int]] = {}
    for number, row in enumerate(sorted(in_row)):
        keys = sorted(in_row[row], key=lambda key: _mean_above(tails.get(key, ()), places))
        shift = (widest - len(keys)) / 2
        places.update({key: (column + shift, number) for column, key in enumerate(keys)})
    return places


def _mean_above(tails: Sequence[str], places: Mapping[str, tuple[float, int]]) -> float:
    above = [places[tail][0] for tail in tails if tail in places]
    return sum(above) / len(above) if above else 0.0
