"""Matrices of low rank in the place of linear maps. No paper names in here.

A map y = x Wᵀ of rows x becomes y = (x A) B with thin A (`down`) and B (`up`). Three ways to find
them: the best for the matrix itself (`truncated`), for the matrix with some inputs counting more
(`truncated` with `scale`), and for the outputs on real data (`fitted_to_outputs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Added to the mean size of an input, so that one that is always 0 can be divided by."""


@dataclass
class LowRank:
    """Two factors of a linear map.

    Attributes
    ----------
    down : (inputs, rank).
    up : (rank, outputs).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs) of the map."""
        return self.down.shape[0], self.up.shape[1]

    @property
    def product(self) -> Tensor:
        """(inputs, outputs): the map that it stands for, as a matrix on the right of rows."""
        return self.down @ self.up

    def to(self, like: Tensor) -> LowRank:
        """The same where another tensor is, and in its dtype."""
        return LowRank(self.down.to(like), self.up.to(like))


def input_scale(mean_sizes: Tensor, alpha: float = 0.5) -> Tensor:
    """(inputs,) how much each input counts, from the mean of its absolute value: its power `alpha`.

    A common factor changes nothing, so that a sum does as well as a mean; 0 makes all count alike.
    """
    return (mean_sizes + SMALLEST) ** alpha


def truncated(weight: Tensor, rank: int, scale: Tensor | None = None) -> LowRank:
    """The factors of a (outputs, inputs) matrix W that are nearest to it.

    Parameters
    ----------
    rank : 1 to the smaller side of W.
    scale : (inputs,) s above 0: what is smallest is ‖diag(s)(Wᵀ − A B)‖. Without, ‖Wᵀ − A B‖.

    Returns
    -------
    Factors in the dtype of W, the singular values shared equally between both. O(outputs·inputs·
    min(outputs, inputs)) in float64.

    Raises
    ------
    ValueError
        A rank or a scale that does not fit.
    """
    check(weight, rank)
    turned = weight.detach().double().T
    if scale is not None:
        if scale.shape != turned.shape[:1] or not bool((scale > 0).all()):
            raise ValueError(f"scale must be {turned.shape[0]} numbers above 0")
        turned = scale.double()[:, None] * turned
    left, sizes, right = torch.linalg.svd(turned, full_matrices=False)
    roots = sizes[:rank].sqrt()
    down, up = left[:, :rank] * roots, roots[:, None] * right[:rank]
    if scale is not None:
        down = down / scale.double()[:, None]
    return LowRank(down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous())


def fitted_to_outputs(weight: Tensor, outputs: Tensor, rank: int) -> LowRank:
    """The factors whose outputs are nearest to those of the map (reduced-rank regression).

    Of all A and B, the sum of ‖x Wᵀ − x A B‖² over the rows x is smallest where B has the first
    principal directions of y = x Wᵀ (not centred) as rows and A = Wᵀ Bᵀ.

    Parameters
    ----------
    weight : (outputs, inputs).
    outputs : (outputs, outputs), the sum of y yᵀ; with G the sum of x xᵀ, it is W G Wᵀ.

    Returns
    -------
    Factors in the dtype of W; the rows of `up` are orthonormal. O(outputs³ + outputs·inputs·rank).

    Raises
    ------
    ValueError
        A rank or a matrix that does not fit.
    """
    check(weight, rank)
    if outputs.shape != (weight.shape[0], weight.shape[0]):
        raise ValueError(f"outputs must be ({weight.shape[0]}, {weight.shape[0]})")
    _, directions = torch.linalg.eigh(outputs.double())
    best = directions[:, -rank:].flip(1)
    down = weight.detach().double().T @ best
    return LowRank(down.to(weight.dtype).contiguous(), best.T.to(weight.dtype).contiguous())


def check(weight: Tensor, rank: int) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError("the map must be a matrix of floats, (outputs, inputs)")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} must be 1 to {min(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the map has NaN or infinity; check the weights")
