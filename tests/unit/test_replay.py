"""A step that was not finite is taken again from its dump, and what went wrong is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from dinov3 import hub
from dinov3.checkpoint import save_tensors
from dinov3.cli import run
from dinov3.data.augment import View
from dinov3.data.loader import TrainingLoader
from dinov3.distributed import join_world
from dinov3.errors import CheckpointError, TrainingDiverged
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import open_stage
from dinov3.state import StateWriter
from dinov3.train.build import build_pair
from dinov3.train.distill import distill_students
from dinov3.train.distillation import DistillationPhase
from dinov3.train.frame import TrainingInputs
from dinov3.train.lens import describe, look_at_step, watch_outputs
from dinov3.train.phases import train_phase
from dinov3.train.rebuild import replay_step
from dinov3.train.replay import load_batch, save_batch
from dinov3.train.self_distillation import SelfDistillationPhase
from dinov3.train.text_alignment import align_text
from tests.saved_states import same
from tests.small_training import copy_of, drawn_images

CPU = torch.device("cpu")
NUM_IMAGES = 16


class World:
    """Pictures, the tables of them, and the artifact of an untrained teacher."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = drawn_images(root / "pictures", NUM_IMAGES)
        self.source = f"folder:{root / 'pictures'}"
        self.inputs = TrainingInputs(
            self.source,
            self.write_table("image_manifest", "manifest.parquet"),
            self.write_table("curated_dataset", "curated.parquet"),
        )
        self.pairs = self.write_table("caption_pairs", "pairs.parquet")
        self.teacher = self.write_teacher()

    def write_table(self, stage_name: str, name: str) -> Path:
        """One that serves every stage."""
        paths, sha256 = self.images.paths, self.images.sha256
        captions = [f"picture number {path}" for path in paths]
        columns = {"path": paths, "sha256": sha256, "caption": captions}
        table = pl.DataFrame(columns).with_columns(kept=pl.lit(True), split=pl.lit("train"))
        with open_stage(stage_name, self.root / stage_name, config={}) as stage:
            table.write_parquet(stage.path(name))
        return self.root / stage_name / name

    def write_teacher(self) -> Path:
        recipe = load_recipe("smoke_cpu")
        _, ema = build_pair(recipe.model.model_dump(), recipe.heads, 0)
        weights = {"backbone": {}, "heads": {}}
        for name, tensor in ema.state_dict().items():
            part, _, rest = name.partition(".")
            is_head = part != "backbone"
            weights["heads" if is_head else part][f"teacher.{name if is_head else rest}"] = tensor
        with open_stage("teacher", self.root / "teacher", config={}) as stage:
            for part, tensors in weights.items():
                save_tensors(stage.path(f"{part}.safetensors"), tensors)
            config = recipe.model_dump(mode="json")
            atomic_write(stage.path("config.json"), canonical_json(config))
        return self.root / "teacher"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def recipe_of(phase, *overrides):
    return load_recipe("smoke_cpu", ("run.device=cpu", *overrides), phase=phase)


def batches_of(phase, images, *, step=0, num_ranks=1):
    """The batch of a step as each of so many ranks would have had it."""
    config = phase.config
    size = config.batch_size if hasattr(config, "batch_size") else config.optim.batch_size
    found = []
    for rank in range(num_ranks):
        share = size // num_ranks
        loader = TrainingLoader(
            images,
            augmentation=phase.pipeline,
            batch_size=size,
            seed=config.seed,
            start_step=step,
            num_steps=1,
            num_workers=0,
            rows=range(rank * share, (rank + 1) * share),
        )
        found += list(loader)
    return found


def write_dump(folder, phase, batches, **arguments):
    """As a run leaves one before its first step, whatever that step is like."""
    job = {
        "stage": "x",
        "config": phase.config.model_dump(mode="json"),
        "arguments": arguments,
    }
    (folder / "non_finite").mkdir(parents=True)
    atomic_write(folder / "job.json", canonical_json(job))
    facts = {"method": phase.facts(), "world_size": len(batches)}
    with StateWriter(folder / "non_finite", keep=1) as writer:
        writer.save(batches[0].step, phase.tensors(), facts, wait=True)
    for rank, batch in enumerate(batches):
        save_batch(folder / "non_finite", batch, rank)
    return folder / "non_finite" / f"step_{batches[0].step:09d}"


