"""The packed transform: as many numbers out as in, the same lengths, and back again."""

from __future__ import annotations

import pytest
import torch

from fewbits.primitives.real_fourier import inverse_real_fourier, real_fourier

COUNTS = (1, 2, 3, 7, 8, 15, 16, 31)


@pytest.mark.parametrize("count", COUNTS)
def test_rows_come_back(count: int) -> None:
    x = torch.randn(3, 5, count)
    y = real_fourier(x)
    assert y.shape == x.shape
    torch.testing.assert_close(inverse_real_fourier(y), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_inner_products_stay(count: int) -> None:
    x = torch.randn(6, count)
    y = real_fourier(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-5)


def test_a_constant_row_is_one_number() -> None:
    y = real_fourier(torch.full((1, 8), 3.0))
    torch.testing.assert_close(y, torch.tensor([[3 * 8**0.5, *[0.0] * 7]]), atol=1e-6, rtol=1e-6)
