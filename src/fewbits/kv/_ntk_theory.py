"""Training a prefix in the regime of the neural tangent kernel: what the paper proves, measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError


@dataclass(frozen=True)
class PrefixTraining:
    """How gradient descent on a prefix of one length went.

    Attributes
    ----------
    length : m.
    losses : (steps + 1,) ½ Σ ‖F(x) − y‖², the first one before any step.
    weight_drift : max |W(end) − W(0)|.
    smallest_eigenvalue : of the empirical kernel H(0), over its largest: above 0 where gradient
        descent can reach a loss of 0.
    kernel_drift : ‖H(end) − H(0)‖ / ‖H(0)‖, Frobenius: near 0 where training is linear.
    """

    length: int
    losses: Tensor
    weight_drift: float
    smallest_eigenvalue: float
    kernel_drift: float


def prefix_output(weights: Tensor, signs: Tensor, x: Tensor) -> Tensor:
    """(n, d): what inputs read from a prefix, F(x) = √m · Σ_r softmax(Wᵀx)_r · a_r · w_r.

    The paper has m where √m stands here, and a learning rate that makes up for it; with √m outputs
    are of order 1 for every m.

    Parameters
    ----------
    weights : (d, m), W: keys and values of the prefix.
    signs : (m,) fixed a, −1 or 1.
    x : (n, d).
    """
    shares = torch.softmax(x @ weights, dim=1)
    return math.sqrt(weights.shape[1]) * (shares * signs) @ weights.T


def empirical_kernel(weights: Tensor, signs: Tensor, x: Tensor) -> Tensor:
    """(n·d, n·d): inner products of the gradients of all outputs by W. O(n²·d³·m)."""
    jacobian = torch.func.jacrev(lambda w: prefix_output(w, signs, x))(weights)
    rows = jacobian.flatten(2).flatten(0, 1)
    return rows @ rows.T


def train_prefix(
    x: Tensor, y: Tensor, length: int, steps: int = 500, seed: int = 0
) -> PrefixTraining:
    """Fit a prefix of Gaussian start to (n, d) targets by gradient descent on all data.

    The step is 1/λ_max of H(0), the largest with which a linear problem is sure to converge.

    Parameters
    ----------
    x, y : (n, d) inputs and targets.
    length : m.

    Raises
    ------
    FewbitsError
        Shapes that do not fit, values that are not finite, or numbers below 1.
    """
    if x.ndim != 2 or x.shape != y.shape or x.numel() == 0:
        raise FewbitsError(
            f"x and y must both be (n, d), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise FewbitsError("x or y has NaN or infinity")
    if length < 1 or steps < 1:
        raise FewbitsError("length and steps must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    x, y = x.double(), y.double()
    start = torch.randn(x.shape[1], length, generator=generator, dtype=torch.float64)
    signs = torch.where(torch.rand(length, generator=generator) < 0.5, -1.0, 1.0).double()
    kernel = empirical_kernel(start, signs, x)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    weights, losses = start.clone().requires_grad_(True), []
    for _ in range(steps):
        loss = ((prefix_output(weights, signs, x) - y) ** 2).sum() / 2
        (gradient,) = torch.autograd.grad(loss, weights)
        losses.append(loss.detach())
        with torch.no_grad():
            weights -= gradient / eigenvalues[-1]
    end = weights.detach()
    losses.append(((prefix_output(end, signs, x) - y) ** 2).sum() / 2)
    drift = (empirical_kernel(end, signs, x) - kernel).norm() / kernel.norm()
    return PrefixTraining(
        length=length,
        losses=torch.stack(losses),
        weight_drift=float((end - start).abs().max()),
        smallest_eigenvalue=float(eigenvalues[0] / eigenvalues[-1]),
        kernel_drift=float(drift),
    )
