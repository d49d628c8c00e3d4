"""Orthogonal matrices from free parameters."""

from __future__ import annotations

import pytest
import torch

from fewbits.primitives.orthogonal import cayley, inverse_cayley, orthogonality_error, turned


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(count: int, dims: int) -> torch.Tensor:
    """Uniform over the rotations."""
    found, _ = torch.linalg.qr(drawn(count, dims, dims).double())
    found[torch.linalg.det(found) < 0, :, 0] *= -1
    return found.float()


@pytest.mark.parametrize("dims", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_any_parameters_give_rotations(dims: int, scale: float) -> None:
    found = cayley(drawn(3, 2, dims, dims) * scale)
    assert found.shape == (3, 2, dims, dims)
    assert orthogonality_error(found) < 1e-5
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(3, 2), rtol=1e-4, atol=1e-4)


def test_two_dimensions_by_hand() -> None:
    """A = [[0, −a], [a, 0]] turns by 2·atan(a/2)."""
    free = torch.tensor([[0.0, 0.0], [0.7, 0.0]])
    angle = 2 * torch.atan(torch.tensor(0.35))
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    torch.testing.assert_close(cayley(free), expected)


def test_zero_and_symmetric_parameters_are_the_identity() -> None:
    symmetric = drawn(5, 5)
    for free in (torch.zeros(5, 5), symmetric + symmetric.T):
        torch.testing.assert_close(cayley(free), torch.eye(5))


def test_the_inverse_is_exact() -> None:
    wanted = rotations(8, 6)
    free = inverse_cayley(wanted)
    assert torch.equal(free, free.tril(-1))
    torch.testing.assert_close(cayley(free), wanted, rtol=0, atol=2e-4)
    back = inverse_cayley(cayley(drawn(4, 6, 6).tril(-1)))
    torch.testing.assert_close(back, drawn(4, 6, 6).tril(-1), rtol=1e-3, atol=1e-3)


def test_what_has_no_inverse_is_refused() -> None:
    turned_by_half = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    for matrix in (turned_by_half, mirror):
        with pytest.raises(ValueError, match="no Cayley map"):
            inverse_cayley(matrix)


def test_the_turned_form_starts_anywhere() -> None:
    start = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    free = torch.zeros(3, 3, requires_grad=True)
    assert torch.equal(turned(start, free), start)
    turned(start, free)[0, 1].backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) == pytest.approx(1.0, abs=1e-5)


def test_half_floats_are_computed_wide() -> None:
    free = drawn(8, 8).bfloat16()
    found = cayley(free)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cayley(free.float()))
    assert cayley(drawn(3, 3).double()).dtype == torch.float64


def test_gradients_are_right() -> None:
    free = drawn(4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(cayley, free)


def test_the_error_of_no_rotation_shows() -> None:
    assert orthogonality_error(2 * torch.eye(3)) == 3
    assert orthogonality_error(torch.empty(0, 3, 3)) == 0
