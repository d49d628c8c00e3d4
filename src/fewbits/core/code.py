"""Code: what a codec makes of the data, as named arrays with one row per item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewbits.core.errors import FewbitsError


@dataclass(frozen=True)
class Code:
    """Named arrays, and which codec made them.

    Attributes
    ----------
    arrays : name → array; the first axis of each is the items, so rows can be cut and joined.
    spec : the complete spec string of the codec.
    codec_digest : SHA-256 (hexadecimal) of the codec's hyper-parameters and learned arrays.
        A codec refuses to decode what another one encoded.
    """

    arrays: dict[str, np.ndarray]
    spec: str
    codec_digest: str

    def __post_init__(self) -> None:
        if not self.arrays:
            raise FewbitsError("a code needs at least one array")
        if not all(array.ndim for array in self.arrays.values()):
            raise FewbitsError("the arrays of a code must have one row per item")
        if len({len(array) for array in self.arrays.values()}) != 1:
            lengths = {name: len(array) for name, array in self.arrays.items()}
            raise FewbitsError(f"the arrays of a code must have equally many rows, not {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def nbytes(self) -> int:
        """Payload bytes: what saving writes for the items, without header and codec."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bytes_per_item(self) -> float:
        return self.nbytes / max(len(self), 1)

    def take(self, rows: np.ndarray | slice) -> Code:
        """The given items, as a code of their own."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Code(arrays, self.spec, self.codec_digest)


def join(codes: Sequence[Code]) -> Code:
    """All items of codes made by one codec, in order.

    Raises
    ------
    FewbitsError
        When the codes come from different codecs, or there are none.
    """
    if not codes:
        raise FewbitsError("there are no codes to join")
    if len({code.codec_digest for code in codes}) != 1:
        raise FewbitsError("these codes were made by different codecs; encode them with one")
    first = codes[0]
    arrays = {name: np.concatenate([code[name] for code in codes]) for name in first.arrays}
    return Code(arrays, first.spec, first.codec_digest)
