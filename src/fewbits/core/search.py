"""Exact search over blocks of vectors, and merging of the best matches of several blocks.

Scores are "higher is better" everywhere: the inner product for ``ip`` and ``cosine`` (whose
rows are unit length), minus the squared distance for ``l2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged, chamfer

METRICS = ("cosine", "ip", "l2")

Matches = tuple[np.ndarray, np.ndarray]
"""Scores (q, k) float32, best first, and rows (q, k) int64."""


class Searcher(Protocol):
    """Finds the best rows of one code for float queries."""

    def search(self, queries: np.ndarray, k: int) -> Matches:
        """Best `k` rows for each of the (q, d) float32 queries."""
        ...


def check_metric(metric: str) -> str:
    if metric not in METRICS:
        raise FewbitsError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    return metric


def search_array(queries: np.ndarray, vectors: np.ndarray, k: int, metric: str) -> Matches:
    """Exact best `k` rows of `vectors` (n, d) for `queries` (q, d). O(q·n·d)."""
    import faiss

    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    scores, rows = faiss.knn(
        np.ascontiguousarray(queries, dtype=np.float32),
        np.ascontiguousarray(vectors, dtype=np.float32),
        min(k, len(vectors)),
        metric=kind,
    )
    return (-scores if metric == "l2" else scores), rows.astype(np.int64)


def merge(best: Matches | None, block: Matches, first_row: int, k: int) -> Matches:
    """Join the matches of a block that starts at `first_row` to the best so far."""
    scores, rows = block[0], np.where(block[1] < 0, -1, block[1] + first_row)
    if best is not None:
        scores = np.concatenate([best[0], scores], axis=1)
        rows = np.concatenate([best[1], rows], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def exact_search(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, metric: str) -> Matches:
    """Exact best `k` rows over a stream of (b, d) blocks; memory O(block + q·k)."""
    best: Matches | None = None
    first_row = 0
    for block in blocks:
        best = merge(best, search_array(queries, block, k, metric), first_row, k)
        first_row += len(block)
    if best is None:
        raise FewbitsError("there are no rows to search")
    return best


def pair_scores(queries: np.ndarray, candidates: np.ndarray, metric: str) -> np.ndarray:
    """Score of each query with its own candidates: (q, d) and (q, c, d) → (q, c) float32."""
    if metric != "l2":
        return np.einsum("qd,qcd->qc", queries, candidates, dtype=np.float32)
    # Not by the squares of both: far from the origin their difference drowns in rounding.
    apart = candidates - queries[:, None]
    return -np.einsum("qcd,qcd->qc", apart, apart, dtype=np.float32)


def rescore(
    queries: np.ndarray,
    rows: np.ndarray,
    fetch: Callable[[np.ndarray], np.ndarray],
    k: int,
    metric: str,
    *,
    batch: int = 64,
) -> Matches:
    """Order the candidate `rows` (q, c) again by better vectors, and keep `k`.

    `fetch` returns the vectors (r, d) of r increasing rows; it is asked for the candidates of
    `batch` queries at a time, so memory is O(batch · c · d). A row of -1 stays last.
    """
    scores = np.empty(rows.shape, dtype=np.float32)
    for start in range(0, len(queries), batch):
        part = rows[start : start + batch]
        wanted, where = np.unique(np.maximum(part, 0), return_inverse=True)
        candidates = fetch(wanted)[where.reshape(part.shape)]
        scores[start : start + batch] = pair_scores(
            queries[start : start + batch], candidates, metric
        )
    scores[rows < 0] = -np.inf
    return merge(None, (scores, rows), 0, k)


def rescore_sets(
    queries: Ragged,
    rows: np.ndarray,
    fetch: Callable[[np.ndarray], Ragged],
    k: int,
    *,
    batch: int = 16,
) -> Matches:
    """Order the candidate `rows` (q, c) of sets by their exact Chamfer score, and keep `k`.

    `fetch` returns the sets of increasing rows; it is asked for the candidates of `batch` queries
    at a time. A row of -1 stays last. Cost O(q · c · |Q| · |P| · d); memory that of the sets of
    batch · c candidates.
    """
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for start in range(0, len(queries), batch):
        part = rows[start : start + batch]
        there = part >= 0
        if not there.any():
            continue
        wanted, where = np.unique(part, return_inverse=True)
        found = fetch(wanted[wanted >= 0])
        where = where.reshape(part.shape) - int(wanted[0] < 0)
        # Each query meets its own candidates: one large matrix product per query.
        for number, mine in enumerate(there):
            if mine.any():
                own = found.take(where[number, mine])
                query = queries[start + number : start + number + 1]
                scores[start + number, mine] = chamfer(query, own)[0]
    return merge(None, (scores, rows.astype(np.int64)), 0, k)
