"""The claims of the room kv, in their quick form: that they run, and that verdicts are computed."""

from __future__ import annotations

import importlib
import math

import pytest

from fewbits.core.reproduction import Reproduction, reproduce
from fewbits.reproductions.kv import prefixkv, saq, think, vidkv
from fewbits.reproductions.kv._measure import Cost

NAMES = ("prefixkv", "saq", "think", "vidkv")


@pytest.fixture(scope="module", params=NAMES)
def result(request: pytest.FixtureRequest) -> Reproduction:
    return reproduce(request.param, "quick")


def test_figures_are_finite_and_a_failure_is_named(result: Reproduction) -> None:
    for value in (*result.figures.values(), *result.baselines.values()):
        assert math.isfinite(value)
    assert result.figures
    assert result.baselines
    assert result.details
    assert result.data
    assert result.holds == (not result.reason)


def test_no_cache_is_larger_than_the_whole_one(result: Reproduction) -> None:
    assert all(0 < row["share of bytes"] <= 1.01 for row in result.details)
    assert all(row["KL × 1000"] >= -1e-3 for row in result.details)


@pytest.mark.parametrize("name", NAMES)
def test_the_real_size_is_larger(name: str) -> None:
    sizes = importlib.import_module(f"fewbits.reproductions.kv.{name}").SIZES
    assert set(sizes) == {"quick", "small"}


def cost(divergence: float, share: float = 0.5, perplexity: float = 10.0) -> Cost:
    import numpy as np

    return Cost(np.full(4, divergence), perplexity, share)


def test_the_claim_of_think_can_fail() -> None:
    plan = think.Size(rows=1, prompt=100, scored=1, ratios=(0.5,), seeds=1)
    found = {
        "ThinK, 0.5": cost(1.0),
        "key norm, 0.5": cost(2.0),
        "random channels, 0.5": cost(3.0),
        "SnapKV": cost(1.0),
        "SnapKV + ThinK": cost(1.1, 0.38),
        "SnapKV of as many bytes": cost(1.2, 0.38),
    }
    assert all(think.conditions(found, think.chain_figures(found), plan).values())
    for name in ("ThinK, 0.5", "SnapKV + ThinK"):
        worse = found | {name: cost(9.0, perplexity=99.0)}
        assert not all(think.conditions(worse, think.chain_figures(worse), plan).values())


def test_the_claim_of_vidkv_can_fail() -> None:
    names = [*vidkv.methods(), *(f"1.5/1.66, {x} tokens" for x in ("matching", "attended"))]
    good = dict.fromkeys(names, cost(1.0)) | {
        "2/2": cost(0.5),
        "KIVI 2 bits": cost(0.6),
        "1/1.58": cost(2.0),
        "1.5/1.58, random channels": cost(1.5),
        "1.5/1.58, no transform": cost(1.5),
        "1.5/1.58, values per token": cost(1.5),
        "1.5/1.66, random tokens": cost(1.5),
    }
    assert all(vidkv.conditions(good).values())
    assert not any(vidkv.conditions(dict.fromkeys(good, cost(1.0)) | {"2/2": cost(2.0)}).values())


def test_stairs_that_rise_take_as_many_bytes() -> None:
    result = saq.run("quick")
    shares = {row["method"]: row["share of bytes"] for row in result.details}
    assert shares["stairs 8-4-2"] == shares["rising 2-4-8"]
    assert shares["2 bits"] < shares["stairs 8-4-2"] < shares["8 bits"]


def test_as_many_tokens_are_drawn_in_every_layer() -> None:
    from tiny_models import tiny_model, tokens

    import fewbits

    model = tiny_model()
    cache = fewbits.kv.cache(model, prefixkv.RandomTokens(0.25))
    model(tokens(), past_key_values=cache)
    assert {layer.tokens_held for layer in cache.compressed} == {24}
