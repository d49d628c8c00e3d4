"""Established vector codecs, at full strength: what every paper here is compared with.

Most stand on faiss. Learned arrays are stored by themselves, not as a serialized index, so
that files stay specified and nothing from a file is trusted unseen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewbits.core.checks import LARGEST
from fewbits.core.code import Code
from fewbits.core.codec import MOST_DIMS, Codec, DecodingSearcher, State, learned
from fewbits.core.errors import FewbitsError
from fewbits.core.search import Matches, Searcher
from fewbits.core.stored import FaissForm, Stored, flat_form, grid_form, linear_step, padding_steps
from fewbits.primitives.bits import pack, packed_width, unpack
from fewbits.primitives.level_scan import LevelScan
from fewbits.primitives.lloyd_max import nearest_level, normal_levels
from fewbits.primitives.rotation import project, random_rotation

SIGNS = np.array([-1, 1], dtype=np.float32)
HALF_SIGNS = SIGNS.astype(np.float16)


def byte_grid(dims: int, most: int | None = None) -> list[int]:
    """Sizes in bytes from dims/32 to dims/4 (16 to 128 times smaller than float32)."""
    sizes = [dims // part for part in (32, 16, 8, 4)]
    return sorted({size for size in sizes if size >= 2 and (most is None or size <= most)})


def check_arrays(name: str, **arrays: tuple[np.ndarray, tuple[int, ...]]) -> None:
    """Raise ValueError unless each array is float32 of the shape beside it."""
    for what, (array, shape) in arrays.items():
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{name}: {what} must be float32 of shape {shape}")


def check_bits(name: str, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FewbitsError(f"{name}: bits={bits} must be between 1 and 8")


class FaissSearcher:
    """Searches a faiss index that holds the codes."""

    def __init__(self, index: Any, codes: np.ndarray, rotation: np.ndarray | None = None) -> None:
        self.index, self.rotation = index, rotation
        index.add_sa_codes(np.ascontiguousarray(codes))

    def search(self, queries: np.ndarray, k: int) -> Matches:
        import faiss

        if self.rotation is not None:
            queries = queries @ self.rotation
        queries = np.pad(queries, ((0, 0), (0, self.index.d - queries.shape[1])))
        scores, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        is_distance = self.index.metric_type == faiss.METRIC_L2
        return (-scores if is_distance else scores), rows.astype(np.int64)


class FaissCodec(Codec):
    """A codec around a faiss index of flat codes. Subclasses build the index."""

    def _index(self, metric: str) -> Any:
        """An empty, trained faiss index for ``ip`` or ``l2``."""
        raise NotImplementedError  # abstract

    def _encode(self, x: np.ndarray) -> State:
        return {"codes": self._index("ip").sa_encode(x)}

    def _decode(self, code: Code) -> np.ndarray:
        decoded: np.ndarray = self._index("ip").sa_decode(np.ascontiguousarray(code["codes"]))
        return decoded[:, : self.dims_]

    def _searcher(self, code: Code, metric: str) -> Searcher:
        return FaissSearcher(self._index("l2" if metric == "l2" else "ip"), code["codes"])

    def _faiss_form(self, metric: str) -> FaissForm:
        index = self._index("l2" if metric == "l2" else "ip")
        steps = [*self._faiss_rotation(), *padding_steps(self._faiss_dims, index.d)]
        return FaissForm(index, lambda code: np.ascontiguousarray(code["codes"]), steps)

    @property
    def _faiss_dims(self) -> int:
        """Width of queries after `_faiss_rotation`."""
        return self.dims_

    def _faiss_rotation(self) -> list[Any]:
        """What queries go through before the index."""
        return []


def faiss_metric(metric: str) -> int:
    import faiss

    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


@dataclass
class Float16(FaissCodec):
    """Half precision: 2 bytes per dimension, nothing learned."""

    name: ClassVar[str] = "float16"

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [("float16", size // 2)]

    def _index(self, metric: str) -> Any:
        import faiss

        kind = faiss.ScalarQuantizer.QT_fp16
        return faiss.IndexScalarQuantizer(self.dims_, kind, faiss_metric(metric))

    def _encode(self, x: np.ndarray) -> State:
        if np.abs(x).max() > np.finfo(np.float16).max:
            raise FewbitsError("float16 cannot hold values beyond 65504; scale the vectors first")
        return super()._encode(x)

    def _stored(self, metric: str) -> Stored:
        def halves(code: Code) -> np.ndarray:
            return np.ascontiguousarray(code["codes"]).view("<f2")

        return dataclasses.replace(super()._stored(metric), dtype="float16", rows=halves)


@dataclass
class Int8(FaissCodec):
    """One byte per dimension, over the range each dimension had in `fit`."""

    name: ClassVar[str] = "int8"
    range_: np.ndarray = learned()
    """(2, d) float32: least value of each dimension, and width of its range."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [("int8", size)]

    def _fit(self, x: np.ndarray) -> None:
        low = x.min(axis=0)
        self.range_ = np.stack([low, x.max(axis=0) - low])

    def _check_state(self) -> None:
        check_arrays(self.name, range=(self.range_, (2, self.dims_)))

    def _fits_half(self) -> bool:
        """Whether half precision rounds by at most half of a step in every dimension."""
        low, span = self.range_
        largest = np.maximum(np.abs(low), np.abs(low + span))
        fine = (largest / 2048 <= span / 510) | (span == 0)
        return bool(fine.all() and largest.max() <= np.finfo(np.float16).max)

    def _stored(self, metric: str) -> Stored:
        floats = super()._stored(metric)
        if self._fits_half():
            floats = dataclasses.replace(
                floats,
                dtype="float16",
                rows=lambda code: self._decode(code).astype(np.float16),
            )
        if metric == "l2":
            return floats
        # A number n stands for low + (n + 1/2)·width/255, and all but n·width is the same for
        # every row, so a query takes the width.
        return Stored(
            "integers",
            self.dims_,
            "uint8",
            "ip",
            lambda code: code["codes"],
            lambda queries: queries * (self.range_[1] / 255),
            floats,
        )

    def _index(self, metric: str) -> Any:
        import faiss

        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexScalarQuantizer(self.dims_, kind, faiss_metric(metric))
        faiss.copy_array_to_vector(self.range_.ravel(), index.sq.trained)
        index.is_trained = True
        return index


