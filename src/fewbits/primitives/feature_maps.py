"""Features whose inner products stand in for exp of an inner product: attention without a softmax.

With Φ(q)·Φ(k) ≈ exp(q·k), the sums that softmax attention takes over any number of keys fit into a
state of fixed size (Katharopoulos et al. 2020, arXiv 2006.16236). The maps here differ in how many
features they need and how near they come:

=======================  ==========================  ==========================================
map                      features of d numbers       Φ(q)·Φ(k)
=======================  ==========================  ==========================================
EluFeatures              d                           positive, and no estimate: exp of 0 is d
TaylorFeatures           C(d + p, p)                 Taylor series of exp up to degree p
PositiveRandomFeatures   as many as asked for        exp in the mean over draws
=======================  ==========================  ==========================================

Queries and keys come scaled: for attention with scores s·q·k, both times √s.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class FeatureMap(Protocol):
    """A map of vectors to features."""

    def width(self, dims: int) -> int:
        """How many features a vector of so many numbers has."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """(…, r) features of (…, d) vectors; O(r) each, but random ones O(r·d)."""
        ...


@dataclass(frozen=True)
class EluFeatures:
    """elu(x) + 1 of each number (Katharopoulos et al. 2020, arXiv 2006.16236): positive."""

    def width(self, dims: int) -> int:
        return dims

    def __call__(self, x: Tensor) -> Tensor:
        """(…, d) float32 features of (…, d) vectors."""
        return functional.elu(x.float()) + 1


@dataclass(frozen=True)
class TaylorFeatures:
    """All products of up to `degree` numbers, each weighted by 1/√α! of its exponents α.

    Inner products are exactly Σ (q·k)ʲ/j! over j up to `degree`, which is positive where the
    degree is even. A product of several numbers is there once, whatever their order.

    Parameters
    ----------
    degree : p, at least 1.

    Raises
    ------
    ValueError
        A degree below 1.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"degree={self.degree} must be at least 1")

    def width(self, dims: int) -> int:
        return math.comb(dims + self.degree, self.degree)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, r) float32 features of (…, d) vectors."""
        x = x.float()
        products = [torch.ones_like(x[..., :1])]
        weights = [torch.ones(1)]
        for parents, last, weight in taylor_terms(x.shape[-1], self.degree):
            products.append(products[-1][..., parents.to(x.device)] * x[..., last.to(x.device)])
            weights.append(weight)
        return torch.cat(products, dim=-1) * torch.cat(weights).to(x.device)


@lru_cache(maxsize=16)
def taylor_terms(dims: int, degree: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each degree j from 1: the products of j numbers, and how they come from those of j − 1.

    Returns
    -------
    For each degree, (n,) int64 the place of the product without its last factor among those of
    the degree before, (n,) int64 the number that is its last factor, (n,) float32 its weight.
    """
    found = []
    places: dict[tuple[int, ...], int] = {(): 0}
    for size in range(1, degree + 1):
        products = list(itertools.combinations_with_replacement(range(dims), size))
        parents = torch.tensor([places[product[:-1]] for product in products])
        last = torch.tensor([product[-1] for product in products])
        orders = [math.prod(map(math.factorial, Counter(one).values())) for one in products]
        found.append((parents, last, torch.tensor(orders, dtype=torch.float64).rsqrt().float()))
        places = {product: place for place, product in enumerate(products)}
    return found


@dataclass(frozen=True)
class PositiveRandomFeatures:
    """exp(w·x − ‖x‖²/2)/√r for r drawn w, orthogonal in blocks of d
    (FAVOR+; Choromanski et al. 2020, arXiv 2009.14794).

    Parameters
    ----------
    count : features, r.
    seed : of the draw; queries and keys need the same.

    Raises
    ------
    ValueError
        A count below 1.
    """

    count: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")

    def width(self, dims: int) -> int:
        return self.count

    def __call__(self, x: Tensor) -> Tensor:
        """(…, r) float64 features of (…, d) vectors; float32 does not hold their range."""
        x = x.double()
        directions = orthogonal_directions(x.shape[-1], self.count, self.seed).to(x.device)
        exponents = x @ directions.T - (x * x).sum(dim=-1, keepdim=True) / 2
        return torch.exp(exponents - math.log(self.count) / 2)


@lru_cache(maxsize=16)
def orthogonal_directions(dims: int, count: int, seed: int) -> Tensor:
    """(count, dims) float64: Gaussian rows, orthogonal to each other in blocks of `dims`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(0, count, dims):
        drawn = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(drawn).Q
        lengths = torch.randn(dims, dims, generator=generator, dtype=torch.float64).norm(dim=1)
        signs = torch.where(torch.rand(dims, generator=generator) < 0.5, -1.0, 1.0)
        blocks.append(directions.T * (lengths * signs)[:, None])
    return torch.cat(blocks)[:count]
