"""Feature maps: the kernels that they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.primitives.feature_maps import (
    EluFeatures,
    FeatureMap,
    PositiveRandomFeatures,
    TaylorFeatures,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel(features: FeatureMap, x: Tensor, y: Tensor) -> Tensor:
    return features(x) @ features(y).transpose(-1, -2)


@pytest.mark.parametrize(
    ("features", "width"),
    [
        (EluFeatures(), 5),
        (TaylorFeatures(1), 6),
        (TaylorFeatures(2), 21),
        (TaylorFeatures(4), 126),
        (PositiveRandomFeatures(7), 7),
    ],
)
def test_there_are_as_many_features_as_promised(features: FeatureMap, width: int) -> None:
    assert features.width(5) == width
    assert features(drawn(2, 3, 5)).shape == (2, 3, width)


def test_elu_features_are_those_of_the_definition() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    expected = torch.tensor([math.exp(-2), 1.0, 4.0])
    torch.testing.assert_close(EluFeatures()(x), expected)
    assert bool((EluFeatures()(drawn(100, 8) * 5) > 0).all())


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_inner_products_are_the_taylor_series(degree: int) -> None:
    x, y = drawn(6, 4).double(), drawn(7, 4, seed=1).double()
    products = x @ y.T
    expected = sum(products**j / math.factorial(j) for j in range(degree + 1))
    found = kernel(TaylorFeatures(degree), x, y).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_an_even_degree_is_positive_everywhere() -> None:
    x, y = drawn(50, 3) * 4, drawn(50, 3, seed=1) * 4
    assert float((x @ y.T).min()) < -20
    assert float(kernel(TaylorFeatures(2), x, y).min()) > 0
    assert float(kernel(TaylorFeatures(3), x, y).min()) < 0


def test_random_features_are_right_in_the_mean() -> None:
    x, y = drawn(5, 8) * 0.5, drawn(6, 8, seed=1) * 0.5
    draws = torch.stack([kernel(PositiveRandomFeatures(64, seed), x, y) for seed in range(200)])
    expected = torch.exp(x @ y.T).double()
    spread = draws.std(dim=0) / 200**0.5
    assert bool(((draws.mean(dim=0) - expected).abs() < 4 * spread).all())
    assert bool((draws > 0).all())


def test_random_features_get_nearer_with_their_number() -> None:
    x, y = drawn(20, 8) * 0.3, drawn(20, 8, seed=1) * 0.3
    expected = torch.exp(x @ y.T).double()
    few, many = (
        float((kernel(PositiveRandomFeatures(count), x, y) - expected).abs().mean())
        for count in (16, 4096)
    )
    assert many < few / 4


def test_random_directions_are_orthogonal_in_blocks_and_drawn_by_the_seed() -> None:
    from fewbits.primitives.feature_maps import orthogonal_directions

    rows = orthogonal_directions(6, 15, 0)
    assert rows.shape == (15, 6)
    for block in (rows[:6], rows[6:12], rows[12:]):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-9, rtol=0)
    assert torch.equal(rows, orthogonal_directions(6, 15, 0))
    assert not torch.equal(rows, orthogonal_directions(6, 15, 1))


@pytest.mark.parametrize("features", [EluFeatures(), TaylorFeatures(2), PositiveRandomFeatures(16)])
def test_half_precision_and_large_numbers_give_finite_features(features: FeatureMap) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = features((drawn(10, 16) * 30).to(dtype))
        assert found.dtype in (torch.float32, torch.float64)
        assert bool(found.isfinite().all())
        assert features(torch.zeros(0, 16, dtype=dtype)).shape[0] == 0


@pytest.mark.parametrize("features", [EluFeatures(), TaylorFeatures(2), PositiveRandomFeatures(16)])
def test_gradients_reach_what_features_are_made_of(features: FeatureMap) -> None:
    x = drawn(3, 4).requires_grad_(True)
    features(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="degree=0"):
        TaylorFeatures(0)
    with pytest.raises(ValueError, match="count=0"):
        PositiveRandomFeatures(0)
