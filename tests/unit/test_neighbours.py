"""Neighbours by FAISS equal plain sorting, whatever the number of threads."""

import faiss
import numpy as np
import pytest

from dinov3.curation import neighbours
from dinov3.curation.neighbours import nearest, similar_pairs, squared_distances


def _unit(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_nearest_equals_sorting_all_cosines():
    base, queries = _unit(50, 8), _unit(7, 8, seed=1)
    similarity, index = nearest(queries, base, 5)
    cosines = queries @ base.T
    assert np.array_equal(index, np.argsort(-cosines, axis=1)[:, :5])
    assert np.allclose(similarity, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)


def test_nearest_gives_what_there_is_when_asked_for_more():
    similarity, index = nearest(_unit(3, 4), _unit(2, 4, seed=1), 64)
    assert similarity.shape == index.shape == (3, 2)
    assert nearest(_unit(3, 4), np.empty((0, 4), np.float32), 64)[1].shape == (3, 0)


def test_similar_pairs_names_each_pair_once_and_no_image_with_itself():
    rows = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float32)
    low, high, similarity = similar_pairs(rows, 0.7, 64)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [(0, 1), (2, 3)]
    assert similarity.tolist() == pytest.approx([1.0, 0.8])


def test_large_bases_are_searched_in_lists_and_the_nearest_is_still_found(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_LIMIT", 2000)
    base = _unit(4000, 16)
    similarity, index = nearest(base[:100], base, 1)
    assert np.array_equal(index[:, 0], np.arange(100))
    assert np.allclose(similarity, 1, atol=1e-5)


def _with_threads(count: int, call):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        return call()
    finally:
        faiss.omp_set_num_threads(before)


def test_the_number_of_threads_changes_no_bit():
    rows = _unit(5000, 64)  # 1.6e9 multiplications: enough that threads are used
    one, two = (_with_threads(count, lambda: nearest(rows, rows, 5)) for count in (1, 2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    one, two = (_with_threads(n, lambda: squared_distances(rows, rows)) for n in (1, 2))
    assert np.array_equal(one, two)


def test_faiss_keeps_the_threads_it_was_given():
    found = _with_threads(2, lambda: (nearest(_unit(3, 4), _unit(3, 4), 1), _threads()))
    assert found[1] == 2


def _threads() -> int:
    return int(faiss.omp_get_max_threads())


def test_squared_distances_equal_their_definition():
    queries, base = _unit(3, 5), _unit(9000, 5, seed=1)
    expected = ((queries[:, None] - base) ** 2).sum(2)
    assert np.allclose(squared_distances(queries, base), expected, atol=1e-5)
