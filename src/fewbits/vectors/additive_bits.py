"""Additive bits: vectors as sums of learned directions with signs. A codec of our own.

An item is x ≈ c + Σ_j b_j·d_j with b_j = ±1: one bit per direction and nothing else. It is
additive quantization with codebooks of two words, so that decoding is one matrix product and a
scan of the bits scores float queries. Learning needs no gradients:

1. Start from transform coding: principal directions share the bits by how much they vary, and
   each is cut by a Lloyd–Max quantizer whose cell numbers are the first bits.
2. Alternate: a ridge regression finds the directions d_j for the bits; coordinate descent flips
   every bit that brings its row nearer.

For ``cosine`` and ``ip`` the reconstruction is scaled back to the mean length the rows had in
`fit`: its own length depends only on the code, so this costs no bytes and ranks better. Rows of
one length (unit vectors) are what this codec is for; others lose their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewbits.core.code import Code
from fewbits.core.codec import Codec, DecodingSearcher, State, learned, rows_per_block
from fewbits.core.errors import FewbitsError
from fewbits.core.search import Matches, Searcher
from fewbits.primitives.bits import pack, unpack
from fewbits.primitives.level_scan import LevelScan
from fewbits.primitives.lloyd_max import nearest_level, normal_levels

FIT_ROWS = 16_384
"""Learning stops gaining beyond so many rows; more are sampled down."""
ALLOCATION_POWER = 1.25
"""Above 1, directions of high variance get more bits than least squares would give them:
queries vary where items do, so errors there cost more in ranking."""
RIDGE = 0.01
"""Added to the covariance of the bits, per row."""
FIT_ROUNDS, FIT_SWEEPS, ENCODE_SWEEPS = 6, 3, 10
MOST_BITS = 8
"""Bits that one principal direction may start with."""
SIGNS = np.array([-1, 1], dtype=np.float32)


@dataclass
class AdditiveBits(Codec):
    """Sums of signed directions, `bytes` bytes per vector.

    `fit` costs O(n·d·b) per round for b bits and n ≤ 16,384 rows, and O(d³ + b³); encoding
    O(d·b + flips·b) per row.

    Parameters
    ----------
    bytes : bytes per vector; eight directions each.
    seed : of the sample of rows to learn from.
    """

    name: ClassVar[str] = "additive-bits"
    cubic: ClassVar[bool] = True

    bytes: int = 48
    seed: int = 0

    mean_: np.ndarray = learned()
    """(d,) float32."""
    principal_: np.ndarray = learned()
    """(d, r) float32: the principal directions that the start gives bits to."""
    spread_: np.ndarray = learned()
    """(r,) float32: standard deviation along each."""
    shares_: np.ndarray = learned()
    """(r,) uint8: bits of each; they add up to 8·bytes."""
    directions_: np.ndarray = learned()
    """(b, d) float32."""
    offset_: np.ndarray = learned()
    """(d,) float32: c."""
    length_: np.ndarray = learned()
    """(1,) float32: mean length of the rows."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"additive-bits:bytes={size}", None)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        if rows < 256:
            return []
        sizes = sorted({dims // part for part in (32, 16, 8, 4)} - {0})
        return [f"additive-bits:bytes={size}" for size in sizes]

    @property
    def bits(self) -> int:
        return 8 * self.bytes

    def _fit(self, x: np.ndarray) -> None:
        if not 1 <= self.bytes <= self.dims_:
            raise FewbitsError(
                f"additive-bits: bytes={self.bytes} must be between 1 and the dimensions"
            )
        if len(x) < 2:
            raise FewbitsError("additive-bits needs at least 2 rows to learn from")
        if len(x) > FIT_ROWS:
            x = x[np.random.default_rng(self.seed).choice(len(x), FIT_ROWS, replace=False)]
        self.length_ = np.linalg.norm(x, axis=1).mean(keepdims=True).astype(np.float32)
        self.mean_ = x.mean(axis=0)
        centred = x - self.mean_
        variances, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred / len(x))
        variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1]
        if not variances[0] > 0:
            raise FewbitsError("additive-bits: all rows are the same; there is nothing to learn")
        shares = share_bits(variances**ALLOCATION_POWER, self.bits)
        kept = shares > 0
        self.shares_ = shares[kept].astype(np.uint8)
        self.principal_ = vectors[:, kept].astype(np.float32)
        self.spread_ = np.sqrt(variances[kept]).astype(np.float32)
        signs = self._start(x)
        for _ in range(FIT_ROUNDS):
            self._fit_directions(x, signs)
            signs = flip(x - self.offset_, self.directions_, signs, FIT_SWEEPS)
        self._fit_directions(x, signs)

    def _start(self, x: np.ndarray) -> np.ndarray:
        """(n, b) ±1 float32: binary digits of the Lloyd–Max cell along each direction."""
        along = (x - self.mean_) @ self.principal_ / np.maximum(self.spread_, 1e-12)
        columns = []
        for number, share in enumerate(self.shares_):
            cell = nearest_level(along[:, number], normal_levels(int(share)))
            columns += [(cell >> digit) & 1 for digit in range(int(share))]
        return SIGNS[np.stack(columns, axis=1)]

    def _fit_directions(self, x: np.ndarray, signs: np.ndarray) -> None:
        """Ridge regression of the rows on their signs."""
        mean_signs, mean_rows = signs.mean(axis=0), x.mean(axis=0)
        centred = (signs - mean_signs).astype(np.float64)
        gram = centred.T @ centred + RIDGE * len(x) * np.eye(self.bits)
        directions = np.linalg.solve(gram, centred.T @ (x - mean_rows))
        self.directions_ = directions.astype(np.float32)
        self.offset_ = (mean_rows - mean_signs @ directions).astype(np.float32)

    def _check_state(self) -> None:
        d, b, r = self.dims_, self.bits, len(self.spread_)
        shapes = {
            "mean": (self.mean_, (d,)),
            "principal": (self.principal_, (d, r)),
            "spread": (self.spread_, (r,)),
            "shares": (self.shares_, (r,)),
            "directions": (self.directions_, (b, d)),
            "offset": (self.offset_, (d,)),
            "length": (self.length_, (1,)),
        }
        wrong = [name for name, (array, shape) in shapes.items() if array.shape != shape]
        if wrong or self.shares_.dtype != np.uint8 or int(self.shares_.sum()) != b:
            raise ValueError(f"additive-bits: {', '.join(wrong) or 'shares'} do not fit together")
        if self.shares_.min() < 1 or self.shares_.max() > MOST_BITS:
            raise ValueError("additive-bits: shares must be between 1 and 8")

    def _encode(self, x: np.ndarray) -> State:
        signs = flip(x - self.offset_, self.directions_, self._start(x), ENCODE_SWEEPS)
        return {"bits": pack(signs > 0, 1)}

    def _decode(self, code: Code) -> np.ndarray:
        decoded = self.offset_ + SIGNS[unpack(code["bits"], self.bits, 1)] @ self.directions_
        lengths = np.linalg.norm(decoded, axis=1, keepdims=True)
        return np.asarray(decoded * (self.length_ / np.maximum(lengths, 1e-12)))

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2":
            return DecodingSearcher(self, code, metric)
        return AdditiveSearcher(self, code)


