"""Recall at equal bytes: the best of fewbits against what vector stores quantize to themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb
import lancedb.index
import numpy as np
import qdrant_edge as edge
from quality import cells, collections, difference, found
from tables import table

import fewbits
from fewbits.core.export import export
from fewbits.core.search import search_array

Hits = np.ndarray
K = 10
LANCEDB = {
    "LanceDB IVF_PQ, 24 sub-vectors": (24, lambda: lance_config("IvfPq", num_sub_vectors=24)),
    "LanceDB IVF_PQ, 48 sub-vectors": (48, lambda: lance_config("IvfPq", num_sub_vectors=48)),
    "LanceDB IVF_PQ, 96 sub-vectors": (96, lambda: lance_config("IvfPq", num_sub_vectors=96)),
    "LanceDB IVF_RQ, 1 bit": (56, lambda: lance_config("IvfRq")),
    "LanceDB IVF_SQ": (384, lambda: lance_config("IvfSq")),
    "LanceDB HNSW_SQ": (384, lambda: lance_config("HnswSq")),
}
"""Name → bytes of a code of 384 dimensions (IVF_RQ: 48, and two float32), and the index."""
BINARY = edge.BinaryQuantizationEncoding
EIGHT_BITS = edge.BinaryQuantizationQueryEncoding.Scalar8Bits
TURBO = edge.TurboQuantBitSize
RATIOS = edge.CompressionRatio
QDRANT = {
    "Qdrant product, x64": lambda: edge.ProductQuantizationConfig(RATIOS.X64),
    "Qdrant product, x32": lambda: edge.ProductQuantizationConfig(RATIOS.X32),
    "Qdrant binary": lambda: edge.BinaryQuantizationConfig(),
    "Qdrant binary, 8-bit queries": lambda: edge.BinaryQuantizationConfig(
        query_encoding=EIGHT_BITS
    ),
    "Qdrant TurboQuant, 1 bit": lambda: edge.TurboQuantQuantizationConfig(bits=TURBO.Bits1),
    "Qdrant product, x16": lambda: edge.ProductQuantizationConfig(RATIOS.X16),
    "Qdrant binary, 2 bits, 8-bit queries": lambda: edge.BinaryQuantizationConfig(
        encoding=BINARY.TwoBits, query_encoding=EIGHT_BITS
    ),
    "Qdrant TurboQuant, 2 bits": lambda: edge.TurboQuantQuantizationConfig(bits=TURBO.Bits2),
    "Qdrant TurboQuant, 4 bits": lambda: edge.TurboQuantQuantizationConfig(bits=TURBO.Bits4),
    "Qdrant scalar": lambda: edge.ScalarQuantizationConfig(edge.ScalarType.Int8),
}
OURS = {
    24: "additive-bits:bytes=24",
    48: "additive-bits:bytes=48",
    96: "additive-bits:bytes=96",
    192: "pca-rag:dims=304+turboquant:bits=5",
    384: "int8",
}
"""Size → what of ours is best within it; `quality` has the others."""
INSIDE = {"lancedb": ("sign", "itq"), "qdrant": ("sign", "itq", "pca-rag:dims=96+int8")}
"""What `fewbits export` puts into the stores."""


def lance_config(kind: str, **options: Any) -> Any:
    return getattr(lancedb.index, kind)(distance_type="dot", num_partitions=1, **options)


def lance_hits(
    items: np.ndarray, queries: np.ndarray, truth: np.ndarray
) -> Iterator[tuple[str, float, Hits]]:
    """Each of LanceDB's indexes, all of it searched, without the float vectors' help."""
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(items.ravel()), items.shape[1])
    rows = pa.table({"id": np.arange(len(items)), "vector": vectors})
    for name, (size, config) in LANCEDB.items():
        with tempfile.TemporaryDirectory() as folder:
            stored = lancedb.connect(folder).create_table("items", rows)
            stored.create_index("vector", config=config())
            answers = []
            for query in queries:
                asked = stored.search(query).distance_type("dot").nprobes(1).limit(K)
                asked = asked.ef(len(items)) if "HNSW" in name else asked
                answers.append(asked.select(["id", "_distance"]).to_arrow()["id"].to_pylist())
        yield name, size, hits(answers, truth)


def qdrant_hits(
    items: np.ndarray, queries: np.ndarray, truth: np.ndarray
) -> Iterator[tuple[str, float, Hits]]:
    """Each of Qdrant's quantizations, searched with the widest beam and without rescoring."""
    for name, config in QDRANT.items():
        with tempfile.TemporaryDirectory() as folder:
            shard = qdrant_shard(folder, items, config)
            size = sum(f.stat().st_size for f in Path(folder).rglob("quantized.data")) / len(items)
            exhaustive = edge.SearchParams(
                hnsw_ef=len(items), quantization=edge.QuantizationSearchParams(rescore=False)
            )
            asked = [
                edge.QueryRequest(query=edge.Query.Nearest(query), limit=K, params=exhaustive)
                for query in queries.tolist()
            ]
            answers = shard.query_batch(edge.QueryBatchRequest(asked))
            shard.close()
        yield name, size, hits([[point.id for point in one] for one in answers], truth)


