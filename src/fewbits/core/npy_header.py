"""The header of an ``.npy`` file."""

from __future__ import annotations

import tokenize
from typing import IO

import numpy as np

from fewbits.core.errors import FewbitsError


def npy_header(file: IO[bytes], name: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of the ``.npy`` that starts here.

    Raises
    ------
    FewbitsError
        Not an ``.npy``, or a damaged header.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except (ValueError, tokenize.TokenError):
        raise FewbitsError(f"{name} is not an .npy file, or its header is damaged") from None
