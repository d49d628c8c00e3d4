"""What every array from a user must pass."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fewbits.core.checks import (
    LARGEST,
    NUMBERS,
    SEED_LIMIT,
    as_array,
    as_ragged,
    check_k,
    check_ragged,
    check_seed,
    check_vectors,
    unit_rows,
)
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged


@pytest.fixture
def x() -> np.ndarray:
    """(6, 4) float32, no row of zeros."""
    return np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def with_value(x: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = x.astype(np.float64)
    changed[row, 1] = value
    return changed


# -- vectors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_number_becomes_float32(dtype: str) -> None:
    given = np.array([[0, 1], [100, 7]], dtype=dtype)
    checked = check_vectors(given)
    assert checked.dtype == np.float32
    assert checked.tolist() == [[0, 1], [100, 7]]


def test_layout_and_byte_order_do_not_matter(x: np.ndarray) -> None:
    for given in (np.asfortranarray(x), x.astype(">f4"), np.repeat(x, 2, axis=0)[::2], x.tolist()):
        checked = check_vectors(given)
        assert checked.flags.c_contiguous
        assert checked.dtype == np.dtype("=f4")
        np.testing.assert_array_equal(checked, x)


def test_float32_is_not_copied(x: np.ndarray) -> None:
    assert np.shares_memory(check_vectors(x), x)


def test_torch_tensors_are_taken(x: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(check_vectors(torch.from_numpy(x)), x)
    with pytest.raises(FewbitsError, match="requires grad"):
        check_vectors(torch.from_numpy(x).requires_grad_())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.ones(3), r"a table of vectors with 2 axes \(items, dimensions\), not 1"),
        (np.ones((2, 3, 4)), "not 3"),
        (np.float32(1), "not 0"),
        (np.ones((0, 3)), "the input is empty: 0 rows of 3 dimensions"),
        (np.ones((3, 0)), "the input is empty: 3 rows of 0 dimensions"),
        (np.ones((2, 2), dtype=int), "dtype int64; convert it to one of float16, float32"),
        (np.ones((2, 2), dtype=bool), "dtype bool; convert"),
        (np.ones((2, 2), dtype=complex), "dtype complex128; convert"),
        (np.array([["a"]]), "dtype <U1; convert"),
        (np.array([[object()]]), "dtype object; convert"),
        ([[1.0, 2.0], [3.0]], "the input is no table of vectors of one width"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(given: Any, says: str) -> None:
    with pytest.raises(FewbitsError, match=says) as caught:
        check_vectors(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, 2 * LARGEST, -2 * LARGEST])
def test_the_first_unusable_row_is_named(x: np.ndarray, value: float) -> None:
    bad = with_value(with_value(x, 3, value), 5, value)
    with pytest.raises(FewbitsError, match="row 3 of docs has NaN, infinity or a value beyond"):
        check_vectors(bad, what="docs")
    with pytest.raises(FewbitsError, match="row 103 of the input"):
        check_vectors(bad, first_row=100)
    with pytest.raises(FewbitsError, match="row 17 of the input"):
        check_vectors(bad, rows=np.array([2, 3, 5, 17, 19, 23]))


def test_large_values_whose_squares_still_add_up_are_taken(x: np.ndarray) -> None:
    assert np.isfinite(np.square(check_vectors(with_value(x, 3, LARGEST))).sum(axis=1)).all()


def test_as_array_says_one_line_of_what_numpy_says() -> None:
    class Refusing:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise RuntimeError("no array\nand a second line")

    with pytest.raises(FewbitsError) as caught:
        as_array(Refusing(), "docs")
    assert str(caught.value) == "docs is no table of vectors of one width: no array"


# -- sets ----------------------------------------------------------------------------------


def test_sets_are_joined_and_checked(x: np.ndarray) -> None:
    for given in ([x[:2], x[2:]], (x[:2].tolist(), x[2:].astype(np.float64))):
        sets = check_ragged(given)
        assert sets.offsets.tolist() == [0, 2, 6]
        assert sets.flat.dtype == np.float32
        np.testing.assert_array_equal(sets.flat, x)


def test_three_axes_are_sets_of_one_size(x: np.ndarray) -> None:
    assert as_ragged(x.reshape(2, 3, 4)).offsets.tolist() == [0, 3, 6]
    ragged = Ragged(x, np.array([0, 1, 6]))
    assert as_ragged(ragged) is ragged


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.ones((3, 2)), "must be sets of vectors: a list of (t, d) arrays, or flat and offsets"),
        ("text", "must be sets of vectors"),
        ([], "docs is empty: no sets of vectors"),
        (Ragged(np.ones((0, 2)), np.zeros(1)), "docs is empty: no sets of vectors"),
        ([np.ones((2, 3)), np.ones(3)], "docs: set 1 has shape (3,); every set must be a (t, d)"),
        ([np.ones(3)], "docs: set 0 has shape (3,)"),
        ([np.ones((2, 3)), np.ones((2, 4))], "docs: set 1 has shape (2, 4)"),
        ([np.ones((2, 3)), np.ones((0, 3))], "docs: set 1 is empty; every set needs a vector"),
        ([np.ones((2, 2)), [[1.0, 2.0], [3.0]]], "docs is no table of vectors of one width"),
        ([np.array([[1, 2]])], "docs has dtype int64"),
        ([np.ones((2, 0))], "docs is empty"),
    ],
)
def test_what_is_no_list_of_sets_is_refused(given: Any, says: str) -> None:
    with pytest.raises(FewbitsError, match=re.escape(says)):
        check_ragged(given, what="docs")


def test_the_set_of_an_unusable_vector_is_named(x: np.ndarray) -> None:
    sets = Ragged(with_value(x, 4, np.nan), np.array([0, 1, 3, 5, 6]))
    with pytest.raises(FewbitsError, match="row 2 of the input has NaN"):
        check_ragged(sets)
    with pytest.raises(FewbitsError, match="row 12 of the input has NaN"):
        check_ragged(sets, rows=np.arange(10, 14))


# -- unit length ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1, 1e6, 1e15])
def test_rows_get_unit_length_whatever_their_scale(x: np.ndarray, scale: float) -> None:
    scaled = (x * np.float32(scale)).astype(np.float32)
    unit = unit_rows(scaled)
    assert unit.dtype == np.float32
    exact = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(unit, exact, rtol=1e-5)
    np.testing.assert_array_equal(scaled, x * np.float32(scale))  # the input stays as it is


def test_row_of_zeros_has_no_direction(x: np.ndarray) -> None:
    x[[2, 4]] = 0
    says = "row 2 of docs is all zeros and has no cosine; drop it, or use --metric ip"
    with pytest.raises(FewbitsError, match=re.escape(says)):
        unit_rows(x, what="docs")
    with pytest.raises(FewbitsError, match="row 52 of"):
        unit_rows(x, first_row=50)
    with pytest.raises(FewbitsError, match="row 8 of"):
        unit_rows(x, rows=np.array([0, 4, 8, 12, 16, 20]))


# -- options -------------------------------------------------------------------------------


def test_k_is_a_whole_number_within_the_collection() -> None:
    assert [check_k(k, 9) for k in (1, 9, np.int64(3))] == [1, 9, 3]
    for k in (0, -1, 2.0, True, None, "3"):
        with pytest.raises(FewbitsError, match="k must be a whole number of at least 1, not"):
            check_k(k, 9)  # type: ignore[arg-type]
    says = "k is 10, but the collection has only 9 rows; ask for fewer"
    with pytest.raises(FewbitsError, match=says):
        check_k(10, 9)


def test_seed_is_one_that_every_generator_takes() -> None:
    assert [check_seed(seed) for seed in (0, np.int64(5), SEED_LIMIT - 1)] == [0, 5, SEED_LIMIT - 1]
    for seed in (-1, SEED_LIMIT, 1.0, False, None, "1"):
        with pytest.raises(FewbitsError, match="a seed is a whole number from 0 to 2147483646"):
            check_seed(seed)  # type: ignore[arg-type]
