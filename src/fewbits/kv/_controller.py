"""Which form of a chunk to send next over a link of changing bandwidth, and how that turns out.

A chunk of a stored cache lies ready at several levels; or its text is sent, and the model reads it
again, which loses nothing and takes the link next to nothing. Nothing in here looks at a clock:
time is passed in, so that the same controller decides for a real link and for a recorded one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fewbits.core.errors import FewbitsError

TEXT = "text"
"""The form of a chunk from which the model computes it anew."""

HOPE = 4.0
"""A level that would be late is given up for text if the link would have to be so much faster."""


@dataclass(frozen=True)
class Offer:
    """A chunk as a controller sees it.

    Attributes
    ----------
    tokens : so many tokens.
    nbytes : bytes of each form: every level by its name, and `TEXT` if there is a text.
    """

    tokens: int
    nbytes: Mapping[str, int]


@dataclass(frozen=True)
class Now:
    """What is known when the next chunk is asked for; nothing of it lies in the future.

    Attributes
    ----------
    elapsed : seconds since loading began.
    bandwidth : bytes per second of the newest transfer; None before there was one.
    lowest : the lowest such bandwidth so far.
    busy : seconds for which chunks that are here will still be worked on.
    """

    elapsed: float = 0.0
    bandwidth: float | None = None
    lowest: float = math.inf
    busy: float = 0.0

    def after(self, nbytes: int, seconds: float) -> Now:
        """The same after a transfer, of which the bandwidth is taken."""
        if nbytes == 0:
            return self
        bandwidth = nbytes / seconds if seconds > 0 else math.inf
        return replace(self, bandwidth=bandwidth, lowest=min(self.lowest, bandwidth))


class Policy(Protocol):
    """Whatever chooses the form of the next chunk."""

    def choose(self, remaining: Sequence[Offer], now: Now) -> str:
        """The form of the first of the remaining chunks."""


@dataclass(frozen=True)
class Fixed:
    """The same form for every chunk: a level, or `TEXT`."""

    form: str

    def choose(self, remaining: Sequence[Offer], now: Now) -> str:
        return self.form


@dataclass(frozen=True)
class Controller:
    """CacheGen's controller (Liu et al. 2023, arXiv 2310.07240, Algorithm 1).

    If the model can read all remaining chunks as text before the deadline, the next one is sent as
    text. Otherwise it is sent at the finest level at which all of them would arrive in time at the
    bandwidth of the last transfer. If none would, it is sent at the coarsest level; or as text,
    where that would be sooner even if the link became several times as fast.

    This leaves the last chunks no time to spare, and where bandwidth changes from chunk to chunk,
    many caches come late. A cautious controller counts on half of the lowest bandwidth so far; it
    is late about as seldom as the coarsest level throughout, and coarser than Algorithm 1.

    Parameters
    ----------
    levels : names, finest first; there may be none left.
    deadline : seconds from the beginning until all chunks are to be there.
    first : the level of the first chunk, while no bandwidth is known.
    prefill_speed : tokens per second that the model reads.
    decode_seconds : to decode one chunk. The last chunk's come behind its transfer.
    cautious : not Algorithm 1's estimate, but the cautious one.
    """

    levels: tuple[str, ...]
    deadline: float
    first: str
    prefill_speed: float
    decode_seconds: float = 0.0
    cautious: bool = False

    def __post_init__(self) -> None:
        if not self.deadline > 0:
            raise FewbitsError(f"deadline={self.deadline} must be above 0 seconds")
        if not self.prefill_speed > 0:
            raise FewbitsError(
                f"prefill_speed={self.prefill_speed} must be above 0 tokens a second"
            )
        if self.levels and self.first not in self.levels:
            known = ", ".join(self.levels)
            raise FewbitsError(f"there is no level {self.first!r} here; choose one of {known}")

    def choose(self, remaining: Sequence[Offer], now: Now) -> str:
        """`TEXT` or a level for the first of the remaining chunks. O(levels · chunks)."""
        left = self.deadline - now.elapsed
        text = self.text_seconds(remaining, now)
        if text <= left or not self.levels:
            return TEXT
        if now.bandwidth is None:
            return self.first
        counted = now.lowest / 2 if self.cautious else now.bandwidth
        for level in self.levels:
            if self.level_seconds(remaining, level, now, counted) <= left:
                return level
        coarsest = self.levels[-1]
        hoped = self.level_seconds(remaining, coarsest, now, HOPE * now.bandwidth)
        return coarsest if hoped < text or TEXT not in remaining[0].nbytes else TEXT

    def text_seconds(self, remaining: Sequence[Offer], now: Now) -> float:
        """Seconds until all remaining chunks are computed from their text."""
        if TEXT not in remaining[0].nbytes:
            return math.inf
        nbytes = sum(offer.nbytes[TEXT] for offer in remaining)
        tokens = sum(offer.tokens for offer in remaining)
        return max(now.busy, transfer_seconds(nbytes, now.bandwidth)) + tokens / self.prefill_speed

    def level_seconds(
        self, remaining: Sequence[Offer], level: str, now: Now, bandwidth: float
    ) -> float:
        """Seconds until all remaining chunks are there at a level."""
        nbytes = sum(offer.nbytes[level] for offer in remaining)
        work = now.busy + (len(remaining) - 1) * self.decode_seconds
        return max(work, transfer_seconds(nbytes, bandwidth)) + self.decode_seconds


def transfer_seconds(nbytes: int, bandwidth: float | None) -> float:
    """Seconds that so many bytes take; none are counted while the bandwidth is unknown."""
    if bandwidth is None or nbytes == 0:
        return 0.0
    return nbytes / bandwidth if bandwidth > 0 else math.inf


# -- recorded links ------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The bandwidth of a link over time: constant between changes, the last one for ever.

    Parameters
    ----------
    starts : seconds at which each bandwidth begins, rising from 0.
    bandwidths : bytes per second, as many.

    Raises
    ------
    FewbitsError
        Times that do not rise from 0, or bandwidths below 0 or not finite.
    """

    starts: tuple[float, ...]
    bandwidths: tuple[float, ...]

    def __post_init__(self) -> None:
        starts, bandwidths = np.asarray(self.starts), np.asarray(self.bandwidths)
        if starts.ndim != 1 or not len(starts) or starts.shape != bandwidths.shape:
            raise FewbitsError("a trace needs a bandwidth for each of its times, and at least one")
        if starts[0] != 0 or not (np.isfinite(starts).all() and (np.diff(starts) > 0).all()):
            raise FewbitsError("the times of a trace must rise from 0")
        if not (np.isfinite(bandwidths).all() and (bandwidths >= 0).all()):
            raise FewbitsError("the bandwidths of a trace must be finite and at least 0")

    @classmethod
    def constant(cls, bandwidth: float) -> Trace:
        return cls((0.0,), (bandwidth,))

    def arrival(self, start: float, nbytes: int) -> float:
        """When the last of so many bytes arrives that are sent from `start` on; may be infinite."""
        if nbytes == 0:
            return start
        left, time = float(nbytes), start
        for place in range(bisect.bisect_right(self.starts, start) - 1, len(self.starts)):
            end = self.starts[place + 1] if place + 1 < len(self.starts) else math.inf
            bandwidth = self.bandwidths[place]
            if bandwidth > 0 and time + left / bandwidth <= end:
                return time + left / bandwidth
            left -= bandwidth * (end - time) if bandwidth > 0 else 0.0
            time = end
        return math.inf


