"""Fit the state of a prefix to the attention that real queries pay to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import CompressedCache, Memory, Stage, Step
from fewbits.kv._ntk_state import PrefixState
from fewbits.kv._transformers import use_attention
from fewbits.primitives.feature_maps import FeatureMap
from fewbits.primitives.partial_attention import Partial, attend, fold, join

QUERIES = 4096
"""Queries per key head that a state is fitted to and measured with."""
HELD_OUT = 4
"""One query of so many is measured and not fitted to."""
ROUNDS, STEPS, RATE, RIDGE = 10, 10, 0.05, 1e-3
"""Of the fit: rounds, steps of k in each, their size, and how much Z is held to its start."""


@dataclass
class Evidence:
    """What is known of the attention of one layer to a prefix.

    Attributes
    ----------
    keys, values : (h, m, d) of the prefix.
    rows : (h, n, d) queries, already times `scaling`.
    own : attention of each query over the tokens behind the prefix, (1, h, n, …).
    prefix : the same over the prefix, exact.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    own: Partial
    prefix: Partial
    scaling: float

    def part(self, chosen: Callable[[Tensor], Tensor]) -> Evidence:
        """Some of the queries: `chosen` makes (…, k, d) of (…, n, d)."""

        def of(partial: Partial) -> Partial:
            masses = chosen(partial.log_mass.unsqueeze(-1)).squeeze(-1)
            return Partial(chosen(partial.output), masses)

        rows = chosen(self.rows)
        return Evidence(self.keys, self.values, rows, of(self.own), of(self.prefix), self.scaling)

    def fitted(self) -> Evidence:
        """The queries to fit to."""
        count = self.rows.shape[1]
        kept = torch.arange(count) % HELD_OUT != HELD_OUT - 1 if count >= HELD_OUT else slice(None)
        return self.part(lambda x: x[..., kept, :])

    def measured(self) -> Evidence:
        """The queries to measure with."""
        first = HELD_OUT - 1 if self.rows.shape[1] >= HELD_OUT else 0
        return self.part(lambda x: x[..., first::HELD_OUT, :])


# -- the state -----------------------------------------------------------------------------


def closed_form(evidence: Evidence, features: FeatureMap) -> PrefixState:
    """The paper's step 2, which sees no query."""
    return PrefixState.of(evidence.keys, evidence.values, evidence.scaling, features)


def mass_matched(evidence: Evidence, features: FeatureMap) -> PrefixState:
    """The closed form times a number per head, so that the mean mass over queries is true."""
    return calibrated(evidence, features, lambda log_mass: log_mass.logsumexp(dim=1))


def log_mass_matched(evidence: Evidence, features: FeatureMap) -> PrefixState:
    """The same with the mean of the logarithm, which a few queries of huge mass do not decide."""
    return calibrated(evidence, features, lambda log_mass: log_mass.mean(dim=1))


def calibrated(
    evidence: Evidence, features: FeatureMap, mean: Callable[[Tensor], Tensor]
) -> PrefixState:
    """The closed form times a number per head, which makes a `mean` of (h, n) log-masses true."""
    state = closed_form(evidence, features)
    found = state.seen_by(evidence.rows[None], evidence.scaling, features).log_mass[0]
    true = evidence.prefix.log_mass[0]
    scale = (mean(true.double()) - mean(found.double())).exp().nan_to_num(posinf=1.0).float()
    return PrefixState(state.z * scale[:, None, None], state.k * scale[:, None])


def best_of(evidence: Evidence, states: list[PrefixState], features: FeatureMap) -> PrefixState:
    """For each head, the state with the least error."""
    wrong = torch.stack([errors(evidence, state, features) for state in states])
    best, heads = wrong.argmin(dim=0), torch.arange(wrong.shape[1], device=wrong.device)
    z, k = (torch.stack([getattr(state, name) for state in states]) for name in ("z", "k"))
    return PrefixState(z[best, heads], k[best, heads])


