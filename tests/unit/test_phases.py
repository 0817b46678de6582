"""The phases side by side: who is compared with whom, what words the intervals carry, the page."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import polars as pl
import pytest
from PIL import Image
from safetensors.torch import save_file

from assets.checks import report_bound
from dinov3 import hub
from dinov3.data.decode import decode_image, pixel_digest
from dinov3.errors import ConfigError
from dinov3.evals.phase_findings import phases_table, shared_neighbours, verdict
from dinov3.evals.phase_pictures import _common_colours, _middle, _similarity
from dinov3.evals.phases import compare_phases
from dinov3.evals.report import summarise_file
from dinov3.models.backbone import backbone_config
from dinov3.recipe import load_recipe
from dinov3.release.record import canonical_json, file_sha256, read_record
from dinov3.stage import open_stage

VIT = {"arch": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SMALL = {"arch": "vit", "embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8}
CONVNEXT = {"arch": "convnext", "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 16], "patch_size": 8}
COLOURS = {"blue": (40, 40, 220), "red": (220, 40, 40)}
RECIPE = [
    "crop=16",
    "resize=32",
    "knn.ks=[3]",
    "logreg.num_c=2",
    "linear.num_steps=5",
    "composites.size=16",
    "composites.num_train=6",
    "composites.num_test=4",
    "segmentation.num_c=1",
    "segmentation.log10_c=[-1.0, 0.0]",
    "num_random_inits=3",
]
ORDER = ("pretrained", "gram", "highres", "vits", "convnext")


class World:
    """Cut-out pictures, photographs, tables, and a chain of models, each with its record."""

    def __init__(self, root):
        self.root = root
        generator = np.random.default_rng(0)
        for name, colour in COLOURS.items():
            for number in range(8):
                self._cut_out(root / "pictures" / name / f"{number}.png", colour, generator)
        for number in range(4):
            noise = generator.integers(60, 180, (24, 24, 3), dtype=np.uint8)
            path = root / "photographs" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(noise).save(path)
        self._write_tables()
        self._write_model("pretrained", VIT, 1, None)
        self._write_model("gram", VIT, 2, "pretrained", phase="gram")
        self._write_model("highres", VIT, 3, "gram", phase="highres")
        self._write_model("vits", SMALL, 4, "highres", phase="distill")
        self._write_model("convnext", CONVNEXT, 5, "highres", phase="distill", evaluation_scale=4.0)

    def compare(self, names=ORDER, output="phases", overrides=()):
        source = f"composites.backgrounds=folder:{self.root / 'photographs'}"
        compare_phases(
            "eval_reports_phases",
            source=f"folder:{self.root / 'pictures'}",
            models=[(name, self.root / name) for name in names],
            manifest=self.root / "image_manifest" / "manifest.parquet",
            dataset=self.root / "curated_dataset" / "curated.parquet",
            output=self.root / output,
            config=load_recipe("smoke_cpu", [*RECIPE, source, *overrides], phase="evals"),
        )
        return json.loads((self.root / output / "report.json").read_bytes())

    def _cut_out(self, path, colour, generator):
        picture = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
        tinted = (np.array(colour) + generator.integers(0, 30, 3)).tolist()
        left, top = generator.integers(2, 8, 2).tolist()
        picture.paste((*tinted, 255), (left, top, left + 14, top + 12))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def _write_tables(self):
        rows = []
        for number, path in enumerate(sorted((self.root / "pictures").rglob("*.png"))):
            data = path.read_bytes()
            rows.append(
                {
                    "path": path.relative_to(self.root / "pictures").as_posix(),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "pixel_sha256": pixel_digest(decode_image(data)).hex(),
                    "label": path.parent.name,
                    "split": "test" if number % 2 else "train",
                }
            )
        table = pl.DataFrame(rows)
        with open_stage("image_manifest", self.root / "image_manifest", config={}) as stage:
            table.write_parquet(stage.path("manifest.parquet"))
        with open_stage("curated_dataset", self.root / "curated_dataset", config={}) as stage:
            kept = table.select("path", "sha256", kept=pl.col("split") == "train")
            kept.write_parquet(stage.path("curated.parquet"))

    def _write_model(self, name, model, seed, init, **content):
        network = hub.random_init(backbone_config(model), seed)
        tensors = {f"teacher.{key}": one.clone() for key, one in network.state_dict().items()}
        crops = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
        with open_stage(name, self.root / name, config={}) as stage:
            if init is not None:
                stage.read("init", self.root / init / "backbone.safetensors")
            save_file(tensors, stage.path("backbone.safetensors"))
            config = {"model": model, "crops": crops, **content}
            stage.path("config.json").write_bytes(canonical_json(config))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("phases"))
    world.compare()
    return world


@pytest.fixture(scope="module")
def report(world):
    return json.loads((world.root / "phases" / "report.json").read_bytes())


def test_the_report_is_bound_to_every_model_it_read(world, report):
    assert [model["name"] for model in report["models"]] == list(ORDER)
    for model in report["models"]:
        folder = world.root / model["name"]
        assert model["sha256"] == file_sha256(folder / "backbone.safetensors")
        assert model["record"] == file_sha256(folder / "record.json")
    judgement = report_bound(world.root / "phases")
    assert judgement.passed
    assert judgement.facts == {"models": 5}
    roles = {edge.role for edge in read_record(world.root / "phases" / "record.json").inputs}
    assert roles > {"manifest", "dataset", "backgrounds", "gram backbone", "convnext config"}


def test_phases_stand_against_where_they_began_and_students_also_against_untrained_copies(report):
    pairs = list(dict.fromkeys((row["model"], row["against"]) for row in report["differences"]))
    assert sorted(pairs) == [
        ("convnext", "highres"),
        ("convnext", "random init"),
        ("gram", "pretrained"),
        ("highres", "gram"),
        ("vits", "highres"),
        ("vits", "random init"),
    ]
    subjects = {(row["model"], row["subject"]) for row in report["rows"]}
    assert subjects == {
        *((name, "model") for name in ORDER),
        ("vits", "random init"),
        ("convnext", "random init"),
        (None, "majority class"),
    }
    random = next(row for row in report["rows"] if row["subject"] == "random init")
    assert len(random["per_seed"]) == report["num_random_inits"] == 3


def test_differences_are_those_of_the_rows_in_every_protocol(report):
    values = {
        (row["protocol"], row["metric"], row.get("k"), row["model"], row["subject"]): row["value"]
        for row in report["rows"]
    }
    protocols = set()
    for row in report["differences"]:
        key = row["protocol"], row["metric"], row.get("k")
        ours = values[(*key, row["model"], "model")]
        is_random = row["against"] == "random init"
        other = (row["model"], "random init") if is_random else (row["against"], "model")
        assert row["value"] == pytest.approx(ours - values[(*key, *other)], abs=3e-6)
        assert row["verdict"] == verdict(row)
        protocols.add(row["protocol"])
    assert protocols == {
        "k-NN",
        "k-NN, leave one out",
        "logistic regression",
        "linear probe",
        "instance retrieval",
        "segmentation",
        "foreground segmentation",
    }


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.2, None), (0.0, 0.2, None)],
)
def test_a_word_stands_only_where_the_interval_leaves_zero_out(low, high, word):
    assert verdict({"low": low, "high": high}) == word


def test_students_are_compared_with_their_own_teacher_and_their_own_untrained_copies(report):
    assert [(row["model"], row["teacher"]) for row in report["nearness"]] == [
        ("vits", "highres"),
        ("convnext", "highres"),
    ]
    for row in report["nearness"]:
        assert row["k"] == 6  # of eight held-out pictures
        assert row["chance"] == pytest.approx(6 / 7, abs=1e-6)
        assert len(row["random_init"]["per_seed"]) == 3
        between = row["student"]["value"] - np.mean(row["random_init"]["per_seed"])
        assert row["difference"]["value"] == pytest.approx(between, abs=3e-6)


def test_shared_neighbours_are_all_for_a_rotation_and_chance_for_noise():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 8))
    rotation, _ = np.linalg.qr(generator.standard_normal((8, 8)))
    assert (shared_neighbours(features, features @ rotation, 10) == 1).all()
    noise = shared_neighbours(features, generator.standard_normal((200, 5)), 10)
    assert noise.mean() == pytest.approx(10 / 199, abs=0.02)
    same = np.ones((5, 3))  # ties everywhere: a picture is never its own neighbour
    assert shared_neighbours(same, same, 4).tolist() == [1.0] * 5


def test_a_model_whose_record_names_none_of_the_others_follows_the_one_before(world):
    found = world.compare(("gram", "pretrained", "vits"), output="other")
    against = {model["name"]: model["against"] for model in found["models"]}
    assert against == {"gram": None, "pretrained": "gram", "vits": "pretrained"}


def test_equal_inputs_give_equal_bytes(world):
    names = ("vits",)
    for output in ("first", "second"):
        world.compare(names, output=output)
    for name in ("report.json", "report.html"):
        first, second = ((world.root / out / name).read_bytes() for out in ("first", "second"))
        assert first == second


def test_the_page_is_self_contained_and_shows_every_model_at_every_size(world):
    page = (world.root / "phases" / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://|<script", page)
    links = re.findall(r'src="([^"]*)"', page)
    # 6 pictures and 3 scenes, each at 3 sizes in two kinds, and segmentation of the scenes
    assert len(links) == (9 * 6 + 3) * (1 + len(ORDER))
    for link in links:
        data = base64.b64decode(link.partition("base64,")[2], validate=True)
        assert Image.open(io.BytesIO(data)).convert("RGB").width >= 2
    cells = re.findall(r'src="([^"]*)" alt="components, 64 px, convnext"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in cells}
    assert sizes == {(8, 8)}  # the teacher's grid at 64 pixels
    assert "similarity, 16 px, highres" in page
    assert "segmentation, vits" in page


def test_the_table_for_readers_holds_every_model_and_every_comparison(world, report):
    text = phases_table(report)
    lines = text.splitlines()
    assert lines[0] == "|  | pretrained | gram | highres | vits | convnext |"
    assert "| change | gram - pretrained | highres - gram | vits - highres | vits - random" in text
    (knn,) = [
        row
        for row in report["rows"]
        if (row["protocol"], row["metric"], row["model"], row["subject"])
        == ("k-NN", "top-1", "gram", "model")
    ]
    assert lines[2].startswith("| k-NN top-1, k = 3 |")
    assert f"{knn['value']:.3f} ({knn['low']:.3f} … {knn['high']:.3f})" in lines[2]
    assert sum(line.startswith("| segmentation mIoU |") for line in lines) == 2
    assert "vits shares" in text
    assert text.count("**") == 2 * (text.count(" better**") + text.count(" worse**"))
    assert summarise_file(world.root / "phases" / "report.json") == text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gram", "gram"), "each given once, got 'gram'"),
        (("a b",), "names are letters, digits, _ . or -, each given once, got 'a b'"),
        ((), "at least one is needed, got none"),
    ],
)
def test_names_that_say_nothing_are_refused(world, names, message):
    with pytest.raises(ConfigError, match=f"models: .*{re.escape(message)}"):
        world.compare(names, output="refused")
    assert not (world.root / "refused").exists()


def test_without_cut_outs_the_other_figures_remain_and_the_rest_is_named(world, tmp_path):
    found = world.compare(("pretrained", "gram"), "plain", ["exclude_labels=[blue]"])
    assert {item["protocol"] for item in found["missing"]} >= {"k-NN", "segmentation"}
    assert {row["protocol"] for row in found["rows"]} == {"instance retrieval"}
    page = (world.root / "plain" / "report.html").read_text()
    assert "segmentation, gram" not in page
    assert "components, 16 px, gram" in page
    assert "| instance retrieval mAP |" in phases_table(found)


def test_colours_of_a_rotated_copy_are_those_of_the_first_model():
    generator = np.random.default_rng(0)
    scales = np.array([3.0, 2.0, 1.5, 0.1, 0.1])
    features = (generator.standard_normal((4, 6, 6, 5)) * scales).astype(np.float32)
    rotation, _ = np.linalg.qr(generator.standard_normal((5, 5)))
    turned = (features @ rotation).astype(np.float32)
    first, second = _common_colours([[list(features)], [list(turned)]])
    for one, other in zip(first[0], second[0], strict=True):
        np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)


def test_similarity_is_bright_where_patches_are_as_the_marked_one():
    maps = np.zeros((4, 4, 2), dtype=np.float32)
    maps[:2] = (1, 0)
    maps[2:] = (0, 1)
    colours = _similarity(maps, (0.1, 0.9)).astype(int).sum(axis=-1)
    assert colours[:2].min() > colours[2:].max() + 400


def test_the_marked_patch_lies_inside_even_where_the_centre_does_not():
    ring = np.ones((9, 9), dtype=bool)
    ring[2:7, 2:7] = False
    row, column = _middle(ring)
    assert ring[int(row * 9), int(column * 9)]
    assert _middle(np.zeros((4, 4), dtype=bool)) == (0.5, 0.5)
    one = np.zeros((4, 4), dtype=bool)
    one[3, 1] = True
    assert _middle(one) == (3.5 / 4, 1.5 / 4)
