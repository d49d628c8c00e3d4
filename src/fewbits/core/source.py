"""`Source`: a collection that is read block by block, wherever it lies."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from fewbits.core.checks import NUMBERS, as_array, as_ragged, check_ragged, check_vectors, unit_rows
from fewbits.core.codec import Vectors
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged, join

BLOCK_BYTES = 16 * 2**20
"""Float bytes read at a time."""
SAMPLED_SHARDS = 64
"""A sample of a collection of more shards reads no more than these: others may be far away."""

UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the parsers of file formats raise where a file is not what it should be."""


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
    bytes_per_item : bytes the input itself spends on an item, on average.
    location : path or URL that another process can open it from; None where there is none.
    column : the array or column read from there, if one was asked for.
    stamp : size and time of that file when it was opened.
    """

    location: str | None = None
    column: str | None = None
    stamp: list[int | str | None] | None = None

    def __init__(
        self,
        name: str,
        rows: int,
        dims: int,
        dtype: str,
        read: Callable[[int], Iterator[Vectors]],
        *,
        vectors: int | None = None,
        array: np.ndarray | None = None,
        parts: list[Source] | None = None,
    ) -> None:
        """`read(b)` gives all rows in blocks of at most b; `vectors` counts those of sets."""
        check_table(name, (rows, dims), dtype)
        self.name, self.rows, self.dims, self.dtype = name, rows, dims, dtype
        self.takes = "vectors" if vectors is None else "sets"
        self.vectors = rows if vectors is None else vectors
        self.bytes_per_item = self.vectors * dims * np.dtype(dtype).itemsize / rows
        if parts:
            self.bytes_per_item = sum(part.bytes_per_item * part.rows for part in parts) / rows
        self._read, self._array, self._parts = read, array, parts
        self.file: IO[bytes] | None = None
        """A temporary file that must live as long as this source."""

    @property
    def parts(self) -> list[Source]:
        # Made when asked for: a source that holds itself would keep its temporary file for long.
        return self._parts or [self]

    @property
    def block_rows(self) -> int:
        """How many items make one block of bounded size."""
        return max(1, int(BLOCK_BYTES / (4 * self.dims) * self.rows / max(self.vectors, 1)))

    def raw_blocks(self, rows: int | None = None) -> Iterator[Any]:
        """All items in order, at most `rows` at a time, as the file has them.

        Raises
        ------
        FewbitsError
            The file cannot be read to its end, or has other rows than it announced.
        """
        count = 0
        with readable(self.name):
            for block in self._read(rows or self.block_rows):
                count += len(block)
                if count > self.rows:
                    break
                yield block
        if count != self.rows:
            has = "more" if count > self.rows else str(count)
            raise FewbitsError(
                f"{self.name} is damaged: it announces {self.rows} rows, but has {has}"
            )

    def numbered_blocks(self, rows: int | None = None) -> Iterator[tuple[Any, np.ndarray]]:
        """The raw blocks, each with the numbers of its items."""
        first = 0
        for block in self.raw_blocks(rows):
            yield block, np.arange(first, first + len(block))
            first += len(block)

    def blocks(self, rows: int | None = None, *, normalize: bool = False) -> Iterator[Any]:
        """All items in order, as checked float32 blocks of at most `rows` items.

        Raises
        ------
        FewbitsError
            NaN or infinity, a row without direction when `normalize` is set, a damaged file.
        """
        for block, numbers in self.numbered_blocks(rows):
            yield self.checked(block, numbers, normalize)

    def checked(self, block: Vectors, rows: np.ndarray, normalize: bool) -> Any:
        """A block as float32; `rows` are the numbers of its items, for messages."""
        if not isinstance(block, Ragged):
            x = check_vectors(block, rows=rows, what=self.name)
            return unit_rows(x, rows=rows, what=self.name) if normalize else x
        ragged = check_ragged(block, rows=rows, what=self.name)
        if not normalize:
            return ragged
        return ragged.with_flat(unit_rows(ragged.flat, rows=rows[ragged.owner], what=self.name))

    def take(self, rows: np.ndarray, *, normalize: bool = False) -> Any:
        """The items `rows` (increasing row numbers, at least one), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        if self._array is not None:
            return self.checked(self._array[rows], rows, normalize)
        table = np.empty((len(rows), self.dims), np.float32) if self.takes == "vectors" else None
        sets, done, first = [], 0, 0
        for block in self.raw_blocks():
            stop = done + int(np.searchsorted(rows[done:], first + len(block)))
            inside = rows[done:stop] - first
            if len(inside):
                picked = block.take(inside) if isinstance(block, Ragged) else block[inside]
                checked = self.checked(picked, rows[done:stop], normalize)
                if table is None:
                    sets.append(checked)
                else:
                    table[done:stop] = checked
            done, first = stop, first + len(block)
            if done == len(rows):
                break
        return join(sets) if table is None else table

    def sample(self, count: int, seed: int, *, normalize: bool = False) -> Any:
        """At most `count` items drawn without replacement, in file order.

        Of many shards only `SAMPLED_SHARDS`, drawn at random, are read.
        """
        if len(self.parts) <= SAMPLED_SHARDS:
            return self.take(sample_rows(self.rows, count, seed), normalize=normalize)
        drawn = [self.parts[i] for i in sample_rows(len(self.parts), SAMPLED_SHARDS, seed)]
        starts = np.cumsum([0] + [part.rows for part in drawn])
        rows = sample_rows(int(starts[-1]), count, seed)
        cuts = np.searchsorted(rows, starts)
        pieces = [
            part.take(rows[cuts[i] : cuts[i + 1]] - starts[i], normalize=normalize)
            for i, part in enumerate(drawn)
            if cuts[i] < cuts[i + 1]
        ]
        return np.concatenate(pieces) if self.takes == "vectors" else join(pieces)

    def everything(self, *, normalize: bool = False) -> Any:
        """All items at once; only for small inputs such as queries."""
        return self.take(np.arange(self.rows), normalize=normalize)


