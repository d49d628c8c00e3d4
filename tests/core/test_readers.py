"""Every kind of file gives exactly what another program wrote, or one line that says why."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from fewbits.core.errors import FewbitsError
from fewbits.core.examples import python_docs
from fewbits.core.readers import SUFFIXES, open_queries, open_source, read_qrels
from fewbits.core.source import Source
from fewbits.primitives.ragged import Ragged

ROWS, DIMS = 37, 5
DTYPES = ("float16", "float32", "float64", "int8", "uint8")
SIZES = (1, 4, 36, 37, 1000, None)
OFFSETS = np.array([0, 2, 3, 9, 10, 17, 21, 22, 30, 36, 37])

Write = Callable[[Path, np.ndarray], object]


@pytest.fixture
def x() -> np.ndarray:
    """(37, 5) float32 of numbers that every dtype holds exactly."""
    return table("float32")


def table(dtype: str) -> np.ndarray:
    return (np.arange(ROWS * DIMS) * 7 % 101).reshape(ROWS, DIMS).astype(dtype)


def set_lists(x: np.ndarray) -> list[list[list[Any]]]:
    """The rows as 10 sets of 1 to 8 vectors, as Python lists."""
    return [x[a:b].tolist() for a, b in itertools.pairwise(OFFSETS)]


# -- writers of other programs -------------------------------------------------------------


def element(x: np.ndarray) -> pa.DataType:
    return pa.from_numpy_dtype(x.dtype)


def column_of_lists(x: np.ndarray) -> pa.Table:
    return pa.table({"v": pa.array(list(x), pa.list_(element(x)))})


def column_of_large_lists(x: np.ndarray) -> pa.Table:
    return pa.table({"v": pa.array(list(x), pa.large_list(element(x)))})


def column_of_fixed_lists(x: np.ndarray) -> pa.Table:
    return pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])})


def write_parquet(make: Callable[[np.ndarray], pa.Table]) -> Write:
    return lambda path, x: pq.write_table(make(x), path, row_group_size=10)


def write_feather(make: Callable[[np.ndarray], pa.Table], **options: Any) -> Write:
    return lambda path, x: feather.write_feather(make(x), str(path), chunksize=10, **options)


def write_arrow(make: Callable[[np.ndarray], pa.Table], opener: Any) -> Write:
    def write(path: Path, x: np.ndarray) -> None:
        whole = make(x)
        with opener(str(path), whole.schema) as writer:
            writer.write_table(whole, max_chunksize=10)

    return write


def write_vecs(path: Path, x: np.ndarray) -> None:
    letter = "f" if path.suffix == ".fvecs" else "B"
    with open(path, "wb") as file:
        for row in x.tolist():
            file.write(struct.pack(f"<i{len(row)}{letter}", len(row), *row))


TABLES: dict[str, Write] = {
    "c.npy": np.save,
    "fortran.npy": lambda path, x: np.save(path, np.asfortranarray(x)),
    "big_endian.npy": lambda path, x: np.save(path, x.astype(x.dtype.newbyteorder(">"))),
    "one.npz": lambda path, x: np.savez(path, v=x),
    "fortran.npz": lambda path, x: np.savez(path, v=np.asfortranarray(x)),
    "big_endian.npz": lambda path, x: np.savez(path, v=x.astype(x.dtype.newbyteorder(">"))),
    "compressed.npz": lambda path, x: np.savez_compressed(path, x, np.arange(len(x))),
    "list.parquet": write_parquet(column_of_lists),
    "large_list.parquet": write_parquet(column_of_large_lists),
    "fixed_size_list.parquet": write_parquet(column_of_fixed_lists),
    "list.feather": write_feather(column_of_lists),
    "fixed_size_list.feather": write_feather(column_of_fixed_lists, compression="uncompressed"),
    "large_list.arrow": write_arrow(column_of_large_lists, pa.ipc.new_file),
    "fixed_size_list.arrow": write_arrow(column_of_fixed_lists, pa.ipc.new_file),
    "stream.arrow": write_arrow(column_of_lists, pa.ipc.new_stream),
    "fixed_stream.arrow": write_arrow(column_of_fixed_lists, pa.ipc.new_stream),
    "x.safetensors": lambda path, x: save_file({"v": x}, path),
}


def nested(outer: Any, inner: Any) -> Callable[[np.ndarray], pa.Table]:
    return lambda x: pa.table({"v": pa.array(set_lists(x), outer(inner(element(x))))})


def fixed(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind, DIMS)


SETS: dict[str, Write] = {
    "offsets.npz": lambda path, x: np.savez(path, v=x, offsets=OFFSETS),
    "fortran.npz": lambda path, x: np.savez(path, v=np.asfortranarray(x), offsets=OFFSETS),
    "small_offsets.npz": lambda path, x: np.savez_compressed(
        path, offsets=OFFSETS.astype(np.uint8), v=x
    ),
    "list.parquet": write_parquet(nested(pa.list_, pa.list_)),
    "large_list.parquet": write_parquet(nested(pa.large_list, pa.list_)),
    "fixed_size_list.parquet": write_parquet(nested(pa.list_, fixed)),
    "list.feather": write_feather(nested(pa.list_, pa.list_)),
    "fixed_size_list.arrow": write_arrow(nested(pa.large_list, fixed), pa.ipc.new_file),
    "stream.arrow": write_arrow(nested(pa.list_, pa.large_list), pa.ipc.new_stream),
}


# -- what every source must be -------------------------------------------------------------


def check_source(source: Source, x: np.ndarray) -> None:
    """That a source is exactly the vectors `x`, however it is read."""
    assert (source.takes, source.rows, source.dims) == ("vectors", *x.shape)
    assert (source.dtype, source.bytes_per_item) == (x.dtype.name, x.itemsize * x.shape[1])
    json.dumps([source.rows, source.dims, source.bytes_per_item])  # no numbers of NumPy
    for size in SIZES:
        blocks = list(source.raw_blocks(size))
        assert all(0 < len(block) <= (size or len(x)) for block in blocks)
        read = np.concatenate(blocks)
        assert read.dtype.name == x.dtype.name
        np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(source.everything(), x.astype(np.float32))
    rows = np.array([0, len(x) // 2, len(x) - 1])
    np.testing.assert_array_equal(source.take(rows), x[rows].astype(np.float32))


def check_set_source(source: Source, x: np.ndarray) -> None:
    """That a source is exactly the sets of `set_lists`, however it is read."""
    sets = set_lists(x)
    assert (source.takes, source.rows, source.dims) == ("sets", len(sets), DIMS)
    assert (source.vectors, source.dtype) == (len(x), x.dtype.name)
    assert source.bytes_per_item == x.nbytes / len(sets)
    for size in (1, 3, 10, None):
        blocks = list(source.raw_blocks(size))
        assert all(isinstance(block, Ragged) and len(block) <= (size or 10) for block in blocks)
        assert [item.tolist() for block in blocks for item in block] == sets
    chosen = [item.tolist() for item in source.take(np.array([1, 4, 9]))]
    assert chosen == [sets[1], sets[4], sets[9]]


def refused(path: Path | str, **options: Any) -> str:
    """The one line that says why a file cannot be read to its end."""
    with pytest.raises(FewbitsError) as caught:
        for _ in open_source(path, **options).blocks(4):
            pass
    says = str(caught.value)
    assert says.strip()
    assert "\n" not in says
    return says


# -- tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLES)
def test_file_gives_exactly_what_was_written(tmp_path: Path, name: str, dtype: str) -> None:
    TABLES[name](tmp_path / name, table(dtype))
    source = open_source(tmp_path / name)
    assert source.name == name
    check_source(source, table(dtype))


@pytest.mark.parametrize(("suffix", "dtype"), [("fvecs", "float32"), ("bvecs", "uint8")])
def test_vecs_give_exactly_what_was_written(tmp_path: Path, suffix: str, dtype: str) -> None:
    write_vecs(tmp_path / f"x.{suffix}", table(dtype))
    check_source(open_source(tmp_path / f"x.{suffix}"), table(dtype))


@pytest.mark.parametrize("name", [*TABLES, "x.fvecs"])
def test_one_row_is_a_table(tmp_path: Path, x: np.ndarray, name: str) -> None:
    TABLES.get(name, write_vecs)(tmp_path / name, x[:1])
    check_source(open_source(tmp_path / name), x[:1])


@pytest.mark.parametrize("name", TABLES)
def test_one_dimension_is_a_table(tmp_path: Path, x: np.ndarray, name: str) -> None:
    TABLES[name](tmp_path / name, x[:, :1].copy())
    check_source(open_source(tmp_path / name), x[:, :1])


@pytest.mark.parametrize("kind", [str, Path])
def test_path_may_be_text_and_suffix_in_capitals(tmp_path: Path, x: np.ndarray, kind: Any) -> None:
    with open(tmp_path / "X.NPY", "wb") as file:
        np.save(file, x)
    check_source(open_source(kind(tmp_path / "X.NPY")), x)


def test_newer_npy_headers_are_read(tmp_path: Path, x: np.ndarray) -> None:
    for version in ((2, 0), (3, 0)):
        with open(tmp_path / "x.npy", "wb") as file:
            np.lib.format.write_array(file, x, version=version)
        check_source(open_source(tmp_path / "x.npy"), x)


def test_a_source_is_opened_already(x: np.ndarray) -> None:
    source = open_source(x)
    assert open_source(source) is source


# -- sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
def test_file_of_sets_gives_exactly_what_was_written(tmp_path: Path, name: str, dtype: str) -> None:
    SETS[name](tmp_path / name, table(dtype))
    check_set_source(open_source(tmp_path / name), table(dtype))


def test_sets_count_only_their_own_column(tmp_path: Path, x: np.ndarray) -> None:
    sets = set_lists(x)
    columns = {"v": sets, "v.w": [item * 2 for item in sets]}
    for names in (["v", "v.w"], ["v.w", "v"]):
        pq.write_table(pa.table({name: columns[name] for name in names}), tmp_path / "x.parquet")
        for name in names:
            source = open_source(tmp_path / "x.parquet", column=name)
            assert source.vectors == sum(map(len, columns[name]))
            assert [item.tolist() for item in source.everything()] == columns[name]


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 20, 10, ROWS],
        [0, 20, 20, ROWS],
        [1, 20, ROWS],
        [0, 20, ROWS - 1],
        [0, 20, ROWS + 1],
        [-1, 20, ROWS],
        [0],
        [],
        [0.0, 20.0, float(ROWS)],
        [[0, 20, ROWS]],
        [2**63, 20, ROWS],
    ],
)
def test_offsets_that_cut_no_sets_are_refused(
    tmp_path: Path, x: np.ndarray, offsets: list[Any]
) -> None:
    np.savez(tmp_path / "x.npz", v=x, offsets=np.array(offsets))
    says = refused(tmp_path / "x.npz")
    assert "offsets must be whole numbers" in says or "offsets must rise from 0" in says


# -- several tables in one file ------------------------------------------------------------


def test_npz_with_several_tables_is_read_by_name(tmp_path: Path, x: np.ndarray) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, docs=x, titles=x[::-1], labels=np.arange(ROWS), ids=np.ones((ROWS, 1), int))
    check_source(open_source(file, column="docs"), x)
    check_source(open_source(file, column="titles"), x[::-1])
    assert "has several tables of vectors; pass --column with one of: docs, titles" in refused(file)
    says = "has no vectors called 'labels'; it has: docs, titles"
    assert says in refused(file, column="labels")


def test_safetensors_with_several_tensors_is_read_by_name(tmp_path: Path, x: np.ndarray) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": x, "b": x + 1, "bias": x[0], "cube": x[None]}, file)
    check_source(open_source(file, column="b"), x + 1)
    assert "pass --column with one of: a, b" in refused(file)
    assert "has no vectors called 'bias'; it has: a, b" in refused(file, column="bias")


@pytest.mark.parametrize("name", ["x.parquet", "x.feather"])
def test_columns_of_vectors_are_found_among_others(
    tmp_path: Path, x: np.ndarray, name: str
) -> None:
    columns = {
        "text": pa.array(["a"] * ROWS),
        "words": pa.array([["a", "b"]] * ROWS),
        "token_ids": pa.array([[1, 2]] * ROWS),
        "score": pa.array([0.5] * ROWS),
        "point": pa.array([{"x": 1.0}] * ROWS),
        "v": pa.array(x.tolist(), pa.list_(pa.float32())),
    }
    write = pq.write_table if name == "x.parquet" else feather.write_feather
    write(pa.table(columns), str(tmp_path / name))
    check_source(open_source(tmp_path / name), x)
    for column in ("text", "words", "token_ids", "score", "point", "none"):
        says = f"has no vectors called {column!r}; it has: v"
        assert says in refused(tmp_path / name, column=column)


def test_file_without_vectors_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    np.savez(tmp_path / "x.npz", labels=np.arange(3))
    np.savez(tmp_path / "none.npz")
    save_file({"bias": np.ones(3, dtype=np.float32)}, tmp_path / "x.safetensors")
    for name in ("x.parquet", "x.npz", "none.npz", "x.safetensors"):
        assert refused(tmp_path / name).endswith(f"{name} has no table of vectors in it")
    assert "it has: none" in refused(tmp_path / "x.parquet", column="text")


def test_queries_need_the_column_only_where_there_are_several(
    tmp_path: Path, x: np.ndarray
) -> None:
    np.save(tmp_path / "one.npy", x)
    np.savez(tmp_path / "one.npz", other=x)
    np.savez(tmp_path / "two.npz", docs=x + 1, queries=x)
    for name in ("one.npy", "one.npz", "two.npz"):
        check_source(open_queries(tmp_path / name, "queries"), x)
    with pytest.raises(FewbitsError, match="pass --column with one of: docs, queries"):
        open_queries(tmp_path / "two.npz")
    with pytest.raises(FewbitsError, match="has no vectors called 'third'"):
        open_queries(tmp_path / "two.npz", "third")


# -- files as other people have them -------------------------------------------------------


def test_parquet_as_users_of_sentence_transformers_write_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)).tolist()
    rows = [
        {"id": f"doc-{i}", "title": None, "text": "a passage", "tokens": 12, "embedding": vector}
        for i, vector in enumerate(vectors)
    ]
    written = pa.Table.from_pylist(rows)
    assert written.schema.field("embedding").type == pa.list_(pa.float64())
    pq.write_table(written, tmp_path / "embeddings.parquet", compression="zstd")
    check_source(open_source(tmp_path / "embeddings.parquet"), np.array(vectors))


def test_fvecs_as_the_sift_files_are_laid_out(tmp_path: Path) -> None:
    record = struct.pack("<i", 3) + struct.pack("<3f", 0.5, -1.25, 3e8)
    (tmp_path / "base.fvecs").write_bytes(record + record)
    row = [0.5, -1.25, 3e8]
    check_source(open_source(tmp_path / "base.fvecs"), np.array([row, row], dtype=np.float32))


def test_built_in_example_is_read_like_a_file() -> None:
    example = python_docs()
    source = open_source("example:python-docs")
    assert (source.name, source.dtype) == ("python-docs", "float16")
    np.testing.assert_array_equal(np.concatenate(list(source.blocks(1000))), example.vectors)
    assert "the built-in example is example:python-docs" in refused("example:other")


# -- standard input ------------------------------------------------------------------------


class Piped:
    """What stands for `sys.stdin` while bytes are piped into it."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("name", ["c.npy", "fortran.npy", "big_endian.npy"])
