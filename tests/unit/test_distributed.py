"""Ranks give together what one process gives alone: rows, gradients, students.

One world of three ranks does everything; each test looks at a part of what they found.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dinov3.data.loader import TrainingLoader
from dinov3.distributed import (
    any_rank,
    blocks_of,
    from_first_rank,
    gather_objects,
    gather_rows,
    gather_uneven,
    join_world,
    mean_over_ranks,
    rank,
    rows_of_rank,
    shard,
    split_world,
    whole,
    world_size,
)
from dinov3.errors import ConfigError
from dinov3.losses.koleo import koleo_loss
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.train.build import build_pair
from dinov3.train.distillation import DistillationPhase
from dinov3.train.objective import WholeBatch, koleo_of_crops
from tests.saved_states import CHILDREN
from tests.small_training import VIT, drawn_images

WORLD = 3
CPU = torch.device("cpu")
OVERRIDES = ["batch_size=12", "students.vits.ranks=2", "schedules.num_steps=2"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _collectives():
    here = rank()
    uneven = torch.full((here, 2), float(here))
    index, group = split_world([2, 1])
    return {
        "rows": list(rows_of_rank(6)),
        "refused": _refusal(),
        "uneven": [part.tolist() for part in gather_uneven(uneven)],
        "objects": gather_objects({"rank": here}),
        "first": from_first_rank(f"from {here}"),
        "means": mean_over_ranks({"loss": torch.tensor(float(here)), "two": torch.tensor(2.0)}),
        "any": (any_rank(here == 1), any_rank(False)),
        "group": (index, rank(group), world_size(group), gather_objects(here, group)),
        "group rows": list(rows_of_rank(6, group)),
        "group mean": mean_over_ranks({"loss": torch.tensor(float(here))}, group),
    }


def _refusal():
    try:
        rows_of_rank(4)
    except ConfigError as error:
        return str(error)
    return None


def _gradient_of_a_gathered_loss():
    own = noise(6, 4)[2 * rank() : 2 * rank() + 2].requires_grad_()
    loss = koleo_loss(gather_rows(own))
    loss.backward()
    return loss.item(), own.grad / WORLD  # as FSDP averages


def _gradient_of_micro_batches():
    """Two images in two micro-batches on each rank; weights are shared by all."""
    inputs = noise(2, 6, 5)[:, 2 * rank() : 2 * rank() + 2]
    weights = noise(5, 4, seed=1).requires_grad_()
    features = [part @ weights.detach() for part in inputs.split(1, dim=1)]
    term = WholeBatch(features, lambda rows: koleo_of_crops(rows, None), dim=1)
    for number, part in enumerate(inputs.split(1, dim=1)):
        (term.of(number, part @ weights) / 2).backward()
    dist.all_reduce(weights.grad)
    return weights.grad / WORLD


def _gradient_of_a_sharded_network():
    model = _network()
    shard([model], CPU)
    features = model.forward_features(_images()[2 * rank() : 2 * rank() + 2])
    features["x_norm_clstoken"].square().sum(dim=1).mean().backward()
    return {name: whole(one.grad) for name, one in model.named_parameters() if one.grad is not None}


def _network():
    torch.manual_seed(0)
    return build_backbone(VIT)


def _images():
    return noise(6, 3, 16, 16, seed=4)


def _distilled(images):
    """Outcomes and whole EMA weights of this rank's students after two steps."""
    config = load_recipe("smoke_cpu", OVERRIDES, phase="distill")
    teacher = build_pair(VIT, config.students["vits"].heads, 21)[0]
    phase = DistillationPhase(config, images, CPU, teacher=teacher, teacher_patch=8)
    loader = TrainingLoader(
        images,
        augmentation=phase.pipeline,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=0,
        num_steps=2,
        num_workers=0,
        rows=phase.rows,
    )
    losses = [
        {name: outcome.numbers for name, outcome in phase.step(batch).items()} for batch in loader
    ]
    weights = {
        learner.name: {name: whole(one) for name, one in learner.ema.state_dict().items()}
        for learner in phase.learners
    }
    return {"losses": losses, "weights": weights, "rows": phase.rows}


