"""Sign and rounding: exact values forward, the stated gradient backward."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fewbits.primitives.straight_through import round_through, sign_through  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_are_exactly_one_everywhere(dtype):
    smallest = torch.finfo(dtype).tiny
    y = torch.tensor(
        [-torch.inf, -3.0, -1.0, -0.3, -smallest, -0.0, 0.0, smallest, 0.3, 1.0, 3.0, torch.inf],
        dtype=dtype,
        requires_grad=True,
    )
    signs = sign_through(y)
    assert signs.tolist() == [-1.0] * 5 + [1.0] * 7
    assert signs.dtype == dtype


def test_signs_are_exactly_one_for_random_values():
    y = torch.randn(100_000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(sign_through(y).abs(), torch.ones(100_000))


def test_gradient_passes_up_to_one_and_no_further():
    y = torch.tensor([-torch.inf, -1.001, -1.0, -0.5, 0.0, 0.5, 1.0, 1.001], requires_grad=True)
    incoming = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, torch.inf])
    kept = incoming.clone()
    sign_through(y).backward(incoming)
    assert y.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0]
    assert torch.equal(incoming, kept)


def test_rounding_is_exact_and_lets_the_gradient_through():
    y = torch.tensor([-2.5, -1.2, -0.5, 0.0, 0.5, 1.5, 1e6 + 0.25], requires_grad=True)
    rounded = round_through(y)
    assert rounded.tolist() == [-2, -1, 0, 0, 0, 2, 1e6]
    incoming = torch.arange(7.0)
    rounded.backward(incoming)
    assert torch.equal(y.grad, incoming)
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(round_through(many), torch.round(many))
