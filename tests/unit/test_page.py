"""The page: self-contained, escaped, honest in words, and drawn by a real browser where one is."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dinov3.errors import DataError
from dinov3.evals.baselines import SUBJECTS
from dinov3.evals.curves import read_curves
from dinov3.evals.page import Pieces, render_page
from dinov3.evals.pictures import (
    NeighbourRow,
    PatchPicture,
    ScenePicture,
    Shown,
    data_uri,
    pca_colours,
)
from dinov3.release.record import Edge

HOSTILE = "<script>alert(1)</script> \"'&{{ 7 * 7 }}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_LINKS = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "background"}


class Inspector(HTMLParser):
    """Collects what a page refers to, its tags and its text."""

    def __init__(self, page):
        super().__init__()
        self.links, self.tags, self.text = [], [], []
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in _LINKS]

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def row(subject, value, protocol="k-NN", k=5):
    figures = {"value": value, "low": value - 0.1, "high": value + 0.1, "num_samples": 9}
    return {"protocol": protocol, "metric": "top-1", "subject": subject, "k": k, **figures}


def difference(against, low, high):
    figures = {"value": (low + high) / 2, "low": low, "high": high, "num_samples": 9}
    names = {"protocol": "k-NN", "metric": "top-1", "k": 5, "subject": "model"}
    return {**names, "against": against, **figures}


def make_report(**changes):
    return {
        "stage": "eval_reports_x",
        "model": {"name": "backbone.safetensors", "sha256": "a" * 64, "tensors": "b" * 64},
        "dataset": {
            "sha256": "c" * 64,
            "num_train": 10,
            "num_test": 9,
            "classes": [HOSTILE, "dog"],
            "contamination": "none",
        },
        "code": "d" * 64,
        "config": "e" * 64,
        "num_random_inits": 3,
        "rows": [row(name, 0.2 + 0.1 * i) for i, name in enumerate(reversed(SUBJECTS))],
        "differences": [difference("random init", 0.1, 0.3), difference("raw pixels", -0.1, 0.2)],
        "features": {
            "num_samples": 9,
            "participation_ratio": 7.25,
            "rankme": 11.5,
            "mean_cosine": 0.25,
        },
        "per_class": [{"label": HOSTILE, "num_train": 5, "num_test": 4, "model": 0.75}],
        "scenes": {"num_train": 7, "num_test": 8, "per_class": [{"label": "tree", "model": 0.125}]},
        "choices": [],
        "missing": [],
        **changes,
    }


def make_pieces():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    uri = data_uri(Image.fromarray(noise))
    query = Shown(uri, HOSTILE, HOSTILE)
    found = tuple(Shown(uri, HOSTILE, "dog", right, 0.5) for right in (True, False))
    edge = Edge("manifest", HOSTILE, "f" * 64, "9" * 64)
    scenes = ScenePicture(uri, ("scene", "mask", "model"), ((HOSTILE, "rgb(1, 2, 3)"),))
    return Pieces([NeighbourRow(query, found)], [PatchPicture(query, uri)], [], [edge], scenes)


def test_page_refers_to_nothing_outside_and_every_picture_decodes():
    page = render_page(make_report(), make_pieces())
    seen = Inspector(page)
    assert len(seen.links) == 6
    for link in seen.links:
        assert link.startswith("data:image/")
        data = base64.b64decode(link.partition("base64,")[2], validate=True)
        assert Image.open(io.BytesIO(data)).convert("RGB").size == (32, 32)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert not re.search(rb"url\(|@import|https?://|//[a-z]", page)


def test_text_from_data_is_escaped_and_never_run_as_a_template():
    page = render_page(make_report(), make_pieces())
    assert b"<script" not in page
    assert Inspector(page).words.count("<script>alert(1)</script>") >= 4
    assert b"{{ 7 * 7 }}" in page
    assert b'alt="query &lt;script&gt;alert(1)&lt;/script&gt; &#34;&#39;&amp;{{ 7 * 7 }}"' in page


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.3, "Better than raw pixels: +0.200"),
        (-0.1, 0.2, "Not distinguishable from raw pixels: +0.050"),
        (-0.3, -0.1, "Worse than raw pixels: -0.200"),
    ],
)
def test_the_headline_says_in_words_what_the_interval_says(low, high, words):
    report = make_report(differences=[difference("raw pixels", low, high)])
    assert words in Inspector(render_page(report, make_pieces())).words


def test_every_digest_and_edge_stands_on_the_page():
    words = Inspector(render_page(make_report(), make_pieces())).words
    for letter in "abcdef":
        assert letter * 64 in words
    assert "made by record " + "9" * 64 in words


def test_right_and_wrong_neighbours_differ_in_more_than_colour():
    page = render_page(make_report(), make_pieces()).decode()
    assert page.count('class="right"') == page.count("✓ dog") == 1
    assert page.count('class="wrong"') == page.count("✗ dog") == 1


def test_without_labels_or_pictures_the_page_still_stands():
    empty = {"rows": [], "differences": [], "per_class": [], "scenes": None}
    missing = [{"protocol": "k-NN", "reason": "needs labels (sub-folders)"}]
    page = render_page(make_report(**empty, missing=missing), Pieces([], [], [], []))
    words = Inspector(page).words
    assert "Nothing could be judged" in words
    assert "k-NN: needs labels (sub-folders)" in words
    assert "Class by class" not in words
    assert "Segmentation" not in words


def test_scenes_stand_with_their_legend_and_the_figures_of_every_class():
    page = render_page(make_report(), make_pieces())
    words = Inspector(page).words
    assert "trained on 7 scenes of training pictures and judged on 8 of held-out ones" in words
    assert "scene mask model" in words
    assert "tree 0.125" in words
    assert b'style="background: rgb(1, 2, 3)"' in page


def test_curves_are_drawn_from_losses_and_health_alone(tmp_path):
    events = [
        {"step": step, "time": 1e9 + step, "loss": 10.0 - step, "wait_fraction": 0.5,
         "health/rankme": None if step == 2 else step}
        for step in (1, 2, 5)
    ]  # fmt: skip
    events.insert(1, {"step": 1, "time": 3.0, "note": "hello"})
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    loss, rankme = read_curves(path)
    assert (loss.name, loss.first_step, loss.last_step, loss.last) == ("loss", 1, 5, 5.0)
    assert (loss.low, loss.high) == (5.0, 9.0)
    assert loss.points == "4.0,6.0 62.0,30.5 236.0,104.0"
    assert (rankme.name, rankme.low, rankme.high) == ("health/rankme", 1, 5)
    page = render_page(make_report(), Pieces([], [], [loss, rankme], []))
    assert page.count(b"<polyline") == 2


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": {step}}}\n' for step in range(1, 5002)))
    (curve,) = read_curves(path)
    points = curve.points.split()
    assert len(points) <= 402
    assert points[-1] == "236.0,6.0"


def test_no_log_means_no_curves_and_a_damaged_log_is_refused(tmp_path):
    assert read_curves(tmp_path / "events.jsonl") == []
    (tmp_path / "events.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(DataError, match="line 2 is not an event"):
        read_curves(tmp_path / "events.jsonl")


def test_patch_colours_separate_what_the_features_separate():
    patches = np.zeros((2, 16, 5), dtype=np.float32)
    patches[:, :8, 0] = 4.0
    patches += np.random.default_rng(0).normal(0, 0.1, patches.shape).astype(np.float32)
    colours = pca_colours(patches)
    assert colours.shape == (2, 4, 4, 3)
    red = colours[..., 0].astype(int)
    assert red[:, :2].min() > 200
    assert red[:, 2:].max() < 55


def test_patch_colours_do_not_depend_on_the_sign_of_a_component():
    patches = np.random.default_rng(0).standard_normal((1, 64, 8)).astype(np.float32)
    order = np.random.default_rng(1).permutation(64)
    shuffled = pca_colours(patches[:, order]).reshape(64, 3)
    np.testing.assert_allclose(shuffled, pca_colours(patches).reshape(64, 3)[order], atol=1)


BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_table_and_the_pictures(tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(render_page(make_report(), make_pieces()))
    shot = tmp_path / "shot.png"
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400",
    ]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", path.as_uri()], capture_output=True, check=True
    )
    seen = Inspector(done.stdout)
    assert seen.tags.count("table") == 4
    assert "model" in seen.words
    assert "0.500" in seen.words
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={shot}", path.as_uri()], capture_output=True, check=True
    )
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 1000  # noise pictures are there, not only text on one background
