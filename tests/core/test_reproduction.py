"""Reproductions: what can be run, what comes of it, and what is said where nothing can."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fewbits.core import catalogue, reproduction
from fewbits.core.catalogue import everything, find
from fewbits.core.errors import FewbitsError, MissingExtraError
from fewbits.core.reproduction import Reproduction, available, module_of, reproduce, reproducible

Replace = Callable[[Callable[..., Reproduction]], None]


def made_up(**changes: Any) -> Reproduction:
    """A result as reproductions compute it, with NumPy's scalars in it."""
    values: dict[str, Any] = {
        "system": "pca-rag",
        "claim": "It is smaller.",
        "figures": {"times smaller": np.float32(2.5), "hits": np.int64(3)},
        "baselines": {"hits of others": np.float64(2)},
        "holds": np.bool_(True),
        "details": [{"method": "pca-rag", "bytes": np.int64(8), "recall@10": np.float32(0.5)}],
    }
    return Reproduction(**(values | changes))


@pytest.fixture
def replace_run(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Puts another function in the place of PCA-RAG's ``run``."""
    return lambda run: monkeypatch.setattr(f"{module_of(find('pca-rag'))}.run", run)


def test_available_are_the_systems_with_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"pca-rag", "muvera", "bebr"} <= set(available())
    assert set(available()) <= {row.name for row in everything()}
    written = {"fewbits.reproductions.kv.think"}
    monkeypatch.setattr(reproduction, "installed", written.__contains__)
    assert available() == ["think"]


def test_module_mirrors_the_room() -> None:
    assert module_of(find("pca-rag")) == "fewbits.reproductions.vectors.pca_rag"


def test_result_says_what_how_and_how_long(replace_run: Replace) -> None:
    sizes = []

    def run(size: str) -> Reproduction:
        sizes.append(size)
        time.sleep(0.06)
        return made_up()

    replace_run(run)
    result = reproduce("pca-rag", "quick")
    assert isinstance(result, Reproduction)
    assert (result.system, result.claim) == ("pca-rag", "It is smaller.")
    assert result.holds is True
    assert result.figures == {"times smaller": 2.5, "hits": 3}
    assert result.seconds >= 0.1  # rounded to tenths
    reproduce("pca-rag")
    assert sizes == ["quick", "small"]


def test_numbers_of_numpy_become_numbers_of_python(replace_run: Replace) -> None:
    replace_run(lambda size: made_up(holds=np.bool_(False), reason="not met: smaller"))
    result = reproduce("pca-rag", "quick")
    assert result.holds is False
    numbers = [*result.figures.values(), *result.baselines.values()]
    assert {type(number) for number in numbers} == {float}


def test_result_goes_into_json_whole() -> None:
    result = made_up(figures={"speed": np.float32(np.nan), "loss": float("inf")}, seconds=1.5)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written == {
        "system": "pca-rag",
        "claim": "It is smaller.",
        "figures": {"speed": None, "loss": None},
        "baselines": {"hits of others": 2},
        "holds": True,
        "reason": "",
        "data": "",
        "seconds": 1.5,
        "details": [{"method": "pca-rag", "bytes": 8, "recall@10": 0.5}],
    }


def test_unknown_name_is_refused() -> None:
    with pytest.raises(FewbitsError, match="unknown method 'pca-rga'; did you mean 'pca-rag'"):
        reproduce("pca-rga")


def test_unknown_size_is_refused() -> None:
    with pytest.raises(FewbitsError, match="unknown size 'large'; choose one of quick, small"):
        reproduce("pca-rag", "large")


def test_missing_reproduction_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewbitsError) as caught:
        reproduce("int8")
    assert str(caught.value) == (
        f"int8 has no reproduction; there is one for: {', '.join(available())}"
    )
    monkeypatch.setattr(reproduction, "installed", lambda module: False)
    with pytest.raises(FewbitsError, match="int8 has no reproduction; there is one for: none yet"):
        reproduce("int8")


def test_missing_extra_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = catalogue.installed
    monkeypatch.setattr(catalogue, "installed", lambda name: name != "torch" and installed(name))
    with pytest.raises(MissingExtraError, match=r"bebr needs torch; .*'fewbits\[torch\]'"):
        reproducible("bebr")
    assert reproducible("pca-rag") is find("pca-rag")


def test_errors_of_a_reproduction_reach_the_caller(replace_run: Replace) -> None:
    def run(size: str) -> Reproduction:
        raise FewbitsError("the example is missing: install fewbits again")

    replace_run(run)
    with pytest.raises(FewbitsError, match="the example is missing"):
        reproduce("pca-rag")
