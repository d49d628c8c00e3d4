"""Entropy coding with tables that both sides have: whole numbers in the bits their odds allow.

Asymmetric numeral systems (rANS; Duda 2013, arXiv 1311.2540). Each number has a context, which
says by what table of frequencies it is coded; both sides know the contexts beforehand. Many states
take turns and share one stream of 16-bit words, so that NumPy codes many numbers in one step.
Numbers that no table has are coded as an escape, and stand raw behind the stream: whatever comes,
nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOTAL_BITS = 16
TOTAL = 1 << TOTAL_BITS
"""What the frequencies of a context add up to."""
LOW = 1 << 32
"""States are at least this, and below LOW · 2^16."""
WORD = np.uint64(16)
BYTES_PER_STATE, NUMBERS_PER_STATE = 640, 8192
"""One state for so many coded bytes, and at least one for so many numbers. A state costs 5 bytes:
0.8 % of its bytes, or 0.005 bits a number."""
MOST_STATES = 4096
HEADER = np.dtype([("states", "<u2"), ("escapes", "<u4")])
DAMAGED = "the entropy-coded data is damaged, or its tables are others"


@dataclass(frozen=True)
class SymbolTables:
    """How often each whole number comes, in each context.

    Attributes
    ----------
    low : the first number that the tables have.
    frequencies : (contexts, a + 1) uint16, at least 1; each row adds up to 2^16. Of the numbers
        `low` to `low` + a − 1, and last of the escape, which stands for all others.
    """

    low: int
    frequencies: np.ndarray

    def __post_init__(self) -> None:
        found = self.frequencies
        if found.ndim != 2 or found.dtype != np.uint16 or found.shape[1] < 2:
            raise ValueError("tables of frequencies must be (contexts, symbols) uint16")
        if not (found.sum(axis=1, dtype=np.int64) == TOTAL).all() or not found.all():
            raise ValueError("the frequencies of a context must be at least 1, and 2^16 together")

    @classmethod
    def from_counts(cls, counts: np.ndarray, low: int) -> SymbolTables:
        """Tables from (contexts, a + 1) counts, the escape's last, with one added to each.

        Raises
        ------
        ValueError
            More symbols than 2^16 can share.
        """
        symbols = counts.shape[1]
        if symbols > TOTAL // 2:
            raise ValueError(f"tables of {symbols:,} symbols are too long; at most {TOTAL // 2:,}")
        smooth = counts.astype(np.float64) + 1
        shares = smooth / smooth.sum(axis=1, keepdims=True)
        whole = 1 + np.floor(shares * (TOTAL - symbols)).astype(np.int64)
        # What rounding down left over goes where it changes the odds least.
        whole[np.arange(len(whole)), whole.argmax(axis=1)] += TOTAL - whole.sum(axis=1)
        return cls(low, whole.astype(np.uint16))

    @property
    def contexts(self) -> int:
        return len(self.frequencies)

    @property
    def escape(self) -> int:
        """The place of the escape among the symbols."""
        return self.frequencies.shape[1] - 1

    @cached_property
    def flat_frequencies(self) -> np.ndarray:
        return self.frequencies.ravel().astype(np.uint64)

    @cached_property
    def starts(self) -> np.ndarray:
        """(contexts · symbols,) where each symbol begins, among all contexts one after another."""
        return np.cumsum(self.flat_frequencies) - self.flat_frequencies

    def places(self, symbols: np.ndarray) -> np.ndarray:
        """(n,) places of numbers among the symbols of a context."""
        found = symbols.astype(np.int64) - self.low
        return np.where((found >= 0) & (found < self.escape), found, self.escape)

    def cells(self, symbols: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """(n,) places of numbers among all symbols of all contexts."""
        return contexts.astype(np.int64) * (self.escape + 1) + self.places(symbols)

    def bits(self, symbols: np.ndarray, contexts: np.ndarray) -> float:
        """What n numbers cost at least under these tables, 32 bits for each escaped one."""
        cells = self.cells(symbols, contexts)
        escaped = int((cells % (self.escape + 1) == self.escape).sum())
        odds = self.flat_frequencies[cells].astype(np.float64) / TOTAL
        return float(-np.log2(odds).sum()) + 32 * escaped


def encode(symbols: np.ndarray, contexts: np.ndarray, tables: SymbolTables) -> bytes:
    """Code n whole numbers.

    Parameters
    ----------
    symbols : (n,) whole numbers within int32.
    contexts : (n,) which row of the tables each has.

    Returns
    -------
    What `tables.bits` says, and up to 1 % or 0.005 bits a number more, and a few bytes. O(n).

    Raises
    ------
    ValueError
        Other shapes, no whole numbers, beyond int32, or contexts that the tables lack.
    """
    check(symbols, contexts, tables)
    cells = tables.cells(symbols, contexts)
    escaped = symbols[cells % (tables.escape + 1) == tables.escape].astype("<i4")
    frequencies = tables.flat_frequencies[cells]
    starts = tables.starts[cells] % np.uint64(TOTAL)
    coded = -np.log2(frequencies.astype(np.float64) / TOTAL).sum() / 8
    wanted = max(1, int(coded) // BYTES_PER_STATE, len(symbols) // NUMBERS_PER_STATE)
    states = np.full(min(wanted, MOST_STATES), LOW, np.uint64)
    words = push_all(states, frequencies, starts)
    header = np.array([(len(states), len(escaped))], HEADER)
    return header.tobytes() + words.tobytes() + escaped.tobytes()


def push_all(states: np.ndarray, frequencies: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The words of all numbers, last number first; number i goes into state i mod `states`."""
    turn, count = len(states), len(frequencies)
    full = frequencies << np.uint64(32)
    written: list[np.ndarray] = []
    for begin in range((count - 1) // turn * turn, -1, -turn):
        end = min(begin + turn, count)
        x = states[: end - begin]
        spills = x >= full[begin:end]
        written.append((x[spills] & np.uint64(0xFFFF)).astype("<u2"))
        x[spills] >>= WORD
        f = frequencies[begin:end]
        whole = x // f
        states[: end - begin] = (whole << WORD) + (x - whole * f) + starts[begin:end]
    parts = (states >> (WORD * np.arange(3, dtype=np.uint64)[:, None])) & np.uint64(0xFFFF)
    written.append(parts.astype("<u2").ravel())
    return np.concatenate(written[::-1])


def decode(data: bytes, contexts: np.ndarray, tables: SymbolTables) -> np.ndarray:
    """(n,) int32: the numbers that `encode` coded with these contexts and tables. O(n log a).

    Raises
    ------
    ValueError
        Data that `encode` did not write, as far as can be seen; add a checksum where it may have
        changed on its way.
    """
    states, words, escaped = opened(data)
    places, used = pop_all(states, words, contexts.astype(np.uint64), tables)
    symbols = places.astype(np.int32) + np.int32(tables.low)
    unknown = places == tables.escape
    if used != len(words) or not (states == LOW).all() or int(unknown.sum()) != len(escaped):
        raise ValueError(DAMAGED)
    symbols[unknown] = escaped
    return symbols


def opened(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states, words and escaped numbers of a stream."""
    if len(data) < HEADER.itemsize:
        raise ValueError(DAMAGED)
    header = np.frombuffer(data, HEADER, 1)[0]
    count, escapes = int(header["states"]), int(header["escapes"])
    left = len(data) - HEADER.itemsize - 4 * escapes
    if not 1 <= count <= MOST_STATES or left < 6 * count or left % 2:
        raise ValueError(DAMAGED)
    words = np.frombuffer(data, "<u2", left // 2, HEADER.itemsize)
    escaped = np.frombuffer(data, "<i4", escapes, HEADER.itemsize + left)
    parts = words[: 3 * count].reshape(3, count).astype(np.uint64)
    states = parts[0] | parts[1] << WORD | parts[2] << np.uint64(32)
    if (states < LOW).any():
        raise ValueError(DAMAGED)
    return states, words[3 * count :], escaped


def pop_all(
    states: np.ndarray, words: np.ndarray, contexts: np.ndarray, tables: SymbolTables
) -> tuple[np.ndarray, int]:
    """(n,) places of the numbers among their context's symbols, and how many words they took."""
    turn, count, used = len(states), len(contexts), 0
    bases = contexts << np.uint64(TOTAL_BITS)
    found = np.empty(count, dtype=np.int64)
    for begin in range(0, count, turn):
        end = min(begin + turn, count)
        x = states[: end - begin]
        # All contexts lie one after another on one line, on which a state is a point.
        point = bases[begin:end] + (x & np.uint64(TOTAL - 1))
        cells = np.searchsorted(tables.starts, point, side="right") - 1
        x = tables.flat_frequencies[cells] * (x >> WORD) + (point - tables.starts[cells])
        needs = x < LOW
        wanted = int(np.count_nonzero(needs))
        more = words[used : used + wanted]
        used += wanted
        if used > len(words):
            raise ValueError(DAMAGED)
        x[needs] = x[needs] << WORD | more
        states[: end - begin] = x
        found[begin:end] = cells
    return found % (tables.escape + 1), used


def check(symbols: np.ndarray, contexts: np.ndarray, tables: SymbolTables) -> None:
    if symbols.ndim != 1 or symbols.shape != contexts.shape:
        raise ValueError(
            f"symbols and contexts must be (n,) both, not {symbols.shape} and {contexts.shape}"
        )
    if symbols.dtype.kind not in "iu" or contexts.dtype.kind not in "iu":
        raise ValueError("symbols and contexts must be whole numbers")
    if not len(symbols):
        return
    if symbols.min() < -(2**31) or symbols.max() >= 2**31:
        raise ValueError("symbols must be within int32")
    if contexts.min() < 0 or contexts.max() >= tables.contexts:
        raise ValueError(f"contexts must be from 0 to {tables.contexts - 1}")
