"""Targets for codes of classes: rows of ±1 that are far apart in Hamming distance.

No paper names in here.
"""

from __future__ import annotations

import numpy as np

DRAWS = 20
"""How often random rows are drawn anew before the best draw is taken."""
BLOCK_CELLS = 4_000_000
"""Distances held at a time."""


def hash_centers(classes: int, bits: int, seed: int = 0) -> np.ndarray:
    """(classes, bits) int8 of −1 and +1, one row per class.

    Where `bits` is a power of two, these are rows of the Hadamard matrix, which differ in exactly
    half of the bits, then of its negative. Further rows (all of them for other `bits`) are random
    with half of the bits −1, drawn up to `DRAWS` times until any two rows differ in more than a
    quarter of the bits, and in half of them on average; else the draw with the widest least
    distance is taken. O(classes² · bits) for random rows.

    Raises
    ------
    ValueError
        Fewer than 1 class or 2 bits, or more classes than get rows of their own.
    """
    if classes < 1 or bits < 2:
        raise ValueError(f"centres need a class and 2 bits at least, not {classes} and {bits}")
    known = hadamard_rows(bits)[:classes]
    if len(known) == classes:
        return known
    rng = np.random.default_rng(seed)
    best, reached = known, (0.0, 0.0)
    for _ in range(DRAWS):
        drawn = np.concatenate([known, balanced_rows(classes - len(known), bits, rng)])
        found = distances_between(drawn)
        if found > reached:
            best, reached = drawn, found
        if found[0] > bits / 4 and found[1] >= bits / 2:
            return drawn
    if reached[0] == 0:
        raise ValueError(
            f"{classes} classes do not get centres of their own in {bits} bits; take more bits"
        )
    return best


def hadamard_rows(bits: int) -> np.ndarray:
    """(2·bits, bits) int8: the Hadamard matrix and its negative; no rows unless 2^k bits."""
    if bits & (bits - 1):
        return np.empty((0, bits), dtype=np.int8)
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < bits:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.concatenate([matrix, -matrix])


def balanced_rows(rows: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, bits) int8 with bits // 2 entries of −1 at random places."""
    row = np.ones(bits, dtype=np.int8)
    row[: bits // 2] = -1
    return rng.permuted(np.tile(row, (rows, 1)), axis=1)


def distances_between(signs: np.ndarray) -> tuple[float, float]:
    """Least and mean Hamming distance between two of at least two rows of ±1."""
    rows, bits = signs.shape
    values = signs.astype(np.float32)
    least = float(bits)
    step = max(1, BLOCK_CELLS // rows)
    for start in range(0, rows, step):
        distances = (bits - values[start : start + step] @ values.T) / 2
        own = np.arange(len(distances))
        distances[own, own + start] = np.inf
        least = min(least, float(distances.min()))
    # The inner products of all pairs add up to the squared length of the sum of the rows.
    summed = float((values.sum(axis=0, dtype=np.float64) ** 2).sum())
    mean = (bits - (summed - rows * bits) / (rows * (rows - 1))) / 2
    return least, mean
