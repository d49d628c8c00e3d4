"""Retrieval quality where an item is relevant when it shares the label of the query.

Everything starts from *ranked relevance*: for each query, whether the item at each rank is
relevant, best rank first. `ranked_relevance` makes it from scores or distances and labels. No
paper names in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BLOCK_CELLS = 4_000_000
"""Scores that are sorted at a time."""


# -- from ranked relevance -----------------------------------------------------------------


def average_precision(relevant: np.ndarray, totals: np.ndarray | None = None) -> np.ndarray:
    """Mean of the precision at the ranks of a query's relevant items.

    Parameters
    ----------
    relevant : (q, k) bool, ranked.
    totals : (q,) what the sum of the precisions is divided by; the relevant items among the k
        ranks by default. Give the relevant items of the whole gallery (or k, if that is less)
        where those that were not found shall count.

    Returns
    -------
    (q,) float64 from 0 to 1; 0 where nothing is relevant. O(q·k).

    Raises
    ------
    ValueError
        Not (q, k) booleans with k ≥ 1, or totals that are not one per query.
    """
    relevant = _checked_relevance(relevant)
    hits = relevant.cumsum(axis=1)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    summed = (precision * relevant).sum(axis=1)
    totals = hits[:, -1] if totals is None else np.asarray(totals)
    if totals.shape != (len(relevant),):
        raise ValueError(f"totals must be one per query ({len(relevant)}), not {totals.shape}")
    return np.divide(summed, totals, out=np.zeros(len(relevant)), where=totals > 0)


def hit_within(relevant: np.ndarray, k: int) -> np.ndarray:
    """(q,) bool: whether any of the first `k` ranks is relevant. Its mean is the CMC at k.

    Raises
    ------
    ValueError
        As `average_precision`, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return np.asarray(_checked_relevance(relevant)[:, :k].any(axis=1))


def _checked_relevance(relevant: np.ndarray) -> np.ndarray:
    relevant = np.asarray(relevant)
    if relevant.ndim != 2 or relevant.dtype != bool or relevant.shape[1] == 0:
        raise ValueError(
            f"ranked relevance must be (q, k) booleans with k ≥ 1, not {relevant.dtype} "
            f"{relevant.shape}"
        )
    return relevant


# -- from scores or distances and labels ---------------------------------------------------


def same_label(query_labels: np.ndarray, item_labels: np.ndarray) -> np.ndarray:
    """(q, n) bool: which items are relevant to which queries.

    Labels are (q,) and (n,) of any type that can be compared, or (q, c) and (n, c) indicators of
    c classes, where sharing one class is enough. O(q·n), or O(q·n·c).

    Raises
    ------
    ValueError
        Labels of neither form, or of unlike forms.
    """
    asked, held = np.asarray(query_labels), np.asarray(item_labels)
    if asked.ndim == held.ndim == 1:
        return np.asarray(asked[:, None] == held[None, :])
    if asked.ndim == held.ndim == 2 and asked.shape[1] == held.shape[1]:
        return (asked.astype(np.float32) @ held.astype(np.float32).T) > 0
    raise ValueError(
        "labels must be one per row, or indicators of the same classes, not "
        f"{asked.shape} and {held.shape}"
    )


