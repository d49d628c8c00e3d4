"""A room's public names, taken from the catalogue and imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def exported(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for the package of a room."""

    def names() -> dict[str, Any]:
        from fewbits.core.catalogue import everything

        rows = [row for row in everything() if row.room == room]
        return {row.path.partition(":")[2]: row for row in rows if row.status != "planned"}

    def get(name: str) -> Any:
        rows = names() if not name.startswith("_") else {}
        if name not in rows:
            raise AttributeError(f"fewbits.{room} has no {name!r}")
        return rows[name].load()

    return get, lambda: sorted(names())
