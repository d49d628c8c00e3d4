"""MUVERA: one long vector per set of vectors, whose inner products approximate Chamfer scores.

Dhulipala, Hadian, Jayaram, Lee, Mirrokni, "MUVERA: Multi-Vector Retrieval via Fixed Dimensional
Encodings", NeurIPS 2024, arXiv 2405.19504.

A late-interaction encoder gives every query and document a set of token vectors, and scores a
pair by the Chamfer (MaxSim) similarity: the sum, over the query's vectors, of the largest inner
product with any vector of the document. Here a random partition cuts the space into buckets;
per bucket a query keeps the sum of its vectors and a document the mean of its own, after a
random projection to few dimensions. Where a document has no vector in a bucket, its nearest one
stands in. All buckets of several independent partitions, one after another, are the encoding.
Search it by inner product (never by cosine), then order the best documents by their exact
Chamfer score with `chamfer_rerank`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NoReturn

import numpy as np

from fewbits.core.checks import check_k, check_ragged
from fewbits.core.codec import Transform, learned
from fewbits.core.errors import FewbitsError
from fewbits.core.search import Matches, rescore_sets, search_array
from fewbits.primitives import sketch
from fewbits.primitives.ragged import Ragged
from fewbits.primitives.rotation import project

MAX_DIMS = 65_536
"""Longest encoding: 256 KiB of float32 per document."""

MAX_SKETCHED_DIMS = 2**24
"""Most dimensions that `final_dims` can be a sketch of."""

BATCH_BYTES = 64 * 2**20
HITS_AT_A_TIME = 2**22
KMEANS_ITERATIONS = 10
HASH, PROJECTION, FINAL = range(3)  # sub-streams of the seed


@dataclass
class MUVERA(Transform):
    """Fixed dimensional encodings: sets of vectors in, one vector per set out.

    Parameters
    ----------
    repetitions : independent partitions R; more of them average out the noise.
    bits : each partition has B = 2^bits buckets (0 to 16 bits).
    projection_dims : width of a bucket, d'. At the width d of the vectors itself there is
        nothing to project.
    projection : ``dense_sign`` (±1/√d' matrix), ``count_sketch`` (each coordinate is added to or
        subtracted from one random slot), or ``identity`` (d' = d; `projection_dims` is unused).
    fill_empty : whether a document's empty buckets take its nearest vector. Queries' never do.
    final_dims : sketch the R·B·d' numbers to this many, or none. The long vector never exists.
    final_projection : ``count_sketch`` or ``dense_sign``; the latter costs R·B·d'·final_dims
        per document.
    partition : ``simhash`` (random hyperplanes; learns nothing) or ``kmeans`` (nearest of B
        centres, fitted anew for each repetition).
    seed : of all random numbers.

    Notes
    -----
    Encodes (n sets, t vectors in all) to float32 (n, R·B·d') or (n, final_dims). Neither the
    order of the vectors in a set nor the other sets matter. Cost O(t·d·R·(bits + d') +
    n·R·B·(d' + bits)); the memory beyond the result does not grow with n.
    An encoding cannot be decoded back to the set.
    """

    repetitions: int = 20
    bits: int = 5
    projection_dims: int = 8
    projection: Literal["dense_sign", "count_sketch", "identity"] = "dense_sign"
    fill_empty: bool = True
    final_dims: int | None = None
    final_projection: Literal["count_sketch", "dense_sign"] = "count_sketch"
    partition: Literal["simhash", "kmeans"] = "simhash"
    seed: int = 0

    name: ClassVar[str] = "muvera"
    takes: ClassVar[str] = "sets"

    centres_: np.ndarray = learned()
    """(R, B, d) float32 for ``kmeans``, else none: (0, B, d)."""

    @property
    def buckets(self) -> int:
        return 1 << self.bits

    def _fit(self, x: Ragged) -> None:
        self._settle_dims()
        self.centres_ = np.empty((0, self.buckets, self.dims_), dtype=np.float32)
        if self.partition == "kmeans":
            self.centres_ = self._fit_centres(x.flat)

    def _fit_centres(self, vectors: np.ndarray) -> np.ndarray:
        """(R, B, d) float32: the centres of every repetition's partition."""
        import faiss

        if len(vectors) < self.buckets:
            raise FewbitsError(
                f"muvera: bits={self.bits} needs {self.buckets} vectors to fit k-means on, but "
                f"there are {len(vectors)}; take fewer bits or partition=simhash"
            )
        centres = np.empty((self.repetitions, self.buckets, self.dims_), dtype=np.float32)
        for repetition in range(self.repetitions):
            number = int(sketch.stream(self.seed, HASH, repetition).random_raw()) % 2**31
            kmeans = faiss.Kmeans(
                self.dims_,
                self.buckets,
                niter=KMEANS_ITERATIONS,
                seed=number,
                min_points_per_centroid=1,
            )
            kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
            centres[repetition] = kmeans.centroids
        return centres

    def _check_state(self) -> None:
        self._settle_dims()
        repetitions = self.repetitions if self.partition == "kmeans" else 0
        shape = (repetitions, self.buckets, self.dims_)
        if self.centres_.shape != shape or self.centres_.dtype != np.float32:
            raise ValueError(f"centres must be float32 of shape {shape}")
        if not np.isfinite(self.centres_).all():
            raise ValueError("centres must be finite")

    # -- hyper-parameters -----------------------------------------------------------------

    def _settle_dims(self) -> None:
        """Check the hyper-parameters, and set the width of a bucket and of an encoding."""
        self._check_choices()
        same = self.projection == "identity" or self.projection_dims == self.dims_
        self._width = self.dims_ if same else self.projection_dims
        dense = self.repetitions * self.buckets * self._width
        made_of = (
            f"muvera: {self.repetitions} repetitions × {self.buckets} buckets × {self._width} = "
            f"{dense:,} dimensions"
        )
        if self.final_dims is None and dense > MAX_DIMS:
            raise FewbitsError(
                f"{made_of}, more than {MAX_DIMS:,}; set final_dims (for example "
                "final_dims=10240), or take fewer bits or repetitions"
            )
        if dense > MAX_SKETCHED_DIMS:
            raise FewbitsError(f"{made_of}, too many even to sketch; take fewer bits")
        if self.final_dims is not None and self.final_dims > dense:
            raise FewbitsError(
                f"{made_of}, fewer than final_dims={self.final_dims}; leave final_dims out"
            )
        self.dims_out_ = self.final_dims or dense

    def _check_choices(self) -> None:
        check_whole("repetitions", self.repetitions, 1, MAX_DIMS)
        check_whole("bits", self.bits, 0, sketch.MAX_BITS)
        check_whole("seed", self.seed, 0, 2**63)
        if self.projection != "identity":
            check_whole("projection_dims", self.projection_dims, 1, self.dims_)
        if self.final_dims is not None:
            check_whole("final_dims", self.final_dims, 1, MAX_DIMS)
        check_choice("projection", self.projection, ("dense_sign", "count_sketch", "identity"))
        check_choice("final_projection", self.final_projection, ("count_sketch", "dense_sign"))
        check_choice("partition", self.partition, ("simhash", "kmeans"))

    @classmethod
    def openings(cls, dims: int) -> list[tuple[str, int]]:
        """The paper's best settings of 640 to 5120 dimensions."""
        width = min(8, dims)
        return [
            (
                f"muvera:repetitions={repetitions},bits={bits},projection_dims={width}",
                repetitions * 2**bits * width,
            )
            for repetitions, bits in ((10, 3), (20, 3), (20, 4), (20, 5))
        ]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        """The paper's best settings, compressed and as they are."""
        pairs = cls.openings(dims)
        names = [name for name, _ in pairs]
        # One byte per 8 dimensions: 256 centroids each, so it takes that many rows to fit.
        packed = [f"{n}+pq:bytes={d // 8}" for n, d in pairs if d % 8 == 0 and rows >= 256]
        return [*packed, *(f"{name}+turboquant" for name in names[1:]), *names]

    # -- encoding -------------------------------------------------------------------------

    def transform(self, x: Ragged) -> np.ndarray:
        """(n, dims_out) float32: the encodings of documents."""
        return self._encodings(x, documents=True)

    def transform_queries(self, queries: Ragged, metric: str = "ip") -> np.ndarray:
        """(q, dims_out) float32: the encodings of queries, to compare by inner product."""
        self.search_metric(metric)
        return self._encodings(queries, documents=False)

    def search_metric(self, metric: str) -> str:
        """Always ``ip``: encodings are compared by their inner product."""
        if metric == "l2":
            raise FewbitsError("muvera compares by inner product; take the metric ip or cosine")
        return "ip"

    def inverse(self, y: np.ndarray) -> NoReturn:
        """Always an error: the sets cannot be had back."""
        raise FewbitsError(
            "muvera cannot be decoded: an encoding does not hold its set of vectors; "
            "keep the vectors themselves for re-ranking"
        )

    def _encodings(self, sets: Ragged, *, documents: bool) -> np.ndarray:
        out = np.zeros((len(sets), self.dims_out_), dtype=np.float32)
        vector_bytes = 4 * self.repetitions * (self._width + self.bits) + 24 * self._width
        if self.partition == "kmeans":
            vector_bytes += 24 * self.buckets
        set_bytes = 24 * self.buckets * self._width
        for part in sketch.batches(sets, BATCH_BYTES // vector_bytes, BATCH_BYTES // set_bytes):
            self._add_encodings(out[part], sketch.in_value_order(sets[part]), documents)
        return out

    def _add_encodings(self, out: np.ndarray, sets: Ragged, documents: bool) -> None:
        """Add the encodings of a batch to `out` (n, dims_out), which is zero."""
        planes, projections = random_matrices(
            self.seed, self.dims_, self.repetitions, self.bits, self.projection, self._width
        )
        dots = project(sets.flat, planes)
        values = sets.flat if projections is None else project(sets.flat, projections)
        for repetition in range(self.repetitions):
            own = values
            if projections is not None:
                own = values[:, repetition * self._width :][:, : self._width]
            if self.partition == "kmeans":
                closeness = closeness_to(self.centres_[repetition], sets.flat)
                ids = closeness.argmax(axis=1)
            else:
                ids = sketch.bucket_ids(dots[:, repetition * self.bits :][:, : self.bits])
            blocks, counts = sketch.sum_by_bucket(own, sets, ids, self.buckets)
            if documents:
                blocks /= np.maximum(counts, 1)[:, :, None]
            if documents and self.fill_empty:
                if self.partition == "kmeans":
                    nearest = nearest_to_centres(closeness, sets)
                else:
                    nearest = sketch.nearest_by_bits(ids, sets, self.buckets)
                empty = counts == 0
                blocks[empty] = own[nearest[empty]]
            self._place(out, blocks.reshape(len(sets), -1).astype(np.float32), repetition)

    def _place(self, out: np.ndarray, blocks: np.ndarray, repetition: int) -> None:
        """Put the (n, B·d') blocks of a repetition where they belong in the encodings."""
        if self.final_dims is None:
            out[:, repetition * blocks.shape[1] :][:, : blocks.shape[1]] = blocks
        elif self.final_projection == "count_sketch":
            sketch.add_count_sketch(out, blocks, sketch.stream(self.seed, FINAL, repetition))
        else:
            sketch.add_sign_projection(out, blocks, self.seed, FINAL, repetition)


def check_whole(name: str, value: object, low: int, high: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (whole and low <= value <= high):  # type: ignore[operator]
        raise FewbitsError(
            f"muvera: {name}={value} is not valid; {name} is a whole number from {low} to {high}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FewbitsError(f"muvera: {name}={value} is not valid; {name} is {' or '.join(choices)}")


# -- parts of an encoding ------------------------------------------------------------------


@lru_cache(maxsize=4)
def random_matrices(
    seed: int, dims: int, repetitions: int, bits: int, projection: str, width: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Hyperplanes (d, R·bits) and inner projections (d, R·d'), all repetitions side by side.

    There is no projection to the full width.
    """
    planes = [
        sketch.hyperplanes(sketch.stream(seed, HASH, repetition), dims, bits)
        for repetition in range(repetitions)
    ]
    if projection == "identity" or width == dims:
        return np.concatenate(planes, axis=1), None
    draw = sketch.sign_matrix if projection == "dense_sign" else sketch.count_sketch_matrix
    projections = [
        draw(sketch.stream(seed, PROJECTION, repetition), dims, width)
        for repetition in range(repetitions)
    ]
    return np.concatenate(planes, axis=1), np.concatenate(projections, axis=1)


def closeness_to(centres: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(t, B): minus half the squared distance of each vector to each centre."""
    squares = np.einsum("td,td->t", x, x)[:, None] + np.einsum("bd,bd->b", centres, centres)
    return np.asarray(x @ centres.T - squares / 2)


def nearest_to_centres(closeness: np.ndarray, sets: Ragged) -> np.ndarray:
    """(n, B): vector of each set that is closest to each centre; ties to the first."""
    best = np.maximum.reduceat(closeness, sets.offsets[:-1], axis=0)
    is_best = closeness == np.repeat(best, sets.lengths, axis=0)
    vectors = np.where(is_best, np.arange(len(closeness))[:, None], len(closeness))
    return np.minimum.reduceat(vectors, sets.offsets[:-1], axis=0)


# -- around the encodings ------------------------------------------------------------------


def theory(epsilon: float, delta: float, tokens: int) -> tuple[int, int]:
    """Hash bits and projection width for which the paper's Theorem 2.1 bounds the error.

    For unit vectors and a single repetition, the normalised score is then within `epsilon` of
    the Chamfer score per query vector, with probability 1 - `delta`. The theorem gives
    O(log(m/δ)/ε) bits and O(log(m/(εδ))/ε²) dimensions; the constants, which it does not
    give, are taken to be 1. In practice far smaller settings with several repetitions do.

    Parameters
    ----------
    tokens : m, the vectors of a query and a document together.

    Raises
    ------
    FewbitsError
        `epsilon` or `delta` outside (0, 1), or fewer than 2 tokens.
    """
    if not (0 < epsilon < 1 and 0 < delta < 1 and tokens >= 2):
        raise FewbitsError(
            f"epsilon={epsilon} and delta={delta} must be between 0 and 1, and tokens={tokens} "
            "at least 2"
        )
    bits = math.log(tokens / delta) / epsilon
    return math.ceil(bits), math.ceil(math.log(tokens / (epsilon * delta)) / epsilon**2)


def normalized_score(scores: np.ndarray, queries: Ragged, repetitions: int) -> np.ndarray:
    """Scores (q, k) of a search as estimates of the mean, not summed, best inner product.

    Divides by the number of repetitions and by the number of vectors of each query.
    """
    return np.asarray(scores / (repetitions * queries.lengths[:, None]), dtype=np.float32)


def ball_carving(query_set: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    """Replace groups of alike query vectors by their sums, for cheaper re-ranking.

    Takes the first vector left, and with it all left whose cosine with it reaches `threshold`,
    until none is left. O(t²·d).

    Parameters
    ----------
    query_set : (t, d) vectors of one query.

    Returns
    -------
    (g, d) float32, g ≤ t.
    """
    query_set = np.asarray(query_set, dtype=np.float32)
    norms = np.linalg.norm(query_set, axis=1)
    alike = query_set @ query_set.T >= threshold * np.outer(norms, norms)
    left = np.ones(len(query_set), dtype=bool)
    groups = []
    while left.any():
        group = left & alike[np.argmax(left)]
        group[np.argmax(left)] = True
        groups.append(query_set[group].sum(axis=0))
        left &= ~group
    return np.stack(groups)


def chamfer_rerank(
    queries: Ragged,
    documents: Ragged,
    candidates: np.ndarray,
    k: int,
    carve: float | None = None,
) -> Matches:
    """Order candidate documents by their exact Chamfer score, and keep the best `k`.

    Cost O(q · N · |Q| · |P| · d) for N candidates; memory beyond the result is bounded.

    Parameters
    ----------
    candidates : (q, N) rows of `documents` for each query; -1 means none and stays last.
    carve : threshold for `ball_carving` of the queries, which makes the score approximate.

    Returns
    -------
    Scores (q, k) float32, best first, and rows (q, k) int64.
    """
    queries, documents = check_ragged(queries), check_ragged(documents)
    candidates = np.asarray(candidates)
    check_candidates(candidates, queries, documents)
    k = check_k(k, candidates.shape[1])
    if carve is not None:
        queries = Ragged.from_sets([ball_carving(query, carve) for query in queries])
    return rescore_sets(queries, candidates, documents.take, k, batch=1)


def check_candidates(candidates: np.ndarray, queries: Ragged, documents: Ragged) -> None:
    if candidates.ndim != 2 or len(candidates) != len(queries) or candidates.dtype.kind not in "iu":
        raise FewbitsError(
            f"candidates must be whole numbers, one row for each of the {len(queries)} queries"
        )
    if queries.dims != documents.dims:
        raise FewbitsError(
            f"queries have {queries.dims} dimensions, but documents have {documents.dims}"
        )
    if candidates.size and not (candidates.min() >= -1 and candidates.max() < len(documents)):
        raise FewbitsError(f"candidates must be rows of the {len(documents)} documents, or -1")


def single_vector_heuristic(
    queries: Ragged, documents: Ragged, n: int, deduplicate: bool = True
) -> np.ndarray:
    """The paper's baseline: candidates from one exact search per query vector.

    A query's list takes the document of the nearest document vector of each of its vectors in
    turn, then of all second nearest ones, and so on. Cost O(T_q · T · d) for T_q query and T
    document vectors, once more for each time the search must go four times deeper.

    Parameters
    ----------
    n : length of the list; at most the number of documents when deduplicating.
    deduplicate : keep only the first mention of a document.

    Returns
    -------
    (q, n) int64 rows of `documents`, -1 where the list is shorter.
    """
    queries, documents = check_ragged(queries), check_ragged(documents)
    if queries.dims != documents.dims:
        raise FewbitsError(
            f"queries have {queries.dims} dimensions, but documents have {documents.dims}"
        )
    n = check_k(n, len(documents) if deduplicate else len(documents.flat))
    owner = documents.owner
    lists = np.full((len(queries), n), -1, dtype=np.int64)
    unfinished = np.arange(len(queries))
    depth = math.ceil(n / int(queries.lengths.min()))
    while len(unfinished):
        depth = min(depth, len(documents.flat))
        todo = queries.take(unfinished)
        for part in sketch.batches(todo, max(HITS_AT_A_TIME // depth, 1), len(todo)):
            _, hits = search_array(todo[part].flat, documents.flat, depth, "ip")
            lists[unfinished[part]] = pooled_lists(todo[part], owner[hits], n, deduplicate)
        if depth == len(documents.flat):
            break
        unfinished = unfinished[lists[unfinished, -1] < 0]
        depth *= 4
    return lists


def pooled_lists(queries: Ragged, hits: np.ndarray, n: int, deduplicate: bool) -> np.ndarray:
    """(q, n) lists from the documents (t, depth) that each query vector hit, nearest first."""
    depth = hits.shape[1]
    owner = np.repeat(queries.owner, depth)
    within = np.arange(len(queries.flat)) - np.repeat(queries.offsets[:-1], queries.lengths)
    position = np.arange(depth) * queries.lengths[queries.owner][:, None] + within[:, None]
    order = np.lexsort((position.ravel(), owner))
    owner, rows = owner[order], hits.ravel()[order]
    if deduplicate:
        pairs = owner * (rows.max() + 1) + rows
        first = np.sort(np.unique(pairs, return_index=True)[1])
        owner, rows = owner[first], rows[first]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    lists = np.full((len(queries), n), -1, dtype=np.int64)
    kept = rank < n
    lists[owner[kept], rank[kept]] = rows[kept]
    return lists
