"""Packing of small whole numbers into bytes, least significant bit first.

A row of d numbers of b bits becomes ceil(d·b / 8) bytes: number j takes the bits j·b … j·b+b−1
of the row, and bit i of the row is bit i mod 8 of byte i div 8. Left-over bits are 0.
"""

from __future__ import annotations

import numpy as np


def packed_width(dims: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-dims * bits // 8)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """(n, d) whole numbers below 2^bits → (n, ceil(d·bits/8)) uint8; bits from 1 to 8."""
    numbers = np.ascontiguousarray(numbers, dtype=np.uint8)
    if bits == 8:
        return numbers
    if bits == 1:
        return np.packbits(numbers, axis=1, bitorder="little")
    if bits in (2, 4):
        each = 8 // bits
        padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % each)))
        packed = np.zeros((len(numbers), padded.shape[1] // each), dtype=np.uint8)
        for place in range(each):
            packed |= padded[:, place::each] << np.uint8(place * bits)
        return packed
    spread = (numbers[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    spread = spread.reshape(len(numbers), numbers.shape[1] * bits)
    return np.packbits(spread, axis=1, bitorder="little")


def unpack(packed: np.ndarray, dims: int, bits: int) -> np.ndarray:
    """The (n, dims) uint8 numbers that `pack` packed."""
    if bits == 8:
        return packed[:, :dims]
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=dims, bitorder="little")
    if bits in (2, 4):
        each, mask = 8 // bits, np.uint8(2**bits - 1)
        numbers = np.empty((len(packed), packed.shape[1] * each), dtype=np.uint8)
        for place in range(each):
            numbers[:, place::each] = (packed >> np.uint8(place * bits)) & mask
        return numbers[:, :dims]
    spread = np.unpackbits(packed, axis=1, count=dims * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return spread.reshape(len(packed), dims, bits) @ weights
