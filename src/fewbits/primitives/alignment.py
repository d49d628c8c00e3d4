"""Two embeddings of the same items: mapping one onto the other, and how alike they are.

Row i of one table and row i of the other embed the same item. No paper names in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_CELLS = 4_000_000
"""Similarities computed at a time."""
ROUNDING = 1e-12
"""Cosines that differ by less are equal."""


# -- mapping one onto the other ------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """The map x ↦ scale · (x − source) R + target.

    Attributes
    ----------
    rotation : (d_x, d_y) float64; its rows or its columns, whichever are fewer, are orthonormal.
    scale : factor of all lengths, 1 unless it was fitted.
    source, target : (d_x,) and (d_y,) float64, the means; zeros unless they were fitted.
    """

    rotation: np.ndarray
    scale: float
    source: np.ndarray
    target: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, d_y) float32 of (n, d_x) rows. O(n·d_x·d_y)."""
        moved = self.scale * ((x - self.source) @ self.rotation) + self.target
        return np.asarray(moved, dtype=np.float32)


def procrustes(
    x: np.ndarray, y: np.ndarray, *, center: bool = False, scale: bool = False
) -> Alignment:
    """The orthogonal map of `x` that comes closest to `y` (Schönemann 1966).

    Parameters
    ----------
    x, y : (n, d_x) and (n, d_y) float, n ≥ 1. Where the widths differ, the wider space loses the
        directions that the pairs say least about.
    center : take the mean off both sides first, and put that of `y` back.
    scale : fit one factor for all lengths, too.

    Returns
    -------
    `Alignment`. Where the widths are equal, no other of its form has a smaller squared error on
    these pairs. O(n·d_x·d_y), and O(d_x·d_y·min(d_x, d_y)) for the SVD.

    Raises
    ------
    ValueError
        Tables that do not pair up, values that are not finite, or nothing to align.
    """
    x, y = checked_pair(x, y)
    source = x.mean(axis=0) if center else np.zeros(x.shape[1])
    target = y.mean(axis=0) if center else np.zeros(y.shape[1])
    x, y = x - source, y - target
    left, values, right = np.linalg.svd(x.T @ y, full_matrices=False)
    if values[0] == 0:
        raise ValueError("the pairs have no direction in common; give rows that differ")
    rotation = left @ right
    moved = np.square(x @ rotation).sum()
    factor = float(values.sum() / moved) if scale else 1.0
    return Alignment(rotation, factor, source, target)


# -- how alike they are --------------------------------------------------------------------


def linear_cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = False) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414).

    1 where one table is the other one rotated, scaled and shifted.

    Parameters
    ----------
    x, y : (n, d_x) and (n, d_y) float, n ≥ 2.
    debiased : estimate the kernels' alignment without bias (Song et al. 2007), which needs
        n ≥ 4. The plain one is far above 0 for independent tables of few rows.

    Returns
    -------
    From 0 to 1; the debiased one may fall below 0. O(n·d_x·d_y) or O(n²·(d_x + d_y)), whichever
    is less, in time; the products of that shape in memory.

    Raises
    ------
    ValueError
        Tables that do not pair up, too few rows, values that are not finite, or rows that are
        all the same.
    """
    x, y = checked_pair(x, y)
    least = 4 if debiased else 2
    if len(x) < least:
        raise ValueError(f"linear CKA needs at least {least} rows, not {len(x)}")
    x, y = centred(x), centred(y)
    own = kernel_alignment(x, x, debiased) * kernel_alignment(y, y, debiased)
    if not own > 0:
        raise ValueError("these rows are too few for an estimate without bias; give more rows")
    return float(kernel_alignment(x, y, debiased) / np.sqrt(own))


def centred(x: np.ndarray) -> np.ndarray:
    """Rows without their mean, the largest entry at ±1, so that squares stay in range."""
    shifted = x - x.mean(axis=0)
    largest = np.abs(shifted).max()
    if largest <= 1e-13 * np.abs(x).max():  # what rounding leaves of rows that are the same
        raise ValueError("linear CKA is not defined for rows that are all the same")
    return np.asarray(shifted / largest)


def kernel_alignment(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """Inner product of the linear kernels of centred tables; the unbiased one times n(n − 3)."""
    if x.shape[1] * y.shape[1] <= len(x) * (x.shape[1] + y.shape[1]):
        total = np.square(x.T @ y).sum()
    else:
        total = ((x @ x.T) * (y @ y.T)).sum()
    if not debiased:
        return float(total)
    # Without the diagonals, as in Song et al.: the sums of the kernels need no kernel.
    n = len(x)
    diagonals = [np.square(table).sum(axis=1) for table in (x, y)]
    sums = [t @ t.sum(axis=0) - d for t, d in zip((x, y), diagonals, strict=True)]
    total -= diagonals[0] @ diagonals[1]
    total += sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float(total - 2 * (sums[0] @ sums[1]) / (n - 2))


def mean_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Mean cosine of each row of `x` with its counterpart in `y`, both (n, d). O(n·d)."""
    x, y = (unit(table) for table in checked_pair(x, y, same_width=True))
    return float(np.einsum("nd,nd->n", x, y).mean())


