"""Where the room's caches meet transformers: its attention function, registered with them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fewbits.core.errors import FewbitsError
from fewbits.kv._attention import capped_attention
from fewbits.kv._cache import CompressedCache, CompressedLayer, Inputs

NAME = "fewbits"
KEY_MAKERS = {"k_proj", "qkv_proj"}
"""Projections by which an attention whose inputs can be used is known."""


def fewbits_attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: of a compressed layer where the cache has one, else transformers'."""
    if not isinstance(key, CompressedLayer):
        if softcap is not None or s_aux is not None:
            return capped_attention(
                query, key, value, attention_mask, scaling, softcap, s_aux
            ), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for unknown in ("position_bias", "sliding_window"):
        if kwargs.get(unknown) is not None:
            raise FewbitsError(f"attention with {unknown} is not supported in a compressed layer")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = key.attend(module, query, attention_mask, scale, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def use_attention(model: Any) -> None:
    """Have a model ask compressed layers; with any other cache it computes what it did.

    Raises
    ------
    FewbitsError
        Its attention is not one that can be replaced.
    """
    AttentionInterface.register(NAME, fewbits_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    replaceable = getattr(model, "_can_set_attn_implementation", lambda: False)
    if not hasattr(model, "set_attn_implementation") or not replaceable():
        raise FewbitsError(
            f"{type(model).__name__} does not let its attention be replaced; give a causal "
            "language model of transformers"
        )
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise FewbitsError(
            f"{type(model).__name__} caches latents that its attention expands (multi-head latent "
            "attention), not keys and values; these methods are not for it"
        )
    hand_over_inputs(model)
    if model.config._attn_implementation == NAME:
        return
    try:
        model.set_attn_implementation({"text_config": NAME} if is_multimodal(model) else NAME)
    except (ValueError, AttributeError, KeyError) as error:
        raise FewbitsError(
            f"{type(model).__name__} does not let its attention be replaced ({error})"
        ) from None


def hand_over_inputs(model: Any) -> None:
    """Have every attention of a model show its inputs to compressed layers that ask for them."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        hooks = getattr(module, "_forward_pre_hooks", {}).values()
        if not hasattr(module, "layer_idx") or not (
            KEY_MAKERS & set(dict(module.named_children()))
        ):
            continue
        if not any(getattr(hook, "func", None) is hand_over for hook in hooks):
            # An argument, so that a copy of the model gets its copy of it.
            hook = partial(hand_over, rotary_of(modules, name))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def rotary_of(modules: Mapping[str, Any], name: str) -> Any:
    """The nearest module of rotary embeddings above the module `name`."""
    while name:
        name = name.rpartition(".")[0]
        found = modules.get(f"{name}.rotary_emb".lstrip("."))
        if found is not None:
            return found
    return None


def hand_over(rotary: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention runs: its inputs go to its layer of a compressed cache."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        return
    layer = cache.layers[module.layer_idx]
    if isinstance(layer, CompressedLayer) and layer.sees_inputs:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        positions = kwargs.get("position_ids")
        layer.inputs = Inputs(states, positions, layer.seen, module, rotary)


def is_multimodal(model: Any) -> bool:
    return model.config.get_text_config(decoder=True) is not model.config
