"""The figures of a report as text, and what a comparison says about its input.

Figures that are not there, or are not finite, show as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fewbits.core.kinds import Kind, figure, gain

Point = dict[str, Any]
Comparison = dict[str, Any]

MISSING = "–"


def known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def count_text(value: Any) -> str:
    """``1,536`` or ``5.5``: at most two decimals."""
    if not known(value):
        return MISSING
    text = f"{value:,.2f}"
    return text.rstrip("0").rstrip(".")


def ratio_text(value: Any) -> str:
    return f"{value:,.0f}×" if known(value) and value >= 100 else with_unit(value, "×", ".1f")


def with_unit(value: Any, unit: str, spec: str) -> str:
    return f"{value:{spec}}".removesuffix(".0") + unit if known(value) else MISSING


def share_text(ratio: Any) -> str:
    """What is left of something that became smaller by `ratio`, in percent."""
    return with_unit(100 / ratio, " %", ".1f") if known(ratio) and ratio > 0 else MISSING


def quality_text(value: Any, name: str = "") -> str:
    return figure(name, value) if known(value) else MISSING


def size_text(value: Any) -> str:
    """Bytes as people read them: ``0 B``, ``384 KiB``, ``1.5 MiB``."""
    if not known(value):
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return with_unit(value, f" {unit}", ".1f" if value < 100 else ".0f")
        value /= 1024
    return with_unit(value, " GiB", ".1f")


def rate_text(value: Any) -> str:
    """Three digits at most: ``41``, ``5.3k``, ``210k``, ``2.9M``."""
    if not known(value):
        return MISSING
    for unit in ("", "k", "M"):
        if value < 999.5:
            return with_unit(value, unit, ".1f" if value < 100 else ".0f")
        value /= 1000
    return with_unit(value, "G", ".1f")


def seconds_text(value: Any) -> str:
    """``0.02``, ``1.4``, ``18``."""
    return with_unit(value, "", ".2g" if known(value) and value < 9.95 else ",.0f")


def printable(text: Any) -> str:
    """Without control characters, so that a file's name cannot steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def quality_names(comparison: Comparison) -> list[str]:
    """Every quality that some point has, in the order of first appearance."""
    return list(dict.fromkeys(name for point in comparison["points"] for name in point["quality"]))


def input_name(comparison: Comparison) -> str:
    return printable(comparison["input"].get("name"))


def rows_text(about: dict[str, Any]) -> str:
    """How many rows were compared, and of how many where it was a sample."""
    rows, everything = about.get("rows"), about.get("rows_in_file")
    held = about.get("queries") if about.get("queries_from") == "held-out rows" else 0
    if rows is None or everything is None or rows + (held or 0) >= everything:
        return count_text(rows)
    return f"{count_text(rows)} of {count_text(everything)}"


def input_facts(comparison: Comparison) -> str:
    """Shape, type and size of what was compared, and the time it took, in one line."""
    about = comparison["input"]
    facts = cache_facts(about) if about.get("kind") == "kv" else vector_facts(about)
    return printable(", ".join([*facts, f"{seconds_text(about.get('seconds'))} s"]))


def vector_facts(about: dict[str, Any]) -> list[str]:
    return [
        f"{rows_text(about)} × {count_text(about.get('dims'))} {about.get('dtype')}",
        f"{count_text(about.get('bytes_per_item'))} bytes per item",
        f"{about.get('metric')}",
        f"{count_text(about.get('queries'))} queries ({about.get('queries_from')})",
    ]


def cache_facts(about: dict[str, Any]) -> list[str]:
    layers, heads, width = (count_text(about.get(name)) for name in ("layers", "heads", "dims"))
    return [
        f"{layers} layers × {heads} heads × {width} {about.get('dtype')}",
        f"{count_text(about.get('bytes_per_item'))} bytes per token",
        f"{count_text(about.get('pieces'))} pieces of {count_text(about.get('prompt'))} tokens",
        f"{count_text(about.get('scored'))} scored after each",
    ]


def left_out_reasons(comparison: Comparison) -> dict[str, str]:
    """Reason → the methods it holds for, joined by commas."""
    reasons: dict[str, list[str]] = {}
    for row in comparison["left_out"]:
        reasons.setdefault(printable(row["why"]), []).append(printable(row["method"]))
    return {why: ", ".join(methods) for why, methods in reasons.items()}


def tried_words(comparison: Comparison) -> str:
    """How many chains were tried on how many rows; empty where none were searched for."""
    rounds: dict[int, int] = {}
    for entry in comparison.get("tried", []):
        rounds[entry["rows"]] = rounds.get(entry["rows"], 0) + 1
    tried = [f"{count:,} on {rows:,} rows" for rows, count in rounds.items()]
    return f"chains tried: {', then '.join(tried)}" if tried else ""


CELLS: dict[str, Callable[[Point], str]] = {
    "bytes_per_item": lambda point: count_text(point["bytes_per_item"]),
    "ratio": lambda point: ratio_text(point.get("ratio")),
    "share": lambda point: share_text(point.get("ratio")),
    "codec_bytes": lambda point: size_text(point.get("codec_bytes")),
    "encode_per_second": lambda point: rate_text(point.get("encode_per_second")),
    "search_per_second": lambda point: rate_text(point.get("search_per_second")),
    "fit_seconds": lambda point: seconds_text(point.get("fit_seconds")),
}
"""Figure of a point → its text. The first two columns stand before the qualities."""


def table_columns(qualities: list[str], kind: Kind) -> dict[str, Callable[[Point], str]]:
    """Heading → cell text of a point, from left to right."""

    def quality(name: str) -> Callable[[Point], str]:
        return lambda point: quality_text(point["quality"].get(name), name)

    figures = [(heading, CELLS[name]) for name, heading in kind.columns.items()]
    return {
        "method": lambda point: printable(point["spec"]),
        **dict(figures[:2]),
        **{name: quality(name) for name in qualities},
        **dict(figures[2:]),
    }


def sorted_points(comparison: Comparison, target: str) -> list[Point]:
    """From few to many bytes per item; at equal size the best `target` first."""

    def place(point: Point) -> tuple[float, float]:
        size, quality = point["bytes_per_item"], point["quality"].get(target)
        better = -gain(target, quality) if known(quality) else math.inf
        return size if known(size) else math.inf, better

    return sorted(comparison["points"], key=place)
