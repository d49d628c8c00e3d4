"""CSKV's claim: features of a layer's input take the place of keys and values at a fraction of the
bytes, the better fitted the better, and multiply with bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv import cache
from fewbits.kv._cache import Inputs, Memory, Stage, Step
from fewbits.kv._projections import KeyValueLayer
from fewbits.kv.baselines import KIVI
from fewbits.kv.cskv import CSKV
from fewbits.kv.evaluation import Cost, evaluate
from fewbits.kv.matryoshkakv import PCA
from fewbits.reproductions.kv._measure import fitting_texts, test_texts

REMOVED, LOST, BITS = 0.80, 0.05, 4
CLAIM = (
    f"{REMOVED:.0%} of the bytes removed with at most {LOST:.0%} higher perplexity; trained "
    "factors cost less than ASVD, their start, and that less than plain SVD; a window of exact "
    "tokens lowers perplexity further; at equal bytes, features cost less than principal "
    f"components of each head's rotated keys and values, and {BITS}-bit features less than KIVI "
    "of 2 bits"
)
WINDOW = 32
TIGHT = 0.19
"""The density that removes so much: of 32 channels per head, 6 stay."""
FITS: dict[str, dict[str, Any]] = {
    "SVD": {"start": "asvd", "alpha": 0.0},
    "ASVD": {"start": "asvd"},
    "trained": {"start": "asvd"},
    "closed form": {"start": "regression"},
}
SPECTRUM = (0.125, 0.25, 0.5, 0.75)
"""Shares of the directions whose energy is shown."""


@dataclass(frozen=True)
class Size:
    """Texts to fit to and to score, and the passes over the former."""

    fitted: int
    fitted_length: int
    epochs: int
    rows: int
    prompt: int
    scored: int
    densities: tuple[float, ...]
    packed: tuple[float, ...]
    """Densities of the features that are quantised, too."""
    batch: int
    """Texts per step of training."""


SIZES = {
    "quick": Size(16, 192, 1, 4, 96, 8, (0.25,), (0.5,), batch=8),
    "small": Size(24, 192, 9, 24, 192, 64, (0.75, 0.5, 0.25), (0.75, 0.5, 0.25, TIGHT), batch=1),
}


def run(size: str = "small") -> Reproduction:
    """Run the claim on the reference model and a text that it has not seen."""
    plan = SIZES[size]
    model, tokenizer = load_language_model()
    fitting = fitting_texts(tokenizer, plan.fitted, plan.fitted_length)
    tokens = test_texts(tokenizer, plan.rows, plan.prompt + plan.scored)
    made = {"whole": "full"} | methods(model, fitting, plan)
    found = {cost.method: cost for cost in evaluate(model, tokens, plan.prompt, made)}
    figures, spectrum = figures_of(found, plan), spectra(model, fitting[:2])
    met = conditions(found, plan)
    failed = [name for name, is_met in met.items() if not is_met]
    reason = f"not met: {'; '.join(failed)}" if failed else ""
    data = (
        f"reference model; fitted to {plan.fitted} texts of {plan.fitted_length} tokens; "
        f"{plan.rows} others, {plan.prompt} tokens read and {plan.scored} scored one by one"
    )
    details = table(found) + spectrum
    return Reproduction(
        "cskv", CLAIM, figures, rivals(found), not failed, reason, data, 0.0, details
    )


# -- the methods ---------------------------------------------------------------------------


def methods(model: Any, fitting: Tensor, plan: Size) -> dict[str, Any]:
    """Everything that is compared, by the name that the table shows."""
    made: dict[str, Any] = {}
    training: dict[str, Any] = {"epochs": plan.epochs, "batch_size": plan.batch}
    for density in plan.densities:
        for name, options in FITS.items():
            more = options | (training if name == "trained" else {"batch_size": 8})
            fitted = CSKV(density, density, WINDOW).fit(model, fitting, **more)
            made[named(name, density)] = fitted
            made[named(name, density, window=False)] = replaced(fitted, 0)
        made[f"PCA, {density}"] = PCA(density, exact_prefill=True).fit(model, fitting)
    made["tight"] = CSKV(TIGHT, TIGHT, WINDOW).fit(model, fitting, batch_size=8)
    for density in plan.packed:
        packed = CSKV(density, density, WINDOW, bits=BITS)
        made[f"{BITS} bits, {density}"] = packed.fit(model, fitting, **training)
    # Its window is that of the features: exact until a block is full.
    return made | {f"KIVI, {bits} bits": KIVI(bits=bits, recent=0) for bits in (2, 4)}


def named(fit: str, density: float, *, window: bool = True) -> str:
    return f"{fit}, {density}" + ("" if window else ", no window")


def replaced(method: CSKV, recent: int) -> CSKV:
    """The same factors with another window."""
    other = replace(method, recent=recent)
    other.factors, other.fingerprints = method.factors, method.fingerprints
    return other


# -- the figures ---------------------------------------------------------------------------


def figures_of(found: dict[str, Cost], plan: Size) -> dict[str, float]:
    figures = {
        "share of bytes removed": 1 - found["tight"].share,
        "perplexity, over that of the whole cache": above(found, "tight"),
    }
    for density in plan.packed:
        name = f"{BITS} bits, {density}"
        figures[f"share of bytes, {name}"] = found[name].share
        figures[f"KL × 1000, {name}"] = 1000 * found[name].divergence
    for density in plan.densities:
        for fit in FITS:
            for window in (True, False):
                name = named(fit, density, window=window)
                figures[f"KL × 1000, {name}"] = 1000 * found[name].divergence
    return figures


def above(found: dict[str, Cost], name: str) -> float:
    return found[name].perplexity / found["whole"].perplexity


def rivals(found: dict[str, Cost]) -> dict[str, float]:
    return {
        f"{what}, {name}": value
        for name, cost in found.items()
        if name.startswith(("PCA", "KIVI"))
        for what, value in (
            ("share of bytes", cost.share),
            ("KL × 1000", 1000 * cost.divergence),
        )
    }


def conditions(found: dict[str, Cost], plan: Size) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""

    def divergence(fit: str, window: bool = True) -> list[float]:
        return [found[named(fit, d, window=window)].divergence for d in plan.densities]

    def perplexity(fit: str, window: bool) -> float:
        return found[named(fit, min(plan.densities), window=window)].perplexity

    packed, kivi = found[f"{BITS} bits, 0.5"], found["KIVI, 2 bits"]
    pca = [found[f"PCA, {density}"] for density in plan.densities]
    own = [found[named("trained", d, window=False)] for d in plan.densities]
    return {
        f"{REMOVED:.0%} of the bytes removed": 1 - found["tight"].share >= REMOVED,
        f"at most {LOST:.0%} of perplexity lost": above(found, "tight") <= 1 + LOST,
        "trained below ASVD": below(divergence("trained"), divergence("ASVD")),
        "ASVD below SVD": below(divergence("ASVD"), divergence("SVD")),
        "the window helps": perplexity("trained", True) < perplexity("trained", False),
        "so does training without it": perplexity("trained", False) < perplexity("ASVD", False),
        "below PCA at equal bytes": all(
            a.divergence < b.divergence and a.share <= b.share
            for a, b in zip(own, pca, strict=True)
        ),
        f"{BITS} bits below KIVI's 2": packed.divergence < kivi.divergence
        and packed.share <= kivi.share,
    }


def below(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(a < b for a, b in zip(first, second, strict=True))


def table(found: dict[str, Cost]) -> list[dict[str, Any]]:
    """A row for each method, by rising size."""
    rows = [
        {
            "method": name,
            "share of bytes": round(cost.share, 4),
            "KL × 1000": round(1000 * cost.divergence, 3),
            "perplexity": round(cost.perplexity, 4),
            "tokens per second": round(cost.tokens_per_second, 1),
        }
        for name, cost in found.items()
    ]
    return sorted(rows, key=lambda row: row["share of bytes"])


# -- why before the rotary embedding -------------------------------------------------------


class Spectrum(Stage):
    """Singular values of what the middle layer caches, all heads together."""

    name: ClassVar[str] = "spectrum"
    sees_inputs: ClassVar[bool] = True

    def __init__(self) -> None:
        self.sizes: dict[str, Tensor] = {}

    def companions(self, inputs: Inputs, memory: Memory) -> dict[str, Tensor]:
        if memory.layer == memory.layers // 2:
            keys = inputs.states @ KeyValueLayer.of(inputs).key_weight.T
            self.sizes["keys before the rotary embedding"] = torch.linalg.svdvals(
                keys.flatten(0, 1)
            )
        return {}

    def observe(self, step: Step, memory: Memory) -> None:
        if memory.layer == memory.layers // 2:
            for name, states in (("keys behind it", step.keys), ("values", step.values)):
                rows = states.transpose(1, 2).flatten(2).flatten(0, 1)
                self.sizes[name] = torch.linalg.svdvals(rows)


@torch.no_grad()
def spectra(model: Any, tokens: Tensor) -> list[dict[str, Any]]:
    """How much of the energy of keys and values lies in the first directions."""
    stage = Spectrum()
    model(tokens, past_key_values=cache(model, stage))
    rows = []
    for name, sizes in stage.sizes.items():
        energy = sizes.square().cumsum(0) / sizes.square().sum()
        shares = {
            f"energy in {share:.1%} of the directions": round(
                float(energy[max(1, round(share * len(sizes))) - 1]), 4
            )
            for share in SPECTRUM
        }
        rows.append({"states of the middle layer": name, **shares})
    return rows
