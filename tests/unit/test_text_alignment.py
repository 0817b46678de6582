"""Text is aligned with a frozen backbone; stopped, shared or split, the run ends the same."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from dinov3.checkpoint import load_tensors, save_tensors
from dinov3.config import DinotxtConfig
from dinov3.data.loader import TrainingLoader
from dinov3.errors import ConfigError, DataError, Interrupted, LineageBroken
from dinov3.evals.dinotxt import open_dinotxt
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256, read_record
from dinov3.stage import Stage, open_stage
from dinov3.train.alignment_phase import AlignmentPhase, compared_patches
from dinov3.train.text_alignment import AlignmentInputs, align_text, build_alignment
from dinov3.train.trainer import Course, Trainer

CPU = torch.device("cpu")
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "grey": (90,) * 3}
NUM_PER_COLOUR = 6
VIT = {"arch": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
CONVNEXT = {"arch": "convnext", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
NUM_STEPS = 12
COMMAND = (f"schedules.num_steps={NUM_STEPS}", "run.device=cpu")
SHARED = (  # weights of all parts move, and the second term has something to hold
    "schedules.num_steps=5",
    "schedules.lr.start=1e-3",
    "losses.text_gram=0.5",
    "losses.text_gram_rate=0.5",
    "run.device=cpu",
)


class World:
    """Pictures of one colour with captions, and untrained backbones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = f"folder:{root / 'pictures'}"
        self.pairs = root / "caption_pairs" / "pairs.parquet"
        self._write_pairs()
        for name, fields in (("vit", VIT), ("convnext", CONVNEXT)):
            self._write_backbone(name, fields)

    def _write_pairs(self) -> None:
        rng, rows = random.Random(0), []
        (self.root / "pictures").mkdir()
        for number in range(NUM_PER_COLOUR):
            for name, colour in COLOURS.items():
                path = self.root / "pictures" / f"{name}{number}.png"
                noisy = np.clip(np.array(colour) + rng.randrange(-25, 25), 0, 255)
                Image.new("RGB", (40, 32), tuple(map(int, noisy))).save(path)
                caption = f"a {name} picture, number {number}"
                split = "test" if number == 0 else "train"
                rows.append((path.name, file_sha256(path), caption, split))
        columns = ("path", "sha256", "caption", "split")
        self.write_table("caption_pairs", pl.DataFrame(rows, schema=columns, orient="row"))

    def write_table(self, name: str, table: pl.DataFrame) -> Path:
        """As a stage leaves it."""
        with open_stage(name, self.root / name, config={}) as stage:
            table.write_parquet(stage.path("pairs.parquet"))
        return self.root / name / "pairs.parquet"

    def _write_backbone(self, name: str, fields: dict) -> None:
        with (
            torch.random.fork_rng(devices=[]),
            open_stage(name, self.root / name, config={}) as stage,
        ):
            torch.manual_seed(0)
            backbone = build_backbone(fields)
            backbone.reset_parameters()
            tensors = {f"teacher.{key}": value for key, value in backbone.state_dict().items()}
            save_tensors(stage.path("backbone.safetensors"), tensors)
            atomic_write(stage.path("config.json"), canonical_json({"model": fields}))

    def train(self, output: Path, *overrides: str, pairs: Path | None = None) -> Path:
        """In this process."""
        align_text(
            stage_name="dinotxt",
            source=self.source,
            pairs=pairs or self.pairs,
            backbone=self.root / "vit",
            output=output,
            config=config_of(*overrides),
            resume=None,
        )
        return output

    def command(self, output: Path, *overrides: str) -> list[str]:
        """The same, as a command line."""
        inputs = ("--source", self.source, "--pairs", self.pairs, "--backbone", self.root / "vit")
        stage = ("align", "dinotxt", "--recipe", "smoke_cpu", "--output", output, *overrides)
        return [sys.executable, "-m", "dinov3", *map(str, (*stage, *inputs))]

    def build(self, name: str = "vit", *overrides: str):
        """Images and the phase at step 0, without a run around them."""
        inputs = AlignmentInputs(self.source, self.pairs, self.root / name)
        stage = Stage("dinotxt", self.root / "nowhere", {})
        return build_alignment(stage, CPU, config=config_of(*overrides), inputs=inputs)


