"""The kinds of comparison there are, and how tables, pictures and pages speak of each.

A comparison says of which kind it is in ``input["kind"]``; without, it is one of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

TARGET = "recall@10"
"""The quality that points are ranked by, where it was measured."""
LESS_IS_BETTER = ("KL", "perplexity")
"""Qualities that fall as a method gets better; all others rise."""
LOGARITHMIC = ("KL",)
"""Qualities that are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Kind:
    """The words for one kind of comparison.

    Attributes
    ----------
    item : what bytes are counted per.
    whole : what the size of the input is called in the plot.
    paid_once : bytes that do not grow with the data.
    columns : figure of a point → its heading, beside the method and the qualities.
    size_note : what is said of sizes under the table.
    picture : name of the picture's file.
    usual_ratio : how many times smaller the page's limit of size is at first.
    use : what to do with a point: ``encode`` a file on the command line, or make a ``cache`` in
        Python.
    """

    item: str
    whole: str
    paid_once: str
    columns: dict[str, str]
    size_note: str
    picture: str
    usual_ratio: int
    use: str

    @property
    def sizes(self) -> str:
        return f"bytes per {self.item}"

    def to_json(self) -> dict[str, Any]:
        """The words that the page's script needs."""
        rules = {"less_is_better": LESS_IS_BETTER, "logarithmic": LOGARITHMIC}
        return asdict(self) | {"sizes": self.sizes} | rules


KINDS = {
    "vectors": Kind(
        item="item",
        whole="uncompressed",
        paid_once="codec",
        columns={
            "bytes_per_item": "bytes/item",
            "ratio": "smaller by",
            "codec_bytes": "codec bytes",
            "encode_per_second": "encode/s",
            "search_per_second": "search/s",
            "fit_seconds": "fit s",
        },
        size_note=(
            "Bytes per item grow with the data; codec bytes (codebooks, rotations, scales) are "
            "paid once."
        ),
        picture="recall.png",
        usual_ratio=16,
        use="encode",
    ),
    "kv": Kind(
        item="token",
        whole="full cache",
        paid_once="fitted",
        columns={
            "bytes_per_item": "bytes/token",
            "share": "of full cache",
            "codec_bytes": "fitted bytes",
            "encode_per_second": "prompt/s",
            "search_per_second": "decode/s",
            "fit_seconds": "fit s",
        },
        size_note=(
            "Bytes per token are those that a cache holds after the prompt, over the prompt's "
            "tokens; fitted bytes (projections, tables) are shared by all texts. Speeds are tokens "
            "per second."
        ),
        picture="divergence.png",
        usual_ratio=4,
        use="cache",
    ),
}


def kind_of(comparison: dict[str, Any]) -> Kind:
    """The words for a comparison, as `Comparison.to_json` gives it."""
    return KINDS[comparison["input"].get("kind", "vectors")]


def main_quality(names: Sequence[str]) -> str:
    """The quality that points are ranked by, of those that were measured."""
    return names[0] if names and TARGET not in names else TARGET


def gain(name: str, value: float) -> float:
    """A quality as a number that is higher where it is better."""
    return -value if name in LESS_IS_BETTER else value


def figure(name: str, value: float) -> str:
    """A quality as text: three decimals, or three to four digits where it has no upper end."""
    if name not in LESS_IS_BETTER:
        return f"{value:.3f}"
    return f"{value:.{3 if abs(value) < 1 else 4}g}"
