"""How fast a model reads on behind a long prompt, through each cache, against transformers' own."""

from __future__ import annotations

import time
from typing import Any

import torch
from tables import table
from torch import Tensor
from transformers import DynamicCache

import fewbits
from fewbits.core.language_model import (
    calibration_text,
    held_out_text,
    load_language_model,
    token_rows,
)

PROMPT, STEPS, ROUNDS, BATCH = 3_968, 16, 5, 4
METHODS = (
    "full",
    "window:keep=0.25",
    "snapkv:keep=0.25",
    "think:ratio=0.5",
    "kivi:bits=4",
    "kivi:bits=2",
    "vidkv",
    "snapkv:keep=0.5+think:ratio=0.5",
)


def tables() -> str:
    model, tokenizer = load_language_model()
    rows = token_rows(tokenizer, held_out_text(), BATCH, PROMPT + 1)
    steps = token_rows(tokenizer, calibration_text(), BATCH, STEPS * ROUNDS)
    made: dict[str, Any] = {"transformers' cache": DynamicCache(config=model.config)}
    made |= {name: fewbits.kv.cache(model, name) for name in METHODS}
    prompts = {name: read(model, rows, cache) for name, cache in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(ROUNDS):  # in turns, so that what else the machine does meets them all
        some = steps[:, number * STEPS : (number + 1) * STEPS]
        for name, cache in made.items():
            seconds[name].append(decode(model, some, cache))
    best = {name: min(times) for name, times in seconds.items()}
    peer = best["transformers' cache"]
    shown = [
        [
            name,
            f"{BATCH * STEPS / best[name]:,.0f}",
            f"{peer / best[name]:.2f}",
            f"{prompts[name]:.2f}",
            f"{prompts[name] / prompts['full']:.2f}",
        ]
        for name in made
    ]
    heads = ["cache", "tokens/s", "ratio", "prompt s", "ratio to full"]
    return (
        f"## KV caches: speed\n\nThe reference model reads on, token by token, behind {PROMPT:,} "
        f"tokens, {BATCH} texts at a time; the best of {ROUNDS} rounds taken in turns. Ratio: "
        "against transformers' own cache, above 1 is faster.\n\n" + table(heads, shown)
    )


@torch.no_grad()
def read(model: Any, rows: Tensor, cache: Any) -> float:
    """Seconds to read the prompt and to compress it."""
    start = time.perf_counter()
    model(rows[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def decode(model: Any, rows: Tensor, cache: Any) -> float:
    """Seconds to read on, token by token."""
    start = time.perf_counter()
    for place in range(rows.shape[1]):
        model(rows[:, place : place + 1], past_key_values=cache)
    return time.perf_counter() - start
