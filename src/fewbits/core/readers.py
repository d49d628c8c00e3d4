"""Readers of users' files: any supported file becomes a `Source` of blocks of rows.

A source never holds the whole float matrix: ``.npy``, ``.fvecs``, ``.bvecs`` and
``.safetensors`` are mapped, Parquet, Arrow and ``.npz`` are streamed, and standard input is
copied to a temporary file first.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewbits.core.checks import NUMBERS, check_ragged, check_vectors, unit_rows
from fewbits.core.codec import Vectors, rows_per_block
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged, join

SUFFIXES = (".npy", ".npz", ".parquet", ".arrow", ".feather", ".fvecs", ".bvecs", ".safetensors")


class Source:
    """A collection that can be read again and again, block by block.

    Attributes
    ----------
    name : what to call it in messages.
    rows : number of items, n.
    dims : width of a vector, d.
    dtype : element type in the file.
    takes : ``vectors`` (one vector per item) or ``sets`` (several per item).
    parts : the shards it is made of; a single file is its own only part.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        dims: int,
        dtype: str,
        read: Callable[[int], Iterator[Vectors]],
        *,
        takes: str = "vectors",
        vectors: int | None = None,
        array: np.ndarray | None = None,
        parts: list[Source] | None = None,
    ) -> None:
        if rows < 1 or dims < 1:
            raise FewbitsError(f"{name} is empty: {rows} rows of {dims} dimensions")
        if dtype not in NUMBERS:
            raise FewbitsError(f"{name} has dtype {dtype}; convert to one of {', '.join(NUMBERS)}")
        self.name, self.rows, self.dims, self.dtype, self.takes = name, rows, dims, dtype, takes
        self._vectors = rows if vectors is None else vectors
        self._read, self._array = read, array
        self.parts = parts or [self]

    @property
    def bytes_per_item(self) -> float:
        """Bytes the input itself spends on an item, on average."""
        return self._vectors * self.dims * np.dtype(self.dtype).itemsize / self.rows

    def blocks(self, rows: int | None = None, *, normalize: bool = False) -> Iterator[Any]:
        """All items in order, as checked float32 blocks of at most `rows` items.

        Raises
        ------
        FewbitsError
            NaN or infinity, or a row without direction when `normalize` is set.
        """
        first = 0
        for block in self._read(rows or self.block_rows):
            yield self._checked(block, first, normalize)
            first += len(block)

    @property
    def block_rows(self) -> int:
        return max(1, int(rows_per_block(self.dims) * self.rows / max(self._vectors, 1)))

    def _checked(self, block: Vectors, first: int, normalize: bool) -> Vectors:
        if isinstance(block, Ragged):
            ragged = check_ragged(block, what=self.name)
            return ragged.with_flat(unit_rows(ragged.flat)) if normalize else ragged
        x = check_vectors(block, first_row=first, what=self.name)
        return unit_rows(x, first_row=first, what=self.name) if normalize else x

    def take(self, rows: np.ndarray, *, normalize: bool = False) -> Any:
        """The items `rows` (increasing row numbers), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        if self._array is not None:
            return self._checked(self._array[rows], 0, normalize)
        found, first = [], 0
        for block in self._read(self.block_rows):
            inside = rows[(rows >= first) & (rows < first + len(block))] - first
            if len(inside):
                picked = block.take(inside) if isinstance(block, Ragged) else block[inside]
                found.append(self._checked(picked, first, normalize))
            first += len(block)
        return stack(found)

    def sample(self, count: int, seed: int, *, normalize: bool = False) -> Any:
        """At most `count` items drawn without replacement, in file order."""
        return self.take(sample_rows(self.rows, count, seed), normalize=normalize)

    def everything(self, *, normalize: bool = False) -> Any:
        """All items at once; only for small inputs such as queries."""
        return stack(list(self.blocks(normalize=normalize)))


def sample_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """`count` increasing row numbers out of `rows`."""
    if count >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def stack(blocks: list[Any]) -> Any:
    return join(blocks) if isinstance(blocks[0], Ragged) else np.concatenate(blocks)


# -- opening -------------------------------------------------------------------------------


def open_source(x: Any, *, column: str | None = None) -> Source:
    """Open an array, a `Ragged`, or a path as a `Source`.

    Parameters
    ----------
    x : (n, d) array, `Ragged`, list of (t_i, d) arrays, path of a file or of a directory of
        shards, ``-`` for an ``.npy`` on standard input, or ``example:python-docs``.
    column : the array (``.npz``, ``.safetensors``) or column (Parquet, Arrow) to read, where
        there are several.

    Raises
    ------
    FewbitsError
        Missing, unreadable, empty, or of a kind fewbits does not read.
    """
    if isinstance(x, Source):
        return x
    if isinstance(x, (Ragged, list, tuple)):
        return ragged_source("the input", check_ragged(x))
    if not isinstance(x, (str, Path)):
        return array_source("the input", np.asarray(x))
    if str(x) == "-":
        return stdin_source(sys.stdin.buffer)
    if str(x).startswith("example:"):
        return example_source(str(x))
    path = Path(x)
    if not path.exists():
        raise FewbitsError(f"there is no file {path}")
    if path.is_dir():
        return directory_source(path, column)
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise FewbitsError(
            f"{path} is not a kind of file fewbits reads; it reads {', '.join(SUFFIXES)}"
        )
    try:
        return opener(path, column)
    except FewbitsError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise FewbitsError(f"cannot read {path}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def array_source(name: str, array: np.ndarray) -> Source:
    if array.ndim != 2:
        raise FewbitsError(
            f"{name} must be a table of vectors with 2 axes (items, dimensions), not {array.ndim}"
        )

    def read(rows: int) -> Iterator[Vectors]:
        return (array[start : start + rows] for start in range(0, len(array), rows))

    return Source(name, array.shape[0], array.shape[1], array.dtype.name, read, array=array)


def ragged_source(name: str, ragged: Ragged, dtype: str | None = None) -> Source:
    def read(rows: int) -> Iterator[Vectors]:
        return (ragged[start : start + rows] for start in range(0, len(ragged), rows))

    return Source(
        name,
        len(ragged),
        ragged.dims,
        dtype or ragged.flat.dtype.name,
        read,
        takes="sets",
        vectors=len(ragged.flat),
    )


def open_npy(path: Path, column: str | None = None) -> Source:
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.ndim != 2 or not mapped.flags.c_contiguous:
        return array_source(path.name, mapped)
    return mapped_source(path, mapped.dtype, mapped.shape, mapped.offset)


def mapped_source(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Source:
    """Rows of a table in a file, mapped one window at a time so that pages are given back."""

    def read(rows: int) -> Iterator[np.ndarray]:
        for start in range(0, shape[0], rows):
            count, place = min(rows, shape[0] - start), offset + start * shape[1] * dtype.itemsize
            yield np.memmap(path, dtype, "r", place, (count, shape[1]))

    return Source(path.name, shape[0], shape[1], dtype.name, read)


def stdin_source(stream: IO[bytes]) -> Source:
    """An ``.npy`` from a stream, by way of a temporary file that goes with the process."""
    file = tempfile.NamedTemporaryFile(suffix=".npy")  # noqa: SIM115 - lives as long as the source
    shutil.copyfileobj(stream, file, 2**20)
    file.flush()
    try:
        source = open_npy(Path(file.name))
    except (ValueError, OSError, EOFError):
        raise FewbitsError("standard input is not an .npy file") from None
    source.name = "standard input"
    source._file = file  # type: ignore[attr-defined]
    return source


def example_source(name: str) -> Source:
    from fewbits.core import examples

    if name != "example:python-docs":
        raise FewbitsError(f"there is no {name!r}; the built-in example is example:python-docs")
    source = open_parquet(examples.python_docs_path(), "vector")
    source.name = "python-docs"
    return source


def open_vecs(path: Path, column: str | None = None) -> Source:
    """``.fvecs`` (float32) and ``.bvecs`` (uint8): every row starts with its width, int32."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        dims = int.from_bytes(file.read(4), "little", signed=True)
    itemsize = 4 if path.suffix.lower() == ".fvecs" else 1
    record = 4 + dims * itemsize
    if dims < 1 or size < record or size % record:
        raise FewbitsError(f"{path} is damaged or cut short: {size} bytes, rows of {record} bytes")
    kind = np.dtype([("dims", "<i4"), ("x", "<f4" if itemsize == 4 else "u1", (dims,))])
    count = size // record

    def read(rows: int) -> Iterator[Vectors]:
        for start in range(0, count, rows):
            shape = (min(rows, count - start),)
            part = np.memmap(path, kind, "r", start * record, shape)
            if (part["dims"] != dims).any():
                raise FewbitsError(f"{path} is damaged: its rows have different widths")
            yield part["x"]

    return Source(path.name, count, dims, kind["x"].base.name, read)


