"""One step of a learner: what is not finite changes nothing, bit by bit."""

import math

import pytest
import torch

from dinov3.train.schedules import Schedule
from tests.small_training import a_learner, constant, copy_of


def learner_with_gradients(value=0.01, **values):
    """A learner that has taken a step, so that its moments are not zero."""
    learner = a_learner(**values)
    give_gradients(learner, value)
    assert learner.update(0, {"loss": 1.0}).is_finite
    give_gradients(learner, value)
    return learner


def give_gradients(learner, value):
    for number, parameter in enumerate(learner.student.parameters()):
        parameter.grad = torch.full_like(parameter, value * (1 + number % 3))


def assert_unchanged(learner, before):
    torch.testing.assert_close(learner.tensors(), before, rtol=0, atol=0, equal_nan=True)


def a_gradient(learner):
    return learner.student.dino_head.last_layer.weight.grad


def test_a_finite_step_moves_weights_ema_and_moments():
    learner = learner_with_gradients()
    before = copy_of(learner.tensors())
    outcome = learner.update(1, {"loss": 1.0})
    assert outcome.is_finite
    same = {name for name, one in learner.tensors().items() if torch.equal(one, before[name])}
    assert not {name for name in same if not name.endswith(("periods", "bias_mask"))}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(value):
    learner = learner_with_gradients()
    before = copy_of(learner.tensors())
    outcome = learner.update(1, {"ibot": value, "dino": 1.0, "loss": math.nan})
    assert outcome.bad == ("ibot", "loss")
    assert not outcome.is_finite
    assert_unchanged(learner, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    """The losses are; only its own part is named."""
    learner = learner_with_gradients()
    a_gradient(learner)[0, 0] = value
    before = copy_of(learner.tensors())
    outcome = learner.update(1, {"loss": 1.0})
    assert outcome.bad == ("gradient_norm/dino_head",)
    assert_unchanged(learner, before)


def test_losses_are_judged_before_gradients_are_touched():
    learner = learner_with_gradients()
    a_gradient(learner)[0, 0] = math.nan
    outcome = learner.update(1, {"loss": math.nan})
    assert outcome.bad == ("loss",)
    assert not any(name.startswith("gradient_norm") for name in outcome.numbers)


def test_gradients_of_a_bad_step_are_used_up():
    learner = learner_with_gradients()
    learner.update(1, {"loss": math.nan})
    assert all(parameter.grad is None for parameter in learner.student.parameters())


def test_a_bad_step_leaves_no_trace_in_the_next_one():
    """The run with it ends where the run without it does."""
    one, other = learner_with_gradients(), learner_with_gradients()
    one.update(1, {"loss": math.nan})
    give_gradients(one, 0.01)
    for learner in (one, other):
        learner.update(1, {"loss": 1.0})
    assert_unchanged(one, other.tensors())


def test_bad_steps_in_a_row_are_counted():
    learner = a_learner()
    counts = []
    for step, loss in enumerate([math.nan, math.inf, 1.0, math.nan]):
        give_gradients(learner, 0.01)
        learner.update(step, {"loss": loss})
        counts.append(learner.bad_steps)
    assert counts == [1, 2, 0, 1]


def test_numbers_hold_losses_norms_and_schedules():
    learner = learner_with_gradients()
    numbers = learner.update(7, {"loss": 1.0}).numbers
    assert numbers["loss"] == 1.0
    assert numbers["schedule/lr"] == learner.schedules["lr"](7)
    head = learner.student.dino_head
    expected = math.sqrt(
        sum(
            (0.01 * (1 + number % 3)) ** 2 * parameter.numel()
            for number, parameter in enumerate(learner.student.parameters())
            if any(parameter is one for one in head.parameters())
        )
    )
    assert numbers["gradient_norm/dino_head"] == pytest.approx(expected, rel=1e-5)


def test_each_part_is_clipped_by_itself():
    """A huge gradient of one head takes nothing from the other parts' steps."""
    learner = a_learner()
    give_gradients(learner, 1e-4)
    for parameter in learner.student.dino_head.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    learner.update(0, {"loss": 1.0})
    state = learner.optimizer.state
    kept = state[learner.student.ibot_head.last_layer.weight]["exp_avg"]
    assert kept.abs().min() > 0.99e-5  # (1 - .9) times the gradient, unclipped
    clipped = sum(
        (state[one]["exp_avg"] / 0.1).square().sum()
        for one in learner.student.dino_head.parameters()
    )
    assert clipped.sqrt().item() == pytest.approx(learner.clip, rel=1e-3)


def test_the_ema_follows_with_the_scheduled_momentum():
    learner = learner_with_gradients(momentum=0.75)
    before = copy_of(learner.ema.state_dict())
    learner.update(1, {"loss": 1.0})
    expected = {
        name: 0.75 * before[name] + 0.25 * one if one.requires_grad else one
        for name, one in learner.student.named_parameters()
    }
    found = dict(learner.ema.named_parameters())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_prototypes_rest_while_their_learning_rate_is_zero():
    learner = a_learner(weight_decay=0.0)
    learner.schedules = {
        **learner.schedules,
        "last_layer_lr": Schedule(1e-3, 1e-3, 1e-3, 0, 10, cosine_steps=0, freeze_steps=2),
    }
    prototypes = learner.student.ibot_head.last_layer.weight
    moved = []
    for step in range(3):
        before = prototypes.detach().clone()
        give_gradients(learner, 0.01)
        learner.update(step, {"loss": 1.0})
        moved.append(not torch.equal(prototypes, before))
    assert moved == [False, False, True]


def test_every_tensor_of_a_run_exists_before_the_first_step():
    """A state can be loaded into a run that has not begun."""
    learner = a_learner(name="small")
    names = learner.tensors().keys()
    give_gradients(learner, 0.01)
    learner.update(0, {"loss": 1.0})
    assert learner.tensors().keys() == names
    assert all(name.startswith("small.") for name in names)
    assert {name.split(".")[1] for name in names} == {"student", "ema", "optimizer"}


def test_a_learner_continues_from_its_tensors_and_facts():
    one, other = learner_with_gradients(), a_learner(seed=1)
    one.update(1, {"loss": math.nan})
    one.health = {"rankme": 3.0}
    for name, tensor in other.tensors().items():
        tensor.data.copy_(one.tensors()[name])
    other.restore(one.facts())
    assert (other.bad_steps, other.health) == (1, {"rankme": 3.0})
    for learner in (one, other):
        give_gradients(learner, 0.02)
        learner.update(2, {"loss": 1.0})
    assert_unchanged(other, one.tensors())


def test_a_learner_without_ema_and_clip_still_steps():
    learner = a_learner()
    learner.ema, learner.clip = None, None
    before = copy_of(learner.student.state_dict())
    give_gradients(learner, 100.0)
    assert learner.update(0, {"loss": 1.0}).is_finite
    weight = "dino_head.last_layer.weight"
    assert not torch.equal(learner.student.state_dict()[weight], before[weight])
    assert not any(name.startswith("ema.") for name in learner.tensors())


def test_schedules_are_functions_of_the_step():
    learner = a_learner()
    learner.schedules = {"lr": Schedule(0.0, 1.0, 1.0, 4, 8, cosine_steps=0), "x": constant(3.0)}
    assert learner.at(2) == {"lr": 0.5, "x": 3.0}
