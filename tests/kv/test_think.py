"""ThinK: the score, what is really stored, and what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

import fewbits
from fewbits.kv._forms import Channels
from fewbits.kv.think import channel_scores, channels_to_keep


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the score -----------------------------------------------------------------------------


def test_the_score_is_the_norm_of_what_a_channel_adds() -> None:
    queries, keys = drawn(1, 1, 8, 12), drawn(1, 1, 40, 12, seed=1)
    scores = channel_scores(queries, keys)
    for channel in range(12):
        lost = queries[0, 0, :, channel, None] @ keys[0, 0, None, :, channel]
        torch.testing.assert_close(scores[0, 0, channel], lost.norm(), rtol=1e-5, atol=1e-5)


def test_no_other_set_of_channels_loses_less() -> None:
    """The additive objective, against every subset."""
    queries, keys = drawn(1, 1, 8, 10), drawn(1, 1, 30, 10, seed=1) * torch.arange(1, 11)
    kept = set(channels_to_keep(queries, keys, 0.4)[0, 0].tolist())
    squares = channel_scores(queries, keys)[0, 0] ** 2
    assert len(kept) == 6
    lost = {c: sum(float(squares[i]) for i in c) for c in itertools.combinations(range(10), 4)}
    assert set(min(lost, key=lost.__getitem__)) == set(range(10)) - kept


def test_heads_that_share_keys_add_their_squares() -> None:
    queries, keys = drawn(1, 4, 8, 12), drawn(1, 2, 40, 12, seed=1)
    squares = (queries.norm(dim=2) ** 2).reshape(1, 2, 2, 12).sum(dim=2)
    expected = squares.sqrt() * keys.norm(dim=2)
    torch.testing.assert_close(channel_scores(queries, keys), expected)
    swapped = queries[:, [1, 0, 3, 2]]
    assert torch.equal(channels_to_keep(swapped, keys, 0.5), channels_to_keep(queries, keys, 0.5))


def test_rows_of_a_batch_choose_for_themselves() -> None:
    queries = drawn(2, 2, 8, 16)
    queries[0, :, :, :8] *= 10
    queries[1, :, :, 8:] *= 10
    kept = channels_to_keep(queries, drawn(2, 2, 40, 16, seed=1), 0.5)
    assert kept[0].tolist() == [list(range(8))] * 2
    assert kept[1].tolist() == [list(range(8, 16))] * 2


# -- what is stored ------------------------------------------------------------------------


@torch.no_grad()
def filled(model: Any, method: str) -> Any:
    cache = fewbits.kv.cache(model, method)
    model(tokens(), past_key_values=cache)
    return cache


@pytest.mark.parametrize(("ratio", "dropped"), [(0.25, 4), (0.4, 6), (0.5, 8), (0.75, 12)])
def test_bytes_are_those_of_the_channels_kept(llama: Any, ratio: float, dropped: int) -> None:
    """Of 96 tokens 64 are thin; two key heads (not four heads), float32; a byte per channel."""
    cache = filled(llama, f"think:ratio={ratio},recent=32")
    keys = 64 * (16 - dropped) * 4 + 32 * 16 * 4
    values = 96 * 16 * 4
    index = 16 - dropped
    assert cache.nbytes() == 3 * 2 * 2 * (keys + values + index)


@torch.no_grad()
def test_packed_channels_give_what_zeroed_ones_would(llama: Any) -> None:
    real, simulated = filled(llama, "think:ratio=0.5,recent=32"), filled(llama, "full")
    for thin, whole in zip(real.compressed, simulated.compressed, strict=True):
        keys = whole.recent.keys.numbers
        assert isinstance(thin.parts[0].keys, Channels)
        missing = torch.ones(2, 2, 16, dtype=torch.bool)
        missing.scatter_(2, thin.parts[0].keys.kept.long(), False)
        keys[:, :, :64] = keys[:, :, :64].masked_fill(missing[:, :, None], 0)
        torch.testing.assert_close(thin.parts[0].keys.read(), keys[:, :, :64])
    more = tokens(count=6, seed=1)
    found, expected = (llama(more, past_key_values=c).logits for c in (real, simulated))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_new_keys_stay_whole(llama: Any) -> None:
    cache = filled(llama, "think:ratio=0.5,recent=32")
    before = cache.nbytes()
    llama(tokens(count=5, seed=1), past_key_values=cache)
    assert cache.nbytes() - before == 3 * 2 * 2 * 5 * 2 * 16 * 4


def test_a_flushed_block_has_the_channels_of_the_prompt(llama: Any) -> None:
    cache = filled(llama, "think:ratio=0.5,recent=8+kivi:bits=4,group=8,recent=8")
    with torch.no_grad():
        llama(tokens(count=9, seed=1), past_key_values=cache)
    first, second = cache.compressed[0].parts
    assert torch.equal(first.keys.kept, second.keys.kept)
    assert second.keys.held.read().shape == (2, 2, 8, 8)


# -- what it costs -------------------------------------------------------------------------


@torch.no_grad()
def test_its_channels_are_better_than_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.kv import think

    model, more = tiny_model(initializer_range=0.1), tokens(count=32, seed=1)

    def divergence(method: str) -> float:
        full, thin = (
            model(more, past_key_values=filled(model, one)).logits.log_softmax(dim=2)
            for one in ("full", method)
        )
        return float((full.exp() * (full - thin)).sum(dim=2).mean())

    chosen = divergence("think:ratio=0.5,recent=8")
    drawn_ones = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(
            think,
            "channel_scores",
            lambda queries, keys, g=generator: torch.rand(2, 2, 16, generator=g),
        )
        drawn_ones.append(divergence("think:ratio=0.5,recent=8"))
    assert 0 < chosen < sum(drawn_ones) / 3
