"""The rows as a Parquet table of row numbers and fixed-size lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fewbits.core.search import Matches
from fewbits.core.stored import Stored
from fewbits.core.stores.arrow_table import batches, schema
from fewbits.core.stores.plan import Plan, search_blocks

SEARCH_ROWS = 65_536
"""Rows read at a time."""


def write(place: Path, plan: Plan) -> None:
    import pyarrow.parquet as pq

    # Parquet spends four bytes on a plain small number, but one on its place in a dictionary.
    is_small = np.dtype(plan.form.dtype).itemsize == 1
    with pq.ParquetWriter(
        place, schema(plan), compression="none", use_dictionary=is_small, write_statistics=False
    ) as writer:
        for batch in batches(plan):
            writer.write_batch(batch)


def search(path: Path, form: Stored, queries: np.ndarray, k: int) -> Matches:
    return search_blocks(read(path, form.width), queries, k, form.metric)


def read(path: Path, width: int) -> Iterator[np.ndarray]:
    """The column ``vector`` in blocks of rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(SEARCH_ROWS, columns=["vector"]):
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            yield flat.reshape(len(batch), width)
