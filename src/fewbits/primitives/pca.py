"""Principal components of rows that may come in blocks. No paper names in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np


class Moments:
    """Count, mean and scatter of all rows seen so far, in float64.

    The scatter is kept around the running mean (the merging rule of Chan, Golub and LeVeque), so
    a mean that is large beside the spread costs no digits. Memory O(d²).

    Attributes
    ----------
    count : number of rows.
    mean : (d,) float64.
    scatter : (d, d) float64, the sum of (x - mean)(x - mean)ᵀ.
    """

    def __init__(self, dims: int) -> None:
        self.count = 0
        self.mean = np.zeros(dims)
        self.scatter = np.zeros((dims, dims))

    def add(self, rows: np.ndarray) -> Self:
        """Take in a block of (b, d) rows, b ≥ 1. O(b·d²), and a float64 copy of the block.

        Raises
        ------
        ValueError
            A block that is empty or not (b, d).
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean) or len(rows) == 0:
            raise ValueError(f"a block must have rows of {len(self.mean)} numbers: {rows.shape}")
        centred = np.array(rows, dtype=np.float64)
        mean = centred.mean(axis=0)
        centred -= mean
        return self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Self:
        """Take in all rows that `other` has seen. O(d²)."""
        return self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> Self:
        total = self.count + count
        if total:
            shift = mean - self.mean
            self.scatter += scatter
            self.scatter += np.outer(shift, shift * (self.count * count / total))
            self.mean += shift * (count / total)
            self.count = total
        return self

    def covariance(self) -> np.ndarray:
        """(d, d) float64 around the mean, divided by n - 1. Needs two rows."""
        return self.scatter / (self.count - 1)

    def second_moment(self) -> np.ndarray:
        """(d, d) float64 around the origin, divided by n. Needs one row."""
        return self.scatter / self.count + np.outer(self.mean, self.mean)


@dataclass(frozen=True)
class PrincipalComponents:
    """All d principal directions, by falling variance.

    Attributes
    ----------
    mean : (d,) float64, what is taken off a row first; zeros when it was not centred.
    components : (d, d) float64, one direction per row, orthonormal.
    variances : (d,) float64, of the rows along each direction, never below 0.
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray

    @property
    def rank(self) -> int:
        """How many directions hold more than the rounding of float32 rows."""
        energy = self.variances.sum() + self.mean @ self.mean
        eigen_noise = self.variances[0] * len(self.variances) * np.finfo(np.float64).eps
        row_noise = energy * float(np.finfo(np.float32).eps) ** 2
        return int((self.variances > max(eigen_noise, row_noise)).sum())

    def dims_for(self, share: float) -> int:
        """The fewest leading directions that hold `share` (0 to 1] of the variance."""
        reached = np.cumsum(self.variances) / self.variances.sum()
        return min(int(np.searchsorted(reached, share - 1e-12)) + 1, len(reached))


def principal_components(moments: Moments, *, center: bool = True) -> PrincipalComponents:
    """The exact principal components of the rows in `moments`. O(d³).

    With ``center=False`` they are those of the second moment: the directions that keep most of
    the rows' squared length, with the mean left in. Signs follow `fix_signs`, so that the same
    rows give the same components everywhere.

    Raises
    ------
    ValueError
        Fewer than two rows.
    """
    if moments.count < 2:
        raise ValueError(f"principal components need at least 2 rows, not {moments.count}")
    matrix = moments.covariance() if center else moments.second_moment()
    variances, vectors = np.linalg.eigh(matrix)
    return PrincipalComponents(
        mean=moments.mean.copy() if center else np.zeros_like(moments.mean),
        components=fix_signs(vectors[:, ::-1].T),
        variances=np.maximum(variances[::-1], 0),
    )


def fix_signs(components: np.ndarray) -> np.ndarray:
    """Each row turned so that its entry of largest magnitude is positive."""
    largest = np.abs(components).argmax(axis=1)[:, None]
    signs = np.where(np.take_along_axis(components, largest, axis=1) < 0, -1, 1)
    return components * signs
