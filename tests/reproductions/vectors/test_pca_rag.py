from collections import Counter

import numpy as np
import pytest

from fewbits.core.examples import python_docs
from fewbits.reproductions.vectors import pca_rag
from fewbits.reproductions.vectors.pca_rag import SIZES, Task, conditions


@pytest.fixture(scope="module")
def result():
    return pca_rag.run("quick")


def rows_of(result, vectors):
    return {row["method"]: row for row in result.details if row["vectors"] == vectors}


def test_the_verdict_follows_from_the_figures(result):
    met = conditions(result.figures)
    assert len(met) == 5
    assert result.holds == all(met.values())
    assert all((name in result.reason) != is_met for name, is_met in met.items())


def test_each_part_of_the_claim_can_fail_alone():
    good = {
        "times fewer bytes": 27.9,
        "times faster flat search": 10.0,
        "hits@10 lost": 0.1,
        "standard errors above truncation": 2.0,
        "standard errors above random projection": 2.0,
    }
    assert all(conditions(good).values())
    for name, value in good.items():
        worse = value + 0.01 if name == "hits@10 lost" else value - 0.01
        assert list(conditions(good | {name: worse}).values()).count(False) == 1


def test_sizes_are_those_of_the_codes(result):
    quick = SIZES["quick"]
    rows = rows_of(result, "hashed n-grams")
    assert rows["exact, float32"]["bytes"] == 4 * quick.buckets
    assert result.figures["times fewer bytes"] == pytest.approx(
        quick.buckets / quick.dims, abs=1e-3
    )
    assert result.figures["times fewer bytes, codec included"] < result.figures["times fewer bytes"]
    equal = [row["bytes"] for method, row in rows.items() if "dims=18" in method or "pq" in method]
    assert len(equal) == 3
    assert set(equal) == {4 * quick.dims}


def test_components_beat_what_is_not_fitted_on_sentence_embeddings(result):
    rows = rows_of(result, "sentence embeddings")
    ours = rows["pca-rag:dims=32,scoring=reduced"]
    for name in ("truncation", "random projection"):
        assert ours["recall@10"] > rows[name]["recall@10"] + 0.1
    recalls = [rows[f"pca-rag:dims={dims}"]["recall@10"] for dims in (8, 32, 64)]
    assert recalls == sorted(recalls)
    assert rows["exact, float32"]["recall@100"] == 1


def test_other_topics_cost_something(result):
    what = "recall@10, fitted on {} topics, sentence embeddings"
    assert result.figures[what.format("other")] < result.figures[what.format("the same")]


def test_ngrams_are_counted_as_one_by_one():
    texts = ["Abc abc", "é", "xabc"]
    counts = pca_rag.hashed_ngrams(texts, 2**20)
    for text, row in zip(texts, counts, strict=True):
        letters = f" {text.lower()} ".encode()
        runs = [letters[i : i + n] for n in (3, 4, 5) for i in range(len(letters) - n + 1)]
        assert sorted(row[row > 0]) == sorted(Counter(runs).values())
    shared = (counts[0] > 0) & (counts[2] > 0)
    assert shared.sum() == 3  # "abc", "bc " and "abc "


def test_every_keeps_the_queries_it_answers():
    whole = python_docs()
    part = pca_rag.every(whole, 5)
    assert part.ids == whole.ids[::5]
    assert len(part.queries) == len(part.query_texts) == len(part.answers) > 40
    for text, answer in zip(part.query_texts, part.answers, strict=True):
        row = whole.query_texts.index(text)
        assert whole.ids[whole.answers[row]] == part.ids[answer]


def test_the_later_half_keeps_its_answers():
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    early = np.array([True, False, False, True, True, False])
    task = Task("some", x, x[[5, 0, 2]], np.array([5, 0, 2]), early)
    later = task.later_half()
    np.testing.assert_array_equal(later.x, x[[1, 2, 5]])
    np.testing.assert_array_equal(later.x[later.answers], later.queries)
    assert later.answers.tolist() == [2, 1]


def test_recall_per_query_and_its_standard_error():
    found, truth = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9, 1], [7, 8, 9]])
    np.testing.assert_allclose(pca_rag.recall_per_query(found, truth, 3), [2 / 3, 0])
    np.testing.assert_allclose(pca_rag.recall_per_query(found, truth, 2), [0, 0])
    values = np.random.default_rng(0).random(400)
    expected = values.std() / 20
    assert pca_rag.standard_error(values) == pytest.approx(expected, rel=0.2)
