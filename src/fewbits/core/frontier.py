"""Rate–distortion points, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fewbits.core.errors import FewbitsError


@dataclass(frozen=True)
class Point:
    """What one method at one setting costs and keeps.

    Attributes
    ----------
    method : names of the codecs of the chain, joined by ``+``.
    spec : spec string that makes this codec.
    bytes_per_item : payload bytes per item, as stored.
    codec_bytes : bytes of learned arrays, paid once.
    ratio : bytes per item of the input, over `bytes_per_item`.
    quality : name → value, higher is better.
    fit_seconds : time to learn the codec.
    encode_per_second : items encoded per second.
    search_per_second : queries answered per second, over this collection.
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
    ordered = sorted(points, key=lambda p: (p.bytes_per_item, -p.quality[target], p.codec_bytes))
    marked, best = [], float("-inf")
    for point in ordered:
        on_frontier = point.quality[target] > best
        best = max(best, point.quality[target])
        marked.append(replace(point, on_frontier=on_frontier))
    return marked


def cheapest(points: Iterable[Point], at_least: dict[str, float]) -> Point:
    """The smallest point that reaches every quality of `at_least`.

    Raises
    ------
    FewbitsError
        No point does; the message has the nearest.
    """
    points = list(points)
    for name in at_least:
        check_quality(points, name)
    enough = [p for p in points if all(p.quality[n] >= v for n, v in at_least.items())]
    if not enough:
        best = max(points, key=lambda p: min(p.quality[n] - v for n, v in at_least.items()))
        wish = " and ".join(f"{name} at {value:g}" for name, value in at_least.items())
        kept = " and ".join(f"{best.quality[name]:.3f}" for name in at_least)
        raise FewbitsError(
            f"nothing that was compared keeps {wish}; the best is "
            f"{best.spec} with {kept} at {best.bytes_per_item:g} bytes"
        )
    first = next(iter(at_least))
    return min(enough, key=lambda p: (p.bytes_per_item, -p.quality[first], p.codec_bytes))


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
    return max(small, key=lambda p: (p.quality[target], -p.bytes_per_item, -p.codec_bytes))


def check_quality(points: list[Point], name: str) -> None:
    if not points:
        raise FewbitsError("there are no points to choose from")
    if name not in points[0].quality:
        known = ", ".join(points[0].quality)
        raise FewbitsError(f"{name!r} was not measured; choose one of {known}")
