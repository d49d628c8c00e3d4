"""The command ``export``: collections and queries into stores, and what it says."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

import fewbits
from fewbits.cli import STORES, main
from fewbits.core import export as export_module
from fewbits.core.examples import python_docs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with codes of 300 passages and 20 queries in it."""
    monkeypatch.chdir(tmp_path)
    example = python_docs()
    fewbits.encode(example.vectors[:300, :64], "docs.fewbits", method="sign")
    np.save("questions.npy", example.queries[:20, :64])
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main(["export", *arguments])
    return status, *capfd.readouterr()


def test_the_command_line_knows_every_store() -> None:
    assert STORES == export_module.STORES


def test_an_index_of_faiss_takes_raw_queries(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "docs.fewbits", "--to", "faiss", "-o", "docs.faiss")
    size = Path("docs.faiss").stat().st_size
    assert (status, err) == (0, "")
    assert out == f"docs.faiss: 300 items for faiss, 8 bytes each; {size:,} bytes on disk\n"
    assert faiss.read_index("docs.faiss").search(np.load("questions.npy"), 3)[1].shape == (20, 3)


def test_the_next_command_is_shown_where_queries_need_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capfd, "docs.fewbits", "--to", "npy", "-o", "docs-bits.npy")
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("docs-bits.npy: 300 items for npy, 64 × bits each, compared by hamming")
    words = second.split()[1:]  # without "queries:"
    assert words[:2] == ["fewbits", "export"]
    words = [{"FILE": "questions.npy", "FILE.npy": "asked.npy"}.get(word, word) for word in words]
    assert run(capfd, *words[2:]) == (0, "asked.npy: queries for npy\n", "")
    assert np.load("asked.npy").shape == (20, 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("docs.fewbits", "--to", "redis", "-o", "x"), "invalid choice: 'redis'"),
        (("docs.fewbits", "--to", "npy", "-o", "x.faiss"), "name the output x.npy"),
        (("none.fewbits", "--to", "npy", "-o", "x.npy"), "there is no file none.fewbits"),
        (("questions.npy", "--to", "npy", "-o", "x.npy"), "not a .fewbits file"),
        (("docs.fewbits", "--to", "npy", "-o", "questions.npy"), "exists already"),
        (
            ("docs.fewbits", "--to", "npy", "-o", "x.npy", "--queries", "docs.fewbits"),
            "not a kind of file",
        ),
        (("docs.fewbits", "--to", "npy"), "required: -o/--output"),
    ],
)
def test_mistakes_take_one_line(
    arguments: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    capfd.readouterr()
    try:
        status = main(["export", *arguments])
    except SystemExit as end:
        status = int(str(end.code))
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert sorted(file.name for file in folder.iterdir()) == ["docs.fewbits", "questions.npy"]
