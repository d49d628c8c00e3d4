"""What caches are compared on: a model, and pieces of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.core.language_model import load_language_model, token_rows

LONGEST_TEXT = 4_000_000
"""Characters of a text that are looked at; the pieces are spread over these."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and its tokenizer where there is one."""

    model: Any
    tokenizer: Any
    name: str

    def pieces(self, text: str | Tensor, rows: int, length: int) -> Tensor:
        """(rows, length) int64 from a text, or from token numbers that are pieces already.

        Raises
        ------
        FewbitsError
            The text is too short, or there is no tokenizer to read it.
        """
        if isinstance(text, str):
            found = token_rows(self.needed_tokenizer(), text, rows, length)
            check_vocabulary(self.model, found)
            return found
        if text.shape[0] < rows or text.shape[1] < length:
            raise FewbitsError(
                f"{rows} pieces of {length} tokens are needed, but the text has the shape "
                f"{tuple(text.shape)}: give more or longer pieces, or ask for fewer or shorter ones"
            )
        check_vocabulary(self.model, text)
        return text[:rows, :length]

    def needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise FewbitsError(
                "a model that is loaded already needs its tokenizer to read a text; pass "
                "tokenizer=, or the text as (pieces, tokens) token numbers"
            )
        return self.tokenizer


def open_subject(model: Any, tokenizer: Any = None) -> Subject:
    """A model by its name or folder, or one that is loaded already.

    Raises
    ------
    FewbitsError
        It cannot be loaded, or is no causal language model of transformers.
    """
    if isinstance(model, (str, Path)):
        loaded, own = load_language_model(str(model))
        return Subject(loaded, tokenizer or own, str(model))
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise FewbitsError(
            f"{type(model).__name__} is no causal language model of transformers; give one, or the "
            "name or folder of one"
        )
    return Subject(model.eval(), tokenizer, type(model).__name__)


def read_text(text: str | Path | Tensor, what: str = "text") -> str | Tensor:
    """The words of a file, a text as it is, or (pieces, tokens) int64 checked.

    Raises
    ------
    FewbitsError
        The file cannot be read, is not UTF-8 or has nothing in it; or tokens of another shape.
    """
    if isinstance(text, Tensor):
        if text.ndim != 2 or text.dtype != torch.int64 or not text.numel():
            raise FewbitsError(
                f"the {what} must be words or (pieces, tokens) int64, not "
                f"{tuple(text.shape)} {str(text.dtype).removeprefix('torch.')}"
            )
        return text
    if isinstance(text, Path):
        name, text = f"{what} {text}", words_of(text, what)
    else:
        name = f"the {what}"
    if not text.strip():
        raise FewbitsError(f"{name} is empty; give one with more words")
    return text[:LONGEST_TEXT]


def words_of(path: Path, what: str) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(LONGEST_TEXT)
    except OSError as error:
        raise FewbitsError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise FewbitsError(f"the {what} {path} is not UTF-8 text; save it as such") from None


def check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Refuse token numbers that the model does not have."""
    words = model.config.get_text_config(decoder=True).vocab_size
    if int(tokens.min()) < 0 or int(tokens.max()) >= words:
        raise FewbitsError(
            f"the text has token numbers outside 0 to {words - 1}; read it with the tokenizer of "
            "this model"
        )


def check_length(model: Any, tokens: int) -> None:
    """Refuse pieces that are longer than what the model reads."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise FewbitsError(
            f"pieces of {tokens} tokens are longer than the {most} that this model reads; take a "
            "shorter prompt"
        )
