"""Self-distillation as a recipe asks for it, in this process, on drawn pictures."""

import json
from dataclasses import replace

import pytest
import torch

from dinov3.config import CropsConfig, GramConfig
from dinov3.data.loader import TrainingLoader
from dinov3.errors import ConfigError, TrainingDiverged
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.state import load_state, state_path
from dinov3.train.build import build_pair, micro_batches
from dinov3.train.phases import check_inputs
from dinov3.train.self_distillation import SelfDistillationPhase
from dinov3.train.trainer import Course, Trainer
from tests.small_training import copy_of, drawn_images

CPU = torch.device("cpu")
SLOW_EMA = "schedules.momentum={start: 0.9, peak: 0.9, end: 0.9}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn_images(tmp_path_factory.mktemp("images"), 12)


def flat(name, value):
    return f"{name}={{start: {value}, peak: {value}, end: {value}, warmup_steps: 0}}"


def a_phase(images, *overrides, phase="gram"):
    """With the EMA's own first weights as Gram teacher, where the recipe has one of its own."""
    config = load_recipe("smoke_cpu", list(overrides), phase=phase)
    networks = build_pair(config.model.model_dump(), config.heads, config.seed)
    backbone = None
    if config.gram is not None and config.gram.teacher != "ema":
        backbone = build_backbone(config.model.model_dump())
        backbone.load_state_dict(networks[1].backbone.state_dict())
    return SelfDistillationPhase(config, images, CPU, networks=networks, gram_backbone=backbone)


def batches(phase, images, num_steps, start_step=0):
    config = phase.config
    return TrainingLoader(
        images,
        augmentation=phase.pipeline,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_steps=num_steps,
        num_workers=0,
        rows=phase.rows,
    )


def outcomes_of(phase, images, num_steps):
    return [phase.step(batch)[""] for batch in batches(phase, images, num_steps)]


def a_trainer(phase, images, folder, num_steps):
    config = phase.config
    course = Course(
        seed=config.seed,
        num_steps=num_steps,
        batch_size=config.optim.batch_size,
        run=config.run,
        policy=config.health,
        snapshot_steps=config.snapshot_steps,
    )
    return Trainer(phase, images, folder, course)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gram_term_keeps_patches_a_tenth_closer_to_the_teacher(images, seed):
    """Twenty steps with and without it, all else equal; measured on pictures seen whole."""

    def distance_after(weight):
        phase = a_phase(
            images,
            "init=random",
            "crops.gram_size=null",
            "gram.refresh=null",
            "schedules.num_steps=20",
            f"seed={seed}",
            flat("schedules.lr", 1e-3),
            SLOW_EMA,
            flat("gram.weight", weight),
        )
        outcomes_of(phase, images, 20)
        return phase.measure(phase.learner)["gram_distance"]

    without = distance_after(0.0)
    assert without > 1e-4
    assert distance_after(2.0) < 0.9 * without


def test_a_larger_view_anchors_the_students_own_crops(images):
    """The term itself, against the teacher's crops of twice the side, ends lower than without."""

    def last_terms(weight):
        phase = a_phase(
            images,
            "gram.refresh=null",
            "schedules.num_steps=20",
            flat("schedules.lr", 1e-3),
            flat("gram.weight", weight),
        )
        values = [one.numbers["gram"] for one in outcomes_of(phase, images, 20)]
        return sum(values[-5:])

    assert last_terms(2.0) < 0.9 * last_terms(0.0)


def test_the_gram_term_changes_no_other_loss_of_the_first_step(images):
    numbers = {
        weight: outcomes_of(a_phase(images, flat("gram.weight", weight)), images, 1)[0].numbers
        for weight in (0.0, 2.0)
    }
    bare = outcomes_of(a_phase(images, "gram=null", "crops.gram_size=null"), images, 1)[0].numbers
    for name in ("dino_global", "dino_local", "ibot", "koleo"):
        assert numbers[0.0][name] == numbers[2.0][name] == bare[name]
    assert numbers[2.0]["loss"] > numbers[0.0]["loss"] == pytest.approx(bare["loss"])


