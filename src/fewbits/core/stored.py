"""In what form a vector store holds codes, and what queries must look like there.

A codec says it by `Codec.stored` and `Codec.faiss_form`; `core.export` writes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fewbits.core.code import Code

Rows = Callable[[Code], np.ndarray]
"""Code of n items → (n, w) array that a store takes."""
Prepare = Callable[[Any], np.ndarray]
"""(q, d) float32 queries, or sets of them, → (q, w) array that is compared with stored rows."""


@dataclass(frozen=True)
class Stored:
    """Rows for a store, compared there so that they rank as `Codec.search` ranks them.

    Attributes
    ----------
    kind : ``floats``; ``integers`` of one byte each; or ``bits``, packed with the first one in the
        lowest bit and compared by their Hamming distance.
    dims : numbers or bits per item.
    dtype : of the rows: float32 or float16, int8 or uint8, and uint8 for bits.
    metric : ``ip``, ``l2``, ``cosine`` or ``hamming``: what to compare by.
    rows : makes them from a code.
    queries : makes queries for them (bits for bits, else float32); None where raw ones will do.
    as_floats : the same for stores that hold float vectors only; None where this is that.
    """

    kind: Literal["floats", "integers", "bits"]
    dims: int
    dtype: str
    metric: str
    rows: Rows
    queries: Prepare | None = None
    as_floats: Stored | None = None

    @property
    def floats(self) -> Stored:
        return self.as_floats or self

    @property
    def width(self) -> int:
        """Numbers in one row: bytes for bits."""
        return -(-self.dims // 8) if self.kind == "bits" else self.dims

    @property
    def bytes_per_item(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize

    def after(self, transform: Prepare) -> Stored:
        """The same rows for queries that have yet to go through `transform`."""
        inner = self.queries
        queries = transform if inner is None else lambda raw: inner(transform(raw))
        as_floats = None if self.as_floats is None else self.as_floats.after(transform)
        return replace(self, queries=queries, as_floats=as_floats)


@dataclass(frozen=True)
class FaissForm:
    """A faiss index for codes as they are.

    Attributes
    ----------
    index : trained and empty.
    codes : (n, code size) uint8 for its ``add_sa_codes``.
    steps : ``faiss.VectorTransform`` that queries go through, first one first.
    queries : what they must go through before that because faiss cannot do it, or None.
    """

    index: Any
    codes: Rows
    steps: Sequence[Any] = field(default=())
    queries: Prepare | None = None

    def after(self, transform: Prepare, steps: Sequence[Any] | None) -> FaissForm:
        """The same for queries that have yet to go through `transform`.

        `steps` are faiss's way to do that, or None where it has none.
        """
        inner = self.queries
        if inner is None and steps is not None:
            return replace(self, steps=[*steps, *self.steps])
        queries = transform if inner is None else lambda raw: inner(transform(raw))
        return replace(self, queries=queries)


def flat_form(stored: Stored) -> FaissForm:
    """An index of the rows as float numbers."""
    import faiss

    floats = stored.floats
    kind = faiss.METRIC_L2 if floats.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.IndexFlat(floats.dims, kind)
    if floats.dtype == "float16":
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(floats.dims, half, kind)

    def codes(code: Code) -> np.ndarray:
        rows = floats.rows(code)
        if floats.metric == "cosine":
            lengths = np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
            rows = rows / np.maximum(lengths, 1e-12)
        return np.ascontiguousarray(rows, dtype=floats.dtype).view(np.uint8)

    return FaissForm(index, codes, queries=floats.queries)


def linear_step(matrix: np.ndarray, bias: np.ndarray | None = None) -> Any:
    """A ``faiss.LinearTransform`` of rows x (n, d) into x @ `matrix` (d, m) + `bias` (m,)."""
    faiss: Any = importlib.import_module("faiss")  # its stubs know one constructor of several
    step = faiss.LinearTransform(*matrix.shape, bias is not None)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix.T, dtype=np.float32).ravel(), step.A)
    if bias is not None:
        faiss.copy_array_to_vector(np.ascontiguousarray(bias, dtype=np.float32), step.b)
    step.is_trained = True
    return step


def padding_steps(dims: int, wanted: int) -> list[Any]:
    """Faiss's way to put zeros behind rows of `dims` numbers until they are `wanted` wide."""
    faiss: Any = importlib.import_module("faiss")
    return [] if dims == wanted else [faiss.RemapDimensionsTransform(dims, wanted, False)]


def grid_form(name: str, values: np.ndarray, bits: int) -> FaissForm:
    """Packed numbers of 1, 2, 4 or 8 bits, searched by inner product as they lie.

    A byte is one of 256 known short vectors, so that this is exactly a product quantizer.

    Parameters
    ----------
    name : of the code's array with (n, ceil(d·bits/8)) uint8.
    values : (d, 2^bits) float32: what each number stands for, dimension by dimension.
    """
    import faiss

    each, dims = 8 // bits, len(values)
    groups = -(-dims // each)
    padded = np.zeros((groups * each, values.shape[1]), dtype=np.float32)
    padded[:dims] = values
    places = np.arange(groups * each).reshape(groups, each)
    digits = np.arange(256)[:, None] >> (bits * np.arange(each)) & (2**bits - 1)
    words = padded[places[:, None, :], digits[None]]  # (groups, 256, each)
    index = faiss.IndexPQ(groups * each, groups, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(words.ravel(), index.pq.centroids)
    index.is_trained = True
    return FaissForm(
        index, lambda code: np.ascontiguousarray(code[name]), padding_steps(dims, groups * each)
    )
