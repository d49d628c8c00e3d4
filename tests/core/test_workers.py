"""Threads and processes: the same bytes as one worker, and a clean end whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from fewbits.core import encode as encode_module
from fewbits.core import source as source_module
from fewbits.core.checks import unit_rows as unit
from fewbits.core.codec import from_spec
from fewbits.core.collection import CODEC_FILE, load, part_file
from fewbits.core.encode import encode, encode_part
from fewbits.core.errors import FewbitsError
from fewbits.core.progress import Steps
from fewbits.core.workers import check_workers, cores, map_in_threads, run_in_processes

SHARDS, ROWS, DIMS = 4, 50, 16


@pytest.fixture
def x() -> np.ndarray:
    """(200, 16) float32."""
    return np.random.default_rng(0).standard_normal((SHARDS * ROWS, DIMS)).astype(np.float32)


@pytest.fixture
def shards(x: np.ndarray, tmp_path: Path) -> Path:
    """A folder of four files of 50 rows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(SHARDS):
        np.save(folder / f"{number}.npy", x[number * ROWS : (number + 1) * ROWS])
    return folder


@pytest.fixture
def processes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards are worth processes, too."""
    monkeypatch.setattr(encode_module, "PROCESS_BYTES", 1)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- how many ------------------------------------------------------------------------------


def test_workers_are_the_cores_unless_told() -> None:
    assert check_workers(None) == cores() >= 1
    assert check_workers(7) == 7


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_workers_that_make_no_sense_are_refused(x: np.ndarray, workers: Any) -> None:
    with pytest.raises(FewbitsError, match="workers must be a whole number of at least 1"):
        encode(x, method="int8", workers=workers)


# -- threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_keep_the_order(threads: int) -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.01 if number == 0 else 0)
        return number * number

    assert list(map_in_threads(slow_first, range(20), threads)) == [n * n for n in range(20)]
    assert list(map_in_threads(slow_first, [], threads)) == []


def test_threads_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    assert sorted(map_in_threads(lambda _: both.wait(), range(2), 2)) == [0, 1]


def test_threads_take_few_items_ahead() -> None:
    taken: list[int] = []

    def items() -> Any:
        for number in range(50):
            taken.append(number)
            yield number

    results = map_in_threads(lambda number: number, items(), 3)
    assert next(results) == 0
    assert len(taken) == 4
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_matrix_libraries_keep_to_one_thread(threads: int) -> None:
    before = [about["num_threads"] for about in threadpool_info()]
    for found in map_in_threads(lambda _: threadpool_info(), range(3), threads):
        assert {about["num_threads"] for about in found} == {1}
    assert [about["num_threads"] for about in threadpool_info()] == before


@pytest.mark.parametrize("threads", [1, 2])
def test_error_of_the_first_item_comes_first(threads: int) -> None:
    def fail(number: int) -> int:
        if number >= 3:
            raise FewbitsError(f"item {number}")
        return number

    done: list[int] = []
    with pytest.raises(FewbitsError, match="item 3"):
        done.extend(map_in_threads(fail, range(10), threads))
    assert done == [0, 1, 2]


@pytest.mark.parametrize("spec", ["int8", "sign", "turboquant", "pca-rag:dims=4+int8", "itq"])
def test_threads_do_not_show_in_the_bytes(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 7 * 4 * DIMS)
    codec = from_spec(spec).fit(unit(x))
    for threads in (1, 2, 5):
        encode(x, tmp_path / f"{threads}.fewbits", method=codec, workers=threads)
    one, two, five = (files(tmp_path)[f"{threads}.fewbits"] for threads in (1, 2, 5))
    assert one == two == five
    in_memory = encode(x, method=codec, workers=2).parts[0]
    for name, array in load(tmp_path / "1.fewbits").parts[0].arrays.items():
        np.testing.assert_array_equal(in_memory[name], array)


def test_unusable_row_is_named_as_by_one_thread(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 7 * 4 * DIMS)
    codec = from_spec("int8").fit(unit(x))
    x[[99, 150], 2] = np.nan
    with pytest.raises(FewbitsError, match="row 99 of the input has NaN"):
        encode(x, tmp_path / "codes.fewbits", method=codec, workers=3)
    assert list(tmp_path.iterdir()) == []


# -- processes -----------------------------------------------------------------------------


@pytest.mark.usefixtures("processes_for_all")
def test_processes_do_not_show_in_the_bytes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(shards, tmp_path / "one", method="pca-rag:dims=4+int8", workers=1)
    monkeypatch.setattr(encode_module, "write_part", lambda *given: pytest.fail("not a process"))
    encode(shards, tmp_path / "two", method="pca-rag:dims=4+int8", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.usefixtures("processes_for_all")
def test_processes_go_on_where_another_run_stopped(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method="int8", workers=1)
    whole = files(output)
    kept = part_file(output, 2).stat().st_mtime_ns
    part_file(output, 0).unlink()
    part_file(output, 3).write_bytes(b"damaged")
    encode(shards, output, method="int8", workers=2)
    assert files(output) == whole
    assert part_file(output, 2).stat().st_mtime_ns == kept


@pytest.mark.usefixtures("processes_for_all")
def test_unusable_row_in_a_process_is_named_and_leaves_nothing_half_written(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    codec = from_spec("int8").fit(unit(x))
    broken = x[:ROWS].copy()
    broken[17, 3] = np.inf
    np.save(shards / "3.npy", broken)
    with pytest.raises(FewbitsError, match=r"row 17 of 3\.npy has NaN, infinity"):
        encode(shards, tmp_path / "codes", method=codec, workers=2)
    assert not [name for name in files(tmp_path / "codes") if name.endswith(".tmp")]
    np.save(shards / "3.npy", x[3 * ROWS :])
    encoded = encode(shards, tmp_path / "codes", method=codec, workers=1)
    np.testing.assert_array_equal(
        np.concatenate([part["codes"] for part in encoded.parts]), codec.encode(unit(x))["codes"]
    )


def test_small_input_starts_no_process(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = pytest.fail
    monkeypatch.setattr(encode_module, "run_in_processes", lambda *given: fail("a process"))
    encode(shards, tmp_path / "codes", method="int8", workers=4)


@pytest.mark.usefixtures("processes_for_all")
def test_what_only_this_process_sees_starts_no_process(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (fewbits[cluster])")
    for file in shards.iterdir():
        fsspec.filesystem("memory").pipe(f"/workers/{file.name}", file.read_bytes())
    fail = pytest.fail
    monkeypatch.setattr(encode_module, "run_in_processes", lambda *given: fail("a process"))
    encode("memory://workers", tmp_path / "codes", method="int8", workers=2)


class Deadly:
    """A task that ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)