def test_a_run_refreshes_its_gram_teacher_when_the_recipe_says(images):
    """First after 2 steps, then every 2, once at most; the state knows how often."""
    phase = a_phase(images, "schedules.num_steps=5", flat("schedules.lr", 1e-3), SLOW_EMA)
    teacher, seen = phase.method.gram.backbone, []
    for batch in batches(phase, images, 5):
        phase.step(batch)
        ema = phase.method.teacher.backbone
        seen.append(torch.equal(teacher.cls_token, ema.cls_token))
    assert seen == [False, True, False, False, False]
    assert phase.facts()["gram_updates"] == 1


def test_a_resumed_run_goes_on_with_gram_teacher_and_sizes(images, tmp_path):
    """High resolution: a mixture of sizes, a Gram teacher that was refreshed before the stop."""
    overrides = [
        "schedules.num_steps=6",
        "gram.refresh={first: 2, every: 1, max_updates: 3}",
        "run.checkpoint_every=3",
        "run.keep_checkpoints=9",
        SLOW_EMA,
    ]

    def a_highres_phase():
        return a_phase(images, *overrides, phase="highres")

    whole = a_trainer(a_highres_phase(), images, tmp_path / "whole", 6)
    whole.run()
    state = tmp_path / "whole" / "step_000000003"
    resumed = a_trainer(a_highres_phase(), images, tmp_path / "resumed", 6)
    assert resumed.resume(state)
    assert resumed.method.facts()["gram_updates"] == 2
    resumed.run()
    assert resumed.step == 6
    expected = whole.method.tensors()
    torch.testing.assert_close(resumed.method.tensors(), expected, rtol=0, atol=0)
    assert any(name.startswith("gram_teacher.") for name in expected)
    assert resumed.method.facts()["gram_updates"] == whole.method.facts()["gram_updates"] == 3


def test_micro_batches_change_only_the_last_bits(images):
    overrides = [
        "schedules.num_steps=3",
        "losses.koleo_group_size=null",
        flat("schedules.lr", 1e-3),
    ]
    one = a_phase(images, *overrides)
    parted = a_phase(images, *overrides, "run.micro_batches=4")
    expected, found = (outcomes_of(phase, images, 3) for phase in (one, parted))
    assert len(parted.parts) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.numbers == pytest.approx(theirs.numbers, rel=1e-4)


def test_every_image_of_a_batch_keeps_its_own_masks_and_views(images):
    """Micro-batches are the shares of the whole batch, cut by images."""
    whole, parted = a_phase(images), a_phase(images, "run.micro_batches=2")
    batch = next(iter(batches(whole, images, 1)))
    (share,), parts = whole.shares(batch), parted.shares(batch)
    assert [part.position for part in parts] == [0, 4]
    for name in ("global_crops", "local_crops", "masks", "gram_crops"):
        by_crop = getattr(share, name).unflatten(0, (-1, 8))
        joined = torch.cat([getattr(part, name).unflatten(0, (-1, 4)) for part in parts], dim=1)
        torch.testing.assert_close(joined, by_crop)
    assert share.gram_crops.shape == (16, 3, 64, 64)


def test_snapshots_are_the_emas_backbone(images, tmp_path):
    phase = a_phase(images, "schedules.num_steps=3", "snapshots.steps=[2]", phase="pretrain")
    seen = {}
    step = phase.step

    def remember(batch):
        outcome = step(batch)
        seen[batch.step + 1] = copy_of(phase.method.teacher.backbone.state_dict())
        return outcome

    phase.step = remember
    a_trainer(phase, images, tmp_path, 3).run()
    found = {name: torch.empty_like(one) for name, one in seen[2].items()}
    load_state(tmp_path / "snapshots" / "step_000000002", found)
    torch.testing.assert_close(found, seen[2], rtol=0, atol=0)


def poison(phase):
    with torch.no_grad():
        phase.learner.student.backbone.cls_token.fill_(float("nan"))


def test_a_run_ends_at_the_first_step_that_is_not_finite_and_updates_nothing(images, tmp_path):
    phase = a_phase(images, phase="pretrain")
    poison(phase)
    before = copy_of(phase.tensors())
    with pytest.raises(TrainingDiverged, match=r"step 0: non-finite .*; nothing of it was updated"):
        a_trainer(phase, images, tmp_path, 3).run()
    torch.testing.assert_close(phase.tensors(), before, rtol=0, atol=0, equal_nan=True)
    assert lines_of(tmp_path)[0]["non_finite"] == 1.0


