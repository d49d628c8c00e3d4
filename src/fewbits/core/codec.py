"""Codec: fit / encode / decode / search / save / load, chaining, and spec strings.

A codec is a dataclass whose fields are its hyper-parameters, and whose learned arrays are
fields made by `learned()` with names that end in ``_``. To write one, subclass `Codec` and
write `_fit`, `_encode` and `_decode`. A codec whose code is just shorter vectors is a `Transform`;
others can follow it in a chain: ``pca-rag:dims=110+pq:bytes=48``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from fewbits.core import container
from fewbits.core.checks import check_ragged, check_seed, check_vectors
from fewbits.core.code import Code
from fewbits.core.errors import FewbitsError
from fewbits.core.search import Matches, Searcher, check_metric, exact_search, search_array
from fewbits.core.stored import FaissForm, Stored, flat_form
from fewbits.primitives.ragged import Ragged

Vectors = np.ndarray | Ragged
State = dict[str, np.ndarray]
T = TypeVar("T", bound="Codec")

BLOCK_BYTES = 64 * 2**20
"""Float bytes decoded at a time while searching."""

MOST_DIMS = 2**22
"""Widest vector: a row must fit many times into a block, also where a file only claims it."""
SPEC_LIMIT = 4096
"""Longest spec string, in characters."""

UNUSABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What arrays and figures from a file raise where they do not fit together."""


def learned() -> Any:
    """A dataclass field for an array that `fit` sets and files hold."""
    return dataclasses.field(init=False, repr=False, compare=False)