def test_worker_that_dies_is_said_in_one_line() -> None:
    says = r"a worker process died .* run the same command again to go on, with fewer --workers"
    with pytest.raises(FewbitsError, match=says) as caught:
        list(run_in_processes(max, [Deadly(), Deadly()], 2))
    assert "\n" not in str(caught.value)


def test_folder_that_a_worker_does_not_see_is_said(shards: Path, tmp_path: Path) -> None:
    task = encode_module.PartTask(
        str(tmp_path / "none"), 0, str(shards / "0.npy"), None, "0.npy", ROWS, "ip", 1
    )
    with pytest.raises(FewbitsError, match=r"is not seen by the worker on .*all machines share"):
        encode_part(task, Steps())


def test_shard_that_changes_while_it_is_encoded_is_said(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    encode(shards, tmp_path / "codes", method="int8")
    np.save(shards / "0.npy", x[:9])
    task = encode_module.PartTask(
        str(tmp_path / "codes"), 0, str(shards / "0.npy"), None, "0.npy", ROWS, "ip", 1
    )
    with pytest.raises(FewbitsError, match=r"0\.npy was changed while it was encoded"):
        encode_part(task, Steps())


SLOW = """
import sys
from fewbits.core import encode as module

if __name__ != "__main__":
    raise AssertionError("a worker ran the script of the user")
module.PROCESS_BYTES = 1
module.encode(sys.argv[1], sys.argv[2], method="turboquant", metric="ip", workers=2)
"""


@pytest.fixture
def large_shards(tmp_path: Path) -> Path:
    """Two small files, and two that take many seconds."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, rows in enumerate((300, 300, 2_000_000, 2_000_000)):  # all zeros, all holes
        np.lib.format.open_memmap(folder / f"{number}.npy", "w+", np.float16, (rows, 512)).flush()
    return folder


def start_slow(folder: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A running command that has finished two parts and is at work on the other two."""
    script, output = tmp_path / "script.py", tmp_path / "codes"
    script.write_text(SLOW)
    running = subprocess.Popen(
        [sys.executable, script, folder, output],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while len(list(output.glob(".part-0000[23].*.tmp"))) < 2 or not part_file(output, 1).exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return running, output


def wait_for_no_member(group: int) -> None:
    """Wait until no process of the group is left."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a worker goes on")


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as POSIX does")
def test_control_c_stops_all_workers_and_keeps_what_is_finished(
    large_shards: Path, tmp_path: Path
) -> None:
    running, output = start_slow(large_shards, tmp_path)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert said.decode().strip().endswith("KeyboardInterrupt")
    wait_for_no_member(running.pid)
    names = [CODEC_FILE, "part-00000.fewbits", "part-00001.fewbits"]
    assert sorted(files(output)) == names


@pytest.mark.skipif(os.name != "posix", reason="processes are killed as POSIX does")
def test_workers_leave_with_the_process_that_started_them(
    large_shards: Path, tmp_path: Path
) -> None:
    running, output = start_slow(large_shards, tmp_path)
    running.kill()
    running.communicate(timeout=60)
    wait_for_no_member(running.pid)
    assert not list(output.glob(".part-*.tmp"))
