"""The catalogue: which systems there are, where each one lives, and whether it is here."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewbits.core.errors import FewbitsError, MissingExtraError

if TYPE_CHECKING:
    from fewbits.core.codec import Codec

ROOMS = (
    "vectors",
    "kv",
    "weights",
    "media",
    "fields",
    "tables",
    "sequences",
    "latents",
    "memory",
    "measures",
)

EXTRA_MODULES = {
    "torch": ("torch",),
    "examples": ("torch", "transformers"),
    "kv": ("torch", "transformers"),
    "measures": ("sklearn",),
}
"""Which packages each extra must bring for a system to run."""


@dataclass(frozen=True)
class System:
    """One row of the catalogue.

    Attributes
    ----------
    name : the slug, used in spec strings and on the command line.
    title : title of the paper.
    arxiv : its arXiv number, or "" where it has none.
    room : the sub-package it lives in.
    kind : what it is: codec, cache, weights, measure, layer or model.
    summary : one line in our own words.
    path : ``module:attribute`` of its main class or function.
    extra : the extra its packages come with, or "" where the core is enough.
    """

    name: str
    title: str
    arxiv: str
    room: str
    kind: str
    summary: str
    path: str
    extra: str = ""

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def missing_packages(self) -> list[str]:
        """Packages of its extra that are not installed."""
        return [name for name in EXTRA_MODULES.get(self.extra, ()) if not installed(name)]

    @property
    def status(self) -> str:
        """``available``, ``needs fewbits[extra]`` or ``planned``; computed, never typed."""
        if not installed(self.module):
            return "planned"
        return f"needs fewbits[{self.extra}]" if self.missing_packages else "available"

    def load(self, *, trained: bool = False) -> Any:
        """Import it; `trained` where it is only to use what was trained elsewhere.

        Raises
        ------
        FewbitsError
            It is not written yet, or its extra is not installed.
        """
        if self.status == "planned":
            raise FewbitsError(f"{self.name} is planned, but not part of this version of fewbits")
        if self.missing_packages and not trained:
            raise MissingExtraError(
                f"{self.name} needs {', '.join(self.missing_packages)}; "
                f"install with: pip install 'fewbits[{self.extra}]'"
            )
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


def installed(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def systems() -> tuple[System, ...]:
    """The papers, one row each, in the order of their names within each room."""
    from fewbits.core.catalogue_rows import PAPERS

    return PAPERS


def opponents() -> tuple[System, ...]:
    """Established codecs that every comparison shows beside the papers."""
    from fewbits.core.catalogue_rows import OPPONENTS

    return OPPONENTS


def own() -> tuple[System, ...]:
    """Codecs of our own, beside the papers."""
    from fewbits.core.catalogue_rows import OWN

    return OWN


def everything() -> tuple[System, ...]:
    """All rows: opponents, our own, and the papers."""
    return (*opponents(), *own(), *systems())


def find(name: str) -> System:
    """The row of a system or opponent.

    Raises
    ------
    FewbitsError
        No such name; the message has the nearest one.
    """
    rows = {row.name: row for row in everything()}
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name, rows, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FewbitsError(f"unknown method {name!r}; {hint}`fewbits systems` lists the names")


def codec_class(name: str, *, trained: bool = False) -> type[Codec]:
    """The codec class of that name; `trained` as in `System.load`."""
    from fewbits.core.codec import Codec

    row = find(name)
    found = row.load(trained=trained) if row.kind == "codec" else None
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise FewbitsError(f"{name} is a {row.kind}, not a codec; it cannot encode a file")
    return found


def cache_stage(name: str) -> type[Any]:
    """The class of a way to compress KV caches."""
    row = find(name)
    if row.kind != "cache":
        raise FewbitsError(f"{name} is a {row.kind}, not a way to compress KV caches")
    found: type[Any] = row.load()
    return found


def codecs(room: str) -> list[System]:
    """All codec rows of a room that are part of this version, opponents first."""
    rows = [row for row in everything() if row.room == room and row.kind == "codec"]
    return [row for row in rows if row.status != "planned"]
