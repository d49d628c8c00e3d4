"""Anchors, a few rows that stand for the rest: how to choose them, and what is like which.

Every choice is of distinct rows, in an order that means something: the same input and seed give
the same rows in the same order. No paper names in here.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

SIMILARITIES = ("cosine", "euclidean", "inner", "basis")
LEAST_VALUE = 1e-6
"""Singular values below this share of the largest are taken for 0."""
GRID = float(2**26)
"""Unit vectors are rounded to multiples of 1/GRID: products of two are then multiples of 2^-52,
and sums of them up to 1 are exact in float64, in whatever order a library adds them up."""
POLICIES = ("uniform", "farthest", "kmeans", "stratified", "frequent")


def choose_anchors(
    x: np.ndarray,
    count: int,
    policy: str = "uniform",
    *,
    seed: int = 0,
    labels: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """`count` rows of (n, d) float `x`, chosen by one of `POLICIES`.

    Parameters
    ----------
    labels : (n,) class of each row, for ``stratified``.
    counts : (n,) how often each row occurs, for ``frequent``.

    Returns
    -------
    (count,) int64 row numbers, all different.

    Raises
    ------
    ValueError
        An unknown policy, a count that is not between 1 and n, or labels or counts that are
        missing or not one per row.
    """
    if policy == "uniform":
        return uniform(len(x), count, seed)
    if policy == "farthest":
        return farthest(x, count, seed)
    if policy == "kmeans":
        return nearest_to_centres(x, count, seed)
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    given = labels if policy == "stratified" else counts
    if given is None or np.shape(given) != (len(x),):
        what = "labels" if policy == "stratified" else "counts"
        raise ValueError(f"policy {policy} needs {what}, one per row ({len(x)})")
    if policy == "stratified":
        return stratified(given, count, seed)
    return most_frequent(given, count)


def uniform(rows: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` of `rows` row numbers, each as likely as any other. O(rows)."""
    check_count(count, rows)
    return np.random.default_rng(seed).permutation(rows)[:count]