def test_standard_input_is_read_and_leaves_nothing(
    tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written = tmp_path / "x.npy"
    TABLES[name](written, x)
    monkeypatch.setattr(sys, "stdin", Piped(written.read_bytes()))
    written.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = open_source("-")
    assert source.name == "standard input"
    check_source(source, x)
    assert len(list(tmp_path.iterdir())) == 1
    del source
    assert list(tmp_path.iterdir()) == []


def test_standard_input_that_is_no_table_is_refused(
    tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    np.save(file, x)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for content in (b"", b"garbage", file.getvalue()[:100], file.getvalue()[:-1]):
        monkeypatch.setattr(sys, "stdin", Piped(content))
        assert refused("-").startswith("standard input is ")
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-") == "standard input is closed; pipe an .npy into fewbits"
    assert list(tmp_path.iterdir()) == []


# -- a directory of shards -----------------------------------------------------------------


def test_directory_is_its_files_in_the_order_of_their_names(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "part-2.npy", x[10:11])
    TABLES["list.parquet"](tmp_path / "part-3.parquet", x[11:])
    np.savez(tmp_path / "part-1.npz", v=x[:10])
    np.save(tmp_path / ".hidden.npy", x)
    (tmp_path / "README.txt").write_text("about the shards")
    (tmp_path / "older.npy").mkdir()
    source = open_source(tmp_path)
    check_source(source, x)
    assert source.name == tmp_path.name
    assert [part.name for part in source.parts] == ["part-1.npz", "part-2.npy", "part-3.parquet"]
    assert [part.rows for part in source.parts] == [10, 1, 26]


def test_directory_of_sets_is_one_collection(tmp_path: Path, x: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", v=x[:9], offsets=OFFSETS[:4])
    sets = pa.array(set_lists(x)[3:], pa.list_(pa.list_(pa.float32())))
    pq.write_table(pa.table({"v": sets}), tmp_path / "b.parquet")
    check_set_source(open_source(tmp_path), x)


def test_directory_of_several_dtypes_has_the_widest(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", x[:7].astype(np.float16))
    np.save(tmp_path / "b.npy", x[7:])
    source = open_source(tmp_path)
    assert source.dtype == "float32"
    assert source.bytes_per_item == pytest.approx((7 * 2 + 30 * 4) * DIMS / ROWS)
    np.testing.assert_array_equal(source.everything(), x)


def test_column_holds_for_every_file_of_a_directory(tmp_path: Path, x: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", v=x[:7], w=x[:7])
    np.savez(tmp_path / "b.npz", v=x[7:], w=x[7:])
    check_source(open_source(tmp_path, column="w"), x)
    assert "a.npz has several tables of vectors" in refused(tmp_path)


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path, x: np.ndarray) -> None:
    assert "holds no file that fewbits reads: .npy, .npz" in refused(tmp_path)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[:, :3])
    says = "do not fit together: a.npy has vectors of 5 dimensions, b.npy has vectors of 3"
    assert says in refused(tmp_path)
    (tmp_path / "b.npy").unlink()
    np.savez(tmp_path / "b.npz", v=x, offsets=OFFSETS)
    assert "a.npy has vectors of 5 dimensions, b.npz has sets of 5" in refused(tmp_path)
    (tmp_path / "b.npz").write_bytes(b"")
    assert "b.npz is empty: it has no bytes" in refused(tmp_path)


def test_row_of_a_directory_is_counted_through_its_files(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", x)
    x[3, 1] = np.nan
    np.save(tmp_path / "b.npy", x)
    assert f"row {ROWS + 3} of {tmp_path.name} has NaN" in refused(tmp_path)


# -- lists with holes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kind", "says"),
    [
        ([[1, 2], None], pa.list_(pa.float32()), "column 'v' has rows without a vector"),
        ([None, None], pa.list_(pa.float32()), "column 'v' has rows without a vector"),
        ([[1, 2], None], pa.list_(pa.float32(), 2), "column 'v' has rows without a vector"),
        ([[1, 2], [3, None]], pa.list_(pa.float32()), "has vectors with missing numbers"),
        ([[1, 2], [3, None]], pa.list_(pa.float32(), 2), "has vectors with missing numbers"),
        ([[1, 2], [3, None]], pa.list_(pa.int8()), "has vectors with missing numbers"),
        ([[1, 2], [3]], pa.list_(pa.float32()), "has vectors of different widths: 1, 2"),
        ([[1, 2], []], pa.large_list(pa.float32()), "has vectors of different widths: 0, 2"),
        ([[], []], pa.list_(pa.float32()), "is empty: 2 rows of 0 dimensions"),
        ([], pa.list_(pa.float32()), "is empty: it has no rows"),
        ([[[1, 2]], None], pa.list_(pa.list_(pa.float32())), "has rows without vectors"),
        ([[[1, 2]], []], pa.list_(pa.list_(pa.float32())), "has an empty set of vectors"),
        ([[[1, 2], None]], pa.list_(pa.list_(pa.float32())), "has rows without a vector"),
        ([[[1, 2], [3, None]]], pa.list_(pa.list_(pa.float32())), "with missing numbers"),
        ([[[1, 2], [3]]], pa.list_(pa.list_(pa.float32())), "of different widths: 1, 2"),
        ([[[]], [[]]], pa.list_(pa.list_(pa.float32())), "is empty: 2 rows of 0 dimensions"),
    ],
)
@pytest.mark.parametrize("name", ["x.parquet", "x.feather"])
def test_lists_with_holes_are_refused(
    tmp_path: Path, name: str, rows: list[Any], kind: pa.DataType, says: str
) -> None:
    whole = pa.table({"v": pa.array(rows, kind)})
    write = pq.write_table if name == "x.parquet" else feather.write_feather
    write(whole, str(tmp_path / name))
    assert says in refused(tmp_path / name)


def test_width_that_changes_after_the_first_rows_is_refused(tmp_path: Path) -> None:
    rows = [[1.0, 2.0]] * 80 + [[1.0]] * 4
    pq.write_table(pa.table({"v": rows}), tmp_path / "x.parquet")
    assert "column 'v' has vectors of different widths" in refused(tmp_path / "x.parquet")


def test_widths_are_compared_across_the_blocks_of_a_vecs_file(tmp_path: Path) -> None:
    # 5 + 1 rows that look like rows of 2 dimensions, but the last says it has 3.
    right = struct.pack("<i2f", 2, 0.5, 0.5)
    wrong = struct.pack("<i2f", 3, 0.5, 0.5)
    (tmp_path / "x.fvecs").write_bytes(right * 5 + wrong)
    assert "x.fvecs is damaged: its rows have different widths" in refused(tmp_path / "x.fvecs")


# -- damaged, foreign and hostile files ----------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((0, DIMS), "x.npy is empty: 0 rows of 5 dimensions"),
        ((ROWS, 0), "x.npy is empty: 37 rows of 0 dimensions"),
        ((ROWS,), "x.npy must be a table of vectors with 2 axes (items, dimensions), not 1"),
        ((), "not 0"),
        ((2, 3, 4), "not 3"),
    ],
)
def test_npy_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...], says: str) -> None:
    np.save(tmp_path / "x.npy", np.ones(shape))
    assert says in refused(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["one.npz", "x.safetensors", "list.parquet", "stream.arrow"])
