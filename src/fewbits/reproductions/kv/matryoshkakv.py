"""MatryoshkaKV's claim: one training with drawn ranks gives a basis that serves every budget, and
loses less than principal directions where the budget is small.

The paper's models have 32 layers and heads 128 wide; there PCA collapses below half of the cache.
A small model does not show the collapse, only the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv._basis_fitting import Plan, RankCost, tune
from fewbits.kv.matryoshkakv import PCA, Fitted, MatryoshkaKV
from fewbits.reproductions.kv._measure import Cost, better, costs, fitting_texts, table, test_texts

BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)
LOW = (0.375, 0.25)
"""Budgets at which training must be ahead; above, random ranks cost what they gain."""
ERRORS = 2.0
CLAIM = (
    "at 37.5 % and 25 % of the bytes, bases trained once with drawn ranks diverge less from the "
    f"whole cache than principal directions, by {ERRORS:g} standard errors over the texts or more; "
    "more bytes never cost more; at 25 % they are ahead of bases trained at half of the ranks "
    "alone, and ranks that a greedy search finds are no worse than equal ones, at any budget below "
    "the whole"
)
LEARNING_RATE = 1e-3
DIVERGENCE_WEIGHT = 1.0
"""The claim is about the divergence, so the cross-entropy to the texts is left out."""
PRINCIPAL, LATER = "PCA", "PCA without the first tokens"
"""Attention is often parked on the first token, whose key is then unlike all others."""
TRAINED, SEARCHED, ALONE = "MatryoshkaKV", "searched ranks", "trained at 50 % alone"


@dataclass(frozen=True)
class Size:
    """Texts to train on, to search ranks on and to score, and how long to train."""

    fitted: int
    length: int
    steps: int
    batch: int
    prompts: int
    prompt_length: int
    batch_decrements: int
    rows: int
    prompt: int
    scored: int


SIZES = {
    "quick": Size(8, 64, 6, 2, 1, 24, 24, 4, 48, 16),
    "small": Size(160, 256, 1000, 1, 4, 128, 6, 24, 192, 64),
}


def run(size: str = "small") -> Reproduction:
    """Run the claim on the reference model and a text that it has not seen.

    Parameters
    ----------
    size : ``small``: two trainings of 1,000 steps, minutes. ``quick``: 6 steps each, seconds.
    """
    plan = SIZES[size]
    model, tokenizer = load_language_model()
    fitting = fitting_texts(tokenizer, plan.fitted, plan.length)
    prompts = fitting_texts(tokenizer, plan.prompts, plan.prompt_length)
    tokens = test_texts(tokenizer, plan.rows, plan.prompt + plan.scored)
    made = methods(model, fitting, prompts, plan)
    everywhere = {
        named(name, keep): method.with_keep(keep)
        for name, method in made.items()
        for keep in BUDGETS
    }
    found = costs(model, tokens, plan.prompt, everywhere, batch=plan.rows)
    on_prompts = prompt_costs(model, prompts, made)
    met = conditions(found, on_prompts)
    failed = [name for name, is_met in met.items() if not is_met]
    data = (
        f"reference model; {plan.steps} steps of {plan.batch} × {plan.length} tokens, one seed; "
        f"ranks searched on {plan.prompts} prompts of {plan.prompt_length}; {plan.rows} other "
        f"texts, {plan.prompt} tokens read and {plan.scored} scored"
    )
    return Reproduction(
        "matryoshkakv",
        CLAIM,
        figures_of(found, (TRAINED, SEARCHED))
        | {f"{n}, prompts": v for n, v in on_prompts.items()},
        figures_of(found, (PRINCIPAL, LATER, ALONE)),
        not failed,
        f"not met: {'; '.join(failed)}" if failed else "",
        data,
        0.0,
        table(found),
    )


# -- the methods ---------------------------------------------------------------------------


def methods(model: Any, fitting: Tensor, prompts: Tensor, plan: Size) -> dict[str, PCA]:
    """Everything that is compared; all serve every budget."""
    principal = PCA().fit(model, fitting)
    trained = MatryoshkaKV().fit(
        model,
        fitting,
        batch=plan.batch,
        steps=plan.steps,
        learning_rate=LEARNING_RATE,
        divergence_weight=DIVERGENCE_WEIGHT,
    )
    searched = trained.with_keep(min(BUDGETS)).search(
        model, prompts, batch_decrements=plan.batch_decrements
    )
    alone = trained_alone(model, principal, fitting, plan)
    later = PCA().fit(model, fitting, first_token=False)
    made = {PRINCIPAL: principal, TRAINED: trained, SEARCHED: searched, ALONE: alone}
    return made | {LATER: later}


def trained_alone(model: Any, principal: PCA, fitting: Tensor, plan: Size) -> PCA:
    """The same training with half of the ranks at every step."""
    state = principal.learned

    def half(shape: Sequence[int], width: int) -> Tensor:
        return torch.full(tuple(shape), width // 2)

    training = Plan(plan.steps, plan.batch, LEARNING_RATE, DIVERGENCE_WEIGHT, seed=0, draw=half)
    bases, _ = tune(model, state.bases, fitting, None, training, state.model)
    return principal.with_state(Fitted(state.model, bases))


def named(method: str, keep: float) -> str:
    return f"{method}, {keep:.1%}"


# -- the figures ---------------------------------------------------------------------------


def prompt_costs(model: Any, prompts: Tensor, made: Mapping[str, PCA]) -> dict[str, float]:
    """KL × 1000 on the prompts of the search, of equal ranks and of those that it found."""
    cost = RankCost(model, made[TRAINED].learned.bases, prompts, None, batch=8)
    return {
        named(name, keep): 1000 * cost(made[name].with_keep(keep).ranks.ravel())
        for name in (TRAINED, SEARCHED)
        for keep in BUDGETS[1:]
    }


def figures_of(found: Mapping[str, Cost], names: Sequence[str]) -> dict[str, float]:
    """KL × 1000 and perplexity of some methods at all budgets."""
    figures = {}
    for name in names:
        for keep in BUDGETS:
            cost = found[named(name, keep)]
            figures[f"KL × 1000, {named(name, keep)}"] = 1000 * cost.mean
            figures[f"perplexity, {named(name, keep)}"] = cost.perplexity
    return figures


def conditions(found: Mapping[str, Cost], on_prompts: Mapping[str, float]) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""

    def at(name: str, keep: float) -> Cost:
        return found[named(name, keep)]

    smallest = min(BUDGETS)
    rising = [at(TRAINED, keep).mean for keep in BUDGETS]
    return {
        **{
            f"ahead of PCA at {keep:.1%}": better(at(TRAINED, keep), at(PRINCIPAL, keep), ERRORS)
            and at(TRAINED, keep).share <= at(PRINCIPAL, keep).share
            for keep in LOW
        },
        "more bytes never cost more": rising == sorted(rising),
        "ahead of training at one rank": at(TRAINED, smallest).mean < at(ALONE, smallest).mean,
        "searched ranks no worse on other texts": all(
            at(SEARCHED, keep).mean <= at(TRAINED, keep).mean
            and at(SEARCHED, keep).share <= at(TRAINED, keep).share
            for keep in BUDGETS[1:]
        ),
        "searched ranks no worse on their prompts": all(
            on_prompts[named(SEARCHED, keep)] <= on_prompts[named(TRAINED, keep)]
            for keep in BUDGETS[1:]
        ),
    }
