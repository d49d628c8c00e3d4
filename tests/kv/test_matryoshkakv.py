"""MatryoshkaKV and PCA: exact at full rank, real bytes, orthogonal bases, ranks by a budget."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._basis_fitting import (
    Plan,
    RankCost,
    Simulated,
    TrainedBases,
    cross_entropy,
    divergence,
    drawn_ranks,
    log_probabilities,
    tune,
)
from fewbits.kv._cache import CompressedCache
from fewbits.kv._files import fingerprint, load_fitted, save_fitted
from fewbits.kv._forms import Exact, Part
from fewbits.kv._projected import Bases, Projected, Projection
from fewbits.kv._transformers import use_attention
from fewbits.kv.matryoshkakv import PCA, VALUES, Fitted, MatryoshkaKV, fold_values
from fewbits.primitives.greedy_budget import Descent
from fewbits.primitives.orthogonal import orthogonality_error
from fewbits.primitives.partial_attention import attend

TEXTS = tokens(4, 64)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(drawn(*shape).double())[0].float()


@pytest.fixture(scope="module")
def pca(llama: Any) -> PCA:
    return PCA(keep=0.5).fit(llama, TEXTS)


@pytest.fixture(scope="module")
def trained(llama: Any) -> MatryoshkaKV:
    return MatryoshkaKV(keep=0.5).fit(
        llama, TEXTS, steps=40, batch=2, learning_rate=5e-3, divergence_weight=1.0
    )


def with_ranks(method: PCA, ranks: Any) -> PCA:
    """A method whose heads have given (l, 2, h) ranks, as a search would leave it."""
    bases = method.learned.bases
    start = np.full(bases.mean[..., 0].numel(), bases.width)
    order = np.repeat(np.arange(len(start)), start - np.ravel(ranks))
    state = dataclasses.replace(method.learned, descent=Descent(start, 1, tuple(order.tolist())))
    keep = float(np.sum(ranks) / start.sum())
    return method.with_state(state).with_keep(keep, searched=True)


RAGGED = [[[16, 3], [5, 5]], [[1, 16], [7, 2]], [[4, 4], [16, 16]]]


# -- exactness -----------------------------------------------------------------------------


@torch.no_grad()
def test_full_ranks_are_the_unchanged_model(family: str) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    cache = fewbits.kv.cache(model, PCA(keep=1.0).fit(model, TEXTS))
    past = DynamicCache(config=plain.config)
    for piece in tokens(2, 60, seed=1).split([40, 12, 1, 1, 6], dim=1):
        expected = plain(piece, past_key_values=past).logits
        found = model(piece, past_key_values=cache).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 60


@torch.no_grad()
def test_full_ranks_generate_the_same_with_padding_and_beams(llama: Any) -> None:
    method, ids = PCA(keep=1.0).fit(llama, TEXTS), tokens(2, 40, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for options in ({}, {"num_beams": 3}):
        given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False} | options
        expected = tiny_model().generate(ids, **given)
        found = llama.generate(ids, past_key_values=fewbits.kv.cache(llama, method), **given)
        assert found.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
def test_pieces_of_a_prompt_are_the_whole(llama: Any, pca: PCA, exact: bool) -> None:
    method = with_ranks(pca, RAGGED)
    method = dataclasses.replace(method, exact_prefill=exact).with_state(method.learned)
    whole, pieces = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    ids, more = tokens(2, 50, seed=1), tokens(2, 4, seed=2)
    llama(ids, past_key_values=whole)
    with pieces.prompt():
        for piece in ids.split(23, dim=1):
            llama(piece, past_key_values=pieces)
    expected = llama(more, past_key_values=whole).logits
    found = llama(more, past_key_values=pieces).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_question_of_several_tokens_is_that_of_one_after_another(llama: Any, pca: PCA) -> None:
    method = with_ranks(pca, RAGGED)
    first, second = fewbits.kv.cache(llama, method), fewbits.kv.cache(llama, method)
    more = tokens(2, 5, seed=1)
    for cache in (first, second):
        llama(TEXTS[:2], past_key_values=cache)
    together = llama(more, past_key_values=first).logits
    apart = [llama(one, past_key_values=second).logits for one in more.split(1, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_gives_what_training_saw(llama: Any, pca: PCA) -> None:
    """Prefill, continuation and the simulation of training are one model."""
    method = with_ranks(pca, RAGGED)
    stage = Simulated.of(method.learned.bases, torch.tensor(RAGGED))
    expected = log_probabilities(llama, TEXTS, None, stage)
    cache = fewbits.kv.cache(llama, method)
    parts = [llama(ids, past_key_values=cache).logits for ids in TEXTS.split([50, 13, 1], dim=1)]
    found = torch.cat(parts, dim=1).log_softmax(dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_prefill_may_be_exact(llama: Any, pca: PCA) -> None:
    expected = llama(TEXTS).logits
    for exact in (True, False):
        method = dataclasses.replace(pca, exact_prefill=exact).with_state(pca.learned)
        cache = fewbits.kv.cache(llama, method)
        found = llama(TEXTS, past_key_values=cache).logits
        assert bool(torch.allclose(found, expected, atol=1e-4)) is exact
        assert cache.nbytes() == 4 * 64 * 3 * 2 * 2 * 8 * 4


# -- one layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[8, 8, 8], [8, 3, 8], [1, 2, 3]])
def test_attention_among_coordinates_is_that_over_what_they_stand_for(ranks: list[int]) -> None:
    projection = Projection(rotations(3, 8, 8), drawn(3, 8, seed=1), np.array(ranks))
    form = Projected.of(drawn(2, 3, 20, 8, seed=2), projection)
    seen = Exact(form.read())
    torch.testing.assert_close(form.read(), projection.projected(drawn(2, 3, 20, 8, seed=2)))
    queries = drawn(2, 3, 5, 8, seed=3)
    torch.testing.assert_close(form.scores(queries), seen.scores(queries), rtol=1e-4, atol=1e-5)
    weights = drawn(2, 3, 5, 20, seed=4)
    torch.testing.assert_close(form.mix(weights), seen.mix(weights), rtol=1e-4, atol=1e-4)


def test_each_head_loses_its_own_coordinates() -> None:
    basis, mean, states = rotations(2, 8, 8), drawn(2, 8, seed=1), drawn(1, 2, 6, 8, seed=2)
    form = Projected.of(states, Projection(basis, mean, np.array([3, 6])))
    for head, rank in enumerate((3, 6)):
        cut = basis[head, :, :rank]
        expected = (states[0, head] - mean[head]) @ cut @ cut.T + mean[head]
        torch.testing.assert_close(form.read()[0, head], expected)
    assert sorted(one.read().shape[3] for one in form.held) == [3, 6]


def test_the_mean_of_the_keys_cancels_in_the_softmax() -> None:
    """Alone. Beside other keys or in a capped score it counts, so `scores` has it."""
    basis, states, queries = rotations(2, 8, 8), drawn(1, 2, 12, 8, seed=1), drawn(1, 2, 4, 8)
    form = Projected.of(states, Projection(basis, drawn(2, 8, seed=5), np.array([4, 6])))
    without = dataclasses.replace(
        form, projection=Projection(basis, torch.zeros(2, 8), np.array([4, 6]))
    )
    assert not torch.allclose(form.scores(queries), without.scores(queries), atol=0.1)
    first, second = (
        attend(queries, one.scores, Exact(states).mix, 12, 8**-0.5).output
        for one in (form, without)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_head_reads_no_other() -> None:
    projection = Projection(rotations(2, 8, 8), drawn(2, 8), np.array([2, 5]))
    states = drawn(1, 2, 6, 8)
    changed = states.clone()
    changed[:, 1] += 1
    first, second = (Projected.of(one, projection).read() for one in (states, changed))
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1], second[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_stay_half(dtype: torch.dtype) -> None:
    projection = Projection(rotations(2, 8, 8), drawn(2, 8), np.array([8, 8]))
    states = drawn(1, 2, 6, 8).to(dtype)
    form = Projected.of(states, projection)
    assert {tensor.dtype for _, tensor in form.tensors()} == {dtype}
    assert form.read().dtype == form.scores(states).dtype == dtype
    assert form.mix(drawn(1, 2, 3, 6).to(dtype)).dtype == dtype
    torch.testing.assert_close(form.read(), states, rtol=0.02, atol=0.02)


# -- bytes ---------------------------------------------------------------------------------


@torch.no_grad()
def test_bytes_are_those_of_the_coordinates(llama: Any, pca: PCA) -> None:
    """Ranks of key heads (not of query heads), float32, and nothing that grows beside."""
    for method in (pca, with_ranks(pca, RAGGED), pca.with_keep(0.25), pca.with_keep(1.0)):
        cache = fewbits.kv.cache(llama, method)
        for count, seen in ((50, 50), (1, 51), (1, 52), (7, 59)):
            llama(tokens(2, count, seed=count), past_key_values=cache)
            assert cache.nbytes() == 2 * seen * method.ranks.sum() * 4
            assert cache.breakdown()["recent"] == 0
            assert [len(layer.parts) for layer in cache.compressed] == [1, 1, 1]
    whole = fewbits.kv.cache(llama, "full")
    llama(tokens(2, 50, seed=50), past_key_values=whole)
    assert whole.nbytes() == 2 * 50 * 3 * 2 * 2 * 16 * 4


@torch.no_grad()
def test_no_tensor_of_full_width_is_left(llama: Any, pca: PCA) -> None:
    cache = fewbits.kv.cache(llama, pca)
    llama(TEXTS, past_key_values=cache)
    widths = [one.shape[3] for layer in cache.compressed for _, one in layer.tensors() if len(one)]
    assert set(widths) <= {8, 16}
    held = [one for layer in cache.compressed for _, one in layer.tensors()]
    assert all(one.shape[2] == 0 for one in held if one.shape[3] == 16)
    assert all(layer.incoming is None for layer in cache.compressed)


@torch.no_grad()
def test_rows_can_be_chosen_repeated_and_dropped(llama: Any, pca: PCA) -> None:
    cache = fewbits.kv.cache(llama, with_ranks(pca, RAGGED))
    llama(TEXTS, past_key_values=cache)
    more = tokens(4, 3, seed=3)
    kept = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    found = llama(more, past_key_values=cache).logits
    expected = llama(more[[1, 2, 0, 3]], past_key_values=kept).logits[[2, 0, 1, 3]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kept.batch_select_indices(torch.tensor([1]))
    assert kept.nbytes() * 4 == cache.nbytes()
    kept.reset()
    assert kept.nbytes() == 0


@torch.no_grad()
def test_coordinates_can_be_quantised(llama: Any, pca: PCA) -> None:
    """kivi with few bits on whole coordinates is close, and costs bits of the ranks alone."""
    found = {}
    for bits in (8, 2):
        method = [pca.with_keep(1.0), *fewbits.kv.stages(f"kivi:bits={bits},group=16,recent=16")]
        cache = fewbits.kv.cache(llama, method)
        llama(tokens(2, 80), past_key_values=cache)
        found[bits] = llama(tokens(2, 3, seed=1), past_key_values=cache).logits
    whole = fewbits.kv.cache(llama, "full")
    llama(tokens(2, 80), past_key_values=whole)
    expected = llama(tokens(2, 3, seed=1), past_key_values=whole).logits
    errors = {bits: float((logits - expected).abs().mean()) for bits, logits in found.items()}
    assert errors[8] < 0.05
    assert errors[8] < errors[2] / 10
    half = fewbits.kv.cache(llama, [pca, *fewbits.kv.stages("kivi:bits=8,group=16,recent=16")])
    llama(tokens(2, 80), past_key_values=half)
    for _ in range(16):
        llama(tokens(2, 1), past_key_values=half)
    codes = 80 * 8
    scales = (2 * 5 * 8 + 2 * 80) * 4
    assert half.breakdown()["parts"] == 2 * 3 * 2 * (2 * codes + scales)
    assert len(half.compressed[0].parts) == 1


@torch.no_grad()
def test_tokens_can_be_chosen_first(llama: Any, pca: PCA) -> None:
    method = [*fewbits.kv.stages("snapkv:keep=0.5,queries=8"), pca]
    cache = fewbits.kv.cache(llama, method)
    llama(TEXTS, past_key_values=cache)
    assert cache.nbytes() == 4 * 32 * 3 * 2 * 2 * 8 * 4
    llama(TEXTS[:, :3], past_key_values=cache)


@torch.no_grad()
def test_thin_keys_cannot_be_projected(llama: Any, pca: PCA) -> None:
    method = [*fewbits.kv.stages("think:ratio=0.5,recent=0"), pca]
    with pytest.raises(FewbitsError, match="put it first"):
        llama(TEXTS, past_key_values=fewbits.kv.cache(llama, method))


# -- calibration ---------------------------------------------------------------------------


def states_of(model: Any, ids: torch.Tensor) -> Any:
    """(l, 2) keys and values, (b, h, t, d)."""
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=past)
    return [(layer.keys, layer.values) for layer in past.layers]


def test_bases_are_principal_directions(pca: PCA) -> None:
    bases = pca.learned.bases
    assert bases.layers == (0, 1, 2)
    assert bases.basis.shape == (3, 2, 2, 16, 16)
    assert bases.basis.dtype == bases.mean.dtype == torch.float32
    assert orthogonality_error(bases.basis) < 1e-5
    for row, pair in enumerate(states_of(tiny_model(), TEXTS)):
        for kind, states in enumerate(pair):
            for head in range(2):
                x = states[:, head].reshape(-1, 16).double()
                torch.testing.assert_close(
                    bases.mean[row, kind, head].double(), x.mean(0), rtol=1e-4, atol=1e-5
                )
                turned = (x - x.mean(0)) @ bases.basis[row, kind, head].double()
                covariance = turned.T @ turned
                variances = covariance.diagonal()
                assert bool((variances[:-1] >= variances[1:] - 1e-6).all())
                off = covariance - variances.diag()
                assert float(off.abs().max()) < 1e-4 * float(variances.max())


def test_no_other_basis_of_a_rank_loses_less(pca: PCA) -> None:
    """The theorem of Eckart and Young, against drawn bases."""
    (keys, _), *_ = states_of(tiny_model(), TEXTS)
    bases = pca.learned.bases
    own = Projection(bases.basis[0, 0], bases.mean[0, 0], np.array([6, 6]))
    lost = (own.projected(keys) - keys).square().sum()
    for seed in range(5):
        basis = torch.linalg.qr(drawn(2, 16, 16, seed=seed))[0]
        other = Projection(basis, bases.mean[0, 0], np.array([6, 6]))
        assert float(lost) < 0.9 * float((other.projected(keys) - keys).square().sum())


def test_batches_make_no_difference(llama: Any, pca: PCA) -> None:
    one = PCA().fit(llama, TEXTS, batch=1).learned.bases
    torch.testing.assert_close(one.mean, pca.learned.bases.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.basis.abs(), pca.learned.bases.basis.abs(), rtol=0.01, atol=0.01)


def test_padding_does_not_count(llama: Any) -> None:
    """Left padding, with the positions that generate gives: as the text alone."""
    text = tokens(1, 40, seed=3)
    padded = torch.cat([torch.full((1, 9), 7), text], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :9] = 0
    with_pads = PCA().fit(llama, padded, mask=mask).learned.bases
    alone = PCA().fit(llama, text).learned.bases
    unmasked = PCA().fit(llama, padded).learned.bases
    # Values of the first layer depend on the token alone, whatever its position.
    torch.testing.assert_close(with_pads.mean[0, 1], alone.mean[0, 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked.mean[0, 1], alone.mean[0, 1], atol=1e-2)


def test_training_and_search_do_not_count_padding(llama: Any) -> None:
    """Right padding: on the left it would shift positions, and projected keys depend on them."""
    text = tokens(1, 40, seed=3)
    padded = torch.cat([text, torch.full((1, 60), 7)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 40:] = 0
    method = PCA().fit(llama, text)
    with_pads, alone, unmasked = (
        RankCost(llama, method.learned.bases, ids, given, 8)(np.ravel(RAGGED))
        for ids, given in ((padded, mask), (text, None), (padded, None))
    )
    assert with_pads == pytest.approx(alone, rel=1e-3)
    assert unmasked != pytest.approx(alone, rel=1e-2)
    found, again = (
        MatryoshkaKV().fit(llama, ids, mask=given, steps=2, learning_rate=1e-4).learned.bases.mean
        for ids, given in ((padded, mask), (text, None))
    )
    torch.testing.assert_close(found, again, rtol=0, atol=1e-4)


def test_training_bears_padding_on_the_left(llama: Any) -> None:
    mask = torch.ones_like(TEXTS)
    mask[:2, :30] = 0
    bases = MatryoshkaKV().fit(llama, TEXTS, mask=mask, steps=2).learned.bases
    assert bool(bases.mean.isfinite().all())
    assert orthogonality_error(bases.basis) <= 1e-5


def test_the_first_token_may_be_left_out(llama: Any) -> None:
    found = PCA().fit(llama, TEXTS, first_token=False).learned.bases
    (_, values), *_ = states_of(tiny_model(), TEXTS)
    expected = values[:, :, 1:].mean(dim=(0, 2))
    torch.testing.assert_close(found.mean[0, 1], expected, rtol=1e-4, atol=1e-5)


def test_constant_states_give_a_basis(llama: Any) -> None:
    bases = PCA().fit(llama, torch.full((2, 8), 5)).learned.bases
    assert orthogonality_error(bases.basis) < 1e-5
    assert bool(bases.mean.isfinite().all())


# -- training ------------------------------------------------------------------------------


def test_training_keeps_bases_orthogonal_and_the_model_as_it_was(
    pca: PCA, trained: MatryoshkaKV
) -> None:
    bases = trained.learned.bases
    assert orthogonality_error(bases.basis) <= 1e-5
    assert not torch.allclose(bases.basis, pca.learned.bases.basis, atol=1e-3)
    assert not torch.allclose(bases.mean, pca.learned.bases.mean, atol=1e-3)
    assert not bases.basis.requires_grad
    assert not bases.mean.requires_grad


def test_only_bases_and_means_get_gradients(llama: Any, pca: PCA) -> None:
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    MatryoshkaKV().fit(model, TEXTS, steps=2)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(weights.grad is None for weights in model.parameters())
    flags = {name: weights.requires_grad for name, weights in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["lm_head.weight"]
    assert model.training
    module = TrainedBases(pca.learned.bases)
    assert {name for name, _ in module.named_parameters()} == {"free", "mean"}
    found = log_probabilities(
        llama, TEXTS, None, Simulated.of(module.bases(), torch.tensor(RAGGED))
    )
    cross_entropy(found, TEXTS, None).backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        heads = parameter.grad.flatten(3).abs().amax(dim=3)
        full = torch.tensor(RAGGED) == 16
        assert bool((heads[~full] > 0).all())  # every head that loses something learns


def test_training_starts_at_the_principal_directions(pca: PCA) -> None:
    start = TrainedBases(pca.learned.bases).bases()
    torch.testing.assert_close(start.basis, pca.learned.bases.basis)
    assert torch.equal(start.mean, pca.learned.bases.mean)


def test_training_helps_where_much_is_lost(llama: Any, pca: PCA, trained: MatryoshkaKV) -> None:
    """On its own texts, at the budgets that one training serves, against equal bytes of PCA."""
    for keep in (0.25, 0.375):
        ours, theirs = (
            RankCost(llama, one.learned.bases, TEXTS, None, 8)(one.with_keep(keep).ranks.ravel())
            for one in (trained, pca)
        )
        assert ours < theirs * 0.98


def test_a_seed_names_one_result(llama: Any) -> None:
    first, again, other = (
        MatryoshkaKV().fit(llama, TEXTS, steps=3, seed=seed).learned.bases.basis
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_goes_on_from_a_checkpoint(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    first, again = (
        MatryoshkaKV().fit(llama, TEXTS, steps=3, checkpoint=one).learned.bases.basis
        for one in (None, path)
    )
    assert torch.equal(first, again)
    assert not path.exists()


def test_drawn_ranks_are_the_eighths_of_the_width() -> None:
    torch.manual_seed(0)
    found = drawn_ranks(torch.Size([40, 2, 20]), 32)
    assert found.unique().tolist() == list(range(4, 33, 4))
    assert float(found.float().mean()) == pytest.approx(18, abs=0.6)
    assert drawn_ranks(torch.Size([40, 2, 20]), 4).unique().tolist() == [1, 2, 3, 4]
    drawn_apart = found[:, 0].float() - found[:, 1]
    assert float(drawn_apart.abs().mean()) > 5


def test_divergence_and_cross_entropy_by_hand() -> None:
    whole = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]]).log()
    found = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.1, 0.9]]]).log()
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    mask = torch.tensor([[1, 1, 0]])
    assert float(divergence(whole, found, mask)) == pytest.approx(first / 2, rel=1e-5)
    ids = torch.tensor([[0, 1, 0]])
    expected = -(np.log(0.75) + np.log(0.9)) / 2
    assert float(cross_entropy(found, ids, None)) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy(found, ids, mask)) == pytest.approx(-np.log(0.75), rel=1e-5)


def test_one_rank_can_be_trained_alone(llama: Any, pca: PCA) -> None:
    """What the paper compares with: directions that this rank never uses stay as they were."""
    plan = Plan(3, 4, 1e-3, 1.0, 0, draw=lambda shape, width: torch.full(shape, width))
    bases, history = tune(llama, pca.learned.bases, TEXTS, None, plan, pca.learned.model)
    assert history.steps == 3
    assert history.loss[0] == pytest.approx(0, abs=1e-5)  # full ranks lose nothing
    assert orthogonality_error(bases.basis) <= 1e-5


# -- ranks ---------------------------------------------------------------------------------


def test_uniform_ranks_are_the_budget(pca: PCA) -> None:
    for keep, rank in ((1.0, 16), (0.75, 12), (0.375, 6), (0.25, 4), (0.05, 1), (0.01, 1)):
        assert set(pca.with_keep(keep).ranks.ravel().tolist()) == {rank}


def test_the_search_meets_the_budget_and_its_way_every_larger_one(llama: Any, pca: PCA) -> None:
    found = pca.with_keep(0.5).search(llama, TEXTS[:2, :32], batch_decrements=3)
    assert found.searched
    for keep in (0.5, 0.75, 1.0):
        ranks = found.with_keep(keep).ranks
        assert ranks.sum() == keep * 12 * 16
        assert ranks.min() >= 2
        assert set((ranks % 2).ravel().tolist()) == {0}
    assert len(np.unique(found.ranks)) > 2
    with pytest.raises(FewbitsError, match=r"no search went down to keep=0\.25"):
        found.with_keep(0.25).ranks  # noqa: B018
    assert set(found.with_keep(0.5, searched=False).ranks.ravel().tolist()) == {8}


def test_searched_ranks_beat_one_rank_for_all(llama: Any, pca: PCA) -> None:
    """At equal bytes, on the prompts of the search and on others."""
    found = pca.with_keep(0.5).search(llama, TEXTS, batch_decrements=4)
    for texts in (TEXTS, tokens(4, 64, seed=9)):
        cost = RankCost(llama, pca.learned.bases, texts, None, 8)
        assert cost(found.ranks.ravel()) < cost(pca.ranks.ravel())


def test_each_fall_is_the_cheapest_of_its_round(llama: Any, pca: PCA) -> None:
    found = pca.with_keep(1 - 1 / 96).search(llama, TEXTS)
    cost = RankCost(llama, pca.learned.bases, TEXTS, None, 3)
    costs = []
    for entry in range(12):
        ranks = np.full(12, 16)
        ranks[entry] = 14
        costs.append(cost(ranks))
    assert found.learned.descent.order == (int(np.argmin(costs)),)  # type: ignore[union-attr]


def test_full_ranks_cost_nothing_and_lower_ones_more(llama: Any, pca: PCA) -> None:
    cost = RankCost(llama, pca.learned.bases, TEXTS, None, 8)
    costs = [cost(np.full(12, rank)) for rank in (16, 12, 8, 4, 2)]
    assert costs[0] == pytest.approx(0, abs=1e-5)
    assert costs == sorted(costs)


# -- folding -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("made_of", ["llama", "qwen2"])
def test_folded_values_are_the_unfolded_path(made_of: str) -> None:
    model = tiny_model(made_of)
    method = with_ranks(PCA().fit(model, TEXTS), RAGGED)
    folded, rest = fold_values(model, method)
    assert rest.ranks.tolist() == RAGGED
    for one in (1.0, None):
        first, second = (
            method if one is None else method.with_keep(one, searched=False),
            rest if one is None else rest.with_keep(one, searched=False),
        )
        caches = fewbits.kv.cache(model, first), fewbits.kv.cache(folded, second)
        for ids in (TEXTS, tokens(4, 3, seed=1), tokens(4, 1, seed=2)):
            expected = model(ids, past_key_values=caches[0]).logits
            found = folded(ids, past_key_values=caches[1]).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        assert caches[0].nbytes() == caches[1].nbytes()
    for (_, kind), projection in rest._projections.items():  # of values a slice, no product
        assert all((cut is None) == (kind == VALUES) for _, _, cut in projection.buckets)
    torch.testing.assert_close(model(TEXTS).logits, folded(TEXTS).logits, rtol=1e-4, atol=2e-4)


def test_what_cannot_be_folded_is_refused(llama: Any, pca: PCA) -> None:
    with pytest.raises(FewbitsError, match="other weights"):
        fold_values(tiny_model(intermediate_size=100), pca)
    model = tiny_model()
    fitted = PCA().fit(model, TEXTS)
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, found: found**3)
    with pytest.raises(FewbitsError, match="changed behind v_proj"):
        fold_values(model, fitted)


# -- files ---------------------------------------------------------------------------------


@torch.no_grad()
def test_files_bring_back_the_same_cache(llama: Any, trained: MatryoshkaKV, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    found = trained.with_keep(0.75).search(llama, TEXTS, batch_decrements=24)
    found.save(path)
    names = set(load_file(path))
    assert {"layers.0.k_basis", "layers.2.v_mean"} <= names
    assert len(names) == 12
    made = [
        MatryoshkaKV.load(path, keep=0.75, searched=True),
        *fewbits.kv.stages(f"matryoshkakv:fitted={path},keep=0.75,searched=yes"),
    ]
    caches = [fewbits.kv.cache(llama, one) for one in (found, *made)]
    logits = []
    for cache in caches:
        llama(TEXTS, past_key_values=cache)
        logits.append(llama(TEXTS[:, :2], past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert caches[0].nbytes() == caches[2].nbytes()
    assert made[0].artefact_bytes == 12 * 2 * (16 * 16 + 16) * 4 / 2
    made[0].check_model(llama)
    with pytest.raises(FewbitsError, match="other weights"):
        made[0].check_model(tiny_model(intermediate_size=100))


def test_a_file_of_the_other_method_is_refused(pca: PCA, tmp_path: Path) -> None:
    pca.save(tmp_path / "p")
    with pytest.raises(FewbitsError, match="is of the method pca, not of matryoshkakv"):
        MatryoshkaKV.load(tmp_path / "p")
    with pytest.raises(FewbitsError, match="exists"):
        pca.save(tmp_path / "p")
    pca.save(tmp_path / "p", overwrite=True)
    with pytest.raises(FewbitsError, match="no search went down"):
        PCA.load(tmp_path / "p", searched=True)
    with pytest.raises(FewbitsError, match="cannot read"):
        PCA.load(tmp_path / "missing")


def damaged(tensors: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    """Change the content of a file in a way that must show."""
    name = "layers.1.k_basis"
    if what == "missing":
        del tensors[name]
    elif what == "more":
        tensors["layers.3.k_basis"] = tensors[name].clone()
    elif what == "no basis":
        tensors[name] = tensors[name] * 2
    elif what == "half":
        tensors.update({key: one.half() for key, one in tensors.items()})
    elif what == "flat":
        tensors.update({key: one[0].clone() for key, one in tensors.items()})
    elif what == "wide":
        tensors.update(
            {key: one[..., :8].clone() for key, one in tensors.items() if "basis" in key}
        )
    elif what == "nan":
        tensors["layers.0.v_mean"][0, 0] = torch.nan
    else:
        settings.update(
            {
                "layers": {"layers": "012"},
                "order of layers": {"layers": [1, 0, 2]},
                "no layers": {"layers": []},
                "negative": {"layers": [-1, 0, 2]},
                "order": {"order": [0, 99], "step": 2},
                "too deep": {"order": [0] * 8, "step": 2},
                "no step": {"order": [0]},
                "step": {"order": [0], "step": 0},
                "words": {"order": ["0"], "step": 2},
                "true": {"order": [True], "step": 2},
            }[what]
        )


@pytest.mark.parametrize(
    "what",
    [
        *("missing", "more", "no basis", "half", "flat", "wide", "nan", "layers", "no layers"),
        *("order of layers", "negative", "order", "too deep", "no step", "step", "words", "true"),
    ],
)
def test_damaged_files_are_refused(pca: PCA, tmp_path: Path, what: str) -> None:
    path = tmp_path / "p"
    pca.save(path)
    tensors, settings, model = load_fitted(path, "pca")
    damaged(tensors, settings, what)
    save_fitted(path, "pca", tensors, settings, model, overwrite=True)
    with pytest.raises(FewbitsError, match="p is damaged"):
        PCA.load(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "p")
    with pytest.raises(FewbitsError, match="no file of a fitted method"):
        PCA.load(tmp_path / "p")


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_budgets_that_make_no_sense_are_refused(keep: float) -> None:
    with pytest.raises(FewbitsError, match="keep="):
        MatryoshkaKV(keep=keep)


def test_an_unfitted_method_says_how_to_fit(llama: Any) -> None:
    for spec in ("matryoshkakv", "matryoshkakv:keep=0.25,searched=yes"):
        with pytest.raises(FewbitsError, match=r"MatryoshkaKV\(\)\.fit\(model, tokens\)"):
            fewbits.kv.cache(llama, spec)
    for call in (PCA().save, lambda path: PCA().search(llama, TEXTS)):
        with pytest.raises(FewbitsError, match="pca must be fitted"):
            call("nowhere")


def test_another_model_is_refused(pca: PCA) -> None:
    wider = tiny_model(head_dim=32)
    use_attention(wider)
    with (
        torch.no_grad(),
        pytest.raises(FewbitsError, match="2 key heads of width 16; fit it to this one"),
    ):
        wider(TEXTS, past_key_values=CompressedCache(wider.config, [pca]))
    for call in (lambda: pca.search(wider, TEXTS), lambda: fewbits.kv.cache(wider, pca)):
        with pytest.raises(FewbitsError, match="fit it again"):
            call()


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (torch.zeros(3, dtype=torch.long), None, "whole numbers"),
        (torch.zeros(0, 8, dtype=torch.long), None, "whole numbers"),
        (torch.zeros(2, 1, dtype=torch.long), None, "at least 2 tokens"),
        (torch.zeros(2, 8), None, "float32"),
        (torch.ones(2, 8, dtype=torch.long), torch.ones(2, 7), "mask must be of the shape"),
        (torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 8), "mark a token in each"),
    ],
)
def test_tokens_of_another_shape_are_refused(llama: Any, ids: Any, mask: Any, says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        PCA().fit(llama, ids, mask=mask)


def test_too_few_tokens_are_refused(llama: Any) -> None:
    mask = torch.tensor([[0, 0, 1]])
    with pytest.raises(FewbitsError, match="at least 2 tokens"):
        PCA().fit(llama, torch.tensor([[3, 4, 5]]), mask=mask)
    with pytest.raises(FewbitsError, match="at least 2 tokens"):
        PCA().fit(llama, torch.tensor([[3, 4]]), first_token=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_gives_no_numbers_is_refused(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 3] = bad
    with pytest.raises(FewbitsError, match="NaN or infinite"):
        PCA().fit(model, TEXTS)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"divergence_weight": 1.5},
        {"seed": -1},
    ],
)
def test_numbers_of_training_out_of_range_are_refused(llama: Any, options: dict[str, Any]) -> None:
    with pytest.raises(FewbitsError, match=next(iter(options))):
        MatryoshkaKV().fit(llama, TEXTS, **options)


def test_numbers_of_the_search_out_of_range_are_refused(llama: Any, pca: PCA) -> None:
    with pytest.raises(FewbitsError, match="batch_decrements"):
        pca.search(llama, TEXTS, batch_decrements=0)
    with pytest.raises(FewbitsError, match="prompts must be"):
        pca.search(llama, TEXTS[0])


def test_fitted_methods_of_models_without_some_layers(llama: Any, pca: PCA) -> None:
    """A layer that was not there in fitting is not guessed."""
    state = pca.learned
    some = Bases((0, 2), state.bases.basis[[0, 2]], state.bases.mean[[0, 2]])
    method = pca.with_state(Fitted(fingerprint(llama), some))
    with torch.no_grad(), pytest.raises(FewbitsError, match="fitted to another model"):
        llama(TEXTS, past_key_values=fewbits.kv.cache(llama, method))


def test_an_empty_part_stays_empty(pca: PCA) -> None:
    projection = Projection(rotations(2, 8, 8), drawn(2, 8), np.array([3, 5]))
    form = Projected.of(torch.zeros(1, 2, 0, 8), projection)
    assert form.tokens == Part(form, form).tokens == 0
    assert form.scores(drawn(1, 2, 4, 8)).shape == (1, 2, 4, 0)
    assert torch.equal(form.mix(torch.zeros(1, 2, 4, 0)), torch.zeros(1, 2, 4, 8))
