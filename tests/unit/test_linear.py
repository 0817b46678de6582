"""Linear probe: against torch SGD, the choice, oracle and negative control."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3.errors import DataError
from dinov3.evals.linear import LinearGrid, linear_scores
from dinov3.evals.metrics import bootstrap_interval, top_hits

GRID = LinearGrid((1e-3, 8.0), num_steps=150, batch_size=32, val_fraction=0.1)


def _halves():
    generator = np.random.default_rng(0)
    train, test = np.arange(120) % 4, np.arange(1000) % 4
    features = [
        np.eye(4)[half] + 0.05 * generator.standard_normal((len(half), 4)) for half in (train, test)
    ]
    return train, test, *features


def _score(features, train, queries, **changes):
    settings = {"num_classes": 4, "grid": GRID, "seed": 0} | changes
    return linear_scores(features, train, queries, **settings)


def test_oracle_features_score_one():
    train, test, features, queries = _halves()
    found = _score(features, train, queries)
    assert top_hits(found.scores, test).mean() == 1.0
    assert found.val_accuracy == 1.0


@pytest.mark.parametrize("shuffled", ["labels", "features"])
def test_negative_control_scores_chance(shuffled):
    train, test, features, queries = _halves()
    generator = np.random.default_rng(2)
    if shuffled == "labels":
        train, test = generator.permutation(train), generator.permutation(test)
    else:
        features, queries = (
            generator.standard_normal((120, 4)),
            generator.standard_normal((1000, 4)),
        )
    interval = bootstrap_interval(top_hits(_score(features, train, queries).scores, test), 500, 0)
    assert interval.low <= 0.25 <= interval.high


def test_a_useless_rate_is_not_chosen():
    train, _, features, queries = _halves()
    found = _score(features, train, queries, grid=replace(GRID, learning_rates=(1e-9, 8.0)))
    assert found.chosen_lr == 8.0


def test_the_test_pictures_do_not_take_part_in_the_choice():
    train, _, features, queries = _halves()
    one, other = (_score(features, train, queries * sign) for sign in (1, -1))
    assert (one.chosen_lr, one.val_accuracy) == (other.chosen_lr, other.val_accuracy)


def test_training_equals_torch_sgd_with_cosine():
    from dinov3.evals.linear import _Order, _train

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    labels = torch.arange(50) % 3
    rates = torch.tensor([0.1, 0.4])
    order = _Order(num_steps=20, batch_size=16, seed=7)
    weight, bias = _train(features, labels, 3, rates, order)
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(7)) * 0.01
    for head, rate in enumerate(rates):
        layer = torch.nn.Linear(6, 3)
        with torch.no_grad():
            layer.weight.copy_(start.T)
            layer.bias.zero_()
        sgd = torch.optim.SGD(layer.parameters(), lr=float(rate), momentum=0.9)
        for step, batch in enumerate(order.batches(50)):
            for group in sgd.param_groups:
                group["lr"] = float(rate) * 0.5 * (1 + math.cos(math.pi * step / 20))
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch]).backward()
            sgd.step()
        torch.testing.assert_close(weight[head], layer.weight.T.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bias[head, 0], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_every_pass_sees_every_picture_once():
    from dinov3.evals.linear import _Order

    seen = torch.cat(list(_Order(num_steps=6, batch_size=10, seed=0).batches(20)))
    assert seen[:20].sort().values.tolist() == list(range(20))
    assert torch.bincount(seen).tolist() == [3] * 20


def test_the_same_seed_gives_the_same_scores():
    train, _, features, queries = _halves()
    np.testing.assert_array_equal(
        _score(features, train, queries).scores, _score(features, train, queries).scores
    )
    assert (
        _score(features, train, queries).scores != _score(features, train, queries, seed=1).scores
    ).any()


def test_no_class_of_two_pictures_is_refused():
    with pytest.raises(DataError, match="needs a class of two pictures"):
        _score(np.eye(3), np.arange(3), np.eye(3))
