"""K-means, and how well clusters agree with classes. No paper names in here."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

ROUNDS, STARTS = 100, 20
"""Most rounds of k-means, and how often it starts anew; the least error is kept."""

ONE_THREAD = 20_000_000
"""Up to so many products a round, threads would wait for each other more than they help."""


def kmeans(x: np.ndarray, clusters: int, *, seed: int = 0) -> np.ndarray:
    """(n,) int64 cluster of each row of `x` (n, d) float, by k-means from k-means++ starts.

    The same seed gives the same clusters. O(STARTS·ROUNDS·n·d·clusters).

    Raises
    ------
    ValueError
        No rows, or not between 1 and n clusters.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or not 1 <= clusters <= len(x):
        raise ValueError(f"cannot make {clusters} clusters of a table of shape {x.shape}")
    faiss: Any = importlib.import_module("faiss")  # its stubs know fewer options
    means = faiss.Kmeans(
        x.shape[1],
        clusters,
        niter=ROUNDS,
        nredo=STARTS,
        seed=seed + 1,
        min_points_per_centroid=1,  # few rows are fine; do not warn
        max_points_per_centroid=len(x),
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
    )
    threads = faiss.omp_get_max_threads()
    if x.size * clusters < ONE_THREAD:
        faiss.omp_set_num_threads(1)
    try:
        means.train(x)
        return np.asarray(means.index.search(x, 1)[1][:, 0], dtype=np.int64)
    finally:
        faiss.omp_set_num_threads(threads)


def purity(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of rows whose label is the most frequent one of their cluster.

    Several clusters may stand for one class; more clusters never lower it. O(n log n).
    """
    return float(contingency(labels, clusters).max(axis=0).sum() / len(labels))


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of rows that are right when each class is given a cluster of its own, the best way.

    At most the purity. O(n log n + k³) for k classes or clusters; needs SciPy.
    """
    counts = contingency(labels, clusters)
    optimize: Any = importlib.import_module("scipy.optimize")
    pairs = optimize.linear_sum_assignment(counts, maximize=True)
    return float(counts[pairs].sum() / len(labels))


def contingency(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(classes, clusters) int64: how many rows have each label and each cluster, in order."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.ndim != 1 or labels.shape != clusters.shape or len(labels) == 0:
        raise ValueError(f"labels and clusters must pair up: {labels.shape}, {clusters.shape}")
    classes, row = np.unique(labels, return_inverse=True)
    groups, column = np.unique(clusters, return_inverse=True)
    counts = np.bincount(row * len(groups) + column, minlength=len(classes) * len(groups))
    return counts.reshape(len(classes), len(groups))
