"""What kvpress's methods cost, by the same protocol as ours; runs in an environment of its own.

    python benchmarks/kvpress_scores.py MODEL_FOLDER TOKENS.npy PROMPT OUTPUT.json

kvpress 0.5.5 does not work with the transformers that fewbits needs, so nothing here imports
fewbits. Bytes are those of the cache's live tensors: methods that only pretend to drop channels
or heads hold what the whole cache holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

SHARES = (0.5, 0.25, 0.125)
"""Of the whole cache, to keep."""
PRESSES = (
    "SnapKVPress",
    "TOVAPress",
    "KnormPress",
    "KeyDiffPress",
    "LagKVPress",
    "ExpectedAttentionPress",
    "StreamingLLMPress",
    "PyramidKVPress",
    "CURPress",
    "LeverageScorePress",
    "RandomPress",
)
BATCH = 8


def main(folder: str, tokens_file: str, prompt: int, output: str) -> None:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    tokens = torch.from_numpy(np.load(tokens_file))
    whole = [run(model, rows, prompt, None) for rows in tokens.split(BATCH)]
    found = []
    for name, share in [(name, share) for name in PRESSES for share in SHARES]:
        kind = getattr(kvpress, name, None)
        if kind is None:
            continue
        try:
            press = kind(compression_ratio=1 - share)
            found.append(cost(model, tokens, prompt, press, whole) | {"method": name})
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            print(f"{name} at {share}: {error}", file=sys.stderr)
    Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def cost(
    model: Any, tokens: Tensor, prompt: int, press: Any, whole: list[tuple[Tensor, int]]
) -> dict[str, Any]:
    """Mean divergence from the whole cache, perplexity, and share of its bytes."""
    divergence, loss, held, full = 0.0, 0.0, 0, 0
    for rows, (reference, full_bytes) in zip(tokens.split(BATCH), whole, strict=True):
        seen, nbytes = run(model, rows, prompt, press)
        divergence += float((reference.exp() * (reference - seen)).sum())
        loss -= float(seen.gather(2, rows[:, prompt:, None]).sum())
        held, full = held + nbytes, full + full_bytes
    scored = tokens.shape[0] * (tokens.shape[1] - prompt)
    return {
        "share": held / full,
        "divergence": divergence / scored,
        "perplexity": float(np.exp(loss / scored)),
    }


@torch.no_grad()
def run(model: Any, rows: Tensor, prompt: int, press: Any) -> tuple[Tensor, int]:
    """(b, t − prompt, v) log-probabilities of the continuation, and the bytes held."""
    cache = DynamicCache()
    if press is None:
        first = model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1).logits
    else:
        with press(model):
            first = model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1).logits
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    places = torch.arange(prompt, rows.shape[1] - 1)[None].expand(rows.shape[0], -1)
    rest = model(rows[:, prompt:-1], past_key_values=cache, position_ids=places).logits
    return torch.cat([first, rest], dim=1).float().log_softmax(dim=2), nbytes


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
