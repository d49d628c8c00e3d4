"""What KV caches cost at equal bytes: our methods, the established ones, and kvpress.

kvpress does not work with the transformers that fewbits needs. Name the Python of an environment
that has it in ``FEWBITS_KVPRESS_PYTHON``; without, one is made in a temporary folder.

All models run in half precision, as caches are held in practice: in float32 every method that
counts bits would look twice as good as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import table
from torch import Tensor

import fewbits
from fewbits.core.language_model import (
    calibration_text,
    held_out_text,
    language_model_path,
    load_language_model,
    token_rows,
)

PIECES, PROMPT, SCORED = 12, 512, 64
BUDGETS = (0.5, 0.25, 0.125)
TOLERANCE = 1.02
"""A method lands at a budget if it holds at most so many times its bytes."""
OPPONENTS = {"full", "window", "snapkv", "h2o", "kivi", "pca"}
REQUIREMENTS = ("kvpress==0.5.5", "transformers<5.3", "torch==2.13.0")
SCRIPT = Path(__file__).parent / "kvpress_scores.py"


def tables() -> str:
    model, tokenizer = load_language_model()
    model = model.to(torch.float16)
    tokens = token_rows(tokenizer, held_out_text(), PIECES, PROMPT + SCORED)
    found = fewbits.kv.compare(
        model,
        tokens,
        calibrate=calibration_text(),
        tokenizer=tokenizer,
        pieces=PIECES,
        prompt=PROMPT,
        scored=SCORED,
    )
    rows = [ours(point, found.input["bytes_per_item"]) for point in found.points]
    rows += kvpress_rows(tokens)
    about = (
        f"## KV caches: quality at equal bytes\n\nReference model in half precision; {PIECES} "
        f"texts it has not seen, {PROMPT} tokens read and {SCORED} scored through the compressed "
        "cache. KL: of the next token from what the whole cache gives, in nats × 1000. Bytes are "
        "those really held. Methods that are fitted learned from text the model has seen.\n\n"
    )
    parts = [best_table(rows), *(budget_table(rows, budget) for budget in BUDGETS)]
    left_out = [f"{one['method']}: {one['why']}" for one in found.left_out]
    return (
        about
        + "\n\n".join(parts)
        + ("\n\nLeft out: " + "; ".join(left_out) + "." if left_out else "")
    )


def ours(point: Any, whole: float) -> dict[str, Any]:
    names = set(point.method.split("+"))
    return {
        "method": point.spec,
        "kind": "established" if names <= OPPONENTS else "fewbits",
        "share": point.bytes_per_item / whole,
        "divergence": point.quality["KL"],
        "perplexity": point.quality["perplexity"],
    }


def best_table(rows: Sequence[dict[str, Any]]) -> str:
    """For each budget and kind the method that diverges least."""
    shown = []
    for budget in BUDGETS:
        landing = [row for row in rows if row["share"] <= budget * TOLERANCE]
        for kind in ("fewbits", "established", "kvpress"):
            some = [row for row in landing if row["kind"] == kind]
            if some:
                best = min(some, key=lambda row: row["divergence"])
                shown.append([f"{budget:.1%}", kind, *figures(best)])
    return table(["at most", "", *HEADS], shown)


def budget_table(rows: Sequence[dict[str, Any]], budget: float) -> str:
    """All methods that land near a budget, the best first."""
    near = [row for row in rows if 0.6 * budget < row["share"] <= budget * TOLERANCE]
    near.sort(key=lambda row: row["divergence"])
    shown = [[row["kind"], *figures(row)] for row in near]
    return f"### At most {budget:.1%} of the whole cache\n\n" + table(["", *HEADS], shown)


HEADS = ("method", "share", "KL × 1000", "perplexity")


def figures(row: dict[str, Any]) -> list[str]:
    return [
        f"`{row['method']}`",
        f"{row['share']:.3f}",
        f"{1000 * row['divergence']:.3g}",
        f"{row['perplexity']:.3f}",
    ]


# -- kvpress -------------------------------------------------------------------------------


def kvpress_rows(tokens: Tensor) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        python = os.environ.get("FEWBITS_KVPRESS_PYTHON") or kvpress_python(Path(folder) / "env")
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        output = Path(folder) / "scores.json"
        arguments = [str(language_model_path()), f"{folder}/tokens.npy", str(PROMPT), str(output)]
        subprocess.run([python, str(SCRIPT), *arguments], check=True)
        found = json.loads(output.read_text(encoding="utf-8"))
    return [row | {"kind": "kvpress"} for row in found]


def kvpress_python(folder: Path) -> str:
    """The Python of a new environment that has kvpress."""
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return python
