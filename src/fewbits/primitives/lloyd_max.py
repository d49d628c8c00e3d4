"""Lloyd–Max levels: the scalar quantizer of least squared error for a normal variable."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """The 2^bits levels for N(0, 1), rising, float32; bits from 1 to 8.

    Each level is the mean of the values nearest to it. Newton's method finds the positive half;
    the other is its mirror image.
    """
    count = 2**bits
    # The best levels are about as dense as the cube root of the density, which is N(0, 3).
    dense = NormalDist(sigma=math.sqrt(3))
    levels = np.array([dense.inv_cdf((i + 0.5) / count) for i in range(count // 2, count)])
    for _ in range(50):
        means, low_slopes, high_slopes = _cell_means((levels[:-1] + levels[1:]) / 2)
        # An edge lies half way between two levels, and moves half as far as either.
        low, high = low_slopes / 2, high_slopes / 2
        slope = np.diag(low + high - 1) + np.diag(low[1:], -1) + np.diag(high[:-1], 1)
        slope[0, 0] -= low[0]  # the lowest edge, 0, stays
        step = np.linalg.solve(slope, levels - means)
        levels = levels + step
        if np.abs(step).max() < 1e-12:
            break
    both = np.concatenate([-levels[::-1], levels]).astype(np.float32)
    both.flags.writeable = False
    return both


def _cell_means(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of N(0, 1) in the cells that positive edges cut (0, ∞) into, and by how much each
    moves with the lower and with the upper edge of its cell."""
    edges = np.concatenate([[0.0], edges])
    density = np.append(np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi), 0.0)
    above = np.append([0.5 * math.erfc(edge / math.sqrt(2)) for edge in edges], 0.0)
    inside = above[:-1] - above[1:]
    means = (density[:-1] - density[1:]) / inside
    low_slopes = density[:-1] * (means - edges) / inside
    upper = np.append(edges[1:], 0.0)  # the last edge is infinite, where the density is 0
    high_slopes = density[1:] * (upper - means) / inside
    return means, low_slopes, high_slopes


def nearest_level(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index (uint8) of the nearest of at most 256 rising levels, for each value."""
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, values).astype(np.uint8)
