"""The report of a tiny world: digests, baselines, contamination, missing labels, determinism."""

import hashlib
import json
import shutil

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov3 import hub
from dinov3.data.decode import decode_image, pixel_digest
from dinov3.errors import CheckpointError, ConfigError, DataError, LineageBroken
from dinov3.evals.baselines import SUBJECTS
from dinov3.evals.candidate import open_candidate
from dinov3.evals.dense import DENSE_PROTOCOLS
from dinov3.evals.embed import embed_source
from dinov3.evals.features import extract
from dinov3.evals.folder import evaluate_folder, split_of
from dinov3.evals.report import knn_summary, make_report
from dinov3.evals.study import preparation
from dinov3.models.convnext import ConvNeXtConfig
from dinov3.models.vit import ViTConfig
from dinov3.recipe import load_recipe
from dinov3.release.record import canonical_json, file_sha256, read_record
from dinov3.release.tensors import tensor_digest
from dinov3.stage import code_digest, open_stage

MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "layerscale": 0.1}
COLOURS = {"blue": (40, 40, 220), "green": (40, 200, 40), "red": (220, 40, 40)}


def config(*overrides):
    small = [
        "crop=16",
        "resize=32",
        "knn.ks=[3,5]",
        "logreg.num_c=2",
        "linear.num_steps=30",
        "composites.size=32",
        "composites.num_train=6",
        "composites.num_test=4",
        "segmentation.num_c=2",
        *overrides,
    ]
    return load_recipe("smoke_cpu", small, phase="evals")


