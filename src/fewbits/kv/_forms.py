"""In what form a layer holds keys or values: exact, fewer channels, or fewer coordinates.

A form answers two questions without showing the tokens at full width: the inner products of
queries with keys (`scores`), and the weighted sum of values (`mix`). Forms nest: pruned channels
may be quantised inside. All tensors begin with batch and key head, (b, h, …).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


class Form:
    """Keys or values of s tokens, (b, h, s, d) if they were exact."""

    @property
    def tokens(self) -> int:
        raise NotImplementedError  # abstract

    def read(self) -> Tensor:
        """(b, h, s, d): the keys or values as attention sees them."""
        raise NotImplementedError  # abstract

    def scores(self, queries: Tensor) -> Tensor:
        """(b, h, r, s): inner products of (b, h, r, d) queries with keys."""
        return queries @ self.read().transpose(2, 3)

    def mix(self, weights: Tensor) -> Tensor:
        """(b, h, r, d): sums of values by (b, h, r, s) weights."""
        return weights @ self.read()

    def inner(self, change: Callable[[Tensor], Form]) -> Form:
        """The same form with its exact numbers held otherwise."""
        raise NotImplementedError  # abstract

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything it holds."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value
            elif isinstance(value, Form):
                yield from ((f"{field.name}.{name}", one) for name, one in value.tensors())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed: another device, other rows of the batch."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Form):
                changed[field.name] = value.map(function)
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]


@dataclass
class Exact(Form):
    """(b, h, s, d) numbers as the model made them."""

    numbers: Tensor

    @property
    def tokens(self) -> int:
        return self.numbers.shape[2]

    def read(self) -> Tensor:
        return self.numbers

    def inner(self, change: Callable[[Tensor], Form]) -> Form:
        return change(self.numbers)


@dataclass
class Channels(Form):
    """Some channels of each head; the others count as zero.

    `kept` is (b, h, k) uint8 or int16: the channels that `held` has, of `width`.
    """

    kept: Tensor
    held: Form
    width: int

    @classmethod
    def of(cls, numbers: Tensor, kept: Tensor) -> Channels:
        """Keep the channels `kept` (b, h, k) of (b, h, s, d) numbers."""
        where = kept.long()[:, :, None].expand(-1, -1, numbers.shape[2], -1)
        return cls(kept, Exact(numbers.gather(3, where)), numbers.shape[3])

    @property
    def tokens(self) -> int:
        return self.held.tokens

    def read(self) -> Tensor:
        held = self.held.read()
        full = held.new_zeros(*held.shape[:3], self.width)
        return full.scatter_(3, self._where(held.shape[2]), held)

    def scores(self, queries: Tensor) -> Tensor:
        return self.held.scores(queries.gather(3, self._where(queries.shape[2])))

    def mix(self, weights: Tensor) -> Tensor:
        mixed = self.held.mix(weights)
        full = mixed.new_zeros(*mixed.shape[:3], self.width)
        return full.scatter_(3, self._where(mixed.shape[2]), mixed)

    def inner(self, change: Callable[[Tensor], Form]) -> Form:
        return dataclasses.replace(self, held=self.held.inner(change))

    def _where(self, rows: int) -> Tensor:
        return self.kept.long()[:, :, None].expand(-1, -1, rows, -1)


@dataclass
class Part:
    """Some tokens of a layer: their keys, their values, and which of them are padding.

    `valid` is (b, 1, s) or (b, h, s) bool, or None where none is padding. `companions` are
    (b, 1, s, …) tensors that go with the tokens while they are exact.
    """

    keys: Form
    values: Form
    valid: Tensor | None = None
    companions: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.keys.tokens

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, form in (("keys", self.keys), ("values", self.values)):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in form.tensors())
        if self.valid is not None:
            yield "valid", self.valid
        yield from ((f"companions.{name}", one) for name, one in self.companions.items())

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        valid = None if self.valid is None else function(self.valid)
        beside = {name: function(one) for name, one in self.companions.items()}
        return Part(self.keys.map(function), self.values.map(function), valid, beside)
