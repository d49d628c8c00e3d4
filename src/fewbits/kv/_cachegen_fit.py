"""What CacheGen learns of a model from some texts: steps, predictors, and tables of frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cachegen_codec import (
    ANCHOR,
    ANCHOR_MOST,
    KEYS,
    PREDICTORS,
    VALUES,
    Profile,
    channels_first,
    digest_of,
    quantised,
    rule,
    turn,
)
from fewbits.primitives.entropy_coding import SymbolTables

DEPTH_STEPS = (0.5, 1.0, 1.5)
"""Steps of the first, the middle and the last third of the layers, in standard deviations."""
MOST = 255
"""Tables reach from −255 to 255 steps at most."""
ESCAPED = 1e-4
"""Tables are made so long that at most this share of the numbers is escaped."""
SMALLEST_STEP = 1e-5
"""Of the mean size of a layer's numbers, where they hardly differ."""

Sharing = Literal["layer and channel", "layer", "channel", "none"]
"""What has tables of its own (keys and values always do)."""
States = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Goes through (l, c, t) float32 keys and values of some texts, from the beginning each time."""


# -- the states of a model -----------------------------------------------------------------


def texts_of(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """(1, t) int64 each.

    Raises
    ------
    FewbitsError
        No tokens.
    """
    given = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    rows = [row[None] for one in given for row in one.reshape(-1, one.shape[-1])]
    if not rows or any(row.shape[1] < 1 for row in rows):
        raise FewbitsError("cachegen needs texts to learn from: (n, t) token numbers, or several")
    return rows


@torch.no_grad()
def states_of(model: Any, texts: Iterable[Tensor]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(l, c, t) float32 keys and values of each text, as the model's cache holds them.

    Raises
    ------
    FewbitsError
        A layer does not hold every token, or layers differ in shape.
    """
    from transformers import DynamicCache

    for text in texts:
        cache = DynamicCache(config=model.config)
        model(text.to(model.device), past_key_values=cache, logits_to_keep=1)
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        shapes = {one.shape for one in (*keys, *values)}
        if len(shapes) != 1 or keys[0].shape[2] != text.shape[1]:
            raise FewbitsError(
                "cachegen needs layers of one shape that hold every token; this model has others "
                "(a sliding window, or a state)"
            )
        both = (torch.stack(one)[:, 0].float().cpu().numpy() for one in (keys, values))
        stacked_keys, stacked_values = both
        yield channels_first(stacked_keys), channels_first(stacked_values)


def rotation_of(model: Any) -> np.ndarray:
    """(r,) float32 radians per token of a model's rotary position embeddings, or none."""
    for module in model.modules():
        found = getattr(module, "inv_freq", None)
        if isinstance(found, Tensor) and found.ndim == 1:
            return found.detach().float().cpu().numpy().copy()
    return np.empty(0, np.float32)


# -- steps ---------------------------------------------------------------------------------


@dataclass
class Moments:
    """Sums over tokens of the numbers of each layer and channel, and of their squares."""

    count: int = 0
    sums: Any = 0.0
    squares: Any = 0.0

    def add(self, x: np.ndarray) -> None:
        """Of (l, c, t) numbers."""
        wide = x.astype(np.float64)
        if not np.isfinite(wide).all():
            raise FewbitsError(
                "the model's cache has NaN or infinity; cachegen cannot learn from it"
            )
        self.count += x.shape[2]
        self.sums = self.sums + wide.sum(axis=2)
        self.squares = self.squares + np.einsum("lct,lct->lc", wide, wide)

    @property
    def means(self) -> np.ndarray:
        """(l, c)."""
        return self.sums / self.count

    @property
    def spread(self) -> np.ndarray:
        """(l,) standard deviation about the means of the channels, over all channels."""
        variance = (self.squares / self.count - self.means**2).clip(0)
        return np.sqrt(variance.mean(axis=1))

    @property
    def size(self) -> np.ndarray:
        """(l,) root of the mean square."""
        return np.sqrt((self.squares / self.count).mean(axis=1))


