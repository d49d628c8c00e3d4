"""ThinK: drop the key channels that recent queries care least for.

Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo 2024, *ThinK: Thinner Key Cache by Query-Driven
Pruning* (arXiv 2407.21018, ICLR 2025).

Leaving out channel i changes the scores of the last queries by ‖Q[:, i] K[:, i]ᵀ‖, which is
‖Q[:, i]‖·‖K[:, i]‖, as an outer product has rank one. Per key head the channels with the smallest
of these are dropped; query heads that share it add up their squares. Only the kept channels are
stored. The newest keys stay whole, and so do those that come after the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Memory, Stage, Step
from fewbits.kv._forms import Channels, Form
from fewbits.primitives.partial_attention import fold


@dataclass
class ThinK(Stage):
    """Keys without a share of their channels.

    Parameters
    ----------
    ratio : share λ of the channels to drop, 0 to below 1.
    queries : so many last queries of the prompt judge the channels.
    recent : so many newest keys stay whole.
    """

    name: ClassVar[str] = "think"
    encodes: ClassVar[bool] = True

    ratio: float = 0.5
    queries: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise FewbitsError(f"think: ratio={self.ratio} must be at least 0 and below 1")
        if self.queries < 1 or self.recent < 0:
            raise FewbitsError("think: queries must be at least 1, and recent at least 0")

    @property
    def window(self) -> int:
        return self.recent

    def observe(self, step: Step, memory: Memory) -> None:
        earlier = memory.notes.get("queries")
        found = step.queries if earlier is None else torch.cat([earlier, step.queries], dim=2)
        memory.notes["queries"] = found[:, :, -self.queries :].clone()

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        if "channels" not in memory.kept:
            memory.kept["channels"] = channels_to_keep(memory.notes["queries"], keys, self.ratio)
        return Channels.of(keys, memory.kept["channels"])


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """(b, h, d): what the scores of (b, heads, w, d) queries lose without each channel of
    (b, h, s, d) keys, as Frobenius norms. O((w·heads + s·h)·d) per row of the batch."""
    rows = fold(queries.float(), keys.shape[1])
    return rows.norm(dim=2) * keys.float().norm(dim=2)


def channels_to_keep(queries: Tensor, keys: Tensor, ratio: float) -> Tensor:
    """(b, h, k) rising numbers of the channels with the highest scores; k = d − ⌊ratio·d⌋."""
    scores = channel_scores(queries, keys)
    count = scores.shape[2] - int(ratio * scores.shape[2])
    return scores.topk(count, dim=2).indices.sort(dim=2).values.to(torch.uint8)
