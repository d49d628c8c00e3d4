"""From a file of words to a saved KV cache, and from there to what the model writes next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fewbits.core.errors import FewbitsError
from fewbits.kv.cachegen import CacheGen, Manifest, save
from fewbits.kv.streaming import TEXT, Arrival, load, read_tokens

PIECE = 2048
"""Tokens that the model reads at a time."""


# -- saving --------------------------------------------------------------------------------


def save_text(
    model: Any,
    tokenizer: Any,
    text: str,
    place: str | Path,
    *,
    profile: CacheGen | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Have a model read a text, and save what it remembers.

    Parameters
    ----------
    model, tokenizer : as `fewbits.core.language_model.load_language_model` gives them.
    place : a folder to make, or a URL that fsspec writes.
    profile : of the model; one is learned from the text itself where none is given.
    overwrite : replace a cache that is there.

    Raises
    ------
    FewbitsError
        An empty text, one that is longer than the model can read, or as `save`.
    """
    ids = tokens_of(model, tokenizer, text)
    cache = DynamicCache(config=model.config)
    read_in_pieces(model, ids, cache)
    fitted = profile if profile is not None else CacheGen().fit(model, ids)
    fitted.check_model(model)
    return save(cache, place, fitted, ids[0], overwrite=overwrite)


def tokens_of(model: Any, tokenizer: Any, text: str) -> Tensor:
    """(1, t) int64: the tokens of a text, as the model begins to read it."""
    found = tokenizer(text)["input_ids"]
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not found:
        raise FewbitsError("the text is empty; there is nothing to remember")
    if longest is not None and len(found) > longest:
        raise FewbitsError(
            f"the text has {len(found):,} tokens, but the model reads at most {longest:,}; save "
            "a shorter text"
        )
    return torch.tensor([found])


@torch.no_grad()
def read_in_pieces(model: Any, ids: Tensor, cache: DynamicCache) -> None:
    """Have a model read (1, t) tokens."""
    for piece in ids.to(model.device).split(PIECE, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)


def saved_lines(manifest: Manifest) -> list[str]:
    """What was saved, in words."""
    numbers = 2 * manifest.layers * manifest.heads * manifest.width * manifest.tokens
    found = [f"{manifest.tokens:,} tokens in {len(manifest.chunks)} chunks"]
    for level in manifest.levels:
        size = manifest.level_bytes(level)
        found.append(
            f"level {level}: {size:,} bytes, {8 * size / numbers:.2f} bits per number, "
            f"{numbers / size:.1f} times smaller than in 8 bits"
        )
    return found


# -- going on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """What the model wrote behind a saved text, and how the text's cache came.

    Attributes
    ----------
    text : written.
    arrivals : of each chunk of the cache.
    load_seconds : until the whole cache was there.
    """

    text: str
    arrivals: tuple[Arrival, ...]
    load_seconds: float

    def lines(self) -> list[str]:
        """How the cache came, in words."""
        found: dict[str, int] = {}
        for arrival in self.arrivals:
            found[arrival.form] = found.get(arrival.form, 0) + arrival.tokens
        nbytes = sum(arrival.nbytes for arrival in self.arrivals)
        what = ", ".join(
            f"{tokens:,} {'computed from text' if form == TEXT else f'at level {form}'}"
            for form, tokens in found.items()
        )
        return [
            f"{sum(found.values()):,} tokens in {self.load_seconds:.2f} s: {what}; {nbytes:,} bytes"
        ]


def go_on(
    model: Any,
    tokenizer: Any,
    url: str | Path,
    question: str,
    *,
    new_tokens: int = 64,
    deadline: float | None = None,
    level: str | None = None,
    on_chunk: Callable[[Arrival], None] | None = None,
) -> Continuation:
    """Load a saved cache, have the model read a question behind it, and write the answer.

    Parameters
    ----------
    model, tokenizer : as `fewbits.core.language_model.load_language_model` gives them.
    url, deadline, level, on_chunk : as `fewbits.kv.streaming.load` takes them.
    question : what comes behind the text, as it is; at least one token.
    new_tokens : so many are written, the most probable each time.

    Raises
    ------
    FewbitsError
        No question, fewer than one new token, or as `load`.
    """
    behind = tokenizer(question, add_special_tokens=False)["input_ids"]
    if not behind:
        raise FewbitsError("the question is empty; give at least a word to go on from")
    if new_tokens < 1:
        raise FewbitsError(f"new_tokens={new_tokens} must be at least 1")
    arrivals: list[Arrival] = []

    def came(arrival: Arrival) -> None:
        arrivals.append(arrival)
        if on_chunk is not None:
            on_chunk(arrival)

    start = time.perf_counter()
    cache = load(model, url, deadline=deadline, level=level, on_chunk=came)
    seconds = time.perf_counter() - start
    ids = torch.cat([read_tokens(url), torch.tensor([behind])], dim=1).to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return Continuation(text, tuple(arrivals), seconds)
