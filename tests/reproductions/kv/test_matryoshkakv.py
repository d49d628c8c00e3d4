"""MatryoshkaKV's claim: the verdict follows from the figures, at bytes that are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fewbits.reproductions.kv import matryoshkakv
from fewbits.reproductions.kv._measure import Cost
from fewbits.reproductions.kv.matryoshkakv import (
    ALONE,
    BUDGETS,
    LATER,
    PRINCIPAL,
    SEARCHED,
    TRAINED,
    conditions,
    named,
)

METHODS = (PRINCIPAL, TRAINED, SEARCHED, ALONE, LATER)


@pytest.fixture(scope="module")
def result() -> Any:
    return matryoshkakv.run("quick")


def test_the_verdict_follows_from_the_figures(result: Any) -> None:
    assert result.system == "matryoshkakv"
    assert result.holds == (result.reason == "")
    assert len(result.baselines) == 3 * 2 * len(BUDGETS)
    assert all(value >= -1e-3 for value in result.figures.values())


def test_all_methods_hold_the_bytes_of_the_budget(result: Any) -> None:
    rows = {row["method"]: row for row in result.details}
    assert len(rows) == len(METHODS) * len(BUDGETS)
    for method in METHODS:
        for keep in BUDGETS:
            assert rows[named(method, keep)]["share of bytes"] == keep
        assert rows[named(method, 1.0)]["KL × 1000"] == pytest.approx(0, abs=0.01)
        assert rows[named(method, 0.25)]["KL × 1000"] > rows[named(method, 0.75)]["KL × 1000"]


def test_each_part_of_the_claim_can_fail_alone() -> None:
    each = np.array([0.9, 1.0, 1.1, 1.0])

    def cost(method: str, keep: float, factor: float = 1.0, share: float | None = None) -> Cost:
        lost = {PRINCIPAL: 1.2, TRAINED: 1.0, SEARCHED: 0.9, ALONE: 1.1, LATER: 1.2}[method]
        return Cost(each * factor * lost * (1 - keep), 9.0, keep if share is None else share)

    good = {named(method, keep): cost(method, keep) for method in METHODS for keep in BUDGETS}
    prompts = {named(m, keep): v for m, v in ((TRAINED, 2.0), (SEARCHED, 1.0)) for keep in BUDGETS}
    assert all(conditions(good, prompts).values())
    spoilt = {
        named(PRINCIPAL, 0.25): cost(PRINCIPAL, 0.25, 0.8),
        named(PRINCIPAL, 0.375): cost(PRINCIPAL, 0.375, 0.8),
        named(TRAINED, 1.0): cost(TRAINED, 0.0),
        named(ALONE, 0.25): cost(ALONE, 0.25, 0.8),
        named(SEARCHED, 0.75): cost(SEARCHED, 0.75, 1.2),
        named(SEARCHED, 0.5): cost(SEARCHED, 0.5, share=0.51),
    }
    for name, other in spoilt.items():
        assert list(conditions(good | {name: other}, prompts).values()).count(False) == 1
    worse = prompts | {named(SEARCHED, 0.5): 2.1}
    assert list(conditions(good, worse).values()).count(False) == 1


def test_being_ahead_on_some_texts_by_chance_is_not_enough() -> None:
    """Two standard errors of the paired difference."""
    noisy = {
        named(method, keep): Cost(np.array(values) * (1 - keep), 9.0, keep)
        for method, values in (
            (PRINCIPAL, [1.0, 2.0, 1.5, 1.0]),
            (TRAINED, [1.3, 1.0, 1.4, 1.2]),
            (SEARCHED, [1.0, 1.0, 1.0, 1.0]),
            (ALONE, [2.0, 2.0, 2.0, 2.0]),
        )
        for keep in BUDGETS
    }
    prompts = {named(m, keep): 1.0 for m in (TRAINED, SEARCHED) for keep in BUDGETS}
    failed = [name for name, met in conditions(noisy, prompts).items() if not met]
    assert failed == ["ahead of PCA at 37.5%", "ahead of PCA at 25.0%"]
