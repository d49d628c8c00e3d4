"""CSKV: the factors, what is really stored, positions, files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import SIZES, tiny_model, tokens
from transformers import DynamicCache

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import CompressedCache
from fewbits.kv._forms import Exact
from fewbits.kv._quantized import Grouped
from fewbits.kv.cskv import CSKV, FeatureKeys, FeatureValues, rank_of

TEXT = tokens(6, 48, seed=9)


@torch.no_grad()
def logits(model: Any, ids: Any, cache: Any, **more: Any) -> Any:
    return model(ids, past_key_values=cache, **more).logits


def with_biases(model: Any) -> Any:
    """A model whose biases of keys and values, if it has any, are not 0."""
    generator = torch.Generator().manual_seed(0)
    for name, bias in model.named_parameters():
        if name.endswith(("k_proj.bias", "v_proj.bias")):
            bias.data = torch.randn(bias.shape, generator=generator)
    return model


def of_family(family: str, **changes: Any) -> Any:
    """A tiny model, of families that the other tests of the room do not have, too."""
    if family not in ("Phi3", "Olmo2"):
        return with_biases(tiny_model(family, **changes))
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def half(llama: Any) -> CSKV:
    return CSKV(recent=16).fit(llama, TEXT)


def filled(model: Any, method: Any, ids: Any = None) -> CompressedCache:
    cache: CompressedCache = fewbits.kv.cache(model, method)
    logits(model, tokens() if ids is None else ids, cache)
    return cache


# -- exactness -----------------------------------------------------------------------------

EVERY = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "Phi3", "Olmo2"]


@pytest.mark.parametrize("name", EVERY)
def test_the_full_rank_goes_on_as_the_unchanged_model(name: str) -> None:
    """Heads that share keys, biases, norms of a head or of all, and one projection of all three."""
    plain, model = of_family(name), of_family(name)
    method = CSKV(density_keys=1, density_values=1, recent=0).fit(model, TEXT)
    past, cache = DynamicCache(config=plain.config), fewbits.kv.cache(model, method)
    for piece in (tokens(), tokens(count=7, seed=1), tokens(count=1, seed=2)):
        expected, found = logits(plain, piece, past), logits(model, piece, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for layer in cache.compressed:
        assert (layer.parts[0].tokens, layer.recent.tokens, len(layer.parts)) == (104, 0, 1)


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_the_prompt_is_read_exactly(density: float) -> None:
    plain, model = tiny_model(), tiny_model()
    method = CSKV(density_keys=density, density_values=density, recent=0).fit(model, TEXT)
    expected = logits(plain, tokens(), DynamicCache(config=plain.config))
    assert torch.equal(logits(model, tokens(), fewbits.kv.cache(model, method)), expected)


def test_less_than_the_full_rank_changes_what_comes_after(llama: Any, half: CSKV) -> None:
    more = tokens(count=3, seed=1)
    full, thin = (logits(llama, more, filled(llama, one)) for one in ("full", half))
    assert (full - thin).abs().max() > 1e-3


def test_tokens_of_the_window_are_exact(llama: Any, half: CSKV) -> None:
    """As long as the window has not filled up, everything is."""
    ids, more = tokens(count=9), tokens(count=6, seed=1)
    full, thin = (logits(llama, more, filled(llama, one, ids)) for one in ("full", half))
    assert torch.equal(full, thin)


# -- factors -------------------------------------------------------------------------------


def total(method: CSKV, model: Any) -> float:
    return sum(sum(one.values()) for one in method.errors(model, TEXT).values())


def test_rank_is_whole_channels_of_a_head() -> None:
    assert rank_of(0.5, 16, 2) == 16
    assert rank_of(0.3, 16, 2) == 8
    assert rank_of(0.29, 100, 1) == 29  # 0.29·100 is a little less than 29 in floats
    assert rank_of(1, 16, 2) == 32
    with pytest.raises(FewbitsError, match=r"less than one; choose at least 0.0625"):
        rank_of(0.05, 16, 2)


def test_keys_and_values_have_their_own_ranks(llama: Any) -> None:
    method = CSKV(density_keys=0.25, density_values=0.75).fit(llama, TEXT)
    assert sorted(method.factors) == [0, 1, 2]
    for one in method.factors.values():
        assert (one.keys.rank, one.values.rank) == (8, 24)
    assert method.artefact_bytes == 3 * (8 + 24) * (64 + 32) * 4


def test_alpha_zero_is_the_decomposition_of_the_weights(llama: Any) -> None:
    method = CSKV().fit(llama, TEXT, start="asvd", alpha=0)
    weight = llama.model.layers[1].self_attn.k_proj.weight.detach()
    left, sizes, right = torch.linalg.svd(weight.T)
    best = left[:, :16] @ torch.diag(sizes[:16]) @ right[:16]
    torch.testing.assert_close(method.factors[1].keys.product, best, rtol=1e-4, atol=1e-5)
    scaled = CSKV().fit(llama, TEXT, start="asvd")
    assert not torch.allclose(scaled.factors[1].keys.product, best, atol=1e-3)


def test_the_closed_form_is_below_what_is_trained_and_that_below_the_start(llama: Any) -> None:
    method = CSKV()
    start = total(method.fit(llama, TEXT, start="asvd"), llama)
    trained = method.fit(llama, TEXT, start="asvd", epochs=5, learning_rate=3e-3)
    best = total(method.fit(llama, TEXT), llama)
    assert best < total(trained, llama) < 0.98 * start
    assert all(
        not t.requires_grad for one in trained.factors.values() for t in one.tensors().values()
    )


def test_training_the_closed_form_does_not_improve_it(llama: Any) -> None:
    """No better, because there is no better; and hardly worse."""
    best = CSKV().fit(llama, TEXT)
    trained = CSKV().fit(llama, TEXT, epochs=2, learning_rate=1e-4)
    assert total(best, llama) <= total(trained, llama) < 1.02 * total(best, llama)


def test_errors_are_those_of_keys_and_values(llama: Any) -> None:
    """Against a plain computation from the layer's input."""
    method = CSKV(density_keys=0.25).fit(llama, TEXT)
    seen: dict[str, Any] = {}
    attention = llama.model.layers[0].self_attn
    hook = attention.k_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        llama(TEXT)
    hook.remove()
    errors, maps = method.errors(llama, TEXT)[0], method.factors[0]
    for kind, linear in (("keys", attention.k_proj), ("values", attention.v_proj)):
        lost = seen["x"] @ linear.weight.T - seen["x"] @ getattr(maps, kind).product
        assert errors[kind] == pytest.approx(float(lost.detach().square().mean()), rel=1e-3)


