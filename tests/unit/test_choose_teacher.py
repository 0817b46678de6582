"""The stage `gram_teacher`: its rules, what it may look at, and what it hands on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dinov3 import hub
from dinov3.config import GramTeacherConfig
from dinov3.data.decode import decode_image, pixel_digest
from dinov3.errors import CheckpointError, DataError, LineageBroken
from dinov3.evals.choose_teacher import choose_gram_teacher
from dinov3.release.record import file_sha256, read_record
from dinov3.stage import open_stage
from tests.drawn import draw

MODEL = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "ffn_ratio": 2.0,
    "num_registers": 1,
    "layerscale": 0.1,
}
MODEL_CONFIG = {"model": MODEL, "crops": {"mean": [0.5] * 3, "std": [0.25] * 3}}
CONFIG = {
    "phase": "gram_teacher",
    "choose": "best_dense",
    "step": None,
    "otherwise": "refuse",
    "seed": 0,
    "exclude_labels": [],
    "min_per_class": 4,
    "composites": {
        "size": 32,
        "num_train": 30,
        "num_test": 20,
        "num_objects": [2, 3],
        "backgrounds": None,
    },
    "segmentation": {
        "log10_c": [-2.0, 0.0],
        "num_c": 2,
        "max_iter": 100,
        "tolerance": 1e-3,
        "val_fraction": 0.25,
    },
    "num_bootstrap": 100,
    "run": {"batch_size": 8, "device": "cpu", "threads": None},
}
SEEING = 20  # the snapshot that is not blind


def config(**changes):
    return GramTeacherConfig.model_validate_json(json.dumps(CONFIG | changes))


def save_pictures(root, *, opaque):
    """Two classes, told apart by their hue, of 12 pictures each; every third is held out."""
    rows = []
    for index in range(24):
        label = ("reds", "blues")[index % 2]
        image = draw(index, hue=0.6 * (index % 2), size=(48, 40)).convert("RGBA")
        y, x = np.mgrid[:40, :48]
        inside = ((x - 23.5) / 20) ** 2 + ((y - 19.5) / 16) ** 2 < 1
        if not opaque:
            image.putalpha(Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)))
        path = root / label / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        data = path.read_bytes()
        rows.append(
            {
                "path": f"{label}/{path.name}",
                "sha256": hashlib.sha256(data).hexdigest(),
                "pixel_sha256": pixel_digest(decode_image(data)).hex(),
                "label": label,
                "split": "test" if index % 3 == 0 else "train",
            }
        )
    return pl.DataFrame(rows)


class World:
    """A source, its table and a trained model with three snapshots."""

    def __init__(self, root: Path, *, opaque: bool = False, steps=(10, SEEING, 30)) -> None:
        self.root, self.pictures = root, root / "pictures"
        self.manifest = root / "image_manifest" / "manifest.parquet"
        self.checkpoint = root / "pretrained_checkpoint"
        table = save_pictures(self.pictures, opaque=opaque)
        with open_stage("image_manifest", self.manifest.parent, config={}) as stage:
            table.write_parquet(stage.path("manifest.parquet"))
        with open_stage("pretrained_checkpoint", self.checkpoint, config={}) as stage:
            stage.path("config.json").write_text(json.dumps(MODEL_CONFIG))
            stage.path("snapshots").mkdir()
            for step in steps:
                save_file(weights(stage.path(""), step), stage.path(snapshot(step)))

    def choose(self, name="gram_teacher", **changes):
        source = changes.pop("source", f"folder:{self.pictures}")
        choose_gram_teacher(
            stage_name="gram_teacher",
            source=source,
            manifest=self.manifest,
            checkpoint=self.checkpoint,
            output=self.root / name,
            config=config(**changes),
        )
        return self.root / name


def snapshot(step):
    return f"snapshots/step_{step:09d}.safetensors"


def weights(folder, step):
    """A teacher; blind but for one step: its patches all look alike."""
    tensors = hub.random_init(folder, seed=step).state_dict()
    if step != SEEING:
        tensors["patch_embed.proj.weight"].zero_()
    return {f"teacher.{name}": value.contiguous() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def chosen(world):
    return world.choose()


def test_the_best_dense_snapshot_is_chosen_and_the_reason_written(chosen):
    choice = json.loads((chosen / "choice.json").read_text())
    assert (choice["rule"], choice["step"]) == ("best_dense", SEEING)
    assert choice["available"] == [row["step"] for row in choice["snapshots"]] == [10, SEEING, 30]
    scores = {row["step"]: row["score"] for row in choice["snapshots"]}
    assert choice["score"] == scores[SEEING]
    assert all(row["low"] <= row["value"] <= row["high"] for row in scores.values())
    assert scores[SEEING]["low"] > scores[10]["high"]
    lost = {row["step"]: row["minus_chosen"] for row in choice["snapshots"]}
    assert lost[SEEING] == {"value": 0, "low": 0, "high": 0}
    assert lost[30]["high"] < 0
    assert choice["scenes"]["classes"] == ["blues", "reds"]


def test_the_chosen_weights_are_handed_on_bit_by_bit(world, chosen):
    origin = world.checkpoint / snapshot(SEEING)
    assert (chosen / "backbone.safetensors").read_bytes() == origin.read_bytes()
    loaded = hub.load(chosen, role="teacher").state_dict()
    for name, tensor in load_file(origin).items():
        assert np.array_equal(loaded[name.removeprefix("teacher.")], tensor)


def test_the_record_names_every_snapshot_that_was_judged(world, chosen):
    record = read_record(chosen / "record.json")
    edges = {edge.role: edge for edge in record.inputs}
    assert set(edges) == {
        "model config",
        "manifest",
        "backgrounds",
        "snapshot 10",
        "snapshot 20",
        "snapshot 30",
    }
    assert edges["snapshot 20"].name == snapshot(SEEING)
    assert edges["snapshot 20"].record == file_sha256(world.checkpoint / "record.json")
    assert record.steps == {"chosen": SEEING}
    assert record.facts["rule"] == "best_dense"


def test_the_same_inputs_give_the_same_bytes(world, chosen):
    again = world.choose("again")
    for name in ("choice.json", "record.json"):
        assert (again / name).read_bytes() == (chosen / name).read_bytes()


def test_the_held_out_half_is_never_opened(world, chosen, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(world.pictures, pictures)
    table = pl.read_parquet(world.manifest)
    for path in table.filter(pl.col("split") == "test")["path"]:
        (pictures / path).write_bytes(b"must not be read")
    without = world.choose("without", source=f"folder:{pictures}")
    assert (without / "choice.json").read_bytes() == (chosen / "choice.json").read_bytes()


def test_a_stated_step_is_taken_without_looking_at_pictures(world, tmp_path):
    taken = world.choose("stated", choose="step", step=30, source=f"folder:{tmp_path / 'none'}")
    assert json.loads((taken / "choice.json").read_text()) == {
        "rule": "step",
        "step": 30,
        "available": [10, 20, 30],
    }
    origin = world.checkpoint / snapshot(30)
    assert (taken / "backbone.safetensors").read_bytes() == origin.read_bytes()
    roles = {edge.role for edge in read_record(taken / "record.json").inputs}
    assert roles == {"model config", "snapshot 30"}


def test_a_step_without_snapshot_is_refused_with_those_there_are(world):
    with pytest.raises(CheckpointError, match=r"got 25\. Use one of 10, 20, 30\."):
        world.choose("refused", choose="step", step=25)
    assert not (world.root / "refused").exists()


def test_a_run_that_kept_no_snapshots_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="kept no snapshots"):
        World(tmp_path, steps=()).choose()


def test_a_changed_snapshot_is_refused(tmp_path):
    world = World(tmp_path)
    shutil.copyfile(world.checkpoint / snapshot(10), world.checkpoint / snapshot(SEEING))
    with pytest.raises(LineageBroken, match=r"step_000000020\.safetensors: its bytes differ"):
        world.choose()


def test_a_snapshot_outside_the_record_is_no_candidate(tmp_path):
    world = World(tmp_path)
    shutil.copyfile(world.checkpoint / snapshot(10), world.checkpoint / snapshot(40))
    with pytest.raises(CheckpointError, match=r"got 40\. Use one of 10, 20, 30\."):
        world.choose(choose="step", step=40)


def test_pictures_without_transparency_need_the_other_rule(tmp_path):
    with pytest.raises(DataError, match=r"pictures with transparency.*choose=step"):
        World(tmp_path, opaque=True).choose()


def test_where_the_recipe_says_so_the_earliest_is_taken_and_the_reason_kept(tmp_path):
    world = World(tmp_path, opaque=True)
    choice = json.loads((world.choose(otherwise="earliest") / "choice.json").read_text())
    assert (choice["rule"], choice["step"]) == ("earliest", 10)
    assert "transparency" in choice["reason"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choose": "step"}, "step: needed with choose=step, got None. Name one"),
        ({"step": 20}, "step: contradicts choose=best_dense, got 20. Leave it null"),
    ],
)
def test_a_contradictory_rule_is_one_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        config(**changes)
