"""Whether a compressed cache still finds a fact in a text: one (a needle) or one of several.

Lines such as ``# k17 = v4821`` are put into a text at several depths, and one of them is asked for
behind it. Query-agnostic: the prompt ends with the text, so that the cache is compressed before
the question is known. Query-aware: the prompt has the question, all but its last token, so that
methods that look at the last queries can see what is wanted. In both, all of the answer is read
through the compressed cache. What the whole cache does not find says nothing of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv import cache
from fewbits.kv.evaluation import named

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where facts lie: shares of the text before them."""
KEYS, VALUES = 100, 10_000
"""Facts are of k0 to k99 and v0 to v9999."""
DRAWN = 400
"""Facts that are drawn to find enough of one length in tokens."""
SOLVED = 0.5
"""Least accuracy of the whole cache at which that of others says something."""


@dataclass(frozen=True)
class Questions:
    """Texts with facts in them, and a question behind each.

    Attributes
    ----------
    tokens : (n, t) int64: text with facts, then the question, then the answer.
    question, answer : tokens of these.
    depths : of the fact that is asked for, for each text.
    facts : how many are in each text.
    """

    tokens: Tensor
    question: int
    answer: int
    depths: tuple[float, ...]
    facts: int

    def prompt(self, aware: bool) -> int:
        """Tokens that are read before the cache is compressed."""
        text = self.tokens.shape[1] - self.question - self.answer
        return text + self.question - 1 if aware else text


@dataclass(frozen=True)
class Found:
    """What a cache found.

    Attributes
    ----------
    method : its spec string, or the name it was given.
    accuracy : share of the answers of which every token is the most probable one.
    by_depth : the same for each depth.
    """

    method: str
    accuracy: float
    by_depth: dict[float, float]


def make_questions(
    tokenizer: Any, text: str, length: int, *, facts: int = 1, rows: int = 10, seed: int = 0
) -> Questions:
    """Put facts into pieces of a text, and ask for one of those in each piece.

    Parameters
    ----------
    tokenizer : of the model.
    text : what the facts are put into.
    length : tokens of a piece with its facts, before the question.
    facts : in each piece, spread evenly; with one (a needle) its depth goes through `DEPTHS`.
    rows : pieces.

    Raises
    ------
    FewbitsError
        The text is too short, the pieces are too short for the facts, or the tokenizer does not
        write a fact as its question and then its answer.
    """
    if facts < 1 or facts > KEYS or rows < 1:
        raise FewbitsError(f"facts must be 1 to {KEYS}, and rows at least 1")
    rng = np.random.default_rng(seed)
    drawn = facts_of_one_length(tokenizer, rng)
    if len(drawn) < facts:
        raise FewbitsError(
            f"this tokenizer gives only {len(drawn)} facts of one length, fewer than {facts}: ask "
            "for fewer"
        )
    room = length - facts * len(drawn[0].line)
    if room < facts:
        raise FewbitsError(f"{length} tokens are too short for {facts} facts; take longer pieces")
    pieces = plain_pieces(tokenizer, text, rows, room)
    texts, depths = [], []
    for row in range(rows):
        chosen = [drawn[number] for number in rng.choice(len(drawn), facts, replace=False)]
        if facts == 1:
            places = [DEPTHS[row % len(DEPTHS)]]
        else:
            places = [(number + 0.5) / facts for number in range(facts)]
        asked = row % facts
        body = with_facts(pieces[row], chosen, places)
        texts.append([*body, *chosen[asked].question, *chosen[asked].answer])
        depths.append(places[asked])
    question, answer = len(drawn[0].question), len(drawn[0].answer)
    return Questions(torch.tensor(texts), question, answer, tuple(depths), facts)


@dataclass(frozen=True)
class Fact:
    """Token numbers of a line, of its beginning as the question, and of the rest."""

    line: list[int]
    question: list[int]
    answer: list[int]


