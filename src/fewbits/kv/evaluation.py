"""What a compressed cache costs: a text goes on through it, and through the whole cache.

Tokens of the continuation are given, not drawn, and scored *through* the compressed cache: scores
of the prompt itself would say nothing, as the prompt is read exactly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv import cache
from fewbits.kv._cache import CompressedCache


@dataclass(frozen=True)
class Cost:
    """What one method costs on some texts.

    Attributes
    ----------
    method : its spec string.
    divergence : KL(whole cache ‖ this one) of the next token, in nats, mean over the continuation.
    perplexity : of the continuation.
    agreement : share of its tokens where both caches find the same most probable one.
    bytes_per_token : held after the prompt, over its tokens.
    bits_per_number : the same over the numbers that the whole cache has.
    share : bytes held, over those of the whole cache.
    prompt_seconds, tokens_per_second : time to read the prompts and compress them, and tokens read
        one by one after that, all rows of a batch together.
    """

    method: str
    divergence: float
    perplexity: float
    agreement: float
    bytes_per_token: float
    bits_per_number: float
    share: float
    prompt_seconds: float
    tokens_per_second: float


def evaluate(
    model: Any, tokens: Tensor, prompt: int, methods: Sequence[str], batch: int = 8
) -> list[Cost]:
    """Score the continuation of some texts through the cache of each method.

    Parameters
    ----------
    model : a causal language model of transformers.
    tokens : (n, t) int64, texts of one length.
    prompt : so many tokens of each are read before the cache is compressed; the others are scored.
    methods : spec strings, as `kv.cache` takes them.
    batch : texts at a time.

    Raises
    ------
    FewbitsError
        Tokens of another shape, or no continuation.
    """
    if tokens.ndim != 2 or not 1 <= prompt < tokens.shape[1]:
        raise FewbitsError(
            f"tokens must be (texts, tokens) with more than prompt={prompt} of them, not "
            f"{tuple(tokens.shape)}"
        )
    sums = {method: Sums() for method in methods}
    for rows in tokens.split(batch):
        whole = run(model, rows, prompt, cache(model, "full"))
        for method in methods:
            sums[method].add(whole, run(model, rows, prompt, cache(model, method)), rows, prompt)
    return [sums[method].cost(method) for method in methods]


@dataclass
class Run:
    """A pass through a cache: log-probabilities (b, q, v) of the continuation, and what it took."""

    log_probabilities: Tensor
    held: int
    numbers: int
    prompt_seconds: float
    step_seconds: float


@torch.no_grad()
def run(model: Any, rows: Tensor, prompt: int, held: CompressedCache) -> Run:
    """Read the prompts, then the continuation token by token."""
    rows = rows.to(model.device)
    start = time.perf_counter()
    logits = [model(rows[:, :prompt], past_key_values=held, logits_to_keep=1).logits]
    prompt_seconds = time.perf_counter() - start
    nbytes = held.nbytes()
    start = time.perf_counter()
    for place in range(prompt, rows.shape[1] - 1):
        logits.append(model(rows[:, place : place + 1], past_key_values=held).logits)
    seconds = time.perf_counter() - start
    found = torch.cat(logits, dim=1).float().log_softmax(dim=2)
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * len(held.layers) * config.num_key_value_heads * width * rows.shape[0] * prompt
    return Run(found, nbytes, numbers, prompt_seconds, seconds)


class Sums:
    """Adds up what several batches cost."""

    def __init__(self) -> None:
        self.divergence = self.loss = self.agreed = 0.0
        self.scored = self.read = self.held = self.whole = self.numbers = 0
        self.prompt_seconds = self.step_seconds = 0.0
        self.steps = 0

    def add(self, whole: Run, found: Run, rows: Tensor, prompt: int) -> None:
        p, q = whole.log_probabilities, found.log_probabilities
        answers = rows[:, prompt:].to(p.device)
        self.divergence += float((p.exp() * (p - q)).sum())
        self.loss -= float(q.gather(2, answers[..., None]).sum())
        self.agreed += float((p.argmax(dim=2) == q.argmax(dim=2)).sum())
        self.scored += answers.numel()
        self.read += rows.shape[0] * prompt
        self.held += found.held
        self.whole += whole.held
        self.numbers += found.numbers
        self.prompt_seconds += found.prompt_seconds
        self.step_seconds += found.step_seconds
        self.steps += rows.shape[0] * (answers.shape[1] - 1)

    def cost(self, method: str) -> Cost:
        return Cost(
            method,
            divergence=self.divergence / self.scored,
            perplexity=float(torch.tensor(self.loss / self.scored).exp()),
            agreement=self.agreed / self.scored,
            bytes_per_token=self.held / self.read,
            bits_per_number=8 * self.held / self.numbers,
            share=self.held / self.whole,
            prompt_seconds=self.prompt_seconds,
            tokens_per_second=self.steps / self.step_seconds if self.step_seconds else 0.0,
        )
