"""Intervals against theory, effective ranks against known clouds."""

import math

import numpy as np
import pytest

from dinov3.errors import DataError
from dinov3.evals.metrics import (
    bootstrap_interval,
    copy_deviations,
    difference_from_copies,
    mean_cosine,
    mean_per_class,
    paired_difference,
    participation_ratio,
    possible_differences,
    rankme,
    top_hits,
)


def test_interval_covers_the_true_mean_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap_interval(generator.random(150) < 0.4, 400, trial)
        covered += found.low <= 0.4 <= found.high
    assert 0.88 <= covered / 200 <= 1.0
    assert covered < 200


def test_interval_has_the_width_theory_gives():
    hits = np.arange(1000) % 2 == 0
    found = bootstrap_interval(hits, 2000, seed=0)
    assert found.mean == 0.5
    expected = 1.96 * math.sqrt(0.25 / 1000)
    assert found.high - found.mean == pytest.approx(expected, rel=0.1)
    assert found.mean - found.low == pytest.approx(expected, rel=0.1)


def test_interval_is_a_pure_function_of_its_seed():
    hits = np.random.default_rng(1).random(50)
    assert bootstrap_interval(hits, 300, seed=3) == bootstrap_interval(hits, 300, seed=3)
    assert bootstrap_interval(hits, 300, seed=3) != bootstrap_interval(hits, 300, seed=4)


def test_interval_in_pieces_equals_interval_at_once(monkeypatch):
    hits = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(hits, 300, seed=3)
    monkeypatch.setattr("dinov3.evals.metrics._CHUNK", 170)
    assert bootstrap_interval(hits, 300, seed=3) == whole


def test_interval_of_nothing_is_refused():
    with pytest.raises(DataError, match="needs at least one sample"):
        bootstrap_interval(np.zeros(0), 10, 0)


def test_paired_difference_is_narrower_than_independent_intervals():
    generator = np.random.default_rng(0)
    hard = generator.random(400)
    first, second = (hard < 0.6).astype(float), (hard < 0.55).astype(float)
    paired = paired_difference(first, second, 500, 0)
    alone = bootstrap_interval(first, 500, 0)
    assert paired.mean == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_paired_difference_of_other_samples_is_refused():
    with pytest.raises(DataError, match="got 3 and 4"):
        paired_difference(np.zeros(3), np.zeros(4), 10, 0)


def test_mean_per_class_weighs_classes_equally():
    hits = np.array([1.0] * 90 + [0.0] * 10)
    labels = np.array([0] * 90 + [1] * 10)
    found = mean_per_class(hits, labels, 200, 0)
    assert found.mean == found.low == found.high == 0.5


def test_a_class_without_votes_is_never_a_hit():
    scores = np.array([[0.9, 0.0, 0.0], [0.2, 0.5, 0.1]])
    labels = np.array([1, 2])
    assert top_hits(scores, labels, 3).tolist() == [0, 1]
    assert top_hits(scores, labels, 2).tolist() == [0, 0]
    assert top_hits(scores, np.array([0, 1])).tolist() == [1, 1]


def test_effective_ranks_count_directions():
    generator = np.random.default_rng(0)
    round_cloud = generator.standard_normal((4000, 8))
    assert participation_ratio(round_cloud) == pytest.approx(8, rel=0.02)
    assert rankme(round_cloud) == pytest.approx(8, rel=0.02)
    line = np.outer(generator.standard_normal(50), np.arange(1, 6))
    assert participation_ratio(line) == pytest.approx(1)
    assert rankme(line) == pytest.approx(1)
    assert participation_ratio(np.ones((5, 3))) == 0


def test_participation_ratio_ignores_a_shift_and_rankme_does_not():
    cloud = np.random.default_rng(0).standard_normal((300, 6))
    assert participation_ratio(cloud + 100) == pytest.approx(participation_ratio(cloud))
    assert rankme(cloud + 100) < 1.2 < rankme(cloud)


def test_mean_cosine_equals_the_mean_over_pairs():
    features = np.random.default_rng(0).standard_normal((20, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    expected = cosines[~np.eye(20, dtype=bool)].mean()
    assert mean_cosine(features) == pytest.approx(expected, abs=1e-6)
    assert mean_cosine(np.ones((4, 3))) == pytest.approx(1)


def test_a_difference_from_one_copy_is_the_paired_difference():
    ours, theirs = np.random.default_rng(0).random((2, 30))
    found = difference_from_copies(ours, [theirs], 200, 3)
    assert found == paired_difference(ours, theirs, 200, 3)


def test_one_untrained_network_seldom_counts_as_better_than_others_that_are_no_different():
    generator = np.random.default_rng(0)
    wrong, wrong_by_samples = 0, 0
    for trial in range(200):
        hard = generator.random(80)  # every picture is as hard for all networks
        skills = generator.normal(0, 0.1, 6)
        ours, *copies = (hard + skill + generator.normal(0, 0.1, 80) for skill in skills)
        found = difference_from_copies(ours, copies, 300, trial)
        wrong += not found.low <= 0 <= found.high
        by_samples = paired_difference(ours, np.mean(copies, axis=0), 300, trial)
        wrong_by_samples += not by_samples.low <= 0 <= by_samples.high
    assert wrong / 200 < 0.09
    assert wrong_by_samples / 200 > 0.5


def test_copies_of_other_samples_are_refused():
    with pytest.raises(DataError, match=r"sizes differ, got \[4, 4, 3\]"):
        difference_from_copies(np.ones(4), [np.ones(4), np.ones(3)], 10, 0)


@pytest.mark.parametrize("num_copies", [2, 3])
def test_a_difference_of_figures_never_leaves_what_a_difference_can_be(num_copies):
    generator = np.random.default_rng(0)
    ours = generator.random(60) < 0.95
    copies = [generator.random(60) < 0.9 * share for share in np.linspace(0, 1, num_copies)]
    noise = copy_deviations([float(copy.mean()) for copy in copies], 500, 0)
    assert np.abs(noise).max() > 2  # what the cut is for
    found = difference_from_copies(ours, copies, 500, 0)
    assert found.high == 1.0
    assert -1.0 <= found.low < found.mean


def test_cutting_an_interval_loses_no_difference_that_can_be():
    drawn = np.array([-2.6, -1.0, -0.3, 0.0, 0.7, 1.0, 3.1])
    kept = possible_differences(drawn)
    assert kept.tolist() == [-1.0, -1.0, -0.3, 0.0, 0.7, 1.0, 1.0]
