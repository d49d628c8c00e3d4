"""How CacheGen turns keys and values into whole numbers, and those into one packet of bytes.

Everything here is NumPy: (layers, channels, tokens) float32, channels being those of all key heads
of a layer. The first axis of what belongs to both is 0 for keys and 1 for values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbits.core.errors import FewbitsError
from fewbits.primitives.entropy_coding import SymbolTables, decode, encode

PREDICTORS = ("none", "mean", "anchor")
"""What a token's numbers are coded as differences from."""
ANCHOR = PREDICTORS.index("anchor")
ANCHOR_MOST = 127
"""Anchors are whole numbers from −127 to 127 times a scale of their own."""
MOST_TOKENS = 2**17
"""In a chunk, so that no header can ask for any amount of memory."""
SECTION = 2**22
"""Numbers that are coded together, so that their working memory stays small."""
KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class Profile:
    """What was learned of a model; see `CacheGen.fit`.

    Attributes
    ----------
    heads, width : key heads of a layer, and numbers in a key of one.
    levels : what steps are multiplied by, finest first.
    group : tokens of which the first one is the anchor of the others.
    predictors : (2, l) uint8, places in `PREDICTORS`.
    turned : (l,) bool: whether keys are coded as they were before rotation.
    frequencies : (r,) float32 of the rotation, in radians per token; empty where there is none.
    steps : (2, l) float32 at level ×1.
    means : (2, l, c) float32.
    contexts : (2, l, c) int32: which row of the tables each channel has.
    tables : of the differences, for each level.
    anchor_tables : of the anchors; None where no layer has any.
    digest : 16 hexadecimal digits of all this.
    """

    heads: int
    width: int
    levels: tuple[float, ...]
    group: int
    predictors: np.ndarray
    turned: np.ndarray
    frequencies: np.ndarray
    steps: np.ndarray
    means: np.ndarray
    contexts: np.ndarray
    tables: tuple[SymbolTables, ...]
    anchor_tables: SymbolTables | None
    digest: str

    @property
    def layers(self) -> int:
        return self.predictors.shape[1]

    @property
    def channels(self) -> int:
        return self.heads * self.width


def digest_of(profile: Profile) -> str:
    """16 hexadecimal digits of everything that decoding depends on."""
    about = [profile.heads, profile.width, profile.group, list(profile.levels)]
    found = hashlib.sha256(json.dumps(about).encode())
    tables = (*profile.tables, *([profile.anchor_tables] if profile.anchor_tables else []))
    arrays = [profile.predictors, profile.turned, profile.frequencies, profile.steps]
    arrays += [profile.means, profile.contexts]
    arrays += [np.array([table.low]) for table in tables]
    for array in (*arrays, *(table.frequencies for table in tables)):
        found.update(str((array.shape, array.dtype.str)).encode() + array.tobytes())
    return found.hexdigest()[:16]


# -- layout and rotation -------------------------------------------------------------------


def channels_first(states: np.ndarray) -> np.ndarray:
    """(l, h, t, d) → (l, h·d, t)."""
    layers, heads, tokens, width = states.shape
    return states.transpose(0, 1, 3, 2).reshape(layers, heads * width, tokens)


