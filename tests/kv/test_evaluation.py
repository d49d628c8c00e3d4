"""The evaluation of caches: what loses nothing costs nothing, and bytes are those held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv.evaluation import batch_of, evaluate

METHODS = ("full", "kivi:bits=4,group=16,recent=16", "kivi:bits=2,group=16,recent=16")


@pytest.fixture(scope="module")
def costs(llama: Any) -> dict[str, Any]:
    found = evaluate(llama, tokens(3, 80), 64, METHODS, batch=2)
    return {cost.method: cost for cost in found}


def test_the_whole_cache_costs_nothing(costs: dict[str, Any], llama: Any) -> None:
    cost = costs["full"]
    assert cost.divergence == pytest.approx(0, abs=1e-6)
    assert (cost.agreement, cost.share) == (1, 1)
    assert cost.bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert cost.bits_per_number == 32
    with torch.no_grad():
        logits = llama(tokens(3, 80)).logits[:, 63:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(3, 80)[:, 64:].flatten())
    assert cost.perplexity == pytest.approx(float(loss.exp()), rel=1e-3)


def test_fewer_bits_cost_more(costs: dict[str, Any]) -> None:
    full, four, two = (costs[method] for method in METHODS)
    assert full.divergence < four.divergence < two.divergence
    assert full.share > four.share > two.share > 0.25  # a quarter of the tokens is exact
    assert two.agreement <= four.agreement <= 1
    assert min(cost.tokens_per_second for cost in costs.values()) > 0


def test_batches_do_not_matter(llama: Any, costs: dict[str, Any]) -> None:
    (again,) = evaluate(llama, tokens(3, 80), 64, [METHODS[1]], batch=3)
    assert again.divergence == pytest.approx(costs[METHODS[1]].divergence, rel=1e-3)
    assert again.bytes_per_token == costs[METHODS[1]].bytes_per_token


def test_methods_may_have_names(llama: Any, costs: dict[str, Any]) -> None:
    stage = fewbits.kv.stages(METHODS[1])
    found = evaluate(llama, tokens(3, 80), 64, {"mine": stage, "full": "full"}, batch=2)
    assert [cost.method for cost in found] == ["mine", "full"]
    assert found[0].divergence == pytest.approx(costs[METHODS[1]].divergence, rel=1e-3)


def test_batches_of_large_vocabularies_are_small(llama: Any) -> None:
    assert batch_of(llama, 64, 8) == 8
    assert batch_of(llama, 2**28 // (4 * 128) // 3, 8) == 3
    assert batch_of(llama, 2**28, 8) == 1


@pytest.mark.parametrize(("shape", "prompt"), [((80,), 64), ((2, 80), 80), ((2, 80), 0)])
def test_texts_without_a_continuation_are_refused(
    llama: Any, shape: tuple[int, ...], prompt: int
) -> None:
    with pytest.raises(FewbitsError, match="tokens must be"):
        evaluate(llama, torch.zeros(shape, dtype=torch.long), prompt, ["full"])
