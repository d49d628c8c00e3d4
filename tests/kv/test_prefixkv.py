"""PrefixKV: the search for the layers' shares, what is kept, and what slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import CompressedCache
from fewbits.kv.prefixkv import PrefixKV, cumulative, layer_counts, per_visible_query


def curves(layers: int = 5, count: int = 200, seed: int = 0) -> list[torch.Tensor]:
    """Layers whose attention is ever more spread out."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(layers, count, generator=generator)
    return [cumulative(row ** (layers - i)) for i, row in enumerate(drawn)]


# -- the search ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_all_layers_hold_the_threshold_and_no_token_too_many(keep: float) -> None:
    found, threshold = layer_counts(curves(), keep)
    assert 0 <= keep * 5 * 200 - sum(found) <= 5
    for curve, count in zip(curves(), found, strict=True):
        assert curve[count - 1] >= threshold
        assert count == 1 or curve[count - 2] < threshold
    assert found == sorted(found)  # the more spread out, the more tokens


def test_like_layers_get_the_same() -> None:
    found, _ = layer_counts(curves(1) * 4, 0.3)
    assert len(set(found)) == 1


def test_a_layer_that_looks_at_one_token_keeps_the_least() -> None:
    one = torch.zeros(200)
    one[7] = 1
    found, _ = layer_counts([*curves(2), cumulative(one)], 0.5, least=2)
    assert found[2] == 2
    assert sum(found) > 0.5 * 3 * 200 - 4


def test_the_whole_budget_keeps_everything() -> None:
    found, _ = layer_counts(curves(), 1.0)
    assert found == [200] * 5


def test_a_budget_below_the_least_still_ends() -> None:
    assert layer_counts(curves(), 0.001, least=2)[0] == [2] * 5