def least_squares(evidence: Evidence, features: FeatureMap) -> PrefixState:
    """The state with the least squared error of attention over prefix and tokens together.

    It begins at the best of the closed form and its calibrations. Each round solves a linear
    system for the best Z, ridged to where it began, and then steps k by Adam, its signs kept.
    O(n·r² + r³) per head and round.
    """
    ways = (closed_form, mass_matched, log_mass_matched)
    start = best_of(evidence, [way(evidence, features) for way in ways], features)
    problem = Problem.of(evidence, features)
    signs, size = start.k.sign(), start.k.abs().mean(dim=1, keepdim=True)
    relative = (start.k.abs() / size.clamp_min(1e-30)).requires_grad_(True)
    optimizer = torch.optim.Adam([relative], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ROUNDS * STEPS)

    def k() -> Tensor:
        return relative.abs() * size * signs

    with torch.enable_grad():
        for _ in range(ROUNDS):
            z = problem.best_z(k().detach(), start.z)
            for _ in range(STEPS):
                optimizer.zero_grad()
                problem.loss(z, k()).backward()
                optimizer.step()
                schedule.step()
    found = k().detach()
    fitted = PrefixState(problem.best_z(found, start.z), found)
    return best_of(evidence, [start, fitted], features)


@dataclass
class Problem:
    """Attention of queries, with all masses over e^top, where top is the larger of two.

    Attributes
    ----------
    mapped : (h, n, r) features of the queries, times e^-top.
    own, target : (h, n, d) attention over the tokens alone, and over everything.
    own_mass : (h, n) mass of the tokens, times e^-top.
    """

    mapped: Tensor
    own: Tensor
    own_mass: Tensor
    target: Tensor

    @classmethod
    def of(cls, evidence: Evidence, features: FeatureMap) -> Problem:
        own, prefix = evidence.own, evidence.prefix
        top = torch.maximum(own.log_mass, prefix.log_mass)[0]
        mapped = features(evidence.rows.float() / evidence.scaling**0.5)
        return cls(
            mapped=(mapped * torch.exp(-top).to(mapped)[..., None]).float(),
            own=own.output[0].float(),
            own_mass=torch.exp(own.log_mass[0] - top),
            target=join([own, prefix])[0].float(),
        )

    def mass(self, k: Tensor) -> Tensor:
        """(h, n): of everything, which is 1 to 2 where that of the prefix is right."""
        return (self.own_mass + torch.einsum("hnr,hr->hn", self.mapped, k)).clamp_min(1e-6)

    def loss(self, z: Tensor, k: Tensor) -> Tensor:
        """Squared error per query, over that of a query's target, summed over heads."""
        found = self.own * self.own_mass[..., None] + self.mapped @ z
        found = found / self.mass(k)[..., None]
        wrong = ((found - self.target) ** 2).sum(dim=(1, 2))
        return (wrong / (self.target**2).sum(dim=(1, 2)).clamp_min(1e-12)).sum()

    @torch.no_grad()
    def best_z(self, k: Tensor, start: Tensor) -> Tensor:
        """(h, r, d): the Z with the least squared error for this k, ridged to `start`."""
        mass = self.mass(k)
        left = self.mapped / mass[..., None]
        right = self.target - self.own * (self.own_mass / mass)[..., None] - left @ start
        gram = (left.transpose(1, 2) @ left).double()
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        gram = gram + (ridge + 1e-30)[:, None, None] * eye
        change = torch.linalg.solve(gram, (left.transpose(1, 2) @ right).double())
        return (start.double() + change).float()


SOLVERS: dict[str, Callable[[Evidence, FeatureMap], PrefixState]] = {
    "least-squares": least_squares,
    "mass": mass_matched,
    "closed-form": closed_form,
}


def errors(evidence: Evidence, state: PrefixState | None, features: FeatureMap) -> Tensor:
    """(h,) relative error of attention over prefix and tokens together, root mean square.

    `state` None leaves the prefix out.
    """
    target = join([evidence.own, evidence.prefix]).float()
    found = evidence.own.output.float()
    if state is not None:
        seen = state.seen_by(evidence.rows[None], evidence.scaling, features)
        found = join([evidence.own, seen]).float()
    wrong = ((found - target) ** 2).sum(dim=(0, 2, 3))
    return (wrong / (target**2).sum(dim=(0, 2, 3)).clamp_min(1e-12)).sqrt()


