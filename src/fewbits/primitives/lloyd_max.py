"""Lloyd–Max levels: the scalar quantizer of least squared error for a normal variable."""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """The 2^bits levels for N(0, 1), rising, float32.

    Each level is the mean of the values nearest to it; found by iterating to a fixed point.
    """
    count = 2**bits
    positions = (np.arange(count) + 0.5) / count
    levels = np.array([_normal_quantile(p) for p in positions])
    for _ in range(100_000):
        updated = _cell_means((levels[:-1] + levels[1:]) / 2)
        moved = np.abs(updated - levels).max()
        levels = updated
        if moved < 1e-9:
            break
    levels = ((levels - levels[::-1]) / 2).astype(np.float32)
    levels.flags.writeable = False
    return levels


def _cell_means(edges: np.ndarray) -> np.ndarray:
    """Mean of N(0, 1) within each cell between consecutive edges."""
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
    means: np.ndarray = (density[:-1] - density[1:]) / np.diff(below)
    return means


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def nearest_level(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index (uint8) of the nearest of at most 256 rising levels, for each value."""
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, values).astype(np.uint8)
