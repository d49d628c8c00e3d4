"""Attention in pieces is attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.primitives import partial_attention
from fewbits.primitives.partial_attention import Partial, attend, causal, fold, join, unfold


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def over(queries: Tensor, keys: Tensor, values: Tensor, **options: object) -> Partial:
    return attend(
        queries,
        lambda rows: rows @ keys.transpose(2, 3),
        lambda weights: weights @ values,
        keys.shape[2],
        0.25,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(2, 3, 10, 16), drawn(2, 3, 40, 16, seed=1), drawn(2, 3, 40, 16, seed=2)


def test_one_piece_is_softmax_attention(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    expected = torch.softmax(queries @ keys.transpose(2, 3) / 4, dim=3) @ values
    torch.testing.assert_close(join([over(queries, keys, values)]), expected)


@pytest.mark.parametrize("cuts", [[40], [7, 33], [1, 2, 37], [10] * 4])
def test_pieces_join_to_the_whole(qkv: tuple[Tensor, Tensor, Tensor], cuts: list[int]) -> None:
    queries, keys, values = qkv
    pieces = zip(keys.split(cuts, dim=2), values.split(cuts, dim=2), strict=True)
    found = join([over(queries, k, v) for k, v in pieces])
    torch.testing.assert_close(found, join([over(queries, keys, values)]))


def test_large_scores_neither_overflow_nor_vanish(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    found = join([over(200 * queries, keys[:, :, :20], values[:, :, :20])] * 2)
    assert torch.isfinite(found).all()


def test_what_may_not_be_seen_has_no_weight(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    allowed = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    allowed[..., 30:] = False
    found = over(queries, keys, values, allowed=allowed)
    expected = over(queries, keys[:, :, :30], values[:, :, :30])
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.log_mass, expected.log_mass)


def test_a_row_that_sees_nothing_is_zero(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    none = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    empty = over(queries, keys, values, allowed=none)
    assert (empty.log_mass == -math.inf).all()
    assert (join([empty]) == 0).all()
    assert (join([empty, empty]) == 0).all()
    whole = over(queries, keys, values)
    torch.testing.assert_close(join([empty, whole]), whole.output)


def test_rows_are_done_in_blocks(
    qkv: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys, values = qkv
    allowed = causal(10, 1, queries.device)
    few = keys[:, :, :10], values[:, :, :10]
    expected = over(queries, *few, allowed=allowed)
    monkeypatch.setattr(partial_attention, "BLOCK_SCORES", 2 * 3 * 10 * 3)
    torch.testing.assert_close(over(queries, *few, allowed=allowed).output, expected.output)


def test_the_cap_bends_scores(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    scores = 2 * torch.tanh(queries @ keys.transpose(2, 3) / 4 / 2)
    expected = torch.softmax(scores, dim=3) @ values
    torch.testing.assert_close(over(queries, keys, values, cap=2.0).output, expected)


def test_heads_that_share_a_key_head_become_its_rows() -> None:
    queries = drawn(2, 6, 5, 4)
    rows = fold(queries, 2)
    assert rows.shape == (2, 2, 15, 4)
    assert torch.equal(rows[:, 1, 5:10], queries[:, 4])
    assert torch.equal(unfold(rows, 6), queries)
    seen = causal(5, 3, queries.device)
    assert seen.shape == (1, 1, 15, 5)
    assert torch.equal(seen[0, 0, 5:10], torch.ones(5, 5, dtype=torch.bool).tril())
