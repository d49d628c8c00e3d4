"""Points, the frontier among them, and choosing one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point, best, cheapest, mark_frontier

RECALL = "recall@10"


def point(
    spec: str, size: float, recall: float, *, codec: int = 0, first: float | None = None
) -> Point:
    quality = {RECALL: recall} | ({} if first is None else {"recall@1": first})
    return Point(spec.partition(":")[0], spec, size, codec, 64 / size, quality)


@pytest.fixture
def points() -> list[Point]:
    """Five points in no order; ``pq`` is beaten by ``opq`` and ``float16`` by ``int8``."""
    return [
        point("int8", 16, 0.99, first=0.97),
        point("sign", 2, 0.5, first=0.8),
        point("opq:bytes=4", 4, 0.8, first=0.7),
        point("pq:bytes=4", 4, 0.7, first=0.75),
        point("float16", 32, 0.99, first=1.0),
    ]


def specs(points: list[Point]) -> list[str]:
    return [point.spec for point in points]


# -- the frontier --------------------------------------------------------------------------


def test_points_go_from_small_to_large_with_the_frontier_marked(points: list[Point]) -> None:
    marked = mark_frontier(points, RECALL)
    assert specs(marked) == ["sign", "opq:bytes=4", "pq:bytes=4", "int8", "float16"]
    assert [p.on_frontier for p in marked] == [True, True, False, True, False]
    assert not any(p.on_frontier for p in points)  # the points given stay as they are


def test_another_quality_has_another_frontier(points: list[Point]) -> None:
    marked = mark_frontier(points, "recall@1")
    assert specs([p for p in marked if p.on_frontier]) == ["sign", "int8", "float16"]


def test_of_equal_points_the_one_with_the_smaller_codec_is_marked() -> None:
    given = [point("large", 4, 0.9, codec=100), point("small", 4, 0.9, codec=10)]
    for order in itertools.permutations(given):
        marked = mark_frontier(order, RECALL)
        assert [(p.spec, p.on_frontier) for p in marked] == [("small", True), ("large", False)]


def test_no_points_have_no_frontier() -> None:
    assert mark_frontier([], RECALL) == []


def test_frontier_is_what_nothing_else_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes, recalls = rng.integers(1, 8, 12), rng.integers(0, 8, 12) / 8
        given = [
            point(str(i), float(size), recall, codec=i)
            for i, (size, recall) in enumerate(zip(sizes, recalls, strict=True))
        ]
        for p in mark_frontier(given, RECALL):
            others = [q for q in given if q.spec != p.spec]
            beaten = any(
                (q.bytes_per_item, -q.quality[RECALL], q.codec_bytes)
                < (p.bytes_per_item, -p.quality[RECALL], p.codec_bytes)
                and q.quality[RECALL] >= p.quality[RECALL]
                for q in others
            )
            assert p.on_frontier == (not beaten)


# -- the cheapest --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recall", "spec"),
    [(0.1, "sign"), (0.5, "sign"), (0.51, "opq:bytes=4"), (0.81, "int8"), (0.99, "int8")],
)
def test_cheapest_is_the_smallest_that_is_good_enough(
    points: list[Point], recall: float, spec: str
) -> None:
    assert cheapest(points, {RECALL: recall}).spec == spec


def test_cheapest_keeps_every_quality_asked_for(points: list[Point]) -> None:
    assert cheapest(points, {RECALL: 0.6, "recall@1": 0.72}).spec == "pq:bytes=4"
    assert cheapest(points, {RECALL: 0.6, "recall@1": 0.98}).spec == "float16"


def test_of_equally_small_points_the_cheapest_is_the_better_one() -> None:
    given = [point("a", 4, 0.8), point("b", 4, 0.9, codec=9), point("c", 4, 0.9, codec=1)]
    assert cheapest(given, {RECALL: 0.7}).spec == "c"


def test_quality_that_nothing_keeps_names_the_nearest(points: list[Point]) -> None:
    with pytest.raises(FewbitsError) as caught:
        cheapest(points, {RECALL: 0.995})
    assert str(caught.value) == (
        "nothing that was compared keeps recall@10 at 0.995; "
        "the best is int8 with 0.990 at 16 bytes"
    )


def test_qualities_that_nothing_keeps_together_name_the_nearest(points: list[Point]) -> None:
    given = [p for p in points if p.spec != "float16"]
    with pytest.raises(FewbitsError) as caught:
        cheapest(given, {RECALL: 0.4, "recall@1": 0.98})  # the first alone is kept by many
    assert str(caught.value) == (
        "nothing that was compared keeps recall@10 at 0.4 and recall@1 at 0.98; "
        "the best is int8 with 0.990 and 0.970 at 16 bytes"
    )


# -- the best ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spec"),
    [(2, "sign"), (3.9, "sign"), (4, "opq:bytes=4"), (31, "int8"), (1000, "int8")],
)
def test_best_is_the_one_of_highest_quality_that_fits(
    points: list[Point], size: float, spec: str
) -> None:
    assert best(points, size, RECALL).spec == spec


def test_best_is_by_the_quality_asked_for(points: list[Point]) -> None:
    assert best(points, 4, "recall@1").spec == "sign"
    assert best(points, 1000, "recall@1").spec == "float16"


def test_of_equally_good_points_the_best_is_the_smaller_one() -> None:
    given = [point("a", 8, 0.9), point("b", 4, 0.9, codec=9), point("c", 4, 0.9, codec=1)]
    assert best(given, 100, RECALL).spec == "c"


def test_size_that_nothing_fits_into_names_the_smallest(points: list[Point]) -> None:
    with pytest.raises(FewbitsError) as caught:
        best(points, 1.5, RECALL)
    assert str(caught.value) == (
        "nothing that was compared fits into 1.5 bytes; the smallest is sign with 2"
    )


# -- where less is better ------------------------------------------------------------------


@pytest.fixture
def caches() -> list[Point]:
    """Four points whose divergence falls with size; ``window`` is beaten by ``kivi``."""
    figures = {"window": (8, 0.4), "kivi": (4, 0.02), "full": (32, 0.0), "sign": (2, 1.5)}
    return [Point(n, n, size, 0, 32 / size, {"KL": kl}) for n, (size, kl) in figures.items()]


def test_the_frontier_falls_where_less_is_better(caches: list[Point]) -> None:
    marked = mark_frontier(caches, "KL")
    assert [(p.spec, p.on_frontier) for p in marked] == [
        ("sign", True),
        ("kivi", True),
        ("window", False),
        ("full", True),
    ]


def test_limits_are_the_most_where_less_is_better(caches: list[Point]) -> None:
    assert cheapest(caches, {"KL": 2}).spec == "sign"
    assert cheapest(caches, {"KL": 0.02}).spec == "kivi"
    assert cheapest(caches, {"KL": 0.019}).spec == "full"
    assert best(caches, 8, "KL").spec == "kivi"
    with pytest.raises(FewbitsError, match=r"keeps KL at 0\.01; the best is kivi with 0\.02 at"):
        cheapest(caches[:2], {"KL": 0.01})


# -- what is refused -----------------------------------------------------------------------


def test_quality_that_was_not_measured_is_refused(points: list[Point]) -> None:
    says = "'ndcg@10' was not measured; choose one of recall@10, recall@1"
    with pytest.raises(FewbitsError, match=says):
        best(points, 4, "ndcg@10")
    with pytest.raises(FewbitsError, match=says):
        cheapest(points, {RECALL: 0.5, "ndcg@10": 0.5})


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(FewbitsError, match="there are no points to choose from"):
        best([], 4, RECALL)
    with pytest.raises(FewbitsError, match="there are no points to choose from"):
        cheapest([], {RECALL: 0.5})


def test_point_as_json_has_every_figure() -> None:
    assert point("int8", 16, 0.9).to_json() == {
        "method": "int8",
        "spec": "int8",
        "bytes_per_item": 16,
        "codec_bytes": 0,
        "ratio": 4,
        "quality": {RECALL: 0.9},
        "fit_seconds": 0.0,
        "encode_per_second": 0.0,
        "search_per_second": 0.0,
        "on_frontier": False,
    }
