"""Keys and values as coordinates in an orthogonal basis of their head, of which the first stay.

Basis and mean of a head are shared by all tokens and all caches; a layer holds coordinates alone.
Attention happens among the coordinates: a query is turned into the basis of the keys, and only the
weighted sum of values comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import joined_valid
from fewbits.kv._forms import Exact, Form, Part
from fewbits.kv._quantized import Grouped
from fewbits.primitives.orthogonal import orthogonality_error

KINDS = ("k", "v")
LARGEST_ERROR = 1e-3
"""Of |UᵀU − I| in a file; float32 leaves less than 1e-5."""


@dataclass(frozen=True)
class Bases:
    """Orthogonal bases for the keys and the values of each head.

    Attributes
    ----------
    layers : (l,) numbers of the layers that have them, rising.
    basis : (l, 2, h, d, d) float32, of keys and of values; a column per direction, the most
        important first.
    mean : (l, 2, h, d) float32, what is taken off first.
    """

    layers: tuple[int, ...]
    basis: Tensor
    mean: Tensor

    @property
    def heads(self) -> int:
        return self.mean.shape[2]

    @property
    def width(self) -> int:
        return self.mean.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all bases and means, whatever the ranks."""
        return self.basis.nbytes + self.mean.nbytes

    def named(self) -> dict[str, Tensor]:
        """``layers.{l}.{k,v}_basis`` (h, d, d) and ``layers.{l}.{k,v}_mean`` (h, d)."""
        found = {}
        for row, layer in enumerate(self.layers):
            for place, kind in enumerate(KINDS):
                found[f"layers.{layer}.{kind}_basis"] = self.basis[row, place]
                found[f"layers.{layer}.{kind}_mean"] = self.mean[row, place]
        return found

    @classmethod
    def of_named(cls, tensors: Mapping[str, Tensor], layers: Sequence[int]) -> Bases:
        """What `named` gives, checked.

        Raises
        ------
        FewbitsError
            Tensors that are missing, do not fit together, or are not orthogonal.
        """
        try:
            stacked = [
                [tensors.get(f"layers.{layer}.{kind}_{what}") for kind in KINDS for layer in layers]
                for what in ("basis", "mean")
            ]
            basis, mean = (
                torch.stack(one).unflatten(0, (2, len(layers))).transpose(0, 1).contiguous()  # type: ignore[arg-type]
                for one in stacked
            )
        except (TypeError, RuntimeError):
            raise FewbitsError("the bases of some layers are missing or of another shape") from None
        shaped = basis.ndim == 5 and basis.shape[:-1] == mean.shape
        shaped = shaped and basis.shape[-1] == basis.shape[-2] and len(tensors) == 4 * len(layers)
        if not shaped or basis.dtype != torch.float32 or mean.dtype != torch.float32:
            raise FewbitsError(
                "the bases must be float32 (h, d, d) with means (h, d) of each layer"
            )
        if orthogonality_error(basis) > LARGEST_ERROR:
            raise FewbitsError("the bases are not orthogonal")
        return cls(tuple(layers), basis, mean)


# -- one layer -----------------------------------------------------------------------------


class Projection:
    """The bases of the heads of one layer, of keys or of values, cut to a rank for each head.

    Heads of equal rank lie together in a bucket, so that ragged ranks cost no padding.

    Parameters
    ----------
    basis, mean : (h, d, d) and (h, d).
    ranks : (h,) int64, 1 to d.
    """

    def __init__(self, basis: Tensor, mean: Tensor, ranks: np.ndarray) -> None:
        self.mean, self.width = mean[:, None], mean.shape[1]
        is_plain = torch.equal(basis, torch.eye(self.width).expand_as(basis))
        self.buckets: list[tuple[Tensor, int, Tensor | None]] = []
        for rank in sorted(set(ranks.tolist()), reverse=True):
            heads = torch.from_numpy(np.flatnonzero(ranks == rank))
            cut = None if is_plain else basis[heads, :, :rank].contiguous()
            self.buckets.append((heads, rank, cut))
        self.back = torch.cat([heads for heads, _, _ in self.buckets]).argsort()

    def on(self, device: torch.device) -> Self:
        """This projection, with its tensors on a device from now on."""
        if self.mean.device != device:
            self.mean, self.back = self.mean.to(device), self.back.to(device)
            self.buckets = [
                (heads.to(device), rank, cut if cut is None else cut.to(device))
                for heads, rank, cut in self.buckets
            ]
        return self

    def ahead(self, rows: Tensor) -> list[Tensor]:
        """(b, h, r, d) rows → coordinates (b, bucket, r, rank) of each bucket, uncentred."""
        found = []
        for heads, rank, cut in self.buckets:
            own = rows if len(self.buckets) == 1 else rows[:, heads]
            turned = own[..., :rank] if cut is None else (own.float() @ cut).to(rows.dtype)
            found.append(turned.contiguous())
        return found

    def backward(self, coordinates: Sequence[Tensor]) -> Tensor:
        """Coordinates of each bucket → (b, h, r, d) rows, without the mean."""
        found = []
        for own, (_, _, cut) in zip(coordinates, self.buckets, strict=True):
            if cut is None:
                lacking = self.width - own.shape[3]
                found.append(torch.nn.functional.pad(own, (0, lacking)))
            else:
                found.append((own.float() @ cut.mT).to(own.dtype))
        return self.in_order(found)

    def in_order(self, found: list[Tensor]) -> Tensor:
        """What was computed for each bucket, (b, bucket, …), as (b, h, …)."""
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)[:, self.back]

    def centred(self, states: Tensor) -> Tensor:
        return (states.float() - self.mean).to(states.dtype)

    def projected(self, states: Tensor) -> Tensor:
        """(b, h, s, d) keys or values as they are seen after losing the other coordinates."""
        back = self.backward(self.ahead(self.centred(states)))
        return (back.float() + self.mean).to(states.dtype)