def config_of(*overrides: str) -> DinotxtConfig:
    return load_recipe("smoke_cpu", overrides, phase="dinotxt")


def batches(phase: AlignmentPhase, images, num_steps: int = 1) -> list:
    config = phase.config
    loader = TrainingLoader(
        images,
        augmentation=phase.pipeline,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        start_step=0,
        num_steps=num_steps,
        num_workers=0,
    )
    return list(loader)


def losses_of(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def difference(one: Path, other: Path) -> float:
    ours, theirs = (load_tensors(folder / "dinotxt.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run."""
    return world.train(tmp_path_factory.mktemp("whole") / "dinotxt", *COMMAND)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """One rank, one micro-batch, both terms."""
    return world.train(tmp_path_factory.mktemp("alone") / "dinotxt", *SHARED)


def test_a_run_leaves_a_model_that_opens_over_its_backbone(world, whole):
    opened = open_dinotxt(whole, world.root / "vit", CPU)
    texts = opened.model.encode_text(opened.tokenize(["a red picture", "a blue picture"]))
    assert texts.shape == (2, 64)
    trained = load_tensors(whole / "dinotxt.safetensors")
    assert not any(name.startswith("visual_model.backbone.") for name in trained)
    described = json.loads((whole / "config.json").read_text())
    assert described["backbone"] == VIT
    assert described["model"]["text"]["context_length"] == 16
    assert described["crops"]["size"] == 32


def test_the_record_names_pairs_and_backbone_and_counts_the_training_half(world, whole):
    record = read_record(whole / "record.json")
    named = {(edge.role, edge.name): edge.sha256 for edge in record.inputs}
    assert named["pairs", "pairs.parquet"] == file_sha256(world.pairs)
    weights = world.root / "vit" / "backbone.safetensors"
    assert named["backbone", "backbone.safetensors"] == file_sha256(weights)
    assert record.facts["num_pairs"] == (NUM_PER_COLOUR - 1) * len(COLOURS)
    assert record.steps == {"planned": NUM_STEPS, "performed": NUM_STEPS}
    health = json.loads((whole / "health.json").read_text())
    assert health["passed"]
    assert health["metrics"].keys() == {
        "image_to_text",
        "text_to_image",
        "finite_similarities",
        "logit_scale",
    }


def test_a_killed_run_leaves_nothing_and_ends_with_the_same_bits(world, whole, tmp_path, capsys):
    output = tmp_path / "dinotxt"
    command = world.command(output, *COMMAND)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 5/"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    world.train(output, *COMMAND)
    assert "continuing at step" in capsys.readouterr().err
    ours, expected = (read_record(folder / "record.json") for folder in (output, whole))
    assert ours.outputs == expected.outputs
    assert (ours.inputs, ours.facts) == (expected.inputs, expected.facts)


class StopsItself:
    """Pictures, after so many of which the process is asked to end."""

    def __init__(self, images, num_reads: int) -> None:
        self.images, self.left = images, num_reads

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.images.read(index)

    def name(self, index: int) -> str:
        return self.images.name(index)


def test_three_steps_and_three_more_are_six(world, tmp_path):
    overrides = ("model.head_drop_path=0.4", "crops.cache_size=null")  # every picture is read

    def trainer(folder, stop_after=0):
        images, phase = world.build("vit", *overrides)
        config = phase.config
        batch_size = config.optim.batch_size
        course = Course(config.seed, 6, batch_size, config.run, config.health)
        reads = stop_after * batch_size
        (tmp_path / folder).mkdir(exist_ok=True)
        return Trainer(phase, StopsItself(images, reads), tmp_path / folder, course)

    straight = trainer("straight")
    straight.run()
    with pytest.raises(Interrupted, match="after step 3"):
        trainer("halves", stop_after=3).run()
    second = trainer("halves")
    assert second.resume()
    assert second.step == 3
    second.run()
    ours, expected = second.method.tensors(), straight.method.tensors()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert second.method.facts() == straight.method.facts()


def test_two_micro_batches_are_the_large_batch(world, alone, tmp_path):
    parts = world.train(tmp_path / "dinotxt", *SHARED, "run.micro_batches=2")
    torch.testing.assert_close(losses_of(parts), losses_of(alone), rtol=0, atol=1e-5)
    assert difference(parts, alone) < 1e-5


def test_two_ranks_are_the_large_batch(world, alone, tmp_path):
    command = world.command(tmp_path / "dinotxt", *SHARED, "run.processes=2")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "dinotxt" / "run.json").read_text())["world_size"] == 2
    torch.testing.assert_close(losses_of(tmp_path / "dinotxt"), losses_of(alone), rtol=0, atol=1e-5)
    assert difference(tmp_path / "dinotxt", alone) < 1e-5


def test_pairs_come_together_and_the_backbone_stays(world, tmp_path):
    few = pl.read_parquet(world.pairs).filter(split="train").head(len(COLOURS))
    pairs = world.write_table("few_pairs", few)
    weights = world.root / "vit" / "backbone.safetensors"
    before = file_sha256(weights)
    overrides = ("optim.batch_size=4", "schedules.lr.peak=3e-3", "schedules.num_steps=30")
    output = world.train(tmp_path / "dinotxt", *overrides, pairs=pairs)
    losses = losses_of(output)
    assert losses[0] > 1  # ln 4 = 1.39 where nothing is known
    assert losses[-1] < 0.1 * losses[0]
    metrics = json.loads((output / "health.json").read_text())["metrics"]
    assert metrics["image_to_text"] == metrics["text_to_image"] == 1
    assert file_sha256(weights) == before


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_step_trains_every_tensor_over_either_family(world, name):
    images, phase = world.build(name, "schedules.lr.start=1e-3", "losses.text_gram=1.0")
    frozen = {key: value.clone() for key, value in phase.model.state_dict().items()}
    (batch,) = batches(phase, images)
    outcome = phase.step(batch)[""]
    assert outcome.is_finite
    same = {key for key, value in phase.model.state_dict().items() if value.equal(frozen[key])}
    assert same == {key for key in frozen if key.startswith("visual_model.backbone.")}


def test_the_temperature_is_kept_in_its_range(world):
    images, phase = world.build("vit", "schedules.lr.start=1e-3")
    (batch,) = batches(phase, images)
    with torch.no_grad():
        phase.model.logit_scale.fill_(10.0)
    outcome = phase.step(batch)[""]
    assert outcome.numbers["logit_scale"] == 10.0
    assert phase.model.logit_scale.item() == pytest.approx(math.log(100))


def test_a_step_that_is_not_finite_changes_nothing(world):
    images, phase = world.build("vit", "schedules.lr.start=1e-3")
    (batch,) = batches(phase, images)
    with torch.no_grad():
        phase.model.logit_scale.fill_(torch.inf)
    before = {name: value.clone() for name, value in phase.tensors().items()}
    outcome = phase.step(batch)[""]
    assert not outcome.is_finite
    assert "loss" in outcome.bad
    assert all(torch.equal(value, before[name]) for name, value in phase.tensors().items())


def test_vectors_and_the_temperature_are_not_decayed(world):
    _, phase = world.build()
    decayed = {
        name: group["wd_mult"]
        for group in phase.learner.optimizer.param_groups
        for name in group["names"]
    }
    parameters = phase.model.trainable_parameters()
    assert decayed.keys() == parameters.keys()
    assert all(decayed[name] == (parameter.ndim > 1) for name, parameter in parameters.items())


def test_crops_are_only_cut_and_mirrored(world):
    images, phase = world.build("vit", "crops.mean=[0,0,0]", "crops.std=[1,1,1]")
    (batch,) = batches(phase, images)
    crops, local_crops = phase.pipeline.apply(batch, CPU)
    assert crops.shape == (8, 3, 32, 32)
    assert len(local_crops) == 0
    for crop, index in zip(crops, batch.indices, strict=True):
        colour = np.array(Image.open(world.root / "pictures" / images.name(int(index))))[0, 0]
        expected = torch.from_numpy(colour / 255).float()
        torch.testing.assert_close(crop.amin((1, 2)), expected)
        torch.testing.assert_close(crop.amax((1, 2)), expected)


def test_a_rehearsal_and_a_measurement_change_nothing(world):
    images, phase = world.build("vit", "model.head_drop_path=0.4")
    before = {name: value.clone() for name, value in phase.tensors().items()}
    drawn = torch.get_rng_state()
    phase.rehearse()
    first = phase.measure(phase.learner)
    assert phase.measure(phase.learner) == first
    assert phase.model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in phase.tensors().items())
    assert all(p.grad is None for p in phase.learner.student.parameters())
    (batch,) = batches(phase, images)
    (picture,) = phase.pictures(phase.learner, batch).values()
    assert picture.dtype == torch.uint8


