"""Language models to experiment with: a small one that ships with the package, or any other.

The small one is a Llama of 4.7 million parameters (6 layers; 8 query heads share 2 of keys and
values, 32 numbers wide; 4,096 tokens), trained on the text that comes with Python by
``scripts/train_language_model.py``. Its model card lies beside its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.core.errors import FewbitsError, require

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"
"""The name of the model that ships with the package."""


def language_model_path() -> Path:
    """The folder of the model that ships with the package, as `transformers` saves one."""
    return Path(str(files("fewbits.core"))) / "data" / "language_model"


def load_language_model(name: str = REFERENCE) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Parameters
    ----------
    name : ``reference`` for the one that ships with the package (float32), or the folder or the
        name of any other that `transformers` loads (in the dtype of its file). No code that comes
        with a model is run.

    Raises
    ------
    FewbitsError
        There is no such model, or it cannot be read.
    """
    require("torch", "kv")
    require("transformers", "kv")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = name == REFERENCE
    place = str(language_model_path()) if own else name
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype="float32" if own else "auto", use_safetensors=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FewbitsError(
            f"{name} cannot be loaded as a causal language model: {reason}"
        ) from None
    return model.eval(), tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers; errors say what there is to say."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def held_out_text() -> str:
    """Text that the reference model has not seen: six modules of the standard library."""
    return (language_model_path() / "held_out.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Text that the reference model was trained on, to calibrate methods with."""
    return (language_model_path() / "calibration.txt").read_text(encoding="utf-8")


def token_rows(tokenizer: Any, text: str, rows: int, length: int, batch: int = 65_536) -> Tensor:
    """(rows, length) int64: pieces of a text, spread evenly over it, that do not overlap.

    Where the tokenizer has a token that begins a text, each piece begins with it, as models expect.

    Raises
    ------
    FewbitsError
        The text is too short for so many pieces.
    """
    import torch

    first = getattr(tokenizer, "bos_token_id", None)
    own = length if first is None else length - 1
    texts = [text[start : start + batch] for start in range(0, len(text), batch)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = torch.tensor([token for ids in encoded for token in ids])
    if rows < 1 or own < 1 or len(found) < rows * own:
        raise FewbitsError(
            f"the text has {len(found):,} tokens; {rows} pieces of {length} need {rows * own:,}: "
            "give a longer text, or ask for fewer or shorter pieces"
        )
    starts = torch.linspace(0, len(found) - own, rows).long()
    pieces = found[starts[:, None] + torch.arange(own)]
    return (
        pieces if first is None else torch.cat([pieces.new_full((rows, 1), first), pieces], dim=1)
    )
