"""Seeded random sketches: SimHash buckets, projections, and sets of vectors cut by bucket.

Everything is derived from the raw output of PCG64. NumPy promises that this stream stays the
same on every platform and in every version, which it does not promise for its normal numbers
or its bounded integers. So a seed and a path name the same matrix everywhere, and a file needs
to hold only the seed. Different paths give independent numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fewbits.primitives.ragged import Ragged

MAX_BITS = 16
"""Most hash bits: 2^16 buckets."""

SIGN_BLOCK_ROWS = 256
"""Rows of a large sign matrix that exist at a time; part of what a seed means."""


def stream(seed: int, *path: int) -> np.random.PCG64:
    """The random stream of `seed` (≥ 0) that belongs to `path`."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path))


def normals(source: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32 of `shape`, by the Box–Muller method."""
    count = math.prod(shape)
    half = (count + 1) // 2
    uniform = ((source.random_raw(2 * half) >> np.uint64(11)) + 1) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count].astype(np.float32).reshape(shape)


def signs(source: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Fair signs, float32 ±1 of `shape`."""
    count = math.prod(shape)
    words = np.atleast_1d(source.random_raw(-(-count // 64))).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return (1 - 2 * bits.astype(np.float32)).reshape(shape)


# -- buckets -------------------------------------------------------------------------------


def hyperplanes(source: np.random.PCG64, dims: int, bits: int) -> np.ndarray:
    """(dims, bits) float32: normals of random hyperplanes through the origin."""
    return normals(source, (dims, bits))


def bucket_ids(dots: np.ndarray) -> np.ndarray:
    """SimHash bucket of each vector from its dot products with hyperplanes.

    Bit i of the number is set when ``dots[..., i] > 0``; zero counts as below.

    Parameters
    ----------
    dots : (..., bits), at most 16 bits. No bits at all make one bucket.

    Returns
    -------
    (...) int64 in 0 .. 2^bits - 1, plain binary numbers.
    """
    return (dots > 0) @ (1 << np.arange(dots.shape[-1], dtype=np.int64))


# -- projections ---------------------------------------------------------------------------


def sign_matrix(source: np.random.PCG64, dims: int, dims_out: int) -> np.ndarray:
    """(dims, dims_out) float32 of ±1/√dims_out; keeps inner products on average."""
    return signs(source, (dims, dims_out)) / np.float32(math.sqrt(dims_out))


def count_sketch(
    source: np.random.PCG64, dims: int, dims_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """A random output slot (dims,) int64 and a random sign (dims,) float32 per coordinate."""
    raw = np.atleast_1d(source.random_raw(dims))
    slots = ((raw >> np.uint64(1)) % np.uint64(dims_out)).astype(np.int64)
    return slots, 1 - 2 * (raw & np.uint64(1)).astype(np.float32)


def count_sketch_matrix(source: np.random.PCG64, dims: int, dims_out: int) -> np.ndarray:
    """(dims, dims_out) float32 with one ±1 per row; keeps inner products on average."""
    slots, sign = count_sketch(source, dims, dims_out)
    matrix = np.zeros((dims, dims_out), dtype=np.float32)
    matrix[np.arange(dims), slots] = sign
    return matrix


def add_count_sketch(out: np.ndarray, x: np.ndarray, source: np.random.PCG64) -> None:
    """Add the count sketch of `x` (n, d) to `out` (n, dims_out), in place. O(n·d)."""
    slots, sign = count_sketch(source, x.shape[1], out.shape[1])
    order = np.argsort(slots, kind="stable")
    used, starts = np.unique(slots[order], return_index=True)
    out[:, used] += np.add.reduceat(x[:, order] * sign[order], starts, axis=1)


def add_sign_projection(out: np.ndarray, x: np.ndarray, seed: int, *path: int) -> None:
    """Add `x` (n, d) times a random ±1/√dims_out matrix to `out` (n, dims_out), in place.

    The matrix exists in blocks of rows only. O(n·d·dims_out), and d·dims_out for the matrix.
    """
    for number, start in enumerate(range(0, x.shape[1], SIGN_BLOCK_ROWS)):
        part = x[:, start : start + SIGN_BLOCK_ROWS]
        out += part @ sign_matrix(stream(seed, *path, number), part.shape[1], out.shape[1])


# -- sets of vectors -----------------------------------------------------------------------


def value_hash(x: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of each row of float32 `x` (n, d), equal for equal rows. O(n·d)."""
    words = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    odd = np.atleast_1d(stream(0).random_raw(x.shape[1])) | np.uint64(1)
    return np.asarray(np.einsum("nd,d->n", words, odd, dtype=np.uint64, casting="same_kind"))


def in_value_order(sets: Ragged) -> Ragged:
    """The same sets, each in an order that depends only on the values of its vectors.

    A set has no order, but ties and rounding would see one.
    """
    order = np.lexsort((value_hash(sets.flat), sets.owner))
    return sets.with_flat(sets.flat[order])


def batches(sets: Ragged, most_vectors: int, most_sets: int) -> Iterator[slice]:
    """Cut sets into runs of at most so many vectors and sets, but at least one set."""
    start = 0
    while start < len(sets):
        reach = sets.offsets[start] + most_vectors
        stop = int(np.searchsorted(sets.offsets, reach, side="right")) - 1
        stop = min(max(stop, start + 1), start + max(most_sets, 1))
        yield slice(start, stop)
        start = stop


def sum_by_bucket(
    values: np.ndarray, sets: Ragged, ids: np.ndarray, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums (n, B, w) float64 of the values (t, w) in each bucket of each set, and counts (n, B)."""
    size, width = len(sets) * buckets, values.shape[1]
    keys = sets.owner * buckets + ids
    places = (keys[:, None] * width + np.arange(width)).ravel()
    sums = np.bincount(places, weights=values.ravel(), minlength=size * width)
    counts = np.bincount(keys, minlength=size)
    return sums.reshape(len(sets), buckets, width), counts.reshape(len(sets), buckets)


def nearest_member(members: np.ndarray, limit: int) -> np.ndarray:
    """For every bucket, the member of the occupied bucket with the fewest differing bits.

    Parameters
    ----------
    members : (n, 2^bits) int64 in 0 .. limit; the member standing for each bucket, and `limit`
        where a bucket is empty. Every row has at least one occupied bucket.
    limit : larger than every member.

    Returns
    -------
    (n, 2^bits) int64. Occupied buckets keep their member; ties go to the smaller member.
    Cost O(n · 2^bits · bits).
    """
    rows, buckets = members.shape
    bits = buckets.bit_length() - 1
    # One number holds distance and member, so that its minimum decides by one, then the other.
    best = np.where(members < limit, members, (bits + 1) * limit)
    for bit in range(bits):
        pairs = best.reshape(rows, buckets >> (bit + 1), 2, 1 << bit)
        best = np.minimum(pairs, pairs[:, :, ::-1] + limit).reshape(rows, buckets)
    return best % limit


def nearest_by_bits(ids: np.ndarray, sets: Ragged, buckets: int) -> np.ndarray:
    """(n, B): vector of each set whose bucket differs in the fewest bits; ties to the first."""
    total = len(ids)
    members = np.full(len(sets) * buckets, total)
    # Of several vectors in a bucket the last one written stays, and that is the first.
    members[(sets.owner * buckets + ids)[::-1]] = np.arange(total)[::-1]
    return nearest_member(members.reshape(len(sets), buckets), total)
