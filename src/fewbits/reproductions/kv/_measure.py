"""What the claims of this room share: texts, and what a cache costs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.core.language_model import calibration_text, held_out_text, token_rows
from fewbits.kv import cache

Methods = Mapping[str, Any]
"""What `kv.cache` takes, by the name that a table shows."""


@dataclass(frozen=True)
class Cost:
    """What one cache costs.

    Attributes
    ----------
    divergence : (n,) KL(whole cache ‖ this one) of each text, nats per token of its continuation.
    perplexity : of all continuations.
    share : bytes held after the prompt, over those of the whole cache.
    """

    divergence: np.ndarray
    perplexity: float
    share: float

    @property
    def mean(self) -> float:
        return float(self.divergence.mean())


def test_texts(tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) int64 of a text that the reference model has not seen."""
    return token_rows(tokenizer, held_out_text(), rows, length)


def fitting_texts(tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) int64 of a text that it has seen."""
    return token_rows(tokenizer, calibration_text(), rows, length)


def costs(
    model: Any, tokens: Tensor, prompt: int, methods: Methods, batch: int = 8
) -> dict[str, Cost]:
    """Read the first `prompt` tokens of each text, compress, and score the others in one call.

    Parameters
    ----------
    tokens : (n, t) int64.
    """
    found: dict[str, list[tuple[np.ndarray, float, int, int]]] = {name: [] for name in methods}
    for rows in tokens.split(batch):
        whole, full_bytes = continuation(model, rows, prompt, "full")
        answers = rows[:, prompt:, None]
        for name, method in methods.items():
            seen, held = continuation(model, rows, prompt, method)
            divergence = (whole.exp() * (whole - seen)).sum(dim=2).mean(dim=1)
            loss = -float(seen.gather(2, answers).sum())
            found[name].append((divergence.double().numpy(), loss, held, full_bytes))
    scored = tokens.shape[0] * (tokens.shape[1] - prompt)
    return {
        name: Cost(
            np.concatenate([part[0] for part in parts]),
            float(np.exp(sum(part[1] for part in parts) / scored)),
            sum(part[2] for part in parts) / sum(part[3] for part in parts),
        )
        for name, parts in found.items()
    }


@torch.no_grad()
def continuation(model: Any, rows: Tensor, prompt: int, method: Any) -> tuple[Tensor, int]:
    """(b, t − prompt, v) log-probabilities of what follows the prompt, and the bytes held."""
    held = cache(model, method)
    first = model(rows[:, :prompt], past_key_values=held, logits_to_keep=1).logits
    nbytes = held.nbytes()
    rest = model(rows[:, prompt:-1], past_key_values=held).logits
    return torch.cat([first, rest], dim=1).float().log_softmax(dim=2), nbytes


def better(first: Cost, second: Cost, errors: float = 0.0) -> bool:
    """Whether the first diverges less, by so many standard errors of the paired difference."""
    difference = second.divergence - first.divergence
    spread = float(difference.std(ddof=1)) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return float(difference.mean()) > errors * spread


def mean_cost(several: Sequence[Cost]) -> Cost:
    """The mean over seeds of what a drawn method costs on the same texts."""
    return Cost(
        np.mean([cost.divergence for cost in several], axis=0),
        float(np.exp(np.mean([np.log(cost.perplexity) for cost in several]))),
        float(np.mean([cost.share for cost in several])),
    )


def table(found: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """A row for each method, by rising size."""
    rows = [
        {
            "method": name,
            "share of bytes": round(cost.share, 4),
            "KL × 1000": round(1000 * cost.mean, 3),
            "perplexity": round(cost.perplexity, 4),
        }
        for name, cost in found.items()
    ]
    return sorted(rows, key=lambda row: row["share of bytes"])
