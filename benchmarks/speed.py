"""Search and encoding speed at 200,000 × 384, against faiss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from tables import table

from fewbits.core.catalogue import find
from fewbits.core.codec import Codec, from_spec
from fewbits.core.examples import python_docs

ROWS, QUERIES, K, ROUNDS = 200_000, 256, 10, 5


def collection() -> np.ndarray:
    """The example's vectors again and again, with noise so that no two are equal."""
    vectors = python_docs().vectors
    rng = np.random.default_rng(0)
    rows = vectors[rng.integers(0, len(vectors), ROWS)]
    rows = rows + rng.standard_normal(rows.shape, dtype=np.float32) * 0.02
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float, float]:
    """Median seconds of both, run in turn, and the median of their ratios second / first."""
    first(), second()
    pairs = []
    for _ in range(ROUNDS):
        times = []
        for call in (first, second):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        pairs.append(times)
    ours, peers = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(ours), statistics.median(peers), ratio


def binary_flat(codes: np.ndarray) -> Callable[[np.ndarray], Any]:
    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    return lambda queries: index.search(queries, K)


def fast_scan(x: np.ndarray, size: int) -> Callable[[np.ndarray], Any]:
    """faiss's fast-scan PQ at `size` bytes: 2·size groups of 4 bits."""
    index = faiss.IndexPQFastScan(x.shape[1], 2 * size, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(x[:20_000])
    index.add(x)
    return lambda queries: index.search(queries, K)


def search_table(x: np.ndarray) -> str:
    faiss.omp_set_num_threads(1)
    queries = x[:QUERIES] + np.float32(0.01)
    peers = {
        "IndexBinaryFlat": (
            binary_flat(np.packbits(x > 0, axis=1)),
            np.packbits(queries > 0, axis=1),
        ),
        "IndexPQFastScan": (fast_scan(x, 48), queries),
    }
    specs = ["sign", "additive-bits:bytes=48"]
    if find("bebr").status == "available":
        specs += [
            "bebr:bits=1,dims=384,scoring=symmetric",
            "bebr:bits=2,dims=192,scoring=symmetric",
            "bebr:bits=4,dims=96,scoring=symmetric",
        ]
    rows = []
    for spec in specs:
        codec = from_spec(spec).fit(x[:10_000])
        code = codec.encode(x)
        searcher = codec.searcher(code, "cosine")
        for name, (search, asked) in peers.items():
            ours, peer, ratio = in_turn(
                lambda searcher=searcher: searcher.search(queries, K),
                lambda search=search, asked=asked: search(asked),
            )
            rows.append(
                [
                    f"`{spec}`",
                    f"{code.bytes_per_item:g}",
                    f"{QUERIES / ours:,.0f}",
                    name,
                    f"{QUERIES / peer:,.0f}",
                    f"{ratio:.2f}",
                ]
            )
    heads = ["fewbits", "bytes", "queries/s", "faiss, 48 bytes", "queries/s", "ratio"]
    return table(heads, rows)


def encode_table(x: np.ndarray) -> str:
    faiss.omp_set_num_threads(2)
    product = faiss.IndexPQ(x.shape[1], 48, 8)
    product.train(x[:20_000])
    specs = [
        "pca-rag:dims=96",
        "pca-rag:dims=96+int8",
        "turboquant:bits=2",
        "additive-bits:bytes=24",
    ]
    if find("bebr").status == "available":
        specs += ["bebr:bits=2", "bebr:bits=2,dims=192"]
    part, rows = x[:50_000], []
    for spec in specs:
        codec: Codec = from_spec(spec).fit(x[:10_000])
        ours, peer, ratio = in_turn(
            lambda codec=codec: codec.encode(part), lambda: product.sa_encode(part)
        )
        rows.append(
            [f"`{spec}`", f"{len(part) / ours:,.0f}", f"{len(part) / peer:,.0f}", f"{ratio:.2f}"]
        )
    return table(["fewbits", "vectors/s", "faiss PQ48 vectors/s", "ratio"], rows)


def tables() -> str:
    x = collection()
    return "\n".join(
        [
            f"## Speed: {ROWS:,} × {x.shape[1]}\n",
            f"Search for the best {K}, {QUERIES} queries at a time, one thread:\n",
            search_table(x),
            "\nEncoding, two threads:\n",
            encode_table(x),
        ]
    )
