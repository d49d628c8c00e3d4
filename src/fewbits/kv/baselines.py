"""Established ways to make a KV cache smaller: what every paper of this room is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import CompressedLayer, Memory, Stage, Step, select
from fewbits.kv._forms import Form, Part
from fewbits.kv._quantized import BITS, Grouped
from fewbits.primitives.partial_attention import fold, soft_cap, weights_of

QUERY_BLOCK = 256
"""Queries whose attention weights are in memory at a time."""


def share(name: str, ratio: float) -> float:
    """A share of tokens to keep, checked."""
    if not 0 < ratio <= 1:
        raise FewbitsError(f"{name}: keep={ratio} must be above 0 and at most 1")
    return ratio


def count_of(keep: float, tokens: int, least: int) -> int:
    """How many tokens a share of so many is, but at least `least` (and not more than there are)."""
    return min(tokens, max(least, round(keep * tokens)))


@dataclass
class Full(Stage):
    """All tokens, exact."""

    name: ClassVar[str] = "full"


@dataclass
class SlidingWindow(Stage):
    """The first and the newest tokens (StreamingLLM; Xiong et al. 2023, arXiv 2309.17453).

    Parameters
    ----------
    keep : share of the prompt's tokens to keep; behind it, as many are kept as at its end.
    sinks : so many first tokens are among them.
    """

    name: ClassVar[str] = "window"
    drops_later: ClassVar[bool] = True

    keep: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        share(self.name, self.keep)

    def choose(self, part: Part, memory: Memory) -> Tensor:
        count = count_of(self.keep, part.tokens, self.sinks + 1)
        memory.kept["count"] = count
        return self.newest(part, count)

    def newest(self, part: Part, count: int) -> Tensor:
        keys = part.keys.read()
        tokens, device = part.tokens, keys.device
        sinks = min(self.sinks, count - 1)
        rows = [torch.arange(sinks), torch.arange(tokens - (count - sinks), tokens)]
        return torch.cat(rows).to(device).expand(keys.shape[0], 1, -1)

    def grown(self, layer: CompressedLayer, memory: Memory, step: Step | None) -> None:
        assert layer.recent is not None
        if layer.recent.tokens > memory.kept["count"]:
            layer.recent = select(layer.recent, self.newest(layer.recent, memory.kept["count"]))


@dataclass
class SnapKV(Stage):
    """Tokens that the last queries of the prompt attend to (Li et al. 2024, arXiv 2404.14469).

    Parameters
    ----------
    keep : share of the prompt's tokens to keep, of each key head its own.
    queries : so many last queries vote; their own tokens are always kept.
    kernel : votes are smoothed by the maximum over so many neighbours.
    """

    name: ClassVar[str] = "snapkv"

    keep: float = 0.5
    queries: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        share(self.name, self.keep)
        if self.queries < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise FewbitsError("snapkv: queries must be at least 1, and kernel an odd number")

    def observe(self, step: Step, memory: Memory) -> None:
        last = step.queries[:, :, -self.queries :]
        allowed = None if step.allowed is None else step.allowed[:, :, -self.queries :]
        window = Step(last, step.keys, step.values, allowed, step.scaling, step.cap)
        memory.notes["votes"] = attention_sums(window)

    def choose(self, part: Part, memory: Memory) -> Tensor:
        votes = memory.notes["votes"]
        smooth = functional.max_pool1d(votes, self.kernel, 1, self.kernel // 2)
        return best_and_newest(smooth, part, self.keep, self.queries)


@dataclass
class H2O(Stage):
    """Heavy hitters: tokens with the most attention so far (Zhang et al. 2023, arXiv 2306.14048).

    Half of what is kept are the newest tokens, half those that all queries so far attended to
    most, of each key head its own. Behind the prompt, each new token pushes one out.

    Parameters
    ----------
    keep : share of the prompt's tokens to keep; behind it, as many are kept as at its end.
    """

    name: ClassVar[str] = "h2o"
    drops_later: ClassVar[bool] = True

    keep: float = 0.5

    def __post_init__(self) -> None:
        share(self.name, self.keep)

    def observe(self, step: Step, memory: Memory) -> None:
        sums = attention_sums(step)
        earlier = memory.kept.get("sums")
        if earlier is not None:
            sums[..., : earlier.shape[2]] += earlier
        memory.kept["sums"] = sums

    def choose(self, part: Part, memory: Memory) -> Tensor:
        count = count_of(self.keep, part.tokens, 2)
        memory.kept["count"] = count
        return self.chosen(part, memory)

    def chosen(self, part: Part, memory: Memory) -> Tensor:
        count = memory.kept["count"]
        kept = best_and_newest(memory.kept["sums"], part, count / part.tokens, count // 2)
        memory.kept["sums"] = memory.kept["sums"].gather(2, kept)
        return kept

    def grown(self, layer: CompressedLayer, memory: Memory, step: Step | None) -> None:
        if step is None or layer.recent is None:
            raise FewbitsError("h2o chooses among exact tokens; let nothing follow it")
        self.observe(step, memory)
        if layer.recent.tokens > memory.kept["count"]:
            layer.recent = select(layer.recent, self.chosen(layer.recent, memory))


def attention_sums(step: Step) -> Tensor:
    """(b, h, s) float32: the attention that each token gets from the step's queries, summed over
    them and averaged over the query heads of its key head. O(t·s·d) per head, in blocks."""
    heads, groups = step.keys.shape[1], step.queries.shape[1] // step.keys.shape[1]
    tokens, held = step.queries.shape[2], step.keys.shape[2]
    sums = step.queries.new_zeros(step.keys.shape[0], heads, held, dtype=torch.float32)
    for start in range(0, tokens, QUERY_BLOCK):
        some = step.queries[:, :, start : start + QUERY_BLOCK]
        scores = soft_cap(fold(some, heads) @ step.keys.transpose(2, 3) * step.scaling, step.cap)
        if step.allowed is not None:
            block = step.allowed[:, :, start : start + QUERY_BLOCK]
            allowed = block.repeat(1, 1, groups, 1)
        else:
            whole = torch.ones(held, held, dtype=torch.bool, device=scores.device).tril()
            first = held - tokens + start
            allowed = whole[first : first + some.shape[2]].repeat(groups, 1)[None, None]
        sums += weights_of(scores, allowed)[0].sum(dim=2)
    return sums / groups


def best_and_newest(scores: Tensor, part: Part, keep: float, newest: int) -> Tensor:
    """(b, h, k) rising numbers: the newest tokens, and of the others those of highest score."""
    tokens = part.tokens
    count = count_of(keep, tokens, 1)
    newest = min(newest, count)
    marked = scores.clone()
    if part.valid is not None:
        marked = marked.masked_fill(~part.valid, -1)
    marked[..., tokens - newest :] = torch.inf
    return marked.topk(count, dim=2).indices.sort(dim=2).values


@dataclass
class KIVI(Stage):
    """A few bits per number: keys in groups along tokens, values along channels
    (Liu et al. 2024, arXiv 2402.02750).

    Blocks are quantised once and never again.

    Parameters
    ----------
    bits : per number: 1, 2, 4 or 8.
    group : numbers that share a scale and a least value.
    recent : so many newest tokens stay exact, and up to `group` − 1 more.
    """

    name: ClassVar[str] = "kivi"
    encodes: ClassVar[bool] = True

    bits: int = 2
    group: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise FewbitsError(f"kivi: bits={self.bits} must be one of 1, 2, 4, 8")
        if self.group < 1 or self.recent < 0:
            raise FewbitsError("kivi: group must be at least 1, and recent at least 0")

    @property
    def window(self) -> int:
        return self.recent

    @property
    def block(self) -> int:
        return self.group

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        return Grouped.of(keys, self.bits, self.group, along=2)

    def encode_values(self, values: Tensor, memory: Memory) -> Form:
        return Grouped.of(values, self.bits, self.group, along=3)
