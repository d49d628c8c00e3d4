"""How many candidates multi-vector search needs, against one search per query vector."""

from __future__ import annotations

from tables import table

from fewbits.core.reproduction import reproduce

NEEDED = ("candidates for 80%", "candidates for 90%")
COST = ("numbers scanned per document", "bytes per document")


def tables() -> str:
    """The table of MUVERA's reproduction; `×` is the deduplicated heuristic's need over its own."""
    result = reproduce("muvera")
    rival = next(row for row in result.details if row["method"].endswith(", deduplicated"))
    rows = []
    for row in result.details:
        if row.get("seed", 0) != 0:
            continue
        name = row["method"]
        if "dims" in row:
            name += f", {row['dims']} dims, {'' if row['filled'] else 'not '}filled"
        fewer = f"{rival[NEEDED[1]] / row[NEEDED[1]]:.1f}×"
        rows.append([name, *(f"{row[key]:g}" for key in (*NEEDED, *COST)), fewer])
    heads = ["method", *NEEDED, *COST, "fewer for 90%"]
    title = "## Multi-vector search: candidates to hold the best document by exact Chamfer\n"
    return "\n".join([title, f"{result.data}; seed 0.\n", table(heads, rows)])
