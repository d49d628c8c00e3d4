"""NTK-Attention: the state, the adapter, encoded prompts, and the theory's training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tokens
from torch import Tensor

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._ntk_adapter import (
    NAME,
    PLACE,
    AttentionShape,
    TrainedPrefix,
    absolute,
    attach,
    log_masses,
)
from fewbits.kv._ntk_encoding import SOLVERS, errors
from fewbits.kv._ntk_state import PrefixState, feature_map, join_terms
from fewbits.kv._ntk_theory import empirical_kernel, prefix_output
from fewbits.kv.ntk_attention import NTKAdapter, NTKAttention, train_prefix
from fewbits.primitives.feature_maps import TaylorFeatures
from fewbits.primitives.partial_attention import Partial, join
from fewbits.reproductions.kv.ntk_attention import drawn_evidence


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Partial:
    scores = queries @ keys.transpose(-1, -2) * scaling
    return Partial(torch.softmax(scores, dim=-1) @ values, torch.logsumexp(scores, dim=-1))


# -- the state -----------------------------------------------------------------------------


def test_with_exact_features_a_state_is_the_prefix() -> None:
    """Taylor series to degree 8, four numbers per head, five keys: explicit prefix attention."""
    queries, keys = drawn(1, 2, 9, 4) * 0.7, drawn(2, 5, 4, seed=1) * 0.7
    values = drawn(2, 5, 6, seed=2)
    own = softmax_attention(queries, drawn(1, 2, 7, 4, seed=3), drawn(1, 2, 7, 6, seed=4), 0.5)
    explicit = join([own, softmax_attention(queries, keys[None], values[None], 0.5)])
    state = PrefixState.of(keys, values, 0.5, TaylorFeatures(8))
    seen = state.seen_by(queries * 0.5, 0.5, TaylorFeatures(8))
    torch.testing.assert_close(join([own, seen]), explicit, rtol=0, atol=1e-4)


@pytest.mark.parametrize("features", ["elu", "taylor-2", "random-32"])
def test_the_state_of_two_prefixes_is_the_sum_of_theirs(features: str) -> None:
    keys, values, mapped = drawn(3, 20, 8), drawn(3, 20, 8, seed=1), feature_map(features)
    whole = PrefixState.of(keys, values, 0.3, mapped)
    first = PrefixState.of(keys[:, :7], values[:, :7], 0.3, mapped)
    second = PrefixState.of(keys[:, 7:], values[:, 7:], 0.3, mapped)
    torch.testing.assert_close(first.z + second.z, whole.z)
    torch.testing.assert_close(first.k + second.k, whole.k)


@pytest.mark.parametrize("length", [1, 10, 500])
def test_a_state_has_one_size_whatever_the_length(length: int) -> None:
    state = PrefixState.of(drawn(4, length, 8), drawn(4, length, 8), 0.3, feature_map("elu"))
    assert state.nbytes == 4 * (8**2 + 8) * 4


def test_many_tokens_and_queries_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rows, mapped = drawn(2, 30, 8), drawn(1, 2, 40, 8, seed=1), feature_map("elu")
    state = PrefixState.of(keys, keys, 0.3, mapped)
    seen = state.seen_by(rows, 0.3, mapped)
    monkeypatch.setattr("fewbits.kv._ntk_state.BLOCK_FEATURES", 2 * 8 * 7)
    blocks = PrefixState.of(keys, keys, 0.3, mapped)
    torch.testing.assert_close(blocks.z, state.z)
    found = blocks.seen_by(rows, 0.3, mapped)
    torch.testing.assert_close(found.output, seen.output)
    torch.testing.assert_close(found.log_mass, seen.log_mass)


def test_a_state_without_mass_is_not_seen() -> None:
    state = PrefixState(torch.zeros(2, 8, 8), torch.zeros(2, 8))
    seen = state.seen_by(drawn(1, 2, 5, 8), 0.3, feature_map("elu"))
    assert bool((seen.log_mass == -math.inf).all())
    own = softmax_attention(drawn(1, 2, 5, 8), drawn(1, 2, 5, 8), drawn(1, 2, 5, 8), 0.3)
    assert torch.equal(join([own, seen]), own.output)


@pytest.mark.parametrize("spec", ["", "relu", "taylor", "taylor-0", "taylor-3", "random-", "elu-2"])
def test_unknown_features_are_refused(spec: str) -> None:
    with pytest.raises(FewbitsError, match="are not known; choose elu"):
        feature_map(spec)


# -- joining terms to attention ------------------------------------------------------------


def test_terms_join_as_the_formula_says() -> None:
    output, log_mass = drawn(3, 4, 8), drawn(3, 4, seed=1)
    added, mass = drawn(3, 4, 8, seed=2), drawn(3, 4, seed=3).abs()
    own = log_mass.exp()[..., None]
    expected = (own * output + added) / (own + mass[..., None])
    torch.testing.assert_close(join_terms(output, log_mass, added, mass), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_terms_attention_is_unchanged_bit_for_bit(dtype: torch.dtype) -> None:
    output, log_mass = drawn(50, 8).to(dtype), drawn(50, seed=1) * 100
    zero = torch.zeros(50, 8)
    assert torch.equal(join_terms(output, log_mass, zero, zero[:, 0]), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [-200.0, -88.0, 0.0, 88.0, 200.0])
def test_scores_of_any_size_give_finite_numbers(dtype: torch.dtype, size: float) -> None:
    """A row of scores of ±200, in the module as attention calls it, and its gradients."""
    query = torch.full((1, 2, 3, 16), math.sqrt(abs(size) / 4), dtype=dtype)
    key = torch.sign(torch.tensor(size)).to(dtype) * query
    masses = log_masses(query, key, None, 0.25)
    assert float(masses[0, 0, 0]) == pytest.approx(size + math.log(3), rel=0.02, abs=0.1)
    prefix = TrainedPrefix(2, 16, 16, start="random")
    found = prefix(query, 0.25, drawn(1, 2, 3, 16).to(dtype), masses)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    found.float().sum().backward()
    assert bool(prefix.z.grad.isfinite().all() and prefix.k.grad.isfinite().all())  # type: ignore[union-attr]


def test_a_row_that_sees_nothing_stays_as_it_is() -> None:
    output = drawn(2, 8)
    log_mass = torch.tensor([-math.inf, 1.0])
    found = join_terms(output, log_mass, torch.ones(2, 8), torch.zeros(2))
    assert torch.equal(found[0], output[0])
    assert not torch.equal(found[1], output[1])


def test_the_slope_of_the_absolute_value_lets_zero_go() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    absolute(x).sum().backward()
    assert absolute(x).tolist() == [2, 0, 3]
    assert x.grad.tolist() == [-1, 1, 1]  # type: ignore[union-attr]


def test_masses_are_those_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = drawn(2, 4, 6, 8), drawn(2, 2, 6, 8, seed=1)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    causal = torch.logsumexp(scores.masked_fill(~seen, -math.inf), dim=-1)
    padded = seen & (torch.arange(6) > 0)
    expected = torch.logsumexp(scores.masked_fill(~padded, -math.inf), dim=-1)
    bias = drawn(1, 4, 6, 6, seed=2)
    for _ in range(2):  # whole, and in blocks
        torch.testing.assert_close(log_masses(query, key, None, 0.3), torch.logsumexp(scores, -1))
        torch.testing.assert_close(log_masses(query, key, None, 0.3, causal=True), causal)
        both = log_masses(query, key, padded[None, None].expand(2, 1, 6, 6), 0.3)
        torch.testing.assert_close(both, expected)
        assert bool((both[:, :, 0] == -math.inf).all())
        biased = log_masses(query, key, bias, 0.3)
        torch.testing.assert_close(biased, torch.logsumexp(scores + bias, -1))
        lowest = torch.where(padded, 0.0, torch.finfo(torch.float32).min)[None, None]
        torch.testing.assert_close(log_masses(query, key, lowest, 0.3), expected)
        capped = log_masses(query, key, None, 0.3, cap=2.0)
        torch.testing.assert_close(capped, torch.logsumexp(2 * torch.tanh(scores / 2), -1))
        monkeypatch.setattr("fewbits.kv._ntk_adapter.BLOCK_SCORES", 2 * 4 * 6 * 4)


# -- the adapter ---------------------------------------------------------------------------


def vision_transformer() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()


def shaken(adapter: NTKAdapter) -> NTKAdapter:
    """A state that is far from zero."""
    torch.manual_seed(1)
    for state in adapter.states.values():
        for parameter in state.parameters():
            parameter.data.normal_(0, 0.5)
    return adapter


@torch.no_grad()
def test_zeros_leave_a_model_as_it_is(family: str) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    NTKAdapter(model)
    mask = torch.ones(2, 96, dtype=torch.long)
    mask[0, :20] = 0
    for more in ({}, {"attention_mask": mask}):
        found = model(tokens(), use_cache=False, **more).logits
        expected = plain(tokens(), use_cache=False, **more).logits
        if family == "gemma2":  # its caps are computed otherwise
            torch.testing.assert_close(found[:, 20:], expected[:, 20:], rtol=0, atol=2e-5)
        else:
            assert torch.equal(found, expected)


@torch.no_grad()
def test_zeros_leave_a_vision_transformer_as_it_is() -> None:
    images = drawn(4, 1, 8, 8)
    model = vision_transformer()
    NTKAdapter(model)
    assert torch.equal(model(images).logits, vision_transformer()(images).logits)


@torch.no_grad()
def test_zeros_leave_an_encoder_as_it_is() -> None:
    def encoder() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.BertConfig(vocab_size=128, intermediate_size=48, **sizes)
        return transformers.BertModel(config).eval()

    model, mask = encoder(), torch.ones(2, 96, dtype=torch.long)
    mask[1, 50:] = 0
    adapter = NTKAdapter(model)
    found = model(tokens(), attention_mask=mask).last_hidden_state
    expected = encoder()(tokens(), attention_mask=mask).last_hidden_state
    assert torch.equal(found, expected)
    shaken(adapter)
    assert not torch.allclose(model(tokens()).last_hidden_state, expected)


@torch.no_grad()
def test_an_adapted_layer_computes_the_formula(llama: Any) -> None:
    """The attention function against the paper's step 3, written out."""
    module = copy.deepcopy(llama.model.layers[0].self_attn)
    prefix = TrainedPrefix(4, 16, 16)
    torch.manual_seed(0)
    prefix.z.normal_(0, 1)
    prefix.k.normal_(0, 1)
    setattr(module, PLACE, prefix)
    from fewbits.kv._ntk_adapter import ntk_attention

    query, key, value = drawn(2, 4, 6, 16), drawn(2, 2, 6, 16, seed=1), drawn(2, 2, 6, 16, seed=2)
    found, _ = ntk_attention(module, query, key, value, None, scaling=0.25)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    weights = torch.exp(query @ keys.transpose(2, 3) * 0.25).tril()
    mapped = torch.nn.functional.elu(query * 0.5) + 1
    over = weights @ values + torch.einsum("bhtr,hrd->bhtd", mapped, prefix.z)
    under = weights.sum(3) + torch.einsum("bhtr,hr->bht", mapped, prefix.k.abs())
    torch.testing.assert_close(found, (over / under[..., None]).transpose(1, 2))


