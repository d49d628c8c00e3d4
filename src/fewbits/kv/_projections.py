"""How an attention of transformers makes keys and values: projection, norm, rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Inputs

CHANGING_ROTARY = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the length: keys cannot be rotated later."""

Map = tuple[Tensor, Tensor | None]
"""Weight (outputs, inputs) and bias (outputs,)."""


@dataclass
class KeyValueLayer:
    """The parts of a model's attention that keys and values come from.

    Attributes
    ----------
    module, rotary : of the model; nothing is copied.
    key_weight, value_weight : (key heads·width, hidden size).
    key_bias, value_bias : (key heads·width,) or None.
    heads, width : of keys.
    """

    module: Any
    rotary: Any
    key_weight: Tensor
    value_weight: Tensor
    key_bias: Tensor | None
    value_bias: Tensor | None
    heads: int
    width: int

    @classmethod
    def of(cls, inputs: Inputs) -> KeyValueLayer:
        """The parts of an attention.

        Raises
        ------
        FewbitsError
            Its keys and values are not made by linear layers alone.
        """
        module, width = inputs.module, getattr(inputs.module, "head_dim", None)
        children: dict[str, Any] = dict(module.named_children())
        pair = [children.get("k_proj"), children.get("v_proj")]
        whole = children.get("qkv_proj")
        if width is None or not (is_linear(whole) or all(map(is_linear, pair))):
            raise FewbitsError(
                f"{type(module).__name__} does not make keys and values by plain linear layers "
                "k_proj and v_proj, or qkv_proj; use another method"
            )
        check_rotary(inputs, width)
        maps = split_whole(module, whole, width) if whole is not None else parameters(pair)
        (key_weight, key_bias), (value_weight, value_bias) = maps
        if key_weight.shape != value_weight.shape:
            raise FewbitsError("keys and values of different widths are not supported")
        weights, heads = (key_weight, value_weight), len(key_weight) // width
        return cls(module, inputs.rotary, *weights, key_bias, value_bias, heads, width)

    def keys(self, projected: Tensor, positions: Tensor) -> Tensor:
        """(b, h, s, width) keys, as attention sees them, from (b, s, h·width) without bias."""
        flat = projected if self.key_bias is None else projected + self.key_bias
        norm = getattr(self.module, "k_norm", None)
        if norm is not None and norm.weight.numel() == flat.shape[2] != self.width:
            flat = norm(flat)
        keys = flat.unflatten(2, (self.heads, self.width))
        if norm is not None and norm.weight.numel() == self.width:
            keys = norm(keys)
        keys = keys.transpose(1, 2)
        return keys if self.rotary is None else rotated(keys, *self.angles(keys, positions))

    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(b or 1, s, width) cosines and sines from the model's own module."""
        kinds = [self.module.layer_type] if hasattr(self.rotary, "layer_types") else []
        cos, sin = self.rotary(like, positions, *kinds)
        return cos, sin

    def values(self, projected: Tensor) -> Tensor:
        """(b, h, s, width) values from (b, s, h·width) without bias."""
        flat = projected if self.value_bias is None else projected + self.value_bias
        return flat.unflatten(2, (self.heads, self.width)).transpose(1, 2)

    def mixed_values(self, mixed: Tensor, up: Tensor, mass: Tensor) -> Tensor:
        """(b, h, r, width) sums of values from (b, h, r, rank) sums of features.

        `up` is (rank, h·width); `mass` (b, h, r, 1) is the sum of the weights, which the bias gets.
        """
        by_head = up.unflatten(1, (self.heads, self.width)).transpose(0, 1)
        output = mixed @ by_head
        if self.value_bias is not None:
            output = output + mass * self.value_bias.unflatten(0, (self.heads, 1, self.width))
        return output


def is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()


def parameters(linears: list[Any]) -> list[Map]:
    return [(one.weight, one.bias) for one in linears]


def split_whole(module: Any, whole: nn.Linear, width: int) -> list[Map]:
    """The maps of keys and values out of one projection of queries, keys and values."""
    held = int(module.config.num_key_value_heads) * width
    sizes = [whole.out_features - 2 * held, held, held]
    biases = [None] * 3 if whole.bias is None else whole.bias.split(sizes)
    return list(zip(whole.weight.split(sizes), biases, strict=True))[1:]


def check_rotary(inputs: Inputs, width: int) -> None:
    """Refuse rotary embeddings that cannot be computed later from the position alone."""
    rotary, positions = inputs.rotary, inputs.positions
    if rotary is None:
        return
    kinds = getattr(rotary, "rope_type", "default")
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    if kinds & CHANGING_ROTARY:
        raise FewbitsError(
            f"rotary embeddings of type {', '.join(sorted(kinds & CHANGING_ROTARY))} depend on the "
            "length of the text; keys cannot be rebuilt before them, so use another method"
        )
    described = str(getattr(inputs.module.config, "rope_parameters", None) or "")
    if positions is None or positions.ndim != 2 or "mrope_section" in described:
        raise FewbitsError(
            "this model numbers its tokens by more than one position; keys cannot be rebuilt, so "
            "use another method"
        )
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is not None and 2 * frequencies.numel() != width:
        raise FewbitsError(
            "this model rotates only a part of each head; keys cannot be rebuilt, so use another "
            "method"
        )


def rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(b, h, s, d) keys turned by (b or 1, s, d) angles: the halves of a head are its pairs."""
    first, second = keys.chunk(2, dim=3)
    turned = torch.cat([-second, first], dim=3)
    return keys * cos[:, None] + turned * sin[:, None]