@dataclass
class PQ(FaissCodec):
    """Product quantization (Jégou, Douze, Schmid 2011): one byte per group of dimensions.

    Parameters
    ----------
    bytes : groups, and so bytes per vector. Dimensions that do not divide are padded with 0.
    seed : of the k-means.
    """

    name: ClassVar[str] = "pq"
    bytes: int = 48
    seed: int = 0

    centroids_: np.ndarray = learned()
    """(bytes, 256, d / bytes) float32."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"pq:bytes={size}", None)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"pq:bytes={size}" for size in byte_grid(dims)] if rows >= 256 else []

    def _fit(self, x: np.ndarray) -> None:
        self._check_parameters()
        self._check_rows(len(x))
        quantizer = self._quantizer()
        quantizer.train(np.pad(x, ((0, 0), (0, self.coded_dims - self.dims_))))
        self._keep(quantizer)

    def _keep(self, quantizer: Any) -> None:
        import faiss

        flat = faiss.vector_to_array(quantizer.centroids)
        self.centroids_ = flat.reshape(self.bytes, 256, -1)

    @property
    def coded_dims(self) -> int:
        """Dimensions that the centroids cover together."""
        return -(-self.dims_ // self.bytes) * self.bytes

    def _check_parameters(self) -> None:
        if not 1 <= self.bytes <= self.dims_:
            raise FewbitsError(
                f"{self.name}: bytes={self.bytes} must be between 1 and the dimensions, "
                f"{self.dims_}"
            )

    def _check_rows(self, rows: int) -> None:
        if rows < 256:
            raise FewbitsError(
                f"{self.name} learns 256 centroids and needs at least 256 rows, not {rows}"
            )

    def _quantizer(self) -> Any:
        import faiss

        quantizer = faiss.ProductQuantizer(self.coded_dims, self.bytes, 8)
        quantizer.cp.seed = self.seed + 1
        quantizer.cp.min_points_per_centroid = 1  # small collections are fine; do not warn
        return quantizer

    def _check_state(self) -> None:
        self._check_parameters()
        shape = (self.bytes, 256, self.coded_dims // self.bytes)
        check_arrays(self.name, centroids=(self.centroids_, shape))

    def _index(self, metric: str) -> Any:
        import faiss

        index = faiss.IndexPQ(self.coded_dims, self.bytes, 8, faiss_metric(metric))
        faiss.copy_array_to_vector(
            np.ascontiguousarray(self.centroids_).ravel(), index.pq.centroids
        )
        index.is_trained = True
        return index

    def _encode(self, x: np.ndarray) -> State:
        index = self._index("l2")
        return {"codes": index.sa_encode(np.pad(x, ((0, 0), (0, index.d - x.shape[1]))))}


@dataclass
class OPQ(PQ):
    """Optimized product quantization (Ge, He, Ke, Sun 2013): a learned rotation, then PQ.

    Parameters
    ----------
    bytes : bytes per vector.
    dims : keep only so many dimensions after the rotation (a multiple of `bytes`); None
        keeps all.
    rounds : of learning. 50, as faiss has it, takes twice as long, and recall@10 on our data
        was between 0.003 lower and 0.007 higher.
    seed : of the k-means.
    """

    name: ClassVar[str] = "opq"
    cubic: ClassVar[bool] = True
    bytes: int = 48
    dims: int | None = None
    rounds: int = 25
    seed: int = 0

    rotation_: np.ndarray = learned()
    """(d, dims) float32 with orthonormal columns."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        narrow = [(f"opq:bytes={size},dims={each * size}", MOST_DIMS) for each in (2, 4)]
        return [(f"opq:bytes={size}", None), *narrow]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        if rows < 256:
            return []
        specs = []
        for size in byte_grid(dims):
            specs += [f"opq:bytes={size},dims={size * 4}"] if size * 4 < dims else []
            specs += [f"opq:bytes={size}"] if size * 8 <= dims or size * 4 >= dims else []
        return specs

    def _fit(self, x: np.ndarray) -> None:
        import faiss

        self._check_parameters()
        self._check_rows(len(x))
        learner = faiss.OPQMatrix(self.dims_, self.bytes, self.coded_dims)
        quantizer = self._quantizer()
        learner.pq = quantizer
        learner.niter = self.rounds
        learner.train(x)
        rotation = faiss.vector_to_array(learner.A).reshape(self.coded_dims, self.dims_).T
        self.rotation_ = np.ascontiguousarray(rotation)
        final = self._quantizer()
        final.train(np.ascontiguousarray(x @ self.rotation_))
        self._keep(final)

    @property
    def coded_dims(self) -> int:
        """Dimensions kept after the rotation."""
        return self.dims_ // self.bytes * self.bytes if self.dims is None else self.dims

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.coded_dims % self.bytes or not 1 <= self.coded_dims <= self.dims_:
            raise FewbitsError(
                f"opq: dims={self.dims} must be a multiple of bytes={self.bytes}, at most "
                f"{self.dims_}"
            )
        if self.rounds < 1:
            raise FewbitsError(f"opq: rounds={self.rounds} must be at least 1")

    def _check_state(self) -> None:
        super()._check_state()
        check_arrays(self.name, rotation=(self.rotation_, (self.dims_, self.coded_dims)))

    def _encode(self, x: np.ndarray) -> State:
        return super()._encode(project(x, self.rotation_))

    def _decode(self, code: Code) -> np.ndarray:
        decoded = self._index("ip").sa_decode(np.ascontiguousarray(code["codes"]))
        return np.asarray(decoded @ self.rotation_.T, dtype=np.float32)

    def _searcher(self, code: Code, metric: str) -> Searcher:
        index = self._index("l2" if metric == "l2" else "ip")
        return FaissSearcher(index, code["codes"], self.rotation_)

    @property
    def _faiss_dims(self) -> int:
        return self.coded_dims

    def _faiss_rotation(self) -> list[Any]:
        return [linear_step(self.rotation_)]


