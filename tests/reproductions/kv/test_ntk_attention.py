"""NTK-Attention's claim: that it runs, and that each part of it can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits.core.reproduction import Reproduction
from fewbits.reproductions.kv.ntk_attention import (
    METHODS,
    PREFIXES,
    adapted,
    drift_slope,
    run,
    shortfalls,
    vision_transformer,
)

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def quick() -> Reproduction:
    return run("quick")


def table(result: Reproduction, name: str) -> list[dict[str, Any]]:
    return [row for row in result.details if row["table"] == name]


def test_quick_run_computes_its_verdict(quick: Reproduction) -> None:
    given = table(quick, "encoding"), table(quick, "theory")
    failed = shortfalls(quick.figures, quick.baselines, *given)
    assert quick.holds == (not failed)
    assert (quick.reason == "") == quick.holds
    rows = table(quick, "adaptation")
    assert [row["method"] for row in rows if row["data"] == "digits"] == list(METHODS)
    assert all(0 <= row["accuracy"] <= 1 and row["training loss"] > 0 for row in rows)


def test_a_state_is_near_where_logits_are_small(quick: Reproduction) -> None:
    """The acceptance of encoded prefixes, at any size of the run."""
    for row in table(quick, "encoding"):
        ways = [row[f"elu, {way}"] for way in ("closed-form", "mass", "least-squares")]
        assert ways == sorted(ways, reverse=True)
        if row["scale"] == 0.3:
            assert row["elu, least-squares"] < 0.1
            assert row["taylor-2, closed-form"] < 0.01


def test_longer_prefixes_train_further(quick: Reproduction) -> None:
    rows = table(quick, "theory")
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert rows[-1]["kernel drift"] < rows[1]["kernel drift"]


def test_ntk_and_its_rivals_have_as_many_parameters(quick: Reproduction) -> None:
    counts = {
        row["method"]: row["parameters beside the head"] for row in table(quick, "adaptation")
    }
    assert counts["NTK-Attention"] == 3 * 4 * (16**2 + 16)
    assert counts["LoRA"] == counts["prefix of 8"] == 3072
    assert counts["prefix of 64"] == 8 * 3072
    assert counts["head only"] == 0


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_from_the_frozen_trunk(method: str) -> None:
    trunk, images = vision_transformer(8, 0), torch.rand(3, 1, 8, 8)
    model = adapted(trunk, method, 0)
    own = {name for name, one in model.named_parameters() if one.requires_grad}
    beside = own - {"classifier.weight", "classifier.bias"}
    assert all("prefix" in name or "parametrizations" in name for name in beside)
    model.classifier.load_state_dict(trunk.classifier.state_dict())
    same = torch.allclose(model(images).logits, trunk(images).logits, atol=1e-5)
    assert same == (not method.startswith("prefix"))


# -- the verdict ---------------------------------------------------------------------------

CLEAR = {
    "digits, NTK-Attention: training loss": 0.1,
    "digits, NTK-Attention: accuracy": 0.9,
    "slope of the kernel's drift": -0.5,
}
RIVALS = {
    f"digits, {method}: {what}": value
    for method in METHODS[1:]
    for what, value in (("training loss", 0.2), ("accuracy", 0.8))
}
ENCODED = [
    {"scale": scale, "length": 4, "elu, least-squares": scale / 10} for scale in (0.1, 0.3, 1.0)
]
THEORY = [
    {"length": m, "loss": 1 / m, "kernel drift": m**-0.5, "smallest eigenvalue": 0.1}
    for m in (4, 16, 64, 256)
]


def test_a_clear_result_holds() -> None:
    assert shortfalls(CLEAR, RIVALS, ENCODED, THEORY) == []
    assert drift_slope(THEORY) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        *((f"digits, prefix of {m}: training loss", 0.05, f"prefix of {m} has") for m in PREFIXES),
        ("digits, prefix of 64: accuracy", 0.95, "prefix of 64 has a higher accuracy"),
        ("digits, LoRA: accuracy", 0.95, "LoRA has a higher accuracy"),
        ("digits, head only: accuracy", 0.9, "head alone"),
        ("slope of the kernel's drift", -0.1, "drift of the kernel"),
        ("slope of the kernel's drift", -1.5, "drift of the kernel"),
    ],
)
def test_each_part_of_the_claim_can_fail(name: str, value: float, complaint: str) -> None:
    place = RIVALS if name in RIVALS else CLEAR
    figures, rivals = dict(CLEAR), dict(RIVALS)
    (rivals if place is RIVALS else figures)[name] = value
    assert any(complaint in words for words in shortfalls(figures, rivals, ENCODED, THEORY))


def test_each_part_of_the_tables_can_fail() -> None:
    def complaints(encoded: Any = ENCODED, theory: Any = THEORY) -> str:
        return "; ".join(shortfalls(CLEAR, RIVALS, encoded, theory))

    large = [row | {"elu, least-squares": 0.2 + row["scale"]} for row in ENCODED]
    assert "the error at m = 4 is above 0.1" in complaints(encoded=large)
    assert "does not rise" in complaints(encoded=ENCODED[::-1])
    assert "the loss does not fall" in complaints(theory=THEORY[::-1])
    flat = [row | {"smallest eigenvalue": 0.0} for row in THEORY]
    assert "eigenvalue of 0" in complaints(theory=flat)