def test_table_without_rows_is_refused(tmp_path: Path, x: np.ndarray, name: str) -> None:
    TABLES[name](tmp_path / name, x[:0])
    assert f"{name} is empty" in refused(tmp_path / name)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "U3", "M8[s]", "i4,f4"])
def test_dtype_that_is_not_taken_is_named(tmp_path: Path, dtype: str) -> None:
    array = np.zeros((3, 2), dtype=dtype)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", v=array)
    for name in ("x.npy", "x.npz"):
        says = f"{name} has dtype {array.dtype.name}; convert it to one of float16, float32"
        assert says in refused(tmp_path / name)


def test_dtype_of_a_tensor_that_is_not_taken_is_named(tmp_path: Path) -> None:
    header = {"v": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    says = "x.safetensors has dtype BF16; convert it to one of float16, float32"
    assert says in refused(tmp_path / "x.safetensors")


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_objects_are_never_unpickled(tmp_path: Path, x: np.ndarray) -> None:
    mark = tmp_path / "unpickled"
    bombs = np.array([[Bomb(mark), Bomb(mark)]], dtype=object)
    np.save(tmp_path / "x.npy", bombs, allow_pickle=True)
    np.savez(tmp_path / "x.npz", v=bombs)
    np.savez(tmp_path / "offsets.npz", v=x, offsets=bombs[0])
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb(mark)))
    assert "has dtype object" in refused(tmp_path / "x.npy")
    assert "has dtype object" in refused(tmp_path / "x.npz")
    assert "allow_pickle=False" in refused(tmp_path / "offsets.npz")
    assert "is not an .npy file" in refused(tmp_path / "pickle.npy")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_content_under_a_known_suffix_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    for content in (b"\0", b"text, and no vectors\n", b"%PDF-1.7\n" * 40, bytes(range(256)) * 9):
        file.write_bytes(content)
        refused(file)
    file.write_bytes(b"")
    assert refused(file) == f"{file} is empty: it has no bytes"