def open_safetensors(path: Path, column: str | None = None) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            name = choose(path, column, [n for n, s in shapes.items() if len(s) == 2])
            dtype = file.get_slice(name)[:0].dtype.name
    except SafetensorError as error:
        raise FewbitsError(f"cannot read {path}: {one_line(error)}") from None

    def read(rows: int) -> Iterator[Vectors]:
        with safe_open(path, framework="numpy") as file:
            table = file.get_slice(name)
            for start in range(0, shapes[name][0], rows):
                yield table[start : start + rows]

    return Source(path.name, shapes[name][0], shapes[name][1], dtype, read)


def choose(path: Path, asked: str | None, names: list[str]) -> str:
    """The array or column to read: the asked one, or the only one there is."""
    if asked is not None:
        if asked in names:
            return asked
        raise FewbitsError(f"{path} has no vectors called {asked!r}; it has: {', '.join(names)}")
    if len(names) == 1:
        return names[0]
    if not names:
        raise FewbitsError(f"{path} has no vectors in it")
    raise FewbitsError(
        f"{path} has several tables of vectors; pass --column with one of: {', '.join(names)}"
    )


# -- .npz ----------------------------------------------------------------------------------


def npz_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"unsupported .npy version {version}")


def npz_rows(path: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """Stream a two-dimensional member of an ``.npz`` without holding it."""
    with zipfile.ZipFile(path) as archive, archive.open(name + ".npy") as file:
        shape, fortran, dtype = npz_header(file)
        if fortran and len(shape) > 1:
            with np.load(path, allow_pickle=False) as whole:
                array = whole[name]
            yield from (array[s : s + rows] for s in range(0, len(array), rows))
            return
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            want = count * dtype.itemsize * int(np.prod(shape[1:]))
            data = file.read(want)
            if len(data) < want:
                raise FewbitsError(f"{path} is cut short")
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def open_npz(path: Path, column: str | None = None) -> Source:
    """An ``.npz`` with a table of vectors, or with flat vectors and ``offsets`` (sets)."""
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                shape, _, dtype = npz_header(file)
            headers[member.removesuffix(".npy")] = (shape, dtype)
    tables = [n for n, (shape, kind) in headers.items() if len(shape) == 2 and kind.kind in "fiu"]
    name = choose(path, column, tables)
    shape, dtype = headers[name]
    if "offsets" not in headers:
        return Source(
            path.name, shape[0], shape[1], dtype.name, lambda rows: npz_rows(path, name, rows)
        )
    with np.load(path, allow_pickle=False) as whole:
        offsets = whole["offsets"]
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise FewbitsError(f"{path}: offsets must be whole numbers, one more than there are sets")
    lengths = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != shape[0] or (lengths < 1).any():
        raise FewbitsError(f"{path}: offsets must rise from 0 to the number of vectors, {shape[0]}")
    return Source(
        path.name,
        len(lengths),
        shape[1],
        dtype.name,
        lambda rows: npz_sets(path, name, lengths, rows),
        takes="sets",
        vectors=shape[0],
    )


def npz_sets(path: Path, name: str, lengths: np.ndarray, rows: int) -> Iterator[Ragged]:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.append(np.arange(0, len(lengths), rows), len(lengths))
    held = np.empty((0, 0))
    stream = npz_rows(path, name, max(1, int(rows * lengths.mean())))
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        need, pieces = ends[last] - ends[first], [held] if len(held) else []
        have = len(held)
        while have < need:
            pieces.append(next(stream))
            have += len(pieces[-1])
        joined = np.concatenate(pieces)
        held = joined[need:]
        yield Ragged(joined[:need], ends[first : last + 1] - ends[first])


# -- Parquet and Arrow ---------------------------------------------------------------------


def vector_depth(kind: Any) -> int:
    """1 for a list of numbers, 2 for a list of those, 0 for anything else."""
    import pyarrow as pa

    depth = 0
    while (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        kind, depth = kind.value_type, depth + 1
    numbers = pa.types.is_floating(kind) or kind in (pa.int8(), pa.uint8())
    return depth if numbers and depth <= 2 else 0


def innermost(kind: Any) -> Any:
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind


def list_to_table(column: Any, name: str) -> np.ndarray:
    """An Arrow list array as an (n, d) array, or an error where widths differ or rows miss."""
    import pyarrow.compute as pc

    if column.null_count:
        raise FewbitsError(f"column {name!r} has rows without a vector; drop them first")
    lengths = np.unique(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise FewbitsError(f"column {name!r} has vectors of different widths: {list(lengths[:5])}")
    flat = column.flatten()
    if flat.null_count:
        raise FewbitsError(f"column {name!r} has vectors with missing numbers; repair them first")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), int(lengths[0]))


def list_to_vectors(column: Any, name: str, depth: int) -> Vectors:
    import pyarrow.compute as pc

    if depth == 1:
        return list_to_table(column, name)
    if column.null_count:
        raise FewbitsError(f"column {name!r} has rows without vectors; drop them first")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 1).any():
        raise FewbitsError(f"column {name!r} has an empty set of vectors; drop such rows first")
    return Ragged(list_to_table(column.flatten(), name), offsets)


