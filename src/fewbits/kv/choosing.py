"""Choose a cache for a model and a kind of text: the best within a size, or the smallest that keeps
a quality.

All candidates are tried on two pieces of the text, the better half of them on twice as many, and
so on to all pieces: successive halving (Jamieson, Talwalkar 2016, arXiv 1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.core.kinds import LESS_IS_BETTER, figure, gain
from fewbits.core.progress import Steps, progress
from fewbits.kv._grid import BUDGETS, Candidate, Probe, candidates
from fewbits.kv._subject import open_subject, read_text
from fewbits.kv.comparison import (
    PIECES,
    PROMPT,
    SCORED,
    asked_for,
    check_sizes,
    cut_texts,
    fit_all,
    read_calibration,
)
from fewbits.kv.evaluation import Cost, Scores, batch_of

FIRST_PIECES = 2
"""Of the first round."""
LEAST_KEPT = 4
"""So many candidates go on, or half of them if that is more."""
TIE = 0.05
"""Costs that differ by less than this share are equal; the simpler method is taken then."""
FITTED_AIM = 0.98
"""Fitted methods aim at this share of the budget, as what they hold differs between texts."""
QUALITIES = ("KL", "perplexity", "agreement")


@dataclass(frozen=True)
class Choice:
    """The cache that was chosen.

    Attributes
    ----------
    spec : how it is called.
    method : what `kv.cache` takes: the spec string, or the fitted method (which has `save`).
    cost : what it costs on all pieces of the text.
    fitted_bytes : of what was fitted, shared by all texts.
    tried : for each round and candidate ``pieces``, ``spec``, ``share`` and the qualities.
    """

    spec: str
    method: Any
    cost: Cost
    fitted_bytes: int
    tried: list[dict[str, Any]] = field(repr=False)

    def __str__(self) -> str:
        quality = qualities(self.cost)
        told = ", ".join(f"{name} {figure(name, value)}" for name, value in quality.items())
        return (
            f"{self.spec}: {self.cost.bytes_per_token:,.4g} bytes per token, "
            f"{self.cost.share:.1%} of the whole cache; {told}"
        )


def choose(
    model: Any,
    text: str | Path | Tensor,
    at_most: str | float | None = None,
    keep: Mapping[str, str | float] | None = None,
    *,
    calibrate: str | Path | Tensor | None = None,
    tokenizer: Any = None,
    pieces: int = PIECES,
    prompt: int = PROMPT,
    scored: int = SCORED,
    show_progress: bool = False,
) -> Choice:
    """Pick a method and its rates.

    Parameters
    ----------
    model, text, calibrate, tokenizer, pieces, prompt, scored : as `compare` takes them.
    at_most : a share of the whole cache, ``"25%"``, or bytes per token; the method of least KL
        within it is taken.
    keep : instead, or as well: the least ``agreement``, or the most ``KL`` or ``perplexity``, as a
        number or against the whole cache: ``{"perplexity": "+1%"}``; the smallest that keeps all of
        these is taken. The perplexity of a short text can fall by chance where KL rises.

    Raises
    ------
    FewbitsError
        Unusable input, or nothing meets the wish; the message has the nearest.
    """
    check_sizes(pieces, prompt, scored)
    wish = Wish(at_most, dict(keep or {}))
    words, learn_from = read_text(text), read_calibration(calibrate)
    subject = open_subject(model, tokenizer)
    rows, fitted, _ = asked_for(None)
    texts = cut_texts(subject, words, learn_from, True, pieces, prompt + scored)
    probe = Probe(subject.model, texts.pieces[:1, :prompt])
    budget = wish.budget(probe.bytes_per_token)
    aims = [share for share in BUDGETS if keep and share < budget]
    aims += [budget] if budget < 1 else []
    waiting = [one for one in candidates(rows, probe, aims) if probe.share(one.method) <= budget]
    with progress("choosing a cache", 0, show=show_progress) as bar:
        learned, _ = fit_all(fitted, subject, texts, [FITTED_AIM * aim for aim in aims], bar)
        search = Search(subject.model, prompt, [*waiting, *learned], wish, budget)
        return search.run(texts.pieces, bar)


class Wish:
    """What is asked for: a size, limits of quality, or both.

    Raises
    ------
    FewbitsError
        Neither, or what cannot be understood.
    """

    def __init__(self, at_most: str | float | None, keep: dict[str, str | float]) -> None:
        if at_most is None and not keep:
            raise FewbitsError('say at_most, such as "25%", or keep, such as {"perplexity": "+1%"}')
        self.share, self.bytes = parse_size(at_most)
        self.limits = {name: parse_limit(name, value) for name, value in keep.items()}

    def budget(self, bytes_per_token: float) -> float:
        """The greatest share of the whole cache."""
        return self.share if self.bytes is None else self.bytes / bytes_per_token

    def missed(self, cost: Cost, whole: Cost) -> float:
        """By how much a cost misses the limits, in parts of them; 0 if it keeps them."""
        mine, best = qualities(cost), qualities(whole)
        worst = 0.0
        for name, (value, relative) in self.limits.items():
            limit = best[name] * (1 + value) if relative else value
            worst = max(worst, (gain(name, limit) - gain(name, mine[name])) / max(limit, 1e-9))
        return worst


def parse_size(at_most: str | float | None) -> tuple[float, float | None]:
    """A share of the whole cache, and bytes per token where those were given."""
    if at_most is None:
        return math.inf, None
    is_share = isinstance(at_most, str) and at_most.strip().endswith("%")
    try:
        value = float(str(at_most).strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)) or (not is_share and value < 1):
        raise FewbitsError(
            f'at_most must be a share such as "25%", or at least 1 byte per token, not {at_most!r}'
        )
    return (value / 100, None) if is_share else (math.inf, value)


def parse_limit(name: str, limit: str | float) -> tuple[float, bool]:
    """A limit of a quality, and whether it is relative to the whole cache."""
    if name not in QUALITIES:
        raise FewbitsError(f"{name!r} cannot be kept; choose one of {', '.join(QUALITIES)}")
    relative = isinstance(limit, str) and limit.strip().endswith("%")
    try:
        value = float(str(limit).strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    worse = value >= 0 if name in LESS_IS_BETTER else value <= 0
    if not math.isfinite(value) or (relative and not worse) or (not relative and value <= 0):
        raise FewbitsError(
            f'{name}={limit!r} is no limit; write it like {{"perplexity": "+1%"}}, '
            '{"agreement": "-2%"} or {"KL": 0.01}'
        )
    if relative and name == "KL":
        raise FewbitsError('the KL of the whole cache is 0; write its limit like {"KL": 0.01}')
    return (value / 100 if relative else value), relative


def qualities(cost: Cost) -> dict[str, float]:
    return {
        "KL": cost.divergence,
        "perplexity": cost.perplexity,
        "agreement": cost.agreement,
    }


# -- successive halving --------------------------------------------------------------------


class Search:
    """Tries candidates on ever more pieces; `tried` collects what each cost."""

    def __init__(
        self,
        model: Any,
        prompt: int,
        waiting: Sequence[Candidate],
        wish: Wish,
        budget: float,
    ) -> None:
        self.model, self.prompt, self.wish, self.budget = model, prompt, wish, budget
        self.named = {one.spec: one for one in waiting}
        methods = {"full": "full"} | {one.spec: one.method for one in waiting}
        self.scores = Scores(model, prompt, methods, forgiving=True)
        self.tried: list[dict[str, Any]] = []

    def run(self, pieces: Tensor, bar: Steps) -> Choice:
        """Halve the candidates until all pieces are read, and take the best of the last."""
        waiting, begin = list(self.named), 0
        size = batch_of(self.model, pieces.shape[1] - self.prompt, 8)
        for end in round_ends(len(pieces)):
            bar.extend((len(waiting) + 1) * math.ceil((end - begin) / size))
            for rows in pieces[begin:end].split(size):
                self.scores.add(rows, ["full", *(s for s in waiting if s != "full")], bar.step)
            waiting = self.ranked(waiting)
            self.note(waiting, end)
            if end < len(pieces):
                waiting = waiting[: max(LEAST_KEPT, len(waiting) // 2)]
            begin = end
        return self.choice(waiting)

    def ranked(self, waiting: Sequence[str]) -> list[str]:
        """The candidates that fit, the best first."""
        fit = [
            spec
            for spec in waiting
            if spec not in self.scores.failed and self.scores.cost(spec).share <= self.budget
        ]
        return sorted(fit, key=self.place)

    def place(self, spec: str) -> tuple[float, float]:
        cost = self.scores.cost(spec)
        if not self.wish.limits:
            return 0.0, cost.divergence
        return self.missed(spec), cost.bytes_per_token

    def missed(self, spec: str) -> float:
        return self.wish.missed(self.scores.cost(spec), self.scores.cost("full"))

    def note(self, waiting: Sequence[str], pieces: int) -> None:
        for spec in waiting:
            cost = self.scores.cost(spec)
            row = {"pieces": pieces, "spec": spec, "share": cost.share}
            self.tried.append(row | qualities(cost))

    def choice(self, waiting: Sequence[str]) -> Choice:
        """The best; of those that are nearly as good, the simplest."""
        if not waiting:
            raise FewbitsError(
                f"nothing that was tried fits into {self.budget:.3g} of the whole cache; allow more"
            )
        best = waiting[0]
        if self.wish.limits and self.missed(best) > 0:
            raise FewbitsError(f"nothing keeps that; the nearest is {self.made(best)}")
        limit = self.place(best)[1] * (1 + TIE)
        equal = [s for s in waiting if self.place(s) <= (0.0, limit)]
        spec = min(equal, key=lambda s: (self.named[s].simplicity, self.place(s)))
        return self.made(spec)

    def made(self, spec: str) -> Choice:
        one = self.named[spec]
        return Choice(spec, one.method, self.scores.cost(spec), one.fitted_bytes, self.tried)


def round_ends(pieces: int) -> list[int]:
    """Pieces that have been read at the end of each round: 2, 4, 8, … and all."""
    ends = []
    end = FIRST_PIECES
    while end < pieces:
        ends.append(end)
        end *= 2
    return [*ends, pieces]
