"""Exact search over blocks, merging, and ordering candidates again."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits.core.errors import FewbitsError
from fewbits.core.search import (
    METRICS,
    check_metric,
    exact_search,
    merge,
    pair_scores,
    rescore,
    search_array,
)

ROWS, DIMS, QUERIES = 211, 12, 25

Data = tuple[np.ndarray, np.ndarray]


def data(metric: str, rows: int = ROWS) -> Data:
    """(q, d) queries and (n, d) vectors, of unit length for cosine."""
    rng = np.random.default_rng(0)
    pair = [rng.standard_normal((n, DIMS)).astype(np.float32) for n in (QUERIES, rows)]
    if metric == "cosine":
        pair = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
    return pair[0], pair[1]


def true_scores(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """(q, n) scores in float64, by their definition."""
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return -np.square(q[:, None] - x[None]).sum(axis=2)
    return np.asarray(q @ x.T)


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def pieces(vectors: np.ndarray, size: int) -> list[np.ndarray]:
    return [vectors[start : start + size] for start in range(0, len(vectors), size)]


# -- exact search --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [13, 100, ROWS, 1000])
@pytest.mark.parametrize("metric", METRICS)
def test_search_over_blocks_is_brute_force(metric: str, size: int) -> None:
    queries, vectors = data(metric)
    expected = true_scores(queries, vectors, metric)
    for k in (1, 30):
        scores, rows = exact_search(queries, pieces(vectors, size), k, metric)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(rows, best_rows(expected, k))
        np.testing.assert_allclose(
            scores, np.take_along_axis(expected, rows, axis=1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("metric", METRICS)
def test_search_of_one_query_is_that_of_many(metric: str) -> None:
    queries, vectors = data(metric)
    scores, rows = search_array(queries, vectors, 5, metric)
    for number in range(QUERIES):
        alone = search_array(queries[number : number + 1], vectors, 5, metric)
        np.testing.assert_array_equal(alone[1][0], rows[number])
        np.testing.assert_allclose(alone[0][0], scores[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_more_matches_than_rows_are_all_rows(metric: str) -> None:
    queries, vectors = data(metric, rows=6)
    for size in (1, 4, 6):
        scores, rows = exact_search(queries, pieces(vectors, size), 10, metric)
        assert scores.shape == rows.shape == (QUERIES, 6)
        np.testing.assert_array_equal(rows, best_rows(true_scores(queries, vectors, metric), 6))


def test_distances_far_from_the_origin_stay_exact() -> None:
    queries, vectors = (x + 1000 for x in data("l2"))
    _, rows = search_array(queries, vectors, 10, "l2")
    np.testing.assert_array_equal(rows, best_rows(true_scores(queries, vectors, "l2"), 10))


def test_other_layouts_and_dtypes_are_searched_as_float32() -> None:
    queries, vectors = data("ip")
    expected = search_array(queries, vectors, 5, "ip")[1]
    found = search_array(np.asfortranarray(queries), vectors.astype(np.float64), 5, "ip")[1]
    np.testing.assert_array_equal(found, expected)


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(FewbitsError, match="there are no rows to search"):
        exact_search(data("ip")[0], [], 3, "ip")


def test_metric_is_one_of_three() -> None:
    assert [check_metric(metric) for metric in METRICS] == ["cosine", "ip", "l2"]
    with pytest.raises(FewbitsError, match="unknown metric 'l1'; choose one of cosine, ip, l2"):
        check_metric("l1")


# -- merging -------------------------------------------------------------------------------


def matches(*pairs: tuple[float, int]) -> tuple[np.ndarray, np.ndarray]:
    scores, rows = zip(*pairs, strict=True)
    return np.array([scores], dtype=np.float32), np.array([rows])


def merged(*arguments: object) -> list[tuple[float, int]]:
    scores, rows = merge(*arguments)  # type: ignore[arg-type]
    return list(zip(scores[0].tolist(), rows[0].tolist(), strict=True))


def test_merge_keeps_the_best_in_order() -> None:
    best, block = matches((9, 4), (5, 0), (1, 2)), matches((7, 0), (3, 3), (2, 1))
    assert merged(best, block, 10, 4) == [(9, 4), (7, 10), (5, 0), (3, 13)]
    assert merged(None, block, 10, 2) == [(7, 10), (3, 13)]
    assert merged(best, block, 10, 100)[-1] == (1, 2)


def test_merge_puts_the_earlier_of_equal_matches_first() -> None:
    best, block = matches((5, 3), (5, 1), (2, 0)), matches((5, 0), (5, 2), (2, 1))
    assert merged(best, block, 10, 5) == [(5, 3), (5, 1), (5, 10), (5, 12), (2, 0)]


def test_merge_leaves_missing_rows_missing() -> None:
    lowest = float(np.finfo(np.float32).min)
    best, block = matches((5, 3), (lowest, -1)), matches((7, 0), (lowest, -1))
    assert merged(best, block, 10, 9) == [(7, 10), (5, 3), (lowest, -1), (lowest, -1)]


def test_merge_goes_query_by_query() -> None:
    best = np.array([[5.0, 1.0], [2.0, 1.0]]), np.array([[0, 1], [0, 1]])
    block = np.array([[4.0], [3.0]]), np.array([[0], [0]])
    _, rows = merge(best, block, 2, 2)
    assert rows.tolist() == [[0, 2], [2, 0]]


# -- ordering again ------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_pair_scores_are_those_of_the_definition(metric: str) -> None:
    queries, vectors = data(metric)
    chosen = np.random.default_rng(1).integers(0, ROWS, (QUERIES, 9))
    expected = np.take_along_axis(true_scores(queries, vectors, metric), chosen, axis=1)
    scores = pair_scores(queries, vectors[chosen], metric)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("metric", METRICS)
def test_rescoring_all_rows_is_exact_search(metric: str, batch: int) -> None:
    queries, vectors = data(metric)
    shuffled = np.random.default_rng(1).permuted(np.tile(np.arange(ROWS), (QUERIES, 1)), axis=1)
    _, rows = rescore(queries, shuffled, lambda r: vectors[r], 10, metric, batch=batch)
    np.testing.assert_array_equal(rows, best_rows(true_scores(queries, vectors, metric), 10))


def test_rescoring_far_from_the_origin_stays_exact() -> None:
    queries, vectors = (x + 1000 for x in data("l2"))
    everything = np.tile(np.arange(ROWS), (QUERIES, 1))
    scores, rows = rescore(queries, everything, lambda r: vectors[r], 10, "l2")
    expected = true_scores(queries, vectors, "l2")
    np.testing.assert_array_equal(rows, best_rows(expected, 10))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), rtol=1e-5)


def test_rescoring_asks_for_few_rising_rows_at_a_time() -> None:
    queries, vectors = data("ip")
    asked: list[np.ndarray] = []

    def fetch(rows: np.ndarray) -> np.ndarray:
        asked.append(rows)
        return vectors[rows]

    candidates = np.random.default_rng(1).integers(0, ROWS, (QUERIES, 4))
    rescore(queries, candidates, fetch, 2, "ip", batch=10)
    assert len(asked) == 3
    for number, rows in enumerate(asked):
        assert rows.tolist() == sorted(set(candidates[number * 10 : number * 10 + 10].ravel()))


@pytest.mark.parametrize("metric", METRICS)
def test_missing_rows_stay_last(metric: str) -> None:
    queries, vectors = data(metric)
    candidates = np.tile([-1, 5, -1, 0, 7], (QUERIES, 1))
    scores, rows = rescore(queries, candidates, lambda r: vectors[r], 4, metric)
    expected = np.array([5, 0, 7])[best_rows(true_scores(queries, vectors[[5, 0, 7]], metric), 3)]
    np.testing.assert_array_equal(rows[:, :3], expected)
    assert (rows[:, 3] == -1).all()
    assert (scores[:, 3] == -np.inf).all()
    nothing, _ = rescore(queries, np.full((QUERIES, 2), -1), lambda r: vectors[r], 2, metric)
    assert (nothing == -np.inf).all()
