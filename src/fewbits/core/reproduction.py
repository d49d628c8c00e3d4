"""Reproductions: a paper's headline claim, run on small real data, with a computed verdict."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fewbits.core.catalogue import System, everything, find, installed
from fewbits.core.errors import FewbitsError

SIZES = ("quick", "small")


@dataclass(frozen=True)
class Reproduction:
    """What came of running a claim.

    Attributes
    ----------
    system : name in the catalogue.
    claim : the claim in one sentence, as it is tested here.
    figures : what our implementation reached, by name.
    baselines : what the paper's baselines reached on the same data at equal size.
    holds : whether the claim holds, computed from the figures.
    reason : why it does not hold, where it does not; otherwise anything worth knowing.
    data : what it was run on.
    seconds : how long it took.
    """

    system: str
    claim: str
    figures: dict[str, float]
    baselines: dict[str, float]
    holds: bool
    reason: str = ""
    data: str = ""
    seconds: float = 0.0
    details: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the full table, where there is one."""

    def to_json(self) -> dict[str, Any]:
        from fewbits.core.report import plain

        return dict(plain(asdict(self)))


def module_of(row: System) -> str:
    return f"fewbits.reproductions.{row.room}.{row.name.replace('-', '_')}"


def available() -> list[str]:
    """Systems whose claim can be run."""
    return [row.name for row in everything() if installed(module_of(row))]


def reproducible(name: str) -> System:
    """The row of a system, after checking that its claim can be run here.

    Raises
    ------
    FewbitsError
        Unknown name, no reproduction, or a missing extra.
    """
    row = find(name)
    if not installed(module_of(row)):
        known = ", ".join(available()) or "none yet"
        raise FewbitsError(f"{name} has no reproduction; there is one for: {known}")
    row.load()
    return row


def reproduce(name: str, size: str = "small") -> Reproduction:
    """Run the headline claim of a system.

    Parameters
    ----------
    size : ``small`` is the real run (minutes); ``quick`` checks that it works (seconds).

    Raises
    ------
    FewbitsError
        Unknown name or size, no reproduction, or a missing extra.
    """
    row = reproducible(name)
    if size not in SIZES:
        raise FewbitsError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    run: Callable[..., Reproduction] = importlib.import_module(module_of(row)).run
    start = time.perf_counter()
    result = run(size=size)
    seconds = round(time.perf_counter() - start, 1)
    # Reproductions compute with NumPy; a result holds Python's own numbers.
    return replace(
        result,
        figures={what: float(value) for what, value in result.figures.items()},
        baselines={what: float(value) for what, value in result.baselines.items()},
        holds=bool(result.holds),
        seconds=seconds,
    )
