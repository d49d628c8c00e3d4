import numpy as np
import pytest

from fewbits.primitives.pca import Moments, fix_signs, principal_components


def correlated(rows=500, dims=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dims)) * np.linspace(3, 0.2, dims)
    return (x @ rng.standard_normal((dims, dims)) + 2).astype(np.float32)


def moments_of(x):
    return Moments(x.shape[1]).add(x)


def in_random_chunks(x, seed=0):
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, len(x)), 9, replace=False))
    return np.split(x, cuts)


def sine_of_angle(components, others):
    """Largest principal angle between two subspaces given by orthonormal rows."""
    return np.linalg.norm(others - others @ components.T @ components, 2)


def test_moments_are_those_of_numpy():
    x = correlated()
    moments = moments_of(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(wide.T), rtol=1e-10)
    np.testing.assert_allclose(moments.second_moment(), wide.T @ wide / len(x), rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_any_size_give_the_same_moments_and_subspace(seed):
    x = correlated()
    whole, streamed = moments_of(x), Moments(x.shape[1])
    for chunk in in_random_chunks(x, seed):
        streamed.add(chunk)
    assert streamed.count == len(x)
    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(streamed.scatter, whole.scatter, rtol=1e-10)
    one, other = principal_components(whole), principal_components(streamed)
    assert sine_of_angle(one.components[:4], other.components[:4]) < 1e-4
    np.testing.assert_allclose(one.components, other.components, atol=1e-8)


def test_one_row_at_a_time_and_merging():
    x = correlated(60)
    rows, halves = Moments(12), moments_of(x[:25]).merge(Moments(12)).merge(moments_of(x[25:]))
    for row in x:
        rows.add(row[None])
    for moments in (rows, halves):
        np.testing.assert_allclose(moments.scatter, moments_of(x).scatter, rtol=1e-9, atol=1e-9)


def test_a_mean_large_beside_the_spread_costs_no_digits():
    x = np.random.default_rng(0).standard_normal((400, 3))
    far = Moments(3)
    for chunk in in_random_chunks(x + 1e7):
        far.add(chunk)
    np.testing.assert_allclose(far.covariance(), np.cov(x.T), rtol=1e-6, atol=1e-7)


def test_components_are_orthonormal_and_agree_with_scikit_learn_up_to_sign():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = correlated()
    found, peer = principal_components(moments_of(x)), decomposition.PCA().fit(x.astype(np.float64))
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(12), atol=1e-12)
    np.testing.assert_allclose(found.variances, peer.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.components), np.abs(peer.components_), atol=1e-7)
    np.testing.assert_allclose(found.mean, peer.mean_, rtol=1e-10)


def test_without_centring_the_components_are_those_of_the_second_moment():
    x = correlated()
    found = principal_components(moments_of(x), center=False)
    _, sizes, rows = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_array_equal(found.mean, 0)
    np.testing.assert_allclose(found.variances, sizes**2 / len(x), rtol=1e-8)
    np.testing.assert_allclose(found.components, fix_signs(rows), atol=1e-7)


def test_the_largest_entry_of_each_component_is_positive():
    fixed = fix_signs(np.array([[0.1, -0.9, 0.3], [0.8, -0.2, 0.1], [-0.5, 0.1, 0.2]]))
    np.testing.assert_array_equal(fixed, [[-0.1, 0.9, -0.3], [0.8, -0.2, 0.1], [0.5, -0.1, -0.2]])
    components = principal_components(moments_of(-correlated())).components
    assert (components[np.arange(12), np.abs(components).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize(("true_rank", "scale"), [(1, 1.0), (3, 1e-12), (7, 1e12)])
def test_rank_sees_through_float32_rounding(true_rank, scale):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, true_rank)) @ rng.standard_normal((true_rank, 20)) * scale
    assert principal_components(moments_of(x.astype(np.float32))).rank == true_rank


def test_rank_of_few_rows_and_of_constant_rows():
    assert principal_components(moments_of(correlated(6))).rank == 5
    assert principal_components(moments_of(correlated(6)), center=False).rank == 6
    constant = np.full((50, 4), 0.1, dtype=np.float32)
    assert principal_components(moments_of(constant)).rank == 0
    assert principal_components(moments_of(constant), center=False).rank == 1
    assert principal_components(moments_of(constant * 0)).rank == 0


def test_dims_for_is_the_smallest_that_reaches_the_share():
    found = principal_components(moments_of(correlated()))
    shares = np.cumsum(found.variances) / found.variances.sum()
    for share in (0.01, 0.5, 0.9, 0.999, 1.0):
        dims = found.dims_for(share)
        assert shares[dims - 1] >= share - 1e-9
        assert dims == 1 or shares[dims - 2] < share
    assert found.dims_for(1.0) == 12


@pytest.mark.parametrize("block", [np.zeros((0, 3)), np.zeros((2, 4)), np.zeros(3)])
def test_unfit_blocks_are_refused(block):
    with pytest.raises(ValueError, match="3 numbers"):
        Moments(3).add(block)


def test_one_row_has_no_components():
    with pytest.raises(ValueError, match="2 rows"):
        principal_components(moments_of(np.ones((1, 3))))
