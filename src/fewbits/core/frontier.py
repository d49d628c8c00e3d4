"""Rate–distortion points, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fewbits.core.errors import FewbitsError
from fewbits.core.kinds import figure, gain


@dataclass(frozen=True)
class Point:
    """What one method at one setting costs and keeps.

    Attributes
    ----------
    method : names of the methods of the chain, joined by ``+``.
    spec : spec string that makes this method.
    bytes_per_item : payload bytes per item (of a KV cache: per token), as stored.
    codec_bytes : bytes of learned arrays, paid once.
    ratio : bytes per item of the input, over `bytes_per_item`.
    quality : name → value; higher is better, except for `kinds.LESS_IS_BETTER`.
    fit_seconds : time to learn the method.
    encode_per_second : items encoded, or tokens of prompts read, per second.
    search_per_second : queries answered, or tokens decoded, per second.
    on_frontier : no other point is at most as large and at least as good.
    """

    method: str
    spec: str
    bytes_per_item: float
    codec_bytes: int
    ratio: float
    quality: dict[str, float] = field(default_factory=dict)
    fit_seconds: float = 0.0
    encode_per_second: float = 0.0
    search_per_second: float = 0.0
    on_frontier: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mark_frontier(points: Iterable[Point], target: str) -> list[Point]:
    """The points by rising size, those on the Pareto frontier of `target` marked."""
    ordered = sorted(points, key=lambda p: (p.bytes_per_item, -gained(p, target), p.codec_bytes))
    marked, best = [], float("-inf")
    for point in ordered:
        on_frontier = gained(point, target) > best
        best = max(best, gained(point, target))
        marked.append(replace(point, on_frontier=on_frontier))
    return marked


def cheapest(points: Iterable[Point], limits: dict[str, float]) -> Point:
    """The smallest point that is as good as every limit: at least, or where less is better at most.

    Raises
    ------
    FewbitsError
        No point is; the message has the nearest.
    """
    points = list(points)
    for name in limits:
        check_quality(points, name)

    def margin(point: Point) -> float:
        return min(gained(point, name) - gain(name, value) for name, value in limits.items())

    enough = [point for point in points if margin(point) >= 0]
    if not enough:
        best = max(points, key=margin)
        wish = " and ".join(f"{name} at {value:g}" for name, value in limits.items())
        kept = " and ".join(figure(name, best.quality[name]) for name in limits)
        raise FewbitsError(
            f"nothing that was compared keeps {wish}; the best is "
            f"{best.spec} with {kept} at {best.bytes_per_item:g} bytes"
        )
    first = next(iter(limits))
    return min(enough, key=lambda p: (p.bytes_per_item, -gained(p, first), p.codec_bytes))


def best(points: Iterable[Point], at_most: float, target: str) -> Point:
    """The best point in `target` that takes at most so many bytes per item.

    Raises
    ------
    FewbitsError
        No point is that small; the message has the smallest.
    """
    points = list(points)
    check_quality(points, target)
    small = [p for p in points if p.bytes_per_item <= at_most]
    if not small:
        least = min(points, key=lambda p: p.bytes_per_item)
        raise FewbitsError(
            f"nothing that was compared fits into {at_most:g} bytes; the smallest is "
            f"{least.spec} with {least.bytes_per_item:g}"
        )
    return max(small, key=lambda p: (gained(p, target), -p.bytes_per_item, -p.codec_bytes))


def gained(point: Point, name: str) -> float:
    """A quality of a point as a number that is higher where it is better."""
    return gain(name, point.quality[name])


def check_quality(points: list[Point], name: str) -> None:
    if not points:
        raise FewbitsError("there are no points to choose from")
    if name not in points[0].quality:
        known = ", ".join(points[0].quality)
        raise FewbitsError(f"{name!r} was not measured; choose one of {known}")