def test_training_with_bits_fits_what_is_held(llama: Any) -> None:
    method = CSKV(recent=16, bits=2)
    start = method.fit(llama, TEXT)
    trained = method.fit(llama, TEXT, epochs=5, learning_rate=3e-3)
    assert total(trained, llama) < 0.98 * total(start, llama)
    assert total(start, llama) > 1.1 * total(CSKV().fit(llama, TEXT), llama)


def test_gradients_pass_the_bits_everywhere(llama: Any) -> None:
    """At the least and the greatest of a group, too: the gradient is that of the error."""
    method = CSKV(recent=16, bits=1).fit(llama, TEXT)
    seen: list[Any] = []
    from fewbits.kv.cskv import Factors, read_layers

    read_layers(llama, TEXT[:1], lambda inputs, memory: seen.append(inputs))
    states, weight = seen[0].states, llama.model.layers[0].self_attn.v_proj.weight.detach()
    tensors = {n: t.clone().requires_grad_() for n, t in method.factors[0].tensors().items()}
    method.errors_of(seen[0], Factors.of(tensors))["values"].backward()
    down, up = tensors["values.down"].detach(), tensors["values.up"].detach()
    held = Grouped.of((states @ down)[:, None], 1, 8, along=3).read()[:, 0]
    slope = 2 * (held @ up - states @ weight.T) / (states.shape[1] * 32)
    torch.testing.assert_close(
        tensors["values.down"].grad, (states.mT @ slope @ up.T)[0], rtol=1e-3, atol=1e-6
    )


def test_the_same_seed_gives_the_same_factors(llama: Any) -> None:
    first, second = (CSKV().fit(llama, TEXT, start="asvd", epochs=1) for _ in range(2))
    assert torch.equal(first.factors[2].keys.down, second.factors[2].keys.down)


