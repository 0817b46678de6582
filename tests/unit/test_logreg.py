"""Logistic regression: the choice, the validation part, oracle and negative control."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dinov3.errors import DataError
from dinov3.evals.logreg import LogregGrid, logreg_scores, validation_part
from dinov3.evals.metrics import bootstrap_interval, top_hits

GRID = LogregGrid((-2.0, 2.0), 5, max_iter=200, tolerance=1e-6, val_fraction=0.1)


def _halves(num_train=120, num_test=1000, num_classes=4):
    generator = np.random.default_rng(0)
    train = np.arange(num_train) % num_classes
    test = np.arange(num_test) % num_classes
    features = [
        np.eye(4)[half] + 0.05 * generator.standard_normal((len(half), 4)) for half in (train, test)
    ]
    return train, test, *features


def _score(features, train, queries, **changes):
    settings = {"num_classes": 4, "grid": GRID, "seed": 0} | changes
    return logreg_scores(features, train, queries, **settings)


def test_oracle_features_score_one():
    train, test, features, queries = _halves()
    found = _score(features, train, queries)
    assert top_hits(found.scores, test).mean() == 1.0
    assert found.val_accuracy == 1.0
    assert found.converged


@pytest.mark.parametrize("shuffled", ["labels", "features"])
def test_negative_control_scores_chance(shuffled):
    train, test, features, queries = _halves()
    generator = np.random.default_rng(3)
    if shuffled == "labels":
        train, test = generator.permutation(train), generator.permutation(test)
    else:
        features, queries = (
            generator.standard_normal((120, 4)),
            generator.standard_normal((1000, 4)),
        )
    interval = bootstrap_interval(top_hits(_score(features, train, queries).scores, test), 500, 0)
    assert interval.low <= 0.25 <= interval.high


def test_the_test_pictures_do_not_take_part_in_the_choice():
    train, _, features, queries = _halves()
    one = _score(features, train, queries)
    other = _score(features, train, -5 * queries)
    assert (one.chosen_c, one.val_accuracy) == (other.chosen_c, other.val_accuracy)


def test_the_chosen_strength_is_the_best_on_the_validation_part():
    generator = np.random.default_rng(3)
    labels = np.arange(60) % 2
    features = generator.standard_normal((60, 40))
    features[:, 0] += labels  # one telling direction among noise: too weak a penalty overfits
    found = _score(features, labels, features, num_classes=2)
    held = validation_part(labels, GRID.val_fraction, 0)
    merits = {}
    for c in np.logspace(*GRID.log10_c, GRID.num_c):
        model = LogisticRegression(C=c, max_iter=200, tol=1e-6)
        model.fit(features[~held], labels[~held])
        loss = log_loss(labels[held], model.predict_proba(features[held]))
        merits[float(c)] = (model.score(features[held], labels[held]), -loss)
    assert len(set(merits.values())) == GRID.num_c
    assert found.chosen_c == max(merits, key=merits.__getitem__)
    assert found.val_accuracy == max(merits.values())[0]


def test_validation_takes_a_part_of_each_class_and_never_its_only_picture():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    held = validation_part(labels, 0.1, seed=0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [5, 1, 1, 0]
    assert (held != validation_part(labels, 0.1, seed=1)).any()


def test_a_class_without_training_pictures_scores_zero():
    train, _, features, queries = _halves()
    seen = train != 2
    found = _score(features[seen], train[seen], queries)
    assert (found.scores[:, 2] == 0).all()
    np.testing.assert_allclose(found.scores.sum(1), 1)


def test_a_fit_that_does_not_converge_says_so_and_still_scores():
    train, test, features, queries = _halves()
    grid = LogregGrid((6.0, 6.0), 1, max_iter=2, tolerance=1e-12, val_fraction=0.1)
    found = _score(features, train, queries, grid=grid)
    assert not found.converged
    assert top_hits(found.scores, test).mean() > 0.9


def test_one_class_is_refused():
    with pytest.raises(DataError, match="needs two classes"):
        _score(np.ones((4, 2)), np.zeros(4, dtype=int), np.ones((2, 2)), num_classes=1)