def _work(here, folder, images):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "world"), WORLD)
    dist.init_process_group("gloo", store=store, rank=here, world_size=WORLD)
    found = {
        "collectives": _collectives(),
        "gathered": _gradient_of_a_gathered_loss(),
        "micro": _gradient_of_micro_batches(),
        "sharded": _gradient_of_a_sharded_network(),
        "distilled": _distilled(images),
    }
    torch.save(found, folder / f"{here}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def found(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("world")
    children = [
        CHILDREN.Process(target=_work, args=(here, folder, images)) for here in range(WORLD)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * WORLD
    return [torch.load(folder / f"{here}.pt", weights_only=False) for here in range(WORLD)]


def collected(found, name):
    return [one["collectives"][name] for one in found]


def test_every_rank_has_its_share_of_the_rows(found):
    assert collected(found, "rows") == [[0, 1], [2, 3], [4, 5]]
    message = "batch_size: 3 ranks do not divide it, got 4. Use a multiple."
    assert collected(found, "refused") == [message] * WORLD


def test_values_of_all_ranks_come_in_their_order(found):
    assert collected(found, "objects") == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * WORLD
    assert collected(found, "first") == ["from 0"] * WORLD
    assert collected(found, "means") == [{"loss": 1.0, "two": 2.0}] * WORLD
    assert collected(found, "any") == [(True, False)] * WORLD


def test_ranks_may_hold_different_numbers_of_rows(found):
    expected = [[], [[1.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    assert collected(found, "uneven") == [expected] * WORLD


def test_groups_are_worlds_of_their_own(found):
    assert collected(found, "group") == [(0, 0, 2, [0, 1]), (0, 1, 2, [0, 1]), (1, 0, 1, [2])]
    assert collected(found, "group rows") == [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [one["loss"] for one in collected(found, "group mean")] == [0.5, 0.5, 2.0]


def test_a_loss_over_gathered_rows_has_the_gradient_of_the_whole_batch(found):
    rows = noise(6, 4).requires_grad_()
    loss = koleo_loss(rows)
    loss.backward()
    assert [one["gathered"][0] for one in found] == pytest.approx([loss.item()] * WORLD)
    torch.testing.assert_close(torch.cat([one["gathered"][1] for one in found]), rows.grad)


def test_koleo_over_ranks_and_micro_batches_has_the_gradient_of_the_whole_batch(found):
    weights = noise(5, 4, seed=1).requires_grad_()
    koleo_of_crops(noise(2, 6, 5) @ weights, None).backward()
    for one in found:
        torch.testing.assert_close(one["micro"], weights.grad)


def test_a_sharded_network_has_the_gradient_of_the_whole_batch(found):
    model = _network()
    features = model.forward_features(_images())
    features["x_norm_clstoken"].square().sum(dim=1).mean().backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for one in found:
        torch.testing.assert_close(one["sharded"], expected, rtol=1e-4, atol=1e-6)


def test_groups_of_ranks_train_the_students_that_one_process_trains(found, images):
    """Two ranks share one student, the third has the other; the teacher is shared by all."""
    expected = _distilled(images)
    names = [set(one["distilled"]["weights"]) for one in found]
    assert names == [{"vits"}, {"vits"}, {"convnext"}]
    assert [one["distilled"]["rows"] for one in found] == [range(6), range(6, 12), range(12)]
    for one in found:
        for name, weights in one["distilled"]["weights"].items():
            for step, losses in enumerate(expected["losses"]):
                assert one["distilled"]["losses"][step][name] == pytest.approx(
                    losses[name], rel=1e-3, abs=1e-5
                )
            torch.testing.assert_close(weights, expected["weights"][name], rtol=1e-3, atol=1e-4)


def test_a_process_without_a_group_is_a_world_of_one():
    rows = noise(3, 2)
    assert (rank(), world_size(), list(rows_of_rank(3))) == (0, 1, [0, 1, 2])
    assert gather_rows(rows) is rows
    assert gather_uneven(rows)[0] is rows
    assert gather_objects("a") == ["a"]
    assert from_first_rank("a") == "a"
    assert (any_rank(True), any_rank(False)) == (True, False)
    assert mean_over_ranks({"x": torch.tensor(2.0)}) == {"x": 2.0}
    model = nn.Linear(2, 2)
    shard([model], CPU)
    assert type(model.weight) is nn.Parameter


def test_a_process_that_nobody_launched_joins_no_world_unless_it_must(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with join_world(CPU):
        assert not dist.is_initialized()
    with join_world(CPU, alone=True):
        assert (dist.is_initialized(), world_size()) == (True, 1)
        assert list(rows_of_rank(3)) == [0, 1, 2]
    assert not dist.is_initialized()


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "999")
    refused = pytest.raises(ConfigError, match=r"run\.processes: rank 999 of this machine needs a")
    with refused, join_world(torch.device("cuda")):
        pass


def test_a_world_is_left_when_its_work_fails(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with contextlib.suppress(ConfigError), join_world(CPU, alone=True):
        raise ConfigError("seed: odd, got 1. Change it.")
    assert not dist.is_initialized()


def test_blocks_of_both_families_are_found():
    fields = {
        "arch": "convnext",
        "depths": (1, 2, 3, 1),
        "dims": (8, 8, 16, 16),
        "layerscale": 0.1,
        "drop_path": 0.0,
        "patch_size": None,
    }
    assert len(blocks_of(build_backbone(VIT))) == 2
    assert len(blocks_of(build_backbone(fields))) == 7
    assert blocks_of(nn.Linear(1, 1)) == []
