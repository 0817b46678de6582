"""Several students of one frozen teacher, in this process: their targets, steps and failures."""

import json
from dataclasses import replace

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from dinov3.checkpoint import save_tensors
from dinov3.data.augment import View
from dinov3.data.loader import TrainingLoader
from dinov3.errors import CheckpointError, ConfigError, TrainingDiverged
from dinov3.losses.sinkhorn import sinkhorn_knopp
from dinov3.recipe import load_recipe
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json
from dinov3.stage import Stage, open_stage
from dinov3.state import load_state
from dinov3.train.build import build_pair
from dinov3.train.distill import build_distillation, check_grids
from dinov3.train.distillation import DistillationPhase
from dinov3.train.feature_matching import FeatureMatching
from dinov3.train.objective import Weights
from dinov3.train.trainer import Course, Trainer
from tests.small_training import VIT, copy_of, drawn_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn_images(tmp_path_factory.mktemp("images"), 12)


def a_config(*overrides):
    return load_recipe("smoke_cpu", list(overrides), phase="distill")


def a_network(config, seed=21):
    """Of the students' prototypes, with patches of 8 pixels."""
    heads = next(iter(config.students.values())).heads
    return build_pair(VIT, heads, seed)[0]


def a_phase(images, *overrides):
    config = a_config(*overrides)
    return DistillationPhase(config, images, CPU, teacher=a_network(config), teacher_patch=8)


def batches(phase, images, num_steps):
    return TrainingLoader(
        images,
        augmentation=phase.pipeline,
        batch_size=phase.config.batch_size,
        seed=phase.config.seed,
        start_step=0,
        num_steps=num_steps,
        num_workers=0,
        rows=phase.rows,
    )


def a_trainer(phase, images, folder):
    config = phase.config
    course = Course(
        seed=config.seed,
        num_steps=config.schedules.num_steps,
        batch_size=config.batch_size,
        run=config.run,
        policy=config.health,
    )
    return Trainer(phase, images, folder, course)


def flat(name, value):
    return f"{name}={{start: {value}, peak: {value}, end: {value}, warmup_steps: 0}}"


def poison(phase, name):
    with torch.no_grad():
        phase.methods[name].student.backbone.patch_embed.proj.weight.view(-1)[0] = float("nan")


def weights_of(tensors, name):
    return {key: one for key, one in tensors.items() if key.startswith(f"{name}.")}


def poison_convnext(phase):
    with torch.no_grad():
        next(phase.methods["convnext"].student.parameters()).view(-1)[0] = float("nan")


def test_students_of_both_families_learn_in_one_process(images):
    phase = a_phase(images)
    teacher, before = copy_of(phase.teacher.state_dict()), copy_of(phase.tensors())
    for batch in batches(phase, images, 2):
        outcomes = phase.step(batch)
        assert outcomes.keys() == {"vits", "convnext"}
        assert all(outcome.is_finite for outcome in outcomes.values())
    torch.testing.assert_close(phase.teacher.state_dict(), teacher, rtol=0, atol=0)
    for name in ("vits", "convnext"):
        token = f"{name}.student.dino_head.last_layer.weight"
        assert not torch.equal(phase.tensors()[token], before[token])
        assert not torch.equal(phase.tensors()[token.replace("student", "ema", 1)], before[token])


def test_a_student_alone_learns_what_it_learns_among_others(images):
    """Steps are taken one after the other; none leaks into the next."""
    among, alone = a_phase(images), a_phase(images)
    del alone.methods["convnext"]
    for batch in batches(among, images, 2):
        among.step(batch)
        alone.step(batch)
    expected = weights_of(among.tensors(), "vits")
    torch.testing.assert_close(weights_of(alone.tensors(), "vits"), expected, rtol=0, atol=0)


