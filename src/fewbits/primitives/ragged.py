"""Ragged sets: one set of vectors per item, as a flat array and offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """n sets of d-dimensional vectors.

    Attributes
    ----------
    flat : (t, d) array, all vectors of all sets one after another.
    offsets : (n + 1,) int64; set i is ``flat[offsets[i]:offsets[i + 1]]``. Every set has at
        least one vector.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        offsets = np.asarray(self.offsets, dtype=np.int64)
        object.__setattr__(self, "offsets", offsets)
        if self.flat.ndim != 2:
            raise ValueError(f"flat must have 2 axes, not {self.flat.ndim}")
        if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0:
            raise ValueError("offsets must be one-dimensional and start at 0")
        if offsets[-1] != len(self.flat):
            raise ValueError(
                f"offsets end at {offsets[-1]}, but there are {len(self.flat)} vectors"
            )
        if np.any(np.diff(offsets) < 1):
            empty = int(np.argmax(np.diff(offsets) < 1))
            raise ValueError(f"set {empty} is empty: every set needs at least one vector")

    @classmethod
    def from_sets(cls, sets: Sequence[np.ndarray]) -> Ragged:
        """Join a list of (t_i, d) arrays."""
        lengths = np.fromiter((len(s) for s in sets), dtype=np.int64, count=len(sets))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return cls(np.concatenate(list(sets)), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.flat[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def __getitem__(self, rows: slice) -> Ragged:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        stop = max(start, stop)
        first, last = self.offsets[start], self.offsets[stop]
        return Ragged(self.flat[first:last], self.offsets[start : stop + 1] - first)

    @property
    def dims(self) -> int:
        return int(self.flat.shape[1])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) number of vectors in each set."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """(t,) the set each vector belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The sets `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.flat[np.repeat(self.offsets[rows], lengths) + within], offsets)

    def with_flat(self, flat: np.ndarray) -> Ragged:
        """The same sets with other vectors."""
        return Ragged(flat, self.offsets)


def join(parts: Sequence[Ragged]) -> Ragged:
    """All sets of all parts, in order."""
    shifts = np.cumsum([0] + [len(p.flat) for p in parts])
    offsets = [p.offsets[1:] + s for p, s in zip(parts, shifts[:-1], strict=True)]
    return Ragged(
        np.concatenate([p.flat for p in parts]),
        np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
    )


def chamfer(queries: Ragged, documents: Ragged, *, block: int = 4096) -> np.ndarray:
    """Chamfer (MaxSim) score of every query set with every document set.

    The score is the sum over the query's vectors of the largest inner product with any vector
    of the document. Cost O(T_q · T_d · d); memory O(T_q · block) beyond the result.

    Returns
    -------
    (n_queries, n_documents) float32.
    """
    scores = np.empty((len(queries), len(documents)), dtype=np.float32)
    flat_queries = np.ascontiguousarray(queries.flat, dtype=np.float32)
    start = 0
    while start < len(documents):
        reach = documents.offsets[start] + block
        stop = int(np.searchsorted(documents.offsets, reach, side="right")) - 1
        stop = min(max(stop, start + 1), len(documents))
        part = documents[start:stop]
        dots = flat_queries @ part.flat.astype(np.float32, copy=False).T
        best = np.maximum.reduceat(dots, part.offsets[:-1], axis=1)
        scores[:, start:stop] = np.add.reduceat(best, queries.offsets[:-1], axis=0)
        start = stop
    return scores