def hyper_parameters(codec: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a codec (or codec class) that are given, not learned."""
    return [f for f in dataclasses.fields(codec) if f.init]


def rows_per_block(dims: int) -> int:
    """How many float32 rows of `dims` make one block."""
    return max(1, BLOCK_BYTES // (4 * max(dims, 1)))


class Codec:
    """Makes vectors small, and gives them back.

    ``fit(x)`` learns from (n, d) vectors and returns self; ``encode(x)`` gives a `Code` with
    one row per item; ``decode(code)`` gives (n, d) float32. Encoding a row never depends on
    the other rows it is encoded with.
    """

    name: ClassVar[str]
    """The name in spec strings and in the catalogue."""
    takes: ClassVar[str] = "vectors"
    """``vectors`` for (n, d) arrays, ``sets`` for a `Ragged` set of vectors per item."""
    cubic: ClassVar[bool] = False
    """Whether `fit` costs O(d³) many times over, which is too much for thousands of dimensions."""

    dims_: int
    """Width d of the vectors this codec was fitted on."""
    written_spec: tuple[str, str] | None = None
    """The spec in the file this codec was read from, and the full spec it stood for then."""

    # -- what a method writes -------------------------------------------------------------

    def _fit(self, x: Any) -> None:
        """Learn from checked input. A codec that learns nothing keeps this."""

    def _encode(self, x: Any) -> State:
        raise NotImplementedError  # abstract

    def _decode(self, code: Code) -> np.ndarray:
        raise NotImplementedError  # abstract

    def _searcher(self, code: Code, metric: str) -> Searcher:
        return DecodingSearcher(self, code, metric)

    def _stored(self, metric: str) -> Stored:
        def decoded(code: Code) -> np.ndarray:
            return np.asarray(self._decode(code), dtype=np.float32)

        # Not cosine, as in `search`: rows of unit length decode to others.
        by = "l2" if metric == "l2" else "ip"
        return Stored("floats", self.dims_, "float32", by, decoded)

    def _faiss_form(self, metric: str) -> FaissForm:
        return flat_form(self._stored(metric))

    def _check_state(self) -> None:
        """Raise ValueError when learned arrays read from a file do not fit together."""

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        """Spec strings worth comparing on `rows` × `dims` vectors, from small to large."""
        return [cls.name]

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        """Ways to spend `size` bytes per item as the last stage of a chain.

        Spec strings, each with the widest vectors it takes within that size: None where
        vectors of any width take the same, so that shortening them first is worth a try, and
        `MOST_DIMS` where that is not, because it shortens them itself.
        """
        return []

    # -- what a user calls ----------------------------------------------------------------

    def fit(self, x: Any) -> Self:
        """Learn from the items `x`; returns self.

        Raises
        ------
        FewbitsError
            Not finite numbers in the right shape, or too few rows for the hyper-parameters.
        """
        for stage in self.stages:
            check_seed(getattr(stage, "seed", 0))
        x = self._checked_kind(x)
        self.dims_ = width(x)
        self.written_spec = None
        try:
            self._fit(x)
        except BaseException:
            del self.dims_  # half of it was learned
            raise
        return self

    def encode(self, x: Any) -> Code:
        """Encode the items `x`; one row of code per item."""
        self.require_fitted()
        return Code(self._encode(self._checked(x)), self.full_spec, self.digest)

    def decode(self, code: Code) -> np.ndarray:
        """(n, d) float32: what `code` remembers of the items."""
        self.check_code(code)
        return np.asarray(self._decode(code), dtype=np.float32)

    def searcher(self, code: Code, metric: str = "cosine") -> Searcher:
        """Prepare `code` for searching with float queries."""
        self.check_code(code)
        return self._searcher(code, check_metric(metric))

    def search(self, code: Code, queries: Any, k: int, metric: str = "cosine") -> Matches:
        """Scores (q, k), best first, and rows (q, k) of the best `k` items per query."""
        from fewbits.core.checks import check_k

        queries = self._checked(queries)
        return self.searcher(code, metric).search(queries, check_k(k, len(code)))

    def stored(self, metric: str = "cosine") -> Stored:
        """In what form a vector store can hold the codes, where `metric` is searched by."""
        self.require_fitted()
        return self._stored(check_metric(metric))

    def faiss_form(self, metric: str = "cosine") -> FaissForm:
        """A faiss index that takes the codes as they are, or decoded where it cannot."""
        self.require_fitted()
        return self._faiss_form(check_metric(metric))

    # -- hyper-parameters and state -------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return {f.name: getattr(self, f.name) for f in hyper_parameters(self)}

    @property
    def stages(self) -> list[Codec]:
        """This codec alone; the links of a chain."""
        return [self]

    @property
    def spec(self) -> str:
        """Short spec string: hyper-parameters that differ from their defaults."""
        values = self.parameters()
        fields = hyper_parameters(self)
        changed = {f.name: values[f.name] for f in fields if values[f.name] != f.default}
        return format_spec(self.name, changed)

    @property
    def full_spec(self) -> str:
        """Spec string with every hyper-parameter, as files hold it."""
        return format_spec(self.name, self.parameters())

    @property
    def file_spec(self) -> str:
        """The full spec, or what the file said where an earlier version had fewer options."""
        written, then = self.written_spec or ("", "")
        return written if then == self.full_spec else self.full_spec

    def state(self) -> State:
        """Learned arrays by name (without the trailing underscore)."""
        self.require_fitted()
        return {name.rstrip("_"): np.asarray(getattr(self, name)) for name in self.learned}

    @property
    def learned(self) -> list[str]:
        """Names of the learned arrays: attributes that end in ``_``."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return [f.name for f in fields if not f.init]

    def _restore(self, dims: int, state: State) -> None:
        self.dims_ = dims
        for name in self.learned:
            setattr(self, name, state[name.rstrip("_")])
        self._check_state()

    @property
    def codec_bytes(self) -> int:
        """Bytes of the learned arrays, paid once however many items there are."""
        return sum(array.nbytes for array in pack_state(self).values())

    @property
    def digest(self) -> str:
        """SHA-256 of hyper-parameters, widths and learned arrays."""
        self.require_fitted()
        return state_digest(self.file_spec, stage_dims(self), pack_state(self))

    def code_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype, shape of one item) of the arrays this codec makes."""
        row = np.full((1, self.dims_), self.dims_**-0.5, dtype=np.float32)
        arrays = self._encode(Ragged(row, np.array([0, 1])) if self.takes == "sets" else row)
        return {name: (array.dtype.name, array.shape[1:]) for name, array in arrays.items()}

    def require_fitted(self) -> None:
        if not hasattr(self, "dims_"):
            raise FewbitsError(f"{self.spec} is not fitted yet; call fit(x) first")

    def check_code(self, code: Code) -> None:
        self.require_fitted()
        if code.codec_digest != self.digest:
            raise FewbitsError(
                f"this code was made by another codec ({code.spec}); decode it with that one"
            )

    def _checked(self, x: Any) -> Any:
        x = self._checked_kind(x)
        if hasattr(self, "dims_") and width(x) != self.dims_:
            raise FewbitsError(
                f"{self.spec} was fitted on {self.dims_} dimensions, but this has {width(x)}"
            )
        return x

    def _checked_kind(self, x: Any) -> Any:
        """Vectors or sets of them, as this codec takes, of any width."""
        if self.takes == "vectors" and isinstance(x, Ragged):
            raise FewbitsError(f"{self.spec} takes vectors, but these are sets of vectors")
        x = check_ragged(x) if self.takes == "sets" else check_vectors(x)
        if width(x) > MOST_DIMS:
            raise FewbitsError(f"vectors have at most {MOST_DIMS:,} dimensions, not {width(x):,}")
        return x

    # -- files ----------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the fitted codec to a ``.fewbits`` file."""
        return container.write(
            path, "codec", {"codec": describe(self)}, pack_state(self), overwrite=overwrite
        )

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read a codec from a file that `save` (or `encode`) wrote."""
        content = container.read(path)
        codec = from_description(content.about.get("codec"), content.arrays, path)
        if not isinstance(codec, cls):
            raise FewbitsError(f"{path} holds {codec.spec}, not a {cls.__name__}")
        return codec


class Transform(Codec):
    """A codec whose code is a shorter float vector per item, so that others can follow it.

    Subclasses write `transform`, `inverse` and, where queries are treated otherwise than
    items, `transform_queries`.
    """

    dims_out_: int
    """Width of what `transform` returns."""

    def transform(self, x: Any) -> np.ndarray:
        """(n, dims_out) float32 of the items."""
        raise NotImplementedError  # abstract

    def transform_queries(self, queries: Any, metric: str) -> np.ndarray:
        """(q, dims_out) float32 whose scores with `transform(x)` rank like those with x."""
        return self.transform(queries)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """(n, d) float32 from what `transform` returned."""
        raise NotImplementedError  # abstract

    def search_metric(self, metric: str) -> str:
        """The metric to compare transformed vectors by, when the user asked for `metric`."""
        return metric

    @classmethod
    def to_width(cls, width: int) -> str:
        """Spec string that gives vectors of `width`; empty where the width is no choice."""
        return ""

    @classmethod
    def openings(cls, dims: int) -> list[tuple[str, int]]:
        """For sets of vectors of `dims`: spec strings worth trying, and the widths they give."""
        return []

    def faiss_steps(self, metric: str) -> Sequence[Any] | None:
        """`transform_queries` as ``faiss.VectorTransform``s, or None where they cannot do it."""
        return None

    def _encode(self, x: Any) -> State:
        return {"vectors": self.transform(x)}

    def _decode(self, code: Code) -> np.ndarray:
        return self.inverse(code["vectors"].astype(np.float32, copy=False))

    def _searcher(self, code: Code, metric: str) -> Searcher:
        inner = FlatSearcher(code["vectors"], self.search_metric(metric))
        return TransformedSearcher(self, inner, metric)

    def _stored(self, metric: str) -> Stored:
        layout = self.code_layout()
        if "vectors" not in layout:
            return super()._stored(metric)
        dtype, (dims,) = layout["vectors"]
        by = "l2" if self.search_metric(metric) == "l2" else "ip"
        plain = Stored("floats", dims, dtype, by, lambda code: code["vectors"])
        return plain.after(lambda queries: self.transform_queries(queries, metric))

    def _faiss_form(self, metric: str) -> FaissForm:
        form = flat_form(self._stored(metric))
        steps = self.faiss_steps(metric)
        if form.queries is None or steps is None:
            return form
        return dataclasses.replace(form, steps=steps, queries=None)


class Chain(Codec):
    """Several transforms, then one last codec, as one codec."""

    name = "chain"

    def __init__(self, stages: Sequence[Codec]) -> None:
        self._stages = list(stages)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self._stages))})"

    @property
    def stages(self) -> list[Codec]:
        return self._stages

    @property
    def takes(self) -> str:  # type: ignore[override]
        return self._stages[0].takes

    @property
    def transforms(self) -> list[Transform]:
        return [typing.cast(Transform, stage) for stage in self._stages[:-1]]

    @property
    def last(self) -> Codec:
        return self._stages[-1]

    def parameters(self) -> dict[str, Any]:
        return {stage.name: stage.parameters() for stage in self._stages}

    @property
    def spec(self) -> str:
        return "+".join(stage.spec for stage in self._stages)

    @property
    def full_spec(self) -> str:
        return "+".join(stage.full_spec for stage in self._stages)

    def state(self) -> State:
        return pack_state(self)

    def _fit(self, x: Any) -> None:
        for transform in self.transforms:
            x = transform.fit(x).transform(x)
        self.last.fit(x)

    def _encode(self, x: Any) -> State:
        for transform, following in zip(self.transforms, self._stages[1:], strict=True):
            x = transform.transform(x)
            if x.shape[1] != following.dims_:
                raise FewbitsError(
                    f"{following.spec} was fitted on {following.dims_} dimensions, but "
                    f"{transform.spec} gives {x.shape[1]}; fit the chain again"
                )
        return self.last._encode(x)

    def _decode(self, code: Code) -> np.ndarray:
        y = self.last._decode(code)
        for transform in reversed(self.transforms):
            y = transform.inverse(y)
        return y

    def _searcher(self, code: Code, metric: str) -> Searcher:
        asked, metric = self._asked_of_each(metric)
        searcher = self.last._searcher(code, metric)
        for transform, given in asked:
            searcher = TransformedSearcher(transform, searcher, given)
        return searcher

    def _asked_of_each(self, metric: str) -> tuple[list[tuple[Transform, str]], str]:
        """The transforms, last one first, with the metric asked of each, and of the last codec."""
        asked = []
        for transform in self.transforms:
            asked.append((transform, metric))
            metric = transform.search_metric(metric)
        return asked[::-1], metric

    def _stored(self, metric: str) -> Stored:
        asked, metric = self._asked_of_each(metric)
        stored = self.last._stored(metric)
        for transform, given in asked:
            stored = stored.after(partial(transform.transform_queries, metric=given))
        return stored

    def _faiss_form(self, metric: str) -> FaissForm:
        asked, metric = self._asked_of_each(metric)
        form = self.last._faiss_form(metric)
        for transform, given in asked:
            queries = partial(transform.transform_queries, metric=given)
            form = form.after(queries, transform.faiss_steps(given))
        return form


def chain(*stages: Codec) -> Codec:
    """Join codecs into one: every stage but the last must be a `Transform`.

    Raises
    ------
    FewbitsError
        No stages, or a stage in front whose code is not a vector.
    """
    flat = [link for stage in stages for link in stage.stages]
    if not flat:
        raise FewbitsError("a chain needs at least one codec")
    for stage in flat[:-1]:
        if not isinstance(stage, Transform):
            raise FewbitsError(
                f"{stage.name} cannot be followed by another codec: its code is not a vector"
            )
    for stage in flat[1:]:
        if stage.takes != "vectors":
            raise FewbitsError(f"{stage.name} takes {stage.takes}; it can only come first")
    return flat[0] if len(flat) == 1 else Chain(flat)


# -- searching -----------------------------------------------------------------------------


class FlatSearcher:
    """Exact search over float vectors held in memory (or mapped from a file)."""

    def __init__(self, vectors: np.ndarray, metric: str) -> None:
        self.vectors, self.metric = vectors, metric

    def search(self, queries: np.ndarray, k: int) -> Matches:
        if self.vectors.dtype == np.float32:
            return search_array(queries, self.vectors, k, self.metric)
        return exact_search(queries, blocks_of(self.vectors), k, self.metric)


class DecodingSearcher:
    """Search that decodes one block of rows at a time. Works for every codec."""

    def __init__(self, codec: Codec, code: Code, metric: str) -> None:
        self.codec, self.code, self.metric = codec, code, metric

    def search(self, queries: np.ndarray, k: int) -> Matches:
        step = rows_per_block(self.codec.dims_)
        starts = range(0, len(self.code), step)
        blocks = (self.codec._decode(self.code.take(slice(s, s + step))) for s in starts)
        return exact_search(queries, blocks, k, self.metric)


class TransformedSearcher:
    """Transforms the queries, then searches what follows the transform."""

    def __init__(self, transform: Transform, inner: Searcher, metric: str) -> None:
        self.transform, self.inner, self.metric = transform, inner, metric

    def search(self, queries: Any, k: int) -> Matches:
        return self.inner.search(self.transform.transform_queries(queries, self.metric), k)


def blocks_of(x: np.ndarray) -> Iterator[np.ndarray]:
    """`x` in blocks of bounded size, as float32."""
    step = rows_per_block(x.shape[1])
    for start in range(0, len(x), step):
        yield np.asarray(x[start : start + step], dtype=np.float32)


def width(x: Vectors) -> int:
    return x.dims if isinstance(x, Ragged) else int(x.shape[1])


# -- spec strings --------------------------------------------------------------------------


def format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}" if float(f"{value:g}") == value else str(value)
    return text.replace("e+", "e")  # a plus begins the next stage


def format_spec(name: str, parameters: dict[str, Any]) -> str:
    pairs = ",".join(f"{key}={format_value(value)}" for key, value in parameters.items())
    return f"{name}:{pairs}" if pairs else name


def parse_value(text: str, kind: Any) -> Any:
    """Read `text` as the annotated type `kind` (int, float, bool, str, Literal, or a union)."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if text == "none" and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is typing.Literal and text in typing.get_args(option):
            return text
        if option is bool and text in ("yes", "no"):
            return text == "yes"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str:
            return text
    raise ValueError(text)


