"""Foreign words in each form of output: shown, never obeyed."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from dinov3.release.render import (
    Arrow,
    Box,
    Graph,
    dot_text,
    html_text,
    plain,
    to_dot,
    to_html,
    to_json,
    visible,
)

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "safe\rfake",
    "a\nb\tc\0",
    "\u202egpj.exe",
    "\u2066x\u2069\u200b\ufeff",
    "\x7f\x85\x9b31m",
    "</script><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "\"' onload='x",
    '"];evil [label="x',
    "\\",
    'ends with a backslash\\"',
    "\\N \\G \\l &lt;b&gt; &#60;",
    "]]><!-- -->",
    "\ud800",
    "\U000e0041\u2028\u2029",
    "naïve 日本 😀",
]
QUOTED = r'"(?:[^"\\\n]|\\.)*"'
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "ul", "li"}
TAGS |= {"svg", "g", "rect", "path", "text"}


def a_graph(word):
    boxes = (
        Box(f"root {word}", "root", word, (word,)),
        Box(word, "asked", word, (word, word), is_marked=True),
        Box("release", "release", word),
    )
    return Graph(boxes, (Arrow(f"root {word}", word, word), Arrow(word, "release", word)))


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("word", HOSTILE)
def test_terminal_sees_printable_ascii_alone(word):
    shown = plain(word)
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.encode().decode("unicode_escape") == word


@pytest.mark.parametrize("word", HOSTILE)
def test_json_is_printable_and_reads_back(word):
    text = to_json({"facts": {word: [word]}})
    assert all(" " <= letter <= "~" or letter == "\n" for letter in text)
    assert json.loads(text) == {"facts": {word: [word]}}


@pytest.mark.parametrize("word", HOSTILE)
def test_page_holds_no_tag_or_attribute_of_the_content(word):
    text = to_html(word, a_graph(word), {"Wrong": [word, f"  {word}"], word: [word]})
    page = Page(text)
    assert set(page.tags) <= TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on") or "src" in name]
    assert all(" " <= letter <= "~" or letter == "\n" for letter in text)
    harmless = Page(to_html("x", a_graph("x"), {"Wrong": ["x", "  x"], "X": ["x"]}))
    assert page.tags == harmless.tags
    assert visible(word).lstrip(" ") in page.words
    assert all(letter.isprintable() or letter == "\n" for letter in "".join(page.words))


def test_page_forbids_scripts_and_needs_nothing_else():
    text = to_html("x", a_graph("x"), {})
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)


@pytest.mark.parametrize("word", HOSTILE)
def test_dot_has_the_statements_of_the_graph_alone(word):
    lines = to_dot(a_graph(word)).split("\n")
    node = rf"  n\d+ \[label={QUOTED}, shape=\w+, fillcolor={QUOTED}(, \w+={QUOTED})*\];"
    edge = rf"  n\d+ -> n\d+ \[label={QUOTED}\];"
    assert lines[0] == "digraph lineage {"
    assert lines[-1] == "}"
    assert [bool(re.fullmatch(node, line)) for line in lines[3:6]] == [True] * 3
    assert [bool(re.fullmatch(edge, line)) for line in lines[6:-1]] == [True] * 2


@pytest.mark.parametrize("word", HOSTILE)
def test_dot_label_reads_back_as_what_is_visible(word):
    """Graphviz first takes the quotes off, then reads entities and escapes of a label."""
    inner = dot_text(word)[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    assert html.unescape(inner) == visible(word)


@pytest.mark.parametrize("word", HOSTILE)
def test_escaped_html_reads_back_as_what_is_visible(word):
    assert html.unescape(html_text(word)) == visible(word)


def test_letters_of_any_language_stay_readable():
    assert visible("naïve 日本 😀") == "naïve 日本 😀"
    assert visible("a\u202eb\\") == "a\\u202eb\\\\"


def test_boxes_stand_below_what_they_are_made_of():
    """A long way round decides the row, and boxes of a row do not overlap."""
    boxes = tuple(Box(key, "record", key) for key in "dcba")
    arrows = (Arrow("a", "b", ""), Arrow("b", "c", ""), Arrow("a", "c", ""), Arrow("a", "d", ""))
    page = to_html("x", Graph(boxes, (*arrows, Arrow("lost", "a", ""))), {})
    corners = re.findall(r'<rect x="(\d+)" y="(\d+)"', page)
    places = dict(zip("dcba", [(int(x), int(y)) for x, y in corners], strict=True))
    assert places["a"][1] < places["b"][1] == places["d"][1] < places["c"][1]
    assert abs(places["b"][0] - places["d"][0]) > 200


def test_ring_of_arrows_is_drawn_all_the_same():
    boxes = (Box("a", "record", "a"), Box("b", "record", "b"))
    page = to_html("x", Graph(boxes, (Arrow("a", "b", ""), Arrow("b", "a", ""))), {})
    assert page.count("<rect") == 2
