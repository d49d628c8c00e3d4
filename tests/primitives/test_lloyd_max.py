import math
from statistics import NormalDist

import numpy as np
import pytest

from fewbits.primitives.lloyd_max import nearest_level, normal_levels

TABLE = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}
"""Positive levels and mean squared error for N(0, 1), from Max, 1960."""


def edges_of(levels: np.ndarray) -> np.ndarray:
    wide = levels.astype(np.float64)
    return np.concatenate([[-np.inf], (wide[:-1] + wide[1:]) / 2, [np.inf]])


def cell_shares(levels: np.ndarray) -> np.ndarray:
    """Probability that a normal variable is nearest to each level."""
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges_of(levels)])
    return np.diff(below)


def cell_means(levels: np.ndarray) -> np.ndarray:
    """Mean of the normal values that are nearest to each level."""
    density = np.exp(-0.5 * edges_of(levels) ** 2) / math.sqrt(2 * math.pi)
    return -np.diff(density) / cell_shares(levels)


def squared_error(levels: np.ndarray) -> float:
    """E (X − nearest level)² = 1 − 2·E[X·level] + E[level²], cell by cell."""
    wide = levels.astype(np.float64)
    return float(1 + cell_shares(levels) @ (wide**2 - 2 * wide * cell_means(levels)))


@pytest.mark.parametrize("bits", TABLE)
def test_levels_and_errors_are_those_of_the_published_table(bits: int) -> None:
    positive, error = TABLE[bits]
    levels = normal_levels(bits)
    np.testing.assert_allclose(levels[len(positive) :], positive, rtol=5e-4)
    assert squared_error(levels) == pytest.approx(error, rel=1e-3)


def test_one_bit_is_the_mean_size_of_a_normal_variable() -> None:
    np.testing.assert_allclose(normal_levels(1), [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_is_the_mean_of_the_values_nearest_to_it(bits: int) -> None:
    levels = normal_levels(bits)
    np.testing.assert_allclose(levels, cell_means(levels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_rise_and_mirror_each_other(bits: int) -> None:
    levels = normal_levels(bits)
    assert levels.shape == (2**bits,)
    assert levels.dtype == np.float32
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_other_levels_near_by_or_evenly_spread_have_a_smaller_error(bits: int) -> None:
    levels = normal_levels(bits).astype(np.float64)
    best = squared_error(levels)
    rng = np.random.default_rng(bits)
    for _ in range(20):
        assert squared_error(np.sort(levels + 0.02 * rng.standard_normal(2**bits))) > best
    shares = [NormalDist().inv_cdf((place + 0.5) / 2**bits) for place in range(2**bits)]
    assert squared_error(np.array(shares)) > best


def test_each_bit_brings_the_error_down_towards_a_quarter() -> None:
    errors = [squared_error(normal_levels(bits)) for bits in range(1, 9)]
    falls = np.divide(errors[1:], errors[:-1])
    assert (np.diff(falls) < 0).all()
    assert 0.25 < falls[-1] < 0.26
    # Panter and Dite: the error for many levels is √3·π/2 over their number squared.
    assert errors[-1] * 4**8 == pytest.approx(math.sqrt(3) * math.pi / 2, rel=0.02)


def test_levels_are_shared_and_so_cannot_be_written_to() -> None:
    assert normal_levels(3) is normal_levels(3)
    with pytest.raises(ValueError, match="read-only"):
        normal_levels(3)[0] = 0


@pytest.mark.parametrize("count", [2, 3, 16, 256])
def test_the_nearest_level_is_found_by_number(count: int) -> None:
    rng = np.random.default_rng(count)
    levels = np.sort(rng.standard_normal(count)).astype(np.float32)
    values = 2 * rng.standard_normal((30, 7)).astype(np.float32)
    numbers = nearest_level(values, levels)
    assert numbers.dtype == np.uint8
    assert numbers.shape == values.shape
    distances = np.abs(values[..., None].astype(np.float64) - levels)
    found = np.take_along_axis(distances, numbers[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(found, distances.min(axis=-1), atol=1e-6)


def test_values_beyond_the_last_levels_belong_to_them() -> None:
    levels = normal_levels(8)
    assert nearest_level(np.array([-1e30, -np.inf, 1e30, np.inf]), levels).tolist() == [
        0,
        0,
        255,
        255,
    ]
    assert nearest_level(levels, levels).tolist() == list(range(256))
