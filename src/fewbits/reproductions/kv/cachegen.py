"""CacheGen's claim: a file of a KV cache takes several times fewer bytes than 8-bit numbers do at
similar quality, not least because each channel of each layer has a table of its own; and over a
changing link, deadlines are met more often where the level is chosen chunk by chunk."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv._cachegen_codec import channels_first, heads_first, is_anchor, turn
from fewbits.kv._cachegen_files import sha256
from fewbits.kv._cachegen_fit import rotation_of
from fewbits.kv._controller import TEXT, Controller, Fixed, Offer, Trace, simulate
from fewbits.kv.cachegen import CacheGen, ChunkInfo, Piece, decode_chunk, encode_chunk, filled
from fewbits.reproductions.kv._measure import fitting_texts, test_texts

SMALLER, SIMILAR, TABLES = 3.5, 0.02, 0.05
CLAIM = (
    f"files that lose at most {SIMILAR:g} nats per token (2 % in perplexity) take at least "
    f"{SMALLER:g} times fewer bytes than 8-bit numbers; tables of each layer and channel take at "
    f"least {TABLES:.0%} fewer bits than one for all; and levels chosen chunk by chunk miss fewer "
    "deadlines than any fixed level that loses as little"
)
CURVES: dict[str, dict[str, Any]] = {
    "chosen": {},
    "anchors, as published": {"predictor": "anchor", "rotation": "after"},
    "no differences": {"predictor": "none", "rotation": "after"},
}
"""Ways to predict, of which each has a curve of bytes and loss."""
WAYS: dict[str, dict[str, Any]] = {
    "means, keys before rotation": {"predictor": "mean", "rotation": "before"},
    "anchors, keys before rotation": {"predictor": "anchor", "rotation": "before"},
}
"""Ways to predict whose numbers are coded with tables of every kind."""
OWN_TABLES = ("none", "channel", "layer", "layer and channel")
DEADLINES = (0.5, 1.0, 2.0)
"""Of the seconds that the finest level takes at the mean bandwidth."""
PREFILL = 0.8
"""The model reads the text in the seconds that the finest level takes, over this."""


@dataclass(frozen=True)
class Size:
    """Texts to learn from and to test on, and what is compared."""

    fitted: int
    tests: int
    prompt: int
    scored: int
    chunk: int
    levels: tuple[float, ...]
    curves: tuple[str, ...]
    traces: int


SIZES = {
    "quick": Size(4, 2, 96, 16, 48, (0.125, 1.0, 4.0), ("chosen",), 60),
    "small": Size(20, 20, 384, 64, 128, (0.0625, 0.125, 0.25, 0.5, 1, 2, 4), tuple(CURVES), 400),
}


@dataclass(frozen=True)
class Test:
    """A text, its exact cache (l, h, t, d), and (q, v) log-probabilities of its continuation."""

    rows: Tensor
    keys: Tensor
    values: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Point:
    """Bits per number and what they cost: KL in nats per token, and perplexity."""

    method: str
    bits: float
    divergence: float
    perplexity: float

    def row(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "bits per number": round(self.bits, 4),
            "KL × 1000": round(1000 * self.divergence, 4),
            "perplexity": round(self.perplexity, 4),
        }


def run(size: str = "small") -> Reproduction:
    """Run the claim on the reference model and a text that it has not seen."""
    plan = SIZES[size]
    model, tokenizer = load_language_model()
    fitting = fitting_texts(tokenizer, plan.fitted, plan.prompt)
    rows = test_texts(tokenizer, plan.tests, plan.prompt + plan.scored)
    tests = [test_of(model, row[None], plan.prompt) for row in rows]
    profiles = {
        name: CacheGen(plan.levels, plan.chunk, **CURVES[name]).fit(model, fitting)
        for name in plan.curves
    }
    curves = {
        name: [curve_point(model, tests, profile, name, n) for n in range(len(plan.levels))]
        for name, profile in profiles.items()
    }
    plain = plain_points(model, tests)
    tables = table_bits(model, tests, fitting, plan)
    figures = size_figures(curves["chosen"], plain, tables)
    figures |= file_figures(profiles["chosen"], tests)
    figures |= variance_figures(model, tests, plan.chunk)
    figures |= link_figures(profiles["chosen"], tests[0], curves["chosen"], plan.traces)
    met = conditions(figures)
    failed = [name for name, is_met in met.items() if not is_met]
    equal = figures["times fewer bytes than 8 bits at equal KL"]
    reason = f"not met: {'; '.join(failed)}; " if failed else ""
    reason += f"at the same KL as 8 bits, files take {equal:.2f} times fewer bytes"
    data = (
        f"reference model; learned from {plan.fitted} texts of {plan.prompt} tokens; {plan.tests} "
        f"others, {plan.prompt} tokens saved in chunks of {plan.chunk} and {plan.scored} scored"
    )
    points = [*plain.values(), *(point for curve in curves.values() for point in curve)]
    rivals = baselines(plain, curves, tables)
    details = [point.row() for point in sorted(points, key=lambda point: point.bits)]
    return Reproduction("cachegen", CLAIM, figures, rivals, not failed, reason, data, 0.0, details)


# -- what is measured ----------------------------------------------------------------------


@torch.no_grad()
def test_of(model: Any, rows: Tensor, prompt: int) -> Test:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1)
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    whole = model(rows[:, prompt:-1], past_key_values=cache).logits[0]
    return Test(rows, keys, values, whole.float().log_softmax(dim=1))


@torch.no_grad()
def cost(model: Any, test: Test, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """KL(whole ‖ this cache) and the negative log-likelihood, sums over the continuation."""
    prompt = keys.shape[2]
    cache = filled(model, keys[:, None], values[:, None])
    logits = model(test.rows[:, prompt:-1], past_key_values=cache).logits[0]
    found = logits.float().log_softmax(dim=1)
    divergence = (test.whole.exp() * (test.whole - found)).sum()
    loss = -found.gather(1, test.rows[0, prompt + 1 :, None]).sum()
    return float(divergence), float(loss)


def point_of(
    model: Any, tests: Sequence[Test], name: str, coded: Sequence[tuple[float, Tensor, Tensor]]
) -> Point:
    """The mean over tests of (bytes, keys, values) each."""
    numbers = sum(2 * test.keys.numel() for test in tests)
    costs = [
        cost(model, test, keys, values)
        for test, (_, keys, values) in zip(tests, coded, strict=True)
    ]
    scored = sum(len(test.whole) for test in tests)
    return Point(
        name,
        8 * sum(size for size, _, _ in coded) / numbers,
        sum(divergence for divergence, _ in costs) / scored,
        float(np.exp(sum(loss for _, loss in costs) / scored)),
    )


def pieces(profile: CacheGen, test: Test, level: str) -> list[tuple[ChunkInfo, bytes]]:
    """The packets of a text at one level."""
    made = []
    for first in range(0, test.keys.shape[2], profile.chunk):
        keys, values = (
            one[:, :, first : first + profile.chunk] for one in (test.keys, test.values)
        )
        data = encode_chunk(profile, keys, values, first, level)
        piece = Piece(0, len(data), sha256(data))
        made.append((ChunkInfo(first, keys.shape[2], {level: piece}), data))
    return made


def curve_point(
    model: Any, tests: Sequence[Test], profile: CacheGen, name: str, number: int
) -> Point:
    """One level of a profile: real packets, coded and decoded."""
    coded = []
    for test in tests:
        packets = pieces(profile, test, str(number))
        parts = [decode_chunk(profile, data, info) for info, data in packets]
        keys, values = (torch.cat(one, dim=2) for one in zip(*parts, strict=True))
        coded.append((sum(len(data) for _, data in packets), keys, values))
    return point_of(model, tests, f"{name}, ×{profile.levels[number]:g}", coded)


# -- opponents -----------------------------------------------------------------------------


def plain_points(model: Any, tests: Sequence[Test]) -> dict[str, Point]:
    """Half precision, and 8 and 4 bits with a scale for each token of a layer, also compressed."""
    half = [
        (2 * 2 * test.keys.numel(), test.keys.half().float(), test.values.half().float())
        for test in tests
    ]
    made = {"float16": point_of(model, tests, "float16", half)}
    for bits in (8, 4):
        rounded = [[absmax(one, bits) for one in (test.keys, test.values)] for test in tests]
        packers = {"": len, ", zlib": zlib_size, ", zstd": zstd_size}
        for name, size in packers.items():
            coded = [
                (sum(size(data) + scales for data, scales, _ in both), both[0][2], both[1][2])
                for both in rounded
            ]
            made[f"{bits} bits{name}"] = point_of(model, tests, f"{bits} bits{name}", coded)
    return made


def absmax(states: Tensor, bits: int) -> tuple[bytes, int, Tensor]:
    """Packed codes of (l, h, t, d), the bytes of their float16 scales, and what they decode to."""
    x = channels_first(states.numpy())
    most = 2 ** (bits - 1) - 1
    scales = (np.abs(x).max(axis=1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    codes = np.rint(x / np.where(scales == 0, 1, scales)).clip(-most, most).astype(np.int8)
    flat = codes.ravel()
    packed = flat if bits == 8 else (flat[::2] & 15) | (flat[1::2] << 4)
    decoded = heads_first(codes * scales, states.shape[1])
    return packed.tobytes(), 2 * scales.size, torch.from_numpy(decoded.copy())


def zlib_size(data: bytes) -> int:
    return len(zlib.compress(data, 9))


def zstd_size(data: bytes) -> int:
    import pyarrow

    return len(pyarrow.Codec("zstd", compression_level=19).compress(data))


def table_bits(model: Any, tests: Sequence[Test], fitting: Tensor, plan: Size) -> dict[str, float]:
    """Bits per number at ×1 of the same numbers, by what has a table of its own."""
    numbers = sum(2 * test.keys.numel() for test in tests)
    found = {}
    for name, way in WAYS.items():
        for own in OWN_TABLES:
            options = way | {"own_tables": own}
            profile = CacheGen((1.0,), plan.chunk, **options).fit(model, fitting)
            size = sum(len(data) for test in tests for _, data in pieces(profile, test, "0"))
            found[f"{name}, own tables: {own}"] = 8 * size / numbers
    return found


# -- the figures ---------------------------------------------------------------------------


def size_figures(
    curve: Sequence[Point], plain: Mapping[str, Point], tables: Mapping[str, float]
) -> dict[str, float]:
    """How many times fewer bytes than 8 and 4 bits; and what the tables save."""
    way = next(iter(WAYS))
    eight, four = plain["8 bits"], plain["4 bits"]
    close = [point for point in curve if point.divergence <= SIMILAR]
    best = min(close or curve, key=lambda point: point.bits)
    one, each = (tables[f"{way}, own tables: {own}"] for own in ("none", "layer and channel"))
    return {
        "times fewer bytes than 8 bits": eight.bits / best.bits if close else 0.0,
        "bits per number": best.bits,
        "KL × 1000": 1000 * best.divergence,
        "perplexity over that of 8 bits": best.perplexity / eight.perplexity,
        "times fewer bytes than 8 bits at equal KL": eight.bits / bits_at(curve, eight.divergence),
        "times fewer bytes than 4 bits at equal KL": four.bits / bits_at(curve, four.divergence),
        "share of bits saved by tables of each layer and channel": 1 - each / one,
    }


def bits_at(curve: Sequence[Point], divergence: float) -> float:
    """Bits per number with that KL: between the levels; beyond the finest one, half a bit for each
    factor of two, as fine steps have it; beyond the coarsest one, its own."""
    logs = np.log2([max(point.divergence, 1e-12) for point in curve])
    wanted = np.log2(max(divergence, 1e-12))
    order = np.argsort(logs)
    bits = np.array([point.bits for point in curve])[order]
    return float(np.interp(wanted, logs[order], bits) + max(0.0, logs.min() - wanted) / 2)


def file_figures(profile: CacheGen, tests: Sequence[Test]) -> dict[str, float]:
    """What the profile adds, if these texts are all that shares it; and what it chose."""
    numbers = sum(2 * test.keys.numel() for test in tests)
    learned = profile.profile
    shares = {
        f"share of layers that use {name}": float((learned.predictors == number).mean())
        for number, name in enumerate(("no prediction", "means", "anchors"))
    }
    return {
        "kilobytes of the profile": profile.artefact_bytes / 1000,
        "bits per number of the profile, shared by these texts": 8
        * profile.artefact_bytes
        / numbers,
        "share of layers with keys before rotation": float(learned.turned.mean()),
        **shares,
    }


def variance_figures(model: Any, tests: Sequence[Test], chunk: int) -> dict[str, float]:
    """How many times the variance of raw numbers is that of differences from anchors: mean over
    layers, with the channels' own means in it (as published) or without."""
    frequencies, heads = rotation_of(model), tests[0].keys.shape[1]
    keys = [channels_first(test.keys.numpy()) for test in tests]
    what = {
        "keys": keys,
        "keys before rotation": [turn(one, frequencies, 0, heads, back=True) for one in keys],
        "values": [channels_first(test.values.numpy()) for test in tests],
    }
    figures = {}
    for name, states in what.items():
        x = np.concatenate(states, axis=2)
        differences = np.concatenate([from_anchors(one, chunk) for one in states], axis=2)
        spread = (differences**2).mean(axis=(1, 2))
        figures[f"variance over that of differences, {name}"] = np.mean(x.var(axis=(1, 2)) / spread)
        centred = x.var(axis=2).mean(axis=1)
        figures[f"variance over that of differences, {name} without channel means"] = np.mean(
            centred / spread
        )
    return {name: float(value) for name, value in figures.items()}


