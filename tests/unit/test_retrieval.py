"""Instance retrieval: views, ranks, oracle and negative control."""

import numpy as np
from PIL import Image

from dinov3.evals.metrics import bootstrap_interval
from dinov3.evals.retrieval import random_view, retrieval_ranks


def test_oracle_features_score_one():
    generator = np.random.default_rng(0)
    names = np.eye(60)
    first, second = (names + 0.02 * generator.standard_normal((60, 60)) for _ in range(2))
    assert (retrieval_ranks(second, first) == 1).all()


def test_random_features_score_chance():
    generator = np.random.default_rng(0)
    galleries = generator.standard_normal((40, 2, 50, 16))
    ranks = np.concatenate([retrieval_ranks(second, first) for first, second in galleries])
    top_1 = bootstrap_interval(ranks == 1, 500, 0)
    assert top_1.low <= 1 / 50 <= top_1.high
    chance = np.mean(1 / np.arange(1, 51))
    interval = bootstrap_interval(1 / ranks, 500, 0)
    assert interval.low <= chance <= interval.high


def test_constant_features_rank_last_not_first():
    assert retrieval_ranks(np.ones((7, 3)), np.ones((7, 3))).tolist() == [7] * 7


def test_ranks_in_pieces_equal_ranks_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    first = generator.standard_normal((50, 8))
    second = first + generator.standard_normal((50, 8))
    whole = retrieval_ranks(second, first)
    assert len(set(whole.tolist())) > 3
    monkeypatch.setattr("dinov3.evals.retrieval._CHUNK", 120)
    np.testing.assert_array_equal(retrieval_ranks(second, first), whole)


def test_views_are_pure_functions_of_seed_picture_and_view():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)

    def view(**changes):
        place = {"seed": 0, "index": 3, "view": 0} | changes
        return np.asarray(random_view(image, scale=(0.3, 0.9), **place)).tobytes()

    assert view() == view()
    assert len({view(), view(view=1), view(index=4), view(seed=1)}) == 4


def test_views_cover_the_asked_share_of_the_picture():
    image = Image.new("RGB", (200, 150))
    sizes = [
        random_view(image, scale=(0.4, 0.6), seed=0, index=index, view=0).size
        for index in range(200)
    ]
    shares = np.array([width * height / (200 * 150) for width, height in sizes])
    assert shares.min() > 0.38
    assert shares.max() < 0.62
    ratios = np.array([width / height for width, height in sizes])
    assert ratios.min() > 0.7
    assert ratios.max() < 1.4


def test_a_picture_too_narrow_to_crop_is_shown_whole():
    image = Image.new("RGB", (2, 400))
    assert random_view(image, scale=(0.9, 1.0), seed=0, index=0, view=0).size == (2, 400)