def test_fitting_leaves_the_method_as_it_was(llama: Any) -> None:
    method = CSKV()
    method.fit(llama, TEXT)
    assert not method.factors


# -- what is stored ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 31, 32, 96, 100])
@pytest.mark.parametrize("recent", [0, 16])
def test_bytes_follow_their_formula(llama: Any, count: int, recent: int) -> None:
    """Features of all tokens, and exact ones of those that no full window has."""
    method = CSKV(density_keys=0.25, density_values=0.75, recent=recent).fit(llama, TEXT)
    cache = filled(llama, method, tokens(1, count))
    over = count % recent if recent else 0
    expected = ((count - over) * (8 + 24) + over * (8 + 24 + 2 * 32)) * 4
    assert cache.nbytes() == 3 * expected
    logits(llama, tokens(1, 1), cache)
    over = (count + 1) % recent if recent else 0
    expected = ((count + 1 - over) * (8 + 24) + over * (8 + 24 + 2 * 32)) * 4
    assert cache.nbytes() == 3 * expected
    assert cache.get_seq_length() == count + 1


def test_bits_are_packed(llama: Any) -> None:
    """96 tokens: half a byte per number; two floats for 16 tokens of a channel, or 8 channels."""
    method = CSKV(recent=16, bits=4).fit(llama, TEXT)
    cache = filled(llama, method)
    codes = 96 * (16 + 16) // 2
    scales = 2 * (96 // 16 * 16 + 96 * 2) * 4
    assert cache.nbytes() == 3 * 2 * (codes + scales)
    part = cache.compressed[0].parts[0]
    assert isinstance(part.keys, FeatureKeys)
    assert isinstance(part.keys.features, Grouped)
    assert part.keys.features.codes.dtype == torch.uint8


def test_a_sliding_window_is_always_full(llama: Any) -> None:
    method = CSKV(recent=16, sliding=True).fit(llama, TEXT)
    cache = filled(llama, method)
    for step in range(3):
        assert cache.compressed[0].recent.tokens == 16
        assert cache.compressed[0].parts[0].tokens == 80 + step
        logits(llama, tokens(count=1, seed=step), cache)
    packed = filled(llama, CSKV(recent=16, sliding=True, bits=4).fit(llama, TEXT))
    assert packed.compressed[0].recent.tokens == 16
    for step in range(15):
        logits(llama, tokens(count=1, seed=step), packed)
    assert packed.compressed[0].recent.tokens == 31


def test_blocks_behind_the_prompt_are_as_if_they_came_with_it(llama: Any) -> None:
    """Features depend on the inputs alone, so the form that blocks end in is the same."""
    for method in (CSKV(recent=16), CSKV(recent=16, bits=4)):
        fitted = method.fit(llama, TEXT)
        cache = filled(llama, fitted, tokens(count=40))
        logits(llama, tokens(count=30, seed=1), cache)
        layer = cache.compressed[0]  # the inputs of the first layer do not depend on the cache
        whole = filled(llama, fitted, torch.cat([tokens(count=40), tokens(count=30, seed=1)], 1))
        first = whole.compressed[0]
        assert layer.parts[0].tokens == first.parts[0].tokens == 64
        for kind in ("keys", "values"):
            one, other = (getattr(x.parts[0], kind).features.read() for x in (layer, first))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                layer.recent.companions[kind], first.recent.companions[kind], rtol=1e-4, atol=1e-4
            )