def from_anchors(x: np.ndarray, chunk: int, group: int = 10) -> np.ndarray:
    """(l, c, n) differences of (l, c, t) from the first token of their group."""
    tokens = np.arange(x.shape[2])
    within = tokens % chunk
    anchors = tokens - within % group
    others = ~is_anchor(chunk, group)[within]
    return (x - x[:, :, anchors])[:, :, others]


def link_figures(
    profile: CacheGen, test: Test, curve: Sequence[Point], count: int
) -> dict[str, float]:
    """Deadlines missed and KL, over links that change their bandwidth (uniform from 1 to 100 % of
    the fastest): levels chosen chunk by chunk, the best fixed one, and text."""
    levels = [str(number) for number in range(len(profile.levels))]
    sizes = {level: [len(data) for _, data in pieces(profile, test, level)] for level in levels}
    tokens = [info.tokens for info, _ in pieces(profile, test, levels[0])]
    offers = [
        Offer(count, {TEXT: 4 * count} | {level: sizes[level][n] for level in levels})
        for n, count in enumerate(tokens)
    ]
    finest = 2.0 * sum(sizes[levels[0]])  # seconds at a mean bandwidth of half a byte a second
    speed = PREFILL * sum(tokens) / finest
    losses = {level: point.divergence for level, point in zip(levels, curve, strict=True)}
    losses[TEXT] = 0.0
    rng = np.random.default_rng(0)
    missed: dict[str, list[bool]] = {}
    lost: dict[str, list[float]] = {}
    for number in range(count):
        starts = tuple((np.arange(40) * finest / 10).tolist())
        trace = Trace(starts, tuple(rng.uniform(0.01, 1.0, 40).tolist()))
        deadline = DEADLINES[number % len(DEADLINES)] * finest
        policies: dict[str, Any] = {form: Fixed(form) for form in (*levels, TEXT)}
        policies["chosen"] = Controller(tuple(levels), deadline, levels[len(levels) // 2], speed)
        for name, policy in policies.items():
            passage = simulate(policy, offers, trace, speed)
            missed.setdefault(name, []).append(passage.violates(deadline))
            lost.setdefault(name, []).append(float(np.mean([losses[f] for f in passage.forms])))
    chance = {name: float(np.mean(those)) for name, those in missed.items()}
    loss = {name: float(np.mean(those)) for name, those in lost.items()}
    as_good = [level for level in levels if loss[level] <= loss["chosen"]] or levels[:1]
    names = {
        "levels chosen by chunk": "chosen",
        "the best fixed level that loses as little": min(as_good, key=lambda level: chance[level]),
        "the coarsest level": levels[-1],
        "text": TEXT,
    }
    return {f"deadlines missed, {name}": chance[key] for name, key in names.items()} | {
        f"KL × 1000 over links, {name}": 1000 * loss[key] for name, key in names.items()
    }


def conditions(figures: Mapping[str, float]) -> dict[str, bool]:
    """What must hold, by name."""
    saved = figures["share of bits saved by tables of each layer and channel"]
    missed = figures["deadlines missed, levels chosen by chunk"]
    return {
        f"{SMALLER:g} times fewer bytes": figures["times fewer bytes than 8 bits"] >= SMALLER,
        f"tables save {TABLES:.0%}": saved >= TABLES,
        "fewer deadlines missed": missed
        < figures["deadlines missed, the best fixed level that loses as little"],
    }


def baselines(
    plain: Mapping[str, Point], curves: Mapping[str, Sequence[Point]], tables: Mapping[str, float]
) -> dict[str, float]:
    """Bits and loss of everything else."""
    found: dict[str, float] = {}
    for name, point in plain.items():
        found[f"bits per number, {name}"] = point.bits
        found[f"KL × 1000, {name}"] = 1000 * point.divergence
    for name, curve in curves.items():
        if name != "chosen":
            eight, four = (plain[f"{bits} bits"].divergence for bits in (8, 4))
            found[f"bits per number at the KL of 8 bits, {name}"] = bits_at(curve, eight)
            found[f"bits per number at the KL of 4 bits, {name}"] = bits_at(curve, four)
    for name, bits in tables.items():
        found[f"bits per number at ×1, {name}"] = bits
    return found