def test_a_recipe_may_pass_over_steps_that_are_not_finite(images, tmp_path):
    """As many in a row as it allows, and every one is in the log."""
    overrides = ["health.non_finite=skip", "health.max_consecutive_non_finite=3"]
    phase = a_phase(images, *overrides, phase="pretrain")
    poison(phase)
    with pytest.raises(TrainingDiverged, match="step 2: non-finite"):
        a_trainer(phase, images, tmp_path, 5).run()
    bad = [line["step"] for line in lines_of(tmp_path) if line.get("non_finite")]
    assert bad == [0, 1, 2]


def test_a_collapsed_run_is_refused_again_however_often_it_is_started(images, tmp_path):
    """Also where it collapsed at the last step, after which nothing would be left to judge."""
    overrides = ("health.after_step=0", "health.min_participation_ratio=1000")
    message = "training collapsed at step 1: participation_ratio"
    with pytest.raises(TrainingDiverged, match=message):
        a_trainer(a_phase(images, *overrides), images, tmp_path, 1).run()
    again = a_trainer(a_phase(images, *overrides), images, tmp_path, 1)
    assert again.resume()
    with pytest.raises(TrainingDiverged, match=message):
        again.run()


def test_a_snapshot_is_on_disk_before_the_state_of_its_step(images, tmp_path):
    """A run resumed from that state would never make it again."""

    class Watched(Trainer):
        seen = ()

        def save(self, logs, writer, *, wait=False):
            self.seen = (*self.seen, state_path(tmp_path / "snapshots", self.step).is_dir())
            super().save(logs, writer, wait=wait)

    phase = a_phase(images, "snapshots={steps: [1]}", "run.checkpoint_every=1", phase="pretrain")
    course = a_trainer(phase, images, tmp_path, 2).course
    watched = Watched(phase, images, tmp_path, replace(course, snapshot_steps=(1, 2)))
    watched.run()
    assert watched.seen == (True, True)


def test_the_distance_to_a_gram_teacher_that_is_still_to_come_is_not_measured(images):
    phase = a_phase(images, "gram.teacher=ema@1", "crops.gram_size=null")
    outcomes_of(phase, images, 1)
    assert "gram_distance" not in phase.measure(phase.learner)
    for batch in batches(phase, images, 1, start_step=1):
        phase.step(batch)
    assert "gram_distance" in phase.measure(phase.learner)


def test_rehearsing_changes_nothing(images):
    phase = a_phase(images, phase="highres")
    before = copy_of(phase.tensors())
    phase.rehearse()
    torch.testing.assert_close(phase.tensors(), before, rtol=0, atol=0)
    assert all(one.grad is None for one in phase.learner.student.parameters())


def test_student_and_ema_begin_equal_and_drawn_from_the_seed(images):
    first, second = a_phase(images, phase="pretrain"), a_phase(images, phase="pretrain")
    other = a_phase(images, "seed=1", phase="pretrain")
    student, ema = first.learner.student.state_dict(), first.learner.ema.state_dict()
    torch.testing.assert_close(student, ema, rtol=0, atol=0)
    torch.testing.assert_close(second.learner.student.state_dict(), student, rtol=0, atol=0)
    token = "backbone.cls_token"
    assert not torch.equal(other.learner.student.state_dict()[token], student[token])


