"""The main job, end to end, on the built-in real example: what ``make demo`` shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fewbits.core.collection import load
from fewbits.core.compare import compare
from fewbits.core.encode import encode
from fewbits.core.examples import python_docs
from fewbits.core.report import print_table, write_report

KEEP = 0.9


def demo(folder: Path) -> None:
    """Compare, choose, encode, search, decode and report; files go to `folder`."""
    example = python_docs()
    print(
        f"{len(example.texts):,} passages of Python's documentation, "
        f"{example.vectors.shape[1]} dimensions, {len(example.queries)} queries\n"
    )
    print("fewbits compare: what does each method cost at each size?")
    comparison = compare("example:python-docs", example.queries, show_progress=True)
    print_table(comparison.to_json())
    page, picture = write_report(comparison.to_json(), folder)

    point = comparison.cheapest(recall_at_10=KEEP)
    print(f"\nThe cheapest that keeps recall@10 at {KEEP}: {point.spec}")
    file = folder / "python-docs.fewbits"
    encode("example:python-docs", file, method=point.spec, overwrite=True)
    encoded = load(file)
    print(
        f"fewbits encode: {encoded.nbytes:,} bytes instead of "
        f"{len(encoded) * int(encoded.source['bytes_per_item']):,}, "
        f"{encoded.ratio:.1f} times smaller than the float16 input "
        f"(and {encoded.codec_bytes:,} bytes of codec)"
    )

    print("\nfewbits search: a few real questions")
    asked = np.flatnonzero(example.answers < 0)
    _, rows = encoded.search(example.queries[asked], k=3)
    for question, found in zip(asked, rows, strict=True):
        print(f"\n  {example.query_texts[question]}")
        for row in found:
            text = example.texts[row]
            print(f"    {example.ids[row]}: {text[:90]}{'…' if len(text) > 90 else ''}")

    decoded = encoded.decode()
    cosine = np.einsum("nd,nd->n", decoded, example.vectors) / np.linalg.norm(decoded, axis=1)
    print(f"\nfewbits decode: mean cosine with the originals {cosine.mean():.3f}")
    print(f"\nThe report: {page} and {picture}")
