"""What every array from a user must pass before anything is done with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged

NUMBERS = ("float16", "float32", "float64", "int8", "uint8")


def check_vectors(x: Any, *, first_row: int = 0, what: str = "the input") -> np.ndarray:
    """`x` as a C-contiguous float32 (n, d) array with n, d ≥ 1 and finite values.

    Accepts NumPy arrays and array-likes (torch tensors on the CPU) of float16/32/64, int8 or
    uint8. `first_row` is added to row numbers in messages, for input that comes in blocks.

    Raises
    ------
    FewbitsError
        Wrong dtype or number of axes, no rows, no columns, NaN or infinity.
    """
    x = np.asarray(x)
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
    # A sum is finite unless a value is not, or it overflows; only then look at every value.
    if not np.isfinite(x.sum(dtype=np.float64)):
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad)) + first_row
            raise FewbitsError(
                f"row {row} of {what} has NaN, infinity or a value beyond float32; "
                "repair or drop such rows first"
            )
    return x


def check_ragged(x: Any, *, what: str = "the input") -> Ragged:
    """`x` as a `Ragged` of finite float32 vectors; a list of (t_i, d) arrays is joined.

    Raises
    ------
    FewbitsError
        Not sets of vectors, an empty set, NaN or infinity.
    """
    if not isinstance(x, Ragged):
        if isinstance(x, np.ndarray) and x.ndim == 3:
            x = list(x)
        if not isinstance(x, (list, tuple)) or not x:
            raise FewbitsError(
                f"{what} must be sets of vectors: a list of (t, d) arrays, or flat and offsets"
            )
        try:
            x = Ragged.from_sets([np.asarray(item) for item in x])
        except ValueError as error:
            raise FewbitsError(f"{what}: {error}") from None
    if len(x) == 0:
        raise FewbitsError(f"{what} is empty: no sets of vectors")
    return x.with_flat(check_vectors(x.flat, what=what))


def unit_rows(x: np.ndarray, *, first_row: int = 0, what: str = "the input") -> np.ndarray:
    """Rows of (n, d) divided by their length.

    Raises
    ------
    FewbitsError
        A row is all zeros, so it has no direction.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        row = int(np.argmin(norms[:, 0] != 0)) + first_row
        raise FewbitsError(
            f"row {row} of {what} is all zeros and has no cosine; drop it, or use --metric ip"
        )
    return np.asarray(x / norms, dtype=np.float32)


def check_k(k: int, rows: int) -> int:
    """`k` if that many matches can be found among `rows`."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise FewbitsError(f"k must be a whole number of at least 1, not {k!r}")
    if k > rows:
        raise FewbitsError(f"k is {k}, but the collection has only {rows} rows; ask for fewer")
    return int(k)
