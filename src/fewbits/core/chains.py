"""Find the best chain of codecs within a budget of bytes.

A chain is at most three stages: for sets of vectors one that makes a vector of each, then one
that makes vectors shorter, then one that spends the bytes. All sensible chains are tried on a
small sample, the best quarter of them and some neighbours on a larger one, and so on to the full
sample: successive halving (Jamieson, Talwalkar 2016, arXiv 1502.07943), by quarters.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.core import frontier
from fewbits.core.catalogue import codecs
from fewbits.core.checks import check_seed
from fewbits.core.codec import Transform, from_spec
from fewbits.core.compare import (
    ROWS,
    Comparison,
    Trial,
    check_rows,
    prepare,
    target_of,
    try_method,
)
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.progress import Steps, progress
from fewbits.core.readers import open_queries, open_source
from fewbits.core.search import check_metric
from fewbits.core.source import Source

FIRST_ROWS = 2_000
"""Rows of the first round."""
PARTS, PARTS_OF_CUBIC = 8, 4
"""Where the width may be anything, so many parts of it are tried first; fewer where it costs much.
Later rounds try half a part less and more."""
WIDE = 1536
"""Wider vectors are left to what does not cost their width cubed."""
ONE_IN, LEAST_KEPT, LOOKED_AROUND = 4, 6, 3
"""Of the chains of a round one in four goes on, but not fewer than six; and the widths around those
of the best three."""


@dataclass(frozen=True)
class Candidate:
    """A chain to try: what makes vectors of sets, what shortens them to `width`, what is last.

    `step` is how far to look around the width in the next round; 0 where bytes settle it.
    """

    opening: str
    reducer: type[Transform] | None
    width: int
    last: str
    step: int

    @property
    def spec(self) -> str:
        shorter = self.reducer.to_width(self.width) if self.reducer else ""
        return "+".join(stage for stage in (self.opening, shorter, self.last) if stage)


def search_chains(
    x: Any,
    queries: Any = None,
    *,
    at_most: float,
    qrels: str | Path | None = None,
    metric: str = "cosine",
    column: str | None = None,
    rows: int = ROWS,
    seed: int = 0,
    show_progress: bool = False,
) -> Comparison:
    """Look for the chain of at most three stages that keeps most within a number of bytes.

    Every chain is fitted and searched on 2,000 rows, and only the best of them on more.

    Parameters
    ----------
    at_most : bytes per item.
    x, queries, qrels, metric, column, rows, seed : as `compare.compare` takes them.

    Returns
    -------
    `Comparison` of the chains that came to the last round; `tried` has every round.

    Raises
    ------
    FewbitsError
        Unusable input, or no chain within the budget.
    """
    start = time.perf_counter()
    check_metric(metric)
    check_seed(seed)
    check_rows(rows)
    if not (at_most >= 1 and math.isfinite(at_most)):
        raise FewbitsError(f"at_most must be at least 1 byte per item, not {at_most}")
    source = open_source(x, column=column)
    asked = None if queries is None else open_queries(queries, column)

    # All of the last round first: it says at once what is wrong with the input.
    whole = prepare(source, asked, qrels, metric, rows, seed)

    def prepared(count: int) -> tuple[Trial, dict[str, Any]]:
        if count == min(source.rows, rows):
            return whole
        # Judgements name rows of the whole collection, so a smaller sample goes without.
        return prepare(source, asked, None, metric, count, seed)

    rounds = Rounds(at_most, seed, prepared)
    with progress("searching for chains", 0, show=show_progress) as bar:
        about, points = rounds.run(candidates(source, int(at_most)), source, rows, bar)
    about |= {"at_most": at_most, "seconds": round(time.perf_counter() - start, 1)}
    marked = frontier.mark_frontier(points, target_of(points))
    return Comparison(about, marked, rounds.left_out, rounds.tried)


class Rounds:
    """Tries candidates on ever larger samples; `tried` and `left_out` collect what happened."""

    def __init__(
        self, at_most: float, seed: int, prepared: Callable[[int], tuple[Trial, dict[str, Any]]]
    ) -> None:
        self.at_most, self.seed, self.prepared = at_most, seed, prepared
        self.tried: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []

    def run(
        self, waiting: list[Candidate], source: Source, rows: int, bar: Steps
    ) -> tuple[dict[str, Any], list[Point]]:
        """What the last round ran on, and its points."""
        sizes = sample_sizes(min(source.rows, rows))
        for number, size in enumerate(sizes, 1):
            trial, about = self.prepared(size)
            found = self.round(waiting, trial, number, bar)
            if not found:
                why = self.left_out[0]["why"] if self.left_out else "there is none"
                raise FewbitsError(f"no chain fits into {self.at_most:g} bytes per item: {why}")
            target = target_of([point for _, point in found])
            found.sort(key=lambda pair: -pair[1].quality[target])
            best = [candidate for candidate, _ in found[: kept(len(found))]]
            waiting = list(dict.fromkeys([*best, *neighbours(best[:LOOKED_AROUND])]))
        return about, [point for _, point in found]

    def round(
        self, waiting: list[Candidate], trial: Trial, number: int, bar: Steps
    ) -> list[tuple[Candidate, Point]]:
        """The candidates that fit and work, and what each keeps."""
        found = []
        bar.extend(len(waiting))
        for candidate in waiting:
            bar.step(candidate.spec, 0)
            result = try_method(candidate.spec, trial, self.seed)
            if not isinstance(result, Point):
                self.left_out.append(result)
            elif result.bytes_per_item <= self.at_most:
                found.append((candidate, result))
                self.tried.append(row(number, len(trial.items), result))
            bar.step()
        return found


def row(number: int, items: int, point: Point) -> dict[str, Any]:
    """A line of `Comparison.tried`."""
    return {
        "round": number,
        "rows": items,
        "spec": point.spec,
        "bytes_per_item": point.bytes_per_item,
        "quality": point.quality,
    }


def sample_sizes(rows: int) -> list[int]:
    """Rows of each round, up to all of them."""
    if rows <= FIRST_ROWS:
        return [rows]
    if rows <= 9 * FIRST_ROWS:
        return [FIRST_ROWS, rows]
    return [FIRST_ROWS, round(math.sqrt(FIRST_ROWS * rows)), rows]


def kept(count: int) -> int:
    """How many of so many chains go on."""
    return max(LEAST_KEPT, count // ONE_IN)


# -- candidates ----------------------------------------------------------------------------


def candidates(source: Source, size: int) -> list[Candidate]:
    """All chains worth a first try within `size` bytes per item."""
    types = [row.load() for row in codecs("vectors") if not row.missing_packages]
    reducers = [
        kind
        for kind in types
        if issubclass(kind, Transform) and kind.takes == "vectors" and kind.to_width(1)
    ]
    lasts = [pair for kind in types if kind.takes == "vectors" for pair in kind.spending(size)]
    if source.takes == "vectors":
        return list(following("", source.dims, reducers, lasts))
    found: list[Candidate] = []
    for kind in types:
        if kind.takes == "sets":
            for opening, width in kind.openings(source.dims):
                found += following(opening, width, reducers, lasts)
    return found


def following(
    opening: str,
    dims: int,
    reducers: list[type[Transform]],
    lasts: Iterable[tuple[str, int | None]],
) -> Iterable[Candidate]:
    """Every way to go on with vectors of `dims`."""
    for last, widest in lasts:
        cubic = from_spec(last).cubic
        if dims > WIDE and cubic:
            continue
        if widest is None or dims <= widest:
            yield Candidate(opening, None, dims, last, 0)
        if widest is None:
            parts = PARTS_OF_CUBIC if cubic else PARTS
            widths = sorted({dims * part // parts for part in range(1, parts)} - {0})
            step = max(1, dims // (2 * parts))
        else:
            widths, step = [widest] if 1 <= widest < dims else [], 0
        for reducer in reducers if dims <= WIDE else ():
            yield from (Candidate(opening, reducer, width, last, step) for width in widths)


def neighbours(best: list[Candidate]) -> Iterable[Candidate]:
    """The same chains, a little narrower and a little wider, where the width is a choice."""
    for candidate in best:
        if candidate.step:
            for width in (candidate.width - candidate.step, candidate.width + candidate.step):
                if width >= 1:
                    yield dataclasses.replace(candidate, width=width)
