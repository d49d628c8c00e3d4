"""A faiss index of the codes as they are, which raw queries search wherever faiss can do that."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.search import Matches
from fewbits.core.stored import Stored
from fewbits.core.stores.plan import Plan


def write(place: Path, plan: Plan) -> None:
    """Fill the index and write it. faiss holds it in memory as a whole until it is written."""
    faiss: Any = importlib.import_module("faiss")
    assert plan.faiss is not None
    index = plan.faiss.index
    for block in plan.blocks():
        index.add_sa_codes(block)
    steps = plan.faiss.steps
    whole = faiss.IndexPreTransform(index) if steps else index
    for step in reversed(steps):
        whole.prepend_transform(step)
    faiss.write_index(whole, str(place))


def search(path: Path, form: Stored, queries: np.ndarray, k: int) -> Matches:
    faiss: Any = importlib.import_module("faiss")
    index = faiss.read_index(str(path))
    scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    is_distance = index.metric_type == faiss.METRIC_L2
    return (-scores if is_distance else scores), rows.astype(np.int64)
