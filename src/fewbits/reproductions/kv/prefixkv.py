"""PrefixKV's claim: layers need different numbers of tokens to hold the same share of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv._cache import Memory
from fewbits.kv._forms import Part
from fewbits.kv.baselines import H2O, SlidingWindow, SnapKV
from fewbits.kv.prefixkv import PrefixKV
from fewbits.reproductions.kv._measure import Cost, better, costs, fitting_texts, table, test_texts
from fewbits.reproductions.kv._video import (
    VideoModel,
    Videos,
    caption_costs,
    described_right,
    trained_model,
    videos,
)

CLAIM = (
    "on descriptions of videos, with 10 and 20 % of the tokens kept, PrefixKV diverges less from "
    "the whole cache than the same scores with as many tokens in every layer, than counts that "
    "fall with depth, the newest tokens, H2O and random ones, by two standard errors or more; "
    "shares found on other videos are within a tenth of those of the tested ones"
)


@dataclass(frozen=True)
class Size:
    frames: int
    steps: int
    tested: int
    fitted: int
    budgets: tuple[float, ...]
    text_rows: int
    prompt: int


SIZES = {
    "quick": Size(4, 10, 16, 4, (0.2,), 2, 128),
    "small": Size(8, 600, 256, 16, (0.1, 0.2, 0.3, 0.5), 24, 448),
}
CLAIMED = (0.1, 0.2)
RIVALS = ("same everywhere", "falling with depth", "newest", "H2O", "random")


@dataclass
class RandomTokens(PrefixKV):
    """As many tokens in every layer, drawn by lot."""

    name: ClassVar[str] = "random-tokens"

    def choose(self, part: Part, memory: Memory) -> Tensor:
        sums = memory.notes["sums"]
        generator = torch.Generator().manual_seed(memory.layer)
        memory.notes["sums"] = torch.rand(sums.shape, generator=generator).to(sums.device)
        return super().choose(part, memory)


def run(size: str = "small") -> Reproduction:
    """Run the claim on videos, and show what becomes of it on plain text."""
    plan = SIZES[size]
    model = trained_model(plan.frames, plan.steps)
    shown = videos(plan.tested, plan.frames, seed=1, test=True)
    learned = videos(plan.fitted, plan.frames, seed=2, test=False)
    found = video_costs(model, shown, learned, plan)
    drift = share_drift(model, shown, learned, plan)
    text = text_costs(plan)
    claimed = [budget for budget in plan.budgets if budget in CLAIMED]
    met = {
        f"below {rival} at {budget:.0%}": better(
            found[f"PrefixKV, {budget}"], found[f"{rival}, {budget}"], 2
        )
        for budget in claimed
        for rival in RIVALS
    }
    met["shares do not depend on the videos"] = drift < 0.1
    failed = [name for name, is_met in met.items() if not is_met]
    right = described_right(model, shown)
    figures = {f"right words: {what}": share for what, share in right.items()}
    figures |= {"largest difference of a layer's share": drift}
    shown_as = {name: 1000 * cost.mean for name, cost in (found | text).items()}
    figures |= {f"KL × 1000, {name}": kl for name, kl in shown_as.items() if "PrefixKV" in name}
    rivals = {f"KL × 1000, {name}": kl for name, kl in shown_as.items() if "PrefixKV" not in name}
    return Reproduction(
        "prefixkv",
        CLAIM,
        figures,
        rivals,
        not failed,
        f"not met: {'; '.join(failed)}" if failed else "",
        f"{plan.tested} videos of moving digits (scikit-learn), {plan.frames} frames of 16 "
        f"tokens, described by a model trained here; {plan.text_rows} texts, reference model",
        0.0,
        [*table(found), *table(text)],
    )


def methods(keep: float, fitted: PrefixKV, layers: int, newest: int = 1) -> dict[str, Any]:
    """What is compared at a budget, by name."""
    slope = np.linspace(1.6, 0.4, layers) * keep
    falling = tuple(float(share) for share in np.minimum(slope, 1))
    return {
        f"PrefixKV, {keep}": fitted,
        f"same everywhere, {keep}": PrefixKV(keep),
        f"falling with depth, {keep}": PrefixKV(keep, shares=falling),
        f"newest, {keep}": SlidingWindow(keep, sinks=newest),
        f"H2O, {keep}": H2O(keep),
        f"random, {keep}": RandomTokens(keep),
        f"SnapKV, {keep}": SnapKV(keep, queries=7),
    }


def video_costs(model: VideoModel, shown: Videos, learned: Videos, plan: Size) -> dict[str, Cost]:
    layers = model.language_model.config.num_hidden_layers
    made: dict[str, Any] = {}
    for keep in plan.budgets:
        made |= methods(keep, fitted_shares(model, learned, keep), layers)
    return caption_costs(model, shown, made)


def fitted_shares(model: VideoModel, some: Videos, keep: float) -> PrefixKV:
    with torch.no_grad():
        prompt = {"inputs_embeds": model.prompt(some.patches)}
    return PrefixKV(keep).fit(model.language_model, [prompt])


def share_drift(model: VideoModel, shown: Videos, learned: Videos, plan: Size) -> float:
    """Largest difference between the share of a layer found on some videos and on others."""
    keep = plan.budgets[0]
    first, second = (np.array(fitted_shares(model, one, keep).shares) for one in (shown, learned))
    return float(np.abs(first - second).max())


def text_costs(plan: Size) -> dict[str, Cost]:
    """The same on plain text, where the newest tokens are hard to beat."""
    model, tokenizer = load_language_model()
    tokens = test_texts(tokenizer, plan.text_rows, plan.prompt + 32)
    prompts = list(fitting_texts(tokenizer, plan.fitted, plan.prompt).split(1))
    made: dict[str, Any] = {}
    for keep in plan.budgets:
        fitted = PrefixKV(keep).fit(model, prompts)
        layers = model.config.num_hidden_layers
        made |= methods(keep, fitted, layers, newest=4)
        per_query = PrefixKV(keep, per_query=True).fit(model, prompts)
        made[f"PrefixKV per query, {keep}"] = per_query
    return {f"text, {name}": cost for name, cost in costs(model, tokens, plan.prompt, made).items()}
