import functools

import numpy as np
import pytest

from fewbits.primitives.ragged import chamfer
from fewbits.reproductions.vectors import muvera
from fewbits.vectors.muvera import chamfer_rerank

HEURISTIC = "single-vector heuristic, deduplicated"


@pytest.fixture(scope="module", autouse=True)
def functions_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muvera, "stdlib_functions", functools.cache(muvera.stdlib_functions))
        yield


@pytest.fixture(scope="module")
def result():
    return muvera.run("quick")


@pytest.fixture(scope="module")
def task():
    return muvera.make_task(muvera.SIZES["quick"], encoder=False)[0]


def rows_of(result, **wanted):
    return [row for row in result.details if wanted.items() <= row.items()]


def test_recall_rises_with_the_dimensions_and_passes_mean_pooling(result):
    recalls = [
        result.figures[f"1Recall@50, {dims} dims, not filled"] for dims in (1280, 2560, 5120)
    ]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert recalls[-1] > result.baselines["1Recall@50, mean pooling, inner product"]
    filled = [result.figures[f"1Recall@50, {dims} dims, filled"] for dims in (1280, 5120)]
    assert filled[0] < filled[1]


def test_the_verdict_follows_from_the_figures(result):
    rival = rows_of(result, method=HEURISTIC)[0]["candidates for 90%"]
    wins = {
        filled: all(
            row["candidates for 90%"] < rival
            for row in rows_of(result, method="MUVERA", dims=5120, filled=filled)
        )
        for filled in (True, False)
    }
    assert result.holds == wins["chose filled" in result.reason]


def test_sizes_are_those_of_the_codes(result, task):
    assert result.figures["bytes per document, MUVERA, half precision"] == 2 * 1280
    assert result.figures["bytes per document, MUVERA, product-quantized"] == 1280 / 8
    assert result.baselines["bytes per document, raw vectors"] == pytest.approx(
        task.documents.flat.nbytes / len(task.documents), abs=0.1
    )
    assert result.figures["numbers scanned per document"] == 5120
    assert result.baselines["numbers scanned per document, single-vector heuristic"] > 5120


def test_reranking_all_documents_is_exact(task):
    some = task.part(slice(5))
    everything = np.tile(np.arange(len(task.documents)), (5, 1))
    scores, rows = chamfer_rerank(some.queries, some.documents, everything, 10)
    np.testing.assert_array_equal(rows, some.best)
    exact = chamfer(some.queries, some.documents)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], rtol=1e-5)


def test_the_task_can_be_solved_and_is_not_trivial(task):
    assert 0.3 < (task.best == task.own[:, None]).any(axis=1).mean() < 0.95
    np.testing.assert_allclose(np.linalg.norm(task.documents.flat, axis=1), 1, atol=1e-5)


def test_needed_candidates():
    places = muvera.ranks(np.array([[4, 2, 7], [1, 0, 5], [3, 2, 1]]), np.array([7, 1, 9]))
    assert places.tolist() == [3, 1, np.inf]
    assert muvera.needed_for(0.6, places) == 3
    assert muvera.needed_for(0.9, places) == np.inf


def test_repeats_are_dropped():
    lists = np.array([[3, 1, 3, 2, 1], [5, 5, 5, 5, 0]])
    assert muvera.without_repeats(lists).tolist() == [[3, 1, -1, 2, -1], [5, -1, -1, -1, 0]]


def test_static_vectors_put_words_of_like_use_together():
    texts = ["open the red file now", "open the blue file now", "sort a long list fast"] * 20
    queries, documents = muvera.static_tokens(texts[:3], texts, dims=4)
    assert len(queries) == 3
    red, blue, long = documents.flat[2], documents.flat[7], documents.flat[12]
    assert red @ blue > red @ long + 0.5


def test_a_text_of_rare_words_keeps_a_vector():
    texts = ["red blue red blue", "red blue red blue", "rare"]
    _, documents = muvera.static_tokens(["red"], texts, dims=2, most_words=2)
    assert documents.lengths.tolist() == [4, 4, 1]