def qdrant_shard(folder: str, items: np.ndarray, config: Callable[[], Any]) -> Any:
    vectors = edge.EdgeVectorParams(
        size=items.shape[1], distance=edge.Distance.Dot, quantization_config=config()
    )
    small = edge.EdgeOptimizersConfig(indexing_threshold=1)
    shard = edge.EdgeShard.create(folder, edge.EdgeConfig(vectors=vectors, optimizers=small))
    points = [edge.Point(id=row, vector=vector) for row, vector in enumerate(items.tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.optimize()
    return shard


def hits(answers: list[list[int]], truth: np.ndarray) -> Hits:
    """Share of the true top 10 found, query by query."""
    rows = np.full(truth.shape, -1)
    for number, answer in enumerate(answers):
        rows[number, : len(answer)] = answer
    return (rows[:, :, None] == truth[:, None, :]).any(axis=2).mean(axis=1)


def inside(items: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> list[list[Any]]:
    """What fewbits' codes find when a store holds and searches them."""
    rows = []
    for to, specs in INSIDE.items():
        for spec in specs:
            encoded = fewbits.encode(items, method=spec)
            with tempfile.TemporaryDirectory() as folder:
                exported = export(encoded, to, Path(folder) / "out")
                share = hits(exported.search(queries, K)[1].tolist(), truth).mean()
            rows.append([to, f"`{spec}`", f"{encoded.bytes_per_item:g}", f"{share:.3f}"])
    return rows


def tables() -> str:
    sections = [
        "## Vector stores: recall@10 at equal bytes\n",
        "What LanceDB and Qdrant quantize to by themselves, against the best of fewbits in at most "
        "as many bytes. Inner product of unit vectors; lists and beams wide enough to see every "
        "code; nothing is rescored by the float vectors. `±` is the standard error of the "
        f"difference over queries. LanceDB {lancedb.__version__}, Qdrant's engine in this "
        "process.\n",
    ]
    for name, (items, queries) in collections().items():
        truth = search_array(queries, items, K, "ip")[1]
        best = {size: found(spec, items, queries, truth) for size, spec in OURS.items()}
        rows: list[list[Any]] = []
        theirs = [*lance_hits(items, queries, truth), *qdrant_hits(items, queries, truth)]
        for store, size, share in sorted(theirs, key=lambda row: row[1]):
            mine = best[max(limit for limit in best if limit <= size)]
            gap = difference(mine["hits"] - share)
            rows.append([f"{size:.0f}", store, f"{share.mean():.3f}", *cells(mine), gap])
        heads = ["bytes", "store", "recall@10", "fewbits", "recall@10", "difference"]
        sections += [f"**{name}** ({len(items)} items, {len(queries)} queries)\n"]
        sections += [table(heads, rows), ""]
        heads = ["exported to", "method", "bytes of bits or numbers", "recall@10"]
        sections += ["In the stores:\n", table(heads, inside(items, queries, truth)), ""]
    return "\n".join(sections)


if __name__ == "__main__":
    print(tables())
