"""PCA-RAG: text embeddings cut to their leading principal components.

"PCA-RAG: Principal Component Analysis for Efficient Retrieval-Augmented Generation" (Zanista AI,
2025), arXiv 2504.08386.

Principal components are fitted once on the embeddings of the documents; index and search then
hold k numbers per vector instead of d (110 instead of 3,072 in the paper). The paper compares
queries and documents in the reduced space, both centred by the same mean
(``scoring="reduced"``). By default a query is compared here with the *reconstruction* of a
document, which keeps the order that the asked metric has in the full space: centring would
otherwise turn an inner product or a cosine into another similarity.

The code is a float vector, so another codec can follow it: see `PIPELINES`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fewbits.core.checks import check_vectors, unit_rows
from fewbits.core.code import Code
from fewbits.core.codec import (
    MOST_DIMS,
    State,
    Transform,
    TransformedSearcher,
    blocks_of,
    learned,
)
from fewbits.core.errors import FewbitsError, require
from fewbits.core.search import Matches, Searcher, exact_search, search_array
from fewbits.core.stored import Stored, linear_step
from fewbits.primitives.pca import Moments, PrincipalComponents, principal_components
from fewbits.primitives.retrieval import overlap
from fewbits.primitives.rotation import project

PIPELINES = {
    "pca-f32": "pca-rag:dims={dims}",
    "pca-f16": "pca-rag:dims={dims},dtype=float16",
    "pca-int8": "pca-rag:dims={dims}+int8",
    "pca-4bit": "pca-rag:dims={dims}+turboquant:bits=4",
    "pca-1bit": "pca-rag:dims={dims}+rabitq:bits=1",
    "pca-pq": "pca-rag:dims={dims}+pq:bytes={bytes}",
}
"""Name → spec string to `format` with ``dims`` (and ``bytes``, which only pca-pq uses)."""

DRIFT_LIMIT = 1.5
"""`PCARAG.drift_report` warns when the error grew by more than this factor."""

Rows = Callable[[np.ndarray], np.ndarray]


@dataclass
class PCARAG(Transform):
    """The leading principal components of the rows, (n, d) float32 to (n, k) numbers.

    Parameters
    ----------
    dims : components k to keep. None keeps as many as hold `variance`, but at most d/4.
    variance : share of the variance to hold where `dims` is None. A share of variance is no
        share of recall: `choose_dims` looks for a recall.
    center : take the mean off first, as PCA is defined. Without, the components are those of
        the rows' second moment.
    whiten : divide each component by its standard deviation to this power, 0 (off) to 1. It
        raises the weight of noise.
    normalize : scale rows and queries to unit length first.
    post_normalize : scale the k numbers of a row to unit length; decoding loses that length.
    dtype : of the stored numbers. It has no effect where another codec follows.
    scoring : ``reconstruction`` orders documents as a search among the decoded vectors would, at
        the cost of k multiplications each; ``reduced`` treats queries like documents and compares
        in the reduced space, where cosine means unit length on both sides.

    Notes
    -----
    A code takes k·4 or k·2 bytes per row. Fitting costs O(n·d² + d³) and O(d²) memory, however
    many rows there are (`fit_blocks`); encoding and decoding O(n·d·k); searching O(q·k·(d + n)).
    The same rows give the same components: the entry of largest magnitude is made positive.
    """

    dims: int | None = None
    variance: float = 0.95
    center: bool = True
    whiten: float = 0.0
    normalize: bool = False
    post_normalize: bool = False
    dtype: Literal["float32", "float16"] = "float32"
    scoring: Literal["reconstruction", "reduced"] = "reconstruction"

    name: ClassVar[str] = "pca-rag"
    cubic: ClassVar[bool] = True

    mean_: np.ndarray = learned()
    """(d,) float32; zeros without `center`."""
    components_: np.ndarray = learned()
    """(k, d) float32 with orthonormal rows."""
    variances_: np.ndarray = learned()
    """(d,) float64: variance along each of all d components, by falling size."""
    rows_: np.ndarray = learned()
    """(1,) int64: number of rows it was fitted on."""

    # -- fitting ----------------------------------------------------------------------------

    def _fit(self, x: np.ndarray) -> None:
        self._check_parameters(self.dims_)
        self._learn(blocks_of(x))

    def fit_blocks(self, blocks: Iterable[Any]) -> Self:
        """Fit on (b, d) blocks of rows that need not fit into memory together; returns self.

        The result is that of `fit` on all rows at once, up to rounding. `readers.open_source`
        gives the blocks of a file: ``PCARAG().fit_blocks(open_source("x.npy").blocks())``.

        Raises
        ------
        FewbitsError
            No blocks, blocks of different widths, and whatever `fit` raises.
        """
        self._learn(self._checked_blocks(blocks))
        self.dims_ = len(self.mean_)
        return self

    def _checked_blocks(self, blocks: Iterable[Any]) -> Iterator[np.ndarray]:
        """The blocks as float32 rows of one width, cut to bounded size."""
        width = first_row = 0
        for block in blocks:
            rows = check_vectors(block, first_row=first_row)
            width = width or rows.shape[1]
            if rows.shape[1] != width:
                raise FewbitsError(
                    f"pca-rag: the blocks have different widths, {width} and {rows.shape[1]}; "
                    "give rows of one width"
                )
            self._check_parameters(width)
            first_row += len(rows)
            yield from blocks_of(rows)

    def _moments(self, blocks: Iterable[np.ndarray]) -> Moments:
        moments: Moments | None = None
        for block in blocks:
            moments = moments or Moments(block.shape[1])
            moments.add(self._unit_if_asked(block, moments.count))
        if moments is None or moments.count < 2:
            raise FewbitsError("pca-rag learns from at least 2 rows; fit on more rows")
        return moments

    def _learn(self, blocks: Iterable[np.ndarray], *, keep_all: bool = False) -> None:
        """Fit on checked blocks; `keep_all` keeps every component there is."""
        moments = self._moments(blocks)
        found = principal_components(moments, center=self.center)
        if found.rank == 0:
            raise FewbitsError("pca-rag: all rows are the same; fit on rows that differ")
        dims = found.rank if keep_all else self._settle_dims(found, moments.count)
        self.mean_ = found.mean.astype(np.float32)
        self.components_ = found.components[:dims].astype(np.float32)
        self.variances_ = found.variances
        self.rows_ = np.array([moments.count], dtype=np.int64)

    def _settle_dims(self, found: PrincipalComponents, rows: int) -> int:
        """How many components to keep of what the rows hold."""
        rank = found.rank
        if self.dims is None:
            return min(found.dims_for(self.variance), max(1, len(found.mean) // 4), rank)
        if self.dims > rank:
            raise FewbitsError(
                f"pca-rag: dims={self.dims} is more than the {rank} directions in which the {rows} "
                f"rows differ; take dims={rank} or less, or fit on more rows"
            )
        return self.dims

    def _check_parameters(self, width: int) -> None:
        """Refuse hyper-parameters that cannot be met by rows of this width."""
        if self.dims is not None and not 1 <= self.dims <= width:
            raise FewbitsError(
                f"pca-rag: dims={self.dims} must be between 1 and the dimensions, {width}"
            )
        if not 0 < self.variance <= 1:
            raise FewbitsError(f"pca-rag: variance={self.variance} must be above 0 and at most 1")
        if not 0 <= self.whiten <= 1:
            raise FewbitsError(f"pca-rag: whiten={self.whiten} must be between 0 and 1")
        if self.dtype not in ("float32", "float16"):
            raise FewbitsError(f"pca-rag: dtype={self.dtype!r} must be float32 or float16")
        if self.scoring not in ("reconstruction", "reduced"):
            raise FewbitsError(f"pca-rag: scoring={self.scoring!r} is reconstruction or reduced")

    def _check_state(self) -> None:
        self._check_parameters(self.dims_)
        kept, width = self.components_.shape
        if width != self.dims_ or not 1 <= kept <= width or self.dims not in (None, kept):
            raise ValueError(f"components must be (dims, {self.dims_})")
        if self.mean_.shape != (width,) or self.variances_.shape != (width,):
            raise ValueError(f"mean and variances must be ({width},)")
        if self.rows_.shape != (1,) or self.rows_.dtype != np.int64:
            raise ValueError("rows must be one int64")
        for array, dtype in (
            (self.mean_, np.float32),
            (self.components_, np.float32),
            (self.variances_, np.float64),
        ):
            if array.dtype != dtype or not np.isfinite(array).all():
                raise ValueError("mean, components and variances must be finite floats")
        if (self.variances_ < 0).any() or self.variances_[0] == 0:
            raise ValueError("variances must not be negative or all 0")

    # -- encoding ---------------------------------------------------------------------------

    def transform(self, x: np.ndarray) -> np.ndarray:
        """(n, k) float32: Vᵀ(x - mean), whitened and scaled as asked."""
        y = self._project(self._unit_if_asked(x) - self.mean_) / self._spread
        return unit_or_zero(y) if self.post_normalize else y

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """(n, d) float32: mean + V y, the whitening undone."""
        return np.asarray(self.mean_ + self._undo_whitening(y) @ self.components_)

    def _encode(self, x: np.ndarray) -> State:
        y = self.transform(x)
        if self.dtype == "float16" and np.abs(y).max() > np.finfo(np.float16).max:
            raise FewbitsError("pca-rag: float16 holds values up to 65504; take dtype=float32")
        return {"vectors": y.astype(self.dtype)}

    def _project(self, x: np.ndarray) -> np.ndarray:
        return project(x, self.components_.T)

    def _undo_whitening(self, y: np.ndarray) -> np.ndarray:
        return y * self._spread

    def _unit_if_asked(self, x: np.ndarray, first_row: int = 0) -> np.ndarray:
        return unit_rows(x, first_row=first_row) if self.normalize else x

    @property
    def _spread(self) -> np.ndarray:
        """(k,) float32: what whitening divides by."""
        kept = self.variances_[: len(self.components_)]
        return ((kept + self._epsilon) ** (self.whiten / 2)).astype(np.float32)

    @property
    def _epsilon(self) -> float:
        """Added to variances before their root is taken, so that none is 0."""
        return float(self.variances_[0]) * 1e-9

    # -- searching --------------------------------------------------------------------------

    def transform_queries(self, queries: np.ndarray, metric: str) -> np.ndarray:
        """(q, k) float32 to compare with the rows by `search_metric`.

        With ``scoring="reconstruction"``, scores lack a number that is the same for all rows.
        """
        if self.scoring == "reduced":
            y = self.transform(queries)
            return unit_or_zero(y) if metric == "cosine" else y
        queries = self._unit_if_asked(queries)
        if metric == "l2":
            return self._project(queries - self.mean_)
        # <q, mean + V y> = <Vᵀq, y> + <q, mean>: the last term is the same for every row.
        return self._undo_whitening(self._project(queries))

    def search_metric(self, metric: str) -> str:
        """The metric that orders reduced rows as asked; they are not of unit length any more.

        Raises
        ------
        FewbitsError
            The rows would have to be changed first, which a codec that follows cannot do.
        """
        if self._before_comparing(metric) is not None:
            way_out = "post_normalize=yes" if metric == "cosine" else "whiten=0 or scoring=reduced"
            raise FewbitsError(
                f"{self.spec} cannot be searched by {metric} through another codec; take {way_out}"
            )
        is_cosine = self.scoring == "reconstruction" and metric == "cosine"
        return "ip" if is_cosine else metric

    def _before_comparing(self, metric: str) -> Rows | None:
        """What stored rows must go through before they can be compared; None for nothing."""
        if self.scoring == "reduced" and metric == "cosine" and not self.post_normalize:
            return unit_or_zero
        if self.scoring == "reconstruction" and metric == "l2" and self.whiten:
            return self._undo_whitening
        return None

    def _searcher(self, code: Code, metric: str) -> Searcher:
        before = self._before_comparing(metric)
        if before is None:
            return super()._searcher(code, metric)
        return TransformedSearcher(self, ChangedRows(code["vectors"], before, metric), metric)

    def _stored(self, metric: str) -> Stored:
        before = self._before_comparing(metric)
        if before is None:
            return super()._stored(metric)

        def changed(code: Code) -> np.ndarray:
            return before(code["vectors"].astype(np.float32)).astype(self.dtype)

        by = "l2" if metric == "l2" else "ip"
        stored = Stored("floats", len(self.components_), self.dtype, by, changed)
        return stored.after(lambda queries: self.transform_queries(queries, metric))

    def faiss_steps(self, metric: str) -> list[Any]:
        """`transform_queries` as steps of faiss, but for the length of queries by cosine."""
        import faiss

        start = [faiss.NormalizationTransform(self.dims_, 2.0)] if self.normalize else []
        if self.scoring == "reduced":
            scaled = self.post_normalize or metric == "cosine"
            end = [faiss.NormalizationTransform(len(self.components_), 2.0)] if scaled else []
            return [*start, self.to_faiss(), *end]
        if metric == "l2":
            bias = -(self.components_ @ self.mean_)
            return [*start, linear_step(self.components_.T, bias)]
        return [*start, linear_step((self.components_ * self._spread[:, None]).T)]

    # -- choosing and watching --------------------------------------------------------------

    @property
    def explained_variance(self) -> float:
        """Share of the fitted rows' variance that the components hold."""
        kept = self.variances_[: len(self.components_)]
        return float(kept.sum() / self.variances_.sum())

    @property
    def fit_error(self) -> float:
        """Mean squared distance of the fitted rows from their reconstructions."""
        rows = int(self.rows_[0])
        of_sample = (rows - 1) / rows if self.center else 1.0
        return float(self.variances_[len(self.components_) :].sum() * of_sample)

    def truncated(self, dims: int) -> PCARAG:
        """This codec with its first `dims` components only; nothing is fitted again."""
        self.require_fitted()
        if not 1 <= dims <= len(self.components_):
            raise FewbitsError(
                f"pca-rag: dims={dims} must be between 1 and the {len(self.components_)} fitted"
            )
        shorter = dataclasses.replace(self, dims=dims)
        shorter._restore(self.dims_, self.state() | {"components": self.components_[:dims]})
        return shorter

    def dims_for_bytes(self, size: int) -> int:
        """How many components fit into `size` bytes per row."""
        dims = size // np.dtype(self.dtype).itemsize
        if dims < 1:
            raise FewbitsError(f"pca-rag: {size} bytes cannot hold one {self.dtype} number")
        return dims

    def choose_dims(
        self, x: Any, queries: Any, recall_at_10: float = 0.95, metric: str = "cosine"
    ) -> int:
        """The fewest components that keep a recall@10 against exact search among `x`.

        Parameters
        ----------
        x : (n, d) rows to fit on and to search; of unit length for ``cosine``.
        queries : (q, d) held-out queries; rows of `x` itself would find themselves.

        Raises
        ------
        FewbitsError
            Unusable input, or no number of components reaches this recall.

        Notes
        -----
        One fit, then a binary search that encodes and searches log₂(d) times, which takes recall
        to rise with the dimensions.
        """
        if not 0 < recall_at_10 <= 1:
            raise FewbitsError(f"recall_at_10={recall_at_10} must be above 0 and at most 1")
        x, queries = check_vectors(x), check_vectors(queries, what="the queries")
        k = min(10, len(x))
        truth = search_array(queries, x, k, metric)[1]
        whole = dataclasses.replace(self, dims=None)
        whole._check_parameters(x.shape[1])
        whole._learn(blocks_of(x), keep_all=True)
        whole.dims_ = x.shape[1]

        def recall(dims: int) -> float:
            codec = whole.truncated(dims)
            return overlap(codec.search(codec.encode(x), queries, k, metric)[1], truth, k)

        low, high = 1, len(whole.components_)
        if (best := recall(high)) < recall_at_10:
            raise FewbitsError(
                f"pca-rag: all {high} components reach recall@10 = {best:.3f}, not "
                f"{recall_at_10:g}; ask for less, or take scoring=reconstruction"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if recall(middle) >= recall_at_10 else (middle + 1, high)
        return low

    def drift_report(self, x: Any) -> DriftReport:
        """How much worse the components hold new rows `x` (n, d) than those they were fitted on.

        Warns when the mean squared error grew by more than `DRIFT_LIMIT`. Fresh rows lose a
        little more than fitted ones even without drift, the more so the fewer were fitted.
        """
        self.require_fitted()
        x = self._checked(x)
        total = 0.0
        for block in blocks_of(x):
            centred = self._unit_if_asked(block) - self.mean_
            outside = centred - self._project(centred) @ self.components_
            total += float(np.sum(outside**2, dtype=np.float64))
        error = total / len(x)
        # Below this both errors are rounding, and their ratio says nothing.
        least = float(self.variances_.sum()) * 1e-6
        ratio = max(error, least) / max(self.fit_error, least)
        report = DriftReport(len(x), error, self.fit_error, ratio, ratio > DRIFT_LIMIT)
        if report.drifted:
            warnings.warn(
                f"the components lose {ratio:.2f} times as much of these rows as of those they "
                "were fitted on; fit again on recent rows",
                stacklevel=2,
            )
        return report

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"pca-rag:dims={size // 2},dtype=float16", MOST_DIMS)] if size >= 2 else []

    @classmethod
    def to_width(cls, width: int) -> str:
        return f"pca-rag:dims={width}"

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        """The components as half floats, and each chain that some size is best served by.

        On text embeddings of 384 dimensions those were 4 bits per component at 1/4 to 3/4 of the
        dimensions, 2 bits at small sizes, and OPQ with two or four components per byte.
        """
        half, quarter, most = dims // 2, dims // 4, dims * 3 // 4
        eighth = dims // 8
        candidates = [
            *((2 * kept, kept, ",dtype=float16") for kept in (dims // 16, eighth, quarter, half)),
            (quarter // 4 + 2, quarter, "+turboquant:bits=2"),
            *(
                (kept // 2 + 2, kept, "+turboquant:bits=4")
                for kept in (eighth, quarter, half, most)
            ),
            (most * 3 // 4 + 2, most, "+turboquant:bits=6"),
            *((kept, kept, "+int8") for kept in (quarter, half, most)),
        ]
        if rows >= 256 and dims >= 16:
            candidates += [(size, half, f"+opq:bytes={size}") for size in (eighth, quarter)]
        possible = sorted(row for row in candidates if 1 <= row[1] < rows)
        return list(dict.fromkeys(f"pca-rag:dims={kept}{rest}" for _, kept, rest in possible))

    # -- other libraries --------------------------------------------------------------------

    def to_faiss(self) -> Any:
        """A trained ``faiss.PCAMatrix`` that maps (n, d) to what `transform` gives.

        For queries too, as with ``scoring="reduced"``. Unit length before and after is not part
        of it; add ``faiss.NormalizationTransform`` where asked. To go back, use `inverse`: the
        matrix's own ``reverse_transform`` forgets the mean outside the components.
        """
        import faiss

        self.require_fitted()
        kept, width = self.components_.shape
        matrix = faiss.PCAMatrix(width, kept, -self.whiten / 2)
        matrix.epsilon = self._epsilon
        faiss.copy_array_to_vector(self.mean_, matrix.mean)
        faiss.copy_array_to_vector(self.variances_.astype(np.float32), matrix.eigenvalues)
        faiss.copy_array_to_vector(self.components_.ravel(), matrix.PCAMat)
        matrix.prepare_Ab()
        matrix.is_trained = True
        return matrix

    def to_sentence_transformers(self) -> Any:
        """A ``Dense`` layer to put at the end of a SentenceTransformer: weight Vᵀ, bias -Vᵀmean.

        For queries too, as with ``scoring="reduced"``. Unit length before and after is not part
        of it; add a ``Normalize`` module where asked.

        Raises
        ------
        MissingExtraError
            sentence-transformers is not installed.
        """
        self.require_fitted()
        require("sentence_transformers", "examples")
        import torch

        weight = self.components_ / self._spread[:, None]
        return dense_layer()(
            weight.shape[1],
            weight.shape[0],
            bias=True,
            activation_function=torch.nn.Identity(),
            init_weight=torch.from_numpy(weight),
            init_bias=torch.from_numpy(-(weight @ self.mean_)),
        )


class ChangedRows:
    """Exact search among rows that go through `change` first, block by block."""

    def __init__(self, vectors: np.ndarray, change: Rows, metric: str) -> None:
        self.vectors, self.change, self.metric = vectors, change, metric

    def search(self, queries: np.ndarray, k: int) -> Matches:
        return exact_search(queries, map(self.change, blocks_of(self.vectors)), k, self.metric)


@dataclass(frozen=True)
class DriftReport:
    """What became of the components' hold on the data.

    Attributes
    ----------
    rows : number of new rows.
    error : their mean squared distance from their reconstructions.
    fit_error : the same of the rows the codec was fitted on.
    ratio : `error` over `fit_error`.
    drifted : whether the ratio is above `DRIFT_LIMIT`.
    """

    rows: int
    error: float
    fit_error: float
    ratio: float
    drifted: bool


def unit_or_zero(y: np.ndarray) -> np.ndarray:
    """Rows of unit length; a row of zeros (one that is just the mean) stays as it is."""
    lengths = np.linalg.norm(y, axis=1, keepdims=True)
    return np.asarray(y / np.where(lengths == 0, 1, lengths), dtype=np.float32)


def dense_layer() -> Any:
    """The class ``Dense``, which has moved between versions of sentence-transformers."""
    try:
        from sentence_transformers.sentence_transformer.modules import Dense
    except ImportError:
        from sentence_transformers.models import Dense
    return Dense
