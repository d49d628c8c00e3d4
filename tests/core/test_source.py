"""`Source`: a collection read block by block, and what is in memory already."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.core import source as source_module
from fewbits.core.errors import FewbitsError
from fewbits.core.source import (
    Source,
    array_source,
    check_table,
    memory_source,
    ragged_source,
    readable,
    sample_rows,
)
from fewbits.primitives.ragged import Ragged

DIMS = 4


@pytest.fixture
def x() -> np.ndarray:
    """(23, 4) float32, all different and none of them zero."""
    return np.arange(1, 1 + 23 * DIMS, dtype=np.float32).reshape(23, DIMS)


@pytest.fixture
def sets(x: np.ndarray) -> Ragged:
    """9 sets of 1 to 5 vectors."""
    return Ragged(x, np.array([0, 1, 3, 4, 9, 11, 12, 17, 19, 23]))


def streamed(x: np.ndarray | Ragged, *, rows: int | None = None, name: str = "docs") -> Source:
    """A source that can only be read in order, as one of a compressed file is."""

    def read(size: int) -> Iterator[Any]:
        return (x[start : start + size] for start in range(0, len(x), size))

    table = x.flat if isinstance(x, Ragged) else x
    return Source(
        name,
        len(x) if rows is None else rows,
        table.shape[1],
        table.dtype.name,
        read,
        vectors=len(table) if isinstance(x, Ragged) else None,
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def same_sets(a: Ragged, b: Ragged) -> bool:
    return np.array_equal(a.flat, b.flat) and np.array_equal(a.offsets, b.offsets)


# -- blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 22, 23, 24, None])
@pytest.mark.parametrize("make", [streamed, lambda x: array_source("docs", x)])
def test_blocks_are_the_rows_in_order(make: Any, x: np.ndarray, rows: int | None) -> None:
    blocks = list(make(x.astype(np.float64)).blocks(rows))
    assert all(block.dtype == np.float32 for block in blocks)
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), x)


@pytest.mark.parametrize("rows", [1, 4, 9, None])
def test_blocks_of_sets_are_the_sets_in_order(sets: Ragged, rows: int | None) -> None:
    for source in (streamed(sets), ragged_source("docs", sets)):
        assert (source.takes, source.rows, source.vectors, source.dims) == ("sets", 9, 23, DIMS)
        blocks = list(source.blocks(rows))
        assert all(len(block) <= (rows or 9) for block in blocks)
        assert [s.tolist() for block in blocks for s in block] == [s.tolist() for s in sets]


def test_blocks_have_a_bounded_size_by_themselves(
    x: np.ndarray, sets: Ragged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 10 * 4 * DIMS)
    assert [len(block) for block in streamed(x).raw_blocks()] == [10, 10, 3]
    # 23 vectors in 9 sets: 10 vectors are 3.9 sets on average.
    assert [len(block) for block in streamed(sets).raw_blocks()] == [3, 3, 3]
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 1)
    assert [len(block) for block in streamed(x).raw_blocks()] == [1] * 23


def test_blocks_can_be_read_again_and_again(x: np.ndarray) -> None:
    source = streamed(x)
    first = source.blocks(5)
    next(first)
    assert len(list(source.blocks(5))) == len(list(source.blocks(5))) == 5
    assert len(list(first)) == 4


def test_normalized_blocks_have_unit_rows(x: np.ndarray, sets: Ragged) -> None:
    blocks = list(streamed(x).blocks(5, normalize=True))
    np.testing.assert_allclose(np.concatenate(blocks), unit(x), rtol=1e-6)
    (block,) = streamed(sets).blocks(normalize=True)
    np.testing.assert_allclose(block.flat, unit(x), rtol=1e-6)
    assert block.offsets.tolist() == sets.offsets.tolist()


@pytest.mark.parametrize("rows", [1, 5, None])
def test_unusable_row_is_named_by_its_place_in_the_file(x: np.ndarray, rows: int | None) -> None:
    zeros = x.copy()
    zeros[17] = 0
    x[17, 2] = np.nan
    with pytest.raises(FewbitsError, match="row 17 of docs has NaN"):
        list(streamed(x).blocks(rows))
    with pytest.raises(FewbitsError, match="row 17 of docs is all zeros"):
        list(streamed(zeros).blocks(rows, normalize=True))
    assert len(list(streamed(zeros).blocks(rows))) > 0


def test_unusable_set_is_named_by_its_place_in_the_file(x: np.ndarray, sets: Ragged) -> None:
    x[17] = 0
    with pytest.raises(FewbitsError, match="row 7 of docs is all zeros"):
        list(streamed(sets).blocks(2, normalize=True))
    x[17] = np.inf
    with pytest.raises(FewbitsError, match="row 7 of docs has NaN, infinity"):
        list(streamed(sets).blocks(2))


@pytest.mark.parametrize(
    ("announced", "has"), [(24, "23"), (1000, "23"), (22, "more"), (1, "more")]
)
def test_file_with_other_rows_than_it_announces_is_damaged(
    x: np.ndarray, announced: int, has: str
) -> None:
    blocks: list[np.ndarray] = []
    says = f"docs is damaged: it announces {announced} rows, but has {has}"
    with pytest.raises(FewbitsError, match=says):
        blocks.extend(streamed(x, rows=announced).blocks(5))
    assert sum(map(len, blocks)) <= announced  # nobody gets more rows than there is room for
    with pytest.raises(FewbitsError, match="docs is damaged"):
        streamed(x, rows=24).take(np.array([3, 23]))


# -- chosen rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0], [22], [3, 4, 5], [0, 9, 10, 22], list(range(23)), [2, 2, 7]])
def test_take_gives_the_rows_asked_for(
    x: np.ndarray, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 5 * 4 * DIMS)
    for source in (streamed(x), array_source("docs", x)):
        taken = source.take(np.array(rows))
        assert taken.dtype == np.float32
        np.testing.assert_array_equal(taken, x[rows])
        np.testing.assert_allclose(
            source.take(np.array(rows), normalize=True), unit(x[rows]), rtol=1e-6
        )


def test_take_gives_the_sets_asked_for(sets: Ragged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 5 * 4 * DIMS)
    for source in (streamed(sets), ragged_source("docs", sets)):
        for rows in ([0], [8], [1, 2, 6], list(range(9))):
            assert same_sets(source.take(np.array(rows)), sets.take(np.array(rows)))


def test_take_reads_no_further_than_the_last_row(x: np.ndarray) -> None:
    reached: list[int] = []

    def read(size: int) -> Iterator[np.ndarray]:
        for row in range(23):
            reached.append(row)
            yield x[row : row + 1]

    Source("docs", 23, DIMS, "float32", read).take(np.array([2, 6]))
    assert reached == list(range(7))


def test_take_checks_only_what_it_takes(x: np.ndarray) -> None:
    x[3] = np.nan
    for source in (streamed(x), array_source("docs", x)):
        assert len(source.take(np.array([2, 4]))) == 2
        with pytest.raises(FewbitsError, match="row 3 of docs has NaN"):
            source.take(np.array([2, 3]))


def test_sample_draws_without_replacement_by_seed(x: np.ndarray) -> None:
    source = streamed(x)
    drawn = source.sample(10, seed=1)
    numbers = (drawn[:, 0] - 1) / DIMS
    assert (np.diff(numbers) > 0).all()
    np.testing.assert_array_equal(source.sample(10, seed=1), drawn)
    assert not np.array_equal(source.sample(10, seed=2), drawn)
    for count in (23, 1000):
        np.testing.assert_array_equal(source.sample(count, seed=1), x)
    np.testing.assert_array_equal(source.everything(), x)


def test_sampled_rows_rise_and_every_row_has_its_chance() -> None:
    rows = sample_rows(10**12, 1000, seed=0)  # in no more memory than the sample takes
    assert len(rows) == 1000
    assert (np.diff(rows) > 0).all()
    assert rows[0] < 10**10 < 99 * 10**10 < rows[-1]
    drawn = np.concatenate([sample_rows(20, 5, seed) for seed in range(400)])
    counts = np.bincount(drawn, minlength=20)
    assert counts.min() > 60  # 100 are expected, with a standard deviation of 9
    assert counts.max() < 140


# -- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float64", 8), ("uint8", 1)])
def test_bytes_per_item_are_those_of_the_input(
    x: np.ndarray, sets: Ragged, dtype: str, size: int
) -> None:
    assert array_source("docs", x.astype(dtype)).bytes_per_item == DIMS * size
    of_sets = ragged_source("docs", sets.with_flat(x.astype(dtype)))
    assert of_sets.bytes_per_item == 23 * DIMS * size / 9


def test_parts_give_the_average_bytes_per_item(x: np.ndarray) -> None:
    parts = [array_source("a", x[:3].astype(np.float16)), array_source("b", x[3:])]
    whole = Source("both", 23, DIMS, "float32", lambda rows: iter(()), parts=parts)
    assert whole.parts == parts
    assert whole.bytes_per_item == pytest.approx((3 * 8 + 20 * 16) / 23)
    alone = array_source("docs", x)
    assert alone.parts == [alone]


# -- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((3,), "float32", "docs must be a table of vectors with 2 axes"),
        ((), "float32", "not 0"),
        ((3, 2, 2), "object", "not 3"),
        ((3, 2), "int64", "docs has dtype int64; convert it to one of float16, float32"),
        ((3, 2), "object", "docs has dtype object"),
        ((0, 2), "float32", "docs is empty: 0 rows of 2 dimensions"),
        ((2, 0), "float32", "docs is empty: 2 rows of 0 dimensions"),
    ],
)
def test_table_must_be_of_numbers_and_not_empty(
    shape: tuple[int, ...], dtype: str, says: str
) -> None:
    with pytest.raises(FewbitsError, match=says):
        check_table("docs", shape, dtype)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(5, "Input/output error"), "cannot read docs: Input/output error"),
        (ValueError("bad magic\nand more"), "cannot read docs: bad magic"),
        (EOFError(), "cannot read docs: EOFError"),
        (zipfile.BadZipFile("Bad CRC-32"), "cannot read docs: Bad CRC-32"),
        (struct.error("unpack requires 4 bytes"), "cannot read docs: unpack requires 4 bytes"),
        (MemoryError("malloc of size 2 PiB failed"), "cannot read docs: malloc of size 2 PiB"),
    ],
)
def test_errors_of_parsers_become_one_line(error: Exception, says: str) -> None:
    with pytest.raises(FewbitsError, match=says) as caught, readable("docs"):
        raise error
    assert "\n" not in str(caught.value)


def test_own_errors_and_bugs_pass_as_they_are() -> None:
    for error in (FewbitsError("it is empty"), AssertionError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, readable("docs"):
            raise error
        assert caught.value is error


def test_error_of_who_uses_the_blocks_is_not_one_of_reading(x: np.ndarray) -> None:
    def use(block: np.ndarray) -> None:
        raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user") as caught:
        list(map(use, streamed(x).blocks(5)))
    assert not isinstance(caught.value, FewbitsError)


# -- what is in memory ---------------------------------------------------------------------


def test_objects_with_vectors_become_a_source(x: np.ndarray) -> None:
    for given in (x, x.tolist(), tuple(x), list(x), x.astype(">f4"), np.asfortranarray(x)):
        source = memory_source(given)
        assert (source.takes, source.rows, source.dims) == ("vectors", 23, DIMS)
        np.testing.assert_array_equal(source.everything(), x)


def test_objects_with_sets_become_a_source_of_sets(sets: Ragged) -> None:
    arrays = list(sets)
    for given in (sets, arrays, tuple(arrays), [item.tolist() for item in arrays]):
        source = memory_source(given)
        assert (source.takes, source.rows, source.vectors) == ("sets", 9, 23)
        assert same_sets(source.everything(), sets)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "the input must be a table of vectors with 2 axes"),
        ([], "the input must be a table of vectors with 2 axes"),
        (3.5, "the input must be a table of vectors with 2 axes"),
        (np.ones((2, 3, 4)), "must be a table of vectors with 2 axes (items, dimensions), not 3"),
        (np.ones((2, 3), dtype=int), "the input has dtype int64"),
        ([[1.0, 2.0], [3.0]], "the input is no table of vectors of one width"),
        ([np.ones((2, 3)), np.ones((2, 4))], "set 1 has shape (2, 4)"),
        ([np.ones((2, 2)), [[1.0, 2.0], [3.0]]], "the input is no table of vectors of one width"),
        ([[[1.0, 2.0], [3.0]]], "the input is no table of vectors of one width"),
        ({"a": 1}, "the input must be a table of vectors with 2 axes"),
        (Ragged(np.ones((2, 3), dtype=int), np.array([0, 2])), "the input has dtype int64"),
    ],
)
def test_other_objects_are_refused(given: Any, says: str) -> None:
    with pytest.raises(FewbitsError, match=re.escape(says)) as caught:
        memory_source(given)
    assert "\n" not in str(caught.value)


# -- memory --------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures as Linux does")
def test_large_file_is_streamed_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.npy"
    rows = 400_000
    np.lib.format.open_memmap(file, "w+", np.float32, (rows, 128)).flush()  # 205 MB, all holes
    program = f"""
from pathlib import Path
import numpy as np
from fewbits.core.readers import open_source

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

list(open_source(np.ones((2, 2))).blocks())
before = peak()
assert sum(len(block) for block in open_source({str(file)!r}).blocks()) == {rows}
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert int(done.stdout) < 64