def ranked_relevance(
    scores: np.ndarray,
    query_labels: np.ndarray,
    item_labels: np.ndarray,
    *,
    cut: int | None = None,
    itself: np.ndarray | None = None,
    distances: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the items for each query, and say which are relevant.

    Parameters
    ----------
    scores : (q, n) numbers, higher is better; with `distances`, lower is better. Of equal ones
        the earlier item comes first.
    query_labels, item_labels : as `same_label` takes them.
    cut : ranks to keep; all by default.
    itself : (q,) row of each query among the items, which does not count as one; -1 for a query
        that is not among them.

    Returns
    -------
    (q, k) bool, ranked, and (q,) int64, the relevant items of the whole gallery. Where an item
    was left out, the last of n ranks is never relevant. O(q·n·log n), in blocks of queries.

    Raises
    ------
    ValueError
        Shapes that do not fit, a score that is NaN, no items, a cut below 1, or a row of
        `itself` that is not there.
    """
    scores, itself = _checked_scores(scores, query_labels, item_labels, itself)
    if cut is not None and cut < 1:
        raise ValueError(f"cut must be at least 1, not {cut}")
    kept = scores.shape[1] if cut is None else min(cut, scores.shape[1])
    ranked = np.empty((len(scores), kept), dtype=bool)
    totals = np.empty(len(scores), dtype=np.int64)
    for rows, values, relevant in _blocks(scores, query_labels, item_labels, itself):
        falling = values if distances else -values
        falling[_found(itself[rows])] = np.inf
        order = np.argsort(falling, axis=1, kind="stable")[:, :kept]
        ranked[rows] = np.take_along_axis(relevant, order, axis=1)
        totals[rows] = relevant.sum(axis=1)
    return ranked, totals


@dataclass(frozen=True)
class LabelRetrieval:
    """Means over the queries that have anything to be found.

    Attributes
    ----------
    mean_average_precision : mAP.
    cmc : k → share of queries with a relevant item among the first k.
    queries : how many queries that is.
    """

    mean_average_precision: float
    cmc: dict[int, float]
    queries: int


def retrieval_by_labels(
    scores: np.ndarray,
    query_labels: np.ndarray,
    item_labels: np.ndarray,
    *,
    ks: Sequence[int] = (1, 5),
    cut: int | None = None,
    over: Literal["found", "all"] = "found",
    itself: np.ndarray | None = None,
    distances: bool = False,
) -> LabelRetrieval:
    """Mean average precision and CMC, from one sorting.

    Parameters
    ----------
    scores, query_labels, item_labels, cut, itself, distances : as `ranked_relevance` takes them.
    ks : ranks for the CMC; none of them beyond `cut`.
    over : with a cut, what a query's sum of precisions is divided by: its relevant items
        ``found`` within the cut, as papers on hashing do (which rewards finding few), or ``all``
        of the gallery, at most `cut`. Without a cut they are the same.

    Returns
    -------
    `LabelRetrieval`. A query without a relevant item in the gallery is left out; one with
    relevant items that are all beyond the cut counts as 0.

    Raises
    ------
    ValueError
        As `ranked_relevance`, an unknown `over`, a k beyond the cut, or no query that has
        anything to be found.
    """
    if over not in ("found", "all"):
        raise ValueError(f"over={over!r} must be found or all")
    if cut is not None and max(ks, default=0) > cut:
        raise ValueError(f"the CMC at {max(ks)} needs a cut of at least {max(ks)}, not {cut}")
    ranked, totals = ranked_relevance(
        scores, query_labels, item_labels, cut=cut, itself=itself, distances=distances
    )
    ranked, totals = ranked[totals > 0], totals[totals > 0]
    if len(ranked) == 0:
        raise ValueError("no query has a relevant item; compare labels of queries and items")
    shares = None if over == "found" else np.minimum(totals, ranked.shape[1])
    return LabelRetrieval(
        float(average_precision(ranked, shares).mean()),
        {int(k): float(hit_within(ranked, k).mean()) for k in ks},
        len(ranked),
    )


def mean_average_precision(
    scores: np.ndarray,
    query_labels: np.ndarray,
    item_labels: np.ndarray,
    *,
    cut: int | None = None,
    over: Literal["found", "all"] = "found",
    itself: np.ndarray | None = None,
    distances: bool = False,
) -> float:
    """The mAP alone; see `retrieval_by_labels`."""
    return retrieval_by_labels(
        scores,
        query_labels,
        item_labels,
        ks=(),
        cut=cut,
        over=over,
        itself=itself,
        distances=distances,
    ).mean_average_precision


def precision_within(
    distances: np.ndarray,
    query_labels: np.ndarray,
    item_labels: np.ndarray,
    radius: float = 2,
    *,
    itself: np.ndarray | None = None,
) -> float:
    """Mean share of relevant items among those at a distance of at most `radius`.

    A query that has no item that near counts as 0. Parameters and errors are those of
    `ranked_relevance`; `distances` are (q, n), Hamming distances for example. O(q·n).
    """
    distances, itself = _checked_scores(distances, query_labels, item_labels, itself)
    shares = np.empty(len(distances))
    for rows, values, relevant in _blocks(distances, query_labels, item_labels, itself):
        near = values <= radius
        near[_found(itself[rows])] = False
        found = near.sum(axis=1)
        shares[rows] = (near & relevant).sum(axis=1) / np.maximum(found, 1)
    return float(shares.mean())


def _blocks(
    scores: np.ndarray, query_labels: np.ndarray, item_labels: np.ndarray, itself: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows, scores in floats, and relevance without the query itself, of bounded size."""
    query_labels = np.asarray(query_labels)
    step = max(1, BLOCK_CELLS // scores.shape[1])
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        relevant = same_label(query_labels[rows], item_labels)
        relevant[_found(itself[rows])] = False
        # float64 holds every score and distance exactly, also integers without a sign.
        yield rows, scores[rows].astype(np.float64), relevant


def _found(itself: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the queries are among the items."""
    (here,) = np.nonzero(itself >= 0)
    return here, itself[here]


def _checked_scores(
    scores: np.ndarray,
    query_labels: np.ndarray,
    item_labels: np.ndarray,
    itself: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores)
    shape = (len(query_labels), len(item_labels))
    if scores.shape != shape or 0 in shape:
        raise ValueError(
            f"scores must be (queries, items) with a label for each, not {scores.shape} with "
            f"{shape[0]} and {shape[1]} labels"
        )
    if np.isnan(scores).any():
        raise ValueError("a score is NaN; repair or drop that row first")
    itself = np.full(len(scores), -1) if itself is None else np.asarray(itself)
    if itself.shape != (len(scores),) or itself.dtype.kind not in "iu":
        raise ValueError(f"itself must be one row number per query ({len(scores)})")
    if itself.max() >= scores.shape[1] or itself.min() < -1:
        raise ValueError(f"itself must be rows below {scores.shape[1]}, or -1")
    return scores, itself
