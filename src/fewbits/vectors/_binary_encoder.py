"""What all makers of packed binary codes share: searching them, and knowing their own."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fewbits.core.checks import check_k
from fewbits.core.code import Code
from fewbits.core.errors import FewbitsError
from fewbits.primitives.hamming import hamming_search


class BinaryEncoder:
    """Encodes inputs to codes with an array ``bits``, (n, bits/8) uint8."""

    maker: ClassVar[str]
    """What it is called in messages."""
    digest: Any
    """Names it in the codes it makes."""

    def encode(self, inputs: Any) -> Code:
        raise NotImplementedError  # abstract

    def require_fitted(self) -> None:
        raise NotImplementedError  # abstract

    def search(self, code: Code, queries: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The `k` items of `code` whose codes differ in the fewest bits.

        Parameters
        ----------
        code : what this made.
        queries : inputs, or the code of them.

        Returns
        -------
        Distances (q, k) int32 in bits, rising, and rows (q, k) int64. Exact; O(q·n·bits/8).

        Raises
        ------
        FewbitsError
            A code of another maker, unusable queries, or k beyond the items.
        """
        self.check_code(code)
        asked = queries if isinstance(queries, Code) else self.encode(queries)
        self.check_code(asked)
        return hamming_search(asked["bits"], code["bits"], check_k(k, len(code)))

    def check_code(self, code: Code) -> None:
        """Refuse a code that another one made, or this one fitted otherwise."""
        self.require_fitted()
        if code.codec_digest != self.digest:
            raise FewbitsError(
                f"this code was made by another {self.maker} ({code.spec}); use that one, or "
                "encode anew"
            )
