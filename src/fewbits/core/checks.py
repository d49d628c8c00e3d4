"""What every array from a user must pass before anything is done with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged

NUMBERS = ("float16", "float32", "float64", "int8", "uint8")
SEED_LIMIT = 2**31 - 1
LARGEST = 1e15
"""Squares of larger values, summed over a vector, could leave the range of float32."""


def as_array(x: Any, what: str = "the input") -> np.ndarray:
    """`x` as NumPy sees it: array-likes and torch tensors on the CPU are taken as they are.

    Raises
    ------
    FewbitsError
        Rows of different widths, or a tensor that NumPy cannot read.
    """
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise FewbitsError(f"{what} is no table of vectors of one width: {reason}") from None


def check_vectors(
    x: Any, *, first_row: int = 0, rows: np.ndarray | None = None, what: str = "the input"
) -> np.ndarray:
    """`x` as a C-contiguous float32 (n, d) array with n, d ≥ 1 and finite values.

    Accepts NumPy arrays and array-likes (torch tensors on the CPU) of float16/32/64, int8 or
    uint8. For messages about input that comes in pieces, `rows` are the numbers of its rows,
    or else `first_row` is the number of the first.

    Raises
    ------
    FewbitsError
        Wrong dtype or number of axes, no rows, no columns, NaN, infinity or beyond `LARGEST`.
    """
    x = as_array(x, what)
    if x.ndim != 2:
        raise FewbitsError(
            f"{what} must be a table of vectors with 2 axes (items, dimensions), not {x.ndim}"
        )
    if x.dtype.name not in NUMBERS:
        raise FewbitsError(f"{what} has dtype {x.dtype}; convert it to one of {', '.join(NUMBERS)}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise FewbitsError(f"{what} is empty: {x.shape[0]} rows of {x.shape[1]} dimensions")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    # NaN fails both comparisons.
    if not (x.min() >= -LARGEST and x.max() <= LARGEST):
        bad = ~(np.abs(x) <= LARGEST).all(axis=1)
        row = row_number(int(np.argmax(bad)), first_row, rows)
        raise FewbitsError(
            f"row {row} of {what} has NaN, infinity or a value beyond {LARGEST:g}; "
            "repair, scale or drop such rows first"
        )
    return x


def row_number(place: int, first_row: int, rows: np.ndarray | None) -> int:
    """What to call the row at `place` of a piece of the input."""
    return place + first_row if rows is None else int(rows[place])


def as_ragged(x: Any, what: str = "the input") -> Ragged:
    """`x` as a `Ragged` of at least one set; a list of (t_i, d) arrays is joined.

    Raises
    ------
    FewbitsError
        Not sets of vectors, no sets, an empty set, sets of different widths.
    """
    if not isinstance(x, Ragged):
        if not (isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.ndim == 3)):
            raise FewbitsError(
                f"{what} must be sets of vectors: a list of (t, d) arrays, or flat and offsets"
            )
        sets = [as_array(item, what) for item in x]
        for number, item in enumerate(sets):
            if item.ndim != 2 or item.shape[1] != sets[0].shape[1]:
                raise FewbitsError(
                    f"{what}: set {number} has shape {item.shape}; "
                    "every set must be a (t, d) array with the same d"
                )
            if len(item) == 0:
                raise FewbitsError(f"{what}: set {number} is empty; every set needs a vector")
        x = Ragged.from_sets(sets) if sets else Ragged(np.empty((0, 0)), np.zeros(1))
    if len(x) == 0:
        raise FewbitsError(f"{what} is empty: no sets of vectors")
    return x


def check_ragged(x: Any, *, rows: np.ndarray | None = None, what: str = "the input") -> Ragged:
    """`x` as a `Ragged` of finite float32 vectors; a list of (t_i, d) arrays is joined.

    `rows` are the numbers of its sets in messages, for input that comes in pieces.

    Raises
    ------
    FewbitsError
        Not sets of vectors, an empty set, NaN or infinity.
    """
    x = as_ragged(x, what)
    numbers = x.owner if rows is None else rows[x.owner]
    return x.with_flat(check_vectors(x.flat, rows=numbers, what=what))


def unit_rows(
    x: np.ndarray,
    *,
    first_row: int = 0,
    rows: np.ndarray | None = None,
    what: str = "the input",
) -> np.ndarray:
    """Rows of (n, d) float32 divided by their length, whatever their scale.

    `first_row` and `rows` are those of `check_vectors`.

    Raises
    ------
    FewbitsError
        A row is all zeros, so it has no direction.
    """
    # In float64, because squares leave the range of float32 long before the values do.
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    if not norms.all():
        row = row_number(int(np.argmin(norms != 0)), first_row, rows)
        raise FewbitsError(
            f"row {row} of {what} is all zeros and has no cosine; drop it, or use --metric ip"
        )
    unit = np.empty(x.shape, dtype=np.float32)
    return np.divide(x, norms[:, None], out=unit, casting="same_kind")


def check_k(k: int, rows: int) -> int:
    """`k` if that many matches can be found among `rows`."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise FewbitsError(f"k must be a whole number of at least 1, not {k!r}")
    if k > rows:
        raise FewbitsError(f"k is {k}, but the collection has only {rows} rows; ask for fewer")
    return int(k)


def check_seed(seed: int) -> int:
    """`seed` if it is one: a whole number that every random generator takes."""
    is_whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not (is_whole and 0 <= seed < SEED_LIMIT):
        raise FewbitsError(
            f"seed={seed!r} is not valid; a seed is a whole number from 0 to {SEED_LIMIT - 1}"
        )
    return int(seed)


def numbered_classes(labels: np.ndarray, name: str, advice: str) -> np.ndarray:
    """(n,) int64: the class of each of (n,) labels, by rising label.

    Raises
    ------
    FewbitsError
        No whole numbers or names, or a single class; messages begin with `name`, and the latter
        ends with `advice`.
    """
    if labels.dtype.kind == "O":
        labels = labels.astype(str)
    if labels.dtype.kind not in "biuSU":
        raise FewbitsError(f"{name}labels are whole numbers or names, not {labels.dtype}")
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise FewbitsError(f"{name}all labels are the same; {advice}")
    return np.asarray(numbers, dtype=np.int64)
