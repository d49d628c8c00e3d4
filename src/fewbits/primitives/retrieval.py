"""Measures of retrieval quality. No paper names in here."""

from __future__ import annotations

import numpy as np


def overlap(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """recall@k against exact search: mean share of the true top k among the found top k.

    Both are (q, ≥k) row numbers without repetition in a row; -1 matches nothing. O(q·k log k).
    """
    found, truth = found[:, :k], truth[:, :k]
    joined = np.sort(np.concatenate([found, truth], axis=1), axis=1)
    shared = (joined[:, 1:] == joined[:, :-1]) & (joined[:, 1:] >= 0)
    return float(shared.sum() / truth.size)


def hit_rate(found: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Share of queries whose one right answer is among the first k found."""
    return float((found[:, :k] == answers[:, None]).any(axis=1).mean())


def mean_reciprocal_rank(found: np.ndarray, answers: np.ndarray) -> float:
    """Mean of 1/rank of the one right answer; 0 where it was not found."""
    right = found == answers[:, None]
    rank = np.where(right.any(axis=1), right.argmax(axis=1) + 1, np.inf)
    return float((1 / rank).mean())


def ndcg(found: np.ndarray, judged: dict[int, dict[int, float]], k: int) -> float:
    """Mean nDCG@k over the queries that have a relevant document, with gains as judged.

    Documents that are not judged count as not relevant.
    """
    discount = 1 / np.log2(np.arange(2, k + 2))
    values = []
    for query, relevance in judged.items():
        ideal = np.sort([r for r in relevance.values() if r > 0])[::-1][:k]
        if len(ideal):
            gains = np.array([max(relevance.get(int(d), 0.0), 0.0) for d in found[query, :k]])
            values.append(gains @ discount[: len(gains)] / (ideal @ discount[: len(ideal)]))
    return float(np.mean(values)) if values else 0.0
