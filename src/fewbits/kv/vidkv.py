"""VidKV: below two bits for caches of thousands of redundant visual tokens, without training.

Tao, You, Sui, Qin, Wang 2025, *Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language
Models* (arXiv 2503.16257).

Everything is quantised per channel, in groups of consecutive tokens. Keys: the channels of widest
range get 2 bits; the others 1 bit in the frequency domain, after a Fourier transform over those
channels, which evens them out. Values: −1, 0 or +1 times a scale (1.58 bits); a share of visual
tokens that match the question best may get 2 bits.

The published code differs where it is wrong: it decodes a bit as 0 or α instead of ±α, forgets the
scale of ternary values, and stores the complex transform, twice the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Memory, Stage
from fewbits.kv._forms import Exact, Form
from fewbits.kv._quantized import Grouped, groups_of
from fewbits.primitives.packed_tensors import pack, pack_trits, unpack, unpack_trits
from fewbits.primitives.real_fourier import inverse_real_fourier, real_fourier

IMPORTANCE = "importance"
"""What `CompressedCache.tell` calls the scores of visual tokens."""


# -- forms ---------------------------------------------------------------------------------


@dataclass
class Signs(Form):
    """One bit for each number, and one scale α for each group of tokens of a channel: ±α.

    `from_zero` reads the bits as 0 and α, as the published code does.
    """

    bits: Tensor
    scale: Tensor
    group: int
    width: int
    from_zero: bool = False

    @classmethod
    def of(cls, numbers: Tensor, group: int, *, from_zero: bool = False) -> Signs:
        """α is the mean size of a group, which is the best one in squares."""
        scale = groups_of(numbers.float().abs(), group, 2).mean(dim=3).to(numbers.dtype)
        return cls(pack(numbers >= 0, 1), scale, group, numbers.shape[3], from_zero)

    @property
    def tokens(self) -> int:
        return self.bits.shape[2]

    def read(self) -> Tensor:
        signs = unpack(self.bits, self.width, 1).to(self.scale.dtype)
        signs = signs if self.from_zero else signs * 2 - 1
        return signs * self.scale.repeat_interleave(self.group, dim=2)[:, :, : self.tokens]


@dataclass
class Ternary(Form):
    """−1, 0 or +1 for each number, five to a byte, and one scale for each group of tokens.

    `scaled` False reads them without their scale, as the published code does.
    """

    trits: Tensor
    scale: Tensor
    group: int
    width: int
    scaled: bool = True

    @classmethod
    def of(cls, numbers: Tensor, group: int, scale: Literal["mean", "nonzero"]) -> Ternary:
        """Numbers above half the mean size of their group count; the scale is that mean size, or
        the mean size of those that count (as ternary weight networks have it)."""
        grouped = groups_of(numbers.float(), group, 2)
        mean = grouped.abs().mean(dim=3, keepdim=True)
        counts = grouped.abs() > mean / 2
        if scale == "nonzero":
            total = (grouped.abs() * counts).sum(dim=3, keepdim=True)
            mean = total / counts.sum(dim=3, keepdim=True).clamp(min=1)
        trits = (grouped.sign() * counts).flatten(2, 3)[:, :, : numbers.shape[2]]
        small = mean.squeeze(3).to(numbers.dtype)
        return cls(pack_trits(trits.to(torch.int8)), small, group, numbers.shape[3])

    @property
    def tokens(self) -> int:
        return self.trits.shape[2]

    def read(self) -> Tensor:
        trits = unpack_trits(self.trits, self.width).to(self.scale.dtype)
        if not self.scaled:
            return trits
        return trits * self.scale.repeat_interleave(self.group, dim=2)[:, :, : self.tokens]


@dataclass
class Spectrum(Form):
    """Channels in the frequency domain."""

    held: Form

    @property
    def tokens(self) -> int:
        return self.held.tokens

    def read(self) -> Tensor:
        y = self.held.read()
        return inverse_real_fourier(y).to(y.dtype)


@dataclass
class ComplexSpectrum(Form):
    """Channels as real and imaginary parts of their Fourier transform: twice the numbers."""

    held: Form

    @classmethod
    def of(cls, numbers: Tensor, group: int) -> ComplexSpectrum:
        spectrum = torch.fft.fft(numbers.float(), dim=3, norm="ortho")
        parts = torch.cat([spectrum.real, spectrum.imag], dim=3).to(numbers.dtype)
        return cls(Signs.of(parts, group, from_zero=True))

    @property
    def tokens(self) -> int:
        return self.held.tokens

    def read(self) -> Tensor:
        y = self.held.read()
        real, imaginary = y.float().chunk(2, dim=3)
        return torch.fft.ifft(torch.complex(real, imaginary), dim=3, norm="ortho").real.to(y.dtype)


@dataclass
class SplitChannels(Form):
    """Some channels in one form, the others in another.

    `order` is (b, 1, d) uint8: the `wide` channels of `first`, then those of `second`.
    """

    order: Tensor
    first: Form
    second: Form
    wide: int

    @property
    def tokens(self) -> int:
        return self.first.tokens

    def read(self) -> Tensor:
        both = torch.cat([self.first.read(), self.second.read()], dim=3)
        return both.scatter(3, self._where(both), both)

    def scores(self, queries: Tensor) -> Tensor:
        sorted_queries = queries.gather(3, self._where(queries))
        first, second = sorted_queries.split([self.wide, queries.shape[3] - self.wide], dim=3)
        return self.first.scores(first) + self.second.scores(second)

    def _where(self, like: Tensor) -> Tensor:
        return self.order.long()[:, :, None].expand(*like.shape)


@dataclass
class SplitTokens(Form):
    """Some tokens in one form, the others in another.

    `place` is (b, 1, s) int32: where each token is among those of `first`, then of `second`.
    """

    place: Tensor
    first: Form
    second: Form

    @property
    def tokens(self) -> int:
        return self.first.tokens + self.second.tokens

    def read(self) -> Tensor:
        both = torch.cat([self.first.read(), self.second.read()], dim=2)
        return both.gather(2, self.place.long()[..., None].expand_as(both))


# -- the method ----------------------------------------------------------------------------


@dataclass
class VidKV(Stage):
    """Keys of 1 to 2 bits, values of 1.58 or 2, and what their scales take.

    Parameters
    ----------
    key_bits : 1 to 2; so many above one is the share of channels with 2 bits.
    value_bits : ``ternary`` or ``2``.
    protect : share of the visual tokens that get 2 bits where values are ternary, by the scores
        that `CompressedCache.tell(importance=…)` was given.
    group : consecutive tokens that share a scale.
    residual : behind the prompt, so many tokens collect before they are quantised together.
    criterion : what makes a channel wide: ``range``, ``variance``, or ``random`` to compare.
    transform : whether channels of one bit go through the Fourier transform.
    ternary_scale : ``mean`` as published, or ``nonzero``, which loses far less.
    official_quirks : do as the published code does where it is wrong (see above), to compare.
    """

    name: ClassVar[str] = "vidkv"
    encodes: ClassVar[bool] = True

    key_bits: float = 1.5
    value_bits: Literal["ternary", "2"] = "ternary"
    protect: float = 0.0
    group: int = 32
    residual: int = 128
    criterion: Literal["range", "variance", "random"] = "range"
    transform: bool = True
    ternary_scale: Literal["mean", "nonzero"] = "nonzero"
    official_quirks: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.key_bits <= 2:
            raise FewbitsError(f"vidkv: key_bits={self.key_bits} must be from 1 to 2")
        if not 0 <= self.protect <= 1:
            raise FewbitsError(f"vidkv: protect={self.protect} must be from 0 to 1")
        if self.group < 1 or self.residual < self.group or self.residual % self.group:
            raise FewbitsError("vidkv: residual must be a multiple of group")

    @property
    def unit(self) -> int:
        return self.group

    @property
    def block(self) -> int:
        return self.residual

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        width = keys.shape[3]
        wide = int((self.key_bits - 1) * width)
        order = self.spread(keys).argsort(dim=2, descending=True, stable=True)
        sorted_keys = keys.gather(3, order[:, :, None].expand_as(keys))
        first: Form = Exact(keys[..., :0].clone())
        second: Form = Exact(keys[..., :0].clone())
        if wide:
            first = Grouped.of(sorted_keys[..., :wide], 2, self.group, along=2)
        if wide < width:
            second = self.single_bits(sorted_keys[..., wide:])
        return SplitChannels(order.to(torch.uint8), first, second, wide)

    def spread(self, keys: Tensor) -> Tensor:
        """(b, 1, d): how wide each channel is, over all heads and tokens of the layer."""
        flat = keys.float()
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(0)
            drawn = torch.rand(keys.shape[3], generator=generator).to(keys.device)
            return drawn.expand(keys.shape[0], 1, -1)
        if self.criterion == "variance":
            return flat.var(dim=(1, 2), correction=0)[:, None]
        return (flat.amax(dim=(1, 2)) - flat.amin(dim=(1, 2)))[:, None]

    def single_bits(self, numbers: Tensor) -> Form:
        if not self.transform:
            return Signs.of(numbers, self.group, from_zero=self.official_quirks)
        if self.official_quirks:
            return ComplexSpectrum.of(numbers, self.group)
        spectrum = real_fourier(numbers).to(numbers.dtype)
        return Spectrum(Signs.of(spectrum, self.group))

    def encode_values(self, values: Tensor, memory: Memory) -> Form:
        if self.value_bits == "2":
            return Grouped.of(values, 2, self.group, along=2)

        def ternary(numbers: Tensor) -> Form:
            held = Ternary.of(numbers, self.group, self.ternary_scale)
            return replace(held, scaled=not self.official_quirks)

        scores = memory.told.get(IMPORTANCE)
        tokens = values.shape[2]
        if self.protect == 0 or scores is None or scores.shape[1] < tokens:
            return ternary(values)
        return protected(values, scores[:, :tokens], self.protect, self.group, ternary)


def protected(
    values: Tensor,
    scores: Tensor,
    share: float,
    group: int,
    others: Callable[[Tensor], Form],
) -> Form:
    """Two bits for the tokens of highest score; (b, s) scores are −inf for what is not visual."""
    visual = int(torch.isfinite(scores).sum(dim=1).amin())
    count = int(share * visual) // group * group
    if count == 0:
        return others(values)
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, :count].sort(dim=1).values
    rest = order[:, count:].sort(dim=1).values
    sorted_rows = torch.cat([chosen, rest], dim=1)
    where = sorted_rows[:, None, :, None].expand_as(values)
    sorted_values = values.gather(2, where)
    place = sorted_rows.argsort(dim=1).to(torch.int32)[:, None]
    best = Grouped.of(sorted_values[:, :, :count], 2, group, along=2)
    if count == values.shape[2]:
        return best
    return SplitTokens(place, best, others(sorted_values[:, :, count:]))


def match_question(visual: Tensor, question: Tensor) -> Tensor:
    """(b, v): mean inner product of (b, v, d) visual embeddings with (b, t, d) of the question."""
    found: Any = torch.einsum("bvd,btd->bvt", visual, question).mean(dim=2)
    return found