def losses_of(findings, name=""):
    return findings.looks[name].losses


def same_losses(one, other):
    return one.keys() == other.keys() and all(
        one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6) for name in one
    )


def a_dump_in(folder):
    (found,) = folder.glob(".state/*/*/non_finite/step_*")
    return found


def diverging(train, output):
    """Trains until it diverges by itself; returns the dump."""
    with pytest.raises(TrainingDiverged, match=r"non-finite .*python -m dinov3 replay"):
        train(output)
    return a_dump_in(output.parent)


def test_the_command_line_replays_a_run_that_diverged_by_itself(tmp_path, capsys):
    """Neither pictures nor tables are needed: they are gone by then."""
    world = World(tmp_path / "world")
    config = recipe_of("pretrain", "schedules.lr.peak=1e20", "schedules.lr.end=1e20")

    def train(output):
        train_phase(stage_name="p", inputs=world.inputs, output=output, config=config)

    dump = diverging(train, tmp_path / "data" / "model")
    world.root.rename(tmp_path / "gone")
    before = {path: file_sha256(path) for path in dump.parent.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(["replay", str(dump)]) == 3
    said = capsys.readouterr()
    assert "step 2: reproduces, got non-finite" in said.err
    assert "first modules with non-finite outputs: teacher.backbone." in said.out
    assert "tensors of the state that are not finite: none" in said.out
    assert "backbone.blocks.0" in said.out
    after = {path: file_sha256(path) for path in dump.parent.rglob("*") if path.is_file()}
    assert before == after


def test_a_student_that_diverges_is_told_from_one_that_does_not(tmp_path, world):
    overrides = [f"students.vits.schedules.lr.{part}=1e20" for part in ("peak", "end")]
    config = recipe_of("distill", *overrides)

    def train(output):
        distill_students(
            stage_name="d", inputs=world.inputs, teacher=world.teacher, output=output, config=config
        )

    dump = diverging(train, tmp_path / "data" / "students")
    findings = replay_step(dump)
    assert findings.looks["vits"].bad
    assert not findings.looks["convnext"].bad
    assert findings.modules[0].startswith("vits.backbone.")


def test_a_distillation_from_a_published_file_is_replayed(tmp_path, world):
    """Such a teacher has features and no heads; its patches are twice as large as ours."""
    path = tmp_path / "vits16.safetensors"
    save_tensors(path, hub.random_init("dinov3_vits16", 0).state_dict())
    sizes = {"vits": (16, 8), "convnext": (64, 32)}
    config = recipe_of(
        "distill",
        "objective=features",
        *(f"students.{name}.crops.global_size={one}" for name, (one, _) in sizes.items()),
        *(f"students.{name}.crops.local_size={one}" for name, (_, one) in sizes.items()),
        *(f"students.convnext.schedules.lr.{part}=1e20" for part in ("peak", "end")),
    )

    def train(output):
        distill_students(
            stage_name="d",
            inputs=world.inputs,
            teacher=path,
            output=output,
            config=config,
            teacher_arch="dinov3_vits16",
        )

    dump = diverging(train, tmp_path / "data" / "students")
    findings = replay_step(dump)
    assert findings.looks["convnext"].bad
    assert not findings.looks["vits"].bad


def test_an_alignment_that_diverges_is_replayed(tmp_path, world):
    config = recipe_of("dinotxt", "schedules.lr.peak=1e30", "schedules.lr.end=1e30")

    def train(output):
        align_text(
            stage_name="t",
            source=world.source,
            pairs=world.pairs,
            backbone=world.teacher,
            output=output,
            config=config,
            resume=None,
        )

    findings = replay_step(diverging(train, tmp_path / "data" / "text"))
    assert "loss" in findings.looks[""].bad
    assert findings.modules
    assert not findings.modules[0].startswith("visual_model.backbone.")


@pytest.mark.parametrize("phase_name", ["pretrain", "gram", "highres"])
def test_a_sound_step_is_finite_and_has_the_losses_of_the_run(tmp_path, world, phase_name, capsys):
    overrides = ["gram.teacher=ema@0"] if phase_name != "pretrain" else []
    config = recipe_of(phase_name, *overrides)
    gram = build_backbone(config.model.model_dump()) if config.gram else None
    phase = SelfDistillationPhase(config, world.images, CPU, gram_backbone=gram)
    (batch,) = batches_of(phase, world.images)
    dump = write_dump(tmp_path / "run", phase, [batch])
    expected = phase.step(batch)[""]
    findings = replay_step(dump)
    assert findings.is_finite
    look = findings.looks[""]
    wanted = {name: value for name, value in expected.numbers.items() if name in look.losses}
    assert same_losses(look.losses, wanted)
    assert look.parts["backbone"] == pytest.approx(
        expected.numbers["gradient_norm/backbone"], rel=1e-4
    )
    assert run(["replay", str(dump)]) == 0
    assert "step 0 is finite here" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["checkpointing=full", "checkpointing=selective", "dtype=bf16"])
