"""Peak memory of encoding a 4 GiB file. Needs Linux, whose kernel keeps the peak."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tables import table

ROWS, DIMS = 2_796_203, 384  # 4 GiB of float32
SPECS = ("int8", "pca-rag:dims=96+int8", "turboquant:bits=2", "additive-bits:bytes=24")
PROGRAM = """
import pathlib, re, sys, time
from fewbits import encode
start = time.perf_counter()
encode(sys.argv[1], sys.argv[2], method=sys.argv[3])
seconds = time.perf_counter() - start
# The process's own peak; that of getrusage starts from its parent's.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(int(peak[1]) / 1024, seconds)
"""


def write_large(path: Path) -> None:
    """A file of random unit vectors whose directions vary unequally, as embeddings do."""
    rng = np.random.default_rng(0)
    spread = (1 / np.sqrt(np.arange(1, DIMS + 1))).astype(np.float32)
    header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, DIMS)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, ROWS, 65_536):
            block = rng.standard_normal((min(65_536, ROWS - start), DIMS), dtype=np.float32)
            file.write((block * spread).data)


def tables() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "large.npy"
        write_large(source)
        for spec in SPECS:
            output = Path(folder) / "large.fewbits"
            command = [sys.executable, "-c", PROGRAM, str(source), str(output), spec]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak, seconds = map(float, done.stdout.split())
            size = source.stat().st_size
            rows.append(
                [
                    f"`{spec}`",
                    f"{peak:.0f} MB",
                    f"{size / 2**20 / peak:.1f}×",
                    f"{ROWS / seconds:,.0f}",
                ]
            )
            output.unlink()
    heads = ["method", "peak memory", "input file over peak", "vectors/s, fit and files included"]
    title = f"## Memory: encoding a {ROWS * DIMS * 4 / 2**30:.0f} GiB `.npy`\n"
    return "\n".join([title, table(heads, rows)])