def test_one_kind_of_file_under_the_suffix_of_another_is_refused(
    tmp_path: Path, x: np.ndarray
) -> None:
    for name, write in TABLES.items():
        write(tmp_path / name, x)
        content = (tmp_path / name).read_bytes()
        for suffix in SUFFIXES:
            is_own = suffix == Path(name).suffix or {suffix, Path(name).suffix} == {
                ".arrow",
                ".feather",
            }
            if not is_own:
                (tmp_path / f"other{suffix}").write_bytes(content)
                refused(tmp_path / f"other{suffix}")


def test_missing_files_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.npy"
    assert refused(missing) == f"there is no file {missing}"
    for name in ("x.csv", "x.fewbits", "x.npy.gz", "npy"):
        (tmp_path / name).write_bytes(b"content")
        says = f"{name} is not a kind of file fewbits reads; it reads .npy, .npz, .parquet"
        assert says in refused(tmp_path / name)


def read_or_reason(path: Path) -> tuple[np.ndarray, str]:
    """The vectors of a file, as far as they can be read, and why not further."""
    read: list[np.ndarray] = [np.empty((0, DIMS))]
    try:
        for block in open_source(path).blocks(4):
            read += [block] if isinstance(block, np.ndarray) else []
    except FewbitsError as error:
        return read[0], str(error)
    return np.concatenate(read), ""


