"""Established vector codecs, at full strength: what every paper here is compared with.

Most stand on faiss. Learned arrays are stored by themselves, not as a serialized index, so
that files stay specified and nothing from a file is trusted unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewbits.core.code import Code
from fewbits.core.codec import Codec, DecodingSearcher, State, learned
from fewbits.core.errors import FewbitsError
from fewbits.core.search import Matches, Searcher
from fewbits.primitives.bits import pack, packed_width, unpack
from fewbits.primitives.level_scan import LevelScan
from fewbits.primitives.lloyd_max import nearest_level, normal_levels
from fewbits.primitives.rotation import random_rotation


def byte_grid(dims: int, most: int | None = None) -> list[int]:
    """Sizes in bytes from dims/32 to dims/4 (16 to 128 times smaller than float32)."""
    sizes = [dims // part for part in (32, 16, 8, 4)]
    return sorted({size for size in sizes if size >= 2 and (most is None or size <= most)})


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


def faiss_metric(metric: str) -> int:
    import faiss

    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


@dataclass
class Float16(FaissCodec):
    """Half precision: 2 bytes per dimension, nothing learned."""

    name: ClassVar[str] = "float16"

    def _index(self, metric: str) -> Any:
        import faiss

        kind = faiss.ScalarQuantizer.QT_fp16
        return faiss.IndexScalarQuantizer(self.dims_, kind, faiss_metric(metric))

    def _encode(self, x: np.ndarray) -> State:
        if np.abs(x).max() > np.finfo(np.float16).max:
            raise FewbitsError("float16 cannot hold values beyond 65504; scale the vectors first")
        return super()._encode(x)


@dataclass
class Int8(FaissCodec):
    """One byte per dimension, over the range each dimension had in `fit`."""

    name: ClassVar[str] = "int8"
    range_: np.ndarray = learned()
    """(2, d) float32: least value of each dimension, and width of its range."""

    def _fit(self, x: np.ndarray) -> None:
        low = x.min(axis=0)
        self.range_ = np.stack([low, x.max(axis=0) - low])

    def _check_state(self) -> None:
        if self.range_.shape != (2, self.dims_) or self.range_.dtype != np.float32:
            raise ValueError("int8: range must be (2, d) float32")

    def _index(self, metric: str) -> Any:
        import faiss

        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexScalarQuantizer(self.dims_, kind, faiss_metric(metric))
        faiss.copy_array_to_vector(self.range_.ravel(), index.sq.trained)
        index.is_trained = True
        return index


def check_bytes(name: str, size: int, dims: int, rows: int) -> None:
    """Whether a product quantizer of `size` bytes can be learned from (rows, dims)."""
    if not 1 <= size <= dims:
        raise FewbitsError(f"{name}: bytes={size} must be between 1 and the dimensions, {dims}")
    if rows < 256:
        raise FewbitsError(f"{name} learns 256 centroids and needs at least 256 rows, not {rows}")


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
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"pq:bytes={size}" for size in byte_grid(dims)] if rows >= 256 else []

    def _fit(self, x: np.ndarray) -> None:
        check_bytes(self.name, self.bytes, self.dims_, len(x))
        quantizer = self._quantizer(self.padded_dims)
        quantizer.train(np.pad(x, ((0, 0), (0, self.padded_dims - self.dims_))))
        self._keep(quantizer)

    def _keep(self, quantizer: Any) -> None:
        import faiss

        flat = faiss.vector_to_array(quantizer.centroids)
        self.centroids_ = flat.reshape(self.bytes, 256, -1)

    @property
    def padded_dims(self) -> int:
        return -(-self.dims_ // self.bytes) * self.bytes

    def _quantizer(self, dims: int) -> Any:
        import faiss

        quantizer = faiss.ProductQuantizer(dims, self.bytes, 8)
        quantizer.cp.seed = self.seed + 1
        quantizer.cp.min_points_per_centroid = 1  # small collections are fine; do not warn
        return quantizer

    def _check_state(self) -> None:
        shape = self.centroids_.shape
        if len(shape) != 3 or shape[:2] != (self.bytes, 256) or self.centroids_.dtype != np.float32:
            raise ValueError(f"{self.name}: centroids must be (bytes, 256, d / bytes) float32")

    def _index(self, metric: str) -> Any:
        import faiss

        dims = self.bytes * self.centroids_.shape[2]
        index = faiss.IndexPQ(dims, self.bytes, 8, faiss_metric(metric))
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
    bytes: int = 48
    dims: int | None = None
    rounds: int = 25
    seed: int = 0

    rotation_: np.ndarray = learned()
    """(d, dims) float32 with orthonormal columns."""

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

        check_bytes(self.name, self.bytes, self.dims_, len(x))
        dims = self.dims_ // self.bytes * self.bytes if self.dims is None else self.dims
        if dims % self.bytes or not 1 <= dims <= self.dims_:
            raise FewbitsError(
                f"opq: dims={dims} must be a multiple of bytes={self.bytes}, at most {self.dims_}"
            )
        if self.rounds < 1:
            raise FewbitsError(f"opq: rounds={self.rounds} must be at least 1")
        learner = faiss.OPQMatrix(self.dims_, self.bytes, dims)
        quantizer = self._quantizer(dims)
        learner.pq = quantizer
        learner.niter = self.rounds
        learner.train(x)
        rotation = faiss.vector_to_array(learner.A).reshape(dims, self.dims_).T
        self.rotation_ = np.ascontiguousarray(rotation)
        final = self._quantizer(dims)
        final.train(np.ascontiguousarray(x @ self.rotation_))
        self._keep(final)

    def _check_state(self) -> None:
        super()._check_state()
        if self.rotation_.shape != (self.dims_, self.bytes * self.centroids_.shape[2]):
            raise ValueError("opq: rotation and centroids do not fit together")

    def _encode(self, x: np.ndarray) -> State:
        return super()._encode(x @ self.rotation_)

    def _decode(self, code: Code) -> np.ndarray:
        decoded = self._index("ip").sa_decode(np.ascontiguousarray(code["codes"]))
        return np.asarray(decoded @ self.rotation_.T, dtype=np.float32)

    def _searcher(self, code: Code, metric: str) -> Searcher:
        index = self._index("l2" if metric == "l2" else "ip")
        return FaissSearcher(index, code["codes"], self.rotation_)


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
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"rabitq:bits={bits}" for bits in (1, 2, 3, 4, 8)]

    def _fit(self, x: np.ndarray) -> None:
        if not 1 <= self.bits <= 8:
            raise FewbitsError(f"rabitq: bits={self.bits} must be between 1 and 8")
        self.rotation_ = random_rotation(self.dims_, self.seed)
        self.center_ = (x.mean(axis=0) @ self.rotation_).astype(np.float32)

    def _check_state(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError("rabitq: bits must be between 1 and 8")
        if self.rotation_.shape != (self.dims_, self.dims_) or self.center_.shape != (self.dims_,):
            raise ValueError("rabitq: rotation and centre do not fit together")

    def _index(self, metric: str) -> Any:
        import faiss

        index = faiss.IndexRaBitQ(self.dims_, faiss.METRIC_L2, self.bits)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.center_), index.center)
        index.qb = 8
        index.is_trained = True
        return index

    def _encode(self, x: np.ndarray) -> State:
        rotated = np.ascontiguousarray(x @ self.rotation_)
        return {"codes": self._index("l2").sa_encode(rotated)}

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
        return FaissSearcher(self._index("l2"), code["codes"], self.rotation_)


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
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"turboquant:bits={bits}" for bits in (1, 2, 3, 4)]

    def _fit(self, x: np.ndarray) -> None:
        if not 1 <= self.bits <= 8:
            raise FewbitsError(f"turboquant: bits={self.bits} must be between 1 and 8")
        self.rotation_ = random_rotation(self.dims_, self.seed)

    def _check_state(self) -> None:
        if not 1 <= self.bits <= 8 or self.rotation_.shape != (self.dims_, self.dims_):
            raise ValueError("turboquant: bits from 1 to 8 and a (d, d) rotation are needed")

    @property
    def levels(self) -> np.ndarray:
        return normal_levels(self.bits) / np.float32(np.sqrt(self.dims_))

    def _encode(self, x: np.ndarray) -> State:
        norms = np.linalg.norm(x, axis=1)
        if norms.max() > np.finfo(np.float16).max:
            raise FewbitsError("turboquant holds norms up to 65504; scale the vectors first")
        unit = x / np.where(norms == 0, 1, norms)[:, None]
        numbers = nearest_level(unit @ self.rotation_, self.levels)
        return {"packed": pack(numbers, self.bits), "norms": norms.astype(np.float16)}

    def _decode(self, code: Code) -> np.ndarray:
        values = self.levels[unpack(code["packed"], self.dims_, self.bits)]
        norms = code["norms"].astype(np.float32)[:, None]
        return np.asarray((values * norms) @ self.rotation_.T, dtype=np.float32)

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2" or self.bits not in (1, 2, 4):
            return DecodingSearcher(self, code, metric)
        scale = code["norms"].astype(np.float32)
        scan = LevelScan(code["packed"], self.dims_, self.bits, self.levels, scale)
        return PreparedSearcher(lambda queries: queries @ self.rotation_, scan)


class PreparedSearcher:
    """Applies a function to the queries, then searches."""

    def __init__(
        self, prepare: Callable[[np.ndarray], np.ndarray], inner: Searcher | LevelScan
    ) -> None:
        self.prepare, self.inner = prepare, inner

    def search(self, queries: np.ndarray, k: int) -> Matches:
        return self.inner.search(self.prepare(queries), k)


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
        if self.mean_.shape != (self.dims_,) or self.scale_.shape != (self.dims_,):
            raise ValueError(f"{self.name}: mean and scale do not fit together")

    def _signs(self, x: np.ndarray) -> np.ndarray:
        return pack(self._coordinates(x - self.mean_) > 0, 1)

    def _encode(self, x: np.ndarray) -> State:
        return {"bits": self._signs(x)}

    def _decode(self, code: Code) -> np.ndarray:
        signs = unpack(code["bits"], len(self.scale_), 1).astype(np.float32) * 2 - 1
        centred = self._from_coordinates(signs * self.scale_)
        return np.asarray(self.mean_ + centred, dtype=np.float32)

    def _query_coordinates(self, queries: np.ndarray) -> np.ndarray:
        """(q, b) whose inner product with coordinates is that of the queries with the rows."""
        return queries

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2":
            return DecodingSearcher(self, code, metric)
        signs = np.array([-1, 1], dtype=np.float32)
        scan = LevelScan(code["bits"], len(self.scale_), 1, signs)
        return PreparedSearcher(lambda q: self._query_coordinates(q) * self.scale_, scan)


@dataclass
class Sign(SignCodec):
    """One bit per dimension: whether it is above its mean."""

    name: ClassVar[str] = "sign"


@dataclass
class ProjectedSignCodec(SignCodec):
    """Signs of linear projections. Subclasses find the projection."""

    projection_: np.ndarray = learned()
    """(d, b) float32."""

    def _project(self, centred: np.ndarray) -> np.ndarray:
        """Learn the (d, b) projection from centred rows."""
        raise NotImplementedError  # abstract

    def _fit(self, x: np.ndarray) -> None:
        self.projection_ = np.asarray(self._project(x - x.mean(axis=0)), dtype=np.float32)
        super()._fit(x)

    def _coordinates(self, centred: np.ndarray) -> np.ndarray:
        return np.asarray(centred @ self.projection_)

    def _from_coordinates(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values @ np.linalg.pinv(self.projection_))

    def _query_coordinates(self, queries: np.ndarray) -> np.ndarray:
        return np.asarray(queries @ np.linalg.pinv(self.projection_).T)

    def _check_state(self) -> None:
        if self.mean_.shape != (self.dims_,) or self.scale_.ndim != 1:
            raise ValueError(f"{self.name}: mean and scale do not fit together")
        if self.projection_.shape != (self.dims_, len(self.scale_)):
            raise ValueError(f"{self.name}: projection and scale do not fit together")


@dataclass
class LSH(ProjectedSignCodec):
    """Signs of random projections (Charikar 2002); orthogonal ones as far as they go.

    Parameters
    ----------
    bits : length of the code; None for one per dimension.
    seed : of the projections.
    """

    name: ClassVar[str] = "lsh"

    bits: int | None = None
    seed: int = 0

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"lsh:bits={bits}" for bits in (dims // 2, dims, 2 * dims) if bits >= 8]

    def _project(self, centred: np.ndarray) -> np.ndarray:
        bits = self.dims_ if self.bits is None else self.bits
        if bits < 1 or bits > 64 * self.dims_:
            raise FewbitsError(f"lsh: bits={bits} must be between 1 and 64 times the dimensions")
        blocks = -(-bits // self.dims_)
        turns = [random_rotation(self.dims_, self.seed * 64 + block) for block in range(blocks)]
        return np.concatenate(turns, axis=1)[:, :bits]


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

    bits: int | None = None
    seed: int = 0

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        return [f"itq:bits={bits}" for bits in (dims // 2, dims) if 8 <= bits < rows]

    def _project(self, centred: np.ndarray) -> np.ndarray:
        bits = self.dims_ if self.bits is None else self.bits
        if not 1 <= bits <= self.dims_:
            raise FewbitsError(f"itq: bits={bits} must be between 1 and the dimensions")
        _, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
        directions = vectors[:, ::-1][:, :bits].astype(np.float32)
        reduced = centred @ directions
        rotation = random_rotation(bits, self.seed)
        for _ in range(50):
            left, _, right = np.linalg.svd(reduced.T @ np.where(reduced @ rotation > 0, 1.0, -1.0))
            rotation = (left @ right).astype(np.float32)
        return directions @ rotation
