"""Keys and values in a few bits: group-wise asymmetric quantisation, as KIVI has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits.kv._forms import Form
from fewbits.primitives.packed_tensors import pack, unpack

BITS = (1, 2, 4, 8)


@dataclass
class Grouped(Form):
    """Whole numbers of a few bits, with a scale and a least value for each group.

    Groups lie along the tokens of one channel (``along`` 2), or along the channels of one token
    (``along`` 3); the last one may be shorter.

    Attributes
    ----------
    codes : (b, h, s, ceil(d·bits/8)) uint8.
    scale, low : (b, h, ⌈s/group⌉, d) or (b, h, s, ⌈d/group⌉), in the dtype of the model.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    group: int
    along: int
    width: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, group: int, along: int) -> Grouped:
        """Quantise (b, h, s, d) numbers by the least and the greatest of each group."""
        grouped = groups_of(numbers.float(), group, along)
        low = grouped.amin(dim=along + 1, keepdim=True)
        high = grouped.amax(dim=along + 1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).to(numbers.dtype)
        low = low.to(numbers.dtype)
        step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
        codes = ((grouped - low.float()) / step).round().clamp(0, 2**bits - 1)
        flat = codes.flatten(along, along + 1).narrow(along, 0, numbers.shape[along])
        small = scale.squeeze(along + 1).contiguous(), low.squeeze(along + 1).contiguous()
        return cls(pack(flat, bits), *small, bits, group, along, numbers.shape[3])

    @classmethod
    def cat(cls, forms: Sequence[Grouped]) -> Grouped:
        """Forms of equal bits and whole groups, one after the other."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(form, name) for form in forms], dim=2)

        parts = {"codes": joined("codes"), "scale": joined("scale"), "low": joined("low")}
        return replace(forms[0], **parts)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    def read(self) -> Tensor:
        codes = unpack(self.codes, self.width, self.bits).to(self.scale.dtype)
        grouped = groups_of(codes, self.group, self.along)
        at = self.along + 1
        numbers = torch.addcmul(self.low.unsqueeze(at), grouped, self.scale.unsqueeze(at))
        return numbers.flatten(self.along, at).narrow(self.along, 0, codes.shape[self.along])


def groups_of(numbers: Tensor, group: int, along: int) -> Tensor:
    """(b, h, s, d) with an axis cut into groups; what a short last group lacks repeats its last."""
    lacking = -numbers.shape[along] % group
    if lacking:
        last = numbers.narrow(along, numbers.shape[along] - 1, 1)
        shape = list(numbers.shape)
        shape[along] = lacking
        numbers = torch.cat([numbers, last.expand(shape)], dim=along)
    return numbers.unflatten(along, (-1, group))
