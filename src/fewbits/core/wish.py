"""What `encode` is asked for, and the codec that meets a wish best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fewbits.core import frontier
from fewbits.core.codec import Codec
from fewbits.core.compare import CUTS, compare, target_of
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.kinds import TARGET
from fewbits.core.source import Source

DEFAULT_KEEP = {TARGET: 0.95}


@dataclass(frozen=True)
class Request:
    """What `encode` was asked for."""

    method: str | Codec | None
    wish: dict[str, Any]
    metric: str
    seed: int
    overwrite: bool
    engine: str
    workers: int | None
    show_progress: bool


def check_wish(
    method: Any,
    keep: dict[str, float] | None,
    at_most: float | None,
    ratio: float | None,
    queries: Any,
) -> None:
    given = [value for value in (method, keep, at_most, ratio) if value is not None]
    if len(given) > 1:
        raise FewbitsError("give one of method, keep, at_most (--at-most) and ratio, not several")
    if method is not None and queries is not None:
        raise FewbitsError("queries help to choose a method; leave them out where you name one")
    for name, value in (("at_most", at_most), ("ratio", ratio)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise FewbitsError(f"{name} must be a number above 0, not {value}")
    measured = [f"recall@{cut}" for cut in CUTS]
    for name, value in (keep or {}).items():
        if name not in measured:
            raise FewbitsError(f"{name!r} cannot be kept; choose one of {', '.join(measured)}")
        if not 0 < value <= 1:
            raise FewbitsError(f"{name} must be above 0 and at most 1, not {value}")


def choose(source: Source, request: Request) -> str:
    """Spec string of the codec that meets the wish best on a sample of the collection."""
    wish = request.wish
    compared = compare(
        source,
        wish["queries"],
        metric=request.metric,
        column=wish["column"],
        seed=request.seed,
        engine=request.engine,
        show_progress=request.show_progress,
    )
    points = worth_it(compared.points, source)
    at_most = wish["at_most"]
    if wish["ratio"] is not None:
        at_most = source.bytes_per_item / wish["ratio"]
    if at_most is not None:
        return frontier.best(points, at_most, target_of(points)).spec
    return frontier.cheapest(points, wish["keep"] or DEFAULT_KEEP).spec


def worth_it(points: list[Point], source: Source) -> list[Point]:
    """Points whose codes and codec together are smaller than the input; all where none is."""
    whole = source.bytes_per_item * source.rows
    smaller = [p for p in points if p.bytes_per_item * source.rows + p.codec_bytes < whole]
    return smaller or points
