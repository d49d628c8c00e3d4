"""Load a saved KV cache over a link: CacheGen's streaming (arXiv 2310.07240, section 5).

The cache of a text comes chunk by chunk from a folder or URL that `fewbits.kv.cachegen.save` wrote,
each at a level of its own, or as text that the model reads again. While a chunk is decoded, the
next one is on its way. With a deadline, a controller chooses from the bandwidth measured so far.

Every piece is held against its digest. One that does not come, or comes wrong, is asked for again,
then taken at another level, then computed from its text: there may be no cache, but never a wrong
one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fewbits.core.errors import FewbitsError
from fewbits.kv._controller import (
    TEXT,
    Controller,
    Fixed,
    Offer,
    Passage,
    Policy,
    Trace,
    simulate,
)
from fewbits.kv._link import open_folder
from fewbits.kv._stream import (
    Arrival,
    Stream,
    check_level,
    offers_of,
    read_by,
    read_manifest,
    whole_text,
)
from fewbits.kv.cachegen import CacheGen, filled

__all__ = [
    "TEXT",
    "Arrival",
    "Controller",
    "Fixed",
    "LinkReport",
    "Offer",
    "Passage",
    "Policy",
    "Trace",
    "bench_link",
    "load",
    "offers_of",
    "read_tokens",
    "simulate",
]

TIMEOUT = 10.0


def load(
    model: Any,
    url: str | Path,
    *,
    profile: CacheGen | str | Path | None = None,
    deadline: float | None = None,
    level: str | None = None,
    into: Any = None,
    timeout: float = TIMEOUT,
    on_chunk: Callable[[Arrival], None] | None = None,
) -> Any:
    """The saved cache of a text, to go on from.

    Parameters
    ----------
    model : the model that made it.
    url : the folder that was saved: a path, an ``http(s)`` URL (a server without byte ranges sends
        whole files), or any other URL that fsspec opens.
    profile : the fitted profile, or its file, where it is at hand; otherwise it is read, too.
    deadline : seconds in which the cache should be there. Each chunk comes in the best form that
        seems in time; without a deadline, all at one level.
    level : name of that level, ``"0"`` if not said. With a deadline: the level of the first chunk,
        while the bandwidth is not known; the middle one if not said.
    into : an empty cache to fill, as `fewbits.kv.cache` makes; a ``DynamicCache`` if not given.
    timeout : seconds without a byte after which a read over HTTP has failed.
    on_chunk : called with what came, after each chunk.

    Returns
    -------
    A cache of one row, for ``model.generate(ids, past_key_values=cache)``, where `ids` begin with
    the tokens that `read_tokens` gives. Where chunks came in another form than was asked for, a
    warning says so.

    Raises
    ------
    FewbitsError
        It is no saved cache, it is of another model or dtype, or a chunk cannot be had in any form.
    """
    start = time.perf_counter()
    folder = open_folder(url, timeout)
    manifest = read_manifest(folder, url)
    manifest.check_model(model)
    wanted = check_level(manifest, level, deadline)
    stream = Stream(model, folder, manifest, start)
    stream.begin(profile, wanted, deadline)
    arrivals = stream.run(on_chunk)
    warn_of(arrivals)
    return filled(model, stream.keys, stream.values, into)


def read_tokens(url: str | Path, timeout: float = TIMEOUT) -> Tensor:
    """(1, t) int64: the tokens of a saved cache.

    Raises
    ------
    FewbitsError
        It is no saved cache, or its text is damaged.
    """
    folder = open_folder(url, timeout)
    return torch.from_numpy(whole_text(folder, read_manifest(folder, url)))[None]


def warn_of(arrivals: Sequence[Arrival]) -> None:
    """Say what came in another form than was asked for."""
    changed = [arrival for arrival in arrivals if arrival.form != arrival.wanted]
    if changed:
        first = changed[0]
        warnings.warn(
            f"{len(changed)} of {len(arrivals)} chunks of the cache came in another form than was "
            f"asked for; chunk {first.chunk} as {first.form}, for {first.failures[0]}",
            stacklevel=3,
        )


# -- is it worth it? -----------------------------------------------------------------------


@dataclass(frozen=True)
class LinkReport:
    """What loading a saved cache takes here, and what computing it anew takes.

    Attributes
    ----------
    tokens, chunks : of the cache.
    compute_seconds : the model reads the whole text anew.
    bandwidth : of the link, bytes per second.
    decode_seconds : to decode one chunk.
    nbytes : bytes of each level.
    load_seconds : of each level. The finest was loaded; for the others, what they have fewer bytes
        is taken off at the bandwidth of the link.
    """

    tokens: int
    chunks: int
    compute_seconds: float
    bandwidth: float
    decode_seconds: float
    nbytes: dict[str, int]
    load_seconds: dict[str, float]

    @property
    def worth(self) -> list[str]:
        """The levels that are loaded sooner than the text is read, finest first."""
        return [level for level, took in self.load_seconds.items() if took < self.compute_seconds]

    def needed_bandwidth(self, level: str) -> float:
        """Bytes per second from which on loading a level is worth it; infinite where decoding alone
        takes longer than reading the text."""
        if self.chunks * self.decode_seconds >= self.compute_seconds:
            return math.inf
        return self.nbytes[level] / (self.compute_seconds - self.decode_seconds)

    def lines(self) -> list[str]:
        """The report in words."""
        megabit = 8e-6
        found = [
            f"{self.tokens:,} tokens; the model reads the text in {self.compute_seconds:.2f} s",
            f"link {self.bandwidth * megabit:.1f} Mb/s; a chunk is decoded in "
            f"{self.decode_seconds:.2f} s",
        ]
        for level, took in self.load_seconds.items():
            needed = self.needed_bandwidth(level) * megabit
            from_on = "never" if math.isinf(needed) else f"from {needed:.1f} Mb/s on"
            found.append(
                f"level {level}: {self.nbytes[level]:,} bytes, {took:.2f} s; worth it {from_on}"
            )
        verdict = (
            f"load it: level {self.worth[0]} is {self.gain(self.worth[0]):.1f} times as fast as "
            "reading the text"
            if self.worth
            else "do not load it here: reading the text is faster than every level"
        )
        return [*found, verdict]

    def gain(self, level: str) -> float:
        """How many times as fast as reading the text."""
        return self.compute_seconds / self.load_seconds[level]


def bench_link(
    model: Any,
    url: str | Path,
    *,
    profile: CacheGen | str | Path | None = None,
    timeout: float = TIMEOUT,
) -> LinkReport:
    """Load a saved cache, and have the model read its text: which is faster here?

    On a fast machine, or over a slow link, a saved cache is not worth its bytes.

    Parameters
    ----------
    model, url, profile, timeout : as `load` takes them.

    Raises
    ------
    FewbitsError
        As `load`; and where a chunk cannot be had at the finest level, or the text not at all.
    """
    folder = open_folder(url, timeout)
    manifest = read_manifest(folder, url)
    tokens = read_tokens(url, timeout)
    arrivals: list[Arrival] = []
    start = time.perf_counter()
    load(model, url, profile=profile, timeout=timeout, on_chunk=arrivals.append)
    took = time.perf_counter() - start
    if any(arrival.form != arrival.wanted for arrival in arrivals):
        raise FewbitsError(f"{url} is damaged, which would make the figures wrong; save it again")
    finest, *_ = manifest.levels
    bandwidth = sum(one.nbytes for one in arrivals) / sum(one.transfer_seconds for one in arrivals)
    decode_seconds = sum(one.work_seconds for one in arrivals) / len(arrivals)
    offers = offers_of(manifest)

    def expected(level: str) -> float:
        return simulate(Fixed(level), offers, Trace.constant(bandwidth), 1.0, decode_seconds).delay

    read_by(model, tokens[:, :1].to(model.device), DynamicCache())
    return LinkReport(
        tokens=manifest.tokens,
        chunks=len(arrivals),
        compute_seconds=read_by(model, tokens.to(model.device), DynamicCache()),
        bandwidth=bandwidth,
        decode_seconds=decode_seconds,
        nbytes={level: manifest.level_bytes(level) for level in manifest.levels},
        load_seconds={
            level: max(took - expected(finest), 0.0) + expected(level) for level in manifest.levels
        },
    )