class AdditiveSearcher:
    """Scans the bits with the queries' inner products with all directions.

    Preparing costs one decoding of all rows, for their lengths. The offset is scored by eight
    more bits per row that are always 1.
    """

    def __init__(self, codec: AdditiveBits, code: Code) -> None:
        self.codec = codec
        step = rows_per_block(codec.dims_)
        scales = []
        for start in range(0, len(code), step):
            bits = unpack(code["bits"][start : start + step], codec.bits, 1)
            plain = codec.offset_ + SIGNS[bits] @ codec.directions_
            scales.append(codec.length_ / np.maximum(np.linalg.norm(plain, axis=1), 1e-12))
        ones = np.full((len(code), 1), 255, dtype=np.uint8)
        packed = np.concatenate([code["bits"], ones], axis=1)
        self.scan = LevelScan(packed, codec.bits + 8, 1, SIGNS, np.concatenate(scales))

    def search(self, queries: np.ndarray, k: int) -> Matches:
        offset = np.repeat(queries @ self.codec.offset_[:, None] / 8, 8, axis=1)
        products = np.concatenate([queries @ self.codec.directions_.T, offset], axis=1)
        return self.scan.search(products, k)


def share_bits(weights: np.ndarray, total: int) -> np.ndarray:
    """Give `total` bits out one by one, each where it lowers the weighted error most.

    A bit lowers the error of a direction about fourfold, so the next bit is worth the weight
    over 4^(bits it has).
    """
    worth = weights[:, None] * 0.25 ** np.arange(MOST_BITS)
    order = np.argsort(-worth.ravel(), kind="stable")[:total]
    return np.bincount(order // MOST_BITS, minlength=len(weights))


def flip(x: np.ndarray, directions: np.ndarray, signs: np.ndarray, sweeps: int) -> np.ndarray:
    """Coordinate descent on the signs: flip each that brings its row nearer, in turn.

    Parameters
    ----------
    x : (n, d) rows without the offset.
    directions : (b, d).
    signs : (n, b) ±1 to start from; changed in place and returned.
    sweeps : passes over all signs at most; ends when none flips.
    """
    gram = directions @ directions.T
    # Inner products of what is left of each row with each direction, kept up to date.
    left = np.asfortranarray(x @ directions.T - signs @ gram)
    for _ in range(sweeps):
        flipped = 0
        for j in range(len(directions)):
            # Flipping changes the squared error by 4·(b_j·left_j + |d_j|²).
            rows = np.flatnonzero(signs[:, j] * left[:, j] + gram[j, j] < 0)
            if len(rows):
                left[rows] += (2 * signs[rows, j])[:, None] * gram[j]
                signs[rows, j] *= -1
                flipped += len(rows)
        if not flipped:
            break
    return signs
