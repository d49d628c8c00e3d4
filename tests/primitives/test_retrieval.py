import math

import numpy as np
import pytest

from fewbits.primitives.retrieval import hit_rate, mean_reciprocal_rank, ndcg, overlap


def rows(*values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# -- overlap -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "truth", "k", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 3, 1),
        ([3, 1, 2], [1, 2, 3], 3, 1),
        ([3, 1, 7], [1, 2, 3], 3, 2 / 3),
        ([3, 1, 7], [1, 2, 3], 1, 0),
        ([3, 1, 7], [1, 2, 3], 2, 1 / 2),
        ([7, 8, 9], [1, 2, 3], 3, 0),
        ([0], [0, 1, 2, 3], 4, 1 / 4),
    ],
)
def test_overlap_is_the_share_of_the_true_rows_that_are_found(
    found: list[int], truth: list[int], k: int, expected: float
) -> None:
    assert overlap(rows(found), rows(truth), k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([-1, -1, -1], [0, 1, 2], 0),
        ([2, -1, -1], [2, 5, 6], 1 / 3),
        ([-1, 0, -1], [0, -1, -1], 1 / 3),
    ],
)
def test_places_that_found_nothing_match_nothing(
    found: list[int], truth: list[int], expected: float
) -> None:
    assert overlap(rows(found), rows(truth), 3) == pytest.approx(expected)


def test_overlap_is_the_mean_over_queries_and_leaves_its_input_alone() -> None:
    found, truth = rows([5, 1], [2, 0], [9, -1]), rows([1, 5], [0, 3], [7, 8])
    before = found.copy(), truth.copy()
    assert overlap(found, truth, 2) == pytest.approx((1 + 0.5 + 0) / 3)
    np.testing.assert_array_equal(found, before[0])
    np.testing.assert_array_equal(truth, before[1])


def test_overlap_agrees_with_sets() -> None:
    rng = np.random.default_rng(0)
    found = np.stack([rng.permutation(30)[:10] for _ in range(40)])
    truth = np.stack([rng.permutation(30)[:10] for _ in range(40)])
    shares = [
        len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)
    ]
    assert overlap(found, truth, 10) == pytest.approx(np.mean(shares))


# -- one right answer ----------------------------------------------------------------------


def test_hit_rate_counts_queries_whose_answer_is_among_the_first() -> None:
    found = rows([4, 2, 9], [1, 0, 3], [7, -1, -1], [-1, -1, -1])
    answers = np.array([2, 3, 7, 5])
    assert [hit_rate(found, answers, k) for k in (1, 2, 3)] == [0.25, 0.5, 0.75]


def test_mean_reciprocal_rank_is_zero_where_the_answer_was_not_found() -> None:
    found = rows([4, 2, 9], [1, 0, 3], [7, -1, -1], [-1, -1, -1])
    answers = np.array([2, 3, 7, 5])
    assert mean_reciprocal_rank(found, answers) == pytest.approx((1 / 2 + 1 / 3 + 1 + 0) / 4)


# -- graded judgements ---------------------------------------------------------------------


def test_ndcg_by_hand() -> None:
    judged = {0: {10: 3.0, 11: 1.0, 12: 2.0}}
    gained = 1 + 3 / math.log2(4)  # 11 first, 99 is not judged, 10 third
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(rows([11, 99, 10, 12]), judged, 3) == pytest.approx(gained / ideal)
    assert ndcg(rows([10, 12, 11]), judged, 3) == pytest.approx(1)
    assert ndcg(rows([97, 98, 99]), judged, 3) == 0


def test_ndcg_compares_with_the_best_that_k_places_can_hold() -> None:
    judged = {0: {1: 1.0, 2: 1.0, 3: 1.0}}
    assert ndcg(rows([3, 8]), judged, 1) == 1
    assert ndcg(rows([2]), judged, 3) == pytest.approx(1 / (1 + 1 / math.log2(3) + 1 / 2))


def test_documents_judged_alike_may_come_in_any_order() -> None:
    judged = {0: {1: 2.0, 2: 2.0, 3: 1.0}}
    assert ndcg(rows([1, 2, 3]), judged, 3) == ndcg(rows([2, 1, 3]), judged, 3) == 1


def test_places_that_found_nothing_and_negative_judgements_gain_nothing() -> None:
    judged = {0: {1: 1.0, 2: -5.0}}
    assert ndcg(rows([-1, 1]), judged, 2) == pytest.approx(1 / math.log2(3))
    assert ndcg(rows([2, 1]), judged, 2) == pytest.approx(1 / math.log2(3))


def test_only_queries_with_a_relevant_document_count() -> None:
    found = rows([1, 2], [3, 4], [5, 6])
    assert ndcg(found, {0: {1: 1.0}, 1: {3: 0.0}, 2: {6: 1.0}}, 2) == pytest.approx(
        (1 + 1 / math.log2(3)) / 2
    )
    assert ndcg(found, {1: {3: 0.0}}, 2) == 0
    assert ndcg(found, {}, 2) == 0


def test_ndcg_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 4, (20, 15)).astype(float)
    order = np.stack([rng.permutation(15) for _ in range(20)])
    scores = np.empty((20, 15))
    np.put_along_axis(scores, order, np.arange(15, 0, -1.0)[None].repeat(20, axis=0), axis=1)
    judged = {q: dict(enumerate(grades[q].tolist())) for q in range(20)}
    for k in (1, 5, 10):
        assert ndcg(order, judged, k) == pytest.approx(metrics.ndcg_score(grades, scores, k=k))
