import dataclasses

import numpy as np
import pytest

from fewbits.reproductions.vectors import csce_net as reproduction
from fewbits.reproductions.vectors.csce_net import (
    ABOVE,
    ABOVE_ITQ,
    BELOW,
    FULL,
    HEAD,
    POOLED,
    SIZES,
    averaged,
    cluttered,
    conditions,
    digits,
    pixels,
    run,
)

MAPS = {
    f"digits, {POOLED}: mAP": 0.7,
    f"digits, {HEAD}: mAP": 0.9,
    f"digits, {FULL}: mAP": 0.9,
    f"cluttered, {HEAD}: mAP": 0.4,
    f"cluttered, {FULL}: mAP": 0.42,
}


@pytest.mark.parametrize(
    ("figure", "value", "complaint"),
    [
        (f"digits, {POOLED}: mAP", 0.901 - ABOVE_ITQ, "digits: far above ITQ"),
        (f"digits, {HEAD}: mAP", 0.901 + BELOW, "digits: not below the OrthoHash head"),
        (f"cluttered, {HEAD}: mAP", 0.421 - ABOVE, "cluttered: above the OrthoHash head"),
    ],
)
def test_each_part_of_the_claim_can_fail(figure: str, value: float, complaint: str) -> None:
    assert all(conditions(MAPS).values())
    met = conditions(MAPS | {figure: value})
    assert [name for name, is_met in met.items() if not is_met] == [complaint]


def test_training_queries_and_database_share_no_digit() -> None:
    plan = SIZES["small"]
    data = digits(plan, seed=1, each=plan.digits)
    assert data.train.shape == (200, 32, 32, 3)
    assert (np.bincount(data.train_labels) == 20).all()
    assert (len(data.queries), len(data.database)) == (plan.queries, plan.database)
    sets = [{image.tobytes() for image in x} for x in (data.train, data.queries, data.database)]
    # Digits that are equal to the pixel do occur, but hardly.
    assert len(sets[0] & sets[1]) + len(sets[0] & sets[2]) + len(sets[1] & sets[2]) < 5
    other = digits(plan, seed=2, each=plan.digits)
    assert (other.train != data.train).any()
    assert len(digits(plan, 0, plan.cluttered).database) == plan.database


def test_digits_are_pasted_whole_and_the_ground_is_a_photograph() -> None:
    data = digits(SIZES["quick"], 0, 5)
    pasted = cluttered(data, 0)
    assert pasted.train.shape == (50, 48, 48, 3)
    assert pasted.train.dtype == np.uint8
    assert (pasted.train_labels == data.train_labels).all()
    black = dataclasses.replace(data, train=np.zeros_like(data.train))
    ground = cluttered(black, 0).train
    assert (pasted.train >= ground).all()
    brighter = pasted.train.astype(int) - ground
    assert (brighter.max(axis=(1, 2, 3)) > 0).all()
    rows = np.flatnonzero(brighter[3].max(axis=(1, 2)))
    assert rows[-1] - rows[0] < 32
    white = data.train[3].max(axis=2) == 255
    assert (pasted.train[3].min(axis=2) == 255).sum() >= white.sum() > 0


def test_pixels_are_means_of_four_by_four() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1, 4:, :4] = 100
    assert pixels(images).tolist() == [[0, 0, 0, 0], [0, 0, 100, 0]]


def test_means_and_deviations_are_over_the_seeds() -> None:
    rows = [
        {"data": "digits", "rung": "x", "seed": seed, "mAP": value}
        for seed, value in enumerate((0.2, 0.4))
    ]
    (row,) = averaged(rows)
    assert row["mAP"] == pytest.approx(0.3)
    assert row["mAP deviation"] == pytest.approx(0.1)


def test_quick_run_computes_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "cluttered", lambda data, seed: data)  # a half of the time
    result = run("quick")
    met = conditions({**result.figures, **result.baselines})
    assert result.holds == all(met.values())
    assert all(f"not met: {name}" in result.reason for name, is_met in met.items() if not is_met)
    assert len(result.details) == 2 * 9
    assert all(0 < row["mAP"] <= 1 for row in result.details)
    assert all(-1e-6 < row["quantization error"] < 1 for row in result.details)
    assert {"ambiguous bits", "bits from balance", "ms per image"} < set(result.details[0])
    assert len(result.figures) == 8
    assert len(result.baselines) == 10
