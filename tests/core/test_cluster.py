"""Encoding and comparing on a real Ray of this machine: the same bytes, the same figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.core import encode as encode_module
from fewbits.core.collection import part_file
from fewbits.core.compare import compare
from fewbits.core.encode import encode
from fewbits.core.errors import FewbitsError, MissingExtraError

METHOD = "pca-rag:dims=4+int8"
SPEEDS = ("fit_seconds", "encode_per_second", "search_per_second")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two cores, for all tests of this file."""
    module = pytest.importorskip("ray", reason="ray is not installed (fewbits[cluster])")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    module.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    yield module
    module.shutdown()


@pytest.fixture
def x() -> np.ndarray:
    """(240, 16) float32."""
    return np.random.default_rng(0).standard_normal((240, 16)).astype(np.float32)


@pytest.fixture
def shards(x: np.ndarray, tmp_path: Path) -> Path:
    """A folder of three files of 80 rows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", x[number * 80 : (number + 1) * 80])
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def without_speeds(comparison: Any) -> list[dict[str, Any]]:
    points = [point.to_json() for point in comparison.points]
    return [{k: v for k, v in point.items() if k not in SPEEDS} for point in points]


def test_ray_writes_the_bytes_of_the_local_engine(ray: Any, shards: Path, tmp_path: Path) -> None:
    encode(shards, tmp_path / "local", method=METHOD)
    encoded = encode(shards, tmp_path / "ray", method=METHOD, engine="ray")
    assert len(encoded) == 240
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert ray.is_initialized()  # it was here before


def test_ray_goes_on_with_what_the_local_engine_began(
    ray: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method=METHOD)
    whole = files(output)
    kept = part_file(output, 1).stat().st_mtime_ns
    for number in (0, 2):
        part_file(output, number).unlink()
    (output / ".part-00002.fewbits.4711.tmp").write_bytes(b"half a part")
    monkeypatch.setattr(encode_module, "fitted_codec", lambda *given: pytest.fail("learned again"))
    monkeypatch.chdir(tmp_path)  # the workers are at home in another folder
    encode("shards/*.npy", "codes", method=METHOD, engine="ray")
    assert files(output) == whole
    assert part_file(output, 1).stat().st_mtime_ns == kept
    with pytest.raises(FewbitsError, match="exists already"):
        encode(shards, output, method=METHOD, engine="ray")


def test_unusable_row_on_ray_is_one_line(
    ray: Any, x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    codec = encode(x, method="int8").codec
    x[170, 3] = np.nan
    np.save(shards / "2.npy", x[160:])
    with pytest.raises(FewbitsError, match=r"^row 10 of 2\.npy has NaN, infinity") as caught:
        encode(shards, tmp_path / "codes", method=codec, engine="ray")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "codes").glob(".*.tmp"))


def test_ray_compares_with_the_same_figures(ray: Any, x: np.ndarray) -> None:
    given: dict[str, Any] = {"methods": ["sign", "int8", METHOD, "pca-rag:dims=99"], "seed": 3}
    local = compare(x, **given)
    distributed = compare(x, **given, engine="ray")
    assert without_speeds(distributed) == without_speeds(local)
    assert distributed.left_out == local.left_out
    assert len(local.points) == 3
    assert local.left_out[0]["method"] == "pca-rag:dims=99"


def test_worker_that_is_lost_is_one_line(ray: Any) -> None:
    from fewbits.core.cluster import map_on_ray

    def die(item: int) -> None:
        os._exit(3)

    with pytest.raises(FewbitsError, match=r"^a worker on the cluster failed: ") as caught:
        list(map_on_ray(die, [0]))
    assert "\n" not in str(caught.value)


# -- what is refused, with or without Ray --------------------------------------------------


def test_missing_ray_names_the_extra(
    x: np.ndarray, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for attempt in (
        lambda: encode(shards, tmp_path / "codes", method="int8", engine="ray"),
        lambda: compare(x, methods="int8", engine="ray"),
    ):
        with pytest.raises(MissingExtraError, match=r"needs ray; .*'fewbits\[cluster\]'"):
            attempt()


def test_bug_in_a_task_names_its_cause(ray: Any) -> None:
    from fewbits.core.cluster import map_on_ray

    def fail(item: int) -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(FewbitsError, match=r"^a worker on the cluster failed: by nothing$"):
        list(map_on_ray(fail, [0]))


def test_ray_that_cannot_be_reached_is_one_line(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ray", reason="ray is not installed (fewbits[cluster])")

    def fail(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease start one")

    monkeypatch.setattr(module, "is_initialized", lambda: False)
    monkeypatch.setattr(module, "init", fail)
    says = "Ray cannot be started or reached: Could not find any running Ray instance"
    with pytest.raises(FewbitsError, match=says):
        compare(x, methods="int8", engine="ray")


def test_ray_takes_shards_that_others_can_read(x: np.ndarray, shards: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", x)
    for given, output, says in [
        (tmp_path / "one.npy", tmp_path / "codes", "encodes shards, but one.npy is one file"),
        (x, tmp_path / "codes", "encodes shards, but the input is one file"),
        (shards, None, "needs an output: a folder that all machines share"),
    ]:
        with pytest.raises(FewbitsError, match=says):
            encode(given, output, method="int8", engine="ray")
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (fewbits[cluster])")
    for file in shards.iterdir():
        fsspec.filesystem("memory").pipe(f"/cluster/{file.name}", file.read_bytes())
    with pytest.raises(FewbitsError, match=r"no other process can read 0\.npy"):
        encode("memory://cluster", tmp_path / "codes", method="int8", engine="ray")
    assert not (tmp_path / "codes").exists()


def test_engines_are_the_two_there_are(x: np.ndarray, tmp_path: Path) -> None:
    for attempt in (encode, compare):
        with pytest.raises(FewbitsError, match="there is no engine 'spark'; choose one of local,"):
            attempt(x, engine="spark")