def heads_first(states: np.ndarray, heads: int) -> np.ndarray:
    """(l, h·d, t) → (l, h, t, d)."""
    layers, channels, tokens = states.shape
    return states.reshape(layers, heads, channels // heads, tokens).transpose(0, 1, 3, 2)


def turn(
    keys: np.ndarray, frequencies: np.ndarray, first: int, heads: int, *, back: bool
) -> np.ndarray:
    """Rotate (…, h·d, t) keys of tokens `first`, … by their positions, or back.

    Channel i of a head is paired with channel i + r, for the first r of them, as rotary position
    embeddings of today's models have it. Where a model pairs them otherwise, this is still undone
    exactly, so only the size of the file depends on it.
    """
    tokens, pairs = keys.shape[-1], len(frequencies)
    positions = np.arange(first, first + tokens, dtype=np.float32)
    angles = frequencies.astype(np.float32)[:, None] * positions
    cosine, sine = np.cos(angles), np.sin(angles) * np.float32(-1 if back else 1)
    split = keys.reshape(*keys.shape[:-2], heads, -1, tokens)
    turned = split.copy()
    a, b = split[..., :pairs, :], split[..., pairs : 2 * pairs, :]
    turned[..., :pairs, :] = a * cosine - b * sine
    turned[..., pairs : 2 * pairs, :] = b * cosine + a * sine
    return turned.reshape(keys.shape)


# -- whole numbers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Symbols:
    """The whole numbers of keys or values of one layer.

    Attributes
    ----------
    differences : (c, n) int32 steps; of all tokens, or of those that are no anchors.
    anchors : (c, g) int32, or None.
    scales : (g,) float32, or None.
    """

    differences: np.ndarray
    anchors: np.ndarray | None = None
    scales: np.ndarray | None = None


def is_anchor(tokens: int, group: int) -> np.ndarray:
    """(t,) bool: the first token of each group."""
    return np.arange(tokens) % group == 0


def quantised(x: np.ndarray, predictor: str, mean: np.ndarray, step: float, group: int) -> Symbols:
    """The whole numbers of (c, t) float32 keys or values.

    Raises
    ------
    FewbitsError
        They are too many steps away from what predicts them.
    """
    if predictor != "anchor":
        reference = mean[:, None] if predictor == "mean" else np.float32(0)
        return Symbols(steps_of(x - reference, step))
    first = is_anchor(x.shape[1], group)
    anchors, scales = anchors_of(x[:, first])
    reference = anchors_over(anchors, scales, group, x.shape[1])
    return Symbols(steps_of((x - reference)[:, ~first], step), anchors, scales)


def steps_of(differences: np.ndarray, step: float) -> np.ndarray:
    found = np.rint(differences / np.float32(step))
    if not (np.abs(found) < 2**31).all():
        raise FewbitsError(
            "the cache has NaN, infinity, or numbers far beyond what the profile was fitted on; "
            "fit it on texts like this one"
        )
    return found.astype(np.int32)


def anchors_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c, g) int32 and (g,) float32: tokens in 8 bits by their largest number."""
    scales = (np.abs(x).max(axis=0) / ANCHOR_MOST).astype(np.float32)
    if not np.isfinite(scales).all():
        raise FewbitsError("the cache has NaN or infinity; it cannot be saved")
    anchors = np.rint(x / np.where(scales == 0, 1, scales))
    return anchors.clip(-ANCHOR_MOST, ANCHOR_MOST).astype(np.int32), scales


def restored(
    symbols: Symbols, predictor: str, mean: np.ndarray, step: float, group: int, tokens: int
) -> np.ndarray:
    """(c, t) float32: what `quantised` made whole numbers of, within half a step."""
    differences = symbols.differences.astype(np.float32) * np.float32(step)
    if predictor == "mean":
        return differences + mean[:, None]
    if predictor == "none" or symbols.anchors is None:
        return differences
    assert symbols.scales is not None
    first = is_anchor(tokens, group)
    x = anchors_over(symbols.anchors, symbols.scales, group, tokens)
    x[:, ~first] += differences
    return x


def anchors_over(anchors: np.ndarray, scales: np.ndarray, group: int, tokens: int) -> np.ndarray:
    """(c, t) float32: what stands for each anchor, at all tokens of its group."""
    return np.repeat(anchors.astype(np.float32) * scales, group, axis=1)[:, :tokens]


# -- streams -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Keys or values of one layer in a packet: how many differences and anchors a channel has."""

    kind: int
    layer: int
    differences: int
    anchors: int


