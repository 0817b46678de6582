"""The model card: what the hub reads, figures as they are, and no way in for markup."""

import json
import re
from html import unescape

import pytest
import yaml
from markdown_it import MarkdownIt

from dinov3.release.markdown import code, plain_words, prose, visible
from tests.released import LICENCE, make_chain, make_release

HOSTILE = [
    "</td><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "a | b | c",
    "``` fence",
    "`tick` ``two``",
    "*bold* _it_ ~~gone~~ # not a heading",
    "---\nlicense: mit\n---",
    "key: value # comment",
    "\u202etxt.exe\u200b\x1b[31m",
    "&lt;b&gt; &amp; <b>",
    "https://evil.example www.evil.example me@evil.example",
    "- item\n\n# Heading\n\n    code",
    "    four spaces",
    "1. one",
    "\\",
    "`",
    " ",
]


def split(release):
    text = (release / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def render(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("card"))


def test_header_says_licence_base_model_and_datasets(release):
    header, _ = split(release)
    student = next(path.stem for path in (release / "records").glob("pretrained_*"))
    assert header["license"] == "gpl-2.0"
    assert header["base_model"] == [student]
    assert header["datasets"] == ["folder"]
    assert header["library_name"] == "dinov3"


def test_index_holds_the_models_own_figures(release):
    header, _ = split(release)
    (entry,) = header["model-index"]
    found = [
        (one["task"]["name"], metric["type"], metric["value"])
        for one in entry["results"]
        for metric in one["metrics"]
    ]
    assert entry["name"] == "vits@0.1.0"
    assert found == [
        ("k-NN, k = 5", "top-1", 0.75),
        ("k-NN, k = 20", "top-1", 0.75),
        ("linear probe", "top-1", 0.75),
    ]


def test_licence_the_hub_has_no_name_for_is_other_with_its_own(tmp_path):
    overrides = ["policy.licence=GPL-2.0-or-later AND CC0-1.0"]
    header, _ = split(make_release(tmp_path, overrides=overrides))
    assert header["license"] == "other"
    assert header["license_name"] == "GPL-2.0-or-later AND CC0-1.0"
    assert header["license_link"] == "licences"


def test_results_stand_with_intervals_beside_every_baseline(release):
    html = render(split(release)[1])
    row = re.search(r"<tr>\s*<td>k-NN, k = 20</td>.*?</tr>", html, re.DOTALL)[0]
    assert re.findall(r"<td>(.*?)</td>", row)[1:] == [
        "top-1",
        "0.750 [0.650, 0.850]",
        "0.500 [0.400, 0.600]",
        "0.500 [0.400, 0.600]",
        "0.500 [0.400, 0.600]",
    ]


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [(0.75, "better"), (0.55, "not told apart"), (0.25, "worse")],
)
def test_no_claim_goes_beyond_its_interval(tmp_path, accuracy, verdict):
    _, body = split(make_release(tmp_path, accuracy=accuracy))
    claims = [line for line in body.splitlines() if "against random init: " in line]
    assert len(claims) == 1
    assert verdict in claims[0]
    others = {"better", "not told apart", "worse"} - {verdict}
    assert not any(other in claims[0] for other in others)


def test_every_record_of_the_chain_has_its_line(release):
    _, body = split(release)
    for path in (release / "records").iterdir():
        stage, _, digest = path.stem.rpartition("-")
        assert f"| `{stage}` | `{digest}` |" in body


def test_obligations_and_what_is_not_known_are_said(release):
    _, body = split(release)
    assert f"`attribution: {LICENCE}`" in body
    assert f"`share alike: {LICENCE}`" in body
    assert "looked for by digest and not found" in body
    assert "dinov3 verify DIR --key PUBLISHER.pub --expect vits@0.1.0" in body


def test_outside_weights_are_the_base_model_and_their_data_unknown(tmp_path):
    header, body = split(make_release(tmp_path, outside="Apache-2.0", model="pretrained"))
    assert header["base_model"] == ["outside.pth"]
    assert "`outside.pth`" in body
    assert body.count("**training data unknown**") == 1
    assert "was looked for by digest" not in body
    assert "What `outside.pth` was trained on: nobody here knows." in body


def test_waived_gate_is_named_with_who_why_and_until(tmp_path):
    chain = make_chain(tmp_path / "data", committed=False)
    (chain.log / "waivers.yaml").write_text(
        "- {gate: clean_code, model: vits, version: 0.1.0, who: '<b>someone</b>',"
        " why: 'a | try', until: 2099-01-01}\n"
    )
    _, body = split(make_release(tmp_path, chain=chain))
    shown = "Gate `clean_code` failed and was waived by `<b>someone</b>` until `2099-01-01`"
    assert shown in body
    assert "<b>" not in render(body)


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_renders_as_itself_and_nothing_else(text):
    for shown in (code(text, in_table=True), prose(text)):
        cells = re.findall(r"<td>(.*?)</td>", render(f"| a |\n| --- |\n| {shown} |\n"), re.DOTALL)
        assert len(cells) == 1
        assert words(cells[0]) == visible(text).split()
    for shown in (code(text), prose(text)):
        html = render(f"- {shown}\n")
        assert words(html.strip().removeprefix("<ul>\n<li>").removesuffix("</li>\n</ul>")) == (
            visible(text).split()
        )


@pytest.mark.parametrize("text", HOSTILE)
def test_running_words_give_the_text_back(text):
    words = " ".join(visible(text).split())
    assert plain_words(prose(text)) == words
    assert prose(plain_words(prose(text))) == prose(text)


def words(html):
    inner = html.removeprefix("<code>").removesuffix("</code>")
    assert "<" not in inner
    return unescape(inner).split()


def test_recipe_with_hostile_words_gives_a_card_of_the_same_shape(tmp_path):
    shapes = []
    for number, words in enumerate((HOSTILE[:-1], ["plain"] * (len(HOSTILE) - 1))):
        overrides = [
            f"card.summary={json.dumps(words[0] + words[-2])}",
            f"card.intended_uses={json.dumps(words)}",
            f"card.limitations={json.dumps(words)}",
        ]
        header, body = split(make_release(tmp_path / str(number), overrides=overrides))
        shapes.append((list(header), header["license"], re.findall(r"</?[a-z0-9]+", render(body))))
    assert shapes[0] == shapes[1]
