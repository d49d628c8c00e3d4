"""Readers of Parquet and Arrow files: a column of lists becomes vectors, or sets of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewbits.core.codec import Vectors, width
from fewbits.core.errors import FewbitsError
from fewbits.core.source import Source, choose
from fewbits.primitives.ragged import Ragged

BUFFER_BYTES = 2**20

Batches = Callable[[str, int], Iterator[Any]]
"""(column, rows) → the column as Arrow arrays of at most so many rows."""


def open_parquet(path: Path, column: str | None = None) -> Source:
    import pyarrow as pa

    return parquet_source(path, path.name, lambda: pa.OSFile(str(path)), column)


def parquet_source(
    path: object, name: str, opened: Callable[[], IO[bytes]], column: str | None = None
) -> Source:
    """A Parquet file that `opened` opens, wherever it lies; `path` is for messages."""
    import pyarrow.parquet as pq

    with opened() as data, pq.ParquetFile(data) as file:
        schema, about = file.schema_arrow, file.metadata
    chosen, depth = vector_column(path, column, schema)

    def batches(column: str, size: int) -> Iterator[Any]:
        # Otherwise a column is held as a whole for each group of rows, however long.
        with (
            opened() as data,
            pq.ParquetFile(data, buffer_size=BUFFER_BYTES, pre_buffer=False) as file,
        ):
            yield from (b.column(0) for b in file.iter_batches(size, columns=[column]))

    def count_numbers() -> int:
        paths = [about.schema.column(i).path for i in range(about.num_columns)]
        # Beside a column "a" there may be one called "a.b", whose path has more dots.
        mine = min((p.count("."), i) for i, p in enumerate(paths) if p.startswith(f"{chosen}."))[1]
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        return sum(group.column(mine).num_values for group in groups)

    layout = schema, chosen, depth
    return arrow_source(path, name, layout, about.num_rows, batches, count_numbers)


def open_arrow(path: Path, column: str | None = None) -> Source:
    """An Arrow (Feather version 2) file, or an Arrow stream in a file."""
    import pyarrow as pa

    with open(path, "rb") as start:
        is_stream = start.read(6) != b"ARROW1"

    def record_batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as data:
            if is_stream:
                yield from pa.ipc.open_stream(data)
            else:
                file = pa.ipc.open_file(data)
                yield from (file.get_batch(i) for i in range(file.num_record_batches))

    with pa.memory_map(str(path)) as data:
        schema = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(data).schema
    chosen, depth = vector_column(path, column, schema)

    def batches(column: str, size: int) -> Iterator[Any]:
        for batch in record_batches():
            whole = batch.column(column)
            whole.validate(full=True)  # what a file says of its own layout is not to be trusted
            yield from (whole.slice(s, size) for s in range(0, len(whole), size))

    def count_numbers() -> int:
        return sum(len(flatten(whole, depth)) for whole in batches(chosen, 2**31))

    rows = sum(batch.num_rows for batch in record_batches())
    layout = schema, chosen, depth
    return arrow_source(path, path.name, layout, rows, batches, count_numbers)


def arrow_source(
    path: object,
    name: str,
    layout: tuple[Any, str, int],
    rows: int,
    batches: Batches,
    count_numbers: Callable[[], int],
) -> Source:
    """A source called `name`; `layout` is its schema, its column, and how deep that is."""
    schema, column, depth = layout
    if rows == 0:
        raise FewbitsError(f"{path} is empty: it has no rows")
    first = next(filter(len, batches(column, min(rows, 64))), None)
    if first is None:
        raise FewbitsError(f"{path} is damaged: it announces {rows} rows, but has 0")
    dims = width(list_to_vectors(first, column, depth))

    def read(size: int) -> Iterator[Vectors]:
        for batch in filter(len, batches(column, size)):
            block = list_to_vectors(batch, column, depth)
            if width(block) != dims:
                raise FewbitsError(f"column {column!r} has vectors of different widths")
            yield block

    dtype = str(innermost(schema.field(column).type).to_pandas_dtype().__name__)
    vectors = count_numbers() // dims if depth == 2 and dims else None
    return Source(name, rows, dims, dtype, read, vectors=vectors)


# -- columns -------------------------------------------------------------------------------


def vector_column(path: object, asked: str | None, schema: Any) -> tuple[str, int]:
    """The column of vectors (depth 1) or sets of vectors (depth 2) to read."""
    depths = {field.name: vector_depth(field.type) for field in schema}
    name = choose(path, asked, [name for name, depth in depths.items() if depth])
    return name, depths[name]


def is_list(kind: Any) -> bool:
    import pyarrow as pa

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(holds(kind) for holds in kinds)


def vector_depth(kind: Any) -> int:
    """1 for a list of numbers, 2 for a list of those, 0 for anything else."""
    import pyarrow as pa

    depth = 0
    while is_list(kind):
        kind, depth = kind.value_type, depth + 1
    numbers = pa.types.is_floating(kind) or kind in (pa.int8(), pa.uint8())
    return depth if numbers and depth <= 2 else 0


def innermost(kind: Any) -> Any:
    while is_list(kind):
        kind = kind.value_type
    return kind


def flatten(column: Any, depth: int) -> Any:
    for _ in range(depth):
        column = column.flatten()
    return column


def list_to_vectors(column: Any, name: str, depth: int) -> Vectors:
    """An Arrow list array as an (n, d) array, or a nested one as a `Ragged`."""
    import pyarrow.compute as pc

    if depth == 1:
        return list_to_table(column, name)
    if column.null_count:
        raise FewbitsError(f"column {name!r} has rows without vectors; drop them first")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    if (lengths < 1).any():
        raise FewbitsError(f"column {name!r} has an empty set of vectors; drop such rows first")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(list_to_table(column.flatten(), name), offsets)


def list_to_table(column: Any, name: str) -> np.ndarray:
    """An Arrow list array as an (n, d) array, or an error where widths differ or rows miss."""
    import pyarrow.compute as pc

    if column.null_count:
        raise FewbitsError(f"column {name!r} has rows without a vector; drop them first")
    lengths = np.unique(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        widths = ", ".join(map(str, lengths[:5]))
        raise FewbitsError(f"column {name!r} has vectors of different widths: {widths}")
    flat = column.flatten()
    if flat.null_count:
        raise FewbitsError(f"column {name!r} has vectors with missing numbers; repair them first")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), int(lengths[0]))
