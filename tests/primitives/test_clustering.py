import faiss
import numpy as np
import pytest
from sklearn.cluster import KMeans

from fewbits.primitives.clustering import kmeans, matched_accuracy, purity


def test_purity_counts_majorities_and_matching_gives_each_class_one_cluster() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    clusters = np.array([5, 5, 7, 7, 7, 9, 9, 9])
    assert purity(labels, clusters) == (2 + 2 + 2) / 8
    assert matched_accuracy(labels, clusters) == (2 + 1 + 2) / 8
    assert purity(labels, labels[::-1] + 3) == matched_accuracy(labels, 9 - labels) - 0.25
    two = np.array([0, 0, 1, 1, 2, 2, 2, 2])  # two clusters share a class
    assert purity(labels, two) == 6 / 8
    assert matched_accuracy(labels, two) == 4 / 8


def test_names_of_labels_and_clusters_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(4, size=200), rng.integers(6, size=200)
    names = np.array(["d", "a", "c", "b"])[labels]
    renumbered = rng.permutation(6)[clusters] * 10 - 30
    for measure in (purity, matched_accuracy):
        assert measure(labels, clusters) == measure(names, renumbered)
        assert measure(labels, labels * 7) == 1
    assert matched_accuracy(labels, clusters) <= purity(labels, clusters)
    assert purity(labels, np.arange(200)) == 1  # more clusters never hurt it
    assert matched_accuracy(labels, np.arange(200)) == 4 / 200


def test_kmeans_is_reproducible_and_as_good_as_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    centres = 3 * rng.standard_normal((8, 20))
    x = (centres[rng.integers(8, size=600)] + rng.standard_normal((600, 20))).astype(np.float32)
    threads = faiss.omp_get_max_threads()
    found = kmeans(x, 8, seed=3)
    assert faiss.omp_get_max_threads() == threads
    assert (found == kmeans(x, 8, seed=3)).all()
    assert found.dtype == np.int64
    assert set(found) == set(range(8))
    error = sum(np.square(x[found == c] - x[found == c].mean(axis=0)).sum() for c in range(8))
    assert error <= 1.001 * KMeans(8, n_init=10, random_state=0).fit(x).inertia_


def test_bad_input() -> None:
    for clusters in (0, 6):
        with pytest.raises(ValueError, match="clusters"):
            kmeans(np.zeros((5, 2)), clusters)
    for labels, clusters in (([], []), ([1, 2], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="pair up"):
            purity(np.array(labels), np.array(clusters))