def test_the_teachers_targets_are_balanced_assignments_to_its_own_prototypes(images):
    phase = a_phase(images)
    batch = next(iter(batches(phase, images, 1)))
    masks = phase._masks(0)
    (targets,) = phase._targets(batch, masks, 0.07)
    crops, _ = phase.pipeline.apply(batch, CPU)
    with torch.no_grad():
        features = phase.teacher.backbone.forward_features(crops)
        logits = phase.teacher.dino_head(features["x_norm_clstoken"])
        chosen = features["x_norm_patchtokens"][masks.flatten(0, 1)]
        patch_logits = phase.teacher.ibot_head(chosen)
    expected = sinkhorn_knopp(logits, temperature=0.07).unflatten(0, (2, -1))
    torch.testing.assert_close(targets.cls, expected)
    expected = sinkhorn_knopp(patch_logits, temperature=0.07)
    torch.testing.assert_close(targets.patches, expected)


def test_micro_batches_change_only_the_last_bits(images):
    one, parted = a_phase(images), a_phase(images, "run.micro_batches=2")
    for batch in batches(one, images, 2):
        expected, found = one.step(batch), parted.step(batch)
        for name, outcome in expected.items():
            assert found[name].numbers == pytest.approx(outcome.numbers, rel=1e-3)


def test_every_student_sees_the_teachers_cuts_at_its_own_size(images):
    phase = a_phase(images)
    batch = next(iter(batches(phase, images, 1)))
    masks = phase._masks(0)
    (small,), (large,) = (phase._shares(name, batch, masks) for name in ("vits", "convnext"))
    assert small.global_crops.shape == (16, 3, 32, 32)
    assert large.global_crops.shape == (16, 3, 128, 128)
    assert large.local_crops.shape == (16, 3, 64, 64)
    torch.testing.assert_close(small.masks, large.masks)
    reduced = F.interpolate(large.global_crops, (32, 32), mode="bicubic", antialias=True)
    cosine = F.cosine_similarity(reduced.flatten(1), small.global_crops.flatten(1))
    assert cosine.median() > 0.95
    assert View("global", 128) in batch.views


def test_a_student_that_fails_is_left_alone_and_the_others_go_on(images):
    phase, sound = a_phase(images), a_phase(images)
    poison(phase, "vits")
    before = copy_of(weights_of(phase.tensors(), "vits"))
    batch = next(iter(batches(phase, images, 1)))
    outcomes, expected = phase.step(batch), sound.step(batch)
    assert "loss" in outcomes["vits"].bad
    assert not outcomes["vits"].is_finite
    after = weights_of(phase.tensors(), "vits")
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert outcomes["convnext"].is_finite
    assert outcomes["convnext"].numbers == expected["convnext"].numbers
    other = weights_of(phase.tensors(), "convnext")
    torch.testing.assert_close(other, weights_of(sound.tensors(), "convnext"), rtol=0, atol=0)
    assert [learner.bad_steps for learner in phase.learners] == [1, 0]


def test_a_run_names_the_student_that_failed(images, tmp_path):
    phase = a_phase(images, "health.non_finite=skip", "health.max_consecutive_non_finite=2")
    poison_convnext(phase)
    with pytest.raises(TrainingDiverged, match=r"step 1: non-finite convnext .*loss"):
        a_trainer(phase, images, tmp_path).run()
    logs = {
        name: [
            json.loads(one) for one in (tmp_path / name / "events.jsonl").read_text().splitlines()
        ]
        for name in ("vits", "convnext")
    }
    assert [line["step"] for line in logs["convnext"] if line.get("non_finite")] == [0, 1]
    assert not any(line.get("non_finite") for line in logs["vits"])
    assert logs["vits"][0]["loss"] > 0


def test_a_resumed_run_ends_as_the_uninterrupted_one(images, tmp_path):
    overrides = ["schedules.num_steps=4", "run.checkpoint_every=2", "run.keep_checkpoints=9"]
    whole = a_trainer(a_phase(images, *overrides), images, tmp_path / "whole")
    whole.run()
    resumed = a_trainer(a_phase(images, *overrides), images, tmp_path / "resumed")
    assert resumed.resume(tmp_path / "whole" / "step_000000002")
    resumed.run()
    torch.testing.assert_close(resumed.method.tensors(), whole.method.tensors(), rtol=0, atol=0)
    final = {name: torch.zeros_like(one) for name, one in whole.method.tensors().items()}
    load_state(whole.final_state(), final)
    torch.testing.assert_close(final, whole.method.tensors(), rtol=0, atol=0)


