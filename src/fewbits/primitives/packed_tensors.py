"""Small whole numbers packed into bytes, on any device.

Rows along the last axis: n numbers of b bits become ceil(n·b/8) bytes for b = 1, 2, 4, 8, the first
number in the lowest bits. Three-valued numbers take five to a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack(numbers: Tensor, bits: int) -> Tensor:
    """(…, n) whole numbers below 2^bits → (…, ceil(n·bits/8)) uint8; bits 1, 2, 4 or 8."""
    if bits == 8:
        return numbers.to(torch.uint8)
    each = 8 // bits
    padded = functional.pad(numbers.to(torch.uint8), (0, -numbers.shape[-1] % each))
    groups = padded.unflatten(-1, (-1, each))
    shifts = torch.arange(0, 8, bits, device=numbers.device, dtype=torch.uint8)
    # The digits do not overlap, so their sum is their union.
    return (groups << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """(…, count) uint8: what `pack` packed."""
    if bits == 8:
        return packed[..., :count]
    digits = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(digits, dim=-1).flatten(-2)[..., :count]


def pack_trits(trits: Tensor) -> Tensor:
    """(…, n) numbers −1, 0 or 1 → (…, ceil(n/5)) uint8."""
    padded = functional.pad((trits + 1).to(torch.uint8), (0, -trits.shape[-1] % 5))
    weights = torch.tensor([1, 3, 9, 27, 81], device=trits.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 5)) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """(…, count) int8 numbers −1, 0 or 1: what `pack_trits` packed."""
    weights = torch.tensor([1, 3, 9, 27, 81], device=packed.device, dtype=torch.uint8)
    digits = packed.unsqueeze(-1) // weights % 3
    return digits.flatten(-2)[..., :count].to(torch.int8) - 1