CONTRADICTIONS = [
    ("gram", ["gram.teacher=student"], r"gram\.teacher: must be checkpoint, ema or ema@STEP"),
    (
        "gram",
        ["gram.teacher=ema@5"],
        r"gram\.teacher: the run ends before its EMA is copied, got ema@5 for 5 steps",
    ),
    ("gram", ["gram.teacher=ema@"], r"gram\.teacher: must be .* got 'ema@'"),
    ("gram", ["gram.teacher=ema@-1"], r"gram\.teacher: must be .* got 'ema@-1'"),
    ("gram", ["gram.teacher=ema", "crops.gram_size=null"], r"gram\.refresh: the living EMA"),
    ("gram", ["gram.tokens=masked"], r"gram\.tokens: masked patches differ .* image_level=true"),
    ("gram", ["gram.tokens=unmasked"], r"gram\.tokens: unmasked patches differ"),
    ("gram", ["gram.resize=nearest", "gram.antialias=true"], r"gram\.antialias: needs bicubic"),
    ("gram", ["gram.remove=positives"], r"gram\.remove: Input should be 'none', 'negatives'"),
    ("gram", ["gram.refresh.first=0"], r"gram\.refresh\.first: .* equal to 1, got 0"),
    ("gram", ["gram.refresh.max_updates=0"], r"gram\.refresh\.max_updates: "),
    ("gram", ["gram.weight.warmup_steps=9"], r"gram\.weight: warm-up and cosine take 9 steps"),
    ("gram", ["gram=null"], r"crops\.gram_size: there is no Gram teacher, got 64"),
    ("gram", ["gram.teacher=ema", "gram.refresh=null"], r"crops\.gram_size: the living EMA sees"),
    ("gram", ["crops.gram_size=60"], r"crops\.gram_size: not a multiple of patch size 8, got 60"),
    (
        "gram",
        ["crops.gram_distortions=true", "crops.gram_size=24"],
        r"crops\.gram_size: distorted crops .* got 24 below 32",
    ),
    ("pretrain", ["crops.global_size=[32, 48]"], r"crops\.global_size: a list needs one entry"),
    ("highres", ["crops.local_size=[16]"], r"crops\.local_size: a list needs one entry per entry"),
    ("highres", ["crops.gram_size=[64, 64, 64]"], r"crops\.gram_size: a list needs one entry"),
    ("highres", ["crops.probabilities=[0.5, 0.4]"], r"crops\.probabilities: must sum to 1"),
    ("highres", ["crops.probabilities=[0.0, 1.0]"], r"crops\.probabilities\.0: .*greater than 0"),
    ("highres", ["crops.global_size=[32, 50]"], r"crops\.global_size: not a multiple .* got 50"),
    ("pretrain", ["losses.koleo_group_size=3"], r"koleo_group_size: must divide the batch of 8"),
    ("pretrain", ["model.num_heads=3"], r"model\.embed_dim: not a multiple of 4 x 3 heads"),
    ("pretrain", ["init=other"], r"init: Input should be 'random', 'continue' or 'teacher'"),
]


@pytest.mark.parametrize(("phase", "overrides", "message"), CONTRADICTIONS)
def test_a_recipe_that_contradicts_itself_is_one_sentence(phase, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("smoke_cpu", overrides, phase=phase)
    text = str(caught.value)
    assert "got" in text
    assert ";" not in text
    assert text.endswith(".")


def test_a_mixture_and_its_gram_teacher_may_differ_in_size():
    """Only distorted crops must not be enlarged on their way to the student's grid."""
    sizes = load_recipe("smoke_cpu", ["crops.gram_size=[24, 64]"], phase="highres").crops
    assert isinstance(sizes, CropsConfig)
    assert [one.gram_size for one in sizes.resolutions] == [24, 64]


def test_ema_at_a_step_names_the_step():
    config = load_recipe("smoke_cpu", ["gram.teacher=ema@3"], phase="gram").gram
    assert isinstance(config, GramConfig)
    assert config.copy_step == 3
    assert load_recipe("smoke_cpu", phase="gram").gram.copy_step is None


@pytest.mark.parametrize(
    ("overrides", "init_from", "gram_teacher", "message"),
    [
        ([], None, "t", "init: random starts without an artifact and the others need one"),
        (["init=random"], "a", "t", "got init=random and --init-from a"),
        ([], "a", None, r"gram\.teacher: checkpoint and --gram-teacher belong together"),
        (["gram.teacher=ema@2"], "a", "t", "belong together, got ema@2 and t"),
    ],
)
def test_artifacts_that_the_recipe_does_not_ask_for_are_refused(
    tmp_path, overrides, init_from, gram_teacher, message
):
    config = load_recipe("smoke_cpu", overrides, phase="gram")
    with pytest.raises(ConfigError, match=message):
        check_inputs(config, init_from, gram_teacher)


@pytest.mark.parametrize("count", [3, 5, 16])
def test_micro_batches_must_divide_the_rows_of_a_rank(count):
    with pytest.raises(ConfigError, match=rf"must divide the 8 rows of a rank, got {count}"):
        micro_batches(range(8), count)


def test_micro_batches_are_rows_one_after_the_other():
    assert micro_batches(range(8, 16), 2) == [range(4), range(4, 8)]
