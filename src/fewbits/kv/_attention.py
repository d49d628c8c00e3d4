"""Attention over the parts of one layer: what the cache and transformers' interface both need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fewbits.kv._forms import Exact, Part
from fewbits.primitives.partial_attention import Partial, attend, fold, join, unfold


def allowed_of(mask: Tensor) -> Tensor:
    """A mask as bool: additive masks have very negative numbers where nothing may be seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attend_part(
    part: Part, rows: Tensor, scaling: float, cap: float | None, allowed: Tensor | None
) -> Partial:
    return attend(rows, part.keys.scores, part.values.mix, part.tokens, scaling, allowed, cap)


def exact_attention(
    module: Any,
    queries: Tensor,
    everything: Part,
    mask: Tensor | None,
    scaling: float,
    reading_prompt: bool,
) -> Tensor:
    """What transformers computes where all tokens that are held are exact."""
    keys, values = everything.keys.read(), everything.values.read()
    new, held = queries.shape[2], keys.shape[2]
    if not reading_prompt or mask is None or mask.shape[-1] != held:
        mask = mask_of_held(everything, new)
    output, _ = sdpa_attention_forward(
        module, queries, keys, values, mask, scaling=scaling, is_causal=mask is None and new > 1
    )
    return output.transpose(1, 2)


def mask_of_held(everything: Part, new: int) -> Tensor | None:
    """What the newest `new` tokens may see of all that are held: earlier ones without padding."""
    held, device = everything.tokens, everything.keys.read().device
    if everything.valid is None and (new == 1 or new == held):
        return None
    seen = torch.ones(new, held, dtype=torch.bool, device=device).tril(held - new)[None, None]
    if everything.valid is not None:
        seen = seen & everything.valid[:, :, None]
    return seen


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(b, t, heads, d): attention with what transformers' fast kernel does not know."""
    heads, tokens = key.shape[1], query.shape[2]
    groups = query.shape[1] // heads
    if mask is not None:
        allowed = allowed_of(mask)[..., : key.shape[2]].repeat(1, 1, groups, 1)
    else:
        whole = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=key.device)
        allowed = whole.tril(key.shape[2] - tokens).repeat(groups, 1)[None, None]
    part, scale = Part(Exact(key), Exact(value)), query.shape[-1] ** -0.5
    rows = fold(query, heads)
    partials = [attend_part(part, rows, scale if scaling is None else scaling, cap, allowed)]
    if sinks is not None:
        partials.append(sink_mass(sinks, partials[0].output, groups))
    return unfold(join(partials), query.shape[1]).transpose(1, 2).contiguous()


def sink_mass(sinks: Tensor, output: Tensor, groups: int) -> Partial:
    """A place that attention can go to and find nothing: one score for each query head."""
    batch, heads, rows, _ = output.shape
    mass = sinks.float().reshape(1, heads, groups, 1).expand(batch, -1, -1, rows // groups)
    return Partial(torch.zeros_like(output), mass.reshape(batch, heads, rows))