@pytest.mark.parametrize("name", [*TABLES, "x.fvecs"])
def test_file_that_is_cut_short_is_refused(tmp_path: Path, x: np.ndarray, name: str) -> None:
    file = tmp_path / name
    TABLES.get(name, write_vecs)(file, x)
    whole = file.read_bytes()
    # A stream may end between two of its messages, a file of records between two of those.
    can_end = name in ("stream.arrow", "fixed_stream.arrow", "x.fvecs")
    for length in range(1, len(whole), max(1, len(whole) // 20)):
        file.write_bytes(whole[:length])
        read, says = read_or_reason(file)
        assert "\n" not in says
        assert says or can_end
        np.testing.assert_array_equal(read, x[: len(read)])


@pytest.mark.parametrize("name", [*TABLES, "x.fvecs", "sets/offsets.npz", "sets/list.parquet"])
def test_damaged_file_is_read_or_refused_in_one_line(
    tmp_path: Path, x: np.ndarray, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / Path(name).name
    write = SETS[file.name] if name.startswith("sets") else TABLES.get(name, write_vecs)
    write(file, x)
    whole = np.fromfile(file, np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(25):
        damaged = whole.copy()
        # Headers are at the beginning or at the end.
        near = rng.integers(0, min(200, len(whole)), size=2)
        places = rng.choice([near[0], len(whole) - 1 - near[1]], size=2)
        damaged[places] = rng.choice([0, 1, 127, 255, rng.integers(256)], size=2)
        damaged.tofile(file)
        assert "\n" not in read_or_reason(file)[1]


def test_vecs_with_half_a_row_are_refused(tmp_path: Path, x: np.ndarray) -> None:
    for file, dtype in ((tmp_path / "x.fvecs", "float32"), (tmp_path / "x.bvecs", "uint8")):
        write_vecs(file, x.astype(dtype))
        whole = file.read_bytes()
        for cut in (1, 3, 4):
            file.write_bytes(whole[:-cut])
            says = f"{len(whole) - cut} bytes are no rows of 5 dimensions"
            assert says in refused(file)


def test_arrow_lists_that_reach_beyond_their_values_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.arrow"
    rows = pa.table({"v": [[1.0, 2.0]] * 5})
    feather.write_feather(rows, str(file), compression="uncompressed")
    offsets = np.array([0, 2, 4, 6, 8, 10], dtype=np.int32)
    content = file.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    shifted = (offsets + 10**8).astype(np.int32).tobytes()
    file.write_bytes(content.replace(offsets.tobytes(), shifted))
    refused(file)


def test_npy_header_that_never_ends_is_refused(tmp_path: Path) -> None:
    for header in (b"{'descr': '<f4', 'shape': (2, 2", b"(" * 300, b"-" * 5000 + b"1", b"\0"):
        text = header + b"\n"
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
        (tmp_path / "x.npy").write_bytes(start + text + bytes(16))
        refused(tmp_path / "x.npy")


def test_rows_that_a_file_only_claims_are_not_believed(tmp_path: Path, x: np.ndarray) -> None:
    claims = {"descr": "<f4", "fortran_order": False, "shape": (10**15, DIMS)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, claims)
    content = file.getvalue() + x.tobytes()
    (tmp_path / "x.npy").write_bytes(content)
    assert "x.npy is cut short" in refused(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("v.npy", content)
    assert "x.npz is cut short" in refused(tmp_path / "x.npz")


# -- memory --------------------------------------------------------------------------------


def write_records(path: Path, x: np.ndarray) -> None:
    """As `write_vecs`, all rows at once."""
    widths = np.full((len(x), 1), x.shape[1], dtype="<i4").view(np.uint8)
    np.concatenate([widths, x.view(np.uint8)], axis=1).tofile(path)


def write_one_row_group(path: Path, x: np.ndarray) -> None:
    pq.write_table(column_of_fixed_lists(x), path)


def write_batches(path: Path, x: np.ndarray) -> None:
    feather.write_feather(column_of_fixed_lists(x), str(path), chunksize=2000)


SAME = ("c.npy", "fortran.npy", "one.npz", "fortran.npz", "x.safetensors")
LARGE: dict[str, Write] = {name: TABLES[name] for name in SAME}
LARGE |= {"x.fvecs": write_records, "x.parquet": write_one_row_group, "x.feather": write_batches}


@pytest.mark.parametrize("name", LARGE)
def test_no_reader_holds_the_whole_table(tmp_path: Path, name: str) -> None:
    x = np.random.default_rng(0).standard_normal((60_000, 64), dtype=np.float32)  # 15 MB
    LARGE[name](tmp_path / name, x)
    before = pa.total_allocated_bytes()
    rows, in_arrow = 0, [0]
    tracemalloc.start()
    try:
        for block in open_source(tmp_path / name).blocks(1000):
            rows += len(block)
            in_arrow.append(pa.total_allocated_bytes() - before)
        in_numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == len(x)
    assert in_numpy + max(in_arrow) < 6e6


# -- relevance judgements ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trec.txt", "0 0 3 1\n0 0 5 2\n2 0 3 0\n"),
        ("trec.tsv", "0\tQ0\t3\t1\n\n0\tQ0\t5\t2.0\r\n2\tQ0\t3\t0\n\n"),
        ("three.txt", "0 3 1\n0 5 2\n2 3 0"),
        ("judged.json", '{"0": {"3": 1, "5": 2}, "2": {"3": 0}}'),
    ],
)
def test_judgements_are_read_from_lines_and_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_qrels(tmp_path / name, 3, 6) == {0: {3: 1.0, 5: 2.0}, 2: {3: 0.0}}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.txt", "", "holds no judgements"),
        ("x.txt", "\n\n", "holds no judgements"),
        ("x.json", "{}", "holds no judgements"),
        ("x.txt", "0 1", "each line is: query-row document-row relevance"),
        ("x.txt", "0 0 1 1 1", "is not a table of judgements"),
        ("x.txt", "query-id corpus-id score\n0 1 1", "is not a table of judgements"),
        ("x.txt", "0 1 high", "is not a table of judgements"),
        ("x.txt", "0 1 nan", "is not a table of judgements"),
        ("x.txt", "0 1 inf", "is not a table of judgements"),
        ("x.txt", "0 1.5 1", "is not a table of judgements"),
        ("x.txt", "3 1 1", "row numbers must be within 3 queries and 6 rows"),
        ("x.txt", "0 6 1", "row numbers must be within 3 queries and 6 rows"),
        ("x.txt", "-1 1 1", "row numbers must be within 3 queries and 6 rows"),
        ("x.txt", "0 -1 1", "row numbers must be within 3 queries and 6 rows"),
        ("x.json", "[[0, 1, 1]]", "is not a table of judgements"),
        ("x.json", '{"0": 1}', "is not a table of judgements"),
        ("x.json", '{"0": {"1": null}}', "is not a table of judgements"),
        ("x.json", '{"0": {"1": [1]}}', "is not a table of judgements"),
        ("x.json", '{"0": {"1": 1', "is not a table of judgements"),
        ("x.json", '{"0": {"1": 1' + "0" * 400 + "}}", "is not a table of judgements"),
        ("x.json", "[" * 100_000, "is not a table of judgements"),
    ],
)
def test_other_judgements_are_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FewbitsError, match=re.escape(says)) as caught:
        read_qrels(tmp_path / name, 3, 6)
    assert "\n" not in str(caught.value)


def test_judgements_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe0 1 1")
    with pytest.raises(FewbitsError, match="is not a table of judgements"):
        read_qrels(tmp_path / "x.txt", 3, 6)
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(FewbitsError, match="cannot read"):
            read_qrels(path, 3, 6)