def places(profile: Profile, tokens: int) -> list[Place]:
    """What a packet of so many tokens has, in its order."""
    groups = -(-tokens // profile.group)
    return [
        Place(kind, layer, tokens - groups, groups)
        if profile.predictors[kind, layer] == ANCHOR
        else Place(kind, layer, tokens, 0)
        for kind in (KEYS, VALUES)
        for layer in range(profile.layers)
    ]


def sections(profile: Profile, tokens: int) -> Iterator[tuple[list[Place], bool]]:
    """Places whose differences (True: anchors) are coded together, in the order of the packet."""
    for anchors in (False, True):
        some: list[Place] = []
        size = 0
        for place in places(profile, tokens):
            count = (place.anchors if anchors else place.differences) * profile.channels
            if some and size + count > SECTION:
                yield some, anchors
                some, size = [], 0
            if count:
                some.append(place)
                size += count
        if some:
            yield some, anchors


def contexts_of(profile: Profile, some: Sequence[Place], anchors: bool) -> np.ndarray:
    """(n,) rows of the tables, for the numbers of some places."""
    return np.concatenate(
        [
            np.repeat(
                profile.contexts[place.kind, place.layer],
                place.anchors if anchors else place.differences,
            )
            for place in some
        ]
    )


def tables_of(profile: Profile, level: int, anchors: bool) -> SymbolTables:
    if not anchors:
        return profile.tables[level]
    if profile.anchor_tables is None:
        raise FewbitsError("the profile has layers with anchors but no table of them")
    return profile.anchor_tables


# -- the packet ----------------------------------------------------------------------------

MAGIC, VERSION = b"FBKC", 1
HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("level", "u1"),
        ("dtype", "u1"),
        ("group", "u1"),
        ("layers", "<u2"),
        ("heads", "<u2"),
        ("width", "<u2"),
        ("sections", "<u2"),
        ("first", "<u4"),
        ("tokens", "<u4"),
        ("profile", "<u8"),
    ]
)
"""Then the bytes of each section as uint32, the scales of anchors as float32, the sections, and
the CRC-32 of all that as uint32."""


def packed(
    profile: Profile, keys: np.ndarray, values: np.ndarray, first: int, level: int, dtype: int
) -> bytes:
    """One packet of (l, c, t) float32 keys and values; `dtype` is their number in the header."""
    tokens = keys.shape[2]
    made: dict[tuple[int, int], Symbols] = {}
    for place in places(profile, tokens):
        kind, layer = place.kind, place.layer
        x = (keys if kind == KEYS else values)[layer]
        if kind == KEYS and profile.turned[layer]:
            x = turn(x, profile.frequencies, first, profile.heads, back=True)
        made[kind, layer] = quantised(x, *rule(profile, kind, layer, level))
    coded = [
        encode(
            np.concatenate([numbers(made[p.kind, p.layer], anchors).ravel() for p in some]),
            contexts_of(profile, some, anchors),
            tables_of(profile, level, anchors),
        )
        for some, anchors in sections(profile, tokens)
    ]
    scales = [one.scales.astype("<f4").tobytes() for one in made.values() if one.scales is not None]
    header = header_of(profile, first, tokens, level, dtype, len(coded))
    sizes = np.array([len(one) for one in coded], "<u4").tobytes()
    body = b"".join([header, sizes, *scales, *coded])
    return body + zlib.crc32(body).to_bytes(4, "little")


def numbers(symbols: Symbols, anchors: bool) -> np.ndarray:
    found = symbols.anchors if anchors else symbols.differences
    assert found is not None
    return found


def rule(
    profile: Profile, kind: int, layer: int, level: int | None
) -> tuple[str, np.ndarray, float, int]:
    """How keys or values of a layer are quantised: predictor, mean, step (None: at ×1), group."""
    step = float(profile.steps[kind, layer]) * (1.0 if level is None else profile.levels[level])
    predictor = PREDICTORS[profile.predictors[kind, layer]]
    return predictor, profile.means[kind, layer], step, profile.group


def header_of(
    profile: Profile, first: int, tokens: int, level: int, dtype: int, count: int
) -> bytes:
    layers, heads, width = profile.layers, profile.heads, profile.width
    about = (level, dtype, profile.group, layers, heads, width, count, first, tokens)
    return np.array([(MAGIC, VERSION, *about, int(profile.digest, 16))], HEADER).tobytes()


