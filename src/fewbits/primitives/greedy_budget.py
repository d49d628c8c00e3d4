"""Spend a budget unevenly: lower, again and again, the level whose lowering costs least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Cost = Callable[[np.ndarray], float]
"""What (n,) levels cost; lower is better."""


@dataclass(frozen=True)
class Descent:
    """How levels were lowered, step after step.

    Attributes
    ----------
    start : (n,) int64, where they began.
    step : by how much a level falls at a time.
    order : the entries in the order in which they fell; an entry may occur often.
    """

    start: np.ndarray
    step: int
    order: tuple[int, ...]

    def levels(self, count: int | None = None) -> np.ndarray:
        """(n,) int64 after the first `count` steps, or after all."""
        fallen = np.bincount(
            np.array(self.order[:count], dtype=np.int64), minlength=len(self.start)
        )
        return self.start - self.step * fallen

    def within(self, budget: float) -> np.ndarray | None:
        """(n,) the first levels on the way whose sum is at most `budget`; None if none is."""
        # A little slack: a budget is a share times a sum, and rounds.
        lacking = math.ceil((int(self.start.sum()) - budget) / self.step - 1e-9)
        return self.levels(max(lacking, 0)) if lacking <= len(self.order) else None


def greedy_descent(
    start: Sequence[int] | np.ndarray,
    cost: Cost,
    budget: float,
    *,
    step: int = 1,
    least: int = 0,
    batch: int = 1,
    told: Callable[[], None] = lambda: None,
) -> Descent:
    """Lower levels until their sum is at most `budget`.

    In each round every level that can fall is lowered alone, and the one with the smallest cost
    stays down. The way down serves every budget above the last one, too.

    Parameters
    ----------
    start : (n,) whole numbers.
    cost : called for at most n levels in each round.
    step, least : a level falls by `step`, and never below `least`.
    batch : so many levels stay down in each round, the cheapest ones; more is faster and less
        exact, as their costs are taken one by one.
    told : called after each call of `cost`, to show progress.

    Raises
    ------
    ValueError
        Numbers out of range, or a cost that is NaN.

    Notes
    -----
    ⌈steps / batch⌉ · n calls of `cost`. The budget may be out of reach: then every level ends as
    low as it can.
    """
    levels = np.array(start, dtype=np.int64)
    if levels.ndim != 1 or len(levels) == 0 or step < 1 or batch < 1:
        raise ValueError(f"levels of shape {levels.shape}, {step=}, {batch=}: too few of them")
    descent = Descent(levels.copy(), step, ())
    while levels.sum() > budget * (1 + 1e-12):
        able = np.flatnonzero(levels - step >= least)
        if len(able) == 0:
            break
        costs = np.array([lowered(levels, entry, step, cost, told) for entry in able.tolist()])
        if np.isnan(costs).any():
            raise ValueError("the cost of some levels is NaN")
        lacking = math.ceil((levels.sum() - budget) / step - 1e-9)
        best = able[np.argsort(costs, kind="stable")[: min(batch, lacking)]]
        levels[best] -= step
        descent = Descent(descent.start, step, (*descent.order, *best.tolist()))
    return descent


def lowered(
    levels: np.ndarray, entry: int, step: int, cost: Cost, told: Callable[[], None]
) -> float:
    """The cost with one entry lowered."""
    changed = levels.copy()
    changed[entry] -= step
    found = cost(changed)
    told()
    return found
