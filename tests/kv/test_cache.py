"""The cache inside transformers: what is exact stays exact, whatever the model and the call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

import fewbits
from fewbits.core.errors import FewbitsError

EXACT = ("full", "think:ratio=0,recent=8", "snapkv:keep=1", "full+think:ratio=0,recent=0")
"""Methods that at these settings lose nothing."""
LOSSY = (
    "window:keep=0.5",
    "snapkv:keep=0.5,queries=8",
    "h2o:keep=0.5",
    "kivi:bits=4,group=16,recent=16",
    "think:ratio=0.5,recent=8",
    "snapkv:keep=0.5,queries=8+think:ratio=0.5,recent=8+kivi:bits=4,group=8,recent=8",
)


@torch.no_grad()
def logits(model: Any, ids: Any, cache: Any, **more: Any) -> Any:
    return model(ids, past_key_values=cache, **more).logits


@pytest.fixture(scope="module")
def plain(family: str) -> Any:
    """A model that never hears of fewbits."""
    return tiny_model(family)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return tiny_model(family)


# -- exactness -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*EXACT, *LOSSY])
def test_the_prompt_is_read_exactly(plain: Any, model: Any, method: str) -> None:
    """Only what is kept differs from an unchanged model, not the logits of the prompt."""
    ids = tokens()
    expected = logits(plain, ids, DynamicCache(config=plain.config))
    found = logits(model, ids, fewbits.kv.cache(model, method))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", EXACT)
def test_what_loses_nothing_goes_on_exactly(plain: Any, model: Any, method: str) -> None:
    ids, more = tokens(), tokens(count=7, seed=1)
    past, cache = DynamicCache(config=plain.config), fewbits.kv.cache(model, method)
    for piece in (ids, more, more[:, :1], more[:, 1:2]):
        expected, found = logits(plain, piece, past), logits(model, piece, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == past.get_seq_length() == 105


@pytest.mark.parametrize("method", EXACT)
def test_generation_with_padding_is_the_same(plain: Any, model: Any, method: str) -> None:
    ids = tokens(count=40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(ids, **options)
    found = model.generate(ids, past_key_values=fewbits.kv.cache(model, method), **options)
    assert found.tolist() == expected.tolist()


def test_beams_are_the_same(plain: Any, model: Any) -> None:
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = plain.generate(tokens(count=40), **options)
    cache = fewbits.kv.cache(model, "think:ratio=0,recent=4")
    found = model.generate(tokens(count=40), past_key_values=cache, **options)
    assert found.tolist() == expected.tolist()


def test_other_caches_compute_what_they_did(plain: Any, model: Any) -> None:
    fewbits.kv.cache(model, "full")  # now it has the attention function of fewbits
    ids = tokens()
    past = DynamicCache(config=plain.config)
    expected = logits(plain, ids, past)
    found = logits(model, ids, DynamicCache(config=model.config))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
    torch.testing.assert_close(without, expected, rtol=0, atol=2e-5)


# -- calls of any shape --------------------------------------------------------------------


@pytest.mark.parametrize("method", LOSSY)
def test_a_prompt_may_come_in_pieces(llama: Any, method: str) -> None:
    ids = tokens()
    whole, pieces = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    logits(llama, ids, whole)
    with pieces.prompt():
        for piece in ids.split(37, dim=1):
            last = logits(llama, piece, pieces)
    assert last.shape[1] == 96 - 74
    assert whole.nbytes() == pieces.nbytes()
    more = tokens(count=3, seed=1)
    expected = logits(llama, more, whole)
    torch.testing.assert_close(logits(llama, more, pieces), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [m for m in LOSSY if "window" not in m and "h2o" not in m])
def test_a_question_of_several_tokens_is_that_of_one_after_another(llama: Any, method: str) -> None:
    first, second = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    more = tokens(count=5, seed=1)
    for cache in (first, second):
        logits(llama, tokens(), cache)
    together = logits(llama, more, first)
    apart = torch.cat([logits(llama, one, second) for one in more.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert first.nbytes() == second.nbytes()


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("full", 1e-4), ("think:ratio=0,recent=8", 1e-4), ("kivi:bits=8,group=16,recent=16", 0.05)],
)
def test_padding_does_not_matter(llama: Any, method: str, tolerance: float) -> None:
    """A row alone, and the same row behind padding in a batch with a longer one."""
    short, ids = tokens(1, 64, seed=5), tokens(2, 96)
    ids[0, 32:] = short[0]
    mask = torch.ones_like(ids)
    mask[0, :32] = 0
    alone, batch = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    logits(llama, short, alone)
    logits(llama, ids, batch, attention_mask=mask)
    more = tokens(2, 4, seed=6)
    expected = logits(llama, more[:1], alone)
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    found = logits(llama, more, batch, attention_mask=longer)
    assert (found[:1] - expected).abs().mean() < tolerance * expected.abs().mean()


def test_rows_of_a_batch_can_be_chosen_and_repeated(llama: Any) -> None:
    method = "snapkv:keep=0.5,queries=8+kivi:bits=4,group=8,recent=8"
    both, cache = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    for one in (both, cache):
        logits(llama, tokens(), one)
    more = tokens(count=3, seed=1)
    expected = logits(llama, more, both)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    found = logits(llama, more[1:].repeat(2, 1), cache)
    torch.testing.assert_close(found, expected[1:].repeat(2, 1, 1), rtol=1e-4, atol=1e-4)
    cache.reorder_cache(torch.tensor([1, 0]))


def test_a_cache_can_be_emptied_and_used_again(llama: Any) -> None:
    cache = fewbits.kv.cache(llama, "think:recent=8")
    first = logits(llama, tokens(), cache)
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    assert torch.equal(logits(llama, tokens(), cache), first)


# -- bytes ---------------------------------------------------------------------------------


def test_bytes_are_those_of_live_storages(llama: Any) -> None:
    cache = fewbits.kv.cache(llama, "full")
    logits(llama, tokens(), cache)
    assert cache.nbytes() == 3 * 2 * 2 * 2 * 96 * 16 * 4
    layer = cache.compressed[0]
    wide = torch.cat([layer.recent.keys.read()] * 10, dim=2)
    layer.recent.keys.numbers = wide[:, :, :96]  # a view holds on to all of it
    assert cache.nbytes() == (3 * 2 * 2 * 2 * 96 + 9 * 2 * 2 * 96) * 16 * 4


@pytest.mark.parametrize(
    ("method", "held"),
    [
        ("window:keep=0.5", 48 * 2 * 16 * 4),
        ("snapkv:keep=0.25,queries=8", 24 * 2 * 16 * 4),
        # 64 tokens in groups of 16: codes, and two floats for each group; 32 are exact.
        ("kivi:bits=4,group=16,recent=32", 64 * 2 * 8 + 2 * 64 * 2 * 4 + 32 * 2 * 16 * 4),
        ("kivi:bits=2,group=16,recent=32", 64 * 2 * 4 + 2 * 64 * 2 * 4 + 32 * 2 * 16 * 4),
    ],
)
def test_bytes_follow_their_formula(llama: Any, method: str, held: int) -> None:
    cache = fewbits.kv.cache(llama, method)
    logits(llama, tokens(), cache)
    assert cache.nbytes() == 3 * 2 * 2 * held  # layers, rows of the batch, key heads


def test_only_full_attention_is_compressed() -> None:
    cache = fewbits.kv.cache(tiny_model("gemma3"), "kivi:bits=2,group=16,recent=16")
    assert [layer.index for layer in cache.compressed] == [1]
    sliding = tiny_model("gemma3", layer_types=["sliding_attention"] * 3)
    with pytest.raises(FewbitsError, match="no layer of full attention"):
        fewbits.kv.cache(sliding, "full")


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("thinc", {}, "did you mean 'think'"),
        ("pq", {}, "pq is a codec, not a way to compress KV caches"),
        ("think:ratio=1", {}, "ratio=1.0 must be at least 0 and below 1"),
        ("think", {"ratio": -0.1}, "ratio=-0.1 must be"),
        ("think:share=1", {}, "think has no option 'share'"),
        ("think", {"share": 1}, "share"),
        ("think+", {}, "a method of the chain is empty"),
        ("think+kivi", {"ratio": 0.5}, "not both"),
        ("kivi:bits=3", {}, "bits=3 must be one of 1, 2, 4, 8"),
        ("snapkv:keep=0", {}, "keep=0.0 must be above 0"),
        ("snapkv:kernel=4", {}, "kernel an odd number"),
        ("kivi+snapkv", {}, "snapkv chooses tokens; put it before kivi"),
        ("window+kivi", {}, "window goes on dropping tokens behind the prompt"),
        ("cachegen", {}, "cachegen is no form of a cache"),
        ("think+saq", {}, "saq cannot follow think"),
    ],
)
def test_methods_that_make_no_sense_are_refused(
    llama: Any, method: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FewbitsError, match=says.replace("(", r"\(")):
        fewbits.kv.cache(llama, method, **options)


def test_another_dtype_is_refused(llama: Any) -> None:
    cache = fewbits.kv.cache(llama, "full")
    logits(llama, tokens(), cache)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    with pytest.raises(FewbitsError, match="make a new cache"):
        logits(half, tokens(count=2), cache)


def test_a_model_without_replaceable_attention_is_refused() -> None:
    with pytest.raises(FewbitsError, match="does not let its attention be replaced"):
        fewbits.kv.cache(torch.nn.Linear(2, 2), "full")


@pytest.mark.parametrize("name", ["Bloom", "GPTJ"])
def test_a_family_with_attention_of_its_own_is_refused(name: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "n_embd": 32, "vocab_size": 64, "rotary_dim": 8}
    layers = {"n_layer": 1, "n_head": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **layers)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(FewbitsError, match="does not let its attention be replaced"):
        fewbits.kv.cache(model, "full")


@torch.no_grad()
def test_keys_from_a_fused_projection_hold_only_their_own_bytes() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(
        Phi3Config(**sizes, intermediate_size=32, vocab_size=128, pad_token_id=0)
    )
    held = {}
    for method in ("full", "window:keep=0.5"):
        cache = fewbits.kv.cache(model, method)
        model(tokens(1, 96), past_key_values=cache)
        held[method] = cache.nbytes()
    assert held == {"full": 2 * 96 * 32 * 4, "window:keep=0.5": 2 * 48 * 32 * 4}
