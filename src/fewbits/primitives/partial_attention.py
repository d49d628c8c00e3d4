"""Softmax attention over tokens that are held in several forms, joined exactly.

Each form gives the attention output over its own tokens, and the logarithm of the mass of the
softmax that they have (`Partial`). From those `join` computes what one softmax over all tokens
gives. Query heads that share a key head are folded into the rows of that head, so that keys are
never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SCORES = 2**24
"""Scores in memory at a time."""


@dataclass
class Partial:
    """Attention over some of the tokens.

    Attributes
    ----------
    output : (b, h, r, d): the mean of their values under their own softmax.
    log_mass : (b, h, r) float32: logsumexp of their scores; -inf where none may be seen.
    """

    output: Tensor
    log_mass: Tensor


def join(partials: Sequence[Partial]) -> Tensor:
    """(b, h, r, d): attention over all tokens together. A row that sees nothing gives zeros."""
    if len(partials) == 1:
        return partials[0].output
    masses = torch.stack([partial.log_mass for partial in partials])
    shares = torch.softmax(masses, dim=0).nan_to_num()  # all of them -inf
    outputs = torch.stack([partial.output for partial in partials])
    return torch.einsum("pbhr,pbhrd->bhrd", shares.to(outputs.dtype), outputs)


def soft_cap(scores: Tensor, cap: float | None) -> Tensor:
    """Scores kept within ±cap, as some models do."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def weights_of(scores: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax weights (…, s) float32 and log-mass of scores; `allowed` says which may be seen."""
    scores = scores.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    log_mass = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - log_mass.unsqueeze(-1)).nan_to_num(), log_mass


def attend(
    queries: Tensor,
    score: Callable[[Tensor], Tensor],
    mix: Callable[[Tensor], Tensor],
    tokens: int,
    scaling: float,
    allowed: Tensor | None = None,
    cap: float | None = None,
) -> Partial:
    """Attention of (b, h, r, d) queries over tokens that only `score` and `mix` know.

    Parameters
    ----------
    score : (b, h, r, d) queries → (b, h, r, tokens) inner products with keys.
    mix : (b, h, r, tokens) weights → (b, h, r, d) sums of values.
    allowed : bool, broadcasts to (b, h, r, tokens): which may be seen.
    cap : scores are kept within ± this.

    Notes
    -----
    Scores exist for bounded numbers of rows at a time.
    """
    batch, heads, rows, _ = queries.shape
    step = max(1, BLOCK_SCORES // max(1, batch * heads * tokens))
    outputs, masses = [], []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = soft_cap(score(queries[:, :, part]) * scaling, cap)
        some = allowed
        if allowed is not None and allowed.shape[2] > 1:
            some = allowed[:, :, part]
        weights, mass = weights_of(scores, some)
        outputs.append(mix(weights.to(queries.dtype)))
        masses.append(mass)
    return Partial(torch.cat(outputs, dim=2), torch.cat(masses, dim=2))


def fold(queries: Tensor, heads: int) -> Tensor:
    """(b, h·g, t, d) queries → (b, h, g·t, d): those that share a key head become its rows."""
    batch, all_heads, tokens, width = queries.shape
    return queries.reshape(batch, heads, all_heads // heads * tokens, width)


def unfold(rows: Tensor, all_heads: int) -> Tensor:
    """What `fold` folded: (b, h, g·t, d) → (b, h·g, t, d)."""
    batch, heads, count, width = rows.shape
    return rows.reshape(batch, all_heads, count * heads // all_heads, width)


def causal(tokens: int, groups: int, device: torch.device) -> Tensor:
    """(1, 1, groups·tokens, tokens) bool: what folded new queries may see of new tokens."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen.repeat(groups, 1)[None, None]
