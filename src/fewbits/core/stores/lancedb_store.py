"""A LanceDB database with one table, ``items``: columns ``id`` and ``vector``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.errors import require
from fewbits.core.search import Matches
from fewbits.core.stored import Stored
from fewbits.core.stores.arrow_table import batches, schema
from fewbits.core.stores.plan import Plan

TABLE = "items"
INDEX_ROWS = 100_000
"""Fewer rows are searched one by one, exactly; an index takes as much disk as the rows again."""
DISTANCES = {"ip": "dot", "l2": "l2", "cosine": "cosine", "hamming": "hamming"}


def write(place: Path, plan: Plan) -> None:
    import pyarrow as pa

    lancedb: Any = require("lancedb", "stores")
    kind = schema(plan)
    stopped: list[BaseException] = []

    def watched() -> Iterator[Any]:
        try:
            yield from batches(plan)
        except BaseException as error:
            stopped.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(kind, watched())
    try:
        table = lancedb.connect(place).create_table(TABLE, data=reader, schema=kind)
    except RuntimeError:
        if stopped:  # LanceDB makes another kind of error of it
            raise stopped[0] from None
        raise
    if plan.rows >= INDEX_ROWS:
        table.create_index("vector", config=index_config(plan))


def index_config(plan: Plan) -> Any:
    """Lists of near rows; with one byte per number where the codec had that."""
    index: Any = require("lancedb.index", "stores")
    distance = DISTANCES[plan.form.metric]
    if plan.kind == "integers":
        return index.IvfSq(distance_type=distance)
    return index.IvfFlat(distance_type=distance)


def search(path: Path, form: Stored, queries: np.ndarray, k: int) -> Matches:
    lancedb: Any = require("lancedb", "stores")
    table = lancedb.connect(path).open_table(TABLE)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    for number, query in enumerate(queries):
        asked = table.search(query, vector_column_name="vector").limit(k)
        asked = asked.distance_type(DISTANCES[form.metric])
        found = asked.select(["id", "_distance"]).to_arrow()
        rows[number, : len(found)] = found["id"].to_numpy()
        scores[number, : len(found)] = -found["_distance"].to_numpy()
    return scores, rows