def paint(path, colour, generator):
    noise = generator.integers(-30, 30, (24, 20, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


def cut_out(path, colour, generator):
    """A square of a colour on nothing."""
    picture = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    tinted = (np.array(colour) + generator.integers(0, 20, 3)).tolist()
    picture.paste((*tinted, 255), (4, 4, 20, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def describe(root):
    """A manifest's rows for a folder, half of them held out."""
    rows = []
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        data = path.read_bytes()
        rows.append(
            {
                "path": path.relative_to(root).as_posix(),
                "sha256": hashlib.sha256(data).hexdigest(),
                "pixel_sha256": pixel_digest(decode_image(data)).hex(),
                "label": path.parent.name,
                "split": "test" if number % 2 else "train",
            }
        )
    return pl.DataFrame(rows)


class World:
    """Pictures, a manifest, a curated dataset and a model, each made by its stage."""

    def __init__(self, root):
        self.root = root
        self.pictures = root / "pictures"
        self.source = f"folder:{self.pictures}"

    def build(self, draw=paint):
        generator = np.random.default_rng(0)
        for name, colour in COLOURS.items():
            for number in range(8):
                draw(self.pictures / name / f"{number}.png", colour, generator)
        self.write_tables(describe(self.pictures))
        self._write_model()
        return self

    def copy(self, root):
        shutil.copytree(self.root, root)
        return World(root)

    def table(self):
        return pl.read_parquet(self.root / "image_manifest" / "manifest.parquet")

    def write_tables(self, table, kept=None):
        with open_stage("image_manifest", self.root / "image_manifest", config={}) as stage:
            table.write_parquet(stage.path("manifest.parquet"))
        kept = pl.col("split") == "train" if kept is None else kept
        with open_stage("curated_dataset", self.root / "curated_dataset", config={}) as stage:
            rows = table.select("path", "sha256", "split", kept=kept)
            rows.write_parquet(stage.path("curated.parquet"))

    def report(self, *overrides, output="report"):
        make_report(
            "eval_reports_pretrained",
            source=self.source,
            model=self.root / "model",
            manifest=self.root / "image_manifest" / "manifest.parquet",
            dataset=self.root / "curated_dataset" / "curated.parquet",
            output=self.root / output,
            config=config(*overrides),
        )
        return json.loads((self.root / output / "report.json").read_bytes())

    def _write_model(self):
        model = hub.random_init(ViTConfig(**MODEL), 11)
        tensors = {f"teacher.{name}": value for name, value in model.state_dict().items()}
        with open_stage("pretrained_checkpoint", self.root / "model", config={}) as stage:
            save_file(tensors, stage.path("backbone.safetensors"))
            crops = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
            stage.path("config.json").write_bytes(canonical_json({"model": MODEL, "crops": crops}))
            events = [{"step": s, "time": 1.5 * s, "loss": 9.0 / s, "wait": s} for s in (1, 2, 3)]
            lines = "".join(json.dumps(event) + "\n" for event in events)
            stage.path("events.jsonl").write_text(lines)


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
    return built.copy(tmp_path / "world")


def row_of(report, protocol, subject, metric="top-1"):
    (row,) = [
        row
        for row in report["rows"]
        if (row["protocol"], row["subject"], row["metric"]) == (protocol, subject, metric)
        and row.get("k") in (None, 5)
    ]
    return row


def test_report_is_bound_to_the_digests_of_weights_data_and_code(built, report):
    weights = built.root / "model" / "backbone.safetensors"
    assert report["schema"] == "dinov3.report/1"
    assert report["model"] == {
        "name": "backbone.safetensors",
        "sha256": file_sha256(weights),
        "tensors": tensor_digest(weights),
        "record": file_sha256(built.root / "model" / "record.json"),
    }
    manifest = built.root / "image_manifest" / "manifest.parquet"
    assert report["dataset"]["sha256"] == file_sha256(manifest)
    assert report["code"] == code_digest()
    roles = [edge.role for edge in read_record(built.root / "report" / "record.json").inputs]
    assert roles == ["backbone", "dataset", "manifest", "model config"]


def test_every_figure_stands_beside_all_three_baselines_with_an_interval(report):
    subjects = {}
    for row in report["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        subjects.setdefault((row["protocol"], row["metric"], row.get("k")), []).append(
            row["subject"]
        )
    assert {protocol for protocol, _, _ in subjects} == {
        "k-NN",
        "k-NN, leave one out",
        "logistic regression",
        "linear probe",
        "instance retrieval",
    }
    assert all(tuple(found) == SUBJECTS for found in subjects.values())
    assert all(
        len(row["per_seed"]) == 2 for row in report["rows"] if row["subject"] == "random init"
    )
    assert [item["protocol"] for item in report["missing"]] == list(DENSE_PROTOCOLS)
    assert all("transparency" in item["reason"] for item in report["missing"])
    assert report["scenes"] is None


def test_cut_out_pictures_are_segmented_in_scenes_beside_all_baselines(tmp_path):
    world = World(tmp_path).build(cut_out)
    generator = np.random.default_rng(1)
    for number in range(4):
        paint(tmp_path / "photographs" / f"{number}.png", (120, 120, 120), generator)
    source = f"folder:{tmp_path / 'photographs'}"
    found = world.report(f"composites.backgrounds={source}")
    assert found["missing"] == []
    for protocol in DENSE_PROTOCOLS:
        for metric in ("mIoU", "pixel accuracy"):
            rows = [
                row
                for row in found["rows"]
                if (row["protocol"], row["metric"]) == (protocol, metric)
            ]
            assert tuple(row["subject"] for row in rows) == SUBJECTS
            assert all(row["num_samples"] == 4 for row in rows)
    raw = row_of(found, "segmentation", "raw pixels", "mIoU")
    assert raw["value"] > row_of(found, "segmentation", "majority class", "mIoU")["low"] + 0.1
    scenes = found["scenes"]
    assert (scenes["num_train"], scenes["num_test"]) == (6, 4)
    assert [row["label"] for row in scenes["per_class"]] == ["background", *sorted(COLOURS)]
    edges = {edge.role: edge for edge in read_record(world.root / "report" / "record.json").inputs}
    assert edges["backgrounds"].sha256 == scenes["photographs"]
    assert 'id="scenes"' in (world.root / "report" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"composites\.size: not a multiple of the patch size 8"):
        world.report(f"composites.backgrounds={source}", "composites.size=36")


def test_colours_solve_classes_that_are_colours_and_the_constant_guess_does_not(report):
    for protocol in ("k-NN", "k-NN, leave one out", "logistic regression"):
        assert row_of(report, protocol, "raw pixels")["value"] == 1.0
        assert row_of(report, protocol, "majority class")["value"] == pytest.approx(1 / 3)
    assert row_of(report, "instance retrieval", "majority class")["value"] == pytest.approx(
        1 / 12, abs=1e-6
    )


def test_differences_are_those_of_the_rows(report):
    for difference in report["differences"]:
        matching = {
            row["subject"]: row["value"]
            for row in report["rows"]
            if all(row.get(key) == difference.get(key) for key in ("protocol", "metric", "k"))
        }
        expected = matching["model"] - matching[difference["against"]]
        assert difference["value"] == pytest.approx(expected, abs=2e-6)
    assert {difference["against"] for difference in report["differences"]} == {
        "random init",
        "raw pixels",
    }


def test_equal_inputs_give_equal_bytes(built, world):
    world.report()
    for name in ("report.json", "report.html", "record.json"):
        assert (world.root / "report" / name).read_bytes() == (
            built.root / "report" / name
        ).read_bytes()


def test_times_in_the_log_of_the_run_do_not_reach_the_page(built, world):
    events = world.root / "model" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    changed = [json.dumps({**line, "time": 0.25, "wait": 7}) + "\n" for line in lines]
    events.write_text("".join(changed))
    world.report()
    page = (world.root / "report" / "report.html").read_bytes()
    assert page == (built.root / "report" / "report.html").read_bytes()
    assert b"<b>loss</b> 3" in page


def test_another_seed_of_the_views_changes_the_figures(report, world):
    other = world.report("seed=1")
    mine, theirs = (row_of(each, "instance retrieval", "model", "mAP") for each in (report, other))
    assert mine["value"] != theirs["value"]


def test_a_test_picture_trained_on_under_another_name_is_an_error(world):
    leaked = world.pictures / "red" / "1.png"
    with Image.open(leaked) as image:
        image.save(world.pictures / "red" / "copy.bmp")  # other bytes, the same pixels
    table = describe(world.pictures)
    held = pl.col("path") == "red/1.png"
    table = table.with_columns(split=pl.when(held).then(pl.lit("test")).otherwise(pl.lit("train")))
    world.write_tables(table.with_columns(label=pl.lit(None, pl.String)))
    with pytest.raises(
        DataError, match=r"pixel_sha256: 1 held-out images are also in the training data"
    ):
        world.report()


def test_a_test_picture_among_the_kept_rows_is_an_error(world):
    world.write_tables(world.table(), kept=pl.lit(value=True))
    with pytest.raises(
        DataError, match=r"sha256: 12 held-out images are also in the training data"
    ):
        world.report()


def test_a_picture_in_both_halves_is_an_error(world):
    shutil.copy(world.pictures / "red" / "1.png", world.pictures / "blue" / "copy.png")
    table = describe(world.pictures)
    held = pl.col("path") == "red/1.png"
    split = pl.when(held).then(pl.lit("test")).otherwise(pl.lit("train"))
    world.write_tables(table.with_columns(split=split), kept=pl.lit(value=False))
    with pytest.raises(DataError, match="also in the training half"):
        world.report()


def test_a_refused_report_leaves_nothing_behind(world):
    world.write_tables(world.table(), kept=pl.lit(value=True))
    with pytest.raises(DataError, match="Remove the copies"):
        world.report(output="fresh")
    assert not (world.root / "fresh").exists()


def test_the_image_table_in_place_of_the_dataset_is_refused(world):
    with open_stage("curated_dataset", world.root / "curated_dataset", config={}) as stage:
        world.table().write_parquet(stage.path("curated.parquet"))
    with pytest.raises(DataError, match=r"not a curated dataset, got no column kept\. Give the"):
        world.report(output="fresh")


def test_a_table_that_is_no_parquet_is_refused(world):
    with open_stage("image_manifest", world.root / "image_manifest", config={}) as stage:
        stage.path("manifest.parquet").write_bytes(b"path,sha256\n")
    with pytest.raises(DataError, match=r"manifest\.parquet: not a table of parquet"):
        world.report(output="fresh")


def test_without_labels_the_report_names_what_needs_them_and_shows_the_rest(world):
    world.write_tables(world.table().with_columns(label=pl.lit(None, pl.String)))
    found = world.report()
    assert {item["protocol"] for item in found["missing"]} == {
        "k-NN",
        "k-NN, leave one out",
        "logistic regression",
        "linear probe",
        *DENSE_PROTOCOLS,
    }
    assert all(item["reason"].startswith("needs labels (sub-folders)") for item in found["missing"])
    assert {row["protocol"] for row in found["rows"]} == {"instance retrieval"}
    assert found["features"]["num_samples"] == 12
    said = knn_summary(found)
    assert said.startswith("k-NN: not judged (k-NN, ")
    assert said.count("needs labels (sub-folders)") == 1
    page = (world.root / "report" / "report.html").read_text()
    assert "needs labels (sub-folders)" in page
    assert 'id="neighbours"' in page


def test_nothing_held_out_still_gives_features_and_says_what_is_missing(world):
    world.write_tables(world.table().with_columns(split=pl.lit("train")))
    found = world.report()
    assert found["rows"] == []
    assert {"protocol": "instance retrieval", "reason": "needs at least two held-out pictures"} in (
        found["missing"]
    )
    assert found["features"]["num_samples"] == 24


def test_excluded_and_small_classes_are_left_out(world):
    table = world.table().filter(~pl.col("path").is_in([f"red/{n}.png" for n in range(1, 8)]))
    world.write_tables(table)
    assert world.report()["dataset"]["classes"] == ["blue", "green"]
    found = world.report("exclude_labels=[green]")
    assert found["dataset"]["classes"] == ["blue"]
    assert len(found["missing"]) == 6


def test_a_picture_changed_since_the_manifest_is_refused(world):
    paint(world.pictures / "red" / "3.png", (0, 0, 0), np.random.default_rng(9))
    with pytest.raises(LineageBroken, match=r"red/3\.png: its bytes differ"):
        world.report()


def test_a_table_without_the_needed_columns_is_refused(world):
    world.write_tables(world.table())
    with open_stage("image_manifest", world.root / "image_manifest", config={}) as stage:
        world.table().drop("label").write_parquet(stage.path("manifest.parquet"))
    with pytest.raises(DataError, match="got no column label"):
        world.report()


def test_a_crop_that_no_patch_grid_covers_is_refused(world):
    with pytest.raises(ConfigError, match="crop: not a multiple of the patch size 8, got 20"):
        world.report("crop=20")


def test_summary_shows_the_model_beside_its_three_baselines(report):
    lines = knn_summary(report).splitlines()
    assert lines[0].startswith("k-NN top-1 (k = 5) of 12 held-out pictures against 12, 3 classes")
    for line, subject in zip(lines[1:5], SUBJECTS, strict=True):
        value = row_of(report, "k-NN", subject)["value"]
        assert line.split("  [")[0].split() == [*subject.split(), f"{value:.3f}"]
    assert lines[5].strip().startswith("model - random init")
    assert lines[6].strip().startswith("model - raw pixels")


def test_any_folder_is_split_by_its_pixels_and_judged_without_writing(world, tmp_path):
    (world.pictures / "red" / "broken.png").write_bytes(b"not an image")
    before = sorted(tmp_path.rglob("*"))
    found = evaluate_folder(
        model=str(world.root / "model"),
        weights=None,
        train=world.source,
        test=None,
        output=None,
        config=config(),
    )
    assert sorted(tmp_path.rglob("*")) == before
    halves = [split_of(bytes.fromhex(digest)) for digest in world.table()["pixel_sha256"]]
    assert found["dataset"]["num_test"] == halves.count("test")
    assert found["dataset"]["num_train"] == halves.count("train")
    assert sum(found["dataset"]["unreadable"].values()) == 1
    assert row_of(found, "k-NN", "raw pixels")["value"] == 1.0


def test_two_folders_are_judged_one_against_the_other_and_recorded(world, tmp_path):
    generator = np.random.default_rng(5)
    for name, colour in COLOURS.items():
        for number in range(3):
            paint(tmp_path / "other" / name / f"{number}.png", colour, generator)
    output = tmp_path / "result"
    found = evaluate_folder(
        model=str(world.root / "model"),
        weights=None,
        train=world.source,
        test=f"folder:{tmp_path / 'other'}",
        output=output,
        config=config(),
    )
    assert (found["dataset"]["num_train"], found["dataset"]["num_test"]) == (24, 9)
    assert row_of(found, "k-NN", "raw pixels")["value"] == 1.0
    assert json.loads((output / "report.json").read_bytes()) == found
    edges = {edge.role: edge for edge in read_record(output / "record.json").inputs}
    assert edges["backbone"].record == file_sha256(world.root / "model" / "record.json")
    assert edges["test pictures"].record is None


def test_the_same_folder_on_both_sides_is_an_error(world):
    with pytest.raises(DataError, match="24 held-out images are also in the training half"):
        evaluate_folder(
            model=str(world.root / "model"),
            weights=None,
            train=world.source,
            test=world.source,
            output=None,
            config=config(),
        )


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("dinov3_vits61", None, "neither a folder nor one of dinov3_vits16"),
        ("dinov3_vits16", None, "needs a local file"),
        ("model", "some.pth", "a folder brings its own"),
    ],
)
def test_a_model_that_cannot_be_opened_is_refused(world, model, weights, message):
    place = world.root / model
    with pytest.raises(CheckpointError, match=message):
        evaluate_folder(
            model=str(place) if place.is_dir() else model,
            weights=weights,
            train=world.source,
            test=None,
            output=None,
            config=config(),
        )


def test_embed_writes_the_features_of_every_readable_picture(world, tmp_path):
    (world.pictures / "red" / "broken.png").write_bytes(b"not an image")
    output = tmp_path / "features.parquet"
    summary = embed_source(
        source=world.source,
        model=str(world.root / "model"),
        weights=None,
        output=output,
        size=16,
        batch_size=5,
        device="cpu",
    )
    assert summary["num_images"] == 24
    assert sum(summary["unreadable"].values()) == 1
    table = pq.read_table(output)
    assert table.column_names == ["path", "sha256", "embedding"]
    assert table["sha256"].to_pylist() == world.table()["sha256"].to_list()
    model = hub.load(world.root / "model")
    picture = Image.open(world.pictures / table["path"][7].as_py())
    resized = picture.resize((18, 21), Image.Resampling.BICUBIC).crop((1, 2, 17, 18))
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = model(((pixels - 0.5) / 0.25)[None])[0]
    np.testing.assert_allclose(table["embedding"][7].as_py(), expected, atol=1e-4)


def test_embed_of_no_readable_picture_is_refused_and_writes_nothing(world, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no readable image"):
        embed_source(
            source=f"folder:{folder}",
            model=str(world.root / "model"),
            weights=None,
            output=tmp_path / "features.parquet",
            size=16,
            batch_size=5,
            device="cpu",
        )
    assert not (tmp_path / "features.parquet").exists()


@pytest.mark.parametrize(
    ("name", "mean"),
    [("lvd1689m", (0.485, 0.456, 0.406)), ("sat493m", (0.430, 0.411, 0.296))],
)
def test_released_weights_are_shown_pictures_as_they_were_trained(tmp_path, name, mean):
    path = tmp_path / f"dinov3_vits16_pretrain_{name}.safetensors"
    save_file(hub.random_init("dinov3_vits16", 0).state_dict(), path)
    candidate = open_candidate("dinov3_vits16", path, torch.device("cpu"))
    assert candidate.mean == mean
    assert (candidate.stride, candidate.scale, candidate.cell) == (16, 1.0, 16)
    assert candidate.identity()["tensors"] == tensor_digest(path)
    assert candidate.identity()["record"] is None


CONVNEXT = {"arch": "convnext", "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 16], "patch_size": 8}


def write_convnext(folder, scale):
    fields = {name: value for name, value in CONVNEXT.items() if name != "arch"}
    model = hub.random_init(ConvNeXtConfig.from_fields(fields), 3)
    folder.mkdir()
    tensors = {f"teacher.{name}": value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "backbone.safetensors")
    crops = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"model": CONVNEXT, "crops": crops, "evaluation_scale": scale}
    (folder / "config.json").write_bytes(canonical_json(content))


def test_a_convnext_student_sees_pictures_at_its_scale_on_its_teachers_grid(tmp_path):
    write_convnext(tmp_path / "student", 4)
    candidate = open_candidate(tmp_path / "student", None, torch.device("cpu"))
    assert (candidate.stride, candidate.cell, candidate.side(48)) == (32, 8, 192)
    prepare = preparation(candidate, config("crop=48", "resize=64"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    features = extract(candidate.backbone, [image], prepare, 1, torch.device("cpu"), patches=True)
    assert features.patches.shape == (1, 36, 16)  # 6 x 6, as patches of 8 pixels on 48
    pixels = prepare(image)[None]
    assert pixels.shape == (1, 3, 192, 192)
    with torch.no_grad():
        expected = candidate.backbone.forward_features(pixels)
    np.testing.assert_allclose(features.patches, expected["x_norm_patchtokens"], atol=1e-5)
    np.testing.assert_allclose(features.cls, expected["x_norm_clstoken"], atol=1e-5)
    untrained = candidate.untrained(0)
    assert len(untrained.get_intermediate_layers(pixels)[0][0]) == 36
    candidate.require_divisible(96)
    with pytest.raises(ConfigError, match="crop: not a multiple of the patch size 8, got 44"):
        candidate.require_divisible(44)


@pytest.mark.parametrize("scale", [0, -1, "4"])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path, scale):
    write_convnext(tmp_path / "student", scale)
    with pytest.raises(CheckpointError, match="evaluation_scale: must be a positive number"):
        open_candidate(tmp_path / "student", None, torch.device("cpu"))
