import numpy as np
import pytest

from fewbits.primitives import rotation
from fewbits.primitives.rotation import project, random_rotation


@pytest.mark.parametrize("dims", [1, 2, 3, 17, 64])
def test_rotations_are_orthogonal(dims: int) -> None:
    turn = random_rotation(dims, seed=0)
    assert turn.shape == (dims, dims)
    assert turn.dtype == np.float32
    np.testing.assert_allclose(turn.T @ turn, np.eye(dims), atol=1e-5)
    np.testing.assert_allclose(turn @ turn.T, np.eye(dims), atol=1e-5)


def test_lengths_and_angles_stay() -> None:
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    turned = x @ random_rotation(32, seed=1)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, atol=1e-4)


def test_a_seed_names_one_rotation() -> None:
    np.testing.assert_array_equal(random_rotation(8, seed=3), random_rotation(8, seed=3))
    assert np.abs(random_rotation(8, seed=3) - random_rotation(8, seed=4)).max() > 0.1


def test_rotations_favour_no_direction() -> None:
    turns = np.stack([random_rotation(3, seed) for seed in range(2000)]).astype(np.float64)
    # Uniform over the orthogonal group: every entry has mean 0 and variance 1/d, and so does
    # every product of two different ones; the squared trace is 1 on average.
    np.testing.assert_allclose(turns.mean(axis=0), 0, atol=0.06)
    flat = turns.reshape(len(turns), 9)
    np.testing.assert_allclose(flat.T @ flat / len(turns), np.eye(9) / 3, atol=0.05)
    traces = np.trace(turns, axis1=1, axis2=2)
    assert np.mean(traces**2) == pytest.approx(1, abs=0.15)
    assert np.mean(np.linalg.det(turns) > 0) == pytest.approx(0.5, abs=0.05)
    # A coordinate of a direction that is uniform on the sphere in three dimensions is uniform.
    shares = np.histogram(turns[:, 0, 0], bins=4, range=(-1, 1))[0] / len(turns)
    np.testing.assert_allclose(shares, 0.25, atol=0.05)


def test_a_large_rotation_spreads_one_coordinate_over_all() -> None:
    turn = random_rotation(256, seed=0)
    assert np.abs(turn).max() < 6 / 16
    assert np.std(turn) == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("shape", [(7, 3), (20, 300), (1, 1)])
def test_products_are_those_of_float64(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((9, shape[0])), rng.standard_normal(shape)
    x, matrix = x.astype(np.float32), matrix.astype(np.float32)
    product = project(x, matrix)
    assert product.dtype == np.float32
    exact = x.astype(np.float64) @ matrix.astype(np.float64)
    np.testing.assert_allclose(product, exact, rtol=1e-6, atol=1e-12)


def test_a_row_alone_comes_out_as_among_others() -> None:
    x = np.random.default_rng(0).standard_normal((200, 96)).astype(np.float32)
    turn = random_rotation(96, seed=0)
    batch = project(x, turn)
    for size in (1, 3, 50):
        parts = [project(x[start : start + size], turn) for start in range(0, 200, size)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_many_rows_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((10, 5)).astype(np.float32)
    turn = random_rotation(5, seed=0)
    whole = project(x, turn)
    monkeypatch.setattr(rotation, "BLOCK_ROWS", 4)
    np.testing.assert_array_equal(project(x, turn), whole)
