"""Between a cache of transformers or of this room and plain tensors of all its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import CompressedCache, CompressedLayer, Stage, joined_valid
from fewbits.kv._forms import Exact, Part


def states_in(cache: Any, row: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(key heads, t, width) keys and values of each layer, of one row without its padding.

    Raises
    ------
    FewbitsError
        No such row, tokens were dropped, or there are more or fewer than was said.
    """
    layers = [layer_states(layer) for layer in getattr(cache, "layers", [])]
    if not layers:
        raise FewbitsError("there is nothing in this cache; have the model read the text first")
    found = []
    for keys, values, valid in layers:
        if not 0 <= row < len(keys):
            raise FewbitsError(f"the cache has {len(keys)} rows; there is no row {row}")
        mine = None if valid is None else valid[row, 0]
        if mine is None and len(keys) > 1 and keys.shape[2] > tokens:  # padding lies on the left
            mine = torch.arange(keys.shape[2], device=keys.device) >= keys.shape[2] - tokens
        k, v = (one[row] if mine is None else one[row][:, mine] for one in (keys, values))
        if k.shape[1] != tokens:
            raise FewbitsError(
                f"the cache holds {k.shape[1]} tokens of row {row}, but {tokens} token numbers "
                "were given; give those that the model has read (not the last one it wrote)"
            )
        found.append((k, v))
    return found


def layer_states(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """(b, key heads, s, width) keys and values, and (b, 1, s) which are no padding, or None."""
    if isinstance(layer, CompressedLayer):
        parts = [*layer.parts, *([layer.recent] if layer.recent is not None else [])]
        if layer.tokens_held != layer.seen or not parts:
            raise FewbitsError(
                f"this cache holds {layer.tokens_held} of {layer.seen} tokens; save one that holds "
                "all: fewbits.kv.cache(model, 'full')"
            )
        keys = torch.cat([part.keys.read() for part in parts], dim=2)
        values = torch.cat([part.values.read() for part in parts], dim=2)
        return keys, values, joined_valid(parts)
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    tensors = [one for one in held if isinstance(one, Tensor)]
    if len(tensors) < 2 or layer.is_sliding:
        raise FewbitsError("only a cache whose layers all hold every token can be saved")
    return tensors[0], tensors[1], None


def filled(
    model: Any, keys: Tensor, values: Tensor, into: Any = None, mask: Tensor | None = None
) -> Any:
    """A cache of (layers, b, key heads, t, width) keys and values, as if they had just been read.

    Parameters
    ----------
    into : an empty cache of `fewbits.kv.cache`; its method compresses what it is filled with.
        Otherwise transformers' ``DynamicCache`` is made.
    mask : (b, t) bool, False where there is padding.

    Raises
    ------
    FewbitsError
        `into` is not empty, is of another shape, or its method must watch the prompt being read.
    """
    keys, values = keys.to(model.device), values.to(model.device)
    if into is None:
        from transformers import DynamicCache

        made = DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            made.update(k, v, layer)
        return made
    if not isinstance(into, CompressedCache) or len(into.compressed) != len(keys):
        raise FewbitsError("into must be a cache of fewbits.kv.cache(model, …) for this model")
    for stage in into.stages:
        if type(stage).observe is not Stage.observe:
            raise FewbitsError(
                f"{stage.name} must see the prompt being read, which a saved cache is not; fill "
                "a cache of another method"
            )
    if into.get_seq_length():
        raise FewbitsError("into has tokens already; fill an empty cache, or reset it")
    valid = None if mask is None or bool(mask.all()) else mask[:, None].to(model.device)
    for layer, k, v in zip(into.compressed, keys, values, strict=True):
        fill_layer(layer, k, v, valid)
    return into


def fill_layer(layer: CompressedLayer, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Put (b, key heads, t, width) tokens into an empty layer, and end its prompt."""
    layer.lazy_initialization(keys, values)
    layer.seen = keys.shape[2]
    for stage, memory in zip(layer.stages, layer.memories, strict=True):
        keys, values = stage.shown(keys, values, memory)
    # Each layer holds storages of its own, so that bytes are counted right.
    layer.recent = Part(Exact(keys.clone()), Exact(values.clone()), valid)
    if not layer.held_open:
        layer.end_prompt()