def open_parquet(path: Path, column: str | None = None) -> Source:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows

    def batches(name: str, size: int) -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            yield from (b.column(0) for b in file.iter_batches(size, columns=[name]))

    return arrow_source(path, column, schema, rows, batches)


def open_arrow(path: Path, column: str | None = None) -> Source:
    import pyarrow as pa

    def reader() -> Any:
        return pa.ipc.open_file(pa.memory_map(str(path)))

    file = reader()
    rows = sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))

    def batches(name: str, size: int) -> Iterator[Any]:
        file = reader()
        for number in range(file.num_record_batches):
            whole = file.get_batch(number).column(name)
            yield from (whole.slice(s, size) for s in range(0, len(whole), size))

    return arrow_source(path, column, file.schema, rows, batches)


def arrow_source(
    path: Path,
    column: str | None,
    schema: Any,
    rows: int,
    batches: Callable[[str, int], Iterator[Any]],
) -> Source:
    depths = {field.name: vector_depth(field.type) for field in schema}
    name = choose(path, column, [n for n, depth in depths.items() if depth])
    depth, kind = depths[name], innermost(schema.field(name).type)
    if rows == 0:
        raise FewbitsError(f"{path} has no rows")
    first = list_to_vectors(next(batches(name, min(rows, 64))), name, depth)
    dims = first.dims if isinstance(first, Ragged) else first.shape[1]

    def read(size: int) -> Iterator[Vectors]:
        for batch in batches(name, size):
            block = list_to_vectors(batch, name, depth)
            if (block.dims if isinstance(block, Ragged) else block.shape[1]) != dims:
                raise FewbitsError(f"column {name!r} has vectors of different widths")
            yield block

    vectors = None
    if depth == 2:
        vectors = round(len(first.flat) / len(first) * rows) if isinstance(first, Ragged) else rows
    return Source(
        path.name,
        rows,
        dims,
        str(kind.to_pandas_dtype().__name__),
        read,
        takes="sets" if depth == 2 else "vectors",
        vectors=vectors,
    )


