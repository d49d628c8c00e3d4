import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.primitives.bits import pack, packed_width, unpack


def packed_by_hand(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Each row as one long whole number, its lowest byte first."""
    width = -(-numbers.shape[1] * bits // 8)
    packed = np.empty((len(numbers), width), dtype=np.uint8)
    for row, values in enumerate(numbers.tolist()):
        whole = sum(value << (bits * place) for place, value in enumerate(values))
        packed[row] = np.frombuffer(whole.to_bytes(width, "little"), dtype=np.uint8)
    return packed


def random_numbers(rows: int, dims: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, dims), dtype=np.uint8)


@given(
    rows=st.integers(0, 5),
    dims=st.integers(1, 41),
    bits=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_packing_is_what_it_is_by_hand_and_unpacking_undoes_it(
    rows: int, dims: int, bits: int, seed: int
) -> None:
    numbers = random_numbers(rows, dims, bits, seed)
    packed = pack(numbers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, packed_width(dims, bits))
    np.testing.assert_array_equal(packed, packed_by_hand(numbers, bits))
    back = unpack(packed, dims, bits)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, numbers)


@pytest.mark.parametrize(
    ("numbers", "bits", "packed"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b00001101, 0b1]),
        ([1, 2, 3, 0, 2], 2, [0b00111001, 0b10]),
        ([1, 2, 7], 3, [0b11010001, 0b1]),
        ([5, 12, 7], 4, [0b11000101, 0b0111]),
        ([31, 1], 5, [0b00111111, 0b0]),
        ([200, 3], 8, [200, 3]),
    ],
)
def test_the_layout_is_the_documented_one(numbers: list[int], bits: int, packed: list[int]) -> None:
    assert pack(np.array([numbers]), bits).tolist() == [packed]


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_numbers_fill_all_bits_or_none_and_left_over_bits_are_zero(bits: int) -> None:
    dims = 5
    most = pack(np.full((1, dims), 2**bits - 1), bits)
    assert int(np.unpackbits(most).sum()) == dims * bits
    assert not pack(np.zeros((1, dims)), bits).any()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_beyond_the_numbers_are_not_read(bits: int) -> None:
    numbers = random_numbers(4, 5, bits)
    packed = pack(numbers, bits).copy()
    used = 5 * bits % 8
    if used:
        packed[:, -1] |= np.uint8(256 - 2**used)
    np.testing.assert_array_equal(unpack(packed, 5, bits), numbers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_memory_layout_will_do_and_stays_as_it_is(bits: int) -> None:
    numbers = random_numbers(7, 22, bits)
    numbers.flags.writeable = False
    packed = pack(numbers[::2, ::2], bits)
    np.testing.assert_array_equal(packed, packed_by_hand(numbers[::2, ::2], bits))
    packed = np.asfortranarray(packed)
    packed.flags.writeable = False
    np.testing.assert_array_equal(unpack(packed, 11, bits), numbers[::2, ::2])
    np.testing.assert_array_equal(numbers, random_numbers(7, 22, bits))


def test_truth_values_are_bits() -> None:
    signs = np.random.default_rng(0).standard_normal((3, 10)) > 0
    np.testing.assert_array_equal(unpack(pack(signs, 1), 10, 1), signs)


@pytest.mark.parametrize(
    ("dims", "bits", "width"), [(1, 1, 1), (8, 1, 1), (9, 1, 2), (3, 3, 2), (8, 3, 3), (5, 8, 5)]
)
def test_a_row_takes_the_fewest_whole_bytes(dims: int, bits: int, width: int) -> None:
    assert packed_width(dims, bits) == width
