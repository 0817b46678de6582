"""Hierarchical k-means: right means, flat trees, the same on every run."""

import faiss
import numpy as np
import pytest

from dinov3.curation.kmeans import assign, hierarchical_kmeans, kmeans, seed_centroids


def _blobs(sizes: list[int], spread: float = 0.05, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.stack([np.cos(np.arange(len(sizes))), np.sin(np.arange(len(sizes)))], 1) * 5
    rows = [c + spread * rng.standard_normal((n, 2)) for c, n in zip(centres, sizes, strict=True)]
    return np.concatenate(rows).astype(np.float32)


def test_kmeans_finds_separate_groups():
    sizes = [40, 5, 20, 8]
    found = kmeans(_blobs(sizes), 4, seed=(0,), lloyd_steps=50)
    truth = np.repeat(np.arange(4), sizes)
    assert all(len(set(found.assignment[truth == group])) == 1 for group in range(4))
    assert sorted(np.bincount(found.assignment)) == sorted(sizes)


def test_kmeans_centroids_are_the_means_of_their_members():
    rows = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    found = kmeans(rows, 7, seed=(1,), lloyd_steps=200)
    means = np.stack([rows[ids].mean(0, dtype=np.float64) for ids in found.members()])
    assert np.allclose(found.centroids, means, atol=1e-6)


def test_kmeans_is_no_worse_than_scikit_learn():
    from sklearn.cluster import KMeans

    rows = np.random.default_rng(3).standard_normal((400, 5)).astype(np.float32)
    oracle = KMeans(12, n_init=3, max_iter=200, random_state=0).fit(rows)
    found = kmeans(rows, 12, seed=(0,), lloyd_steps=200, num_init=3)
    assert found.potential <= 1.05 * oracle.inertia_


def test_the_best_of_several_runs_is_returned():
    rows = np.random.default_rng(3).standard_normal((300, 4)).astype(np.float32)
    potentials = [kmeans(rows, 10, seed=(0,), lloyd_steps=5, num_init=n).potential for n in (1, 8)]
    assert potentials[1] < potentials[0]


def test_an_empty_cluster_keeps_its_centroid():
    rows = np.array([[0, 0], [0, 0], [1, 1]], np.float32)
    found = kmeans(rows, 3, seed=(0,), lloyd_steps=10)
    assert sorted(len(ids) for ids in found.members()) == [0, 1, 2]
    assert {tuple(row) for row in found.centroids.tolist()} == {(0.0, 0.0), (1.0, 1.0)}


def test_members_are_sorted_by_distance_and_cover_every_row():
    rows = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    found = kmeans(rows, 5, seed=(0,), lloyd_steps=50)
    members = found.members()
    assert sorted(np.concatenate(members).tolist()) == list(range(60))
    for ids in members:
        assert (np.diff(found.distance[ids]) >= 0).all()


def test_seeding_spreads_over_the_groups():
    rows = _blobs([1000, 3, 3, 3], spread=0.01)
    chosen = seed_centroids(rows, 4, np.random.default_rng(0))
    assert len({tuple(np.round(row)) for row in chosen}) == 4


def test_the_number_of_threads_changes_nothing():
    rows = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    before = faiss.omp_get_max_threads()
    found = []
    for count in (1, 2):
        faiss.omp_set_num_threads(count)
        found.append(assign(rows, rows[:1000]))  # 1.28e9 multiplications: threads are used
    faiss.omp_set_num_threads(before)
    assert np.array_equal(found[0].assignment, found[1].assignment)
    assert np.array_equal(found[0].distance, found[1].distance)


def _hierarchy(rows: np.ndarray, seed: int = 0, resampling_steps: int = 4):
    return hierarchical_kmeans(
        rows, (30, 5), (3, 2), resampling_steps=resampling_steps, lloyd_steps=30, seed=seed
    )


def test_levels_cluster_the_centroids_below():
    levels = _hierarchy(_blobs([300, 30, 30]))
    assert [len(level.centroids) for level in levels] == [30, 5]
    assert len(levels[1].assignment) == 30


def test_same_seed_same_tree_and_another_seed_another_tree():
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    first, again, other = _hierarchy(rows), _hierarchy(rows), _hierarchy(rows, seed=1)
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.centroids, two.centroids)
        assert np.array_equal(one.assignment, two.assignment)
    assert not np.array_equal(first[0].centroids, other[0].centroids)


def test_resampling_spreads_centroids_away_from_the_dense_group():
    rng = np.random.default_rng(0)
    dense = rng.uniform(0, 1, (2000, 2))
    sparse = np.stack([rng.uniform(1, 10, 200), rng.uniform(0, 1, 200)], 1)
    rows = np.concatenate([dense, sparse]).astype(np.float32)
    plain = _hierarchy(rows, resampling_steps=0)[0].centroids
    spread = _hierarchy(rows, resampling_steps=10)[0].centroids
    assert (spread[:, 0] > 1).sum() > (plain[:, 0] > 1).sum()


@pytest.mark.parametrize("count", [1, 2, 10])
def test_fewer_rows_than_clusters_give_as_many_clusters_as_rows(count):
    rows = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
    levels = _hierarchy(rows)
    assert len(levels[0].centroids) <= count
    assert len(levels[1].centroids) <= min(5, count)
    assert len(levels[0].assignment) == count


def test_equal_rows_are_no_trouble():
    levels = _hierarchy(np.ones((40, 3), np.float32))
    assert len(levels[0].assignment) == 40
