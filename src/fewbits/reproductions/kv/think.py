"""ThinK's claim: key channels that recent queries do not care for can go, also behind a choice of
tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv import cache
from fewbits.kv._cache import Memory
from fewbits.kv._forms import Channels, Form
from fewbits.kv.baselines import KIVI, SnapKV
from fewbits.kv.think import ThinK, channel_scores
from fewbits.primitives.partial_attention import fold
from fewbits.reproductions.kv._measure import Cost, Methods, costs, mean_cost, table, test_texts

SAVED, LOST = 0.20, 0.01
CLAIM = (
    "channels chosen by recent queries cost less than random ones at every ratio and, on average, "
    f"less than those with the smallest keys; behind SnapKV, ThinK saves {SAVED:.0%} of the bytes "
    f"or more with at most {LOST:.0%} higher perplexity, and diverges less than SnapKV alone that "
    "keeps as many bytes"
)


@dataclass(frozen=True)
class Size:
    rows: int
    prompt: int
    scored: int
    ratios: tuple[float, ...]
    seeds: int


SIZES = {
    "quick": Size(rows=4, prompt=192, scored=32, ratios=(0.5,), seeds=1),
    "small": Size(rows=32, prompt=960, scored=64, ratios=(0.25, 0.4, 0.5, 0.6, 0.75), seeds=3),
}
KEEP, RATIO = 0.5, 0.5
"""Of the chain with SnapKV."""


@dataclass
class KeyNorm(ThinK):
    """Drops the channels in which keys are small, whatever is asked of them."""

    name: ClassVar[str] = "key-norm"

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        return Channels.of(keys, highest(keys.float().norm(dim=2), self.ratio))


@dataclass
class RandomChannels(ThinK):
    """Drops channels by lot."""

    name: ClassVar[str] = "random-channels"

    seed: int = 0

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        generator = torch.Generator().manual_seed(1000 * self.seed + memory.layer)
        drawn = torch.rand(keys.shape[0], keys.shape[1], keys.shape[3], generator=generator)
        return Channels.of(keys, highest(drawn.to(keys.device), self.ratio))


def highest(scores: Tensor, ratio: float) -> Tensor:
    """(b, h, k) rising numbers of the channels that stay."""
    count = scores.shape[2] - int(ratio * scores.shape[2])
    return scores.topk(count, dim=2).indices.sort(dim=2).values.to(torch.uint8)


def run(size: str = "small") -> Reproduction:
    """Run the claim on the reference model and a text that it has not seen."""
    plan = SIZES[size]
    model, tokenizer = load_language_model()
    tokens = test_texts(tokenizer, plan.rows, plan.prompt + plan.scored)
    found = costs(model, tokens, plan.prompt, methods(plan))
    for ratio in plan.ratios:
        drawn = [found.pop(random_name(ratio, seed)) for seed in range(plan.seeds)]
        found[f"random channels, {ratio}"] = mean_cost(drawn)
    figures = chain_figures(found) | {
        f"KL × 1000, ThinK, {ratio}": 1000 * found[f"ThinK, {ratio}"].mean for ratio in plan.ratios
    }
    figures["logit error over that of the best subset"] = greedy_over_best(model, tokens)
    baselines = {
        f"KL × 1000, {rival}, {ratio}": 1000 * found[f"{rival}, {ratio}"].mean
        for rival in ("key norm", "random channels")
        for ratio in plan.ratios
    }
    failed = [name for name, met in conditions(found, figures, plan).items() if not met]
    reason = f"not met: {'; '.join(failed)}" if failed else ""
    data = f"reference model; {plan.rows} texts, {plan.prompt} tokens read and {plan.scored} scored"
    return Reproduction(
        "think", CLAIM, figures, baselines, not failed, reason, data, 0.0, table(found)
    )


def methods(plan: Size) -> Methods:
    made: dict[str, Any] = {}
    for ratio in plan.ratios:
        made[f"ThinK, {ratio}"] = ThinK(ratio)
        made[f"key norm, {ratio}"] = KeyNorm(ratio)
        made |= {random_name(ratio, s): RandomChannels(ratio, seed=s) for s in range(plan.seeds)}
    made["SnapKV"] = SnapKV(KEEP)
    made["SnapKV + ThinK"] = [SnapKV(KEEP), ThinK(RATIO)]
    made["SnapKV of as many bytes"] = SnapKV(same_bytes(plan))
    made["KIVI, 2 bits"] = KIVI(bits=2)
    made["ThinK + KIVI, 2 bits"] = [ThinK(0.4), KIVI(bits=2)]
    return made


def random_name(ratio: float, seed: int) -> str:
    return f"random channels, {ratio}, seed {seed}"


def same_bytes(plan: Size) -> float:
    """The share of tokens that SnapKV alone keeps in the bytes of the chain."""
    kept = round(KEEP * plan.prompt)
    whole = min(32, kept)
    return (2 * kept - RATIO * (kept - whole)) / (2 * plan.prompt)


def chain_figures(found: dict[str, Cost]) -> dict[str, float]:
    plain, chain = found["SnapKV"], found["SnapKV + ThinK"]
    return {
        "saved behind SnapKV": 1 - chain.share / plain.share,
        "perplexity, over that of SnapKV": chain.perplexity / plain.perplexity,
        "KL × 1000, SnapKV + ThinK": 1000 * chain.mean,
        "KL × 1000, SnapKV of as many bytes": 1000 * found["SnapKV of as many bytes"].mean,
    }


def conditions(found: dict[str, Cost], figures: dict[str, float], plan: Size) -> dict[str, bool]:
    def divergence(name: str) -> list[float]:
        return [found[f"{name}, {ratio}"].mean for ratio in plan.ratios]

    think, norm, random = (divergence(n) for n in ("ThinK", "key norm", "random channels"))
    own, rival = (figures[f"KL × 1000, SnapKV{x}"] for x in (" + ThinK", " of as many bytes"))
    return {
        "below random channels": all(a < b for a, b in zip(think, random, strict=True)),
        "below the norm of keys": sum(think) < sum(norm),
        "bytes saved behind SnapKV": figures["saved behind SnapKV"] >= SAVED,
        "perplexity behind SnapKV": figures["perplexity, over that of SnapKV"] <= 1 + LOST,
        "below SnapKV of as many bytes": own < rival,
    }


@torch.no_grad()
def greedy_over_best(model: Any, tokens: Tensor, channels: int = 10, drop: int = 5) -> float:
    """Error of the logits when ThinK drops half of ten channels of a head, over that of the best
    choice there is: mean over the layers' first heads."""
    ratios = []
    watch = Queries()
    cache_of = cache(model, watch)
    model(tokens[:1, :192], past_key_values=cache_of)
    for queries, keys in watch.seen:
        q, k = queries[0, :, :channels], keys[0, :, :channels]
        scores = channel_scores(q[None, None], k[None, None])[0, 0]
        dropped = scores.topk(drop, largest=False).indices
        errors = {
            subset: float((q[:, list(subset)] @ k[:, list(subset)].T).norm())
            for subset in combinations(range(channels), drop)
        }
        own = errors[tuple(sorted(dropped.tolist()))]
        ratios.append(own / min(errors.values()))
    return float(torch.tensor(ratios).mean())


class Queries(ThinK):
    """Remembers the last queries and all keys of each layer's first head."""

    def __init__(self) -> None:
        super().__init__(ratio=0)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        queries = fold(memory.notes["queries"], keys.shape[1])
        self.seen.append((queries[:, 0], keys[:, 0]))
        return super().encode_keys(keys, memory)