def farthest(x: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """A random row, then again and again the row least similar to all rows chosen so far.

    Similarity is the cosine; a row of zeros has cosine 0 with every row. O(count·n·d).
    """
    check_count(count, len(x))
    directions = unit_directions(x)
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = np.random.default_rng(seed).integers(len(x))
    nearest = np.full(len(x), -np.inf, dtype=np.float32)
    for place in range(1, count):
        last = chosen[place - 1]
        np.maximum(nearest, directions @ directions[last], out=nearest)
        nearest[last] = np.inf  # rows may repeat, row numbers may not
        chosen[place] = nearest.argmin()
    return chosen


def nearest_to_centres(x: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The row nearest to each centre of spherical k-means with `count` centres.

    It starts by k-means++. A row that is taken makes way for the next nearest. 25 rounds of
    O(count·n·d), n at most 256 per centre, and one of all rows.
    """
    check_count(count, len(x))
    faiss: Any = importlib.import_module("faiss")
    directions = unit_directions(x)
    clusters = faiss.Kmeans(
        x.shape[1],
        count,
        niter=25,
        seed=seed + 1,
        spherical=True,
        min_points_per_centroid=1,  # few rows are fine; do not warn
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
    )
    clusters.train(directions)
    free = np.zeros(len(x), dtype=np.float32)
    chosen = np.empty(count, dtype=np.int64)
    for place, centre in enumerate(clusters.centroids):
        chosen[place] = (directions @ centre + free).argmax()
        free[chosen[place]] = -np.inf
    return chosen


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Rows in proportion to their classes, and one of every class before the second of any.

    Within a class every row is as likely as any other. O(n log n).
    """
    labels = np.asarray(labels)
    check_count(count, len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    classes = np.unique(labels[order], return_inverse=True)[1]
    by_class = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes)
    starts = np.cumsum(sizes) - sizes
    share = np.empty(len(labels))
    # The share of its class that comes before a row: 0 for the first of each class.
    share[by_class] = np.arange(len(labels)) - np.repeat(starts, sizes)
    share /= sizes[classes]
    return order[np.argsort(share, kind="stable")[:count]]


def most_frequent(counts: np.ndarray, count: int) -> np.ndarray:
    """The rows of the largest counts, by falling count; the earlier row first. O(n log n)."""
    counts = np.asarray(counts)
    check_count(count, len(counts))
    return np.argsort(-counts.astype(np.float64), kind="stable")[:count]


def check_count(count: int, rows: int) -> None:
    if not 1 <= count <= rows:
        raise ValueError(f"cannot choose {count} of {rows} rows")


def unit_directions(x: np.ndarray) -> np.ndarray:
    """(n, d) float32 rows of unit length; rows of zeros stay."""
    return np.ascontiguousarray(over(x, lengths_of(x)))


# -- similarities to them, which depend on nothing but their two rows ----------------------


def lengths_of(x: np.ndarray) -> np.ndarray:
    """(n, 1) float64 lengths of the rows."""
    wide = np.ascontiguousarray(x, dtype=np.float64)
    return np.sqrt(np.add.reduce(wide * wide, axis=1, keepdims=True))


def over(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, m) float32 rows over their (n, 1) lengths, where these are not 0."""
    return np.asarray(x / np.where(lengths == 0, 1, lengths), dtype=np.float32)


def directions_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) float64 unit rows, rounded to multiples of 1/GRID, and (n, 1) lengths.

    Rows of zeros stay.
    """
    lengths = lengths_of(x)
    unit = np.rint(x * (GRID / np.where(lengths == 0, 1, lengths)))
    return np.asarray(unit / GRID), lengths


class StableMap:
    """The linear map by a (k, d) matrix, of which no row depends on the rows beside it.

    A matrix product adds up in an order that depends on the shape of the whole; here every sum
    is exact. Calling it maps (n, d) to (n, k) float64. O(n·k·d).
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        self.directions, self.lengths = directions_of(matrix)

    def __call__(self, x: np.ndarray, *, cosine: bool = False) -> np.ndarray:
        """With `cosine`, of the rows' directions."""
        directions, lengths = directions_of(x)
        products = (directions @ self.directions.T) * self.lengths.T
        return products if cosine else products * lengths


class AnchorSimilarities:
    """Rows to similarities with anchors, averaged by class where there are classes.

    Calling it maps (n, d) rows to (n, k) float64, k anchors or classes. The code of a row is the
    same, bit for bit, whatever other rows come with it. O(n·K·d).

    Parameters
    ----------
    similarity : ``cosine``; ``euclidean``, the negative distance; ``inner``, the inner product
        over √d; ``basis``, the coefficients of the least squares solution on the anchors.
    anchors : (K, d) float64, without the mean.
    mean : (d,) float64, taken off the rows first.
    classes : (K,) whole numbers from 0 without gaps, or (0,).

    Attributes
    ----------
    linear : (k, d) float64, the map from rows (cosine: from directions) to similarities. For
        distances it is what their squares are a linear function of (`to_linear`).
    origin : (d,) float64, added to what the inverse of `linear` gives.
    anchor_directions : (K, d) float64.
    """

    def __init__(
        self, similarity: str, anchors: np.ndarray, mean: np.ndarray, classes: np.ndarray
    ) -> None:
        self.similarity, self.anchors, self.mean, self.classes = similarity, anchors, mean, classes
        self.anchor_directions = directions_of(anchors)[0]
        self.middle = anchors.mean(axis=0)
        self.origin = mean
        if similarity == "euclidean":
            self.linear, self.origin = anchors - self.middle, mean + self.middle
            return
        if similarity == "cosine":
            matrix = self.anchor_directions
        elif similarity == "inner":
            matrix = anchors / np.sqrt(anchors.shape[1])
        else:
            matrix = np.linalg.pinv(anchors, rcond=LEAST_VALUE).T
        self.linear = self._pooled(matrix.T).T if len(classes) else matrix
        self.map = StableMap(self.linear)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        centred = x - self.mean
        if self.similarity == "euclidean":
            return self._distances(centred)
        if self.similarity == "cosine":
            return np.clip(self.map(centred, cosine=True), -1, 1)
        return self.map(centred)

    def _distances(self, x: np.ndarray) -> np.ndarray:
        # One anchor at a time: the square of a sum would lose the digits of small distances.
        found = np.concatenate([-lengths_of(x - anchor) for anchor in self.anchors], axis=1)
        return self._pooled(found) if len(self.classes) else found

    def _pooled(self, values: np.ndarray) -> np.ndarray:
        """(n, K) to the (n, classes) means over the anchors of each class."""
        groups = [np.flatnonzero(self.classes == c) for c in range(int(self.classes.max()) + 1)]
        means = [np.take(values, group, axis=1).mean(axis=1, keepdims=True) for group in groups]
        return np.concatenate(means, axis=1)

    def to_linear(self, r: np.ndarray) -> np.ndarray:
        """What `linear` would have made of the rows (from their origin), from similarities."""
        if self.similarity != "euclidean":
            return r
        # |x − a|² = |x|² − 2⟨x, a⟩ + |a|², and around the middle the mean of ⟨x, a⟩ is 0.
        squares = np.square(r, dtype=np.float64)
        of_anchors = np.square(self.linear).sum(axis=1)
        halves = (of_anchors - squares) / 2
        return halves - halves.mean(axis=1, keepdims=True)
