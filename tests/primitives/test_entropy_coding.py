"""Entropy coding: nothing is lost, and no bit too many."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fewbits.primitives.entropy_coding import TOTAL, SymbolTables, decode, encode


def drawn(
    count: int, contexts: int = 50, seed: int = 0, spread: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that are normal about another mean in each context."""
    rng = np.random.default_rng(seed)
    which = np.sort(rng.integers(contexts, size=count))
    means = np.linspace(-4, 4, contexts)
    return np.rint(rng.normal(means[which], spread)).astype(np.int32), which


def fitted(symbols: np.ndarray, which: np.ndarray, low: int = -12, high: int = 12) -> SymbolTables:
    contexts, width = int(which.max(initial=0)) + 1, high - low + 2
    places = np.where((symbols < low) | (symbols > high), width - 1, symbols - low)
    counts = np.bincount(which * width + places, minlength=contexts * width)
    return SymbolTables.from_counts(counts.reshape(contexts, width), low)


# -- tables --------------------------------------------------------------------------------


def test_frequencies_add_up_and_none_is_zero() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (20, 30)) ** 3
    counts[3] = 0
    counts[4] = 0
    counts[4, 7] = 10**12
    tables = SymbolTables.from_counts(counts, -5)
    assert (tables.frequencies.sum(axis=1, dtype=int) == TOTAL).all()
    assert tables.frequencies.min() == 1
    assert np.ptp(tables.frequencies[3].astype(int)) <= 30  # nothing seen: all alike
    assert tables.frequencies[4, 7] == TOTAL - 29


def test_one_is_added_to_each_count() -> None:
    tables = SymbolTables.from_counts(np.array([[6, 0, 0]]), 0)
    shares = tables.frequencies[0] / TOTAL
    np.testing.assert_allclose(shares, [7 / 9, 1 / 9, 1 / 9], atol=1e-4)


@pytest.mark.parametrize(
    "frequencies",
    [
        np.full((2, 4), 100, np.uint16),
        np.array([[TOTAL // 2, TOTAL // 2, 0]], np.uint16),
        np.full((1, 4), TOTAL // 4, np.int64),
        np.full(4, TOTAL // 4, np.uint16),
        np.zeros((1, 1), np.uint16),
    ],
)
def test_tables_that_are_none_are_refused(frequencies: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frequencies"):
        SymbolTables(0, frequencies)


def test_too_many_symbols_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        SymbolTables.from_counts(np.zeros((1, 40_000)), 0)


# -- there and back ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 1000, 20_000])
def test_numbers_come_back(count: int) -> None:
    symbols, which = drawn(count)
    tables = fitted(*drawn(5000, seed=1))
    found = decode(encode(symbols, which, tables), which, tables)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, symbols)


def test_contexts_may_come_in_any_order() -> None:
    symbols, which = drawn(20_000)
    order = np.random.default_rng(2).permutation(20_000)
    tables = fitted(symbols, which)
    data = encode(symbols[order], which[order], tables)
    np.testing.assert_array_equal(decode(data, which[order], tables), symbols[order])


@pytest.mark.parametrize("value", [0, 5, -12, 12, 13, 2**31 - 1, -(2**31)])
def test_constant_numbers_come_back(value: int) -> None:
    symbols, which = np.full(3000, value, dtype=np.int64), np.zeros(3000, dtype=np.int64)
    tables = fitted(*drawn(5000, contexts=1))
    np.testing.assert_array_equal(decode(encode(symbols, which, tables), which, tables), symbols)


def test_numbers_that_no_table_has_come_back() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.integers(-(2**31), 2**31, 5000)
    which = rng.integers(50, size=5000)
    tables = fitted(*drawn(5000))
    data = encode(symbols, which, tables)
    np.testing.assert_array_equal(decode(data, which, tables), symbols)


def test_the_least_probable_numbers_come_back() -> None:
    """Each costs 16 bits, the most that a state takes at a time."""
    tables = SymbolTables.from_counts(np.array([[10**9, 0, 0, 0]]), 0)
    symbols, which = np.tile([1, 2], 4000), np.zeros(8000, dtype=int)
    assert tables.frequencies[0, 1:].tolist() == [1, 1, 1]
    data = encode(symbols, which, tables)
    assert 16000 <= len(data) <= 16000 * 1.01 + 32
    np.testing.assert_array_equal(decode(data, which, tables), symbols)


# -- size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 100, 5000, 100_000])
@pytest.mark.parametrize("spread", [0.2, 3.0, 8.0])
def test_bytes_are_within_one_in_a_hundred_of_the_least(count: int, spread: float) -> None:
    symbols, which = drawn(count, spread=spread)
    tables = fitted(*drawn(5000, seed=1, spread=spread))
    least = tables.bits(symbols, which) / 8
    assert least <= len(encode(symbols, which, tables)) + 1
    assert len(encode(symbols, which, tables)) <= max(1.01 * least, least + 0.005 * count / 8) + 32


def test_bits_are_the_logarithms_of_the_odds() -> None:
    tables = SymbolTables(0, np.array([[TOTAL // 2, TOTAL // 4, TOTAL // 4]], np.uint16))
    zeros = np.zeros(4, dtype=int)
    assert tables.bits(np.array([0, 0, 1, 7]), zeros) == 1 + 1 + 2 + (2 + 32)


def test_contexts_save_bits() -> None:
    symbols, which = drawn(20_000, spread=1.0)
    apart = len(encode(symbols, which, fitted(symbols, which)))
    zeros = np.zeros_like(which)
    assert apart < 0.75 * len(encode(symbols, zeros, fitted(symbols, zeros)))
    assert apart < 0.8 * len(zlib.compress(symbols.astype(np.int8).tobytes(), 9))


# -- damage --------------------------------------------------------------------------------


def test_a_stream_that_is_cut_is_refused() -> None:
    symbols, which = drawn(3000)
    tables = fitted(symbols, which)
    data = encode(symbols, which, tables)
    for length in (0, 3, 6, 11, 100, len(data) - 1, len(data) - 2):
        with pytest.raises(ValueError, match="damaged"):
            decode(data[:length], which, tables)
    with pytest.raises(ValueError, match="damaged"):
        decode(data + b"\0\0", which, tables)


def test_changed_bits_never_crash() -> None:
    """A changed word may go unseen without a checksum, but other numbers must not crash it."""
    symbols, which = drawn(500)
    tables = fitted(*drawn(5000))
    data = encode(symbols, which, tables)
    seen = 0
    for place in np.random.default_rng(0).integers(len(data), size=60):
        changed = bytearray(data)
        changed[place] ^= 0x10
        try:
            found = decode(bytes(changed), which, tables)
        except ValueError:
            seen += 1
        else:
            assert found.shape == symbols.shape
    assert seen > 50


@pytest.mark.parametrize(
    ("symbols", "which", "says"),
    [
        (np.zeros(3, int), np.zeros(4, int), "both"),
        (np.zeros((3, 1), int), np.zeros((3, 1), int), "both"),
        (np.zeros(3), np.zeros(3, int), "whole numbers"),
        (np.zeros(3, int), np.zeros(3), "whole numbers"),
        (np.full(3, 2**31), np.zeros(3, int), "int32"),
        (np.zeros(3, int), np.full(3, 50), "from 0 to 49"),
        (np.zeros(3, int), np.full(3, -1), "from 0 to 49"),
    ],
)
def test_bad_input_is_refused(symbols: np.ndarray, which: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        encode(symbols, which, fitted(*drawn(5000)))