def test_values_are_never_rebuilt(llama: Any, half: CSKV, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(llama, half)
    form = cache.compressed[1].parts[0].values
    weights = torch.rand(2, 2, 5, 96)
    torch.testing.assert_close(form.mix(weights), weights @ form.read(), rtol=1e-4, atol=1e-4)

    def refuse(self: Any) -> Any:
        raise AssertionError("values were rebuilt")

    monkeypatch.setattr(FeatureValues, "read", refuse)
    logits(llama, tokens(count=2), cache)


def test_a_bias_of_values_counts_once() -> None:
    model = of_family("qwen2")
    cache = filled(model, CSKV().fit(model, TEXT))
    form = cache.compressed[0].parts[0].values
    weights = torch.rand(2, 2, 5, 96)
    torch.testing.assert_close(form.mix(weights), weights @ form.read(), rtol=1e-4, atol=1e-4)


def test_inputs_are_not_kept(llama: Any, half: CSKV) -> None:
    cache = filled(llama, half)
    assert all(layer.inputs is None for layer in cache.compressed)
    assert cache.breakdown()["kept"] == 0


# -- calls of any shape --------------------------------------------------------------------

METHODS = [
    {"recent": 16},
    {"recent": 0},
    {"recent": 16, "bits": 4},
    {"recent": 16, "sliding": True},
]


@pytest.mark.parametrize("options", METHODS)
def test_a_prompt_may_come_in_pieces(llama: Any, options: dict[str, Any]) -> None:
    method = CSKV(**options).fit(llama, TEXT)
    whole, pieces = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    logits(llama, tokens(count=70), whole)
    with pieces.prompt():
        for piece in tokens(count=70).split(37, dim=1):
            logits(llama, piece, pieces)
    for one, other in zip(whole.compressed, pieces.compressed, strict=True):
        mine, theirs = dict(one.tensors()), dict(other.tensors())
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)
    assert whole.nbytes() == pieces.nbytes()


