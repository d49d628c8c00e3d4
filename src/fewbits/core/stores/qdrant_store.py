"""A Qdrant collection in a folder, written and searched by Qdrant's own engine in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.errors import require
from fewbits.core.search import Matches
from fewbits.core.stored import Stored
from fewbits.core.stores.plan import Plan

UPSERT_ROWS = 1024
"""Points handed over at a time."""
DISTANCES = {"ip": "Dot", "l2": "Euclid", "cosine": "Cosine"}


def write(place: Path, plan: Plan) -> None:
    edge: Any = require("qdrant_edge", "stores")
    place.mkdir()
    shard = edge.EdgeShard.create(str(place), config(edge, plan))
    first = 0
    for block in plan.blocks():
        for start in range(0, len(block), UPSERT_ROWS):
            vectors = block[start : start + UPSERT_ROWS].astype(np.float32).tolist()
            points = [edge.Point(id=first + row, vector=v) for row, v in enumerate(vectors)]
            shard.update(edge.UpdateOperation.upsert_points(points))
            first += len(points)
    shard.optimize()
    shard.flush()
    shard.close()


def config(edge: Any, plan: Plan) -> Any:
    """The collection; codes of few bits are what Qdrant keeps in memory and scans.

    Bits become ±1, whose signs Qdrant packs again, and are compared with queries of eight bits;
    one byte per number is Qdrant's own scalar quantization.
    """
    quantization, half = None, plan.form.dtype == "float16"
    if plan.kind == "bits":
        encoding = edge.BinaryQuantizationQueryEncoding.Scalar8Bits
        quantization = edge.BinaryQuantizationConfig(query_encoding=encoding)
    elif plan.kind == "integers":
        quantization = edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8)
    kinds = edge.VectorStorageDatatype
    vectors = edge.EdgeVectorParams(
        size=plan.form.dims,
        distance=getattr(edge.Distance, DISTANCES[plan.form.metric]),
        memory=None if quantization is None else edge.Memory.Cold,
        datatype=kinds.Float16 if half else kinds.Float32,
        quantization_config=quantization,
    )
    # Qdrant leaves small collections as they are, but these are meant to be quantized.
    threshold = None if quantization is None else 1
    optimizers = edge.EdgeOptimizersConfig(indexing_threshold=threshold)
    return edge.EdgeConfig(vectors=vectors, optimizers=optimizers, wal_enabled=False)


def search(path: Path, form: Stored, queries: np.ndarray, k: int) -> Matches:
    edge: Any = require("qdrant_edge", "stores")
    shard = edge.EdgeShard.load(str(path))
    asked = [
        edge.QueryRequest(query=edge.Query.Nearest(query), limit=k)
        for query in np.asarray(queries, dtype=np.float32).tolist()
    ]
    answers = shard.query_batch(edge.QueryBatchRequest(asked))
    shard.close()
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    sign = -1 if form.metric == "l2" else 1
    for number, found in enumerate(answers):
        rows[number, : len(found)] = [point.id for point in found]
        scores[number, : len(found)] = [sign * point.score for point in found]
    return scores, rows
