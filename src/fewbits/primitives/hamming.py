"""Packed bits: Hamming distances, exact search, votes of neighbours, and codes that repeat.

Rows are (n, w) uint8, eight bits a byte, as `bits.pack` makes them. Bits that fill up the last
byte are 0 in every row, so they change no distance. No paper names in here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK_BYTES = 64 * 2**20
"""Rows copied into an index at a time; they may be mapped from a file that is larger."""
BLOCK_CELLS = 4_000_000
"""Distances held at a time where only a summary of them is kept."""


def hamming_search(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest of `rows` (n, w) for each of `queries` (q, w), exactly.

    Returns
    -------
    Distances (q, k) int32, rising, and row numbers (q, k) int64; of rows equally far away the
    earlier ones. O(q·n·w) by faiss's IndexBinaryFlat, memory O(q·k) and one block of the rows.

    Raises
    ------
    ValueError
        Not packed rows of one width, or k beyond the rows.
    """
    queries, rows = checked(queries), checked(rows)
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(f"codes of {queries.shape[1]} and {rows.shape[1]} bytes do not compare")
    if not 1 <= k <= len(rows):
        raise ValueError(f"k={k} must be between 1 and the {len(rows)} rows")
    faiss: Any = importlib.import_module("faiss")  # its stubs miss the binary indexes
    found = np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)
    step = max(1, BLOCK_BYTES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step])
        index = faiss.IndexBinaryFlat(8 * rows.shape[1])
        index.add(block)
        near, which = index.search(np.ascontiguousarray(queries), min(k, len(block)))
        distances = np.concatenate([found[0], near], axis=1)
        numbers = np.concatenate([found[1], which + start], axis=1)
        best = np.lexsort((numbers, distances), axis=1)[:, :k]
        found = np.take_along_axis(distances, best, 1), np.take_along_axis(numbers, best, 1)
    return found


def pairwise_hamming(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """(n, m) int32: bits in which each row of `a` differs from each of `b` (of `a` itself).

    O(n·m·w).

    Raises
    ------
    ValueError
        Not packed rows of one width.
    """
    a, b = checked(a), checked(a if b is None else b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"codes of {a.shape[1]} and {b.shape[1]} bytes do not compare")
    faiss: Any = importlib.import_module("faiss")
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    distances = np.empty((len(a), len(b)), dtype=np.int32)
    pointers = [faiss.swig_ptr(array) for array in (a, b, distances)]
    faiss.hammings(*pointers[:2], len(a), len(b), a.shape[1], pointers[2])
    return distances


def class_histograms(packed: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs of rows differ in 0, 1, 2, … bits: of one class, and of two classes.

    Returns
    -------
    Two (8·w + 1,) int64 arrays; every pair of different rows is counted once. O(n²·w), bounded
    memory.
    """
    labels = checked_labels(packed, labels)
    within = np.zeros(8 * packed.shape[1] + 1, dtype=np.int64)
    between = np.zeros_like(within)
    for start, distances in distance_blocks(packed):
        stop = start + len(distances)
        later = np.arange(len(packed)) > np.arange(start, stop)[:, None]
        same = labels[start:stop, None] == labels
        for counts, chosen in ((within, later & same), (between, later & ~same)):
            counts += np.bincount(distances[chosen], minlength=len(counts))
    return within, between


def distance_blocks(packed: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """First row and (b, n) distances to all rows, block by block."""
    step = max(1, BLOCK_CELLS // len(packed))
    for start in range(0, len(packed), step):
        yield start, pairwise_hamming(packed[start : start + step], packed)


def neighbour_vote(
    rows: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int = 9
) -> np.ndarray:
    """(q,) label that most of the `k` nearest rows have; of equally many, the smallest.

    `labels` are (n,), one for each of `rows`. O(q·n·w + q·k·classes).
    """
    labels = checked_labels(rows, labels)
    return vote(labels, hamming_search(queries, rows, k)[1])


def vote(labels: np.ndarray, near: np.ndarray) -> np.ndarray:
    """(q,) label that most of the rows `near` (q, k) have; of equally many, the smallest."""
    classes, numbers = np.unique(labels, return_inverse=True)
    places = np.arange(len(near))[:, None] * len(classes) + numbers[near]
    votes = np.bincount(places.ravel(), minlength=len(near) * len(classes))
    return np.asarray(classes[votes.reshape(len(near), -1).argmax(axis=1)])


def unique_codes(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows (u, w), in byte order, and which of them each row is, (n,) int64.

    O(n·w·log n).
    """
    rows = np.ascontiguousarray(checked(packed))
    whole = rows.view(np.dtype((np.void, rows.shape[1])))[:, 0]
    _, first, which = np.unique(whole, return_index=True, return_inverse=True)
    return rows[first], which


def redundancy_ratio(packed: np.ndarray) -> float:
    """(rows − different rows) / rows: 0 where every row has a code of its own.

    It grows with the number of rows, as birthdays do: name that number beside it.
    """
    return (len(packed) - len(unique_codes(packed)[0])) / len(packed)


def checked(packed: np.ndarray) -> np.ndarray:
    """`packed`, if it is a table of bytes with a row and a column at least."""
    if packed.ndim != 2 or packed.dtype != np.uint8 or 0 in packed.shape:
        raise ValueError(
            f"packed codes are (n, w) uint8 with n, w ≥ 1, not {packed.dtype} {packed.shape}"
        )
    return packed


def checked_labels(packed: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`labels` as an array, if there is one for each row of `packed`."""
    labels = np.asarray(labels)
    if labels.shape != (len(checked(packed)),):
        raise ValueError(f"{len(packed)} codes need as many labels, not {labels.shape}")
    return labels
