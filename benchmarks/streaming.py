"""A saved KV cache over changing links: how late it is, and what it loses, by who chooses levels.

Chunks are really coded and decoded, and their loss is measured on what the model predicts next;
links and the model's speed are simulated, so that nothing depends on this machine.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tables import table
from torch import Tensor
from transformers import DynamicCache

from fewbits.core.language_model import (
    calibration_text,
    held_out_text,
    load_language_model,
    token_rows,
)
from fewbits.kv.cachegen import CacheGen, ChunkInfo, Piece, decode_chunk, encode_chunk
from fewbits.kv.streaming import TEXT, Controller, Fixed, Offer, Policy, Trace, simulate

TEXTS, PROMPT, SCORED, CHUNK = 4, 768, 64, 128
LEVELS = CacheGen.levels
LINKS, CHANGES = 40, 1000
SLOWEST, FASTEST = 12_500.0, 1_250_000.0  # bytes per second: 0.1 and 10 Mb/s
DEADLINE = 0.5
PREFILL_SPEED = 1024.0
"""Tokens per second, of a slow machine: reading a text takes about as long as its cache in 8 bits
does over the mean link. For large models and gigabits that is so on fast machines."""
EIGHT_BITS = "8 bits"

States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """A text, its chunks in each form, and (q, v) log-probabilities behind the exact cache."""

    ids: Tensor
    offers: list[Offer]
    decoded: list[dict[str, States]]
    whole: Tensor


# -- links ---------------------------------------------------------------------------------


def changing(rates: np.ndarray, every: float) -> Trace:
    return Trace(tuple(every * np.arange(len(rates))), tuple(rates))


def constant(rng: np.random.Generator) -> Trace:
    return Trace.constant(rng.uniform(SLOWEST, FASTEST))


def step_down(rng: np.random.Generator) -> Trace:
    """Fast, and a tenth of that from some time in the first half of a second on."""
    fast = rng.uniform(FASTEST / 2, FASTEST)
    return Trace((0.0, rng.uniform(0.05, 0.5)), (fast, fast / 10))


def sawtooth(rng: np.random.Generator) -> Trace:
    """Falls from the fastest to the slowest within a second, again and again."""
    phase = rng.uniform(0, 1) + 0.05 * np.arange(CHANGES)
    return changing(FASTEST - (phase % 1) * (FASTEST - SLOWEST), 0.05)


def random(rng: np.random.Generator) -> Trace:
    return changing(rng.uniform(SLOWEST, FASTEST, CHANGES), 0.25)


KINDS: dict[str, Callable[[np.random.Generator], Trace]] = {
    "constant, 0.1 to 10 Mb/s": constant,
    "5 to 10 Mb/s, then a tenth": step_down,
    "sawtooth, 10 to 0.1 Mb/s within 1 s": sawtooth,
    "random, 0.1 to 10 Mb/s every 0.25 s": random,
}


# -- texts ---------------------------------------------------------------------------------


@torch.no_grad()
def text_of(model: Any, profile: CacheGen, ids: Tensor) -> Text:
    cache = DynamicCache()
    model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
    keys, values = (
        torch.stack([getattr(layer, name)[0] for layer in cache.layers])
        for name in ("keys", "values")
    )
    offers, decoded = [], []
    for first in range(0, PROMPT, CHUNK):
        states = keys[:, :, first : first + CHUNK], values[:, :, first : first + CHUNK]
        offer, forms = coded(profile, states, first)
        offers.append(offer)
        decoded.append(forms)
    return Text(ids, offers, decoded, continued(model, ids, cache))


def coded(profile: CacheGen, states: States, first: int) -> tuple[Offer, dict[str, States]]:
    """What a chunk takes in each form, and what comes out of it."""
    tokens = states[0].shape[2]
    nbytes, forms = {TEXT: 4 * tokens}, {}
    for level in map(str, range(len(LEVELS))):
        data = encode_chunk(profile, *states, first, level)
        piece = Piece(0, len(data), hashlib.sha256(data).hexdigest())
        forms[level] = decode_chunk(profile, data, ChunkInfo(first, tokens, {level: piece}))
        nbytes[level] = len(data)
    rounded = [eight_bits(one) for one in states]
    nbytes[EIGHT_BITS] = sum(size for size, _ in rounded)
    forms[EIGHT_BITS] = rounded[0][1], rounded[1][1]
    return Offer(tokens, nbytes), forms


def eight_bits(states: Tensor) -> tuple[int, Tensor]:
    """Bytes of (layers, heads, t, width) in 8 bits with a half-precision scale for each token of a
    layer, and what comes out of them."""
    scale = (states.abs().amax(dim=(1, 3), keepdim=True) / 127).half().float()
    codes = (states / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
    return codes.numel() + 2 * scale.numel(), codes * scale


@torch.no_grad()
def continued(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """(q, v) log-probabilities of what follows the prompt."""
    logits = model(ids[:, PROMPT:-1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(dim=1)


@torch.no_grad()
def loss(model: Any, text: Text, forms: Sequence[str]) -> float:
    """KL(exact cache ‖ one whose chunks came in these forms), nats per token."""
    cache = DynamicCache()
    for number, form in enumerate(forms):
        if form == TEXT:
            piece = text.ids[:, number * CHUNK : (number + 1) * CHUNK]
            model(piece, past_key_values=cache, logits_to_keep=1)
            continue
        for layer, states in enumerate(zip(*text.decoded[number][form], strict=True)):
            cache.update(states[0][None], states[1][None], layer)
    found = continued(model, text.ids, cache)
    return float((text.whole.exp() * (text.whole - found)).sum(dim=1).mean())


# -- the tables ----------------------------------------------------------------------------


def policies() -> dict[str, Policy]:
    levels = tuple(map(str, range(len(LEVELS))))
    middle = levels[len(levels) // 2]
    made: dict[str, Policy] = {
        "chosen by chunk, cautious": Controller(
            levels, DEADLINE, middle, PREFILL_SPEED, cautious=True
        ),
        "chosen by chunk, Algorithm 1": Controller(levels, DEADLINE, middle, PREFILL_SPEED),
    }
    made |= {f"level {n} (×{scale:g})": Fixed(str(n)) for n, scale in enumerate(LEVELS)}
    return made | {"text only": Fixed(TEXT), "8 bits": Fixed(EIGHT_BITS)}


def section(name: str, texts: list[Text], lost: Callable[[int, tuple[str, ...]], float]) -> str:
    """The table of one kind of link."""
    rng = np.random.default_rng(0)
    links = [KINDS[name](rng) for _ in range(LINKS)]
    found = {
        policy: [
            simulate(one, texts[number % TEXTS].offers, link, PREFILL_SPEED)
            for number, link in enumerate(links)
        ]
        for policy, one in policies().items()
    }
    peer = np.mean([passage.delay for passage in found["8 bits"]])
    rows = []
    for policy, passages in found.items():
        delay = np.mean([passage.delay for passage in passages])
        late = np.mean([passage.violates(DEADLINE) for passage in passages])
        losses = [lost(number % TEXTS, passage.forms) for number, passage in enumerate(passages)]
        rows.append(
            [
                policy,
                f"{late:.0%}",
                f"{delay:.2f} s",
                f"{peer / delay:.1f}×",
                f"{1000 * max(np.mean(losses), 0.0):.2f}",
            ]
        )
    heads = ["levels", "late", "mean delay", "sooner than 8 bits", "KL × 1000"]
    return "\n".join([f"**{name}**\n", table(heads, rows), ""])


def tables() -> str:
    model, tokenizer = load_language_model()
    fitting = token_rows(tokenizer, calibration_text(), 12, 512)
    profile = CacheGen(LEVELS, CHUNK).fit(model, fitting)
    rows = token_rows(tokenizer, held_out_text(), TEXTS, PROMPT + SCORED)
    texts = [text_of(model, profile, row[None]) for row in rows]

    @functools.cache
    def lost(number: int, forms: tuple[str, ...]) -> float:
        return loss(model, texts[number], forms)

    title = "## A saved KV cache over a changing link\n"
    about = (
        f"CacheGen's files of {TEXTS} texts of {PROMPT} tokens, in chunks of {CHUNK}, over {LINKS} "
        f"simulated links of each kind. The deadline is {DEADLINE:g} s; a model that reads "
        f"{PREFILL_SPEED:g} tokens per second needs {PROMPT / PREFILL_SPEED:g} s for the text. "
        "`late` is the share behind the deadline; the KL divergence, in nats per token, is that of "
        "what the reference model predicts next.\n"
    )
    return "\n".join([title, about, *(section(name, texts, lost) for name in KINDS)])


if __name__ == "__main__":
    print(tables())
