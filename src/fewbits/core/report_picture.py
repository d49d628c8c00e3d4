"""The picture of a report: quality against bytes per item or token, drawn with matplotlib."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

from fewbits.core.kinds import LESS_IS_BETTER, LOGARITHMIC, kind_of, main_quality
from fewbits.core.report_text import (
    Comparison,
    Point,
    input_facts,
    input_name,
    known,
    printable,
    quality_names,
    sorted_points,
)

PALETTE = [
    "#2f6fde",
    "#e0662b",
    "#1f9d63",
    "#c4317a",
    "#7a52cc",
    "#0f95a8",
    "#b58900",
    "#d33a3a",
    "#5d6b7a",
    "#8a5a2b",
]
SOFT = "#3c4650"
LABEL_PLACES = ((-7, 6, "right"), (7, -12, "left"), (0, 9, "center"), (-7, -12, "right"))
"""Where a label may stand beside its point, in points: first choice first."""
MARKERS = "osD^vpX"
"""As many markers as share no factor with the palette: 70 pairs before one comes again."""


def png_bytes(comparison: Comparison) -> bytes:
    """recall@10 (or the first quality there is) against bytes, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = main_quality(quality_names(comparison))
    figure = Figure(figsize=(10, 5.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever the screen
    axes = figure.add_subplot()
    dress_axes(axes, comparison, quality)
    drawn = [
        point
        for point in sorted_points(comparison, quality)
        if known(point["quality"].get(quality))
        and known(point["bytes_per_item"])
        and point["bytes_per_item"] > 0
    ]
    if drawn:
        if quality in LOGARITHMIC:
            drawn = raised(drawn, quality)
            axes.set_yscale("log")
        draw_points(figure, axes, drawn, quality)
    else:
        axes.text(
            0.5,
            0.5,
            "no method could be compared",
            transform=axes.transAxes,
            ha="center",
        )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def raised(points: list[Point], quality: str) -> list[Point]:
    """Points whose quality has a logarithm: what is 0 stands at half of the least above it."""
    above = [point["quality"][quality] for point in points if point["quality"][quality] > 0]
    least = min(above, default=1.0) / 2
    return [
        {**point, "quality": {quality: max(least, point["quality"][quality])}} for point in points
    ]


def dress_axes(axes: Any, comparison: Comparison, quality: str) -> None:
    name, facts = input_name(comparison), input_facts(comparison)
    # parse_math is off for all text from outside: a "$" in it is a dollar.
    axes.set_title(name, loc="left", fontsize=14, weight="bold", pad=24, parse_math=False)
    axes.text(
        0,
        1.025,
        facts,
        transform=axes.transAxes,
        fontsize=9.5,
        color="#5d6b7a",
        parse_math=False,
    )
    way = " (less is better)" if quality in LESS_IS_BETTER else ""
    axes.set_xlabel(f"{kind_of(comparison).sizes} (log scale)")
    axes.set_ylabel(quality + way, parse_math=False)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(color="#9aa5b1", labelcolor=SOFT)


def draw_points(figure: Any, axes: Any, points: list[Point], quality: str) -> None:
    methods = sorted({str(point["method"]) for point in points})
    for number, method in enumerate(methods):
        own = [point for point in points if str(point["method"]) == method]
        axes.plot(
            [point["bytes_per_item"] for point in own],
            [point["quality"][quality] for point in own],
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            color=PALETTE[number % len(PALETTE)],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=printable(method),
        )
    frontier = [point for point in points if point.get("on_frontier")]
    axes.plot(
        [point["bytes_per_item"] for point in frontier],
        [point["quality"][quality] for point in frontier],
        drawstyle="steps-post",
        color=SOFT,
        linewidth=1.2,
        zorder=1,
        label="frontier",
    )
    set_byte_ticks(axes, [point["bytes_per_item"] for point in points])
    legend = figure.legend(
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        ncols=1 + len(methods) // 26,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out now; labels must find the places they are given
    label_frontier(figure, axes, points, frontier, quality)


def set_byte_ticks(axes: Any, sizes: list[float]) -> None:
    """A log-2 axis with at most a dozen ticks, each a power of two."""
    low, high = math.log2(min(sizes)) - 0.5, math.log2(max(sizes)) + 0.5
    step = max(1, math.ceil((high - low) / 12))
    ticks = [2.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(2**low, 2**high)
    axes.set_xticks(ticks, [f"{tick:,.12g}" for tick in ticks])
    axes.minorticks_off()


def label_frontier(
    figure: Any, axes: Any, points: list[Point], frontier: list[Point], quality: str
) -> None:
    """Write specs beside frontier points, each only where it covers nothing else."""
    from matplotlib.transforms import Bbox

    def pixels(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point["bytes_per_item"], point["quality"][quality]))
        return float(x), float(y)

    size = 11
    places = [pixels(point) for point in points]
    taken = [Bbox([[x - size, y - size], [x + size, y + size]]) for x, y in places]
    for (x, y), (next_x, next_y) in pairwise(pixels(point) for point in frontier):
        taken.append(Bbox([[x, y - 2], [next_x, y + 2]]))
        taken.append(Bbox([[next_x - 2, y], [next_x + 2, next_y]]))
    for point in frontier:
        for place in LABEL_PLACES:
            label = write_label(axes, point, quality, place)
            box = label.get_window_extent(figure.canvas.get_renderer())
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def write_label(axes: Any, point: Point, quality: str, place: tuple[int, int, str]) -> Any:
    label = axes.annotate(
        printable(point["spec"]),
        (point["bytes_per_item"], point["quality"][quality]),
        xytext=place[:2],
        textcoords="offset points",
        ha=place[2],
        fontsize=7.5,
        color=SOFT,
        parse_math=False,
    )
    label.set_in_layout(False)
    return label
