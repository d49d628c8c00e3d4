"""Facts in a text: how they are put there, how they are asked for, and what counts as found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from letters import Letters
from tiny_models import tiny_model

from fewbits.core.errors import FewbitsError
from fewbits.kv import retrieval
from fewbits.kv.retrieval import DEPTHS, make_questions, retrieve

TEXT = "the quick brown fox jumps over the lazy dog; " * 200
LETTERS = Letters()


class Parrot:
    """A model that answers with what followed a line's beginning before, if it still has it.

    Of the prompt (the first call) only the newest `remembers` tokens are kept.
    """

    device = torch.device("cpu")

    def __init__(self, remembers: int = 10**9) -> None:
        self.remembers, self.prompts = remembers, []

    def __call__(self, tokens: Any, past_key_values: Any, logits_to_keep: int) -> Any:
        if not past_key_values:
            self.prompts.append(tokens.shape[1])
            past_key_values.extend(row[-self.remembers :] for row in tokens.tolist())
            return None
        rows = zip(past_key_values, tokens.tolist(), strict=True)
        said = [
            self.following([*past, *new], len(past) + len(new) - logits_to_keep)
            for past, new in rows
        ]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(said), 128).float())

    @staticmethod
    def following(seen: list[int], begin: int) -> list[int]:
        """For each place from `begin` on, what came after the longest earlier match."""
        text = "".join(map(chr, seen))
        found = []
        for place in range(begin, len(text)):
            line = text[text.rindex("\n", 0, place) : place + 1]
            at = text.find(line, 0, place)
            found.append(ord(text[at + len(line)]) if at >= 0 else 0)
        return found


@pytest.fixture
def parrots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are lists of tokens."""
    monkeypatch.setattr(retrieval, "cache", lambda model, method: [])


def words(row: Any) -> str:
    return "".join(map(chr, row.tolist()))


# -- the questions -------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [1, 4])
def test_each_text_has_its_facts_and_the_question_of_one(facts: int) -> None:
    questions = make_questions(LETTERS, TEXT, 200, facts=facts, rows=6)
    assert questions.tokens.shape == (6, 200 + questions.question + questions.answer)
    assert questions.prompt(aware=False) == 200
    assert questions.prompt(aware=True) == 200 + questions.question - 1
    for row, depth in zip(questions.tokens, questions.depths, strict=True):
        text, asked = words(row[:200]), words(row[200:])
        lines = [line for line in text.splitlines() if line.startswith("# k")]
        assert len(lines) == len({line.split(" = ")[0] for line in lines}) == facts
        assert asked.startswith("\n# k")
        assert asked.strip() in lines
        place = text.index(asked) / 200
        assert place == pytest.approx(depth, abs=0.2)


def test_a_needle_goes_through_all_depths() -> None:
    questions = make_questions(LETTERS, TEXT, 100, rows=10)
    assert questions.depths == DEPTHS * 2
    assert make_questions(LETTERS, TEXT, 100, facts=4, rows=4).depths == (
        0.125,
        0.375,
        0.625,
        0.875,
    )


def test_a_seed_gives_its_questions_again() -> None:
    first, again, other = (make_questions(LETTERS, TEXT, 90, rows=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("too short", {}, "the text has 9 tokens"),
        (TEXT, {"facts": 0}, "facts must be 1 to 100"),
        (TEXT, {"rows": 0}, "rows at least 1"),
        (TEXT, {"facts": 20}, "too short for 20 facts"),
    ],
)
def test_what_cannot_be_asked_is_refused(text: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        make_questions(LETTERS, text, 100, **options)


def test_a_tokenizer_that_cannot_cut_the_line_is_refused() -> None:
    def whole_lines(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [hash(text) % 1000]}

    with pytest.raises(FewbitsError, match="nothing can be asked for"):
        make_questions(whole_lines, TEXT, 100)


# -- the answers ---------------------------------------------------------------------------


@pytest.mark.usefixtures("parrots")
@pytest.mark.parametrize("facts", [1, 4])
@pytest.mark.parametrize("aware", [False, True])
def test_who_remembers_all_finds_all(facts: int, aware: bool) -> None:
    questions = make_questions(LETTERS, TEXT, 200, facts=facts, rows=8)
    model = Parrot()
    (found,) = retrieve(model, questions, ["full"], aware=aware, batch=3)
    assert found.accuracy == 1
    assert set(found.by_depth.values()) == {1}
    assert set(model.prompts) == {questions.prompt(aware)}
    assert model.prompts[0] == (200 if not aware else 200 + questions.question - 1)


@pytest.mark.usefixtures("parrots")
def test_who_forgets_the_beginning_finds_the_end() -> None:
    questions = make_questions(LETTERS, TEXT, 200, rows=10)
    (found,) = retrieve(Parrot(remembers=100), questions, {"half": None})
    assert found.method == "half"
    assert found.by_depth == {0.1: 0, 0.3: 0, 0.5: found.by_depth[0.5], 0.7: 1, 0.9: 1}
    assert 0.4 <= found.accuracy <= 0.6


@pytest.mark.usefixtures("parrots")
def test_an_answer_counts_only_as_a_whole() -> None:
    questions = make_questions(LETTERS, TEXT, 100, rows=5)
    questions.tokens[2, -1] = ord("x")
    (found,) = retrieve(Parrot(), questions, ["full"])
    assert found.accuracy == pytest.approx(0.8)
    assert found.by_depth[DEPTHS[2]] == 0


@torch.no_grad()
def test_real_caches_are_asked_like_the_model_itself() -> None:
    """The whole cache finds what one pass over text, question and answer finds."""
    model = tiny_model(initializer_range=0.3)
    questions = make_questions(LETTERS, TEXT, 64, rows=4)
    logits = model(questions.tokens).logits.argmax(dim=2)
    # Texts whose answers are what the model says can be found; the others cannot.
    for place in range(questions.tokens.shape[1] - questions.answer, questions.tokens.shape[1]):
        questions.tokens[:2, place] = model(questions.tokens[:2, :place]).logits[:, -1].argmax(1)
    count = questions.answer
    wrong = logits[2:, -count - 1 : -1] != questions.tokens[2:, -count:]
    assert wrong.any(dim=1).all()
    for aware in (False, True):
        (found,) = retrieve(model, questions, ["full"], aware=aware)
        assert found.accuracy == 0.5
        assert found.by_depth == {0.1: 1, 0.3: 1, 0.5: 0, 0.7: 0}
