import numpy as np
import pytest

from fewbits.primitives.rotation import random_rotation
from fewbits.reproductions.vectors import relative_representations as reproduction
from fewbits.reproductions.vectors.relative_representations import (
    CHANCE,
    CLAIM,
    ERROR_SHARE,
    INT8_LOSS,
    KEPT,
    SIZES,
    TIMES,
    Spaces,
    averaged,
    conditions,
    retrieval,
)


@pytest.fixture(scope="module")
def result():
    return reproduction.run("quick")


def test_the_verdict_follows_from_the_figures(result):
    met = conditions(result.figures, result.baselines, SIZES["quick"].counts)
    assert len(met) == 6
    assert result.holds == all(met.values())
    assert result.claim == CLAIM
    assert "not lossless" in result.reason or not result.holds


def test_digits_are_stitched_without_fitting(result):
    figures, baselines = result.figures, result.baselines
    own, stitched = (figures[f"classification, relative, {p}"] for p in ("own", "stitched"))
    assert own > 0.9
    assert stitched >= KEPT * own
    assert baselines["classification, absolute, own"] > 0.9
    assert baselines["classification, absolute, stitched"] < CHANCE
    own, stitched = (figures[f"reconstruction, relative, {p}"] for p in ("own", "stitched"))
    assert own <= stitched <= ERROR_SHARE * baselines["reconstruction, absolute, stitched"]
    assert baselines["reconstruction, absolute, own"] < own


def test_texts_are_found_across_encoders(result):
    found = [result.figures[f"texts, relative, {k} anchors: MRR"] for k in SIZES["quick"].counts]
    assert found == sorted(found)
    assert found[-1] >= TIMES * result.baselines["texts, absolute: MRR"]
    rival = result.baselines["texts, Procrustes, centred, 100 anchors: MRR"]
    assert 0.05 < rival < 1


def test_fewer_bits_find_less(result):
    rows = [row for row in result.details if row["table"] == "rate" and row["anchors"] == 100]
    rank = {row["method"]: row["MRR"] for row in rows}
    size = {row["method"]: row["bytes"] for row in rows}
    assert rank["int8"] > (1 - INT8_LOSS) * rank["float32"]
    assert rank["float32"] > rank["4-bit"] > rank["1-bit"]
    sizes = [size[name] for name in ("float32", "int8", "4-bit", "1-bit")]
    assert sizes == [400, 100, 50, 13]
    assert rank["float32"] == pytest.approx(
        result.figures["texts, relative, 100 anchors: MRR"], rel=1e-3
    )


def test_every_policy_is_compared(result):
    rows = [row for row in result.details if row["table"] == "policies"]
    assert {row["method"] for row in rows} == {"uniform", "farthest", "kmeans", "stratified"}
    assert all(row["runs"] >= 2 for row in rows)


def test_each_part_of_the_claim_can_fail_alone():
    figures = {
        "classification, relative, own": 1.0,
        "classification, relative, stitched": KEPT,
        "reconstruction, relative, stitched": 0.0999,
        "texts, relative, 10 anchors: MRR": 0.2,
        "texts, relative, 100 anchors: MRR": 0.5,
        "texts, float32, 100 anchors, 400 bytes: MRR": 0.5,
        "texts, int8, 100 anchors, 100 bytes: MRR": 0.4951,
    }
    baselines = {
        "classification, absolute, stitched": 0.29,
        "reconstruction, absolute, stitched": 0.3,
        "texts, absolute: MRR": 0.05,
    }
    assert all(conditions(figures, baselines, (10, 100)).values())
    for change in (
        {"classification, relative, stitched": 0.89},
        {"classification, absolute, stitched": 0.3},
        {"reconstruction, relative, stitched": 0.101},
        {"texts, absolute: MRR": 0.0501},
        {"texts, relative, 10 anchors: MRR": 0.5},
        {"texts, int8, 100 anchors, 100 bytes: MRR": 0.495},
    ):
        ours = figures | {name: value for name, value in change.items() if name in figures}
        theirs = baselines | {name: value for name, value in change.items() if name in baselines}
        assert list(conditions(ours, theirs, (10, 100)).values()).count(False) == 1


def test_a_turned_space_is_found_by_anchors_and_by_procrustes_alike():
    x = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32)
    spaces = Spaces("turned", x, x @ random_rotation(12, 1), np.arange(100), np.arange(100, 300))
    rows = {row["method"]: row for row in averaged(retrieval(spaces, (30,), (0, 1)))}
    for method in ("relative", "relative, centred", "Procrustes", "Procrustes, centred"):
        assert rows[method]["MRR"] == pytest.approx(1)
        assert rows[method]["cosine"] == pytest.approx(1, abs=1e-5)
        assert rows[method]["runs"] == 2
    assert rows["absolute"]["MRR"] < 0.1


def test_rows_are_averaged_over_what_is_not_named():
    rows = [{"table": "t", "method": m, "MRR": v} for m, v in (("a", 1), ("b", 5), ("a", 3))]
    assert averaged(rows) == [
        {"table": "t", "method": "a", "MRR": 2.0, "spread": 1.0, "runs": 2},
        {"table": "t", "method": "b", "MRR": 5.0, "spread": 0.0, "runs": 1},
    ]