def test_states_are_per_query_head_and_of_one_size(llama: Any) -> None:
    model = copy.deepcopy(llama)
    adapter = NTKAdapter(model)
    assert list(adapter.states) == [f"model.layers.{layer}.self_attn" for layer in range(3)]
    for state in adapter.states.values():
        assert sum(one.numel() for one in state.parameters()) == 4 * (16**2 + 16)
        assert all(one.dtype == torch.float32 for one in state.parameters())
    assert adapter.nbytes == 3 * 4 * (16**2 + 16) * 4


@torch.no_grad()
def test_the_future_is_not_seen_and_the_prefix_by_all(llama: Any) -> None:
    model = copy.deepcopy(llama)
    adapter, ids = NTKAdapter(model), tokens()
    plain = model(ids, use_cache=False).logits
    shaken(adapter)
    before = model(ids, use_cache=False).logits
    ids[:, 50] = (ids[:, 50] + 1) % 128
    after = model(ids, use_cache=False).logits
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.allclose(before[:, 50:], after[:, 50:])
    assert bool(((before - plain).abs().amax(dim=2) > 1e-3).all())


@torch.no_grad()
def test_generation_with_a_cache_is_what_reading_again_gives(llama: Any) -> None:
    model = copy.deepcopy(llama)
    shaken(NTKAdapter(model))
    ids, mask = tokens(count=20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(found, again)
    assert found.shape[1] == 26


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_model_in_half_precision_keeps_its_state_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    expected = model(tokens(), use_cache=False).logits
    adapter = NTKAdapter(model)
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert all(p.dtype == torch.float32 for s in adapter.states.values() for p in s.parameters())
    shaken(adapter)
    found = model(tokens(), use_cache=False).logits
    assert found.dtype == dtype
    assert bool(found.isfinite().all())


def test_only_the_state_and_the_head_are_trained() -> None:
    model = vision_transformer()
    adapter = NTKAdapter(model, train=("classifier",), dropout=0.2)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    images, labels, losses = drawn(24, 1, 8, 8), torch.arange(24) % 3, []
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    states = {f"{name}.{PLACE}.{what}" for name in adapter.states for what in ("z", "k")}
    assert changed == {"classifier.weight", "classifier.bias"} | states
    assert all(one.grad is None for n, one in model.named_parameters() if n not in changed)


def test_dropout_is_of_features_and_in_training_alone() -> None:
    prefix = TrainedPrefix(2, 8, 8, start="random", dropout=0.5)
    prefix.z.data *= 1e4
    given = drawn(1, 2, 3, 8), 0.3, drawn(1, 2, 3, 8, seed=1), torch.zeros(1, 2, 3)
    first, second = prefix(*given), prefix(*given)
    assert not torch.equal(first, second)
    prefix.eval()
    assert torch.equal(prefix(*given), prefix(*given))


def test_a_random_start_is_small_and_drawn_by_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        adapter = NTKAdapter(tiny_model(), start="random", seed=seed)
        found.append(torch.cat([one.z.flatten() for one in adapter.states.values()]))  # type: ignore[union-attr,operator]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert float(found[0].detach().std()) == pytest.approx(1e-4, rel=0.1)


@torch.no_grad()
def test_a_removed_adapter_leaves_the_model_as_it_was() -> None:
    model, plain = tiny_model(), tiny_model()
    before = model.config._attn_implementation
    names = [name for name, _ in plain.named_parameters()]
    shaken(NTKAdapter(model)).remove()
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(one.requires_grad for one in model.parameters())
    assert model.config._attn_implementation == before
    NTKAdapter(model)  # and again


# -- the adapter's file --------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_adapter_comes_back(tmp_path: Path) -> None:
    model, images = vision_transformer(), drawn(4, 1, 8, 8)
    adapter = shaken(NTKAdapter(model, features="taylor-2", train=("classifier",)))
    model.classifier.weight += 1
    adapter.save(tmp_path / "adapter.safetensors")
    fresh = vision_transformer()
    loaded = NTKAdapter.load(tmp_path / "adapter.safetensors", fresh)
    assert torch.equal(fresh(images).logits, model(images).logits)
    assert loaded.trained_modules == ("classifier",)
    with pytest.raises(FewbitsError, match="exists"):
        loaded.save(tmp_path / "adapter.safetensors")
    loaded.save(tmp_path / "adapter.safetensors", overwrite=True)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    NTKAdapter(tiny_model()).save(tmp_path / "a")
    with pytest.raises(FewbitsError, match="layers 3, but this one has 2"):
        NTKAdapter.load(tmp_path / "a", tiny_model(num_hidden_layers=2))
    other = tiny_model()
    other.model.layers[0].mlp.up_proj.weight.data.neg_()
    with pytest.raises(FewbitsError, match="other weights"):
        NTKAdapter.load(tmp_path / "a", other)
    with pytest.raises(FewbitsError, match="cannot read"):
        NTKAdapter.load(tmp_path / "b", tiny_model())


@pytest.mark.parametrize("harm", ["shape", "missing", "settings"])
def test_a_damaged_adapter_is_refused_and_the_model_left_alone(tmp_path: Path, harm: str) -> None:
    path, model = tmp_path / "a", tiny_model()
    NTKAdapter(tiny_model()).save(path)
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = next(iter(tensors))
    if harm == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif harm == "missing":
        del tensors[name]
    else:
        about = json.loads(metadata["about"])
        about["settings"]["dropout"] = "much"
        metadata["about"] = json.dumps(about)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FewbitsError, match=r"does not fit|damaged"):
        NTKAdapter.load(path, model)
    assert model.config._attn_implementation != NAME
    assert not any(hasattr(module, PLACE) for module in model.modules())


