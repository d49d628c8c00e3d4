import numpy as np
import pytest

from fewbits.primitives import alignment
from fewbits.primitives.alignment import (
    counterpart_mrr,
    linear_cka,
    mean_cosine,
    neighbour_jaccard,
    procrustes,
)
from fewbits.primitives.rotation import random_rotation


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return rng.standard_normal((120, 10)) * np.linspace(2, 0.3, 10) + 1


def error(alignment_, x, y):
    return float(np.square(alignment_(x) - y).sum())


# -- Procrustes ----------------------------------------------------------------------------


def test_procrustes_finds_the_rotation(x):
    rotation = random_rotation(10, 1)
    found = procrustes(x, x @ rotation)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-6)
    assert found.scale == 1
    np.testing.assert_allclose(found(x), x @ rotation, atol=1e-5)
    assert found(x).dtype == np.float32


def test_procrustes_finds_rotation_scale_and_shift(x):
    y = 3.5 * x @ random_rotation(10, 1) + np.arange(10)
    found = procrustes(x, y, center=True, scale=True)
    assert found.scale == pytest.approx(3.5)
    np.testing.assert_allclose(found(x), y, atol=1e-4)
    assert error(procrustes(x, y), x, y) > 100


def test_no_other_rotation_comes_closer(x):
    rng = np.random.default_rng(2)
    y = x @ random_rotation(10, 1) + 0.5 * rng.standard_normal(x.shape)
    found = procrustes(x, y)
    np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(10), atol=1e-12)
    for seed in range(20):
        turn = random_rotation(10, seed).astype(np.float64)
        for other in (turn, np.linalg.qr(found.rotation + 0.02 * turn)[0]):
            signs = np.sign(np.sum(other * found.rotation, axis=0))
            assert np.square(x @ (other * signs) - y).sum() > error(found, x, y)


def test_widths_may_differ(x):
    wide = x @ np.linalg.qr(np.random.default_rng(3).standard_normal((14, 10)))[0].T
    up, down = procrustes(x, wide), procrustes(wide, x)
    np.testing.assert_allclose(up.rotation @ up.rotation.T, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(down.rotation.T @ down.rotation, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(up(x), wide, atol=1e-5)
    np.testing.assert_allclose(down(wide), x, atol=1e-5)


# -- CKA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_is_one_up_to_rotation_scale_and_shift(x, debiased):
    y = 1e6 * x @ random_rotation(10, 1) - 3e6
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(1)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1)
    assert linear_cka(x, x * np.linspace(1, 9, 10), debiased=debiased) < 0.95


@pytest.mark.parametrize("dims", [(10, 4), (300, 200), (3, 400)])
def test_cka_by_its_definition(dims):
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((40, d)) for d in dims)
    y[:, :3] += x[:, :3]
    center = np.eye(40) - 1 / 40
    k, other = center @ x @ x.T @ center, center @ y @ y.T @ center
    expected = (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())
    assert linear_cka(x, y) == pytest.approx(expected)
    k, other = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)

    def hsic(a, b):
        return (
            np.trace(a @ b)
            + a.sum() * b.sum() / (39 * 38)
            - 2 * np.ones(40) @ a @ b @ np.ones(40) / 38
        )

    expected = hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected)


def test_debiased_cka_of_unrelated_rows_is_about_zero():
    rng = np.random.default_rng(0)
    pairs = [rng.standard_normal((2, 32, 40)) for _ in range(50)]
    assert np.mean([linear_cka(*pair) for pair in pairs]) > 0.4
    assert abs(np.mean([linear_cka(*pair, debiased=True) for pair in pairs])) < 0.05


# -- counterparts --------------------------------------------------------------------------


def test_a_space_finds_itself(x):
    assert counterpart_mrr(x, 5 * x) == 1
    assert neighbour_jaccard(x, 5 * x, 7) == 1
    assert mean_cosine(x, 5 * x) == pytest.approx(1)
    assert mean_cosine(x, -x) == pytest.approx(-1)


def test_counterparts_one_by_one(x):
    rng = np.random.default_rng(4)
    y = x + 2 * rng.standard_normal(x.shape)
    unit_x, unit_y = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (x, y))
    ranks, jaccards = [], []
    for number, query in enumerate(unit_y):
        order = np.argsort(-(unit_x @ query))
        ranks.append(1 + int(np.flatnonzero(order == number)[0]))
        own = set(np.argsort(-(unit_x @ unit_x[number]))[:9].tolist())
        asked = set(order[:9].tolist())
        jaccards.append(len(own & asked) / len(own | asked))
    assert counterpart_mrr(y, x) == pytest.approx(np.mean(1 / np.array(ranks)))
    assert neighbour_jaccard(y, x, 9) == pytest.approx(np.mean(jaccards))
    assert mean_cosine(y, x) == pytest.approx(np.mean((unit_x * unit_y).sum(axis=1)))


def test_blocks_change_nothing(x, monkeypatch):
    y = x[::-1] + 0.1
    whole = counterpart_mrr(y, x), neighbour_jaccard(y, x, 5)
    monkeypatch.setattr(alignment, "BLOCK_CELLS", 250)
    assert (counterpart_mrr(y, x), neighbour_jaccard(y, x, 5)) == pytest.approx(whole)


def test_where_all_items_are_alike_no_rank_is_good():
    same = np.random.default_rng(0).standard_normal(7) * np.ones((99, 1))
    assert counterpart_mrr(same, same) == pytest.approx(1 / 50)
    assert counterpart_mrr(np.zeros((99, 7)), same) == pytest.approx(1 / 50)


# -- bad input -----------------------------------------------------------------------------

MEASURES = (procrustes, linear_cka, mean_cosine, counterpart_mrr)


@pytest.mark.parametrize("measure", MEASURES)
def test_tables_that_do_not_pair_up(x, measure):
    for other in (x[:50], x[0], x[:0], np.ones((120, 0))):
        with pytest.raises(ValueError, match="pair up"):
            measure(x, other)
    for value in (np.nan, np.inf):
        bad = x.copy()
        bad[3, 3] = value
        with pytest.raises(ValueError, match="finite"):
            measure(x, bad)
    if measure not in (procrustes, linear_cka):
        with pytest.raises(ValueError, match="one width, not 10 and 4"):
            measure(x, x[:, :4])


def test_nothing_to_align(x):
    with pytest.raises(ValueError, match="no direction in common"):
        procrustes(x, np.zeros_like(x))
    for value in (0.0, 0.1, 1e300):
        with pytest.raises(ValueError, match="all the same"):
            linear_cka(x, np.full_like(x, value))
    for rows, debiased in ((1, False), (3, True)):
        with pytest.raises(ValueError, match=f"at least {rows + 1} rows"):
            linear_cka(x[:rows], x[:rows], debiased=debiased)
    for k in (0, 121):
        with pytest.raises(ValueError, match="between 1 and the 120"):
            neighbour_jaccard(x, x, k)