def counterpart_mrr(queries: np.ndarray, items: np.ndarray) -> float:
    """Mean reciprocal rank of item i for query i among all items, by cosine.

    Items that are as similar as the right one count half, as if ties were broken by chance:
    where all items are alike, no rank is good. O(n²·d) time, bounded memory.
    """
    queries, items = (unit(table) for table in checked_pair(queries, items, same_width=True))
    total = 0.0
    for start, scores in similarity_blocks(queries, items):
        right = scores[np.arange(len(scores)), start + np.arange(len(scores))][:, None]
        # Equal rows need not have equal scores to the last digit.
        before = (scores > right + ROUNDING).sum(axis=1)
        same = (scores >= right - ROUNDING).sum(axis=1) - before
        total += float((1 / (before + (same + 1) / 2)).sum())
    return total / len(queries)


def neighbour_jaccard(queries: np.ndarray, items: np.ndarray, k: int = 10) -> float:
    """Mean Jaccard index of two sets of k items: the nearest of query i, and those of item i.

    Neighbours are by cosine, item i among its own. O(n²·(d + log k)) time, bounded memory.
    """
    queries, items = (unit(table) for table in checked_pair(queries, items, same_width=True))
    if not 1 <= k <= len(items):
        raise ValueError(f"k={k} must be between 1 and the {len(items)} items")
    blocks = zip(similarity_blocks(queries, items), similarity_blocks(items, items), strict=True)
    total = 0.0
    for (_, asked), (_, own) in blocks:
        nearest = [np.argpartition(-scores, k - 1, axis=1)[:, :k] for scores in (asked, own)]
        joined = np.sort(np.concatenate(nearest, axis=1), axis=1)
        common = (joined[:, 1:] == joined[:, :-1]).sum(axis=1)
        total += float((common / (2 * k - common)).sum())
    return total / len(queries)


def similarity_blocks(queries: np.ndarray, items: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """First row and (b, n) inner products of the queries, block by block."""
    step = max(1, BLOCK_CELLS // len(items))
    for start in range(0, len(queries), step):
        yield start, queries[start : start + step] @ items.T


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length; rows of zeros stay."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(lengths == 0, 1, lengths))


def checked_pair(
    x: np.ndarray, y: np.ndarray, *, same_width: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Both tables as float64, if they pair up."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or 0 in (*x.shape, *y.shape):
        raise ValueError(f"the tables must pair up row by row, not {x.shape} and {y.shape}")
    if same_width and x.shape != y.shape:
        raise ValueError(f"the tables must have one width, not {x.shape[1]} and {y.shape[1]}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the tables must hold finite numbers")
    return x, y