def depth_steps(layers: int) -> np.ndarray:
    """(l,) steps of each layer in standard deviations, by thirds of the depth."""
    return np.array([DEPTH_STEPS[min(2, 3 * layer // layers)] for layer in range(layers)])


def steps(spread: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(l,) float32 steps at level ×1, above 0 even where all numbers of a layer are alike."""
    least = np.where(size == 0, 1, size) * SMALLEST_STEP
    return np.maximum(depth_steps(len(spread)) * spread, least).astype(np.float32)


# -- tables --------------------------------------------------------------------------------


def context_numbers(layers: int, channels: int, own: Sharing) -> np.ndarray:
    """(2, l, c) int32: which table each channel of keys and of values has."""
    layer, channel = np.arange(layers)[:, None], np.arange(channels)
    rows, count = {
        "layer and channel": (layer * channels + channel, layers * channels),
        "layer": (layer + 0 * channel, layers),
        "channel": (0 * layer + channel, channels),
        "none": (0 * layer + 0 * channel, 1),
    }[own]
    return np.stack([rows, rows + count]).astype(np.int32)


class Histogram:
    """How often each number of steps comes in each channel, up to `most`; others are escaped."""

    def __init__(self, layers: int, channels: int, most: int) -> None:
        self.most, self.width = most, 2 * most + 2
        self.counts = np.zeros((2, layers, channels, self.width), np.int32)

    def add(self, kind: int, layer: int, symbols: np.ndarray) -> None:
        """Of (c, n) whole numbers."""
        places = np.where(np.abs(symbols) > self.most, self.width - 1, symbols + self.most)
        cells = np.arange(len(symbols))[:, None] * self.width + places
        found = np.bincount(cells.ravel(), minlength=len(symbols) * self.width)
        self.counts[kind, layer] += found.reshape(len(symbols), self.width).astype(np.int32)

    def shortened(self) -> Histogram:
        """The same with the shortest tables that escape few enough numbers."""
        total = self.counts.sum(axis=(0, 1, 2), dtype=np.int64)
        sizes = np.abs(np.arange(-self.most, self.most + 1))
        per_size = np.bincount(sizes, weights=total[:-1])
        beyond = total[-1] + per_size[::-1].cumsum()[::-1] - per_size
        few = np.flatnonzero(beyond <= ESCAPED * total.sum())
        most = max(1, int(few[0])) if len(few) else self.most
        short = Histogram(*self.counts.shape[1:3], most)
        middle = self.counts[..., self.most - most : self.most + most + 1]
        short.counts[..., :-1] = middle
        short.counts[..., -1] = self.counts.sum(axis=3) - middle.sum(axis=3)
        return short

    def tables(self, contexts: np.ndarray) -> SymbolTables:
        """With one added to each count."""
        summed = np.zeros((int(contexts.max()) + 1, self.width), np.int64)
        np.add.at(summed, contexts.ravel(), self.counts.reshape(-1, self.width))
        return SymbolTables.from_counts(summed, -self.most)

    def bits(self, contexts: np.ndarray) -> np.ndarray:
        """(2, l) what all that was counted costs under its tables."""
        frequencies = self.tables(contexts).frequencies[contexts]
        each = 16 - np.log2(frequencies)
        each[..., -1] += 32
        return (self.counts * each).sum(axis=(2, 3))


# -- the whole profile ---------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What `CacheGen` was told."""

    levels: tuple[float, ...]
    chunk: int
    group: int
    predictor: str
    rotation: str
    own_tables: Sharing


def learn(states: States, heads: int, frequencies: np.ndarray, settings: Settings) -> Profile:
    """The profile of a model: goes through its states three times.

    Parameters
    ----------
    frequencies : (r,) of the rotation of keys; empty where there is none to undo.
    """
    held, turned, values = Moments(), Moments(), Moments()
    turning = len(frequencies) > 0
    for keys, those in states():
        held.add(keys)
        values.add(those)
        if turning:
            turned.add(turn(keys, frequencies, 0, heads, back=True))
    spread = np.minimum(held.spread, turned.spread) if turning else held.spread
    layers, channels = held.means.shape
    contexts = context_numbers(layers, channels, settings.own_tables)
    both = np.stack([steps(spread, held.size), steps(values.spread, values.size)])
    draft = Draft(heads, frequencies, both, contexts, settings)
    predictors = PREDICTORS if settings.predictor == "best" else (settings.predictor,)
    options = [
        draft.profile(
            np.full((2, layers), PREDICTORS.index(predictor)),
            np.full(layers, is_turned),
            np.stack([(turned if is_turned else held).means, values.means]),
        )
        for predictor in predictors
        for is_turned in turnings(settings.rotation, turning)
    ]
    return with_tables(states, cheapest(states, options, draft), settings.chunk)


def turnings(rotation: str, turning: bool) -> list[bool]:
    """Which of both to try: keys as attention sees them (False), or before their rotation."""
    if not turning or rotation == "after":
        return [False]
    return [True] if rotation == "before" else [False, True]


@dataclass(frozen=True)
class Draft:
    """What does not depend on the choice of predictors."""

    heads: int
    frequencies: np.ndarray
    steps: np.ndarray
    contexts: np.ndarray
    settings: Settings

    def profile(self, predictors: np.ndarray, turned: np.ndarray, means: np.ndarray) -> Profile:
        return Profile(
            heads=self.heads,
            width=self.contexts.shape[2] // self.heads,
            levels=self.settings.levels,
            group=self.settings.group,
            predictors=predictors.astype(np.uint8),
            turned=turned.astype(bool),
            frequencies=self.frequencies,
            steps=self.steps,
            means=means.astype(np.float32),
            contexts=self.contexts,
            tables=(),
            anchor_tables=None,
            digest="0",
        )


def cheapest(states: States, options: Sequence[Profile], draft: Draft) -> Profile:
    """For each layer's keys and values the option whose numbers take the fewest bits at ×1.

    All have the same steps, so the same loss.
    """
    if len(options) == 1:
        return options[0]
    counted = count(states, [(option, None) for option in options], draft.settings.chunk, MOST // 4)
    best = np.argmin([one.bits(draft.contexts) for one in counted], axis=0)
    layers, kinds = np.arange(best.shape[1]), np.array([KEYS, VALUES])[:, None]
    predictors = np.array([one.predictors for one in options])[best, kinds, layers]
    turned = np.array([one.turned for one in options])[best[KEYS], layers]
    means = np.array([one.means for one in options])[best, kinds, layers]
    return draft.profile(predictors, turned, means)


@dataclass
class Counted:
    """Histograms of the differences and of the anchors, and how many scales there are."""

    differences: Histogram
    anchors: Histogram
    scales: np.ndarray

    @classmethod
    def of(cls, profile: Profile, most: int) -> Counted:
        layers, channels = profile.layers, profile.channels
        has_anchors = (profile.predictors == ANCHOR).any()
        anchors = Histogram(layers, channels, ANCHOR_MOST if has_anchors else 0)
        return cls(Histogram(layers, channels, most), anchors, np.zeros((2, layers), np.int64))

    def add(
        self, profile: Profile, piece: Sequence[np.ndarray], first: int, level: int | None
    ) -> None:
        """The whole numbers of one chunk of (l, c, t) keys and values."""
        for kind in (KEYS, VALUES):
            for layer in range(profile.layers):
                x = piece[kind][layer]
                if kind == KEYS and profile.turned[layer]:
                    x = turn(x, profile.frequencies, first, profile.heads, back=True)
                symbols = quantised(x, *rule(profile, kind, layer, level))
                self.differences.add(kind, layer, symbols.differences)
                if symbols.anchors is not None and symbols.scales is not None:
                    self.anchors.add(kind, layer, symbols.anchors)
                    self.scales[kind, layer] += len(symbols.scales)

    def bits(self, contexts: np.ndarray) -> np.ndarray:
        """(2, l)."""
        found = self.differences.bits(contexts) + 32 * self.scales
        return found + self.anchors.bits(contexts) if self.scales.any() else found


def count(
    states: States, jobs: Sequence[tuple[Profile, int | None]], chunk: int, most: int
) -> list[Counted]:
    """Go through the states once, for several profiles and levels (None: ×1)."""
    made = [Counted.of(profile, most) for profile, _ in jobs]
    for keys, values in states():
        for first in range(0, keys.shape[2], chunk):
            piece = [both[:, :, first : first + chunk] for both in (keys, values)]
            for one, (profile, level) in zip(made, jobs, strict=True):
                one.add(profile, piece, first, level)
    return made


def with_tables(states: States, chosen: Profile, chunk: int) -> Profile:
    """A profile with the tables of all its levels."""
    jobs = [(chosen, level) for level in range(len(chosen.levels))]
    counted = count(states, jobs, chunk, MOST)
    tables = tuple(one.differences.shortened().tables(chosen.contexts) for one in counted)
    has_anchors = bool((chosen.predictors == ANCHOR).any())
    anchors = counted[0].anchors.tables(chosen.contexts) if has_anchors else None
    made = replace(chosen, tables=tables, anchor_tables=anchors)
    return replace(made, digest=digest_of(made))