def expected(kind: Any) -> str:
    """What `parse_value` accepts for `kind`, in words."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = {int: "a whole number", float: "a number", bool: "yes or no", type(None): "none"}
    found = []
    for option in options:
        literal = typing.get_origin(option) is typing.Literal
        found.append(
            " or ".join(typing.get_args(option)) if literal else words.get(option, "a word")
        )
    return " or ".join(found)


def build_stage(text: str, trained: bool) -> Codec:
    from fewbits.core.catalogue import codec_class

    name, _, options = text.partition(":")
    return with_options(codec_class(name.strip(), trained=trained), name, options)


def with_options(cls: type[Any], name: str, options: str) -> Any:
    """An instance of a dataclass from its part of a spec string: ``dims=96,center=no``."""
    kinds = typing.get_type_hints(cls)
    names = [f.name for f in hyper_parameters(cls)]
    parameters: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = pair.partition("=")
        if key not in names:
            known = ", ".join(names) or "none"
            raise FewbitsError(f"{name} has no option {key!r}; its options are: {known}")
        if key in parameters:
            raise FewbitsError(f"{name} has option {key!r} twice; give it once")
        try:
            parameters[key] = parse_value(value if equals else "", kinds[key])
        except ValueError:
            raise FewbitsError(
                f"{name}: {key}={value!r} is not valid; {key} is {expected(kinds[key])}"
            ) from None
    return cls(**parameters)


def from_spec(spec: str, *, trained: bool = False) -> Codec:
    """Build the codec that a spec string names, for example ``pca-rag:dims=110+int8``.

    Parameters
    ----------
    trained : its arrays come from a file; packages that only training needs may be missing.

    Raises
    ------
    FewbitsError
        Unknown method or option, a value that does not fit, or a missing extra.
    """
    if not spec.strip():
        raise FewbitsError("the method is empty; `fewbits systems` lists the names")
    if len(spec) > SPEC_LIMIT:
        raise FewbitsError(f"the method is longer than {SPEC_LIMIT} characters; make it shorter")
    return chain(*(build_stage(part, trained) for part in spec.split("+")))


# -- description in files ------------------------------------------------------------------


def pack_state(codec: Codec) -> State:
    """Learned arrays of all stages: ``0.mean``, ``0.components``, ``1.centroids``, …"""
    return {
        f"{number}.{name}": array
        for number, stage in enumerate(codec.stages)
        for name, array in stage.state().items()
    }


def stage_dims(codec: Codec) -> list[int]:
    """Width of what each stage takes."""
    return [stage.dims_ for stage in codec.stages]


def describe(codec: Codec) -> dict[str, Any]:
    """What a file says of a codec, besides its learned arrays.

    Raises
    ------
    FewbitsError
        A hyper-parameter that a reader of the file would understand otherwise, or not at all.
    """
    codec.require_fitted()
    for stage in codec.stages:
        check_readable(stage)
    if len(codec.full_spec) > SPEC_LIMIT:
        raise FewbitsError(f"the options of {codec.stages[0].name} are too long for a file")
    return {"spec": codec.file_spec, "dims": stage_dims(codec), "digest": codec.digest}


def check_readable(stage: Codec) -> None:
    """Refuse hyper-parameters that a spec string does not give back."""
    kinds = typing.get_type_hints(type(stage))
    for key, value in stage.parameters().items():
        text = format_value(value)
        try:
            same = parse_value(text, kinds[key]) == value and not set("+,") & set(text)
        except ValueError:
            same = False
        if not same:
            raise FewbitsError(
                f"{stage.name}: {key}={value!r} cannot be written to a file; {key} is "
                f"{expected(kinds[key])}"
            )


def from_description(about: Any, arrays: State, path: str | Path) -> Codec:
    """The codec that `describe` and `pack_state` put into a file."""
    try:
        codec = from_spec(about["spec"], trained=True)
        dims = about["dims"]
        if not all(type(d) is int and 1 <= d <= MOST_DIMS for d in dims):
            raise ValueError("its widths are not valid")
        for number, (stage, width_in) in enumerate(zip(codec.stages, dims, strict=True)):
            prefix = f"{number}."
            own = {n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)}
            check_finite(own)
            stage._restore(width_in, own)
        codec.dims_ = dims[0]
        codec.written_spec = about["spec"], codec.full_spec
        if codec.digest != about["digest"]:
            raise ValueError("the codec does not match its digest")
        with np.errstate(all="ignore"):
            codec.code_layout()  # encodes a row: what does not fit together shows here
    except FewbitsError:
        raise
    except UNUSABLE as error:
        reason = str(error) or type(error).__name__
        raise FewbitsError(f"{path} does not hold a usable codec ({reason})") from None
    return codec


def check_finite(arrays: State) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} has NaN or infinity")


def state_digest(spec: str, dims: list[int], arrays: State) -> str:
    digest = hashlib.sha256(json.dumps([spec, dims]).encode())
    for name in sorted(arrays):
        array = arrays[name]
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()