@pytest.mark.parametrize("options", METHODS)
def test_a_question_of_several_tokens_remembers_the_prompt(
    llama: Any, options: dict[str, Any]
) -> None:
    """Within one window, many tokens at once are as one after another."""
    method = CSKV(**options).fit(llama, TEXT)
    first, second = (filled(llama, method) for _ in range(2))
    more = tokens(count=5, seed=1)
    together = logits(llama, more, first)
    apart = torch.cat([logits(llama, one, second) for one in more.split(1, dim=1)], dim=1)
    assert first.nbytes() == second.nbytes()
    same = 5 if options["recent"] and "sliding" not in options else 1
    torch.testing.assert_close(together[:, :same], apart[:, :same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbered", [False, True])
def test_padding_does_not_matter(llama: Any, half: CSKV, numbered: bool) -> None:
    """A row alone, and behind padding, with positions that count the padding or do not."""
    short, ids = tokens(1, 64, seed=5), tokens(2, 96)
    ids[0, 32:] = short[0]
    mask, more = torch.ones(2, 100, dtype=torch.long), tokens(2, 4, seed=6)
    mask[0, :32] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    alone, batch = fewbits.kv.cache(llama, half), fewbits.kv.cache(llama, half)
    logits(llama, short, alone)
    given = {"position_ids": places[:, :96]} if numbered else {}
    logits(llama, ids, batch, attention_mask=mask[:, :96], **given)
    held = {layer.memories[0].kept.get("positions") is not None for layer in batch.compressed}
    assert held == {numbered}
    given = {"position_ids": places[:, 96:]} if numbered else {}
    found = logits(llama, more, batch, attention_mask=mask, **given)
    torch.testing.assert_close(found[:1], logits(llama, more[:1], alone), rtol=1e-3, atol=1e-3)


def test_generation_with_padding_and_beams_is_that_of_the_unchanged_model() -> None:
    plain, model = tiny_model(), tiny_model()
    method = CSKV(density_keys=1, density_values=1, recent=4).fit(model, TEXT)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    for beams in (1, 3):
        options = {
            "attention_mask": mask,
            "max_new_tokens": 6,
            "do_sample": False,
            "num_beams": beams,
        }
        expected = plain.generate(tokens(count=40), **options)
        cache = fewbits.kv.cache(model, method)
        found = model.generate(tokens(count=40), past_key_values=cache, **options)
        assert found.tolist() == expected.tolist()


def test_rows_of_a_batch_can_be_chosen_and_repeated(llama: Any, half: CSKV) -> None:
    both, cache = filled(llama, half, tokens(count=70)), filled(llama, half, tokens(count=70))
    more = tokens(count=3, seed=1)
    expected = logits(llama, more, both)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.compressed[0].recent.companions["keys"].shape == (2, 1, 6, 16)
    found = logits(llama, more[1:].repeat(2, 1), cache)
    torch.testing.assert_close(found, expected[1:].repeat(2, 1, 1), rtol=1e-4, atol=1e-4)


def test_a_cache_can_be_emptied_and_used_again(llama: Any, half: CSKV) -> None:
    cache = fewbits.kv.cache(llama, half)
    first = logits(llama, tokens(), cache)
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    assert torch.equal(logits(llama, tokens(), cache), first)
    logits(llama, tokens(count=1), cache)


def test_a_copy_in_another_dtype_uses_the_same_factors(llama: Any, half: CSKV) -> None:
    small = copy.deepcopy(llama).to(torch.bfloat16)
    cache = filled(small, half)
    more = tokens(count=2, seed=1)
    found, expected = logits(small, more, cache), logits(llama, more, filled(llama, half))
    assert found.dtype == cache.compressed[0].parts[0].keys.features.read().dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert half.factors[0].keys.down.dtype == torch.float32
    # Each model hands over once, however often it makes caches.
    for model in (small, llama):
        assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1


# -- files ---------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(llama: Any, tmp_path: Path) -> None:
    method = CSKV(density_keys=0.25, density_values=0.75, recent=16, bits=4).fit(llama, TEXT)
    path = tmp_path / "method.safetensors"
    method.save(path)
    loaded = CSKV.load(path)
    assert loaded == method
    assert (loaded.density_values, loaded.recent, loaded.bits) == (0.75, 16, 4)
    more = tokens(count=3, seed=1)
    expected = logits(llama, more, filled(llama, method))
    assert torch.equal(logits(llama, more, filled(llama, loaded)), expected)
    spec = f"cskv:fitted={path},recent=16,bits=4"
    assert torch.equal(logits(llama, more, filled(llama, spec)), expected)
    with pytest.raises(FewbitsError, match="exists"):
        method.save(path)
    method.save(path, overwrite=True)
    assert [one.name for one in tmp_path.iterdir()] == ["method.safetensors"]


def spoilt(path: Path, change: Any) -> Path:
    """The same file with something in it changed."""
    with safe_open(path, framework="pt") as file:
        about, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about["about"] = change(held, about["about"]) or about["about"]
    target = path.with_name("spoilt.safetensors")
    save_file(held, target, metadata=about)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda held, about: held.pop("layers.1.keys.up") is None,
        lambda held, about: held.update(more=torch.ones(1)),
        lambda held, about: held.update({"layers.1.keys.up": torch.ones(3, 32)}),
        lambda held, about: held.update({"layers.1.keys.up": torch.ones(32)}),
        lambda held, about: held.update({"layers.1.keys.up": torch.full((16, 32), torch.nan)}),
        lambda held, about: about.replace('"recent": 16', '"recent": -1'),
        lambda held, about: about.replace('"recent": 16', '"recent": "16"'),
        lambda held, about: about.replace('"recent": 16', '"often": 16'),
        lambda held, about: about.replace('"density_keys": 0.5', '"density_keys": NaN'),
        lambda held, about: about.replace('"weights": {', '"weights": [], "w": {'),
    ],
)
def test_damaged_files_are_refused(half: CSKV, tmp_path: Path, change: Any) -> None:
    half.save(tmp_path / "good.safetensors")
    with pytest.raises(FewbitsError, match="damaged"):
        CSKV.load(spoilt(tmp_path / "good.safetensors", change))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    for name in ("text", "missing"):
        with pytest.raises(FewbitsError, match=name):
            CSKV(fitted=str(tmp_path / name))


def test_a_file_of_factors_of_another_width_is_refused(
    llama: Any, half: CSKV, tmp_path: Path
) -> None:
    half.save(tmp_path / "good.safetensors")
    path = spoilt(
        tmp_path / "good.safetensors",
        lambda held, about: held.update({"layers.1.keys.down": torch.ones(63, 16)}),
    )
    with pytest.raises(FewbitsError, match="another model"):
        filled(llama, CSKV.load(path))


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density_keys": 0.0}, "density_keys=0.0 must be above 0"),
        ({"density_values": 1.5}, "at most 1"),
        ({"density_keys": float("nan")}, "must be above 0"),
        ({"recent": -1}, "recent=-1 must be at least 0"),
        ({"bits": 3}, "bits=3 must be one of 1, 2, 4, 8, or none"),
        ({"bits": 4, "recent": 0}, "choose recent=32"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        CSKV(**options)


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        (torch.ones(4, dtype=torch.long), {}, r"\(texts, tokens\)"),
        (torch.ones(0, 4, dtype=torch.long), {}, r"\(texts, tokens\)"),
        (torch.ones(2, 4), {}, "of torch.float32"),
        (TEXT, {"start": "random"}, "'asvd' or 'regression'"),
        (TEXT, {"epochs": -1}, "epochs"),
    ],
)
def test_unfit_calibration_is_refused(
    llama: Any, ids: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FewbitsError, match=says):
        CSKV().fit(llama, ids, **options)


