"""PCA-RAG's claim: 110 of 3,072 dimensions make a much smaller, much faster index that still
finds nearly as much.

The task is to find the passage of Python's documentation that a summary line was taken from. The
passages have two kinds of vectors: hashed counts of character n-grams, as wide as the embeddings
of the paper, and the sentence embeddings that come with the example.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.checks import unit_rows
from fewbits.core.codec import from_spec
from fewbits.core.encode import encode
from fewbits.core.examples import Example, python_docs
from fewbits.core.reproduction import Reproduction
from fewbits.core.search import search_array
from fewbits.primitives.retrieval import hit_rate, mean_reciprocal_rank
from fewbits.vectors.pca_rag import PCARAG

SMALLER, FASTER, HITS_LOST, ERRORS = 27.9, 10.0, 0.10, 2.0
CLAIM = (
    f"kept to 110 of 3,072 dimensions, vectors take at least {SMALLER} times fewer bytes and a "
    f"flat search on one thread is at least {FASTER:g} times faster; at most "
    f"{100 * HITS_LOST:g} in 100 queries lose their answer from the first 10, and recall@10 is "
    f"above that of truncation and of random projection to 110 dimensions by {ERRORS:g} standard "
    "errors of the difference or more"
)
CUTS = (1, 10, 100)
RESAMPLES = 200


@dataclass(frozen=True)
class Size:
    """How much is run: every `step`-th passage, and the dimensions to begin and end with."""

    step: int
    buckets: int
    """Width of the hashed vectors, d."""
    dims: int
    """Components of the claim, k."""
    grid: tuple[int, ...]
    """Further numbers of components."""
    timed_rows: int
    """Rows of the flat search that is timed: the passages over and over."""
    timed_queries: int
    specs: tuple[str, ...]
    """Codecs to show at the bytes of k float32, beside those of half, a quarter and an eighth."""


EQUAL_BYTES = (
    "pq:bytes={bytes}",
    "pca-rag:dims={halves},dtype=float16",
    "pca-rag:dims={bytes}+int8",
    "pca-rag:dims={nibbles}+turboquant:bits=4",
    "int8",
    "sign",
)
SIZES = {
    "quick": Size(4, 512, 18, (8, 64), 2_000, 5, EQUAL_BYTES),
    "small": Size(
        step=1,
        buckets=3072,
        dims=110,
        grid=(8, 16, 32, 64, 128, 256),
        timed_rows=100_000,
        timed_queries=15,
        specs=(*EQUAL_BYTES, "opq:bytes={bytes},dims={nibbles}"),
    ),
}
SENTENCE_DIMS = 32
"""Components of the sentence embeddings whose bytes the other codecs get there."""


@dataclass(frozen=True)
class Task:
    """Unit vectors, the right answer to each query, and the best matches in the full space."""

    name: str
    x: np.ndarray
    queries: np.ndarray
    answers: np.ndarray
    """(q,) row of the passage each query was taken from."""
    early: np.ndarray
    """(n,) whether the name of the passage begins with a to m."""

    @property
    def truth(self) -> np.ndarray:
        """(q, 100) rows by exact cosine."""
        return search_array(self.queries, self.x, max(CUTS), "ip")[1]

    def later_half(self) -> Task:
        """The task among the passages n to z alone."""
        place = np.cumsum(~self.early) - 1
        asked = ~self.early[self.answers]
        answers = place[self.answers[asked]]
        later = self.early[~self.early]
        return Task(self.name, self.x[~self.early], self.queries[asked], answers, later)


def run(size: str = "small") -> Reproduction:
    """Run the claim on Python's documentation.

    Parameters
    ----------
    size : ``small``: all 3,988 passages, d = 3,072, minutes and 2 GB of memory. ``quick``: a
        quarter of them, d = 512 cut to 18, without OPQ, seconds.
    """
    plan = SIZES[size]
    example = every(python_docs(), plan.step)
    hashed, sentences = hashed_task(example, plan.buckets), sentence_task(example)
    table = table_of(hashed, plan.dims, plan)
    table += table_of(sentences, SENTENCE_DIMS, plan)
    figures = headline(hashed, plan, table) | out_of_domain(hashed, plan.dims, "")
    figures |= out_of_domain(sentences, SENTENCE_DIMS, ", sentence embeddings")
    rivals = baselines(table, hashed.name)
    met = conditions(figures)
    failed = [name for name, is_met in met.items() if not is_met]
    data = (
        f"{len(hashed.x)} passages of Python's documentation, {len(hashed.queries)} queries; "
        f"hashed character 3- to 5-grams, d = {plan.buckets} cut to {plan.dims}; "
        f"sentence embeddings (all-MiniLM-L6-v2), d = {sentences.x.shape[1]}"
    )
    reason = f"not met: {'; '.join(failed)}" if failed else ""
    details = [
        {what: value for what, value in row.items() if what != "recall per query"} for row in table
    ]
    return Reproduction("pca-rag", CLAIM, figures, rivals, not failed, reason, data, 0.0, details)


# -- the tasks -----------------------------------------------------------------------------


def every(example: Example, step: int) -> Example:
    """Every `step`-th passage, and the queries that one of these answers."""
    kept = np.isin(example.answers, np.arange(0, len(example.ids), step))
    return Example(
        name=example.name,
        vectors=example.vectors[::step],
        ids=example.ids[::step],
        texts=example.texts[::step],
        queries=example.queries[kept],
        query_texts=[text for text, keep in zip(example.query_texts, kept, strict=True) if keep],
        answers=example.answers[kept] // step,
    )


def early_names(example: Example) -> np.ndarray:
    return np.array([name[0].lower() <= "m" for name in example.ids])


def sentence_task(example: Example) -> Task:
    x, queries = unit_rows(example.vectors), unit_rows(example.queries)
    return Task("sentence embeddings", x, queries, example.answers, early_names(example))


def hashed_task(example: Example, buckets: int) -> Task:
    """TF-IDF of hashed n-grams; the weights of the n-grams come from the passages alone."""
    counts = hashed_ngrams(example.texts, buckets)
    weights = np.log((1 + len(counts)) / (1 + (counts > 0).sum(axis=0))) + 1
    x, queries = (
        unit_rows((np.log1p(part) * weights).astype(np.float32))
        for part in (counts, hashed_ngrams(example.query_texts, buckets))
    )
    return Task("hashed n-grams", x, queries, example.answers, early_names(example))


def hashed_ngrams(
    texts: Sequence[str], buckets: int, widths: Sequence[int] = (3, 4, 5)
) -> np.ndarray:
    """(n, buckets) counts of the runs of 3, 4 and 5 bytes of each lower-case text.

    A run goes to a bucket by multiplicative hashing of a polynomial in its bytes. O(bytes).
    """
    encoded = [f" {text.lower()} ".encode() for text in texts]
    letters = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in encoded])
    counts = np.zeros(len(texts) * buckets, dtype=np.int64)
    for width in widths:
        starts = len(letters) - width + 1
        number = np.full(starts, width, dtype=np.uint64)
        for place in range(width):
            number = number * np.uint64(257) + letters[place : place + starts]
        mixed = (number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        inside = owner[:starts] == owner[width - 1 :]
        cells = owner[:starts] * buckets + (mixed % np.uint64(buckets)).astype(np.int64)
        counts += np.bincount(cells[inside], minlength=len(counts))
    return counts.reshape(len(texts), buckets)


# -- the methods ---------------------------------------------------------------------------


def table_of(task: Task, dims: int, plan: Size) -> list[dict[str, Any]]:
    """One row per method: `dims` components and everything at their bytes, then more components."""
    rows = [row_of(task, "exact, float32", task.truth, 4 * task.x.shape[1])]
    rows += components(task, dims, plan.grid)
    rows += [projected(task, name, matrix) for name, matrix in projections(task, dims).items()]
    sizes = {"bytes": 4 * dims, "halves": 2 * dims, "nibbles": 8 * dims}
    return rows + [coded(task, spec.format(**sizes)) for spec in plan.specs]


def components(task: Task, dims: int, grid: Sequence[int]) -> list[dict[str, Any]]:
    """`dims` and the numbers in `grid` of one fit, scored both ways."""
    rows = []
    start = time.perf_counter()
    whole = PCARAG(dims=max(dims, *grid)).fit(task.x)
    seconds = time.perf_counter() - start
    for kept in sorted({dims, *grid}):
        for scoring in ("reduced", "reconstruction"):
            codec = whole.truncated(kept)
            codec.scoring = scoring
            code = codec.encode(task.x)
            found = codec.search(code, task.queries, max(CUTS), "cosine")[1]
            row = row_of(task, codec.spec, found, code.bytes_per_item, seconds)
            rows.append({**row, "explained variance": round(codec.explained_variance, 4)})
    return rows


def projections(task: Task, dims: int) -> dict[str, np.ndarray]:
    """The maps to `dims` numbers that are not fitted, as (d, dims) matrices."""
    width = task.x.shape[1]
    gaussian = np.random.default_rng(0).standard_normal((width, dims)).astype(np.float32)
    return {"truncation": np.eye(width, dims, dtype=np.float32), "random projection": gaussian}


def projected(task: Task, name: str, matrix: np.ndarray) -> dict[str, Any]:
    """A projection compared by cosine, centred first or not, whichever is better."""
    rows = []
    for mean in (0, task.x.mean(axis=0)):
        y, asked = ((vectors - mean) @ matrix for vectors in (task.x, task.queries))
        found = search_array(with_length(asked), with_length(y), max(CUTS), "ip")[1]
        rows.append(row_of(task, name, found, 4 * matrix.shape[1]))
    return max(rows, key=lambda row: row["recall@10"])


def with_length(y: np.ndarray) -> np.ndarray:
    """Unit rows; rows of zeros, which a truncated sparse vector may be, stay as they are."""
    return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def coded(task: Task, spec: str) -> dict[str, Any]:
    """A codec by its spec string."""
    start = time.perf_counter()
    codec = from_spec(spec).fit(task.x)
    seconds = time.perf_counter() - start
    code = codec.encode(task.x)
    found = codec.search(code, task.queries, max(CUTS), "cosine")[1]
    return row_of(task, spec, found, code.bytes_per_item, seconds)


# -- the figures ---------------------------------------------------------------------------


def recall_per_query(found: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """(q,) share of the true top k among the found top k."""
    return (found[:, :k, None] == truth[:, None, :k]).any(axis=1).mean(axis=1)


def standard_error(values: np.ndarray) -> float:
    """Spread of the mean of (q,) values over resamples of the queries."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return float(values[picks].mean(axis=1).std())


