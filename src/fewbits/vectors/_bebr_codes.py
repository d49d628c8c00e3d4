"""What `bebr.BEBR` computes without torch: its networks, and inner products of its codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# -- networks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One network: a linear path, an MLP with ReLU, or their sum, with one bias at the end."""

    arrays: list[np.ndarray]
    linear: bool

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y, arrays = self.arrays[-1], self.arrays[:-1]
        if self.linear:
            y, arrays = x @ arrays[0] + y, arrays[1:]
        for weights, bias in zip(arrays[:-1:2], arrays[1:-1:2], strict=True):
            x = np.maximum(x @ weights + bias, 0)
        return np.asarray(x @ arrays[-1] + y if arrays else y)


def block_shapes(
    inputs: int, outputs: int, hidden: int, blocks: int, linear: bool
) -> list[tuple[int, ...]]:
    """Shapes of a `Block`'s arrays: the linear path, weights and bias of each hidden layer, the
    last weights, and the bias of the sum."""
    shapes: list[tuple[int, ...]] = [(inputs, outputs)] if linear else []
    if hidden:
        for layer in range(blocks):
            shapes += [(hidden if layer else inputs, hidden), (hidden,)]
        shapes.append((hidden, outputs))
    return [*shapes, (outputs,)]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their length; zeros stay."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


# -- inner products of codes, four ways ------------------------------------------------------


def code_values(numbers: np.ndarray, bits: int) -> np.ndarray:
    """float32 values 2^-(bits−1) · (2n − (2^bits − 1)) of numbers n."""
    return odd_integers(numbers, bits).astype(np.float32) * np.float32(0.5 ** (bits - 1))


def odd_integers(numbers: np.ndarray, bits: int) -> np.ndarray:
    """2n − (2^bits − 1) as int32: odd, from −(2^bits − 1) to 2^bits − 1."""
    return 2 * numbers.astype(np.int32) - (2**bits - 1)


def integer_products(queries: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """(q, n) int32 inner products of `odd_integers`: 4^(bits−1) times those of b. O(q·n·m)."""
    return np.asarray(odd_integers(queries, bits) @ odd_integers(rows, bits).T)


def popcount_products(queries: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """The same from bit planes: bits² exclusive ors of one bit per dimension. O(bits²·q·n·m/8)."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
    total = np.zeros((len(queries), len(rows)), dtype=np.int32)
    for s in range(bits):
        asked = np.packbits(queries >> np.uint8(s) & 1, axis=1)
        for t in range(bits):
            plane = np.packbits(rows >> np.uint8(t) & 1, axis=1)
            differing = ones[asked[:, None] ^ plane[None]].sum(axis=2, dtype=np.int32)
            total += (rows.shape[1] - 2 * differing) << (s + t)
    return total


def table_products(queries: np.ndarray, packed: np.ndarray, bits: int) -> np.ndarray:
    """The same from packed rows (bits 1, 2 or 4): each half byte looks up its share of the
    product in a table of 16 that the query makes, as the paper's distance does in registers.

    O(q·n·m·bits/4) look-ups.
    """
    each = 4 // bits
    asked = odd_integers(queries, bits)
    asked = np.pad(asked, ((0, 0), (0, packed.shape[1] * 2 * each - asked.shape[1])))
    nibbles = np.arange(16)
    digits = np.stack([nibbles >> (bits * place) & (2**bits - 1) for place in range(each)])
    tables = asked.reshape(len(asked), -1, each) @ odd_integers(digits, bits)  # (q, groups, 16)
    halves = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    groups = np.arange(halves.shape[1])
    return np.asarray([table[groups, halves].sum(axis=1) for table in tables])