def test_features_that_are_not_finite_end_the_run(world):
    _, phase = world.build()
    phase.learner.health = phase.measure(phase.learner)
    assert phase.judge(phase.learner, 1) is None
    with torch.no_grad():
        phase.model.text_model.head.linear_projection.weight.fill_(torch.nan)
    phase.learner.health = phase.measure(phase.learner)
    assert "finite_similarities is 0" in phase.judge(phase.learner, 1)


def test_a_caption_of_two_pictures_is_right_for_both(world, tmp_path):
    table = pl.read_parquet(world.pairs).filter(split="train")
    same = world.write_table("same_captions", table.with_columns(caption=pl.lit("a picture")))
    inputs = AlignmentInputs(world.source, same, world.root / "vit")
    stage = Stage("dinotxt", tmp_path / "nowhere", {})
    _, phase = build_alignment(stage, CPU, config=config_of(), inputs=inputs)
    found = phase.measure(phase.learner)
    assert found["image_to_text"] == found["text_to_image"] == 1


def test_compared_patches_depend_on_seed_and_step_alone():
    chosen = compared_patches(0, 3, 20, 0.4)
    assert len(chosen) == 8
    assert torch.equal(chosen, chosen.unique())
    assert chosen.max() < 20
    assert torch.equal(chosen, compared_patches(0, 3, 20, 0.4))
    assert not torch.equal(chosen, compared_patches(0, 4, 20, 0.4))
    assert not torch.equal(chosen, compared_patches(1, 3, 20, 0.4))
    assert len(compared_patches(0, 3, 20, 0.0)) == 1
    assert compared_patches(0, 3, 20, 1.0) is None


