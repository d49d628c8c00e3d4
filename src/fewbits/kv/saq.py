"""SAQ: staircase adaptive quantisation, fewer bits for a block of tokens the older it is.

One of the proposals of *The Nature of Mathematical Modeling and Probabilistic Optimization
Engineering in Generative AI* (2024, arXiv 2410.18441), as its pseudo-code has it: KIVI's quantiser
(keys per channel, values per token), with bits B_1 > B_2 > … that a block of S tokens steps down
whenever a newer block is quantised. The newest tokens, fewer than S, are exact (B_1); all blocks
that have reached the last step are one part with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Memory, Stage, joined_valid
from fewbits.kv._forms import Form, Part
from fewbits.kv._quantized import BITS, Grouped


@dataclass
class SAQ(Stage):
    """Bits that fall with age.

    Parameters
    ----------
    stairs : bits of the newest quantised block, of the one before it, and so on, joined by ``-``;
        each of 1, 2, 4, 8, not rising. The last holds for everything older.
    block_size : tokens S that are quantised, and step down, together.
    group : numbers that share a scale and a least value; along tokens it must divide S.
    """

    name: ClassVar[str] = "saq"
    encodes: ClassVar[bool] = True
    by_blocks: ClassVar[bool] = True
    first: ClassVar[bool] = True

    stairs: str = "8-4-2"
    block_size: int = 32
    group: int = 32

    def __post_init__(self) -> None:
        try:
            steps = [int(step) for step in self.stairs.split("-")]
        except ValueError:
            steps = []
        if not steps or not set(steps) <= set(BITS) or steps != sorted(steps, reverse=True):
            raise FewbitsError(
                f"saq: stairs={self.stairs!r} must be bits that do not rise, such as 8-4-2"
            )
        if self.group < 1 or self.block_size < 1 or self.block_size % self.group:
            raise FewbitsError("saq: group must divide block_size")
        self._steps = steps

    @property
    def block(self) -> int:
        return self.block_size

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        return Grouped.of(keys, self._steps[0], self.group, along=2)

    def encode_values(self, values: Tensor, memory: Memory) -> Form:
        return Grouped.of(values, self._steps[0], self.group, along=3)

    def aged(self, parts: list[Part]) -> list[Part]:
        """Let every block take its step down; what has come to the floor becomes one part."""
        floor = len(self._steps) - 1
        cut = max(0, len(parts) - floor)
        older, newest = parts[:cut], parts[cut:]
        stepped = [
            with_bits(part, self._steps[len(newest) - 1 - number])
            for number, part in enumerate(newest)
        ]
        lowest = [with_bits(part, self._steps[floor]) for part in older]
        return [*joined_parts(lowest), *stepped]


def with_bits(part: Part, bits: int) -> Part:
    """The same tokens with fewer bits."""

    def coarser(form: Form) -> Form:
        if not isinstance(form, Grouped) or form.bits == bits:
            return form
        return Grouped.of(form.read(), bits, form.group, form.along)

    return Part(coarser(part.keys), coarser(part.values), part.valid)


def joined_parts(parts: list[Part]) -> list[Part]:
    """Parts of equal bits as one; none where there are none."""
    if len(parts) < 2:
        return parts
    keys = Grouped.cat([part.keys for part in parts])  # type: ignore[misc]
    values = Grouped.cat([part.values for part in parts])  # type: ignore[misc]
    return [Part(keys, values, joined_valid(parts))]
