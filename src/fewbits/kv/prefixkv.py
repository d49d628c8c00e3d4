"""PrefixKV: keep as many tokens in each layer as it takes to hold the same share of attention.

Wang, Chen, Liu, Lin, Ding, Han 2024, *PrefixKV: Adaptive Prefix KV Cache is What Vision
Instruction-Following Models Need for Efficient Generation* (arXiv 2412.03409).

The tokens of a layer are sorted by the attention they get from all queries of the prompt. How much
of it the best o of them hold differs between layers. One threshold p for all layers, found by
bisection, gives each the shortest prefix of its sorted list that holds p, so that the budget of
all layers together is met. The shares differ little between prompts, so they are found once, from
a few (`fit`). Behind the prompt one token is dropped for each that comes in over the layer's share,
always at one place: what was chosen from the prompt stays, a window of newer tokens slides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import (
    CompressedCache,
    CompressedLayer,
    Memory,
    Stage,
    Step,
    select,
)
from fewbits.kv._files import Fingerprint, check_model, fingerprint, load_fitted, save_fitted
from fewbits.kv._forms import Part
from fewbits.kv._transformers import use_attention
from fewbits.kv.baselines import attention_sums, share

ROUNDS = 60
"""Of bisection; enough for any threshold that floats tell apart."""


@dataclass
class PrefixKV(Stage):
    """A share of the tokens, more in some layers than in others.

    Parameters
    ----------
    keep : share of the tokens of all layers to keep.
    start : so many first tokens are always kept, and the last one of the prompt.
    distance : tokens behind the prompt's choice that slide: what is dropped lies so far from the
        end of what the prompt left.
    per_query : divide the attention of a token by the number of queries that could see it. Not in
        the paper; without, early tokens are favoured.
    fitted : a file that `save` wrote, whose shares hold for the `keep` they were found for.
    shares : of each layer, from `fit`; without, all layers keep the same.
    """

    name: ClassVar[str] = "prefixkv"
    drops_later: ClassVar[bool] = True

    keep: float = 0.5
    start: int = 1
    distance: int = 25
    per_query: bool = False
    fitted: str | None = None
    shares: tuple[float, ...] | None = field(default=None, repr=False)
    model: Fingerprint | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.fitted is not None:
            self._read(self.fitted)
        share(self.name, self.keep)
        if self.start < 0 or self.distance < 1:
            raise FewbitsError("prefixkv: start must be at least 0, and distance at least 1")
        if self.shares is not None and not all(0 < one <= 1 for one in self.shares):
            raise FewbitsError("prefixkv: the shares of layers must be above 0 and at most 1")

    # -- learning ----------------------------------------------------------------------------

    def fit(self, model: Any, prompts: Tensor | Sequence[Tensor | Mapping[str, Tensor]]) -> Self:
        """Find the share of each layer from some prompts; returns a copy.

        Parameters
        ----------
        prompts : (n, t) int64 token numbers, several of those, or whatever else the model takes by
            name (what the processor of a vision-language model gives), without padding.

        Raises
        ------
        FewbitsError
            No prompts.
        """
        if isinstance(prompts, Tensor):
            prompts = prompts.split(1)
        if not prompts:
            raise FewbitsError("prefixkv needs prompts to find the shares of the layers")
        use_attention(model)
        found = []
        for prompt in prompts:
            watch = Watch(self.per_query)
            inputs = prompt if isinstance(prompt, Mapping) else {"input_ids": prompt}
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            with torch.no_grad():
                model(**inputs, past_key_values=CompressedCache(model.config, [watch]))
            for row in range(len(watch.scores[0])):
                curves = [cumulative(scores[row]) for scores in watch.scores]
                tokens = len(curves[0])
                least = min(tokens, self.start + 1)
                counts, _ = layer_counts(curves, self.keep, least)
                found.append(torch.tensor(counts) / tokens)
        shares = tuple(torch.stack(found).mean(dim=0).tolist())
        made = replace(self, fitted=None, shares=shares)
        made.model = fingerprint(model)
        return made

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the shares of the layers to a file.

        Raises
        ------
        FewbitsError
            Not fitted, or the file exists (and not ``overwrite``) or cannot be written.
        """
        if self.shares is None or self.model is None:
            raise FewbitsError("prefixkv has learned nothing yet: call fit first")
        settings = {
            name: getattr(self, name) for name in ("keep", "start", "distance", "per_query")
        }
        tensors = {"shares": torch.tensor(self.shares, dtype=torch.float64)}
        save_fitted(path, self.name, tensors, settings, self.model, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises
        ------
        FewbitsError
            There is no such file, or it is damaged or of another method.
        """
        _, settings, _ = load_fitted(path, cls.name)
        return cls(fitted=str(path), **settings)

    def _read(self, path: str) -> None:
        tensors, settings, self.model = load_fitted(path, self.name)
        shares = tensors.get("shares")
        if shares is None or shares.shape != (self.model.get("layers"),):
            raise FewbitsError(f"{path} is damaged: it has no share for each layer")
        if settings.get("keep") != self.keep:
            raise FewbitsError(
                f"{path} was fitted for keep={settings.get('keep')}, not for keep={self.keep}"
            )
        self.shares = tuple(float(share) for share in shares)

    def check_model(self, model: Any) -> None:
        """Refuse a model that this was not fitted to.

        Raises
        ------
        FewbitsError
            It is another one.
        """
        if self.model is not None:
            check_model(self.model, model)

    # -- choosing ----------------------------------------------------------------------------

    def observe(self, step: Step, memory: Memory) -> None:
        sums = token_scores(step)
        earlier = memory.notes.get("sums")
        if earlier is not None:
            sums[..., : earlier.shape[-1]] += earlier
        memory.notes["sums"] = sums

    def choose(self, part: Part, memory: Memory) -> Tensor:
        tokens, mine = part.tokens, self.share_of(memory)
        count = min(tokens, max(self.start + 1, tokens - round((1 - mine) * tokens)))
        scores = memory.notes["sums"]
        if self.per_query:
            scores = per_visible_query(scores)
        scores = scores[:, None].clone()
        if part.valid is not None:
            scores = scores.masked_fill(~part.valid[:, :1], -1)
        scores[..., : self.start] = torch.inf
        scores[..., -1] = torch.inf
        slot = count - self.distance
        memory.kept["slot"] = slot if slot >= 1 else count // 2
        return scores.topk(count, dim=2).indices.sort(dim=2).values

    def share_of(self, memory: Memory) -> float:
        """Of the tokens that this layer keeps."""
        if self.shares is None:
            return self.keep
        if len(self.shares) != memory.layers:
            raise FewbitsError(
                f"prefixkv was fitted on a model of {len(self.shares)} layers, but this one has "
                f"{memory.layers}; fit it again"
            )
        return self.shares[memory.layer]

    def grown(self, layer: CompressedLayer, memory: Memory, step: Step | None) -> None:
        """Drop what is over the layer's share, at the slot."""
        assert layer.recent is not None
        held, allowed = layer.recent.tokens, round(layer.seen * self.share_of(memory))
        extra = held - max(allowed, self.start + 1)
        if extra <= 0:
            return
        slot = min(memory.kept["slot"], held - extra)
        keys = layer.recent.keys.read()
        rows = torch.cat([torch.arange(slot), torch.arange(slot + extra, held)])
        layer.recent = select(layer.recent, rows.to(keys.device).expand(keys.shape[0], 1, -1))


@dataclass
class Watch(Stage):
    """Keeps everything, and remembers the scores of every layer."""

    name: ClassVar[str] = "watch"

    per_query: bool
    scores: list[Tensor] = field(default_factory=list)

    def observe(self, step: Step, memory: Memory) -> None:
        found = token_scores(step)
        self.scores.append(per_visible_query(found) if self.per_query else found)


def token_scores(step: Step) -> Tensor:
    """(b, s) float32: attention to each token, summed over queries and averaged over heads."""
    return attention_sums(step).mean(dim=1)


def per_visible_query(sums: Tensor) -> Tensor:
    """(…, s) sums over the number of queries of a causal prompt that see each token."""
    tokens = sums.shape[-1]
    return sums / torch.arange(tokens, 0, -1, device=sums.device)


def cumulative(scores: Tensor) -> Tensor:
    """(s,) float64: share of all attention that the best 1, 2, … tokens hold."""
    falling = scores.double().sort(descending=True).values
    return falling.cumsum(0) / falling.sum()


def layer_counts(curves: Sequence[Tensor], keep: float, least: int = 1) -> tuple[list[int], float]:
    """Tokens for each layer, so that all hold the same share p of attention, within the budget.

    Parameters
    ----------
    curves : `cumulative` shares of each layer, of one length t.
    keep : share of the tokens of all layers.
    least : tokens that no layer goes below.

    Returns
    -------
    The fewest tokens that hold p in each layer, for the largest p with which they are at most
    keep·L·t together; and p. O(L·log t) per round of bisection.
    """
    tokens, layers = len(curves[0]), len(curves)
    budget = max(round(keep * layers * tokens), layers * least)

    def counts(threshold: float) -> list[int]:
        places = (int(torch.searchsorted(curve, threshold)) + 1 for curve in curves)
        return [min(tokens, max(least, place)) for place in places]

    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= budget else (low, middle)
    return counts(low), low