def test_skipped_residuals_depend_on_the_step_and_the_place(world):
    images, phase = world.build("vit", "model.head_drop_path=0.6")
    for parameter in phase.model.visual_model.head.parameters():
        parameter.data.fill_(0.5)  # from LayerScale 1e-5 a residual would hardly show
    (batch,) = batches(phase, images)
    pictures, _ = phase.pipeline.apply(batch, CPU)

    def features(step: int) -> torch.Tensor:
        phase.seed_part(step, 0)
        return phase.model.encode_image(pictures)

    assert torch.equal(features(1), features(1))
    assert not torch.equal(features(1), features(2))


def test_a_batch_larger_than_the_table_is_refused(world):
    with pytest.raises(ConfigError, match=r"optim.batch_size: .*got 24 for 20 pairs"):
        world.build("vit", "optim.batch_size=24")


def test_tables_that_cannot_be_trained_on_are_refused(world, tmp_path):
    table = pl.read_parquet(world.pairs)
    for name, other, error in (
        ("no_caption", table.drop("caption"), "got no column caption"),
        ("all_held_out", table.filter(split="test"), "too few pairs to train on, got 0"),
    ):
        pairs = world.write_table(name, other)
        with pytest.raises(DataError, match=error):
            world.train(tmp_path / "dinotxt", *COMMAND, pairs=pairs)
    assert not (tmp_path / "dinotxt").exists()


def test_a_picture_that_changed_is_refused(world, tmp_path):
    table = pl.read_parquet(world.pairs).with_columns(sha256=pl.lit("0" * 64))
    pairs = world.write_table("other_bytes", table)
    with pytest.raises(LineageBroken, match="its bytes differ from the image table"):
        world.train(tmp_path / "dinotxt", *COMMAND, pairs=pairs)