@dataclass
class RaBitQ(FaissCodec):
    """RaBitQ (Gao, Long 2024, arXiv 2405.12497; extended 2025, arXiv 2409.09913), 1 to 8 bits.

    A random rotation, then codes of `bits` per dimension on the unit sphere around the
    centre, and two to five float factors per vector that make the distances unbiased.
    """

    name: ClassVar[str] = "rabitq"
    bits: int = 1
    seed: int = 0

    rotation_: np.ndarray = learned()
    """(d, d) float32, orthogonal."""
    center_: np.ndarray = learned()
    """(d,) float32, mean of the rotated vectors."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        # One bit: 8 bytes of factors; more: 20, and the signs lie apart from the other bits.
        single: list[tuple[str, int | None]] = [("rabitq:bits=1", 8 * (size - 8))]
        return single + [(f"rabitq:bits={b}", 8 * ((size - 20) // b)) for b in (2, 3, 4, 8)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"rabitq:bits={bits}" for bits in (1, 2, 3, 4, 8)]

    def _fit(self, x: np.ndarray) -> None:
        check_bits(self.name, self.bits)
        self.rotation_ = random_rotation(self.dims_, self.seed)
        self.center_ = (x.mean(axis=0) @ self.rotation_).astype(np.float32)

    def _check_state(self) -> None:
        check_bits(self.name, self.bits)
        square, row = (self.dims_, self.dims_), (self.dims_,)
        check_arrays(self.name, rotation=(self.rotation_, square), center=(self.center_, row))
        # faiss does not come back from encoding where squares leave float32.
        most = LARGEST * np.sqrt(self.dims_)
        if np.abs(self.rotation_).max() > 1.01 or np.abs(self.center_).max() > most:
            raise ValueError("rabitq: rotation or center is far too large")

    def _index(self, metric: str) -> Any:
        import faiss

        index = faiss.IndexRaBitQ(self.dims_, faiss.METRIC_L2, self.bits)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.center_), index.center)
        index.qb = 8
        index.is_trained = True
        return index

    def _encode(self, x: np.ndarray) -> State:
        return {"codes": self._index("l2").sa_encode(project(x, self.rotation_))}

    def _decode(self, code: Code) -> np.ndarray:
        """The vectors whose inner products are the unbiased estimates.

        faiss writes per row: one sign bit per dimension, float factors, and with more than one
        bit the lower bits and two factors more; its own decoder reads the signs alone.
        """
        codes, extra = code["codes"], self.bits - 1
        signs = packed_width(self.dims_, 1)
        number = unpack(codes[:, :signs], self.dims_, 1).astype(np.float32)
        if extra == 0:
            factors = np.ascontiguousarray(codes[:, signs:]).view(np.float32)
            scale = factors[:, 1] / np.float32(np.sqrt(self.dims_))
            centred = 2 * number - 1
        else:
            first = signs + 12
            last = first + packed_width(self.dims_, extra)
            number = number * 2**extra + unpack(codes[:, first:last], self.dims_, extra)
            factors = np.ascontiguousarray(codes[:, last:]).view(np.float32)
            scale = -factors[:, 1] / 2
            centred = number - np.float32(2**extra - 0.5)
        rotated = centred * scale[:, None] + self.center_
        return np.asarray(rotated @ self.rotation_.T, dtype=np.float32)

    def _searcher(self, code: Code, metric: str) -> Searcher:
        # The factors are those of the L2 estimator, which ranks unit vectors by cosine too.
        if metric == "ip":
            return DecodingSearcher(self, code, metric)
        searcher = FaissSearcher(self._index("l2"), code["codes"], self.rotation_)
        return CosineSearcher(searcher) if metric == "cosine" else searcher

    def _faiss_form(self, metric: str) -> FaissForm:
        return flat_form(self._stored(metric)) if metric == "ip" else super()._faiss_form(metric)

    def _faiss_rotation(self) -> list[Any]:
        return [linear_step(self.rotation_)]


class CosineSearcher:
    """Turns the distances that a search among unit rows finds into inner products."""

    def __init__(self, inner: Searcher) -> None:
        self.inner = inner

    def search(self, queries: np.ndarray, k: int) -> Matches:
        scores, rows = self.inner.search(queries, k)
        squares = np.einsum("qd,qd->q", queries, queries)
        return (scores + squares[:, None] + 1) / 2, rows


@dataclass
class TurboQuant(Codec):
    """Random rotation, then Lloyd–Max scalar quantization (the construction of TurboQuant,
    Zandieh et al. 2025, arXiv 2504.19874).

    After the rotation the coordinates of a unit vector are close to normal with variance 1/d,
    whatever the data, so one quantizer serves all. Per vector: d·bits/8 bytes, and its norm
    as float16.
    """

    name: ClassVar[str] = "turboquant"
    bits: int = 4
    seed: int = 0

    rotation_: np.ndarray = learned()
    """(d, d) float32, orthogonal."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"turboquant:bits={b}", 8 * (size - 2) // b) for b in (1, 2, 3, 4)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"turboquant:bits={bits}" for bits in (1, 2, 3, 4)]

    def _fit(self, x: np.ndarray) -> None:
        check_bits(self.name, self.bits)
        self.rotation_ = random_rotation(self.dims_, self.seed)

    def _check_state(self) -> None:
        check_bits(self.name, self.bits)
        check_arrays(self.name, rotation=(self.rotation_, (self.dims_, self.dims_)))

    @property
    def levels(self) -> np.ndarray:
        return normal_levels(self.bits) / np.float32(np.sqrt(self.dims_))

    def _encode(self, x: np.ndarray) -> State:
        norms = np.linalg.norm(x, axis=1)
        if norms.max() > np.finfo(np.float16).max:
            raise FewbitsError("turboquant holds norms up to 65504; scale the vectors first")
        unit = x / np.where(norms == 0, 1, norms)[:, None]
        numbers = nearest_level(project(unit, self.rotation_), self.levels)
        return {"packed": pack(numbers, self.bits), "norms": norms.astype(np.float16)}

    def _decode(self, code: Code) -> np.ndarray:
        values = self.levels[unpack(code["packed"], self.dims_, self.bits)]
        norms = code["norms"].astype(np.float32)[:, None]
        return np.asarray((values * norms) @ self.rotation_.T, dtype=np.float32)

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2" or self.bits not in (1, 2, 4):
            return DecodingSearcher(self, code, metric)
        norms = code["norms"].astype(np.float32)
        scan = LevelScan(code["packed"], self.dims_, self.bits, self.levels, norms)
        return PreparedSearcher(lambda queries: queries @ self.rotation_, scan)

    def _faiss_form(self, metric: str) -> FaissForm:
        if metric != "cosine" or self.bits not in (1, 2, 4, 8):
            return super()._faiss_form(metric)
        # Rows of unit length do not need their norms.
        form = grid_form("packed", np.tile(self.levels, (self.dims_, 1)), self.bits)
        return dataclasses.replace(form, steps=[linear_step(self.rotation_), *form.steps])


