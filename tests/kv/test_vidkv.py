"""VidKV: its one-bit and ternary codes, its split of channels, and what is really stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Memory
from fewbits.kv._quantized import Grouped
from fewbits.kv.vidkv import (
    Signs,
    SplitChannels,
    SplitTokens,
    Ternary,
    VidKV,
    match_question,
    protected,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(form: Any, numbers: torch.Tensor) -> float:
    return float((form.read() - numbers).square().mean())


# -- codes ---------------------------------------------------------------------------------


def test_a_bit_is_plus_or_minus_the_best_scale() -> None:
    numbers = drawn(1, 1, 32, 1)
    form = Signs.of(numbers, 32)
    assert set(form.read().unique().tolist()) == {-float(form.scale), float(form.scale)}
    grid = torch.linspace(0.1, 2, 400)
    errors = torch.stack([(numbers - scale * numbers.sign()).square().mean() for scale in grid])
    assert float(grid[errors.argmin()]) == pytest.approx(float(form.scale), abs=0.01)


def test_ternary_lies_between_one_and_two_bits() -> None:
    numbers = drawn(2, 3, 64, 16)
    one = error(Signs.of(numbers, 32), numbers)
    trits = error(Ternary.of(numbers, 32, "nonzero"), numbers)
    two = error(Grouped.of(numbers, 2, 32, along=2), numbers)
    assert two < trits < one
    assert trits < error(Ternary.of(numbers, 32, "mean"), numbers)


def test_ternary_has_three_values_in_each_group() -> None:
    numbers = drawn(1, 2, 64, 4)
    form = Ternary.of(numbers, 32, "mean")
    read = form.read()
    assert len(read[0, 0, :32, 0].unique()) == 3
    mean = numbers.abs().unflatten(2, (2, 32)).mean(dim=3)
    torch.testing.assert_close(form.scale, mean)
    small = numbers.abs() <= mean.repeat_interleave(32, dim=2) / 2
    assert torch.equal(read == 0, small)


@pytest.mark.parametrize("key_bits", [1.0, 1.25, 1.5, 2.0])
def test_wide_channels_get_two_bits(key_bits: float) -> None:
    keys = drawn(1, 2, 32, 16) * torch.arange(1, 17)
    form = VidKV(key_bits=key_bits).encode_keys(keys, Memory(0, 1))
    assert isinstance(form, SplitChannels)
    count = int((key_bits - 1) * 16)
    assert form.wide == count
    spread = (keys.amax(dim=(1, 2)) - keys.amin(dim=(1, 2)))[0]
    assert set(form.order[0, 0, :count].tolist()) == set(spread.topk(count).indices.tolist())


def test_scores_are_those_of_what_is_read() -> None:
    keys, queries = drawn(2, 2, 64, 16), drawn(2, 2, 5, 16, seed=1)
    for key_bits in (1.0, 1.5, 2.0):
        form = VidKV(key_bits=key_bits).encode_keys(keys, Memory(0, 1))
        expected = queries @ form.read().transpose(2, 3)
        torch.testing.assert_close(form.scores(queries), expected, rtol=1e-4, atol=1e-4)


def test_at_full_precision_split_and_transform_change_nothing() -> None:
    """Eight bits in the frequency domain are as good as eight bits per channel."""
    from fewbits.primitives.real_fourier import inverse_real_fourier, real_fourier

    keys = drawn(1, 2, 64, 15)
    plain = Grouped.of(keys, 8, 32, along=2).read()
    spectrum = Grouped.of(real_fourier(keys), 8, 32, along=2).read()
    apart = float((inverse_real_fourier(spectrum) - keys).square().mean())
    assert apart < 3 * float((plain - keys).square().mean())


def test_the_transform_evens_out_rare_large_numbers() -> None:
    keys = drawn(1, 1, 64, 16) ** 3
    with_it = VidKV(key_bits=1.0).encode_keys(keys, Memory(0, 1))
    without = VidKV(key_bits=1.0, transform=False).encode_keys(keys, Memory(0, 1))
    assert error(with_it, keys) < error(without, keys)


# -- protected tokens ----------------------------------------------------------------------


def test_protected_tokens_get_two_bits_and_stay_in_order() -> None:
    values = drawn(2, 2, 128, 8)
    scores = torch.rand(2, 128, generator=torch.Generator().manual_seed(1))
    scores[:, :10] = -torch.inf  # text
    form = protected(values, scores, 0.3, 32, lambda x: Ternary.of(x, 32, "nonzero"))
    assert isinstance(form, SplitTokens)
    assert (form.first.tokens, form.second.tokens) == (32, 96)
    read, best = form.read(), scores.topk(32, dim=1).indices
    for row in range(2):
        chosen = torch.zeros(128, dtype=torch.bool)
        chosen[best[row]] = True
        lost = (read[row] - values[row]).square().mean(dim=(0, 2))
        assert lost[chosen].mean() < 0.9 * lost[~chosen].mean()
    weights = torch.rand(2, 2, 3, 128)
    torch.testing.assert_close(form.mix(weights), weights @ read)


def test_too_few_visual_tokens_protect_none() -> None:
    values, scores = drawn(1, 1, 64, 8), torch.full((1, 64), -torch.inf)
    form = protected(values, scores, 0.5, 32, lambda x: Ternary.of(x, 32, "mean"))
    assert isinstance(form, Ternary)


def test_the_match_with_a_question_is_a_mean_inner_product() -> None:
    visual, question = drawn(2, 5, 8), drawn(2, 3, 8, seed=1)
    expected = (visual @ question.transpose(1, 2)).mean(dim=2)
    torch.testing.assert_close(match_question(visual, question), expected)


# -- in a cache ----------------------------------------------------------------------------


@torch.no_grad()
def filled(model: Any, method: str, **about: torch.Tensor) -> Any:
    cache = fewbits.kv.cache(model, method)
    if about:
        cache.tell(**about)
    model(tokens(), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("method", "keys", "values"),
    [
        # 96 tokens, 16 channels, float32 scales: codes, then one or two floats a group.
        ("vidkv:key_bits=1.5", 96 * 2 + 6 * 8 * 4 + 96 * 1 + 3 * 8 * 4, 96 * 4 + 3 * 16 * 4),
        ("vidkv:key_bits=1", 96 * 2 + 3 * 16 * 4, 96 * 4 + 3 * 16 * 4),
        ("vidkv:key_bits=2,value_bits=2", 96 * 4 + 6 * 16 * 4, 96 * 4 + 6 * 16 * 4),
    ],
)
def test_bytes_follow_their_formula(llama: Any, method: str, keys: int, values: int) -> None:
    order = 16 / 2  # a byte per channel, shared by the two key heads
    assert filled(llama, method).nbytes() == 3 * 2 * 2 * (keys + values + order)


def test_what_is_told_of_the_prompt_decides_what_is_protected(llama: Any) -> None:
    scores = torch.rand(2, 96, generator=torch.Generator().manual_seed(1))
    method = "vidkv:key_bits=2,protect=0.4"
    told, silent = filled(llama, method, importance=scores), filled(llama, method)
    for part in (layer.parts[0] for layer in told.compressed):
        assert isinstance(part.values, SplitTokens)
        assert part.values.first.tokens == 32
    assert told.nbytes() > silent.nbytes()
    assert not told.compressed[0].memories[0].told


@torch.no_grad()
def test_new_tokens_collect_before_they_are_quantised(llama: Any) -> None:
    cache = filled(llama, "vidkv:group=16,residual=32")
    more = tokens(count=33, seed=1)
    for place in range(33):
        llama(more[:, place : place + 1], past_key_values=cache)
        held = cache.compressed[0]
        assert held.recent.tokens == (place + 1) % 32
    assert [part.tokens for part in held.parts] == [96, 32]


@torch.no_grad()
def divergence(model: Any, method: str, **about: torch.Tensor) -> float:
    more = tokens(count=32, seed=1)
    full, small = (
        model(more, past_key_values=filled(model, one, **told)).logits.log_softmax(dim=2)
        for one, told in (("full", {}), (method, about))
    )
    return float((full.exp() * (full - small)).sum(dim=2).mean())


def test_more_bits_cost_less() -> None:
    model = tiny_model(initializer_range=0.1)
    two = divergence(model, "vidkv:key_bits=2,value_bits=2")
    between = divergence(model, "vidkv:key_bits=1.5")
    one = divergence(model, "vidkv:key_bits=1")
    assert 0 < two < between < one


def test_the_faults_of_the_published_code_can_be_compared_with() -> None:
    keys = drawn(1, 2, 64, 16)
    quirks, ours = VidKV(key_bits=1, official_quirks=True), VidKV(key_bits=1)
    wrong, right = (one.encode_keys(keys, Memory(0, 1)) for one in (quirks, ours))
    assert isinstance(wrong, SplitChannels)
    assert isinstance(right, SplitChannels)
    bits = [dict(form.second.tensors())["held.bits"].nbytes for form in (wrong, right)]
    assert bits[0] == 2 * bits[1]
    assert error(wrong, keys) > error(right, keys)
    plain = VidKV(key_bits=1, transform=False, official_quirks=True)
    assert (plain.encode_keys(keys, Memory(0, 1)).read() >= 0).all()
    read = quirks.encode_values(keys, Memory(0, 1)).read()
    assert set(read.unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("key_bits=0.9", "key_bits=0.9 must be from 1 to 2"),
        ("key_bits=2.5", "must be from 1 to 2"),
        ("value_bits=3", "value_bits='3' is not valid"),
        ("protect=2", "protect=2.0 must be from 0 to 1"),
        ("residual=40", "residual must be a multiple of group"),
        ("group=0", "residual must be a multiple"),
    ],
)
def test_options_that_make_no_sense_are_refused(llama: Any, options: str, says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        fewbits.kv.cache(llama, f"vidkv:{options}")
