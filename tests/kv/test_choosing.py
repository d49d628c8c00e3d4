"""Choosing a cache: what is asked for is kept, halving reads no piece twice, ties are simple."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from letters import Letters
from tiny_models import tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv import choosing
from fewbits.kv._grid import Candidate, Row
from fewbits.kv.choosing import Search, Wish, choose, round_ends
from fewbits.kv.evaluation import Cost, evaluate

SIZES: dict[str, Any] = {"pieces": 3, "prompt": 64, "scored": 4}
COST = Cost("full", 0.0, 10.0, 1.0, 768.0, 32.0, 1.0, 1.0, 1.0)
TEXT = tokens(5, 80)


@pytest.fixture(autouse=True)
def _few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to try every method of the grid."""
    rows = [
        Row("full", ("full",)),
        Row("window", ("window:keep={keep}",)),
        Row("snapkv", ("snapkv:keep={keep},queries=8",)),
        Row("kivi", ("kivi:bits=8,group=16,recent=16", "kivi:bits=2,group=16,recent=16")),
    ]
    monkeypatch.setattr(choosing, "asked_for", lambda methods: (rows, [], []))


def refusal(**options: Any) -> str:
    with pytest.raises(FewbitsError) as caught:
        choose(options.pop("model"), TEXT, **SIZES | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is chosen ------------------------------------------------------------------------


@pytest.mark.parametrize("at_most", ["50%", 768 / 2])
def test_the_best_within_a_size(llama: Any, at_most: Any) -> None:
    choice = choose(llama, TEXT, at_most, **SIZES)
    assert choice.cost.share <= 0.5
    last = [row for row in choice.tried if row["pieces"] == 3]
    assert all(row["share"] <= 0.5 for row in choice.tried)
    assert choice.cost.divergence <= 1.05 * min(row["KL"] for row in last)
    (again,) = evaluate(llama, TEXT[:3, :68], 64, [choice.spec])
    assert again.divergence == pytest.approx(choice.cost.divergence, rel=1e-4)
    assert again.bytes_per_token == choice.cost.bytes_per_token
    assert fewbits.kv.cache(llama, choice.method).stages[0].name == choice.spec.partition(":")[0]


def test_the_smallest_that_keeps_a_quality(llama: Any) -> None:
    loose = choose(llama, TEXT, keep={"KL": 1e9}, **SIZES)
    tight = choose(llama, TEXT, keep={"KL": 1e-4, "agreement": "-5%"}, **SIZES)
    assert loose.cost.share < 0.2
    assert tight.cost.divergence <= 1e-4
    assert tight.cost.agreement >= 0.95
    assert loose.cost.share < tight.cost.share <= 1
    assert str(tight).startswith(f"{tight.spec}: ")
    assert "of the whole cache; KL" in str(tight)


def test_both_at_once(llama: Any) -> None:
    choice = choose(llama, TEXT, "60%", {"KL": 1.0}, **SIZES)
    assert choice.cost.share <= 0.6
    assert choice.cost.divergence <= 1


def test_words_are_read_with_a_tokenizer(llama: Any) -> None:
    choice = choose(llama, "quick brown foxes jump. " * 60, "50%", tokenizer=Letters(), **SIZES)
    assert choice.cost.share <= 0.5


# -- halving -------------------------------------------------------------------------------


def test_rounds_double() -> None:
    assert round_ends(1) == [1]
    assert round_ends(2) == [2]
    assert round_ends(7) == [2, 4, 7]
    assert round_ends(16) == [2, 4, 8, 16]


def test_the_better_half_goes_on_and_no_piece_is_read_twice(llama: Any) -> None:
    specs = ["full", *(f"window:keep={part / 10}" for part in range(1, 10))]
    named = [Candidate(spec.partition(":")[0], spec, spec) for spec in specs]
    search = Search(llama, 64, named, Wish("100%", {}), 1.0)
    read: list[tuple[int, int]] = []
    add = search.scores.add

    def counted(rows: Any, names: Any, step: Any) -> None:
        read.append((len(rows), len(names)))
        add(rows, names, step)

    search.scores.add = counted  # type: ignore[method-assign]
    with choosing.progress("", 0, show=False) as bar:
        choice = search.run(tokens(5, 68), bar)
    assert read == [(2, 10), (2, 5), (1, 4)]
    assert choice.spec == "full"
    assert [row["pieces"] for row in choice.tried].count(5) == 4
    assert search.scores.sums["full"].scored == 5 * 4


# -- ties ----------------------------------------------------------------------------------


def costs(search: Search, **figures: tuple[float, float]) -> None:
    """Gives candidates their divergence and share."""
    made = {
        spec: replace(COST, divergence=kl, share=share, bytes_per_token=768 * share)
        for spec, (kl, share) in figures.items()
    }
    search.scores.cost = lambda spec: made.get(spec, COST)  # type: ignore[method-assign]


def search_of(wish: Wish, *named: Candidate, budget: float = 1.0) -> Search:
    return Search(None, 64, named, wish, budget)


A, AB = Candidate("a", "a", "a"), Candidate("a+b", "ab", "ab")
FITTED = Candidate("c", "c", object())


def test_of_nearly_equal_ones_the_simpler_is_taken() -> None:
    search = search_of(Wish("50%", {}), AB, FITTED, A)
    costs(search, ab=(0.100, 0.4), c=(0.101, 0.4), a=(0.103, 0.4))
    assert search.choice(search.ranked(["ab", "c", "a"])).spec == "a"
    costs(search, ab=(0.100, 0.4), c=(0.101, 0.4), a=(0.110, 0.4))
    assert search.choice(search.ranked(["ab", "c", "a"])).spec == "c"
    costs(search, ab=(0.100, 0.4), c=(0.2, 0.4), a=(0.110, 0.4))
    assert search.choice(search.ranked(["ab", "c", "a"])).spec == "ab"


def test_what_misses_a_limit_is_not_taken_for_its_size() -> None:
    search = search_of(Wish(None, {"KL": 0.1}), AB, A)
    costs(search, ab=(0.09, 0.30), a=(0.11, 0.10))
    assert search.choice(search.ranked(["ab", "a"])).spec == "ab"
    costs(search, ab=(0.09, 0.300), a=(0.05, 0.305))
    assert search.choice(search.ranked(["ab", "a"])).spec == "a"


def test_what_nothing_keeps_names_the_nearest() -> None:
    search = search_of(Wish("50%", {"KL": 0.01}), AB, A, budget=0.5)
    costs(search, ab=(0.2, 0.30), a=(0.11, 0.10))
    with pytest.raises(FewbitsError, match=r"nothing keeps that; the nearest is a: 76\.8 bytes"):
        search.choice(search.ranked(["ab", "a"]))
    costs(search, ab=(0.0, 0.9), a=(0.0, 0.9))
    with pytest.raises(FewbitsError, match="nothing that was tried fits"):
        search.choice(search.ranked(["ab", "a"]))


@pytest.mark.parametrize(
    ("keep", "perplexity", "agreement", "missed"),
    [
        ({"perplexity": "+1%"}, 10.1, 1.0, False),
        ({"perplexity": "+1%"}, 10.2, 1.0, True),
        ({"perplexity": 12}, 11.9, 1.0, False),
        ({"agreement": "-2%"}, 99.0, 0.985, False),
        ({"agreement": "-2%"}, 99.0, 0.97, True),
        ({"agreement": 0.9, "perplexity": "+1%"}, 10.0, 0.8, True),
    ],
)
def test_limits(keep: Any, perplexity: float, agreement: float, missed: bool) -> None:
    cost = replace(COST, perplexity=perplexity, agreement=agreement)
    assert (Wish(None, keep).missed(cost, COST) > 1e-9) == missed


# -- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("at_most", ["0%", "-5%", 0.25, "much", "nan%", float("inf"), 0])
def test_sizes_that_are_none_are_refused(llama: Any, at_most: Any) -> None:
    assert 'a share such as "25%"' in refusal(model=llama, at_most=at_most)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"recall@10": 0.9}, "choose one of KL, perplexity, agreement"),
        ({"perplexity": "-1%"}, "is no limit"),
        ({"agreement": "+1%"}, "is no limit"),
        ({"KL": "little"}, "is no limit"),
        ({"KL": -1}, "is no limit"),
        ({"KL": "+1%"}, "the KL of the whole cache is 0"),
        (None, "say at_most"),
    ],
)
def test_limits_that_are_none_are_refused(llama: Any, keep: Any, says: str) -> None:
    assert says in refusal(model=llama, keep=keep)


def test_too_little_is_refused(llama: Any) -> None:
    assert "nothing that was tried fits" in refusal(model=llama, at_most="0.1%")
    assert "8 pieces of 68 tokens" in refusal(model=llama, at_most="50%", pieces=8)
    assert "is no causal" in refusal(model=torch.nn.Linear(2, 2), at_most="50%")
