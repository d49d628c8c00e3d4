"""What a compressed cache costs: a text goes on through it, and through the whole cache.

Tokens of the continuation are given, not drawn, and scored *through* the compressed cache: scores
of the prompt itself would say nothing, as the prompt is read exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv import cache
from fewbits.kv._cache import CompressedCache
from fewbits.kv._files import head_width

LARGEST_BATCH = 2**28
"""Bytes that the probabilities of one batch may take."""


@dataclass(frozen=True)
class Cost:
    """What one method costs on some texts.

    Attributes
    ----------
    method : its spec string, or the name it was given.
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
    model: Any,
    tokens: Tensor,
    prompt: int,
    methods: Sequence[str] | Mapping[str, Any],
    batch: int = 8,
) -> list[Cost]:
    """Score the continuation of some texts through the cache of each method.

    Parameters
    ----------
    model : a causal language model of transformers.
    tokens : (n, t) int64, texts of one length.
    prompt : so many tokens of each are read before the cache is compressed; the others are scored.
    methods : spec strings, as `kv.cache` takes them; or names, and what `kv.cache` takes for each.
    batch : texts at a time.

    Raises
    ------
    FewbitsError
        Tokens of another shape, or no continuation.
    """
    scores = Scores(model, prompt, methods)
    check_texts(tokens, prompt)
    for rows in tokens.split(batch):
        scores.add(rows)
    return scores.costs()


def check_texts(tokens: Tensor, prompt: int) -> None:
    if tokens.ndim != 2 or not 1 <= prompt < tokens.shape[1]:
        raise FewbitsError(
            f"tokens must be (texts, tokens) with more than prompt={prompt} of them, not "
            f"{tuple(tokens.shape)}"
        )


def named(methods: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What `kv.cache` takes for each method, by its name; a spec string is its own name."""
    return dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}


class Scores:
    """The costs of several methods on texts that come in one batch after the other.

    A method that fails is left out from then on if `forgiving`; `failed` has its name and why.
    """

    def __init__(
        self,
        model: Any,
        prompt: int,
        methods: Sequence[str] | Mapping[str, Any],
        forgiving: bool = False,
    ) -> None:
        self.model, self.prompt, self.forgiving = model, prompt, forgiving
        self.methods = named(methods)
        self.sums = {name: Sums() for name in self.methods}
        self.failed: dict[str, str] = {}

    def add(
        self,
        rows: Tensor,
        names: Sequence[str] | None = None,
        step: Callable[[str], None] | None = None,
    ) -> None:
        """Score (b, t) more texts with all methods, or some; `step` hears of each."""
        if step is not None:
            step("full")
        whole = run(self.model, rows, self.prompt, cache(self.model, "full"))
        for name in self.methods if names is None else names:
            if name in self.failed:
                continue
            if step is not None:
                step(name)
            try:
                self.sums[name].add(whole, self.found(name, rows, whole), rows, self.prompt)
            except (FewbitsError, RuntimeError) as error:
                if not self.forgiving:
                    raise
                self.failed[name] = " ".join(str(error).split())

    def found(self, name: str, rows: Tensor, whole: Run) -> Run:
        method = self.methods[name]
        if method == "full":  # it was read already
            return whole
        return run(self.model, rows, self.prompt, cache(self.model, method))

    def cost(self, name: str) -> Cost:
        return self.sums[name].cost(name)

    def costs(self) -> list[Cost]:
        """Of all methods that did not fail, in the order they were given."""
        return [self.cost(name) for name in self.methods if name not in self.failed]


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
    start = now(model)
    logits = [model(rows[:, :prompt], past_key_values=held, logits_to_keep=1).logits]
    prompt_seconds = now(model) - start
    nbytes = held.nbytes()
    start = now(model)
    for place in range(prompt, rows.shape[1] - 1):
        logits.append(model(rows[:, place : place + 1], past_key_values=held).logits)
    seconds = now(model) - start
    found = torch.cat(logits, dim=1).float().log_softmax(dim=2)
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * len(held.layers) * heads * head_width(config)
    numbers = per_token * rows.shape[0] * prompt
    return Run(found, nbytes, numbers, prompt_seconds, seconds)


def now(model: Any) -> float:
    """Seconds on a clock, when all that a model was asked for is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def batch_of(model: Any, scored: int, batch: int) -> int:
    """How many texts at a time, so that their probabilities are not too large."""
    words = model.config.get_text_config(decoder=True).vocab_size
    return max(1, min(batch, LARGEST_BATCH // (4 * scored * words)))


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
