"""The report of a comparison: a table for the terminal, a picture, a page for the browser.

A comparison is a plain dict, the one that ``fewbits compare`` writes as ``comparison.json``:
``input`` (what was compared), ``points`` (one per method and setting) and ``left_out`` (methods
that could not run, and why).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import math
import os
import string
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.core.container import clear_errors, make_folder, remove_empty
from fewbits.core.kinds import LESS_IS_BETTER, Kind, kind_of, main_quality
from fewbits.core.report_picture import png_bytes
from fewbits.core.report_text import (
    MISSING,
    Comparison,
    Point,
    input_facts,
    input_name,
    left_out_reasons,
    quality_names,
    sorted_points,
    table_columns,
    tried_words,
)

if TYPE_CHECKING:
    from rich.console import Console

DROPPED_FIRST = ("fit_seconds", "encode_per_second", "search_per_second", "codec_bytes")
"""What the terminal table leaves out first where it is too narrow."""

# -- the table -----------------------------------------------------------------------------


def print_table(
    comparison: Comparison, console: Console | None = None, target: str | None = None
) -> None:
    """Print the comparison as a table, from few to many bytes per item or token.

    Rows on the frontier are marked and bold. Where the terminal is too narrow for all columns
    the least important ones are left out, and a line says which; method specs are never cut.

    Parameters
    ----------
    console : where to print; standard output if None.
    target : the quality that the frontier was drawn for, recall@10 or KL if None; its column
        always stays.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    names = quality_names(comparison)
    target = target or main_quality(names)
    points = sorted_points(comparison, target)
    heading = f"{input_name(comparison)}: {input_facts(comparison)}"
    console.print(Text(encodable(heading, console)))
    if points:
        columns = table_columns(names, kind_of(comparison))
        notes = print_rows(points, columns, kind_of(comparison), console, target)
    else:
        notes = ["No method could be compared."]
    notes += filter(None, [tried_words(comparison)])
    left_out = left_out_reasons(comparison).items()
    notes += [f"left out: {methods}: {why}" for why, methods in left_out]
    for note in notes:
        console.print(Text(encodable(note, console)))


def print_rows(
    points: list[Point],
    columns: dict[str, Callable[[Point], str]],
    kind: Kind,
    console: Console,
    target: str,
) -> list[str]:
    """Print the table itself; returns what has to be said below it."""
    from rich.cells import cell_len

    cells = {
        head: [encodable(cell(point), console) for point in points]
        for head, cell in columns.items()
    }
    widths = {head: max(map(cell_len, [head, *texts])) for head, texts in cells.items()}
    kept = columns_that_fit(widths, kind, target, console.width)
    marks = [encodable("●", console) if point.get("on_frontier") else "" for point in points]
    console.print(rich_table({head: cells[head] for head in kept}, marks))
    notes = []
    if any(marks):
        better = "less" if target in LESS_IS_BETTER else "more"
        notes.append(f"● on the frontier: no method has {better} {target} in fewer bytes")
    if dropped := [head for head in cells if head not in kept]:
        notes.append(f"not shown at this width: {', '.join(dropped)}")
    return notes


def encodable(text: str, console: Console) -> str:
    """`text` in characters that the console's encoding has."""
    if not console.options.ascii_only:
        return text
    plainer = text.translate({ord("●"): "*", ord("×"): "x", ord(MISSING): "-"})
    return plainer.encode("ascii", "replace").decode()


def table_text(comparison: Comparison, width: int = 120) -> str:
    """The table without colour, `width` characters wide."""
    from rich.console import Console

    text = io.StringIO()
    print_table(comparison, Console(file=text, width=width, color_system=None))
    return text.getvalue()


def columns_that_fit(widths: dict[str, int], kind: Kind, target: str, width: int) -> list[str]:
    """Headings to keep in `width` terminal cells; two cells part each column from the last."""
    size, smaller, *_ = kind.columns.values()
    figures = [kind.columns[name] for name in DROPPED_FIRST]
    qualities = [head for head in widths if head not in ("method", size, smaller, target, *figures)]
    kept = list(widths)
    mark_column = 3
    for head in (*figures, *qualities, smaller):
        if mark_column + sum(widths[name] + 2 for name in kept) <= width:
            break
        kept.remove(head)
    return kept


