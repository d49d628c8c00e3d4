"""The commands on patterns, URLs, many workers and Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fewbits import cli
from fewbits.cli import default_output, main


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``shards/`` with two files of 30 rows, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    folder.mkdir()
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    np.save(folder / "a.npy", x[:30])
    np.save(folder / "b.npy", x[30:])
    return folder


def test_pattern_is_encoded_beside_its_folder(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", "shards/*.npy", "--method", "sign", "--workers", "2"]) == 0
    assert capsys.readouterr().out.startswith("shards.fewbits: 60 items by sign, 1 bytes each")
    assert len(list(Path("shards.fewbits").glob("part-*.fewbits"))) == 2


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("shards/*.npy", "shards.fewbits"),
        ("file://{folder}/shards", "{folder}/shards.fewbits"),
        ("s3://bucket/deep/folder/", "folder.fewbits"),
        ("s3://bucket/deep/*.parquet", "deep.fewbits"),
        ("s3://bucket/deep/docs.parquet", "docs.fewbits"),
        ("https://host/docs.npy?token=1", "docs.fewbits"),
    ],
)
def test_output_is_named_after_the_input(shards: Path, given: str, output: str) -> None:
    folder = str(shards.parent)
    assert default_output(given.format(folder=folder)) == Path(output.format(folder=folder))


def test_pattern_without_a_folder_needs_an_output(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shards)
    assert main(["encode", "*.npy", "--method", "sign"]) == 2
    assert "pass --output" in capsys.readouterr().err


def test_url_is_encoded(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (fewbits[cluster])")
    for file in shards.iterdir():
        fsspec.filesystem("memory").pipe(f"/cli/docs/{file.name}", file.read_bytes())
    assert main(["encode", "memory://cli/docs/", "--method", "sign"]) == 0
    assert capsys.readouterr().out.startswith("docs.fewbits: 60 items by sign")


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_workers_must_be_a_number(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["encode", "docs.npy", "--workers", workers])
    assert caught.value.code == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_ray_is_asked_for_by_name(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["encode", "shards", "--method", "sign", "--engine", "ray"]) == 2
    assert main(["compare", "shards", "--methods", "sign", "--engine", "ray"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["fewbits: this needs ray; install it with: pip install 'fewbits[cluster]'"] * 2
    assert main(["encode", "shards/a.npy", "--method", "sign", "--engine", "ray"]) == 2
    assert "encodes shards, but a.npy is one file" in capsys.readouterr().err


def test_interrupted_run_says_what_is_kept(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_encode", interrupted)
    assert main(["encode", "shards", "--method", "sign"]) == 130
    assert "finished parts of a directory are kept" in capsys.readouterr().err
