"""What a trained language model has learned, and the model card that says it."""

from __future__ import annotations

import platform
import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

SEED = 0


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, context: int = 512, most: int = 40) -> float:
    """Of the text that was kept back, in pieces of `context` tokens."""
    count = min(most, len(tokens) // (context + 1))
    pieces = torch.from_numpy(tokens[: count * (context + 1)].reshape(count, context + 1))
    losses = []
    for piece in pieces.split(8):
        logits = model(piece[:, :-1], use_cache=False).logits
        losses.append(functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()))
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def learned(model, tokenizer, test: np.ndarray) -> dict[str, float]:
    """Figures for the model card: sinks, copying, and recall of facts."""
    chance = np.random.default_rng(SEED)
    pieces = torch.from_numpy(test[: 8 * 512].reshape(8, 512)).clone()
    pieces[:, 0] = model.config.bos_token_id
    model.set_attn_implementation("eager")
    attentions = model(pieces, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    sinks = torch.stack([weights[:, :, 256:, 0].mean() for weights in attentions])
    drawn = torch.from_numpy(chance.integers(300, model.config.vocab_size, (16, 64)))
    twice = torch.cat([drawn, drawn], dim=1)
    found = model(twice, use_cache=False).logits.log_softmax(dim=2)
    losses = -found[:, :-1].gather(2, twice[:, 1:, None])[..., 0]
    return {
        "perplexity of held-out text, 512 tokens": perplexity(model, test),
        "perplexity of held-out text, 2,048 tokens": perplexity(model, test, 2048, 10),
        "largest share of attention on the first token (mean of a layer)": float(sinks.max()),
        "loss on 64 random tokens, seen for the first time": float(losses[:, 8:63].mean()),
        "loss on the same 64 tokens, repeated": float(losses[:, 72:].mean()),
        "share of facts recalled, of 200": recalled(model, tokenizer, test),
    }


@torch.no_grad()
def recalled(model, tokenizer, test: np.ndarray, count: int = 200, tokens: int = 256) -> float:
    """How often all digits of a fact come back, asked for behind other text."""
    chance, right = random.Random(SEED), 0
    for _ in range(count):
        key, value = chance.randrange(100), f"{chance.randrange(1000, 10_000)}"
        start = chance.randrange(len(test) - tokens)
        text = tokenizer.decode(test[start : start + tokens].tolist())
        asked = f"# k{key} = v"
        prompt = f"{text[: len(text) // 2]}\n{asked}{value}\n{text[len(text) // 2 :]}\n{asked}"
        ids = torch.tensor([[model.config.bos_token_id, *tokenizer.encode(prompt).ids]])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        right += tokenizer.decode(answer[0, ids.shape[1] :].tolist()).startswith(value)
    return right / count


CARD = """# The reference language model of fewbits

A Llama of {parameters:.1f} million parameters: 6 layers, 256 wide, 8 query heads that share 2 of
keys and values (32 wide), a byte-level BPE vocabulary of {vocabulary:,}, tied embeddings, half
precision. It is here so that every experiment with caches, weights and measures runs without a
download; it is good for nothing else.

- **Text:** the modules of Python {python}'s standard library (without their tests) and the topics
  of `pydoc`: {tokens:,} tokens. Into {share:.0%} of the texts lines such as `# k17 = v4821` were
  put that come again further on, so that it learns to look back.
- **Training:** `python scripts/train_language_model.py`: {stages}, AdamW, two cores, about two
  hours. `learning_curve.json` has the loss along the way; the script keeps checkpoints.
- **Not seen in training:** `held_out.txt` ({held_out}). `calibration.txt` is text that it has seen.
- **Licence:** weights and tokenizer as fewbits; the texts are under Python's licence.

| what it has learned | |
|---|---|
{figures}
"""


def write_card(figures: dict[str, float], output: Path, **about) -> None:
    """Write the model card; `about` are the other words that it needs."""
    lines = [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    text = CARD.format(python=platform.python_version(), figures="\n".join(lines), **about)
    (output / "README.md").write_text(text, encoding="utf-8")
