"""k-NN: votes, leave-one-out, oracle and negative control."""

import numpy as np
import pytest

from dinov3.errors import DataError
from dinov3.evals.knn import clip_ks, knn_scores, leave_one_out_knn, nearest
from dinov3.evals.metrics import bootstrap_interval, top_hits

NUM_CLASSES = 5


def _labels(num, seed):
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, num)


def _oracle(labels, seed):
    noise = np.random.default_rng(seed).standard_normal((len(labels), NUM_CLASSES))
    return np.eye(NUM_CLASSES)[labels] + 0.05 * noise


def _accuracy(scores, labels):
    return top_hits(scores, labels).mean()


def test_oracle_features_score_one():
    train, test = _labels(200, 0), _labels(80, 1)
    found = knn_scores(
        _oracle(train, 2), train, _oracle(test, 3), num_classes=5, ks=(1, 10), temperature=0.07
    )
    assert {k: _accuracy(scores, test) for k, scores in found.items()} == {1: 1.0, 10: 1.0}


@pytest.mark.parametrize("shuffled", ["labels", "features"])
def test_negative_control_scores_chance(shuffled):
    train, test = _labels(400, 0), _labels(400, 1)
    generator = np.random.default_rng(5)
    features, queries = _oracle(train, 2), _oracle(test, 3)
    if shuffled == "labels":
        train = generator.permutation(train)
    else:
        features, queries = generator.standard_normal((2, 400, 16))
    found = knn_scores(features, train, queries, num_classes=5, ks=(20,), temperature=0.07)
    interval = bootstrap_interval(top_hits(found[20], test), 500, 0)
    assert interval.low <= 1 / NUM_CLASSES <= interval.high


def test_leave_one_out_solves_oracle_features_and_not_shuffled_labels():
    labels = _labels(600, 0)
    settings = {"num_classes": 5, "ks": (10,), "temperature": 0.07}
    solved = leave_one_out_knn(_oracle(labels, 1), labels, **settings)
    assert _accuracy(solved[10], labels) == 1.0
    features = np.random.default_rng(2).standard_normal((600, 16))
    hits = top_hits(leave_one_out_knn(features, labels, **settings)[10], labels)
    interval = bootstrap_interval(hits, 500, 0)
    assert interval.low <= 1 / NUM_CLASSES <= interval.high


def test_votes_equal_the_formula_written_out():
    generator = np.random.default_rng(0)
    train, queries = generator.standard_normal((30, 7)), generator.standard_normal((9, 7))
    labels = _labels(30, 1)
    found = knn_scores(train, labels, queries, num_classes=5, ks=(3, 8), temperature=0.07)
    for row, query in enumerate(queries):
        cosines = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        order = np.argsort(-cosines)[:8]
        weights = np.exp(cosines[order] / 0.07)
        weights /= weights.sum()  # over all retrieved, also for the smaller k
        for k in (3, 8):
            votes = np.zeros(5)
            np.add.at(votes, labels[order[:k]], weights[:k])
            np.testing.assert_allclose(found[k][row], votes, atol=1e-5)


def test_ks_beyond_the_training_set_are_clipped():
    assert clip_ks((10, 20, 100, 200), 50) == [10, 20, 50]
    labels = _labels(6, 0)
    found = knn_scores(
        _oracle(labels, 1), labels, _oracle(labels, 2), num_classes=5, ks=(5, 99), temperature=1.0
    )
    assert sorted(found) == [5, 6]


def test_leave_one_out_equals_one_search_per_picture():
    labels = _labels(40, 0)
    features = np.random.default_rng(1).standard_normal((40, 6))
    together = leave_one_out_knn(features, labels, num_classes=5, ks=(3, 7), temperature=0.1)
    for row in range(40):
        others = np.arange(40) != row
        alone = knn_scores(
            features[others],
            labels[others],
            features[[row]],
            num_classes=5,
            ks=(3, 7),
            temperature=0.1,
        )
        for k in (3, 7):
            np.testing.assert_allclose(together[k][row], alone[k][0], atol=1e-5)


def test_no_picture_is_its_own_neighbour_even_among_copies():
    features = np.ones((5, 3))
    _, indices = nearest(features, features, 4, exclude_self=True)
    assert all(row not in found for row, found in enumerate(indices.tolist()))


def test_search_in_pieces_equals_search_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    features = generator.standard_normal((50, 4))
    whole = nearest(features, features, 9, exclude_self=True)[1]
    monkeypatch.setattr("dinov3.evals.knn._CHUNK", 130)
    np.testing.assert_array_equal(nearest(features, features, 9, exclude_self=True)[1], whole)


def test_scale_of_the_features_does_not_matter():
    train, test = _labels(50, 0), _labels(20, 1)
    settings = {"num_classes": 5, "ks": (5,), "temperature": 0.07}
    plain = knn_scores(_oracle(train, 2), train, _oracle(test, 3), **settings)
    scaled = knn_scores(_oracle(train, 2) * 1000, train, _oracle(test, 3) * 0.001, **settings)
    np.testing.assert_allclose(plain[5], scaled[5], atol=1e-5)


def test_an_empty_training_half_is_refused():
    with pytest.raises(DataError, match="needs at least one possible neighbour, got 0"):
        knn_scores(
            np.zeros((0, 3)),
            np.zeros(0, dtype=int),
            np.ones((2, 3)),
            num_classes=2,
            ks=(1,),
            temperature=1.0,
        )