def sample_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """`count` increasing row numbers out of `rows`."""
    if count >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def check_table(name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse what is not a table of vectors with something in it.

    Raises
    ------
    FewbitsError
        Another number of axes, no rows, no columns, or a dtype that is not taken.
    """
    if len(shape) != 2:
        raise FewbitsError(
            f"{name} must be a table of vectors with 2 axes (items, dimensions), not {len(shape)}"
        )
    if dtype not in NUMBERS:
        raise FewbitsError(f"{name} has dtype {dtype}; convert it to one of {', '.join(NUMBERS)}")
    if min(shape) < 1:
        raise FewbitsError(f"{name} is empty: {shape[0]} rows of {shape[1]} dimensions")


@contextlib.contextmanager
def readable(what: object) -> Iterator[None]:
    """Turn what a parser says about a bad file into one line."""
    try:
        yield
    except FewbitsError:
        raise
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        line = (str(reason) or type(error).__name__).strip().splitlines()[0]
        raise FewbitsError(f"cannot read {what}: {line}") from None


class SeveralTablesError(FewbitsError):
    """A file has several tables of vectors, and none was asked for."""


def choose(path: object, asked: str | None, names: list[str]) -> str:
    """The array or column to read: the asked one, or the only one there is."""
    if asked is not None:
        if asked in names:
            return asked
        known = ", ".join(names) or "none"
        raise FewbitsError(f"{path} has no vectors called {asked!r}; it has: {known}")
    if len(names) == 1:
        return names[0]
    if not names:
        raise FewbitsError(f"{path} has no table of vectors in it")
    raise SeveralTablesError(
        f"{path} has several tables of vectors; pass --column with one of: {', '.join(names)}"
    )


# -- shards --------------------------------------------------------------------------------


def sharded_source(name: str, where: object, parts: list[Source]) -> Source:
    """The shards found at `where`, one after another, as one collection.

    Raises
    ------
    FewbitsError
        Shards of different widths or kinds.
    """
    first = parts[0]
    for part in parts[1:]:
        if (part.dims, part.takes) != (first.dims, first.takes):
            raise FewbitsError(
                f"the files of {where} do not fit together: {first.name} has {first.takes} of "
                f"{first.dims} dimensions, {part.name} has {part.takes} of {part.dims}"
            )

    def read(rows: int) -> Iterator[Vectors]:
        for part in parts:
            yield from part.raw_blocks(rows)

    return Source(
        name,
        sum(part.rows for part in parts),
        first.dims,
        max((part.dtype for part in parts), key=lambda dtype: np.dtype(dtype).itemsize),
        read,
        vectors=sum(part.vectors for part in parts) if first.takes == "sets" else None,
        parts=parts,
    )


# -- what is in memory already -------------------------------------------------------------


def array_source(name: str, array: np.ndarray) -> Source:
    """A table in memory."""
    check_table(name, array.shape, array.dtype.name)

    def read(rows: int) -> Iterator[Vectors]:
        return (array[start : start + rows] for start in range(0, len(array), rows))

    return Source(name, array.shape[0], array.shape[1], array.dtype.name, read, array=array)


def ragged_source(name: str, ragged: Ragged) -> Source:
    """Sets of vectors in memory."""

    def read(rows: int) -> Iterator[Vectors]:
        return (ragged[start : start + rows] for start in range(0, len(ragged), rows))

    dtype, vectors = ragged.flat.dtype.name, len(ragged.flat)
    return Source(name, len(ragged), ragged.dims, dtype, read, vectors=vectors)


def memory_source(x: Any) -> Source:
    """Whatever Python object holds vectors (a list of them, a tensor) or sets of vectors."""
    name = "the input"
    if isinstance(x, Ragged):
        return ragged_source(name, as_ragged(x, name))
    if isinstance(x, (list, tuple)) and len(x) > 0 and as_array(x[0], name).ndim >= 2:
        return ragged_source(name, as_ragged(x, name))
    return array_source(name, as_array(x, name))