class PreparedSearcher:
    """Applies a function to the queries, then searches.

    Where rows are searched without their `mean`, its inner product with the query is added.
    """

    def __init__(
        self,
        prepare: Callable[[np.ndarray], np.ndarray],
        inner: Searcher | LevelScan,
        mean: np.ndarray | None = None,
    ) -> None:
        self.prepare, self.inner, self.mean = prepare, inner, mean

    def search(self, queries: np.ndarray, k: int) -> Matches:
        scores, rows = self.inner.search(self.prepare(queries), k)
        return (scores if self.mean is None else scores + (queries @ self.mean)[:, None]), rows


@dataclass
class SignCodec(Codec):
    """Signs of centred coordinates, searched with float queries.

    A table-lookup scan of the bits keeps several times k rows; these are scored again by the
    exact inner product of the float query with the decoded rows, which needs no further bytes
    and ranks better than the Hamming distance of two sign codes.
    """

    mean_: np.ndarray = learned()
    """(d,) float32."""
    scale_: np.ndarray = learned()
    """(b,) float32: mean size of each coordinate whose sign is kept."""

    @property
    def width(self) -> int:
        """Signs per row."""
        return self.dims_

    def _fit(self, x: np.ndarray) -> None:
        self.mean_ = x.mean(axis=0)
        self.scale_ = np.abs(self._coordinates(x - self.mean_)).mean(axis=0)

    def _coordinates(self, centred: np.ndarray) -> np.ndarray:
        """(n, b) coordinates whose signs are kept."""
        return centred

    def _from_coordinates(self, values: np.ndarray) -> np.ndarray:
        """(n, d) centred rows from (n, b) coordinates."""
        return values

    def _check_state(self) -> None:
        mean, scale = (self.mean_, (self.dims_,)), (self.scale_, (self.width,))
        check_arrays(self.name, mean=mean, scale=scale)

    def _signs(self, x: np.ndarray) -> np.ndarray:
        return pack(self._coordinates(x - self.mean_) > 0, 1)

    def _encode(self, x: np.ndarray) -> State:
        return {"bits": self._signs(x)}

    def _decode(self, code: Code) -> np.ndarray:
        signs = unpack(code["bits"], self.width, 1).astype(np.float32) * 2 - 1
        centred = self._from_coordinates(signs * self.scale_)
        return np.asarray(self.mean_ + centred, dtype=np.float32)

    def _query_coordinates(self, queries: np.ndarray) -> np.ndarray:
        """(q, b) whose inner product with coordinates is that of the queries with the rows."""
        return queries

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2":
            return DecodingSearcher(self, code, metric)
        scan = LevelScan(code["bits"], self.width, 1, SIGNS)
        return PreparedSearcher(
            lambda queries: self._query_coordinates(queries) * self.scale_, scan, self.mean_
        )

    def _stored(self, metric: str) -> Stored:
        floats = super()._stored(metric)
        if metric != "l2":
            floats = Stored(
                "floats",
                self.width,
                "float16",
                "ip",
                lambda code: HALF_SIGNS[unpack(code["bits"], self.width, 1)],
                lambda queries: self._query_coordinates(queries) * self.scale_,
            )
        return Stored(
            "bits",
            self.width,
            "uint8",
            "hamming",
            lambda code: code["bits"],
            self._signs,
            floats,
        )

    def _faiss_form(self, metric: str) -> FaissForm:
        if metric == "l2":
            return super()._faiss_form(metric)
        form = grid_form("bits", self.scale_[:, None] * SIGNS, 1)
        return dataclasses.replace(form, steps=[*self._faiss_rotation(), *form.steps])

    def _faiss_rotation(self) -> list[Any]:
        """`_query_coordinates` as steps of faiss."""
        return []