def test_attention_per_query_that_can_see() -> None:
    assert per_visible_query(torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [1, 1, 1, 1]


# -- what is kept --------------------------------------------------------------------------


@torch.no_grad()
def filled(model: Any, method: PrefixKV, ids: Any = None) -> CompressedCache:
    cache: CompressedCache = fewbits.kv.cache(model, method)
    model(tokens() if ids is None else ids, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def fitted(model: Any) -> PrefixKV:
    return PrefixKV(keep=0.4, distance=8).fit(model, [tokens(seed=s) for s in range(3)])


def test_shares_of_layers_meet_the_budget(fitted: PrefixKV) -> None:
    assert fitted.shares is not None
    assert len(fitted.shares) == 3
    assert sum(fitted.shares) / 3 == pytest.approx(0.4, abs=1 / 96)
    assert len(set(fitted.shares)) > 1


def test_layers_hold_what_they_were_given(model: Any, fitted: PrefixKV) -> None:
    cache = filled(model, fitted)
    assert fitted.shares is not None
    held = [layer.tokens_held for layer in cache.compressed]
    assert held == [96 - round((1 - share) * 96) for share in fitted.shares]
    assert len(set(held)) > 1
    assert cache.get_seq_length() == 96
    assert cache.nbytes() == sum(held) * 2 * 2 * 2 * 16 * 4


def test_the_first_and_the_last_token_stay(model: Any) -> None:
    whole = filled(model, PrefixKV(keep=1.0))
    cache = filled(model, PrefixKV(keep=0.1, start=3))
    for layer, full in zip(cache.compressed, whole.compressed, strict=True):
        keys, expected = layer.recent.keys.read(), full.recent.keys.read()
        assert torch.equal(keys[:, :, :3], expected[:, :, :3])
        assert torch.equal(keys[:, :, -1], expected[:, :, -1])


@torch.no_grad()
def test_everything_kept_is_the_whole_cache(model: Any) -> None:
    more = tokens(count=5, seed=1)
    expected = model(more, past_key_values=filled(model, PrefixKV(keep=1.0))).logits
    full = fewbits.kv.cache(model, "full")
    model(tokens(), past_key_values=full)
    assert torch.equal(model(more, past_key_values=full).logits, expected)


@torch.no_grad()
def test_a_question_finds_layers_of_different_lengths(model: Any, fitted: PrefixKV) -> None:
    """Three tokens at once attend as one after another do, before any is dropped."""
    together, apart = (filled(model, fitted) for _ in range(2))
    question = tokens(count=3, seed=1)
    found = model(question, past_key_values=together).logits
    first = model(question[:, :1], past_key_values=apart).logits
    torch.testing.assert_close(found[:, :1], first, rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 3, 128)


@torch.no_grad()
def test_behind_the_prompt_a_window_slides(model: Any) -> None:
    method = PrefixKV(keep=0.5, distance=10)
    cache = filled(model, method)
    layer = cache.compressed[1]
    chosen = layer.recent.keys.read().clone()  # 48 tokens, slot 38
    for step in range(20):
        model(tokens(count=1, seed=step), past_key_values=cache)
    held = layer.recent.keys.read()
    assert held.shape[2] == round(116 * 0.5)
    assert torch.equal(held[:, :, :38], chosen[:, :, :38])
    assert not torch.equal(held[:, :, 38:48], chosen[:, :, 38:48])
    assert cache.get_seq_length() == 116


@torch.no_grad()
def test_rows_with_padding_keep_real_tokens(model: Any) -> None:
    ids, mask = tokens(), torch.ones(2, 96, dtype=torch.long)
    mask[0, :50] = 0
    cache = fewbits.kv.cache(model, PrefixKV(keep=0.4))
    model(ids, attention_mask=mask, past_key_values=cache)
    for layer in cache.compressed:
        valid = layer.recent.valid
        assert valid is None or int((~valid).sum()) <= 1  # the first token, always kept


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0.0}, "keep=0.0 must be above 0"),
        ({"keep": 1.5}, "at most 1"),
        ({"start": -1}, "start must be at least 0"),
        ({"distance": 0}, "distance at least 1"),
        ({"shares": (0.5, 0.0)}, "shares of layers"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        PrefixKV(**options)


def test_prompts_are_needed(model: Any) -> None:
    with pytest.raises(FewbitsError, match="needs prompts"):
        PrefixKV().fit(model, [])


def test_shares_of_another_model_are_refused(model: Any) -> None:
    with pytest.raises(FewbitsError, match="fitted on a model of 2 layers, but this one has 3"):
        filled(model, PrefixKV(shares=(0.5, 0.5)))


# -- files ---------------------------------------------------------------------------------


def test_shares_come_back_from_their_file(model: Any, tmp_path: Path) -> None:
    fitted = PrefixKV(keep=0.4).fit(model, [tokens(1)])
    fitted.save(tmp_path / "shares")
    loaded = PrefixKV.load(tmp_path / "shares")
    assert loaded.shares == fitted.shares
    (stage,) = fewbits.kv.stages(f"prefixkv:keep=0.4,fitted={tmp_path / 'shares'}")
    assert stage.shares == fitted.shares
    with pytest.raises(FewbitsError, match="exists"):
        fitted.save(tmp_path / "shares")


def test_shares_of_another_budget_model_or_method_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="call fit first"):
        PrefixKV().save(tmp_path / "none")
    PrefixKV(keep=0.4).fit(model, [tokens(1)]).save(tmp_path / "shares")
    with pytest.raises(FewbitsError, match=r"fitted for keep=0\.4, not for keep=0\.5"):
        PrefixKV(keep=0.5, fitted=str(tmp_path / "shares"))
    with pytest.raises(FewbitsError, match="layers 3, but this one has 2"):
        fewbits.kv.cache(tiny_model(num_hidden_layers=2), PrefixKV.load(tmp_path / "shares"))
    (tmp_path / "noise").write_bytes(b"nothing")
    with pytest.raises(FewbitsError, match="damaged"):
        PrefixKV.load(tmp_path / "noise")


def test_a_prompt_may_be_embeddings(model: Any) -> None:
    prompt = tokens(1)
    embedded = {"inputs_embeds": model.get_input_embeddings()(prompt).detach()}
    assert PrefixKV(keep=0.4).fit(model, [embedded]).shares == (
        PrefixKV(keep=0.4).fit(model, [prompt]).shares
    )
