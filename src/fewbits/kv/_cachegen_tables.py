"""How the file of a CacheGen profile holds it, and what is checked when it is read."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cachegen_codec import ANCHOR, ANCHOR_MOST, PREDICTORS, Profile, digest_of
from fewbits.kv._cachegen_files import read_levels, whole
from fewbits.kv._cachegen_fit import MOST
from fewbits.primitives.entropy_coding import SymbolTables

ARRAYS = ("predictors", "turned", "frequencies", "steps", "means", "contexts")
ANCHORS = "tables.anchors"
MOST_GROUP = 255


def tensors_of(profile: Profile) -> dict[str, Tensor]:
    """What a file of a profile holds; frequencies are compressed, three to one."""
    arrays = {field: getattr(profile, field) for field in ARRAYS}
    arrays |= {f"tables.{n}": compressed(one) for n, one in enumerate(profile.tables)}
    if profile.anchor_tables is not None:
        arrays[ANCHORS] = compressed(profile.anchor_tables)
    return {what: torch.from_numpy(array) for what, array in arrays.items()}


def compressed(tables: SymbolTables) -> np.ndarray:
    """(n,) uint8."""
    data = zlib.compress(tables.frequencies.astype("<u2").tobytes(), 9)
    return np.frombuffer(data, np.uint8).copy()


def settings_of(profile: Profile) -> dict[str, Any]:
    """What goes with the tensors."""
    return {
        "levels": list(profile.levels),
        "group": profile.group,
        "heads": profile.heads,
        "width": profile.width,
        "reaches": [-table.low for table in profile.tables],
        "digest": profile.digest,
    }


def profile_of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> Profile:
    """The profile of a file, checked.

    Raises
    ------
    FewbitsError
        Its parts do not fit together.
    """
    try:
        made = read_profile({what: one.numpy() for what, one in tensors.items()}, settings)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, zlib.error) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise FewbitsError(f"{where} is damaged: {reason}; fit and save it again") from None
    if made.digest != settings.get("digest"):
        raise FewbitsError(f"{where} is damaged: its tables do not match their digest")
    return made


def read_profile(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Profile:
    levels = read_levels({str(n): scale for n, scale in enumerate(settings["levels"])})
    bare = Profile(
        heads=whole(settings["heads"], "heads", 1),
        width=whole(settings["width"], "width", 1),
        levels=tuple(levels.values()),
        group=whole(settings["group"], "group", 1),
        **{field: arrays[field] for field in ARRAYS},
        tables=(),
        anchor_tables=None,
        digest="0",
    )
    check_arrays(bare)
    rows = int(bare.contexts.max()) + 1
    tables = tuple(
        read_tables(arrays[f"tables.{n}"], rows, reach)
        for n, reach in zip(levels, settings["reaches"], strict=True)
    )
    has_anchors = bool((bare.predictors == ANCHOR).any())
    anchors = read_tables(arrays[ANCHORS], rows, ANCHOR_MOST) if has_anchors else None
    made = replace(bare, tables=tables, anchor_tables=anchors)
    return replace(made, digest=digest_of(made))


def read_tables(data: np.ndarray, rows: int, reach: Any) -> SymbolTables:
    """Tables of the numbers −reach to reach."""
    if whole(reach, "the reach of a table", 1) > MOST:
        raise ValueError("a table is too long")
    shape = (rows, 2 * reach + 2)
    wanted = 2 * shape[0] * shape[1]
    found = zlib.decompressobj().decompress(data.tobytes(), wanted + 1)
    if len(found) != wanted:
        raise ValueError("a table has another length than it should")
    try:
        return SymbolTables(-reach, np.frombuffer(found, "<u2").astype(np.uint16).reshape(shape))
    except ValueError as error:
        raise FewbitsError(f"the tables are damaged: {error}") from None


def check_arrays(made: Profile) -> None:
    """Refuse arrays that do not fit together."""
    if made.predictors.ndim != 2 or made.predictors.shape[0] != 2 or not made.layers:
        raise ValueError("its predictors are malformed")
    layers, channels = made.layers, made.channels
    wanted = {
        "predictors": ((2, layers), np.uint8),
        "turned": ((layers,), np.bool_),
        "frequencies": (made.frequencies.shape[:1], np.float32),
        "steps": ((2, layers), np.float32),
        "means": ((2, layers, channels), np.float32),
        "contexts": ((2, layers, channels), np.int32),
    }
    for field, (shape, dtype) in wanted.items():
        array = getattr(made, field)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"its {field} are {array.dtype} of shape {array.shape}")
    if made.contexts.min() < 0 or made.contexts.max() >= made.contexts.size:
        raise ValueError("its channels have no tables")
    if made.predictors.max() >= len(PREDICTORS) or not (made.steps > 0).all():
        raise ValueError("its predictors or steps cannot be")
    if 2 * len(made.frequencies) > made.width or made.group > MOST_GROUP:
        raise ValueError("its rotation or its groups cannot be")
