"""The greedy descent: against a search of everything where it must be optimal, and its rules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewbits.primitives.greedy_budget import Descent, greedy_descent

WEIGHTS = np.array([1.0, 4.0, 9.0, 2.0])


def convex(levels: np.ndarray) -> float:
    """Separable, and each step down costs more than the one before."""
    return float((WEIGHTS * (4.0 - levels) ** 2).sum())


@pytest.mark.parametrize("budget", range(4, 17))
def test_convex_costs_are_met_at_their_least(budget: int) -> None:
    levels = greedy_descent([4] * 4, convex, budget).levels()
    assert levels.sum() == budget
    every = (np.array(c) for c in itertools.product(range(5), repeat=4) if sum(c) <= budget)
    assert convex(levels) == min(map(convex, every))


def test_one_way_serves_every_budget() -> None:
    way = greedy_descent([8, 8, 8, 8], convex, 8, step=2, least=2)
    assert way.levels().tolist() == [2, 2, 2, 2]
    for budget in (32, 24, 16, 12, 8):
        alone = greedy_descent([8, 8, 8, 8], convex, budget, step=2, least=2)
        found = way.within(budget)
        assert found is not None
        assert found.tolist() == alone.levels().tolist()
        assert found.sum() == budget
    assert way.within(7) is None
    assert way.within(100).tolist() == [8] * 4  # type: ignore[union-attr]
    assert way.within(23).sum() == 22  # type: ignore[union-attr]


def test_a_share_of_the_sum_that_rounds_is_met() -> None:
    """0.7 · 30 is 20.999999999999996; the levels that sum to 21 meet it."""
    way = greedy_descent([10, 10, 10], lambda levels: 0.0, 0.7 * 30)
    assert way.levels().sum() == 21
    assert way.within(0.7 * 30).sum() == 21  # type: ignore[union-attr]


def test_levels_stop_at_the_least() -> None:
    way = greedy_descent([5, 5], lambda levels: float(levels[1]), 0, step=2, least=1)
    assert way.levels().tolist() == [1, 1]
    assert way.order == (1, 1, 0, 0)


def test_ties_fall_in_order() -> None:
    assert greedy_descent([2, 2, 2], lambda levels: 0.0, 3).order == (0, 0, 1)


def test_batches_take_the_cheapest_and_stop_at_the_budget() -> None:
    calls = []

    def cost(levels: np.ndarray) -> float:
        calls.append(levels.tolist())
        return convex(levels)

    way = greedy_descent([4] * 4, cost, 13, batch=2)
    assert way.order == (0, 3, 0)
    assert len(calls) == 8
    told = []
    greedy_descent([4] * 4, convex, 13, batch=2, told=lambda: told.append(1))
    assert len(told) == 8


def test_a_budget_that_is_met_costs_nothing() -> None:
    def never(levels: np.ndarray) -> float:
        raise AssertionError

    assert greedy_descent([3, 3], never, 6).order == ()


def test_bad_numbers_are_refused() -> None:
    for start, options in (([], {}), ([1], {"step": 0}), ([1], {"batch": 0}), ([[1]], {})):
        with pytest.raises(ValueError, match="too few"):
            greedy_descent(start, convex, 0, **options)
    with pytest.raises(ValueError, match="NaN"):
        greedy_descent([1, 1], lambda levels: np.nan, 0)


def test_levels_on_the_way() -> None:
    way = Descent(np.array([4, 4]), 2, (1, 0, 1))
    assert [way.levels(count).tolist() for count in range(4)] == [[4, 4], [4, 2], [2, 2], [2, 0]]
