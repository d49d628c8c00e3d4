"""Where the room's caches meet transformers: its attention function, registered with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fewbits.core.errors import FewbitsError
from fewbits.kv._attention import capped_attention
from fewbits.kv._cache import CompressedLayer

NAME = "fewbits"


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
    if not hasattr(model, "set_attn_implementation"):
        raise FewbitsError(
            f"{type(model).__name__} does not let its attention be replaced; give a causal "
            "language model of transformers"
        )
    if model.config._attn_implementation == NAME:
        return
    try:
        model.set_attn_implementation({"text_config": NAME} if is_multimodal(model) else NAME)
    except (ValueError, AttributeError, KeyError) as error:
        raise FewbitsError(
            f"{type(model).__name__} does not let its attention be replaced ({error})"
        ) from None


def is_multimodal(model: Any) -> bool:
    return model.config.get_text_config(decoder=True) is not model.config
