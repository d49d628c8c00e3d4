"""CacheGen's claim: the verdict follows from the figures; and on real text, loading changes nothing
that can be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewbits
from fewbits.core.language_model import load_language_model
from fewbits.kv.cachegen import CacheGen, read_local, save
from fewbits.reproductions.kv import _measure, cachegen
from fewbits.reproductions.kv.cachegen import (
    SIZES,
    Point,
    absmax,
    bits_at,
    conditions,
    from_anchors,
)


@pytest.fixture(scope="module")
def result() -> Any:
    return cachegen.run("quick")


def rows_of(result: Any) -> dict[str, Any]:
    return {row["method"]: row for row in result.details}


def test_the_verdict_follows_from_the_figures(result: Any) -> None:
    met = conditions(result.figures)
    assert result.system == "cachegen"
    assert result.holds == all(met.values())
    assert all((name in result.reason) != is_met for name, is_met in met.items())
    assert all(math.isfinite(value) for value in result.figures.values())
    assert set(SIZES) == {"quick", "small"}


def test_each_part_of_the_claim_can_fail_alone() -> None:
    good = {
        "times fewer bytes than 8 bits": 3.5,
        "share of bits saved by tables of each layer and channel": 0.05,
        "deadlines missed, levels chosen by chunk": 0.1,
        "deadlines missed, the best fixed level that loses as little": 0.2,
    }
    assert all(conditions(good).values())
    worse = (3.4, 0.04, 0.2, 0.1)
    for (name, _), value in zip(good.items(), worse, strict=True):
        assert list(conditions(good | {name: value}).values()).count(False) == 1


def test_finer_levels_take_more_bits_and_lose_less(result: Any) -> None:
    rows = rows_of(result)
    points = [rows[f"chosen, ×{level:g}"] for level in SIZES["quick"].levels]
    assert [p["bits per number"] for p in points] == sorted(
        (p["bits per number"] for p in points), reverse=True
    )
    assert [p["KL × 1000"] for p in points] == sorted(p["KL × 1000"] for p in points)


def test_opponents_have_the_bytes_they_need(result: Any) -> None:
    """A float16 scale for the 64 numbers of a token: a quarter of a bit."""
    rows = rows_of(result)
    assert rows["float16"]["bits per number"] == 16
    assert rows["8 bits"]["bits per number"] == 8.25
    assert rows["4 bits"]["bits per number"] == 4.25
    for bits in ("8 bits", "4 bits"):
        assert rows[f"{bits}, zstd"]["bits per number"] < rows[bits]["bits per number"]
        assert rows[f"{bits}, zstd"]["KL × 1000"] == rows[bits]["KL × 1000"]


def test_tables_of_layers_and_channels_take_the_fewest_bits(result: Any) -> None:
    name = "bits per number at ×1, means, keys before rotation, own tables: "
    bits = {own: result.baselines[name + own] for own in cachegen.OWN_TABLES}
    assert bits["layer and channel"] == min(bits.values())
    assert bits["none"] == max(bits.values())


def test_absmax_packs_and_decodes() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 2] = 0
    for bits, most in ((8, 127), (4, 7)):
        data, scales, decoded = absmax(x, bits)
        assert (len(data), scales) == (x.numel() * bits // 8, 2 * 2 * 5)
        largest = x.abs().amax(dim=(1, 3), keepdim=True)
        assert bool(((decoded - x).abs() <= 0.51 * largest / most).all())
        assert not decoded[0, :, 2].any()


def test_differences_are_from_the_first_of_the_group() -> None:
    x = np.arange(25, dtype=np.float64)[None, None]
    found = from_anchors(x, chunk=12)[0, 0]
    first = [*range(1, 10), 1]
    assert found.tolist() == [*first, *first, 0][:-1]


def test_bits_between_and_beyond_levels() -> None:
    curve = [Point("", 4.0, 1e-4, 1), Point("", 2.0, 1e-2, 1)]
    assert bits_at(curve, 1e-3) == pytest.approx(3)
    assert bits_at(curve, 1.0) == 2
    assert bits_at(curve, 1e-4 / 4) == pytest.approx(5)


@torch.no_grad()
def test_a_saved_text_goes_on_as_if_it_had_been_read(tmp_path: Path) -> None:
    """192 tokens of real text, 4 query heads to a key head, 32 tokens written."""
    model, tokenizer = load_language_model()
    profile = CacheGen(chunk=96).fit(model, _measure.fitting_texts(tokenizer, 4, 96))
    ids = _measure.test_texts(tokenizer, 1, 193)

    def live() -> Any:
        cache = fewbits.kv.cache(model, "full")
        model(ids[:, :192], past_key_values=cache)
        return cache

    save(live(), tmp_path / "c", profile, ids[0, :192])
    loaded = read_local(tmp_path / "c", model)
    assert loaded.get_seq_length() == 192
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    found, expected = (
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        for cache in (loaded, live())
    )
    assert torch.equal(found, expected)