def test_rehearsing_changes_nothing(images):
    phase = a_phase(images)
    before = copy_of(phase.tensors())
    phase.rehearse()
    torch.testing.assert_close(phase.tensors(), before, rtol=0, atol=0)


def test_without_teacher_heads_students_follow_its_features(images):
    """Twenty steps bring the mapped features of every student closer to the teacher's."""
    phase = a_phase(
        images,
        "objective=features",
        "schedules.num_steps=20",
        flat("students.vits.schedules.lr", 3e-3),
        flat("students.convnext.schedules.lr", 3e-3),
    )
    assert all(isinstance(method, FeatureMatching) for method in phase.methods.values())
    head = phase.methods["vits"].student.dino_head
    assert (head.in_features, head.out_features) == (16, VIT["embed_dim"])
    losses = [phase.step(batch) for batch in batches(phase, images, 20)]
    for name in phase.methods:
        terms = [outcome[name].numbers["dino_global"] for outcome in losses]
        assert sum(terms[-3:]) < 0.8 * sum(terms[:3])


def test_a_student_that_has_the_teachers_features_costs_nothing(images):
    phase = a_phase(images, "objective=features")
    method = phase.methods["vits"]
    batch = next(iter(batches(phase, images, 1)))
    masks = phase._masks(0)
    (share,), (target,) = phase._shares("vits", batch, masks), phase._targets(batch, masks, 0.07)
    predictions = method.predictions(0, share)
    same = torch.stack([target.cls[0]] * 4)
    perfect = replace(predictions, cls_logits=3 * same, patch_logits=2 * target.patches)
    one_crop = replace(target, cls=torch.stack([target.cls[0]] * 2))
    terms = method.terms(perfect, one_crop, share)
    for value in terms.values():
        assert value.item() == pytest.approx(0, abs=1e-6)
    opposite = replace(predictions, cls_logits=-same, patch_logits=-target.patches)
    terms = method.terms(opposite, one_crop, share)
    assert terms["dino_global"].item() == pytest.approx(2, rel=1e-5)
    masked = share.masks.any(dim=1).float().mean().item()
    assert terms["ibot"].item() == pytest.approx(2 * masked, rel=1e-5)


def test_students_and_their_emas_share_no_tensor(images):
    found = {}
    for name, one in a_phase(images).tensors().items():
        owner = ".".join(name.split(".")[:2])
        found.setdefault(owner, set()).add(one.data_ptr())
    assert len(found) == 2 * len(("student", "ema", "optimizer"))
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_weights_of_local_crops_are_those_of_the_step(images):
    """The schedule that students share reaches each one's loss."""
    with_local, without = (
        a_phase(images, flat("schedules.local_loss_weight", value)) for value in (1.0, 0.0)
    )
    batch = next(iter(batches(with_local, images, 1)))
    full, none = with_local.step(batch), without.step(batch)
    for name, outcome in full.items():
        local = outcome.numbers["dino_local"]
        assert local == none[name].numbers["dino_local"]
        gap = outcome.numbers["loss"] - none[name].numbers["loss"]
        assert gap == pytest.approx(4 / 6 * local, rel=1e-4)
    assert Weights() == Weights(local=1.0, gram=0.0)


