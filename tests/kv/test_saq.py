"""SAQ: bits fall with age, block by block, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._forms import Exact, Part
from fewbits.kv._quantized import Grouped
from fewbits.kv.saq import joined_parts, with_bits


@torch.no_grad()
def filled(model: Any, method: str, count: int = 96) -> Any:
    cache = fewbits.kv.cache(model, method)
    model(tokens(count=count), past_key_values=cache)
    return cache


def bits_held(cache: Any) -> list[tuple[int, int]]:
    """Bits and tokens of each part, oldest first."""
    return [(part.keys.bits, part.tokens) for part in cache.compressed[0].parts]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (15, []),
        (16, [(8, 16)]),
        (40, [(4, 16), (8, 16)]),
        (48, [(2, 16), (4, 16), (8, 16)]),
        (96, [(2, 64), (4, 16), (8, 16)]),
    ],
)
def test_bits_fall_with_age(llama: Any, count: int, expected: list[tuple[int, int]]) -> None:
    cache = filled(llama, "saq:stairs=8-4-2,block_size=16,group=16", count)
    assert bits_held(cache) == expected
    assert cache.compressed[0].recent.tokens == count % 16


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (32, [(8, 16), (8, 16)]),
        (48, [(4, 16), (8, 16), (8, 16)]),
        (64, [(2, 16), (4, 16), (8, 16), (8, 16)]),
        (96, [(2, 48), (4, 16), (8, 16), (8, 16)]),
    ],
)
def test_no_block_skips_a_step(llama: Any, count: int, expected: list[tuple[int, int]]) -> None:
    cache = filled(llama, "saq:stairs=8-8-4-2,block_size=16,group=16", count)
    assert bits_held(cache) == expected


@torch.no_grad()
def test_blocks_step_down_as_tokens_come(llama: Any) -> None:
    method = "saq:stairs=8-4-2,block_size=16,group=16"
    grown = filled(llama, method, 40)
    more = tokens(count=60)
    for place in range(40, 60):
        llama(more[:, place : place + 1], past_key_values=grown)
    assert bits_held(grown) == [(2, 16), (4, 16), (8, 16)]
    assert grown.compressed[0].recent.tokens == 12


def test_one_step_is_kivi_without_a_window(llama: Any) -> None:
    saq = filled(llama, "saq:stairs=4,block_size=16,group=16")
    kivi = filled(llama, "kivi:bits=4,group=16,recent=0")
    assert saq.nbytes() == kivi.nbytes()
    for one, other in zip(saq.compressed, kivi.compressed, strict=True):
        joined = torch.cat([part.keys.read() for part in one.parts], dim=2)
        torch.testing.assert_close(joined, other.parts[0].keys.read())


def test_bytes_follow_the_stairs(llama: Any) -> None:
    cache = filled(llama, "saq:stairs=8-4-2,block_size=16,group=16")
    codes = 64 * 4 + 16 * 8 + 16 * 16  # 2, 4 and 8 bits of sixteen channels
    groups = 96 // 16 * 16 * 2 * 4  # scale and least value, float32
    assert cache.nbytes() == 3 * 2 * 2 * 2 * (codes + groups)


def test_a_step_down_costs_at_most_half_a_coarse_step() -> None:
    numbers = torch.randn(1, 2, 32, 8)
    fine = Part(Grouped.of(numbers, 8, 16, 2), Grouped.of(numbers, 8, 16, 3))
    coarse = with_bits(fine, 2)
    step = coarse.keys.scale.repeat_interleave(16, dim=2)  # type: ignore[attr-defined]
    assert ((coarse.keys.read() - fine.keys.read()).abs() <= step / 2 + 1e-5).all()
    assert with_bits(fine, 8).keys is fine.keys


def test_parts_join_with_their_padding() -> None:
    numbers = torch.randn(1, 2, 16, 8)
    plain = Part(Grouped.of(numbers, 2, 16, 2), Grouped.of(numbers, 2, 8, 3))
    marks = torch.ones(1, 1, 16, dtype=torch.bool)
    marks[..., :3] = False
    (joined,) = joined_parts([Part(plain.keys, plain.values, marks), plain])
    assert joined.tokens == 32
    assert joined.valid is not None
    assert joined.valid.sum() == 29
    expected = torch.cat([plain.values.read()] * 2, dim=2)
    torch.testing.assert_close(joined.values.read(), expected)
    assert joined_parts([]) == []


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("saq:stairs=2-4", "bits that do not rise"),
        ("saq:stairs=16-4", "bits that do not rise"),
        ("saq:stairs=a", "bits that do not rise"),
        ("saq:stairs=", "bits that do not rise"),
        ("saq:block_size=30", "group must divide block_size"),
        ("saq:group=0", "group must divide block_size"),
    ],
)
def test_stairs_that_make_no_sense_are_refused(llama: Any, method: str, says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        fewbits.kv.cache(llama, method)


def test_other_forms_are_left_alone() -> None:
    exact = Exact(torch.randn(1, 1, 4, 4))
    assert with_bits(Part(exact, exact), 2).keys is exact
