"""Image-text retrieval: who counts as right, ties, chance, and the controls at both ends."""

import numpy as np
import pytest

from dinov3.errors import DataError
from dinov3.evals import text_retrieval
from dinov3.evals.text_retrieval import (
    chance_hits,
    first_hit_ranks,
    hits_within,
    make_corpus,
    nearest_answers,
    shuffled_pairs,
)

PICTURES = ["p0", "p1", "p1", "p2", "p3"]
CAPTIONS = ["A pear.", "A fig.", "Two figs.", "a Pear.", "A plum."]


def random_rows(rows, width, seed):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def diagonal(num):
    return np.stack([np.arange(num)] * 2, axis=1)


def test_equal_captions_are_one_text_and_right_for_every_picture_they_describe():
    corpus = make_corpus(PICTURES, CAPTIONS)
    assert corpus.pictures == ("p0", "p1", "p2", "p3")
    assert corpus.texts == ("A pear.", "A fig.", "Two figs.", "A plum.")
    assert corpus.pairs.tolist() == [[0, 0], [1, 1], [1, 2], [2, 0], [3, 3]]
    assert corpus.reversed_pairs.tolist() == [[0, 0], [1, 1], [2, 1], [0, 2], [3, 3]]


def test_a_pair_named_twice_counts_once():
    assert make_corpus(["p", "p"], ["A fig.", "A FIG."]).pairs.tolist() == [[0, 0]]


def test_no_pair_is_an_error():
    with pytest.raises(DataError, match="at least one picture with a caption"):
        make_corpus([], [])


def test_the_best_of_several_right_answers_counts():
    gallery = np.eye(4, dtype=np.float32)
    query = np.array([[0.1, 0.9, 0.5, 0.3]], dtype=np.float32)
    for right, rank in (([0], 4), ([0, 3], 3), ([0, 2, 3], 2), ([1, 0], 1)):
        pairs = np.array([[0, answer] for answer in right])
        assert first_hit_ranks(query, gallery, pairs).tolist() == [rank]


def test_right_answers_do_not_push_each_other_back():
    gallery = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5]], dtype=np.float32)
    pairs = np.array([[0, 0], [0, 1]])
    assert first_hit_ranks(gallery[:1], gallery, pairs).tolist() == [1]


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = np.ones((20, 8), dtype=np.float32)
    assert (first_hit_ranks(same, same, diagonal(20)) == 20).all()


def test_the_code_of_the_picture_as_text_is_always_found():
    codes = random_rows(200, 16, seed=0)
    ranks = first_hit_ranks(5 * codes, codes, diagonal(200))
    assert hits_within(ranks, 1).mean() == 1


def test_shuffled_captions_and_random_features_score_chance():
    corpus = make_corpus([f"p{n}" for n in range(300)], [f"text {n}" for n in range(300)])
    codes = random_rows(300, 16, seed=0)
    expected = chance_hits(corpus.pairs, 300, 300, 10).mean()
    assert expected == pytest.approx(10 / 300)
    every = [
        hits_within(first_hit_ranks(codes, codes, pairs), 10)
        for pairs in shuffled_pairs(corpus, num_shuffles=20, seed=0)
    ]
    assert np.mean(every) == pytest.approx(expected, abs=0.01)
    ranks = first_hit_ranks(random_rows(300, 16, seed=1), codes, corpus.pairs)
    assert hits_within(ranks, 10).mean() == pytest.approx(expected, abs=0.04)


def test_shuffling_keeps_the_captions_of_a_picture_together():
    corpus = make_corpus(PICTURES, CAPTIONS)
    sizes = sorted(np.bincount(corpus.pairs[:, 0]))
    seen = set()
    for pairs in shuffled_pairs(corpus, num_shuffles=30, seed=0):
        assert sorted(np.bincount(pairs[:, 0])) == sizes
        assert sorted(pairs[:, 1]) == sorted(corpus.pairs[:, 1])
        seen.add(tuple(map(tuple, pairs)))
    assert len(seen) > 5


def test_chance_equals_the_share_of_drawn_orders():
    pairs = np.array([[0, 0], [1, 1], [1, 2], [1, 3], [2, 4]])
    generator = np.random.default_rng(0)
    first = np.stack([generator.permutation(7)[:3] for _ in range(20_000)])
    drawn = [
        np.isin(first, pairs[pairs[:, 0] == query, 1]).any(axis=1).mean() for query in range(3)
    ]
    np.testing.assert_allclose(chance_hits(pairs, 3, 7, 3), drawn, atol=0.01)
    assert chance_hits(pairs, 3, 7, 7).tolist() == [1, 1, 1]
    assert chance_hits(pairs, 3, 7, 50).tolist() == [1, 1, 1]


def test_ranks_do_not_depend_on_the_pieces_they_are_made_in(monkeypatch):
    queries, gallery = random_rows(50, 8, seed=2), random_rows(30, 8, seed=3)
    pairs = np.stack([np.arange(50), np.arange(50) % 30], axis=1)
    whole = first_hit_ranks(queries, gallery, pairs)
    monkeypatch.setattr(text_retrieval, "_CHUNK", 7 * 30)
    assert first_hit_ranks(queries, gallery, pairs).tolist() == whole.tolist()


def test_a_query_without_an_answer_is_an_error():
    with pytest.raises(DataError, match="got none for query 1"):
        first_hit_ranks(np.eye(2), np.eye(2), np.array([[0, 0]]))


def test_nearest_answers_are_in_order():
    query = np.array([[0.1, 0.9, 0.5, 0.3]])
    assert nearest_answers(query, np.eye(4), 3).tolist() == [[1, 2, 3]]
