"""Steps that are flat almost everywhere, with gradients that pass straight through them."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_through(y: Tensor) -> Tensor:
    """The sign of `y`, exactly −1 or +1 and never 0: +1 at zero, of either sign.

    The gradient passes unchanged where ``-1 <= y <= 1`` and is zero elsewhere, so that values
    far beyond the threshold are left alone. NaN stays NaN. Any shape, any floating dtype;
    O(size).
    """
    clipped = y.clamp(-1, 1)
    signs = torch.where(y >= 0, 1.0, -1.0).to(y.dtype)
    # The difference is an exact zero that carries the gradient.
    return signs + (clipped - clipped.detach())


def round_through(y: Tensor) -> Tensor:
    """Finite `y` rounded to whole numbers, halves to the even one; the gradient passes unchanged.

    Any shape, any floating dtype; O(size).
    """
    return torch.round(y).detach() + (y - y.detach())
