"""Random rotations."""

from __future__ import annotations

import numpy as np


def random_rotation(dims: int, seed: int) -> np.ndarray:
    """A (dims, dims) float32 orthogonal matrix, uniform over all rotations. O(dims³)."""
    gaussian = np.random.default_rng(seed).standard_normal((dims, dims))
    q, r = np.linalg.qr(gaussian)
    return (q * np.sign(np.diag(r))).astype(np.float32)
