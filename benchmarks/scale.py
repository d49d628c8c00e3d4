"""Shards on one process, all cores and Ray; and ten million vectors in one file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from tables import table

DIMS = 128
SHARDS, SHARD_ROWS = 8, 250_000  # 1 GB of float32 together
SHARD_SPECS = ("pca-rag:dims=64+int8", "turboquant:bits=2")
ENGINES = {
    "one process": {"workers": 1},
    "all cores": {},
    "Ray, started for it": {"engine": "ray"},
}
ROWS = 10_000_000  # 5.1 GB of float32
SPECS = ("sign", "pca-rag:dims=64+int8", "turboquant:bits=2")
CENTRES = 1_000
PROGRAM = """
import json, sys, time
from fewbits import encode
start = time.perf_counter()
encode(sys.argv[1], sys.argv[2], method=sys.argv[3], **json.loads(sys.argv[4]))
print(time.perf_counter() - start)
"""


def blocks(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Vectors around centres whose directions vary unequally, as embeddings do."""
    spread = (1 / np.sqrt(np.arange(1, DIMS + 1))).astype(np.float32)
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIMS), dtype=np.float32) * spread
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 65_536):
        count = min(65_536, rows - start)
        noise = 0.5 * spread * rng.standard_normal((count, DIMS), dtype=np.float32)
        yield centres[rng.integers(CENTRES, size=count)] + noise


def write(path: Path, rows: int, seed: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, DIMS)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks(rows, seed):
            file.write(block.data)


class Watch(threading.Thread):
    """The largest resident memory that any process of a command has had, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peaks = psutil.Process(pid), dict[int, float]()

    def run(self) -> None:
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            try:
                for one in [self.root, *self.root.children(recursive=True)]:
                    self.look(one.pid)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)

    def look(self, pid: int) -> None:
        """Keep the high-water mark of a process that works, not of those that serve Ray."""
        command = Path(f"/proc/{pid}/cmdline").read_bytes() if psutil.pid_exists(pid) else b""
        if pid == self.root.pid or b"ray::Map" in command or b"spawn_main" in command:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
            self.peaks[pid] = max(peak / 1024, self.peaks.get(pid, 0))


def measure(source: Path, spec: str, options: str) -> tuple[float, float, float, dict[str, bytes]]:
    """Seconds, peak MB of the command and of its largest worker, and the bytes it wrote."""
    output = source.with_name("codes.fewbits")
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), spec, options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(running.pid)
    watch.start()
    said, _ = running.communicate()
    watch.join()
    if running.returncode:
        raise SystemExit(f"{spec} failed")
    own = watch.peaks.pop(running.pid)
    written = {f.name: f.read_bytes() for f in output.glob("part-*")} if output.is_dir() else {}
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return float(said), own, max(watch.peaks.values(), default=own), written


def shards_table(folder: Path) -> str:
    shards = folder / "shards"
    shards.mkdir()
    for number in range(SHARDS):
        write(shards / f"{number:03d}.npy", SHARD_ROWS, number)
    rows = []
    for spec in SHARD_SPECS:
        first: tuple[float, dict[str, bytes]] | None = None
        for engine, options in ENGINES.items():
            seconds, own, worker, written = measure(shards, spec, json.dumps(options))
            first = first or (seconds, written)
            if written != first[1]:
                raise SystemExit(f"{spec}: {engine} wrote other bytes")
            rows.append(
                [
                    f"`{spec}`",
                    engine,
                    f"{SHARDS * SHARD_ROWS / seconds:,.0f}",
                    f"{first[0] / seconds:.2f}×",
                    f"{own:,.0f} MB",
                    f"{worker:,.0f} MB",
                ]
            )
    heads = ["method", "by", "vectors/s", "against one", "peak of the command", "of a worker"]
    title = (
        f"{SHARDS} shards of {SHARD_ROWS:,} × {DIMS} float32, learning, files and the start of "
        "processes included. The bytes are the same.\n"
    )
    return "\n".join([title, table(heads, rows)])


def file_table(folder: Path) -> str:
    source = folder / "large.npy"
    write(source, ROWS, 0)
    rows = []
    for spec in SPECS:
        seconds, own, _, _ = measure(source, spec, "{}")
        size = source.stat().st_size / 2**20
        rows.append([f"`{spec}`", f"{ROWS / seconds:,.0f}", f"{own:,.0f} MB", f"{size / own:.0f}×"])
    heads = ["method", "vectors/s", "peak memory", "input file over peak"]
    title = f"One file of {ROWS:,} × {DIMS} float32 ({ROWS * DIMS * 4 / 1e9:.1f} GB), all cores.\n"
    return "\n".join([title, table(heads, rows)])


def tables() -> str:
    made = [f"## Scale: shards, and {ROWS / 1e6:.0f} million vectors on {os.cpu_count()} cores\n"]
    for part in (shards_table, file_table):
        with tempfile.TemporaryDirectory() as folder:
            made += [part(Path(folder)), ""]
    return "\n".join(made).rstrip()


if __name__ == "__main__":
    print(tables())
