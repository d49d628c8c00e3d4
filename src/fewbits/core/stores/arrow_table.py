"""The rows as Arrow record batches: a column ``id`` and a column ``vector``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fewbits.core.stores.plan import Plan


def schema(plan: Plan) -> Any:
    """``id``: int64 row number; ``vector``: list of as many numbers as a row has."""
    import pyarrow as pa

    number = pa.from_numpy_dtype(np.dtype(plan.form.dtype))
    vector = pa.list_(pa.field("item", number, nullable=False), plan.form.width)
    about = {f"fewbits.{name}": value for name, value in plan.about.items()}
    fields = [pa.field("id", pa.int64(), nullable=False), pa.field("vector", vector)]
    return pa.schema(fields, metadata=about)


def batches(plan: Plan) -> Iterator[Any]:
    """All rows in order."""
    import pyarrow as pa

    kind, first = schema(plan), 0
    for block in plan.blocks():
        flat = np.ascontiguousarray(block, dtype=plan.form.dtype).ravel()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind.field("vector").type)
        ids = np.arange(first, first + len(block), dtype=np.int64)
        yield pa.record_batch([pa.array(ids), vectors], schema=kind)
        first += len(block)