@dataclass(frozen=True)
class Passage:
    """How a cache came over a recorded link: the form of each chunk, and seconds until all are
    there (infinite where the link stopped for ever)."""

    forms: tuple[str, ...]
    delay: float

    def violates(self, deadline: float) -> bool:
        """Whether it took longer than that."""
        return self.delay > deadline


def simulate(
    policy: Policy,
    offers: Sequence[Offer],
    trace: Trace,
    prefill_speed: float,
    decode_seconds: float = 0.0,
) -> Passage:
    """Send all chunks over a recorded link, as `fewbits.kv.streaming.load` does over a real one.

    While a chunk is decoded, or computed from its text, the next one is on its way; the one after
    it is asked for when that is done.

    Parameters
    ----------
    policy : chooses the form of each chunk: a `Controller`, or `Fixed`.
    offers : the chunks in order.
    trace : the link.
    prefill_speed : tokens per second that the model computes from text.
    decode_seconds : to decode a chunk of any level.
    """
    forms: list[str] = []
    asked = done = 0.0
    now = Now()
    for place, offer in enumerate(offers):
        form = policy.choose(offers[place:], replace(now, elapsed=asked, busy=max(done - asked, 0)))
        arrived = trace.arrival(asked, offer.nbytes[form])
        if math.isinf(arrived):
            return Passage((*forms, form), math.inf)
        now = now.after(offer.nbytes[form], arrived - asked)
        asked = max(arrived, done)
        done = asked + (offer.tokens / prefill_speed if form == TEXT else decode_seconds)
        forms.append(form)
    return Passage(tuple(forms), done)
