from itertools import pairwise

import numpy as np
import pytest

from fewbits.reproductions.vectors.bt2 import (
    NEW_LOSS,
    SHARES,
    embedded_anew,
    run,
    shortfalls,
)

pytest.importorskip("sklearn")

CLEAR = {
    "digits, old queries, old gallery: mAP": 0.5,
    "digits, independent, old gallery: mAP": 0.15,
    "digits, independent, new gallery: mAP": 0.95,
    "digits, BCT as published, old gallery: mAP": 0.5,
    "digits, BCT as published, new gallery: mAP": 0.85,
    "digits, BCT tuned, old gallery: mAP": 0.5,
    "digits, naive widening tuned, old gallery: mAP": 0.5,
    "digits, BT² as published, old gallery: mAP": 0.65,
    "digits, BT² as published, new gallery: mAP": 0.9,
    "digits, BT² tuned, old gallery: mAP": 0.7,
    "digits, BT² tuned, new gallery: mAP": 0.95,
    "texts, old queries, old gallery: recall@10": 0.4,
    "texts, new vectors as they are, new gallery: recall@10": 0.6,
    "texts, BT², item labels, old gallery: recall@10": 0.5,
    "texts, BT², item labels, new gallery: recall@10": 0.6,
}


def test_quick_run_computes_its_verdict_and_shows_what_the_paper_does() -> None:
    result = run("quick")
    figures = result.figures | result.baselines
    assert result.holds == (not shortfalls(figures))
    assert all(0 <= value <= 1 for value in figures.values())
    # Even after few epochs: what is not trained to fit does not, and BT² is ahead of the rest.
    old = {
        row["method"]: row["old gallery: mAP"] for row in result.details if row["table"] == "digits"
    }
    assert old["independent"] < old["old queries"] / 2
    assert old["independent, axes shuffled"] < old["old queries"] / 2
    rivals = (old["old queries"], old["BCT tuned"], old["naive widening tuned"])
    assert old["BT² tuned"] > max(rivals)
    assert old["BT² as published"] > max(old["old queries"], old["BCT as published"])
    new = {key: value for key, value in figures.items() if key.endswith("new gallery: mAP")}
    assert new["digits, BT² tuned, new gallery: mAP"] > new["digits, BCT tuned, new gallery: mAP"]
    assert "a BCT head" in result.reason
    curves = [row for row in result.details if row["table"] == "backfill"]
    whole = [row for row in curves if set(row) >= {f"{share:.0%}" for share in SHARES}]
    assert [row["method"].split(",")[0] for row in whole] == ["BT²", "BT²", "BEBR"]
    assert all(row["100%"] > row["0%"] for row in whole)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("digits, independent, old gallery: mAP", 0.25, "half as much"),
        ("digits, BT² as published, old gallery: mAP", 0.49, "less than old queries"),
        ("digits, BT² tuned, old gallery: mAP", 0.49, "less than old queries"),
        ("digits, BCT as published, old gallery: mAP", 0.66, "ahead of BCT on the old"),
        ("digits, BCT as published, new gallery: mAP", 0.91, "ahead of BCT on the new"),
        ("digits, BCT tuned, old gallery: mAP", 0.71, "ahead of tuned BCT"),
        ("digits, naive widening tuned, old gallery: mAP", 0.71, "naive widening"),
        ("digits, BT² tuned, new gallery: mAP", 0.949 - NEW_LOSS, "independent model"),
        ("texts, BT², item labels, old gallery: recall@10", 0.39, "less than old ones"),
        ("texts, BT², item labels, new gallery: recall@10", 0.599 - NEW_LOSS, "suffers"),
    ],
)
def test_each_part_of_the_claim_can_fail(name: str, value: float, complaint: str) -> None:
    assert shortfalls(CLEAR) == []
    assert any(complaint in words for words in shortfalls(CLEAR | {name: value}))


def test_larger_shares_hold_the_smaller_ones() -> None:
    parts = [embedded_anew(101, share, seed=1) for share in SHARES]
    assert [part.sum() for part in parts] == [0, 25, 50, 76, 101]
    for smaller, larger in pairwise(parts):
        assert not (smaller & ~larger).any()
    assert not np.array_equal(parts[2], embedded_anew(101, 0.5, seed=2))