def test_a_step_is_replayed_with_its_numerics(tmp_path, world, setting):
    config = recipe_of("pretrain", f"compute.{setting}")
    with join_world(CPU, alone=config.compute.dtype == "bf16"):
        phase = SelfDistillationPhase(config, world.images, CPU)
        (batch,) = batches_of(phase, world.images)
        dump = write_dump(tmp_path / "run", phase, [batch])
        expected = phase.step(batch)[""].numbers
    findings = replay_step(dump)
    losses = losses_of(findings)
    assert findings.is_finite
    assert same_losses(losses, {name: expected[name] for name in losses})


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_rows_of_all_ranks_are_joined(tmp_path, world, micro_batches):
    config = recipe_of("pretrain", f"run.micro_batches={micro_batches}")
    phase = SelfDistillationPhase(config, world.images, CPU)
    alone = write_dump(tmp_path / "alone", phase, batches_of(phase, world.images))
    shared = write_dump(tmp_path / "shared", phase, batches_of(phase, world.images, num_ranks=2))
    assert same_losses(losses_of(replay_step(alone)), losses_of(replay_step(shared)))


def test_each_group_of_a_distillation_brings_the_crops_of_its_students(tmp_path, world):
    config = recipe_of("distill")
    teacher, _ = build_pair(
        recipe_of("pretrain").model.model_dump(), recipe_of("pretrain").heads, 0
    )
    phase = DistillationPhase(config, world.images, CPU, teacher=teacher, teacher_patch=8)
    (whole,) = batches_of(phase, world.images)
    arguments = {"teacher": str(world.teacher)}
    alone = replay_step(write_dump(tmp_path / "alone", phase, [whole], **arguments))
    local, far = View("local", 64), View("global", 128)
    # one student on two ranks, and one on a third, each with its own crops alone
    ranks = [replace(whole.pick(rows), views={}) for rows in (slice(0, 4), slice(4, 8))]
    other = replace(whole, local_crops=whole.views[local], views={far: whole.views[far]})
    groups = replay_step(write_dump(tmp_path / "groups", phase, [*ranks, other], **arguments))
    for name in ("vits", "convnext"):
        assert same_losses(losses_of(alone, name), losses_of(groups, name))


def test_a_poisoned_weight_is_named_and_the_first_module_that_meets_it(tmp_path, world):
    phase = SelfDistillationPhase(recipe_of("pretrain"), world.images, CPU)
    with torch.no_grad():
        phase.learner.student.backbone.blocks[1].attn.proj.weight[0, 0] = torch.inf
    dump = write_dump(tmp_path / "run", phase, batches_of(phase, world.images))
    findings = replay_step(dump)
    assert findings.state == ("student.backbone.blocks.1.attn.proj.weight",)
    assert findings.modules[0] == "student.backbone.blocks.1.attn.proj"
    assert "loss" in findings.looks[""].bad
    assert "student.backbone.blocks.1.attn.proj" in describe(findings)


