"""The report of a tiny model of pictures and texts: lineage, controls, determinism, refusals."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dinov3 import hub
from dinov3.curation.captions import make_caption_pairs
from dinov3.curation.manifest import make_manifest
from dinov3.errors import CheckpointError, ConfigError, DataError, LineageBroken
from dinov3.evals.aligned import AlignedModel
from dinov3.evals.collection import Pictures, labelled_halves
from dinov3.evals.dinotxt import open_dinotxt
from dinov3.evals.text_report import TextInputs, make_text_report
from dinov3.evals.text_study import TextEvaluation
from dinov3.models.dinotxt import DinoTxt, DinoTxtConfig
from dinov3.models.vit import ViTConfig
from dinov3.recipe import load_recipe
from dinov3.release.record import canonical_json, file_sha256, read_record
from dinov3.release.tensors import tensor_digest
from dinov3.stage import open_stage

BACKBONE = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "layerscale": 0.1}
MODEL = load_recipe("smoke_cpu", phase="dinotxt").model.model_dump(mode="json")
COLOURS = {"blue": (40, 40, 220), "green": (40, 200, 40), "red": (220, 40, 40)}
CPU = torch.device("cpu")


def config(*overrides):
    small = ["text.num_shuffles=3", "num_bootstrap=20", *overrides]
    return load_recipe("smoke_cpu", small, phase="evals")


def paint(path, colour, generator):
    """A disc of a colour on nothing."""
    pixels = np.zeros((24, 24, 4), dtype=np.uint8)
    rows, columns = np.mgrid[:24, :24]
    disc = (rows - 12) ** 2 + (columns - 12) ** 2 < 100
    noise = generator.integers(-30, 30, (24, 24, 3))
    pixels[..., :3] = np.clip(noise + colour, 0, 255)
    pixels[..., 3] = 255 * disc
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


class ColourModel(torch.nn.Module):
    """Knows the colour of a picture, of a patch, and the colours a text names: an oracle."""

    def encode_image(self, images):
        return self._colour(images.mean(dim=(2, 3)))

    def encode_image_with_patch_tokens(self, images):
        patches = F.avg_pool2d(images, 8).flatten(2).mT  # [B, P, 3]
        return self.encode_image(images), self._colour(patches), patches

    def encode_text(self, tokens):
        return tokens.float()

    def _colour(self, values):
        return F.one_hot(values.argmax(dim=-1), 3).float()


def name_colours(texts):
    return torch.tensor(
        [[int(name in text) for name in ("red", "green", "blue")] for text in texts]
    )


class World:
    """Pictures, tables, a backbone and a dino.txt over it, each as its stage leaves it."""

    def __init__(self, root):
        self.root = root
        self.source = f"list:{root / 'pictures.tsv'}"
        self.manifest = root / "image_manifest" / "manifest.parquet"
        self.dataset = root / "curated_dataset" / "curated.parquet"
        self.pairs = root / "caption_pairs" / "pairs.parquet"
        self.backbone, self.model = root / "highres_model", root / "dinotxt"

    def build(self):
        self._paint()
        recipe = ["split.test_fraction=0.5", "expect.min_images=1"]
        manifest = load_recipe("default", recipe, phase="manifest")
        make_manifest(
            source=self.source, output=self.manifest.parent, config=manifest, num_workers=1
        )
        self.curate()
        self.pair()
        self.write_backbone(seed=1)
        self.write_model()
        return self

    def _paint(self):
        generator = np.random.default_rng(0)
        lines = []
        for name, colour in COLOURS.items():
            for number in range(12):
                path = self.root / "pictures" / f"{name}{number}.png"
                paint(path, colour, generator)
                caption = f"A {name} disc." if number < 4 else f"{name} disc number {number}"
                lines.append(f"pictures/{path.name}\t{name}\t{caption}\n")
        (self.root / "pictures.tsv").write_text("".join(lines))

    def curate(self, kept=None):
        table = pl.read_parquet(self.manifest)
        kept = pl.col("split") == "train" if kept is None else kept
        with open_stage("curated_dataset", self.dataset.parent, config={}) as stage:
            rows = table.select("path", "sha256", kept=kept)
            rows.write_parquet(stage.path("curated.parquet"))

    def pair(self):
        make_caption_pairs(
            stage_name="caption_pairs",
            manifest=self.manifest,
            dataset=None,
            output=self.pairs.parent,
            config=load_recipe("smoke_cpu", phase="captions"),
        )

    def write_backbone(self, seed):
        model = hub.random_init(ViTConfig(**BACKBONE), seed)
        tensors = {f"teacher.{name}": value for name, value in model.state_dict().items()}
        with open_stage("highres_model", self.backbone, config={}) as stage:
            save_file(tensors, stage.path("backbone.safetensors"))
            stage.path("config.json").write_bytes(canonical_json({"model": BACKBONE}))

    def write_model(self, **changed):
        torch.manual_seed(0)
        fields = {**MODEL, **changed}
        model = DinoTxt(DinoTxtConfig.from_fields(fields), hub.load(self.backbone))
        tensors = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("visual_model.backbone.")
        }
        crops = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 32}
        with open_stage("dinotxt", self.model, config={}) as stage:
            stage.read("backbone", self.backbone / "backbone.safetensors")
            save_file(tensors, stage.path("dinotxt.safetensors"))
            described = {"model": fields, "backbone": BACKBONE, "crops": crops}
            stage.path("config.json").write_bytes(canonical_json(described))

    def report(self, *overrides, output="report"):
        inputs = TextInputs(
            source=self.source,
            model=self.model,
            backbone=self.backbone,
            manifest=self.manifest,
            dataset=self.dataset,
            pairs=self.pairs,
        )
        make_text_report(
            "eval_reports_dinotxt",
            inputs=inputs,
            output=self.root / output,
            config=config(*overrides),
        )
        return json.loads((self.root / output / "report.json").read_bytes())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world")).build()
    world.report()
    return world


@pytest.fixture(scope="module")
def report(built):
    return json.loads((built.root / "report" / "report.json").read_bytes())


@pytest.fixture
def world(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "world")
    return World(tmp_path / "world")


def figures(report, protocol, metric):
    return {
        row["subject"]: row
        for row in report["rows"]
        if (row["protocol"], row["metric"]) == (protocol, metric)
    }


def test_every_protocol_stands_beside_its_baselines_with_an_interval(report):
    assert report["missing"] == []
    found = {(row["protocol"], row["metric"]) for row in report["rows"]}
    ways = [(way, f"R@{k}") for way in ("image to text", "text to image") for k in (1, 5, 10)]
    modes = [f"open-vocabulary segmentation, {mode}" for mode in ("whole", "windows")]
    assert found == {
        ("zero-shot classification", "top-1"),
        ("zero-shot classification", "mean per class"),
        *ways,
        *((mode, metric) for mode in modes for metric in ("mIoU", "mIoU of objects")),
    }
    for protocol, metric in found:
        rows = figures(report, protocol, metric)
        other = "chance" if metric.startswith("R@") else "majority class"
        assert set(rows) == {"model", "shuffled text", other}
        for row in rows.values():
            assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
            assert row["num_samples"] >= 4


def test_differences_are_those_of_the_rows(report):
    for difference in report["differences"]:
        rows = figures(report, difference["protocol"], difference["metric"])
        expected = rows["model"]["value"] - rows[difference["against"]]["value"]
        assert difference["value"] == pytest.approx(expected, abs=2e-6)
    assert len(report["differences"]) == 2 * (2 + 6 + 4)


def test_an_untrained_model_scores_chance_in_retrieval(report):
    rows = figures(report, "image to text", "R@1")
    assert rows["model"]["value"] < rows["chance"]["value"] + 0.35
    assert rows["chance"]["value"] < 0.35


def test_a_model_that_knows_colours_solves_what_colours_solve(built):
    table, pairs = pl.read_parquet(built.manifest), pl.read_parquet(built.pairs)
    wanted = config("text.open_vocabulary.num_scenes=20", "text.num_shuffles=50")
    halves = labelled_halves(table, exclude_labels=(), min_per_class=2)
    none, half = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)
    oracle = AlignedModel(ColourModel(), name_colours, 8, 3, none, half)
    pictures = Pictures(built.source, table)
    evaluation = TextEvaluation(oracle, table, pictures, halves, wanted, CPU)
    study = evaluation.run(pairs.filter(split="test"), "colours")
    found = {"rows": study.findings.rows}
    rows = figures(found, "zero-shot classification", "top-1")
    assert rows["model"]["value"] == 1
    assert rows["shuffled text"]["value"] == pytest.approx(1 / 3, abs=0.15)
    assert all(row["zero_shot_top_1"] == 1 for row in study.per_class)
    rows = figures(found, "image to text", "R@10")
    assert rows["model"]["low"] > rows["shuffled text"]["value"]
    rows = figures(found, "open-vocabulary segmentation, whole", "mIoU of objects")
    assert rows["model"]["low"] > 0.5 > rows["shuffled text"]["high"]


def test_the_report_is_bound_to_model_backbone_data_and_code(built, report):
    weights = built.model / "dinotxt.safetensors"
    frozen = built.backbone / "backbone.safetensors"
    assert report["model"] == {
        "name": "dinotxt.safetensors",
        "sha256": file_sha256(weights),
        "tensors": tensor_digest(weights),
        "record": file_sha256(built.model / "record.json"),
        "backbone": {"sha256": file_sha256(frozen), "tensors": tensor_digest(frozen)},
    }
    record = read_record(built.root / "report" / "record.json")
    assert [edge.role for edge in record.inputs] == [
        "backbone",
        "backbone config",
        "dataset",
        "manifest",
        "model",
        "model config",
        "pairs",
    ]
    assert set(record.outputs) == {"report.json", "report.html"}
    shown = record.facts["figures"]["image to text R@1"]
    assert shown["model"] == figures(report, "image to text", "R@1")["model"]["value"]


def test_captions_known_from_training_are_counted(built, report):
    pairs = pl.read_parquet(built.pairs)
    halves = [set(pairs.filter(split=name)["caption"]) for name in ("train", "test")]
    assert report["dataset"]["captions_seen_in_training"] == len(halves[0] & halves[1]) > 0
    assert report["dataset"]["num_test_captions"] == len(halves[1])


def test_equal_inputs_give_equal_bytes(built, world):
    world.report()
    for name in ("report.json", "report.html", "record.json"):
        ours, theirs = (each.root / "report" / name for each in (world, built))
        assert ours.read_bytes() == theirs.read_bytes()


def test_each_part_is_said_once_with_its_number(world, capsys):
    found = world.report()["dataset"]
    pictures = found["num_test"]
    assert capsys.readouterr().err.splitlines() == [
        f"dinotxt: 1/5 features, {found['num_pictures']} pictures",
        f"dinotxt: 2/5 zero-shot classification, {pictures} pictures of 3 classes",
        f"dinotxt: 3/5 image to text and text to image, {found['num_pictures']} pictures and "
        f"{found['num_texts']} texts",
        "dinotxt: 4/5 open-vocabulary segmentation, whole, 4 scenes",
        "dinotxt: 5/5 open-vocabulary segmentation, windows, 4 scenes",
    ]


def test_the_page_is_self_contained_and_escaped(world):
    table = world.root / "pictures.tsv"
    table.write_text(table.read_text().replace("disc number", "<script>disc</script>"))
    manifest = load_recipe(
        "default", ["split.test_fraction=0.5", "expect.min_images=1"], phase="manifest"
    )
    make_manifest(source=world.source, output=world.manifest.parent, config=manifest, num_workers=1)
    world.curate()
    world.pair()
    world.report()
    page = (world.root / "report" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;disc" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert page.count("data:image/") > 20


def test_another_backbone_of_the_same_shape_is_refused(world):
    world.write_backbone(seed=2)
    with pytest.raises(LineageBroken, match=r"not the backbone of .*dinotxt, got sha256"):
        world.report()


def test_the_same_weights_under_another_record_are_refused(world):
    copy = world.backbone.with_name("copy")
    with open_stage("other", copy, config={}) as stage:
        for name in ("backbone.safetensors", "config.json"):
            shutil.copy(world.backbone / name, stage.path(name))
    with pytest.raises(LineageBroken, match="not the backbone of"):
        open_dinotxt(world.model, copy, CPU)


def test_the_backbone_may_lie_in_a_sub_folder_of_its_stage(world):
    nested = world.root / "distilled_students"
    with open_stage("distilled_students", nested, config={}) as stage:
        stage.path("vits").mkdir()
        for name in ("backbone.safetensors", "config.json"):
            shutil.copy(world.backbone / name, stage.path(f"vits/{name}"))
    world.backbone = nested / "vits"
    world.write_model()
    assert open_dinotxt(world.model, world.backbone, CPU).stride == 8


def test_opening_gives_back_the_trained_tensors_over_the_frozen_ones(built):
    aligned = open_dinotxt(built.model, built.backbone, CPU)
    state = aligned.model.state_dict()
    trained = load_file(built.model / "dinotxt.safetensors")
    frozen = load_file(built.backbone / "backbone.safetensors")
    frozen = {
        name.replace("teacher.", "visual_model.backbone."): value for name, value in frozen.items()
    }
    assert set(state) == {*trained, *frozen}
    assert all(torch.equal(state[name], value) for name, value in {**trained, **frozen}.items())
    assert not aligned.model.training
    assert (aligned.mean, aligned.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (aligned.stride, aligned.patch_width) == (8, 32)
    assert aligned.tokenize(["a disc"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("logit_scale"), "not the weights of this model.*logit_scale"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "got other more"),
        (
            lambda tensors: tensors.update(logit_scale=torch.zeros(2)),
            "got other logit_scale",
        ),
        (
            lambda tensors: tensors.update(logit_scale=torch.full((1,), torch.nan)),
            "NaN or infinity among the weights, got it in logit_scale",
        ),
    ],
)
def test_weights_of_another_model_are_refused(world, change, message):
    path = world.model / "dinotxt.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        open_dinotxt(world.model, world.backbone, CPU)


def test_a_changed_file_of_the_model_is_refused_by_the_stage(world):
    path = world.model / "config.json"
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.26"))
    with pytest.raises(LineageBroken, match="its bytes differ from the record"):
        world.report()


@pytest.mark.parametrize("text", ["[]", "{", '{"model": {}}', '{"model": {"x": 1}}'])
def test_a_config_that_is_none_is_explained(world, text):
    (world.model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not"):
        open_dinotxt(world.model, world.backbone, CPU)


def test_a_folder_without_a_record_is_explained(world):
    (world.model / "record.json").unlink()
    with pytest.raises(CheckpointError, match=r"record\.json: missing"):
        open_dinotxt(world.model, world.backbone, CPU)


def test_a_held_out_picture_the_backbone_was_trained_on_is_an_error(world):
    world.curate(kept=pl.lit(value=True))
    with pytest.raises(DataError, match="held-out images are also in the training data"):
        world.report()


def test_pairs_of_other_images_are_refused(world):
    table = pl.read_parquet(world.pairs).with_columns(sha256=pl.lit("0" * 64))
    with open_stage("caption_pairs", world.pairs.parent, config={}) as stage:
        table.write_parquet(stage.path("pairs.parquet"))
    with pytest.raises(LineageBroken, match="rows are of images the image table does not know"):
        world.report()


def test_without_labels_captions_are_still_judged_and_the_rest_is_named(world, capsys):
    report = world.report("min_per_class=100")
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["1/4", "2/4", "3/4", "4/4"]
    assert {row["protocol"] for row in report["rows"]} == {"image to text", "text to image"}
    assert {item["protocol"] for item in report["missing"]} == {
        "zero-shot classification",
        "open-vocabulary segmentation, whole",
        "open-vocabulary segmentation, windows",
    }


def test_a_model_whose_patches_know_no_text_is_not_judged_on_them(world, capsys):
    world.write_model(use_patch_tokens=False, embed_dim=32)
    report = world.report()
    assert "5/5 open-vocabulary segmentation, windows, left out" in capsys.readouterr().err
    assert {item["protocol"] for item in report["missing"]} == {
        "open-vocabulary segmentation, whole",
        "open-vocabulary segmentation, windows",
    }
    assert "use_patch_tokens" in report["missing"][0]["reason"]


def test_fewer_pictures_of_retrieval_are_the_first_by_digest(world):
    report = world.report("text.num_pictures=5")
    assert report["dataset"]["num_pictures"] == 5
    assert figures(report, "image to text", "R@1")["model"]["num_samples"] == 5


def test_a_crop_between_patches_is_an_error(world):
    with pytest.raises(ConfigError, match=r"text\.crop: not a multiple of the patch size 8, got 3"):
        world.report("text.crop=30", "text.resize=30")
