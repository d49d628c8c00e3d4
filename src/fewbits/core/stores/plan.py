"""What every kind of store is given to write and to search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fewbits.core.search import Matches, merge, search_array
from fewbits.core.stored import FaissForm, Stored
from fewbits.primitives.hamming import hamming_search


@dataclass(frozen=True)
class Plan:
    """A collection in the form in which one kind of store holds it.

    Attributes
    ----------
    form : what the rows are, and how they are compared.
    kind : of the codes themselves, where the store has to hold them as floats.
    faiss : the index to fill, where the store is faiss.
    rows : number of items.
    about : what the store should remember of where its rows come from.
    blocks : all rows in order, in blocks of bounded size.
    """

    form: Stored
    kind: str
    faiss: FaissForm | None
    rows: int
    about: dict[str, str]
    blocks: Callable[[], Iterator[np.ndarray]]


def search_blocks(
    blocks: Iterable[np.ndarray], queries: np.ndarray, k: int, metric: str
) -> Matches:
    """Exact best `k` rows over a stream of blocks as a file holds them."""
    best: Matches | None = None
    first_row = 0
    for block in blocks:
        here = min(k, len(block))
        if metric == "hamming":
            distances, rows = hamming_search(queries, block, here)
            found = -distances.astype(np.float32), rows
        else:
            rows_here = np.asarray(block, dtype=np.float32)
            if metric == "cosine":
                lengths = np.linalg.norm(rows_here, axis=1, keepdims=True)
                rows_here = rows_here / np.maximum(lengths, 1e-12)
            found = search_array(queries, rows_here, here, metric)
        best = merge(best, found, first_row, k)
        first_row += len(block)
    assert best is not None
    return best