# -- a directory of shards -----------------------------------------------------------------


def directory_source(path: Path, column: str | None = None) -> Source:
    """All supported files of a directory, in the order of their names, as one collection."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise FewbitsError(f"{path} holds no file that fewbits reads: {', '.join(SUFFIXES)}")
    parts = [open_source(file, column=column) for file in files]
    first = parts[0]
    for part in parts[1:]:
        if (part.dims, part.takes) != (first.dims, first.takes):
            raise FewbitsError(
                f"the files of {path} do not fit together: {first.name} has {first.dims} "
                f"dimensions, {part.name} has {part.dims}"
            )

    def read(rows: int) -> Iterator[Vectors]:
        for part in parts:
            yield from part._read(rows)

    return Source(
        path.name,
        sum(part.rows for part in parts),
        first.dims,
        first.dtype,
        read,
        takes=first.takes,
        vectors=sum(part._vectors for part in parts),
        parts=parts,
    )


OPENERS: dict[str, Callable[[Path, str | None], Source]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".fvecs": open_vecs,
    ".bvecs": open_vecs,
    ".safetensors": open_safetensors,
}


def read_qrels(path: Path, queries: int, rows: int) -> dict[int, dict[int, float]]:
    """Relevance judgements: query row → {document row: relevance}.

    Each line is TREC's ``query 0 document relevance`` or ``query document relevance``, with
    row numbers counted from 0. A JSON file holds ``{"query": {"document": relevance}}``.
    """
    judged: dict[int, dict[int, float]] = {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            table = [
                (query, document, relevance)
                for query, found in json.loads(text).items()
                for document, relevance in found.items()
            ]
        else:
            fields = [line.split() for line in text.splitlines() if line.strip()]
            table = [(f[0], f[-2], f[-1]) for f in fields]
        for query, document, relevance in table:
            judged.setdefault(int(query), {})[int(document)] = float(relevance)
    except OSError as error:
        raise FewbitsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, AttributeError, TypeError):
        raise FewbitsError(
            f"{path} is not a table of judgements; each line is: query-row document-row relevance"
        ) from None
    inside = all(
        0 <= q < queries and all(0 <= d < rows for d in found) for q, found in judged.items()
    )
    if not judged or not inside:
        raise FewbitsError(f"{path}: row numbers must be within {queries} queries and {rows} rows")
    return judged