def opened(profile: Profile, data: bytes) -> Any:
    """The header of a packet, after everything that can be checked was.

    Raises
    ------
    FewbitsError
        No packet, damaged, of a newer version, or coded with another profile.
    """
    if len(data) < HEADER.itemsize + 4 or data[:4] != MAGIC:
        raise FewbitsError("this is no chunk of a saved cache")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FewbitsError("a chunk of the saved cache is damaged; save or copy it again")
    header = np.frombuffer(data, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise FewbitsError(
            f"the chunk has format version {header['version']}, this fewbits reads {VERSION}; "
            "upgrade fewbits"
        )
    if int(header["profile"]) != int(profile.digest, 16):
        raise FewbitsError("the chunk was coded with another profile; use the tables it came with")
    mine = (profile.layers, profile.heads, profile.width, profile.group)
    if tuple(int(header[f]) for f in ("layers", "heads", "width", "group")) != mine:
        raise FewbitsError("the chunk and its profile do not fit together")
    if header["level"] >= len(profile.levels) or not 1 <= header["tokens"] <= MOST_TOKENS:
        raise FewbitsError("the chunk has a level or a number of tokens that cannot be")
    return header


def unpacked(profile: Profile, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(l, c, t) float32 keys and values of a packet that was `opened`."""
    header = opened(profile, data)
    level, tokens, first = (int(header[name]) for name in ("level", "tokens", "first"))
    parts, scales = pieces(profile, data, int(header["sections"]), tokens)
    differences: dict[tuple[int, int], np.ndarray] = {}
    anchors: dict[tuple[int, int], np.ndarray] = {}
    for (some, is_anchors), part in zip(sections(profile, tokens), parts, strict=True):
        contexts = contexts_of(profile, some, is_anchors)
        try:
            found = decode(part, contexts, tables_of(profile, level, is_anchors))
        except ValueError as error:
            raise FewbitsError(f"a chunk of the saved cache is damaged: {error}") from None
        where, begin = (anchors if is_anchors else differences), 0
        for place in some:
            count = place.anchors if is_anchors else place.differences
            end = begin + count * profile.channels
            where[place.kind, place.layer] = found[begin:end].reshape(profile.channels, count)
            begin = end
    both = np.empty((2, profile.layers, profile.channels, tokens), np.float32)
    none = np.empty((profile.channels, 0), np.int32)
    for at, place in enumerate(places(profile, tokens)):
        key = (place.kind, place.layer)
        symbols = Symbols(differences.get(key, none), anchors.get(key), scales[at])
        both[key] = restored(symbols, *rule(profile, *key, level), tokens)
        if place.kind == KEYS and profile.turned[place.layer]:
            x = both[key]
            both[key] = turn(x, profile.frequencies, first, profile.heads, back=False)
    return both[KEYS], both[VALUES]


def pieces(
    profile: Profile, data: bytes, count: int, tokens: int
) -> tuple[list[bytes], list[np.ndarray | None]]:
    """The sections of a packet, and the scales of the anchors of each place."""
    wanted = len(list(sections(profile, tokens)))
    groups = [place.anchors for place in places(profile, tokens)]
    begin = HEADER.itemsize + 4 * count
    if count != wanted or len(data) < begin + 4 * sum(groups) + 4:
        raise FewbitsError("the chunk is cut short")
    sizes = np.frombuffer(data, "<u4", count, HEADER.itemsize).tolist()
    scales: list[np.ndarray | None] = []
    for one in groups:
        scales.append(np.frombuffer(data, "<f4", one, begin) if one else None)
        begin += 4 * one
    if not all(np.isfinite(one).all() for one in scales if one is not None):
        raise FewbitsError("the chunk is damaged: the scale of an anchor is no number")
    if begin + sum(sizes) + 4 != len(data):
        raise FewbitsError("the chunk is cut short, or has bytes left over")
    ends = np.cumsum([begin, *sizes]).tolist()
    parts = [data[a:b] for a, b in itertools.pairwise(ends)]
    return parts, scales
