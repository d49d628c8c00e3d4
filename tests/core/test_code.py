"""Codes: their size is what a file holds of them, and they can be cut and joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.core.code import Code, join
from fewbits.core.errors import FewbitsError

ROWS, DIMS = 300, 16


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIMS)).astype(np.float32)


@pytest.fixture
def code() -> Code:
    """Five items; item i has the number i in both arrays."""
    numbers = np.arange(5)
    wide = np.repeat(numbers.astype(np.uint8)[:, None], 3, axis=1)
    return Code({"wide": wide, "norms": numbers.astype(np.float16)}, "some:bits=3", "abc")


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# -- size ----------------------------------------------------------------------------------


def test_size_is_the_bytes_of_the_arrays(code: Code) -> None:
    assert len(code) == 5
    assert code.nbytes == 5 * 3 + 5 * 2
    assert code.bytes_per_item == 5


@pytest.mark.parametrize(
    ("spec", "bytes_per_item"),
    [
        ("float16", 2 * DIMS),
        ("int8", DIMS),
        ("sign", DIMS / 8),
        ("turboquant:bits=3", DIMS * 3 / 8 + 2),
        ("pq:bytes=2", 2),
        ("lsh:bits=21", 3),
        ("pca-rag:dims=3", 3 * 4),
        ("pca-rag:dims=3,dtype=float16", 3 * 2),
        ("pca-rag:dims=5+turboquant:bits=2", 2 + 2),
    ],
)
def test_size_is_what_a_file_holds_to_the_byte(
    x: np.ndarray, tmp_path: Path, spec: str, bytes_per_item: float
) -> None:
    path = tmp_path / "codes.fewbits"
    written = fewbits.encode(x, path, method=spec)
    (code,) = written.parts
    assert code.nbytes == written.nbytes == ROWS * bytes_per_item
    assert code.bytes_per_item == written.bytes_per_item == bytes_per_item
    assert code.nbytes == path.stat().st_size - header_bytes(path) - written.codec_bytes
    assert fewbits.encode(x, method=spec).nbytes == code.nbytes
    codec_path = written.codec.save(tmp_path / "codec.fewbits")
    assert written.codec_bytes == codec_path.stat().st_size - header_bytes(codec_path)


def test_parts_hold_their_codes_and_nothing_else(x: np.ndarray, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    np.save(shards / "a.npy", x[:200])
    np.save(shards / "b.npy", x[200:])
    encoded = fewbits.encode(shards, tmp_path / "codes", method="turboquant:bits=1")
    sizes = []
    for number, part in enumerate(encoded.parts):
        path = tmp_path / "codes" / f"part-{number:05d}.fewbits"
        sizes.append(path.stat().st_size - header_bytes(path))
        assert sizes[-1] == part.nbytes == len(part) * (DIMS // 8 + 2)
    assert sum(sizes) == encoded.nbytes
    path = tmp_path / "codes" / "codec.fewbits"
    assert path.stat().st_size - header_bytes(path) == encoded.codec_bytes


# -- cutting and joining -------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        np.array([3, 1, 1]),
        np.array([False, True, False, False, True]),
        slice(1, 4),
        slice(None, None, -2),
        np.array([], dtype=np.int64),
    ],
)
def test_take_gives_the_items_asked_for(code: Code, rows: np.ndarray | slice) -> None:
    part = code.take(rows)
    wanted = np.arange(5)[rows]
    assert (len(part), part.spec, part.codec_digest) == (len(wanted), code.spec, "abc")
    assert part["norms"].tolist() == wanted.tolist()
    assert part["wide"].tolist() == [[number] * 3 for number in wanted]
    assert (part["wide"].dtype, part["norms"].dtype) == (np.uint8, np.float16)
    assert part.nbytes == 5 * len(wanted)


def test_an_empty_code_has_a_size(code: Code) -> None:
    assert (code.take(slice(0, 0)).nbytes, code.take(slice(0, 0)).bytes_per_item) == (0, 0)


def test_join_undoes_taking_apart(code: Code) -> None:
    joined = join([code.take(slice(0, 2)), code.take(slice(2, 2)), code.take(slice(2, 5))])
    assert (joined.spec, joined.codec_digest) == (code.spec, code.codec_digest)
    assert joined.arrays.keys() == code.arrays.keys()
    for name, array in code.arrays.items():
        assert np.array_equal(joined[name], array)
        assert joined[name].dtype == array.dtype


def test_codes_of_different_codecs_are_not_joined(code: Code) -> None:
    with pytest.raises(FewbitsError, match="made by different codecs; encode them with one"):
        join([code, Code(code.arrays, code.spec, "another")])
    with pytest.raises(FewbitsError, match="there are no codes to join"):
        join([])


def test_arrays_must_have_one_row_per_item() -> None:
    one, two = np.zeros((1, 3)), np.zeros((2, 3))
    with pytest.raises(FewbitsError, match=r"equally many rows, not \{'a': 1, 'b': 2\}"):
        Code({"a": one, "b": two}, "some", "abc")
    with pytest.raises(FewbitsError, match="must have one row per item"):
        Code({"a": np.zeros(())}, "some", "abc")
    with pytest.raises(FewbitsError, match="needs at least one array"):
        Code({}, "some", "abc")


def test_a_code_does_not_change_its_arrays(code: Code) -> None:
    with pytest.raises(AttributeError):
        code.spec = "other"  # type: ignore[misc]
