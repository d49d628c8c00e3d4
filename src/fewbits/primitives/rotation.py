"""Random rotations, and products with them that do not depend on the batch."""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 4096


def random_rotation(dims: int, seed: int) -> np.ndarray:
    """A (dims, dims) float32 orthogonal matrix, uniform over all of them. O(dims³)."""
    gaussian = np.random.default_rng(seed).standard_normal((dims, dims))
    q, r = np.linalg.qr(gaussian)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def project(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, m) float32: the rows of `x` (n, d) times `matrix` (d, m). O(n·d·m).

    A row comes out the same alone and among others. BLAS rounds sums of float32 differently for
    different numbers of rows, so sums are in float64 here, whose rounding float32 does not show.
    """
    wide = matrix.astype(np.float64)
    out = np.empty((len(x), matrix.shape[1]), dtype=np.float32)
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        out[rows] = x[rows].astype(np.float64) @ wide
    return out