def rich_table(cells: dict[str, list[str]], marks: list[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", padding=(0, 0, 0, 1))
    table.add_column("")
    for head in cells:
        if head == "method":
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    for mark, *texts in zip(marks, *cells.values(), strict=True):
        style = "bold" if mark else None
        table.add_row(Text(mark, style="green"), *map(Text, texts), style=style)
    return table


# -- picture and page ------------------------------------------------------------------------------


def draw_png(comparison: Comparison, path: str | Path) -> None:
    """Draw recall@10 (or the first quality there is) against bytes as a PNG.

    Raises
    ------
    FewbitsError
        The file cannot be written.
    """
    place_files({Path(path): png_bytes(comparison)})


def write_report(comparison: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.html``, ``comparison.json`` and a picture into `folder`.

    The picture is ``recall.png``, or for KV caches ``divergence.png``.

    The page needs no network and no other file. Older files of these names are replaced, and
    only once all three are ready.

    Returns
    -------
    The paths of the page and of the picture.

    Raises
    ------
    FewbitsError
        A file cannot be written.
    """
    folder = Path(folder)
    page, picture = folder / "report.html", folder / kind_of(comparison).picture
    text = json.dumps(plain(comparison), indent=1, allow_nan=False)
    place_files(
        {
            folder / "comparison.json": (text + "\n").encode(),
            picture: png_bytes(comparison),
            page: page_text(comparison).encode(),
        }
    )
    return page, picture


def place_files(files: dict[Path, bytes]) -> None:
    """Write all files under temporary names, then rename them, so that no reader sees half."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    made: list[Path] = []
    try:
        for path, content in files.items():
            made += make_folder(path)
            with clear_errors(path):
                temporary[path].write_bytes(content)
        for path in files:
            with clear_errors(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
        remove_empty(made)


def plain(value: Any) -> Any:
    """Only what JSON knows: NumPy scalars become numbers, and what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page_text(comparison: Comparison) -> str:
    """The whole page. Its policy lets it run its own script and reach nothing else."""
    parts = resources.files("fewbits.core")
    template, style, plot, page = (
        (parts / name).read_text("utf-8")
        for name in ("report_page.html", "report_page.css", "report_plot.js", "report_page.js")
    )
    script = plot + page
    kind = kind_of(comparison)
    data = json.dumps(plain(comparison), allow_nan=False)
    for character in "<>&":  # so that no text in the data can end the element that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    return string.Template(template).substitute(
        title=html.escape(input_name(comparison)),
        facts=html.escape(input_facts(comparison)),
        style=style,
        style_hash=content_hash(style),
        script=script,
        script_hash=content_hash(script),
        words=html.escape(json.dumps(kind.to_json())),
        sizes=kind.sizes,
        size_note=kind.size_note,
        data=data,
        table=static_table(comparison),
        left_out=left_out_section(comparison),
    )


def content_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def static_table(comparison: Comparison) -> str:
    """The table that a browser without scripts shows."""
    names = quality_names(comparison)
    columns = table_columns(names, kind_of(comparison))
    head = "".join(f"<th>{html.escape(text)}</th>" for text in columns)
    rows = [
        "".join(f"<td>{html.escape(cell(point))}</td>" for cell in columns.values())
        for point in sorted_points(comparison, main_quality(names))
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def left_out_section(comparison: Comparison) -> str:
    rows = [
        f"<dt>{html.escape(methods)}</dt><dd>{html.escape(why)}</dd>"
        for why, methods in left_out_reasons(comparison).items()
    ]
    if not rows:
        return ""
    return (
        f'<section id="left-out" class="panel"><h2>Left out</h2><dl>{"".join(rows)}</dl></section>'
    )
