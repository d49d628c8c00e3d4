"""A tokenizer for tiny models: one token for each ASCII letter."""

from __future__ import annotations

from typing import Any


class Letters:
    """Token numbers 0 to 127; other letters are the token 1."""

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [ord(c) if ord(c) < 128 else 1 for c in text]}
        return {"input_ids": [self(one)["input_ids"] for one in text]}