@dataclass
class Sign(SignCodec):
    """One bit per dimension: whether it is above its mean."""

    name: ClassVar[str] = "sign"

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [("sign", 8 * size)]


@dataclass
class ProjectedSignCodec(SignCodec):
    """Signs of linear projections. Subclasses find the projection."""

    bits: int | None = None
    seed: int = 0

    projection_: np.ndarray = learned()
    """(d, b) float32."""

    def _project(self, centred: np.ndarray) -> np.ndarray:
        """Learn the (d, b) projection from centred rows."""
        raise NotImplementedError  # abstract

    @property
    def width(self) -> int:
        return self.dims_ if self.bits is None else self.bits

    def _fit(self, x: np.ndarray) -> None:
        self.projection_ = np.asarray(self._project(x - x.mean(axis=0)), dtype=np.float32)
        super()._fit(x)

    def _coordinates(self, centred: np.ndarray) -> np.ndarray:
        return project(centred, self.projection_)

    def _from_coordinates(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values @ np.linalg.pinv(self.projection_))

    def _query_coordinates(self, queries: np.ndarray) -> np.ndarray:
        return np.asarray(queries @ np.linalg.pinv(self.projection_).T)

    def _faiss_rotation(self) -> list[Any]:
        return [linear_step(np.linalg.pinv(self.projection_).T)]

    def _check_state(self) -> None:
        super()._check_state()
        check_arrays(self.name, projection=(self.projection_, (self.dims_, self.width)))


