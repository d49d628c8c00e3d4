"""Readers of users' files: any supported file becomes a `Source` of blocks of rows.

A source never holds the whole float matrix: ``.npy``, ``.fvecs``, ``.bvecs`` and
``.safetensors`` are mapped, Parquet, Arrow and ``.npz`` are streamed, and standard input is
copied to a temporary file first.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewbits.core.arrow_readers import open_arrow, open_parquet
from fewbits.core.checks import NUMBERS
from fewbits.core.codec import Vectors
from fewbits.core.errors import FewbitsError
from fewbits.core.locations import (
    SUFFIXES,
    file_stamp,
    fixed_folder,
    is_pattern,
    is_url,
    local_path,
    matching_files,
    url_source,
)
from fewbits.core.npy_header import npy_header
from fewbits.core.source import (
    SeveralTablesError,
    Source,
    check_table,
    choose,
    memory_source,
    readable,
    sharded_source,
)
from fewbits.primitives.ragged import Ragged


def open_source(x: Any, *, column: str | None = None) -> Source:
    """Open an array, a `Ragged`, or a path as a `Source`.

    Parameters
    ----------
    x : (n, d) array, `Ragged`, list of (t_i, d) arrays, path of a file or of a directory of
        shards, a pattern such as ``shards/*.parquet``, a URL that fsspec opens, ``-`` for an
        ``.npy`` on standard input, or ``example:python-docs``.
    column : the array (``.npz``, ``.safetensors``) or column (Parquet, Arrow) to read, where
        there are several.

    Raises
    ------
    FewbitsError
        Missing, unreadable, empty, or of a kind fewbits does not read.
    """
    if isinstance(x, Source):
        return x
    if not isinstance(x, (str, Path)):
        return memory_source(x)
    if str(x) == "-":
        if sys.stdin is None:
            raise FewbitsError("standard input is closed; pipe an .npy into fewbits")
        return stdin_source(sys.stdin.buffer)
    if str(x).startswith("example:"):
        return example_source(str(x))
    if is_url(x):
        return url_source(str(x), column)
    path = local_path(x)
    with readable(path):
        if is_pattern(path):
            return files_source(matching_files(path), path, column)
        if not path.exists():
            raise FewbitsError(f"there is no file {path}")
        if path.is_dir():
            return directory_source(path, column)
        return file_source(path, column)


def file_source(path: Path, column: str | None = None) -> Source:
    """One file of a kind that its name ends with."""
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise FewbitsError(
            f"{path} is not a kind of file fewbits reads; it reads {', '.join(SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise FewbitsError(f"{path} is empty: it has no bytes")
    stamp = file_stamp(path)
    source = opener(path, column)
    # Absolute, because another process may be at home in another folder.
    source.location, source.stamp, source.column = str(path.resolve()), stamp, column
    return source


def open_queries(x: Any, column: str | None = None) -> Source:
    """Open queries; `column` is for files that hold several tables of vectors."""
    try:
        return open_source(x)
    except SeveralTablesError:
        return open_source(x, column=column)


# -- .npy ----------------------------------------------------------------------------------


def open_npy(path: Path, column: str | None = None) -> Source:
    return npy_source(path, path.name)


def npy_source(path: Path, name: str) -> Source:
    with open(path, "rb") as file:
        shape, fortran, dtype = npy_header(file, name)
        offset = file.tell()
    check_table(name, shape, dtype.name)
    needed = offset + math.prod(shape) * dtype.itemsize
    if path.stat().st_size < needed:
        raise FewbitsError(f"{name} is cut short: {path.stat().st_size} bytes of {needed}")

    def read(rows: int) -> Iterator[np.ndarray]:
        return mapped_rows(path, dtype, offset, shape, fortran, rows)

    return Source(name, shape[0], shape[1], dtype.name, read)


def mapped_rows(
    path: str | Path,
    dtype: np.dtype,
    offset: int,
    shape: tuple[int, ...],
    fortran: bool,
    rows: int,
) -> Iterator[np.ndarray]:
    """The table at `offset` of a file, mapped anew for each block, so that pages are given back."""
    for start in range(0, shape[0], rows):
        if fortran:
            yield np.memmap(path, dtype, "r", offset, shape, "F")[start : start + rows]
        else:
            place = offset + start * shape[1] * dtype.itemsize
            yield np.memmap(path, dtype, "r", place, (min(rows, shape[0] - start), shape[1]))


def stdin_source(stream: IO[bytes]) -> Source:
    """An ``.npy`` from a stream, by way of a temporary file that goes with the source."""

    def copy(file: IO[bytes]) -> None:
        shutil.copyfileobj(stream, file, 2**20)

    with readable("standard input"):
        return temporary_npy("standard input", copy)


def temporary_npy(name: str, write: Callable[[IO[bytes]], None]) -> Source:
    """A source called `name`, of an ``.npy`` that `write` writes; the file goes with the source."""
    file = tempfile.NamedTemporaryFile(suffix=".npy")  # noqa: SIM115 - lives as long as the source
    try:
        write(file)
        file.flush()
        source = npy_source(Path(file.name), name)
    except BaseException:
        file.close()
        raise
    source.file = file
    return source


def example_source(name: str) -> Source:
    from fewbits.core import examples

    if name != "example:python-docs":
        raise FewbitsError(f"there is no {name!r}; the built-in example is example:python-docs")
    source = open_parquet(examples.python_docs_path(), "vector")
    source.name = "python-docs"
    return source


# -- .fvecs, .bvecs and .safetensors -------------------------------------------------------


def open_vecs(path: Path, column: str | None = None) -> Source:
    """``.fvecs`` (float32) and ``.bvecs`` (uint8): every row starts with its width, int32."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        dims = int.from_bytes(file.read(4), "little", signed=True)
    itemsize = 4 if path.suffix.lower() == ".fvecs" else 1
    record = 4 + dims * itemsize
    if dims < 1 or size % record:
        raise FewbitsError(
            f"{path} is damaged or cut short: {size} bytes are no rows of {dims} dimensions"
        )
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


SAFETENSORS_DTYPES = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
}


def open_safetensors(path: Path, column: str | None = None) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except SafetensorError as error:
        raise FewbitsError(f"cannot read {path}: {error}") from None
    dtypes = {name: SAFETENSORS_DTYPES.get(dtype, dtype) for name, dtype in dtypes.items()}
    name = choose(path, column, tables_among(shapes, dtypes))
    check_table(path.name, shapes[name], dtypes[name])
    count, dims = shapes[name]

    def read(rows: int) -> Iterator[Vectors]:
        for start in range(0, count, rows):
            # Opened anew, so that the pages of the last block are given back.
            with safe_open(path, framework="numpy") as file:
                yield file.get_slice(name)[start : min(start + rows, count)]

    return Source(path.name, count, dims, dtypes[name], read)


def tables_among(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> list[str]:
    """Names of what can be vectors; tables of another dtype only where there is nothing else."""
    tables = [name for name, shape in shapes.items() if len(shape) == 2]
    return [name for name in tables if dtypes[name] in NUMBERS] or tables


# -- .npz ----------------------------------------------------------------------------------


def open_npz(path: Path, column: str | None = None) -> Source:
    """An ``.npz`` with a table of vectors, or with flat vectors and ``offsets`` (sets)."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                shape, _, dtype = npy_header(file, f"{member} in {path}")
            name = member.removesuffix(".npy")
            shapes[name], dtypes[name] = shape, dtype.name
    name = choose(path, column, tables_among(shapes, dtypes))
    check_table(path.name, shapes[name], dtypes[name])
    count, dims = shapes[name]
    if "offsets" not in shapes:
        return Source(path.name, count, dims, dtypes[name], lambda rows: npz_rows(path, name, rows))
    ends = npz_offsets(path, count)
    return Source(
        path.name,
        len(ends) - 1,
        dims,
        dtypes[name],
        lambda rows: npz_sets(path, name, ends, rows),
        vectors=count,
    )


def npz_offsets(path: Path, vectors: int) -> np.ndarray:
    """The checked offsets of sets: (n + 1,) int64, rising from 0 to `vectors`."""
    with np.load(path, allow_pickle=False) as whole:
        offsets = whole["offsets"]
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise FewbitsError(f"{path}: offsets must be whole numbers, one more than there are sets")
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != vectors or (np.diff(ends) < 1).any():
        raise FewbitsError(
            f"{path}: offsets must rise from 0 to the number of vectors, {vectors}; "
            "every set needs a vector"
        )
    return ends


def npz_rows(path: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """Stream a two-dimensional member of an ``.npz`` without holding it."""
    with zipfile.ZipFile(path) as archive, archive.open(name + ".npy") as file:
        shape, fortran, dtype = npy_header(file, path)
        if fortran:
            # Its rows lie scattered over the whole stream: they are picked from a copy on disk.
            with tempfile.NamedTemporaryFile() as copy:
                shutil.copyfileobj(file, copy, 2**20)
                copy.flush()
                yield from mapped_rows(copy.name, dtype, 0, shape, fortran, rows)
            return
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            want = count * shape[1] * dtype.itemsize
            data = file.read(want)
            if len(data) < want:
                raise FewbitsError(f"{path} is cut short")
            yield np.frombuffer(data, dtype).reshape(count, shape[1])


def npz_sets(path: Path, name: str, ends: np.ndarray, rows: int) -> Iterator[Ragged]:
    """The sets between `ends`, `rows` at a time, cut out of the stream of their vectors."""
    sets = len(ends) - 1
    cuts = np.append(np.arange(0, sets, rows), sets)
    stream = npz_rows(path, name, max(1, int(rows * ends[-1] / sets)))
    held = next(stream)
    for first, last in itertools.pairwise(cuts):
        need, pieces, have = ends[last] - ends[first], [held], len(held)
        while have < need:
            pieces.append(next(stream))
            have += len(pieces[-1])
        joined = np.concatenate(pieces)
        held = joined[need:]
        yield Ragged(joined[:need], ends[first : last + 1] - ends[first])


# -- shards --------------------------------------------------------------------------------


def directory_source(path: Path, column: str | None = None) -> Source:
    """All supported files of a directory, in the order of their names, as one collection."""
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise FewbitsError(f"{path} holds no file that fewbits reads: {', '.join(SUFFIXES)}")
    return files_source(files, path, column)


def files_source(files: list[Path], where: Path, column: str | None = None) -> Source:
    """Files that together are the collection of the directory or pattern `where`."""
    parts = []
    for file in files:
        with readable(file):
            parts.append(file_source(file, column))
    return sharded_source(fixed_folder(where).resolve().name, where, parts)


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


# -- relevance judgements ------------------------------------------------------------------


def read_qrels(path: Path, queries: int, rows: int) -> dict[int, dict[int, float]]:
    """Relevance judgements: query row → {document row: relevance}.

    Each line is TREC's ``query 0 document relevance`` or ``query document relevance``, with
    row numbers counted from 0. A JSON file holds ``{"query": {"document": relevance}}``.

    Raises
    ------
    FewbitsError
        Unreadable, not such a table, or row numbers beyond `queries` and `rows`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = judgements_in_json(text) if path.suffix == ".json" else judgements_in_lines(text)
        judged: dict[int, dict[int, float]] = {}
        for query, document, relevance in table:
            judged.setdefault(int(query), {})[int(document)] = float(relevance)
        if not all(math.isfinite(value) for found in judged.values() for value in found.values()):
            raise ValueError
    except OSError as error:
        raise FewbitsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, OverflowError, AttributeError, TypeError, RecursionError):
        raise FewbitsError(
            f"{path} is not a table of judgements; each line is: query-row document-row relevance"
        ) from None
    if not judged:
        raise FewbitsError(f"{path} holds no judgements")
    inside = all(
        0 <= q < queries and all(0 <= d < rows for d in found) for q, found in judged.items()
    )
    if not inside:
        raise FewbitsError(f"{path}: row numbers must be within {queries} queries and {rows} rows")
    return judged


def judgements_in_json(text: str) -> Iterator[tuple[Any, Any, Any]]:
    for query, found in json.loads(text).items():
        for document, relevance in found.items():
            yield query, document, relevance


def judgements_in_lines(text: str) -> Iterator[tuple[Any, Any, Any]]:
    for line in filter(None, map(str.split, text.splitlines())):
        if len(line) not in (3, 4):
            raise ValueError
        yield line[0], line[-2], line[-1]
