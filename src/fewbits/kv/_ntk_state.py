"""A prefix as a state of fixed size: how attention looks at it, and how it joins the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.primitives.feature_maps import (
    EluFeatures,
    FeatureMap,
    PositiveRandomFeatures,
    TaylorFeatures,
)
from fewbits.primitives.partial_attention import Partial

BLOCK_FEATURES = 2**24
"""Features in memory at a time."""
LEAST_LOG_MASS = -60.0
"""A softmax with less mass than e to this counts as having so much; float32 holds its inverse."""


def feature_map(spec: str) -> FeatureMap:
    """The map of a name: ``elu``, ``taylor-P`` of degree P, ``random-R`` of R features.

    Raises
    ------
    FewbitsError
        Another name, or an odd degree, with which masses might be negative.
    """
    name, _, number = spec.partition("-")
    count = int(number) if number.isascii() and number.isdigit() and len(number) < 7 else 0
    if spec == "elu":
        return EluFeatures()
    if name == "taylor" and count > 0 and count % 2 == 0:
        return TaylorFeatures(count)
    if name == "random" and count > 0:
        return PositiveRandomFeatures(count)
    raise FewbitsError(
        f"features {spec!r} are not known; choose elu, taylor-2 (or another even degree) or "
        "random-256 (or another number)"
    )


@dataclass(frozen=True)
class PrefixState:
    """What stands for any number of keys κ and values ν of one layer.

    Attributes
    ----------
    z : (h, r, d) float32: Σ Φ(κ) νᵀ.
    k : (h, r) float32: Σ Φ(κ).
    """

    z: Tensor
    k: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, scaling: float, features: FeatureMap) -> PrefixState:
        """The state of (h, m, d) keys and values: step 2 of the paper. O(m·r·d) per head.

        The state of two prefixes one after the other is the sum of theirs.
        """
        heads, tokens, dims = keys.shape
        width = features.width(dims)
        z = keys.new_zeros(heads, width, values.shape[2], dtype=torch.float64)
        k = keys.new_zeros(heads, width, dtype=torch.float64)
        step = max(1, BLOCK_FEATURES // (heads * width))
        for start in range(0, tokens, step):
            some = slice(start, start + step)
            mapped = features(keys[:, some].float() * math.sqrt(scaling)).double()
            z += mapped.transpose(1, 2) @ values[:, some].double()
            k += mapped.sum(dim=1)
        return cls(z.float(), k.float())

    def seen_by(self, rows: Tensor, scaling: float, features: FeatureMap) -> Partial:
        """Attention of (b, h, n, d) queries, already times `scaling`, over the prefix.

        A query for which the state gives no mass sees nothing. O(r·d) per query.
        """
        batch, heads, count, _ = rows.shape
        step = max(1, BLOCK_FEATURES // (batch * heads * self.k.shape[1]))
        outputs, masses = [], []
        for start in range(0, count, step):
            some = rows[:, :, start : start + step].float() / math.sqrt(scaling)
            mapped = features(some)
            mass = torch.einsum("bhnr,hr->bhn", mapped, self.k.to(mapped))
            added = torch.einsum("bhnr,hrd->bhnd", mapped, self.z.to(mapped))
            has_mass = mass > torch.finfo(torch.float32).tiny
            mean = added / mass.where(has_mass, 1.0)[..., None]
            outputs.append(mean.where(has_mass[..., None], 0.0).to(rows.dtype))
            masses.append(mass.where(has_mass, 0.0).log().float())
        return Partial(torch.cat(outputs, dim=2), torch.cat(masses, dim=2))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.z, self.k))


def join_terms(output: Tensor, log_mass: Tensor, added: Tensor, mass: Tensor) -> Tensor:
    """Softmax attention with terms in its numerator and denominator: steps 3 and 5 of the paper.

    Parameters
    ----------
    output, log_mass : (…, d), (…): attention over tokens, and the logsumexp of their scores.
    added, mass : (…, d), (…) float32: Φ(q)ᵀZ and Φ(q)ᵀ|k|.

    Returns
    -------
    (…, d) in the dtype of `output`: (e^log_mass·output + added) / (e^log_mass + mass), where
    nothing overflows; exactly `output` where both terms are 0, and where no token is seen.
    """
    own = log_mass.clamp_min(LEAST_LOG_MASS)
    top = own.clamp_min(0)
    tokens, unit = torch.exp(own - top), torch.exp(-top)
    whole = tokens + mass * unit
    joined = output.float() * (tokens / whole)[..., None] + added * (unit / whole)[..., None]
    return torch.where((log_mass == -torch.inf)[..., None], output, joined.to(output.dtype))