@dataclass
class Projected(Form):
    """Coordinates of the keys or values of each head.

    Attributes
    ----------
    held : the coordinates (b, bucket, s, rank) of each bucket of the projection.
    projection : shared by all tokens of the layer; no bytes of the cache.
    """

    held: tuple[Form, ...]
    projection: Projection

    @classmethod
    def of(cls, states: Tensor, projection: Projection) -> Projected:
        """Project (b, h, s, d) keys or values."""
        projection.on(states.device)
        coordinates = projection.ahead(projection.centred(states))
        return cls(tuple(Exact(one) for one in coordinates), projection)

    @property
    def tokens(self) -> int:
        return self.held[0].tokens

    def read(self) -> Tensor:
        held = [one.read() for one in self.held]
        back = self.projection.on(held[0].device).backward(held)
        return (back.float() + self.projection.mean).to(back.dtype)

    def scores(self, queries: Tensor) -> Tensor:
        projection = self.projection.on(queries.device)
        asked = projection.ahead(queries)
        scores = [one.scores(rows) for one, rows in zip(self.held, asked, strict=True)]
        # The softmax of these keys alone would not see the mean; beside other keys, or with
        # scores that are capped, it counts.
        offset = queries.float() @ projection.mean.mT
        return projection.in_order(scores) + offset.to(queries.dtype)

    def mix(self, weights: Tensor) -> Tensor:
        projection = self.projection.on(weights.device)
        mixed = []
        for one, (heads, _, _) in zip(self.held, projection.buckets, strict=True):
            mixed.append(one.mix(weights if len(self.held) == 1 else weights[:, heads]))
        back = projection.backward(mixed)
        mass = weights.float().sum(dim=3, keepdim=True)
        return (back.float() + mass * projection.mean).to(back.dtype)

    def inner(self, change: Any) -> Form:
        return replace(self, held=tuple(one.inner(change) for one in self.held))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, one in enumerate(self.held):
            yield from ((f"{number}.{name}", tensor) for name, tensor in one.tensors())

    def map(self, function: Any) -> Self:
        return replace(self, held=tuple(one.map(function) for one in self.held))


# -- several parts as one --------------------------------------------------------------------


def merged(parts: list[Part]) -> list[Part]:
    """Projected parts, oldest first, as one. O(bytes held)."""
    if len(parts) < 2:
        return parts
    keys, values = (
        together([form for form in forms if isinstance(form, Projected)])
        for forms in ([part.keys for part in parts], [part.values for part in parts])
    )
    return [Part(keys, values, joined_valid(parts))]


def together(forms: Sequence[Projected]) -> Projected:
    """Projected tokens one after the other."""
    buckets = zip(*(form.held for form in forms), strict=True)
    return replace(forms[0], held=tuple(end_to_end(bucket) for bucket in buckets))


def end_to_end(forms: Sequence[Form]) -> Form:
    """Coordinates of one bucket, exact or quantised, one after the other."""
    if all(isinstance(form, Exact) for form in forms):
        return Exact(torch.cat([form.read() for form in forms], dim=2))
    quantised = [form for form in forms if isinstance(form, Grouped)]
    if len(quantised) == len(forms):
        return Grouped.cat(quantised)
    raise FewbitsError("coordinates can be quantised by kivi, but by no other method")