# -- what an adapter refuses ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "ones"}, "must be zeros or random"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"features": "relu"}, "are not known"),
        ({"train": ("classifier",)}, "no module 'classifier'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    model = tiny_model()
    with pytest.raises(FewbitsError, match=says):
        NTKAdapter(model, **options)
    assert all(one.requires_grad for one in model.parameters())


def test_one_adapter_at_a_time() -> None:
    model = tiny_model()
    NTKAdapter(model)
    with pytest.raises(FewbitsError, match="adapted already"):
        NTKAdapter(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(FewbitsError, match="does not let its attention be replaced"):
        attach(torch.nn.Linear(2, 2), lambda shape: torch.nn.Identity(), {})


def test_only_models_of_transformers_are_adapted() -> None:
    with pytest.raises(FewbitsError, match="only models of transformers"):
        NTKAdapter(torch.nn.Linear(2, 2))


def test_input_that_a_model_cannot_read_is_named() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(FewbitsError, match="give an example of its input"):
        NTKAdapter(model, example={"input_ids": torch.tensor([[500]])})
    assert model.config._attn_implementation == before
    assert all(one.requires_grad for one in model.parameters())


def test_an_adapted_model_takes_no_compressed_cache() -> None:
    model = tiny_model()
    NTKAdapter(model)
    with pytest.raises(FewbitsError, match="leaves the adapter out"):
        model(tokens(), past_key_values=fewbits.kv.cache(model, "full"))


def test_an_adapter_is_never_left_out_silently() -> None:
    model = tiny_model()
    NTKAdapter(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(FewbitsError, match="leaves the adapter out"):
        model(tokens())


def test_shapes_are_found_where_queries_share_keys() -> None:
    found = []
    attach(tiny_model(), lambda shape: found.append(shape) or TrainedPrefix(4, 16, 16))
    assert found == [AttentionShape(4, 16, 16)] * 3


# -- encoding a prefix ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 0.6])
def test_each_way_to_encode_is_nearer_than_the_one_before(scale: float) -> None:
    evidence, mapped = drawn_evidence(64, scale, 512), feature_map("elu")
    measured = evidence.measured()
    found = [
        float(errors(measured, SOLVERS[solver](evidence.fitted(), mapped), mapped).mean())
        for solver in ("closed-form", "mass", "least-squares")
    ]
    assert found[0] > 1.5 * found[1] > 2 * found[2]
    taylor = SOLVERS["closed-form"](evidence, feature_map("taylor-2"))
    assert float(errors(measured, taylor, feature_map("taylor-2")).mean()) < found[2] / 2
    dropped = float(errors(measured, None, mapped).mean())
    assert dropped > 2 * found[1]


def test_mass_is_true_in_the_mean() -> None:
    evidence, mapped = drawn_evidence(64, 0.6, 512), feature_map("elu")
    state = SOLVERS["mass"](evidence, mapped)
    seen = state.seen_by(evidence.rows[None], evidence.scaling, mapped)
    found, true = (one.log_mass.exp().mean(dim=2) for one in (seen, evidence.prefix))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=0)


def test_what_is_measured_is_not_fitted_to() -> None:
    evidence = drawn_evidence(4, 0.3, 101)
    fitted, measured = evidence.fitted(), evidence.measured()
    assert fitted.rows.shape[1] + measured.rows.shape[1] == 101
    together = torch.cat([fitted.rows, measured.rows], dim=1)
    assert len(together[0].unique(dim=0)) == 101
    assert fitted.own.output.shape == (1, 4, 76, 32)


def test_one_query_is_enough() -> None:
    evidence, mapped = drawn_evidence(4, 0.3, 1), feature_map("elu")
    state = SOLVERS["least-squares"](evidence.fitted(), mapped)
    assert bool(state.z.isfinite().all() and state.k.isfinite().all())
    assert float(errors(evidence.measured(), state, mapped).max()) < 0.2


# -- a prompt of a model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm() -> Any:
    """A model with small logits."""
    return tiny_model(initializer_range=0.05)


@pytest.fixture(scope="module")
def method(calm: Any) -> NTKAttention:
    return NTKAttention().fit(calm, tokens(1, 40, seed=5), tokens(6, 30, seed=6))


@torch.no_grad()
def divergence(model: Any, prompt: Tensor, text: Tensor, method: Any) -> tuple[float, float]:
    """KL to reading the prompt: through the method's cache, and without the prompt."""
    whole = model(torch.cat([prompt.expand(len(text), -1), text], dim=1)).logits[
        :, len(prompt[0]) :
    ]
    whole = whole.log_softmax(dim=2)
    cache = fewbits.kv.cache(model, method)
    found = model(text, past_key_values=cache).logits.log_softmax(dim=2)
    without = model(text).logits.log_softmax(dim=2)
    one, other = (float((whole.exp() * (whole - x)).sum(2).mean()) for x in (found, without))
    return one, other


def test_an_encoded_prompt_stands_for_its_tokens(calm: Any, method: NTKAttention) -> None:
    found, without = divergence(calm, tokens(1, 40, seed=5), tokens(3, 30, seed=7), method)
    assert found < without / 20


def test_exact_features_give_the_logits_of_the_prompt(calm: Any) -> None:
    """Positions too: the prompt lies before position 0, where the text begins."""
    prompt, text = tokens(1, 5, seed=5), tokens(2, 8, seed=7)
    exact = NTKAttention(features="taylor-2", solver="closed-form").fit(calm, prompt, text)
    assert float(exact.encoded.errors.max()) < 5e-3
    cache = fewbits.kv.cache(calm, exact)
    with torch.no_grad():
        found = calm(text, past_key_values=cache).logits
        whole = calm(torch.cat([prompt.expand(2, -1), text], dim=1)).logits[:, 5:]
        without = calm(text).logits
    torch.testing.assert_close(found, whole, rtol=0, atol=4e-3)
    assert float((without - whole).abs().max()) > 0.1


@pytest.mark.filterwarnings("ignore:ntk-attention")
def test_a_state_is_per_key_head_and_no_token_is_held(calm: Any, method: NTKAttention) -> None:
    assert method.artefact_bytes == 3 * 2 * (16**2 + 16) * 4
    assert method.encoded.errors.shape == (3, 2)
    assert method.encoded.tokens == 40
    longer = NTKAttention(solver="mass").fit(calm, tokens(1, 80, seed=5), tokens(2, 8, seed=6))
    assert longer.artefact_bytes == method.artefact_bytes
    cache = fewbits.kv.cache(calm, method)
    with torch.no_grad():
        calm(tokens(2, 10), past_key_values=cache)
    assert cache.nbytes() == 3 * 2 * 2 * 2 * 10 * 16 * 4
    assert cache.get_seq_length() == 10


@torch.no_grad()
def test_texts_in_pieces_with_an_encoded_prompt(calm: Any, method: NTKAttention) -> None:
    ids = tokens(2, 24, seed=8)
    whole = calm(ids, past_key_values=fewbits.kv.cache(calm, method)).logits
    cache = fewbits.kv.cache(calm, method)
    pieces = [calm(some, past_key_values=cache).logits for some in ids.split([10, 13, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_heads_that_miss_are_warned_of() -> None:
    model = tiny_model(initializer_range=0.4)
    with pytest.warns(UserWarning, match=r"of 6 heads miss .*\(layer"):
        found = NTKAttention(solver="closed-form").fit(
            model, tokens(1, 40, seed=5), tokens(2, 30, seed=6)
        )
    assert float(found.encoded.errors.max()) > 0.1


@torch.no_grad()
def test_a_saved_prompt_comes_back(calm: Any, method: NTKAttention, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    method.save(path)
    ids = tokens(2, 10)
    expected = calm(ids, past_key_values=fewbits.kv.cache(calm, method)).logits
    found = fewbits.kv.cache(calm, f"ntk-attention:fitted={path}")
    assert torch.equal(calm(ids, past_key_values=found).logits, expected)
    loaded = NTKAttention.load(path, calm)
    assert loaded.encoded.tokens == 40
    assert torch.equal(loaded.encoded.errors, method.encoded.errors)
    assert loaded.artefact_bytes == method.artefact_bytes
    with pytest.raises(FewbitsError, match="other weights"):
        NTKAttention.load(path, tiny_model(initializer_range=0.3, vocab_size=120))


def test_a_damaged_prompt_is_refused(method: NTKAttention, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "prompt"
    method.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, wrong in (("z", tensors["z"][:, :1]), ("k", tensors["k"].double())):
        save_file(tensors | {name: wrong.contiguous()}, path, metadata=metadata)
        with pytest.raises(FewbitsError, match="do not fit together"):
            NTKAttention.load(path)
    about = json.loads(metadata["about"])
    for harm in (
        {"scaling": [0.25]},
        {"features": 3},
        {"solver": "none"},
        {"scaling": ["a"] * 3},
        {"features": "taylor-2"},
    ):
        changed = about | {"settings": about["settings"] | harm}
        save_file(tensors, path, metadata=metadata | {"about": json.dumps(changed)})
        with pytest.raises(FewbitsError, match="do not fit together"):
            NTKAttention.load(path)


@pytest.mark.parametrize(
    ("prompt", "texts", "says"),
    [
        (tokens(2, 5), tokens(2, 5), "the prompt must be"),
        (tokens(1, 0), tokens(2, 5), "the prompt must be"),
        (torch.rand(5), tokens(2, 5), "the prompt must be"),
        (tokens(1, 5), tokens(1, 5)[0], "texts must be"),
        (tokens(1, 5), tokens(0, 5), "texts must be"),
        (tokens(1, 5), torch.rand(2, 5), "texts must be"),
        (tokens(1, 5), tokens(2, 5) + 128, "not in the vocabulary"),
    ],
)
def test_bad_tokens_are_refused(calm: Any, prompt: Tensor, texts: Tensor, says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        NTKAttention().fit(calm, prompt, texts)


def test_without_a_prompt_there_is_no_cache(calm: Any, method: NTKAttention) -> None:
    with pytest.raises(FewbitsError, match="fitted to a prompt first"):
        fewbits.kv.cache(calm, "ntk-attention")
    with pytest.raises(FewbitsError, match="solver='best'"):
        NTKAttention(solver="best")  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="are not known"):
        NTKAttention(features="best")
    for other, says in (
        (tiny_model(num_hidden_layers=2), "layers 3, but this one has 2"),
        (tiny_model(head_dim=8), "width of a head 16, but this one has 8"),
    ):
        with pytest.raises(FewbitsError, match=says):
            fewbits.kv.cache(other, method)


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(FewbitsError, match="sliding window"):
        NTKAttention().fit(tiny_model("gemma3"), tokens(1, 20), tokens(2, 5))


# -- the theory ----------------------------------------------------------------------------


def test_the_output_is_that_of_the_formula() -> None:
    weights, signs = drawn(3, 5), torch.tensor([1.0, -1, 1, 1, -1])
    x = drawn(2, 3, seed=1)
    shares = torch.exp(x @ weights)
    expected = sum(
        math.sqrt(5) * shares[:, r, None] * signs[r] * weights[:, r] for r in range(5)
    ) / shares.sum(dim=1, keepdim=True)
    torch.testing.assert_close(prefix_output(weights, signs, x), expected)


def test_the_kernel_is_the_gram_matrix_of_gradients() -> None:
    weights, signs, x = drawn(3, 7).double(), torch.ones(7).double(), drawn(2, 3, seed=1).double()
    kernel = empirical_kernel(weights, signs, x)
    step = 1e-6 * drawn(3, 7, seed=2).double()
    change = prefix_output(weights + step, signs, x) - prefix_output(weights - step, signs, x)
    assert kernel.shape == (6, 6)
    torch.testing.assert_close(kernel, kernel.T)
    rows = []
    for output in range(6):
        w = weights.clone().requires_grad_(True)
        prefix_output(w, signs, x).flatten()[output].backward()
        rows.append(w.grad.flatten())  # type: ignore[union-attr]
    gradients = torch.stack(rows)
    torch.testing.assert_close(kernel, gradients @ gradients.T)
    torch.testing.assert_close(change.flatten() / 2, gradients @ step.flatten(), rtol=1e-4, atol=0)


def test_longer_prefixes_train_further_and_move_less() -> None:
    x = torch.nn.functional.normalize(drawn(4, 3), dim=1)
    y = drawn(4, 3, seed=1)
    short, long = (train_prefix(x, y, m, steps=200) for m in (2, 512))
    for one in (short, long):
        assert one.losses.shape == (201,)
        assert float(one.losses[-1]) < float(one.losses[0])
    assert float(long.losses[-1]) < float(short.losses[-1])
    assert long.kernel_drift < short.kernel_drift
    assert long.weight_drift < short.weight_drift
    assert long.smallest_eigenvalue > 0
    assert abs(short.smallest_eigenvalue) < 1e-9  # 2·3 weights cannot move 12 outputs
    again = train_prefix(x, y, 512, steps=200)
    assert torch.equal(again.losses, long.losses)


@pytest.mark.parametrize(
    ("x", "y", "options", "says"),
    [
        (drawn(4, 3), drawn(4, 2), {}, "must both be"),
        (drawn(4), drawn(4), {}, "must both be"),
        (drawn(0, 3), drawn(0, 3), {}, "must both be"),
        (drawn(4, 3) * math.nan, drawn(4, 3), {}, "NaN"),
        (drawn(4, 3), drawn(4, 3) * math.inf, {}, "NaN or infinity"),
        (drawn(4, 3), drawn(4, 3), {"length": 0}, "at least 1"),
        (drawn(4, 3), drawn(4, 3), {"steps": 0}, "at least 1"),
    ],
)
def test_the_theory_refuses_bad_input(x: Tensor, y: Tensor, options: Any, says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        train_prefix(x, y, **({"length": 4} | options))
