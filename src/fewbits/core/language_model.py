"""Language models to experiment with: a small one that ships with the package, or any other.

The small one is a Llama of 4.7 million parameters (6 layers; 8 query heads share 2 of keys and
values, 32 numbers wide; 4,096 tokens), trained on the text that comes with Python by
``scripts/train_language_model.py``. Its model card lies beside its weights.
"""

from __future__ import annotations

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
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype="float32" if own else "auto", use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FewbitsError(f"{name} cannot be loaded as a causal language model: {reason}") from None
    return model.eval(), tokenizer


def held_out_text() -> str:
    """Text that the reference model has not seen: six modules of the standard library."""
    return (language_model_path() / "held_out.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Text that the reference model was trained on, to calibrate methods with."""
    return (language_model_path() / "calibration.txt").read_text(encoding="utf-8")


def token_rows(tokenizer: Any, text: str, rows: int, length: int, batch: int = 65_536) -> Tensor:
    """(rows, length) int64: pieces of a text, spread evenly over it, that do not overlap.

    Raises
    ------
    FewbitsError
        The text is too short for so many pieces.
    """
    import torch

    pieces = [text[start : start + batch] for start in range(0, len(text), batch)]
    ids = [
        token
        for one in tokenizer(pieces, add_special_tokens=False)["input_ids"]
        for token in one
    ]
    if rows < 1 or length < 1 or len(ids) < rows * length:
        raise FewbitsError(
            f"the text has {len(ids):,} tokens; {rows} pieces of {length} need {rows * length:,}: "
            "give a longer text, or ask for fewer or shorter pieces"
        )
    found = torch.tensor(ids)
    starts = torch.linspace(0, len(ids) - length, rows).long() if rows > 1 else torch.zeros(1).long()
    return found[starts[:, None] + torch.arange(length)]