# -- watching a model ----------------------------------------------------------------------


def watch_prompt(model: Any, prompt: Tensor, texts: Tensor, batch: int) -> list[Evidence]:
    """How each layer of a model attends to a prompt from texts behind it.

    The prompt is at the positions −m … −1, so that what comes behind it begins at 0: with rotary
    positions only differences count. Keys have the rotations of their positions, so what is
    fitted holds for queries as far away as those of the texts.

    Parameters
    ----------
    prompt, texts : (m,), (n, t) int64.
    batch : texts at a time.
    """
    use_attention(model)
    ids = torch.cat([prompt.expand(len(texts), -1), texts], dim=1).to(model.device)
    places = torch.arange(-len(prompt), texts.shape[1], device=model.device)[None]
    watch = Watch(len(prompt), len(texts))
    with torch.no_grad():
        for rows in ids.split(batch):
            cache = CompressedCache(model.config, [watch])
            if len(cache.compressed) != len(cache.layers):
                raise FewbitsError(
                    "ntk-attention: a layer of this model looks through a sliding window, which "
                    "a prompt without positions cannot leave; use a model of full attention"
                )
            where = places.expand(len(rows), -1)
            try:
                model(rows, position_ids=where, past_key_values=cache, logits_to_keep=1)
            except IndexError:
                raise FewbitsError(
                    "ntk-attention: a token number is not in the vocabulary of the model, or its "
                    "positions are not rotary, so that a prompt cannot lie before the first one"
                ) from None
    return [joined(watch.found[layer]) for layer in sorted(watch.found)]


@dataclass
class Watch(Stage):
    """Keeps everything, and notes how tokens behind the first `prompt` ones attend to these."""

    name: ClassVar[str] = "watch"

    prompt: int
    texts: int
    found: dict[int, list[Evidence]] = field(default_factory=dict)

    def observe(self, step: Step, memory: Memory) -> None:
        heads, tokens = step.keys.shape[1], step.keys.shape[2] - self.prompt
        groups = step.queries.shape[1] // heads
        count = min(tokens, max(1, QUERIES // (self.texts * groups)))
        chosen = torch.linspace(0, tokens - 1, count, device=step.keys.device).long()
        rows = fold(step.queries[:, :, self.prompt + chosen], heads)
        past = torch.arange(tokens, device=chosen.device) <= chosen[:, None]

        def over(some: slice, allowed: Tensor | None) -> Partial:
            keys, values = step.keys[:, :, some], step.values[:, :, some]
            return attend(
                rows,
                lambda queries: queries @ keys.transpose(2, 3),
                lambda weights: weights @ values,
                keys.shape[2],
                step.scaling,
                allowed,
                step.cap,
            )

        evidence = Evidence(
            step.keys[0, :, : self.prompt].float(),
            step.values[0, :, : self.prompt].float(),
            flat(rows * step.scaling),
            flat_partial(over(slice(self.prompt, None), past.repeat(groups, 1)[None, None])),
            flat_partial(over(slice(self.prompt), None)),
            step.scaling,
        )
        self.found.setdefault(memory.layer, []).append(evidence)


def flat(rows: Tensor) -> Tensor:
    """(b, h, n, …) → (h, b·n, …)."""
    return rows.transpose(0, 1).flatten(1, 2)


def flat_partial(partial: Partial) -> Partial:
    return Partial(flat(partial.output)[None], flat(partial.log_mass)[None])


def joined(found: list[Evidence]) -> Evidence:
    """The queries of several batches together."""

    def together(partials: list[Partial]) -> Partial:
        outputs, masses = zip(*((one.output, one.log_mass) for one in partials), strict=True)
        return Partial(torch.cat(outputs, dim=2), torch.cat(masses, dim=2))

    first = found[0]
    return Evidence(
        first.keys,
        first.values,
        torch.cat([one.rows for one in found], dim=1),
        together([one.own for one in found]),
        together([one.prefix for one in found]),
        first.scaling,
    )
