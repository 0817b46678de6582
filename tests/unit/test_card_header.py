"""The header of a card is read as a YAML library reads it, or refused."""

import math
import random
import sys

import pytest
import yaml

from dinov3.release.card_header import split_card
from dinov3.release.refusals import Refused
from dinov3.stage import CHECKOUT

GOLDEN = CHECKOUT / "tests" / "audit" / "golden" / "release-1" / "README.md"


def _read(header: str) -> dict[str, object]:
    return split_card(f"---\n{header}---\nbody\n", "README.md")[0]


def test_header_of_a_card_is_read_as_yaml_reads_it() -> None:
    text = GOLDEN.read_text()
    header, body = split_card(text, "README.md")
    assert header == yaml.safe_load(text.split("---\n")[1])
    assert body.startswith("\n# `vits@0.1.0`")


def test_any_quoted_text_is_read_as_yaml_reads_it() -> None:
    rng = random.Random(0)
    for _ in range(500):
        letters = (rng.choice((128, 256, 0x3000, sys.maxunicode)) for _ in range(12))
        text = "".join(chr(rng.randrange(limit)) for limit in letters)
        text = "".join(one for one in text if not "\ud800" <= one <= "\udfff")
        written = yaml.safe_dump([text], default_style='"', width=math.inf)
        assert _read(f"key:\n{written}") == {"key": [text]} == yaml.safe_load(f"key:\n{written}")


def test_numbers_are_numbers() -> None:
    assert _read("a: 0.75\nb: -3\nc: 1.0e-07\n") == {"a": 0.75, "b": -3, "c": 1e-07}


@pytest.mark.parametrize(
    "header",
    [
        "a: plain\n",
        "a: 'single'\n",
        "a: true\n",
        "a: null\n",
        "a: [1, 2]\n",
        'a: {"b": 1}\n',
        "a: &x 1\nb: *x\n",
        "a: !!str 1\n",
        "a: |\n  text\n",
        "a: 1\na: 2\n",
        "a:\n",
        "a: 1\n  b: 2\n",
        "a:\n    b: 1\n  c: 2\n",
        'a: "x" # note\n',
        'a: "x\n  y"\n',
        'a: "\\q"\n',
        'a: "\\U00110000"\n',
        "? a\n",
        "<<: 1\n",
        "a: 1\n\nb: 2\n",
        "a: 0x10\n",
        "a: 1_000\n",
        "a: .inf\n",
        "".join("  " * depth + "a:\n" for depth in range(40)) + "  " * 40 + "a: 1\n",
    ],
)
def test_what_two_readers_could_take_differently_is_refused(header: str) -> None:
    with pytest.raises(Refused, match="in other words than a card is written in") as caught:
        _read(header)
    assert caught.value.name == "card-differs"


@pytest.mark.parametrize("text", ["", "# no header\n", "---\na: 1\n", "a: 1\n---\n"])
def test_card_without_a_header_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="has no header"):
        split_card(text, "README.md")