def facts_of_one_length(tokenizer: Any, rng: np.random.Generator) -> list[Fact]:
    """Facts with different keys whose parts have the lengths in tokens that most have."""
    by_shape: dict[tuple[int, int, int], list[Fact]] = {}
    for key in rng.permutation(KEYS)[:DRAWN]:
        # Values of four digits are all that is drawn: shorter ones would be easier to guess.
        value = int(rng.integers(VALUES // 10, VALUES))
        fact = fact_of(tokenizer, int(key), value)
        if fact is not None:
            shape = len(fact.line), len(fact.question), len(fact.answer)
            by_shape.setdefault(shape, []).append(fact)
    if not by_shape:
        raise FewbitsError(
            "this tokenizer does not write '# k17 = v4821' as a question and then its answer, so "
            "that nothing can be asked for"
        )
    return max(by_shape.values(), key=len)


def fact_of(tokenizer: Any, key: int, value: int) -> Fact | None:
    """None where the tokens of the question are not the first ones of the whole line."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    question = tokens(f"\n# k{key} =")
    whole = tokens(f"\n# k{key} = v{value}")
    answer = whole[len(question) :]
    if whole[: len(question)] != question or not answer or len(question) < 2:
        return None
    return Fact(tokens(f"\n# k{key} = v{value}\n"), question, answer)


def plain_pieces(tokenizer: Any, text: str, rows: int, length: int) -> list[list[int]]:
    from fewbits.core.language_model import token_rows

    found: list[list[int]] = token_rows(tokenizer, text, rows, length).tolist()
    return found


def with_facts(piece: Sequence[int], facts: Sequence[Fact], places: Sequence[float]) -> list[int]:
    """The tokens of a piece with facts at rising places."""
    made: list[int] = []
    begin = 0
    for fact, place in zip(facts, places, strict=True):
        end = max(1, round(place * len(piece)))  # behind the token that begins a text
        made += [*piece[begin:end], *fact.line]
        begin = end
    return [*made, *piece[begin:]]


# -- asking --------------------------------------------------------------------------------


def retrieve(
    model: Any,
    questions: Questions,
    methods: Sequence[str] | Mapping[str, Any],
    *,
    aware: bool = False,
    batch: int = 8,
) -> list[Found]:
    """How often a cache of each method gives the answer.

    Parameters
    ----------
    model : a causal language model of transformers.
    questions : from `make_questions`.
    methods : spec strings, as `kv.cache` takes them; or names, and what `kv.cache` takes for each.
    aware : the question (all but its last token) is in the prompt that is compressed.
    batch : texts at a time.
    """
    found = []
    for name, method in named(methods).items():
        right: list[bool] = []
        for rows in questions.tokens.split(batch):
            right += answered(model, rows, questions, aware, cache(model, method))
        found.append(Found(name, sum(right) / len(right), by_depth(questions.depths, right)))
    return found


@torch.no_grad()
def answered(model: Any, rows: Tensor, questions: Questions, aware: bool, held: Any) -> list[bool]:
    """For each text whether every token of the answer is the most probable one."""
    rows = rows.to(model.device)
    prompt, count = questions.prompt(aware), questions.answer
    model(rows[:, :prompt], past_key_values=held, logits_to_keep=1)
    # Answers are given, not drawn: up to the first mistake that makes no difference.
    logits = model(rows[:, prompt:-1], past_key_values=held, logits_to_keep=count).logits
    return (logits.argmax(dim=2) == rows[:, -count:]).all(dim=1).tolist()


def by_depth(depths: Sequence[float], right: Sequence[bool]) -> dict[float, float]:
    """Accuracy at each depth."""
    groups: dict[float, list[bool]] = {}
    for depth, one in zip(depths, right, strict=True):
        groups.setdefault(depth, []).append(one)
    return {depth: sum(group) / len(group) for depth, group in sorted(groups.items())}
