"""What an installation without extras weighs, and how fast the command line starts."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import table

PROJECT = Path(__file__).parent.parent
ROUNDS = 7


def wheel_bytes() -> dict[str, int]:
    """Size of each wheel that installing fewbits without extras brings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        constraints = ["--constraint", str(PROJECT / "constraints.txt"), str(PROJECT)]
        subprocess.run(command + constraints, check=True, stderr=subprocess.DEVNULL)
        files = sorted(Path(folder).iterdir(), key=lambda file: -file.stat().st_size)
        return {file.name.split("-")[0]: file.stat().st_size for file in files}


def seconds(*arguments: str) -> float:
    """Median time of a whole process."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tables() -> str:
    sizes = wheel_bytes()
    heavy = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in list(sizes.items())[:5])
    start, bare = seconds("-m", "fewbits", "--help"), seconds("-c", "pass")
    rows = [
        ["wheels of `pip install fewbits`", f"{sum(sizes.values()) / 1e6:.0f} MB", heavy],
        ["`fewbits --help`", f"{start:.2f} s", f"{start / bare:.1f} × `python -c pass`"],
    ]
    return "\n".join(["## Installation and start\n", table(["what", "figure", "of it"], rows)])