@dataclass
class LSH(ProjectedSignCodec):
    """Signs of random projections (Charikar 2002); orthogonal ones as far as they go.

    Parameters
    ----------
    bits : length of the code; None for one per dimension.
    seed : of the projections.
    """

    name: ClassVar[str] = "lsh"

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"lsh:bits={8 * size}", None)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"lsh:bits={bits}" for bits in (dims // 2, dims, 2 * dims) if bits >= 8]

    def _project(self, centred: np.ndarray) -> np.ndarray:
        if not 1 <= self.width <= 64 * self.dims_:
            raise FewbitsError(
                f"lsh: bits={self.bits} must be between 1 and 64 times the dimensions"
            )
        blocks = -(-self.width // self.dims_)
        turns = [random_rotation(self.dims_, self.seed * 64 + block) for block in range(blocks)]
        return np.concatenate(turns, axis=1)[:, : self.width]


@dataclass
class ITQ(ProjectedSignCodec):
    """Iterative quantization (Gong, Lazebnik 2011): principal directions, turned so that the
    signs lose least.

    Parameters
    ----------
    bits : length of the code, at most the dimensions; None for one per dimension.
    seed : of the first rotation.
    """

    name: ClassVar[str] = "itq"
    cubic: ClassVar[bool] = True

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"itq:bits={8 * size}", MOST_DIMS)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"itq:bits={bits}" for bits in (dims // 2, dims) if 8 <= bits < rows]

    def _project(self, centred: np.ndarray) -> np.ndarray:
        if not 1 <= self.width <= self.dims_:
            raise FewbitsError(f"itq: bits={self.bits} must be between 1 and the dimensions")
        _, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
        directions = vectors[:, ::-1][:, : self.width].astype(np.float32)
        reduced = centred @ directions
        rotation = random_rotation(self.width, self.seed)
        for _ in range(50):
            left, _, right = np.linalg.svd(reduced.T @ np.where(reduced @ rotation > 0, 1.0, -1.0))
            rotation = (left @ right).astype(np.float32)
        return directions @ rotation
