"""Progress bars on standard error, only where somebody looks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Steps:
    """A bar that counts steps; silent unless standard error is a terminal."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def step(self, what: str = "", count: float = 1) -> None:
        """Say what comes next, and that `count` more steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, advance=count, what=what)

    def extend(self, count: float) -> None:
        """Say that there are `count` more steps to do than was known."""
        if self._bar is not None:
            self._bar.update(self._task, total=self._bar.tasks[self._task].total + count)


@contextlib.contextmanager
def progress(label: str, total: float, *, show: bool = True) -> Iterator[Steps]:
    """A progress bar of `total` steps for the length of a ``with`` block."""
    if not show or not sys.stderr.isatty():
        yield Steps()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False),  # names of files are not markup
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Steps(bar, bar.add_task(label, total=total, what=""))