def row_of(
    task: Task, method: str, found: np.ndarray, size: float, fit_seconds: float = 0.0
) -> dict[str, Any]:
    each = recall_per_query(found, task.truth, 10)
    recalls = {f"recall@{k}": recall_per_query(found, task.truth, k).mean() for k in CUTS}
    return {
        "vectors": task.name,
        "method": method,
        "bytes": round(size, 1),
        **{name: round(float(value), 4) for name, value in recalls.items()},
        "standard error of recall@10": round(standard_error(each), 4),
        "MRR": round(mean_reciprocal_rank(found, task.answers), 4),
        "hit@10": round(hit_rate(found, task.answers, 10), 4),
        "fit seconds": round(fit_seconds, 1),
        "recall per query": each,
    }


def headline(task: Task, plan: Size, table: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the claim: the paper compares in the reduced space."""
    codec = PCARAG(dims=plan.dims, scoring="reduced").fit(task.x)
    rows = {row["method"]: row for row in table if row["vectors"] == task.name}
    ours = rows[codec.spec]
    code = codec.encode(task.x)
    with tempfile.TemporaryDirectory() as folder:
        encode(task.x, Path(folder) / "index.fewbits", method=codec)
        file_bytes = (Path(folder) / "index.fewbits").stat().st_size
    full_ms = search_ms(task.x, task.queries, plan)
    asked = codec.transform_queries(task.queries, "cosine")
    ms = search_ms(codec.transform(task.x), asked, plan)
    figures = {
        "times fewer bytes": task.x.nbytes / code.nbytes,
        "times fewer bytes, codec included": task.x.nbytes / file_bytes,
        "times faster flat search": full_ms / ms,
        "ms per query": ms,
        "ms per query, full": full_ms,
        "hits@10 lost": rows["exact, float32"]["hit@10"] - ours["hit@10"],
        "explained variance": codec.explained_variance,
    }
    for what in ("hit@10", "MRR", *(f"recall@{k}" for k in CUTS), "standard error of recall@10"):
        figures[what] = ours[what]
    for name in ("truncation", "random projection"):
        gained = ours["recall per query"] - rows[name]["recall per query"]
        figures[f"standard errors above {name}"] = gained.mean() / max(standard_error(gained), 1e-9)
    return {name: round(float(value), 4) for name, value in figures.items()}


def search_ms(x: np.ndarray, queries: np.ndarray, plan: Size) -> float:
    """Median milliseconds of a flat search for one query on one thread."""
    import faiss

    rows = np.resize(x, (plan.timed_rows, x.shape[1]))
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        times = []
        for query in queries[: plan.timed_queries + 1]:
            start = time.perf_counter()
            search_array(query[None], rows, 10, "ip")
            times.append(time.perf_counter() - start)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(np.median(times[1:])) * 1000  # the first one warms up


def out_of_domain(task: Task, dims: int, suffix: str) -> dict[str, float]:
    """Passages n to z, by components fitted on themselves and on passages a to m."""
    later = task.later_half()
    figures = {}
    for name, fitted_on in (("the same", later.x), ("other", task.x[task.early])):
        codec = PCARAG(dims=dims, scoring="reduced").fit(fitted_on)
        found = codec.search(codec.encode(later.x), later.queries, max(CUTS), "cosine")[1]
        row = row_of(later, codec.spec, found, 4 * dims)
        for what in ("recall@10", "hit@10"):
            figures[f"{what}, fitted on {name} topics{suffix}"] = row[what]
    return figures


def baselines(table: list[dict[str, Any]], vectors: str) -> dict[str, float]:
    """Bytes, recall and hits of everything that is not plain components."""
    rows = [row for row in table if row["vectors"] == vectors and "explained variance" not in row]
    return {
        f"{what}, {row['method']}": row[what]
        for row in rows
        for what in ("bytes", "recall@10", "hit@10")
    }


def conditions(figures: dict[str, float]) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""
    met = {
        f"{SMALLER} times fewer bytes": figures["times fewer bytes"] >= SMALLER,
        f"{FASTER:g} times faster": figures["times faster flat search"] >= FASTER,
        f"at most {HITS_LOST:g} of hit@10 lost": figures["hits@10 lost"] <= HITS_LOST,
    }
    for name in ("truncation", "random projection"):
        met[f"above {name}"] = figures[f"standard errors above {name}"] >= ERRORS
    return met
