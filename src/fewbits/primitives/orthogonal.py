"""Orthogonal matrices as functions of free parameters, for training. No paper names in here."""

from __future__ import annotations

import torch
from torch import Tensor

NEARLY_SINGULAR = 1e-6
"""A matrix with an eigenvalue this near to −1 has no inverse Cayley map in float32."""


def cayley(free: Tensor) -> Tensor:
    """The Cayley map (I − A/2)⁻¹(I + A/2) of A = X − Xᵀ: a rotation for any X.

    Parameters
    ----------
    free : (…, d, d) X. Half floats are computed in float32.

    Returns
    -------
    (…, d, d) with determinant +1; the identity where X is zero (or symmetric). O(d³) each.
    """
    wide = free.to(torch.promote_types(free.dtype, torch.float32))
    half = (wide - wide.mT) / 2
    identity = torch.eye(free.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(identity - half, identity + half)


def inverse_cayley(rotation: Tensor) -> Tensor:
    """The strictly lower triangular X that `cayley` maps to a rotation (…, d, d). O(d³) each.

    A = 2(U − I)(I + U)⁻¹ is large where U has an eigenvalue near −1, and training from there is
    ill conditioned: prefer `turned`, which starts at any matrix.

    Raises
    ------
    ValueError
        A determinant below 0 (negate a column first), or an eigenvalue of −1.
    """
    wide = rotation.to(torch.promote_types(rotation.dtype, torch.float32))
    identity = torch.eye(rotation.shape[-1], dtype=wide.dtype, device=wide.device)
    smallest = torch.linalg.svdvals(identity + wide)[..., -1]
    if bool((torch.linalg.det(wide) < 0).any()) or bool((smallest < NEARLY_SINGULAR).any()):
        raise ValueError("a rotation with determinant −1 or an eigenvalue −1 has no Cayley map")
    skew = 2 * torch.linalg.solve(identity + wide, wide - identity, left=False)
    return skew.tril(-1)


def turned(start: Tensor, free: Tensor) -> Tensor:
    """(…, d, d) orthogonal matrices: `start` where `free` is zero, and any other near it.

    The same family as `cayley` from another origin, well conditioned wherever it starts.
    """
    return start @ cayley(free)


def orthogonality_error(matrices: Tensor) -> float:
    """The largest entry of |UᵀU − I| over (…, d, d) matrices; 0 if there are none."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    errors = (matrices.mT @ matrices - identity).abs()
    return float(errors.max()) if errors.numel() else 0.0