def test_gradients_that_overflow_under_a_finite_loss_are_named(tmp_path, world):
    """Two layers whose scales cancel: the loss is as before, a gradient 1e30 times as large."""
    phase = SelfDistillationPhase(recipe_of("pretrain"), world.images, CPU)
    layers = phase.learner.student.dino_head.mlp
    with torch.no_grad():
        for layer, scale in ((layers[2], 1e30), (layers[4], 1e-30)):
            layer.weight.mul_(scale)
            layer.bias.zero_()
    dump = write_dump(tmp_path / "run", phase, batches_of(phase, world.images))
    findings = replay_step(dump)
    look = findings.looks[""]
    assert all(math.isfinite(value) for value in look.losses.values())
    assert look.bad == ("gradient_norm/dino_head",)
    assert not math.isfinite(look.norms["dino_head.mlp.4"])
    assert math.isfinite(look.norms["ibot_head.mlp.4"])
    assert not findings.modules


def test_a_look_updates_nothing_and_leaves_the_update_in_its_place(world):
    phase = SelfDistillationPhase(recipe_of("pretrain"), world.images, CPU)
    (batch,) = batches_of(phase, world.images, step=3)
    before = copy_of(phase.tensors())
    assert look_at_step(phase, {"student": phase.learner.student}, batch).is_finite
    assert same(before, copy_of(phase.tensors()))
    phase.step(batch)
    assert not same(before, copy_of(phase.tensors()))


def test_a_batch_is_written_and_read_back_whole(tmp_path, world):
    config = recipe_of("gram", "gram.teacher=ema@0")
    gram = build_backbone(config.model.model_dump())
    phase = SelfDistillationPhase(config, world.images, CPU, gram_backbone=gram)
    (batch,) = batches_of(phase, world.images)
    read = load_batch(save_batch(tmp_path, batch, 3))
    assert read.step == batch.step
    assert read.views.keys() == batch.views.keys() != set()
    for one, other in ((read, batch), (read.parameters, batch.parameters)):
        for name, value in vars(other).items():
            if hasattr(value, "shape"):
                assert torch.equal(torch.as_tensor(getattr(one, name)), torch.as_tensor(value))


def test_a_dump_that_lacks_a_rank_is_refused(tmp_path, world):
    phase = SelfDistillationPhase(recipe_of("pretrain"), world.images, CPU)
    dump = write_dump(tmp_path / "run", phase, batches_of(phase, world.images, num_ranks=2))
    (dump.parent / "batch_rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no batch of rank 1, got 2 ranks"):
        replay_step(dump)


def test_the_batch_of_another_step_is_refused(tmp_path, world):
    phase = SelfDistillationPhase(recipe_of("pretrain"), world.images, CPU)
    dump = write_dump(tmp_path / "run", phase, batches_of(phase, world.images))
    (other,) = batches_of(phase, world.images, step=4)
    save_batch(dump.parent, other, 0)
    with pytest.raises(CheckpointError, match="not the batch of step 0, got 4"):
        replay_step(dump)


def test_a_folder_without_a_run_around_it_is_refused(tmp_path, capsys):
    assert run(["replay", str(tmp_path / "non_finite" / "step_000000001")]) == 2
    assert "not the description of a run" in capsys.readouterr().err
    (tmp_path / "job.json").write_text(json.dumps({"config": {"phase": "evals"}}))
    with pytest.raises(CheckpointError, match="not the description of a run"):
        replay_step(tmp_path / "non_finite" / "step_000000001")


def test_modules_are_named_in_the_order_they_fail():
    chain = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2), torch.nn.ReLU())
    found = {}
    with torch.no_grad(), watch_outputs(chain, found, "net"):
        chain[1].bias[0] = torch.inf
        chain(torch.zeros(1, 2))
    assert list(found) == ["net.1", "net.2"]
    found.clear()
    chain(torch.zeros(1, 2))
    assert not found
