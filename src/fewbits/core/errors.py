"""The one error a user sees for bad input, and lazy imports that name the extra they need."""

from __future__ import annotations

import importlib
from types import ModuleType


class FewbitsError(ValueError):
    """Bad input or a request that cannot be met. One line that says what to do next."""


class MissingExtraError(FewbitsError):
    """A part of fewbits needs a package that is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises
    ------
    MissingExtraError
        When the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module.split('.')[0]}; install it with: pip install 'fewbits[{extra}]'"
        ) from None