def test_one_token_is_enough_to_fit(llama: Any) -> None:
    cache = filled(llama, CSKV(recent=16, bits=4).fit(llama, TEXT[:1, :1], epochs=1))
    assert {layer.tokens_held for layer in cache.compressed} == {96}


def test_it_must_be_fitted_first(llama: Any) -> None:
    with pytest.raises(FewbitsError, match=r"must be fitted.*cskv:fitted=PATH"):
        fewbits.kv.cache(llama, "cskv")
    with pytest.raises(FewbitsError, match="must be fitted"):
        CSKV().save("nowhere")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 2}, "layers 3, but this one has 2"),
        ({"num_hidden_layers": 4}, "layers 3, but this one has 4"),
        ({"num_key_value_heads": 4}, "key heads"),
        ({"hidden_size": 32}, "hidden size"),
        ({"initializer_range": 0.3, "vocab_size": 130}, "other weights"),
    ],
)
def test_another_model_is_refused(half: CSKV, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        filled(tiny_model(**changes), half)


def test_other_methods_before_or_after_are_refused(llama: Any, half: CSKV) -> None:
    from fewbits.kv.baselines import KIVI, SlidingWindow, SnapKV

    for chain in ([SnapKV(), half], [half, KIVI()]):
        with pytest.raises(FewbitsError, match="cskv goes with no other method"):
            fewbits.kv.cache(llama, chain)
    with pytest.raises(FewbitsError, match="window goes on dropping tokens"):
        fewbits.kv.cache(llama, [SlidingWindow(), half])


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "type dynamic depend on the length"),
        ({"mrope_section": [2, 3, 3]}, "more than one position"),
    ],
)
def test_rotary_embeddings_that_cannot_be_repeated_are_refused(
    rope: dict[str, Any], says: str
) -> None:
    model = tiny_model(rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | rope)
    with pytest.raises(FewbitsError, match=says):
        CSKV().fit(model, TEXT)


LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "PhiForCausalLM": ({"partial_rotary_factor": 0.5}, "rotates only a part"),
    # It rotates pairs of neighbours.
    "CohereForCausalLM": ({}, "in a way that cskv does not know"),
    "GPT2LMHeadModel": ({"n_embd": 64, "n_head": 4, "n_layer": 1}, "does not hand it over"),
    "DeepseekV3ForCausalLM": (
        {"q_lora_rank": None, "head_dim": 8, "first_k_dense_replace": 3} | LATENT,
        "caches latents",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_another_build_are_refused(kind: str) -> None:
    own, says = OTHERS[kind]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**(SIZES | own))).eval()
    with pytest.raises(FewbitsError, match=says):
        CSKV().fit(model, TEXT)


def test_inputs_must_be_handed_over(llama: Any, half: CSKV) -> None:
    from fewbits.kv._transformers import hand_over

    model = copy.deepcopy(llama)
    cache = fewbits.kv.cache(model, half)
    for layer in model.model.layers:
        hooks = layer.self_attn._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hook.func is hand_over]:
            del hooks[number]
    with pytest.raises(FewbitsError, match="does not hand it over"):
        logits(model, tokens(), cache)


def test_exact_features_are_the_inputs_through_the_factors(llama: Any, half: CSKV) -> None:
    seen: dict[str, Any] = {}
    attention = llama.model.layers[0].self_attn
    hook = attention.k_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    cache = filled(llama, half)
    hook.remove()
    features = cache.compressed[0].parts[0].keys.features
    assert isinstance(features, Exact)
    expected = seen["x"] @ half.factors[0].keys.down
    torch.testing.assert_close(features.read()[:, 0], expected, rtol=1e-5, atol=1e-5)
