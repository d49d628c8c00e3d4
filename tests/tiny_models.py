"""Tiny models with random weights, of the families that the room promises to serve."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 16, "layer_types": HYBRID}),
    "gemma3": ("Gemma3", {"sliding_window": 16, "layer_types": HYBRID}),
}


def tiny_model(family: str = "llama", **changes: Any) -> Any:
    """A model of a family, the same each time."""
    name, own = FAMILIES[family]
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**(SIZES | own | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(rows: int = 2, count: int = 96, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, count), generator=generator)
