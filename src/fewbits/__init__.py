"""fewbits: encode anything a model works with into few bits, and say honestly what that cost.

>>> import fewbits
>>> comparison = fewbits.compare("docs.npy", queries="queries.npy")
>>> point = comparison.cheapest(recall_at_10=0.95)
>>> codes = fewbits.encode("docs.npy", "docs.fewbits", method=point.spec)
>>> scores, rows = fewbits.load("docs.fewbits").search("queries.npy", k=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from fewbits.core.catalogue import systems
    from fewbits.core.chains import search_chains
    from fewbits.core.codec import chain, from_spec
    from fewbits.core.collection import Encoded, load
    from fewbits.core.compare import Comparison, compare
    from fewbits.core.encode import encode
    from fewbits.core.errors import FewbitsError
    from fewbits.core.export import Exported, export, store_queries
    from fewbits.core.reproduction import reproduce
    from fewbits.core.texts import open_texts

__version__ = "0.1.0"

_HOMES = {
    "compare": "core.compare",
    "Comparison": "core.compare",
    "search_chains": "core.chains",
    "encode": "core.encode",
    "load": "core.collection",
    "Encoded": "core.collection",
    "export": "core.export",
    "Exported": "core.export",
    "store_queries": "core.export",
    "open_texts": "core.texts",
    "systems": "core.catalogue",
    "reproduce": "core.reproduction",
    "chain": "core.codec",
    "from_spec": "core.codec",
    "FewbitsError": "core.errors",
}

__all__ = [
    "Comparison",
    "Encoded",
    "Exported",
    "FewbitsError",
    "chain",
    "compare",
    "decode",
    "encode",
    "export",
    "from_spec",
    "load",
    "open_texts",
    "reproduce",
    "search_chains",
    "store_queries",
    "systems",
]


def decode(
    codes: str | Path | Encoded, output: str | Path | None = None, *, overwrite: bool = False
) -> np.ndarray | Path:
    """Get the vectors back that `encode` made small.

    Parameters
    ----------
    codes : what `encode` returned, or the file or directory that it wrote.
    output : ``.npy`` file to write; None returns the vectors.
    overwrite : replace an output that exists.

    Returns
    -------
    (n, d) float32, or the path of the file.

    Raises
    ------
    FewbitsError
        No codes there, or the output cannot be written.
    """
    from fewbits.core.collection import Encoded, load

    encoded = codes if isinstance(codes, Encoded) else load(codes)
    return encoded.decode() if output is None else encoded.decode_to(output, overwrite=overwrite)


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `fewbits --help` starts fast.
    if name in _HOMES:
        return getattr(importlib.import_module(f"fewbits.{_HOMES[name]}"), name)
    if name in ("kv", "vectors"):
        return importlib.import_module(f"fewbits.{name}")
    raise AttributeError(f"fewbits has no {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "kv", "vectors"]
