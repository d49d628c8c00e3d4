import numpy as np
import pytest

from fewbits.reproductions.vectors.bebr import (
    FOUR_BITS_REACH,
    HASH_MARGIN,
    SIMHASH_MARGIN,
    run,
    shortfalls,
    word_vectors,
)

CLEAR = {
    "bebr 1 (symmetric)": 0.6,
    "bebr 2 (symmetric)": 0.85,
    "bebr 3 (symmetric)": 0.9,
    "bebr 4 (symmetric)": 0.95,
    "bebr 1 × 2 (symmetric)": 0.7,
    "bebr 2 (asymmetric)": 0.1,
    "simhash 1 (symmetric)": 0.5,
    "simhash 2 (symmetric)": 0.65,
}


def test_quick_run_computes_its_verdict() -> None:
    result = run("quick")
    recall = {
        row["method"]: row["recall@10"]
        for row in result.details
        if row.get("data") == "python-docs"
    }
    assert result.holds == (not shortfalls(recall))
    assert all(0 < value <= 1 for value in (*result.figures.values(), *result.baselines.values()))
    sizes = {row["method"]: row["bytes"] for row in result.details if "bytes" in row}
    assert sizes["bebr 2 bits × 64 (symmetric)"] == sizes["simhash 128 (symmetric)"] == 16
    assert "MRR" in result.reason


@pytest.mark.parametrize(
    ("method", "value", "complaint"),
    [
        ("bebr 3 (symmetric)", 0.85, "every bit"),
        ("bebr 1 × 2 (symmetric)", 0.85 - HASH_MARGIN + 0.01, "single bits"),
        ("simhash 2 (symmetric)", 0.85 - SIMHASH_MARGIN + 0.01, "SimHash"),
        ("bebr 4 (symmetric)", FOUR_BITS_REACH - 0.001, "do not reach"),
    ],
)
def test_each_part_of_the_claim_can_fail(method: str, value: float, complaint: str) -> None:
    assert shortfalls(CLEAR) == []
    assert any(complaint in words for words in shortfalls(CLEAR | {method: value}))


def test_word_vectors_bring_texts_of_the_same_words_together() -> None:
    documents = ["read the file", "close the socket", "sort a list", "read a socket file"]
    queries, found = word_vectors(["sort list", "close socket"], documents, 3)
    assert (queries @ found.T).argmax(axis=1).tolist() == [2, 1]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
