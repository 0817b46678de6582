import faiss
import numpy as np
import pytest

from dinov3.curation import neighbours
from dinov3.curation.neighbours import nearest, similar_pairs, threads_for


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


def test_small_work_takes_one_thread_and_gives_the_others_back():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        with threads_for(10):
            assert faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == 2
        with threads_for(10**12):
            assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