def test_a_grid_unlike_the_teachers_is_refused():
    check_grids(a_config(), 8)
    with pytest.raises(
        ConfigError, match=r"students\.vits\.crops\.global_size: the teacher's grid of 2 patches"
    ):
        check_grids(a_config(), 16)
    with pytest.raises(ConfigError, match=r"needs 128 pixels at stride 32, got 160\. Set it"):
        check_grids(a_config("students.convnext.crops.global_size=160"), 8)
    with pytest.raises(ConfigError, match=r"crops\.global_size: not a multiple of the teacher's p"):
        check_grids(a_config(), 12)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.vits.crops.local_size=12", r"students\.vits\.crops\.local_size: must be a mul"),
        ("students.convnext.crops.global_size=100", r"convnext\.crops\.global_size: must be a m"),
        ("students.vits.schedules.lr.warmup_steps=9", r"students\.vits\.schedules\.lr: warm-up"),
        ("losses.koleo_group_size=3", r"losses\.koleo_group_size: must divide the batch of 8"),
        ("objective=logits", r"objective: Input should be 'heads' or 'features'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        a_config(override)


def write_teacher(folder, *, heads, with_heads=True, model=VIT):
    """An artifact of ours, of the given prototypes."""
    network = build_pair(model, heads, 21)[0]
    tensors = network.state_dict()
    parts = ("dino_head.", "ibot_head.")
    content = {"model": model, "heads": heads.model_dump(mode="json")}
    if not with_heads:
        del content["heads"]
    with open_stage("highres_model", folder, config={}) as stage:
        backbone = {
            f"teacher.{name.removeprefix('backbone.')}": one
            for name, one in tensors.items()
            if not name.startswith(parts)
        }
        save_tensors(stage.path("backbone.safetensors"), backbone)
        if with_heads:
            named = {
                f"teacher.{name}": one for name, one in tensors.items() if name.startswith(parts)
            }
            save_tensors(stage.path("heads.safetensors"), named)
        atomic_write(stage.path("config.json"), canonical_json(content))
    return folder


def write_tables(folder, images):
    table = pl.DataFrame({"path": images.paths, "sha256": images.sha256})
    for key, name in (
        ("image_manifest", "manifest.parquet"),
        ("curated_dataset", "curated.parquet"),
    ):
        with open_stage(key, folder / key, config={}) as stage:
            table.with_columns(kept=pl.lit(True)).write_parquet(stage.path(name))
    return {
        "source": f"folder:{images.source.root}",
        "manifest": str(folder / "image_manifest" / "manifest.parquet"),
        "dataset": str(folder / "curated_dataset" / "curated.parquet"),
    }


def opened(folder, images, config, teacher):
    stage = Stage("distilled_students", folder / "output", {})
    arguments = {**write_tables(folder, images), "teacher": str(teacher), "teacher_arch": None}
    return stage, build_distillation(stage, CPU, config=config, arguments=arguments)[1]


def test_the_ema_of_an_artifact_teaches(images, tmp_path):
    config = a_config()
    heads = config.students["vits"].heads
    stage, phase = opened(tmp_path, images, config, write_teacher(tmp_path / "t", heads=heads))
    expected = build_pair(VIT, heads, 21)[0].state_dict()
    torch.testing.assert_close(phase.teacher.state_dict(), expected, rtol=0, atol=0)
    assert {"backbone.safetensors", "heads.safetensors", "config.json"} <= {
        edge.name for edge in stage.edges
    }


@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_students_of_other_prototypes_than_the_teacher_are_refused(images, tmp_path, kind):
    config = a_config(f"students.convnext.heads.{kind}.num_prototypes=32")
    teacher = write_teacher(tmp_path / "t", heads=config.students["vits"].heads)
    message = (
        rf"students\.convnext\.heads\.{kind}\.num_prototypes: must be the teacher's 64, got 32"
    )
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, images, config, teacher)


def test_a_teacher_without_heads_needs_the_objective_of_features(images, tmp_path):
    heads = a_config().students["vits"].heads
    teacher = write_teacher(tmp_path / "t", heads=heads, with_heads=False)
    with pytest.raises(CheckpointError, match=r"without heads, got objective=heads\. Set features"):
        opened(tmp_path, images, a_config(), teacher)
    _, phase = opened(tmp_path, images, a_config("objective=features"), teacher)
    batch = next(iter(batches(phase, images, 1)))
    assert all(outcome.is_finite for outcome in phase.step(batch).values())


def test_a_folder_without_a_backbone_is_no_teacher(images, tmp_path):
    with open_stage("evals", tmp_path / "t", config={}) as stage:
        atomic_write(stage.path("config.json"), canonical_json({"model": VIT}))
    with pytest.raises(CheckpointError, match=r"no backbone\.safetensors there"):
        opened(tmp_path, images, a_config(), tmp_path / "t")
