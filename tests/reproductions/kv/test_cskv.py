"""CSKV's claim: the verdict follows from the figures, and sizes are real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fewbits.reproductions.kv import cskv
from fewbits.reproductions.kv.cskv import FITS, SIZES, conditions, named


@pytest.fixture(scope="module")
def result() -> Any:
    return cskv.run("quick")


def rows_of(result: Any) -> dict[str, Any]:
    return {row["method"]: row for row in result.details if "method" in row}


def test_the_verdict_follows_from_the_figures(result: Any) -> None:
    assert result.system == "cskv"
    assert result.holds == (result.reason == "")
    assert all(value >= -1e-3 for value in result.figures.values())


def test_features_cost_less_than_components_of_rotated_heads(result: Any) -> None:
    rows = rows_of(result)
    rival = rows["PCA, 0.25"]
    for fit in FITS:
        own = rows[named(fit, 0.25, window=False)]
        assert 0 < own["KL × 1000"] < 0.5 * rival["KL × 1000"]
        assert own["share of bytes"] == pytest.approx(rival["share of bytes"], abs=1e-3)


def test_sizes_are_those_of_the_densities(result: Any) -> None:
    rows = rows_of(result)
    assert rows["whole"]["share of bytes"] == 1
    assert rows["tight"]["share of bytes"] == 0.1875  # 96 tokens are three whole windows
    for fit in FITS:
        assert rows[named(fit, 0.25)]["share of bytes"] == 0.25
    # Codes of 4 bits; two floats for 32 tokens of a channel, and for 16 channels of a value.
    keys, values = 0.5 * (4 + 64 / 32) / 32, 0.5 * (4 + 64 / 16) / 32
    assert rows["4 bits, 0.5"]["share of bytes"] == pytest.approx((keys + values) / 2, abs=1e-4)


def test_keys_are_of_lower_rank_before_the_rotary_embedding(result: Any) -> None:
    before, behind, _ = (row for row in result.details if "method" not in row)
    for what, share in before.items():
        if what.startswith("energy"):
            assert behind[what] < share <= 1


def test_each_part_of_the_claim_can_fail_alone() -> None:
    """From costs that meet all parts, each is spoilt by one figure."""
    from fewbits.kv.evaluation import Cost

    def cost(name: str, share: float, divergence: float) -> Cost:
        return Cost(name, divergence, 10 + divergence, 1.0, 1.0, 1.0, share, 1.0, 1.0)

    plan = replace(SIZES["quick"], densities=(0.25,))
    order = {"trained": 0.1, "ASVD": 0.2, "SVD": 0.3}
    good = {"whole": cost("whole", 1, 0), "tight": cost("tight", 0.2, 0.1)}
    for fit, lost in order.items():
        good[named(fit, 0.25)] = cost(fit, 0.25, lost)
        good[named(fit, 0.25, window=False)] = cost(fit, 0.25, 2 * lost)
    good |= {"PCA, 0.25": cost("PCA", 0.25, 0.3), "4 bits, 0.5": cost("4 bits", 0.1, 0.1)}
    good["KIVI, 2 bits"] = cost("KIVI", 0.1, 0.2)
    assert all(conditions(good, plan).values())
    spoilt = {
        "tight": (cost("", 0.21, 0.1), cost("", 0.2, 0.9)),
        "PCA, 0.25": (cost("", 0.2, 0.3), cost("", 0.25, 0.15)),
        "KIVI, 2 bits": (cost("", 0.09, 0.2), cost("", 0.1, 0.05)),
        named("SVD", 0.25): (cost("", 0.25, 0.15),),
        named("ASVD", 0.25, window=False): (cost("", 0.25, 0.15),),
    }
    for name, others in spoilt.items():
        for other in others:
            assert list(conditions(good | {name: other}, plan).values()).count(False) == 1
