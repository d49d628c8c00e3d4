"""The rows as one array in an ``.npy`` file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fewbits.core.search import Matches
from fewbits.core.stored import Stored
from fewbits.core.stores.plan import Plan, search_blocks

SEARCH_ROWS = 65_536
"""Rows read at a time."""


def write_array(
    place: Path, dtype: str, shape: tuple[int, int], blocks: Iterable[np.ndarray]
) -> None:
    """Write a table block by block."""
    little = np.dtype(dtype).newbyteorder("<")
    header = {
        "descr": np.lib.format.dtype_to_descr(little),
        "fortran_order": False,
        "shape": shape,
    }
    with open(place, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=little).data)
        file.flush()
        os.fsync(file.fileno())


def write(place: Path, plan: Plan) -> None:
    write_array(place, plan.form.dtype, (plan.rows, plan.form.width), plan.blocks())


def search(path: Path, form: Stored, queries: np.ndarray, k: int) -> Matches:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    starts = range(0, len(rows), SEARCH_ROWS)
    blocks = (rows[start : start + SEARCH_ROWS] for start in starts)
    return search_blocks(blocks, queries, k, form.metric)
