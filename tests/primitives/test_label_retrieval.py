import numpy as np
import pytest

import fewbits.primitives.label_retrieval as module
from fewbits.primitives.label_retrieval import (
    average_precision,
    hit_within,
    mean_average_precision,
    precision_within,
    ranked_relevance,
    retrieval_by_labels,
    same_label,
)

YES, NO = True, False


def precision_by_hand(relevant: list[bool], total: int) -> float:
    """The definition, one rank at a time."""
    hits, summed = 0, 0.0
    for rank, is_relevant in enumerate(relevant, start=1):
        if is_relevant:
            hits += 1
            summed += hits / rank
    return summed / total


def collection(queries: int = 30, items: int = 40, classes: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((queries, items))
    return scores, rng.integers(classes, size=queries), rng.integers(classes, size=items)


# -- from ranked relevance -----------------------------------------------------------------


def test_average_precision_of_small_cases() -> None:
    ranked = np.array([[YES, NO, YES, NO], [NO, NO, NO, YES], [NO] * 4, [YES] * 4])
    expected = [(1 + 2 / 3) / 2, 1 / 4, 0, 1]
    np.testing.assert_allclose(average_precision(ranked), expected)
    np.testing.assert_allclose(
        average_precision(ranked, np.array([4, 1, 2, 8])), [(1 + 2 / 3) / 4, 1 / 4, 0, 0.5]
    )


def test_hits_within_k() -> None:
    ranked = np.array([[NO, YES, NO], [YES, NO, NO], [NO, NO, NO]])
    assert hit_within(ranked, 1).tolist() == [NO, YES, NO]
    assert hit_within(ranked, 2).tolist() == [YES, YES, NO]
    assert hit_within(ranked, 9).tolist() == [YES, YES, NO]


# -- from scores ---------------------------------------------------------------------------


def test_it_is_the_definition_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, asked, held = collection()
    expected = []
    for row, label in zip(scores, asked, strict=True):
        ranked = (held[np.argsort(-row)] == label).tolist()
        expected.append(precision_by_hand(ranked, sum(ranked)))
    whole = retrieval_by_labels(scores, asked, held)
    assert whole.mean_average_precision == pytest.approx(np.mean(expected))
    assert mean_average_precision(-scores, asked, held, distances=True) == pytest.approx(
        np.mean(expected)
    )
    assert whole.queries == 30
    first = held[scores.argmax(axis=1)] == asked
    assert whole.cmc[1] == pytest.approx(first.mean())
    monkeypatch.setattr(module, "BLOCK_CELLS", 100)  # two queries at a time
    assert retrieval_by_labels(scores, asked, held) == whole


def test_it_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, asked, held = collection()
    expected = [
        metrics.average_precision_score(held == label, row)
        for row, label in zip(scores, asked, strict=True)
    ]
    assert mean_average_precision(scores, asked, held) == pytest.approx(np.mean(expected))


def test_a_query_does_not_find_itself() -> None:
    scores = np.array([[9.0, 1, 2], [1, 9, 2], [3, 2, 9]])
    labels, itself = np.array([0, 1, 0]), np.arange(3)
    ranked, totals = ranked_relevance(scores, labels, labels, itself=itself)
    assert ranked.tolist() == [[YES, NO, NO], [NO, NO, NO], [YES, NO, NO]]
    assert totals.tolist() == [1, 0, 1]
    found = retrieval_by_labels(scores, labels, labels, ks=(1,), itself=itself)
    assert (found.mean_average_precision, found.cmc, found.queries) == (1, {1: 1.0}, 2)
    assert mean_average_precision(scores, labels, labels) == 1  # each of the three finds itself
    partly = ranked_relevance(scores, labels, labels, itself=np.array([-1, 1, -1]))
    assert partly[1].tolist() == [2, 0, 2]


def test_a_cut_divides_by_what_it_found_or_by_what_there_is() -> None:
    scores, asked, held = np.array([[4.0, 3, 2, 1]]), np.array([1]), np.array([1, 0, 1, 1])
    assert mean_average_precision(scores, asked, held, cut=2) == 1
    assert mean_average_precision(scores, asked, held, cut=2, over="all") == 0.5
    assert mean_average_precision(scores, asked, held, cut=4) == pytest.approx(
        mean_average_precision(scores, asked, held, over="all")
    )
    late = retrieval_by_labels(-scores, asked, np.array([1, 0, 0, 0]), ks=(1,), cut=2)
    assert (late.mean_average_precision, late.cmc[1], late.queries) == (0, 0, 1)
    assert ranked_relevance(scores, asked, held, cut=9)[0].shape == (1, 4)


def test_equal_scores_keep_the_order_of_the_items() -> None:
    distances = np.zeros((1, 4), dtype=np.uint8)
    ranked, _ = ranked_relevance(
        distances, np.array(["b"]), np.array(["a", "b", "b", "a"]), distances=True
    )
    assert ranked.tolist() == [[NO, YES, YES, NO]]


def test_distances_without_a_sign_are_not_wrapped_around() -> None:
    distances = np.array([[0, 200, 3]], dtype=np.uint8)
    ranked, _ = ranked_relevance(distances, np.array([1]), np.array([0, 1, 0]), distances=True)
    assert ranked.tolist() == [[NO, NO, YES]]


def test_items_of_several_classes_are_relevant_when_they_share_one() -> None:
    asked = np.array([[1, 0, 1], [0, 1, 0]])
    held = np.array([[0, 0, 1], [1, 1, 0], [0, 0, 0]])
    assert same_label(asked, held).tolist() == [[YES, YES, NO], [NO, YES, NO]]


def test_precision_within_a_radius() -> None:
    distances = np.array([[0, 1, 2, 3], [3, 3, 4, 5], [0, 2, 2, 2]])
    asked, held = np.array([0, 0, 1]), np.array([0, 0, 1, 1])
    assert precision_within(distances, asked, held) == pytest.approx((2 / 3 + 0 + 2 / 4) / 3)
    assert precision_within(distances, asked, held, 1) == pytest.approx((1 + 0 + 0) / 3)
    without = precision_within(distances, asked, held, itself=np.array([0, -1, 0]))
    assert without == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scores": np.zeros((3, 2))}, "label for each"),
        ({"scores": np.zeros((0, 2)), "query_labels": np.zeros(0)}, "label for each"),
        ({"scores": np.full((2, 2), np.nan)}, "NaN"),
        ({"query_labels": np.zeros((2, 3))}, "indicators"),
        ({"query_labels": np.array([7, 7])}, "no query has"),
        ({"cut": 0, "ks": ()}, "cut must be"),
        ({"cut": 2, "ks": (5,)}, "needs a cut"),
        ({"ks": (0,)}, "k must be"),
        ({"over": "some"}, "found or all"),
        ({"itself": np.array([0])}, "one row number"),
        ({"itself": np.array([0.0, 1.0])}, "one row number"),
        ({"itself": np.array([0, 2])}, "rows below 2"),
        ({"itself": np.array([0, -2])}, "rows below 2"),
    ],
)
def test_bad_input(options: dict[str, object], complaint: str) -> None:
    good = {"scores": np.eye(2), "query_labels": np.arange(2), "item_labels": np.arange(2)}
    with pytest.raises(ValueError, match=complaint):
        retrieval_by_labels(**(good | options))  # type: ignore[arg-type]


def test_bad_relevance() -> None:
    for bad in (np.zeros((2, 3)), np.zeros(3, dtype=bool), np.zeros((2, 0), dtype=bool)):
        with pytest.raises(ValueError, match="booleans"):
            average_precision(bad)
    with pytest.raises(ValueError, match="one per query"):
        average_precision(np.zeros((2, 3), dtype=bool), np.ones(3))
