"""Recall at equal bytes: the best of fewbits against the best of faiss."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from tables import table

from fewbits.core.catalogue import find
from fewbits.core.codec import from_spec
from fewbits.core.examples import python_docs
from fewbits.core.search import search_array
from fewbits.core.text_encoder import TextEncoder, cached_arrays
from fewbits.reproductions.vectors.additive_bits import opponents

SIZES = (24, 48, 96)


def collections() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    example = python_docs()
    found = {"Python documentation": (unit(example.vectors), unit(example.queries))}
    folder = os.environ.get("FEWBITS_DATA")
    if folder and (Path(folder) / "cranfield").is_dir():
        found["Cranfield"] = cranfield(Path(folder) / "cranfield")
    return found


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cranfield(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Abstracts and queries of the Cranfield collection, embedded by MiniLM."""
    encoder = TextEncoder()
    texts = [read_smart(folder / name) for name in ("cran.all.1400", "cran.qry")]
    key = encoder.key(texts[0] + texts[1])

    def make() -> dict[str, np.ndarray]:
        return {"items": encoder.sentences(texts[0]), "queries": encoder.sentences(texts[1])}

    arrays = cached_arrays(f"cranfield-{key}", make)
    return arrays["items"], arrays["queries"]


def read_smart(path: Path) -> list[str]:
    """Title and text of each entry of a file in the SMART format."""
    entries = re.split(r"^\.I .*$", path.read_text(encoding="latin-1"), flags=re.MULTILINE)[1:]
    texts = []
    for entry in entries:
        fields = re.split(r"^\.([A-Z])\s*$", entry, flags=re.MULTILINE)
        parts = dict(zip(fields[1::2], fields[2::2], strict=True))
        texts.append(" ".join((parts.get("T", "") + " " + parts.get("W", "")).split()))
    return texts


def ours(size: int) -> list[str]:
    """Settings of our systems at most `size` bytes per vector of 384 dimensions."""
    shapes = {
        24: (("96", "2"),),
        48: (("192", "2"), ("128", "3")),
        96: (("384", "2"), ("256", "3")),
    }
    specs = [f"additive-bits:bytes={size}"]
    if find("bebr").status == "available":
        specs += [f"bebr:bits={bits},dims={dims},scoring=asymmetric" for dims, bits in shapes[size]]
    return specs


def tables() -> str:
    sections = ["## Quality: recall@10 at equal bytes\n"]
    sections.append(
        "Cosine, top 10 of exact search as truth, codecs fitted on the items alone. *faiss* is the "
        "best of PQ, OPQ (four widths), scalar quantization after PCA, RaBitQ (with and without "
        "PCA), LSH and ITQ; `±` is the standard error of the difference over queries.\n"
    )
    for name, (items, queries) in collections().items():
        truth = search_array(queries, items, 10, "cosine")[1]
        rows: list[list[Any]] = []
        for size in SIZES:
            mine = [found(spec, items, queries, truth) for spec in ours(size)]
            theirs = [
                found(spec, items, queries, truth) for spec in opponents(size, items.shape[1])
            ]
            best_of_ours = max(mine, key=lambda row: row["hits"].mean())
            best_of_faiss = max(theirs, key=lambda row: row["hits"].mean())
            gap = best_of_ours["hits"] - best_of_faiss["hits"]
            rows.append([size, *cells(best_of_ours), *cells(best_of_faiss), difference(gap)])
        heads = ["bytes", "fewbits", "recall@10", "faiss", "recall@10", "difference"]
        sections += [
            f"**{name}** ({len(items)} items, {len(queries)} queries)\n",
            table(heads, rows),
            "",
        ]
    return "\n".join(sections)


def found(spec: str, items: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Share of the true top 10 found, query by query."""
    codec = from_spec(spec).fit(items)
    code = codec.encode(items)
    _, rows = codec.searcher(code, "cosine").search(queries, 10)
    hits = (rows[:, :, None] == truth[:, None, :]).any(axis=2).mean(axis=1)
    return {"spec": spec, "bytes": code.bytes_per_item, "hits": hits}


def cells(row: dict[str, Any]) -> list[str]:
    return [f"`{row['spec']}` ({row['bytes']:g} B)", f"{row['hits'].mean():.3f}"]


def difference(gap: np.ndarray) -> str:
    return f"{gap.mean():+.3f} ± {gap.std(ddof=1) / np.sqrt(len(gap)):.3f}"
