"""The command line: every command on small real files, and the process around it."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fewbits
from fewbits import cli
from fewbits.cli import main
from fewbits.core import catalogue
from fewbits.core.catalogue import find
from fewbits.core.examples import python_docs
from fewbits.core.reproduction import Reproduction, available, module_of
from fewbits.vectors.baselines import Int8

COMMANDS = (
    "compare",
    "encode",
    "decode",
    "export",
    "search",
    "info",
    "systems",
    "reproduce",
    "demo",
)
FEW = ("float16", "int8", "sign", "turboquant")
HEAVY = {"numpy", "faiss", "torch", "pyarrow", "matplotlib", "rich", "safetensors", "transformers"}
WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "accelerate"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, NoTorch())
from fewbits.cli import main
sys.exit(main())
"""

Vectors = tuple[np.ndarray, np.ndarray]
Succeed = Callable[..., str]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """(300, 64) passages and (20, 64) queries of the built-in example, cut to 64 dimensions."""
    example = python_docs()
    return example.vectors[:300, :64].copy(), example.queries[:20, :64].copy()


@pytest.fixture(autouse=True)
def folder(vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with ``docs.npy`` and ``queries.npy`` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    np.save("docs.npy", vectors[0])
    np.save("queries.npy", vectors[1])
    return tmp_path


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to run every codec of the catalogue."""
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: [find(name) for name in FEW])


@pytest.fixture
def succeed(capfd: pytest.CaptureFixture[str]) -> Succeed:
    """Runs a command that must succeed with nothing on standard error; gives what it prints."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def codes(succeed: Succeed) -> str:
    """An encoded collection that loses next to nothing."""
    succeed("encode", "docs.npy", "--method", "float16", "-o", "codes.fewbits")
    return "codes.fewbits"


def shards(vectors: Vectors) -> str:
    """A directory of two files, 200 and 100 rows."""
    Path("shards").mkdir()
    np.save("shards/a.npy", vectors[0][:200])
    np.save("shards/b.npy", vectors[0][200:])
    return "shards"


def best_rows(vectors: Vectors, k: int) -> list[list[int]]:
    """The true best `k` rows of each query by cosine."""
    docs, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
    return np.argsort(-(queries @ docs.T), axis=1)[:, :k].tolist()


def found(out: str) -> list[list[int]]:
    """The rows in what ``search --json`` printed."""
    return [json.loads(line)["rows"] for line in out.splitlines()]


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
    )


# -- compare -------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_methods")
def test_compare_prints_a_table_of_all_methods(succeed: Succeed) -> None:
    out = succeed("compare", "docs.npy", "--queries", "queries.npy")
    assert out.startswith("docs.npy: 300 × 64 float32, 256 bytes per item, cosine, 20 queries")
    rows = [line.replace("●", "").split() for line in out.splitlines()[3:]]
    sizes = {row[0]: row[1:3] for row in rows if len(row) > 2}
    assert sizes["float16"] == ["128", "2×"]
    assert {"int8", "sign", "turboquant:bits=2"} <= set(sizes)
    (best,) = [line for line in out.splitlines() if " float16 " in line]
    assert best.startswith(" ●")
    assert " 1.000 " in best


def test_compare_json_has_the_schema_that_is_promised(succeed: Succeed) -> None:
    out = succeed(
        "compare", "docs.npy", "--queries", "queries.npy", "--methods", "int8,sign", "--json"
    )
    comparison = json.loads(out)
    assert set(comparison) == {"input", "points", "left_out"}
    about = comparison["input"]
    assert about.pop("seconds") >= 0
    assert about == {
        "name": "docs.npy",
        "rows": 300,
        "rows_in_file": 300,
        "dims": 64,
        "dtype": "float32",
        "bytes_per_item": 256,
        "metric": "cosine",
        "queries": 20,
        "queries_from": "given",
    }
    small, large = comparison["points"]
    assert (small["method"], small["spec"], small["bytes_per_item"]) == ("sign", "sign", 8)
    assert (large["method"], large["bytes_per_item"], large["codec_bytes"]) == ("int8", 64, 512)
    assert (small["ratio"], large["ratio"]) == (32, 4)
    assert small["on_frontier"]
    assert large["on_frontier"]
    assert set(large["quality"]) == {"recall@1", "recall@10", "recall@100"}
    assert small["quality"]["recall@10"] < 0.9 < large["quality"]["recall@10"]
    for point in comparison["points"]:
        assert min(point["encode_per_second"], point["search_per_second"]) > 0
        assert point["fit_seconds"] >= 0


def test_compare_takes_names_and_specs_with_several_options(succeed: Succeed) -> None:
    methods = "pca-rag:dims=16,center=no, int8 ,rabitq:bits=2"
    points = json.loads(succeed("compare", "docs.npy", "--methods", methods, "--json"))["points"]
    assert {point["spec"]: point["bytes_per_item"] for point in points} == {
        "pca-rag:dims=16,center=no": 64,
        "int8": 64,
        "rabitq:bits=2": 36,
    }


def test_compare_holds_out_rows_where_there_are_no_queries(succeed: Succeed) -> None:
    options = ("--methods", "int8", "--rows", "100", "--metric", "l2", "--seed", "3", "--json")
    first, again = (json.loads(succeed("compare", "docs.npy", *options)) for _ in range(2))
    about = first["input"]
    assert (about["rows"], about["queries"], about["rows_in_file"]) == (90, 10, 300)
    assert (about["queries_from"], about["metric"]) == ("held-out rows", "l2")
    assert first["points"][0]["quality"] == again["points"][0]["quality"]


def test_compare_searches_for_chains(succeed: Succeed, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.core import chains
    from fewbits.core.catalogue import find

    monkeypatch.setattr(chains, "codecs", lambda room: [find("int8"), find("pca-rag")])
    given = ("compare", "docs.npy", "--queries", "queries.npy", "--search-chains", "16B")
    out = succeed(*given)
    assert "pca-rag:dims=16+int8" in out
    assert "chains tried: 2 on 300 rows" in out
    found = json.loads(succeed(*given, "--json"))
    assert [entry["spec"] for entry in found["tried"]] == [
        "pca-rag:dims=16+int8",
        "pca-rag:dims=8,dtype=float16",
    ]
    assert found["input"]["at_most"] == 16


@pytest.mark.parametrize("name", ["judged.txt", "judged.json"])
def test_compare_with_judgements_adds_ndcg(succeed: Succeed, vectors: Vectors, name: str) -> None:
    np.save("same.npy", vectors[0][:5])  # every row is its own answer
    Path("judged.txt").write_text("".join(f"{row} 0 {row} 1\n" for row in range(5)))
    Path("judged.json").write_text(json.dumps({str(row): {str(row): 1} for row in range(5)}))
    options = ("--queries", "same.npy", "--qrels", name, "--methods", "float16", "--json")
    (point,) = json.loads(succeed("compare", "docs.npy", *options))["points"]
    assert point["quality"]["ndcg@10"] == 1


def test_compare_writes_the_report_it_prints(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "int8,sign", "--report", "new/report", "--json"]
    assert main(["compare", "docs.npy", *options]) == 0
    out, err = capfd.readouterr()
    folder = Path("new/report")
    assert err == f"wrote {folder / 'report.html'} and {folder / 'recall.png'}\n"
    names = ["comparison.json", "recall.png", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(out)
    assert "docs.npy" in (folder / "report.html").read_text()


def test_compare_shows_its_table_even_where_the_report_cannot_be_written(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "docs.npy", "--methods", "int8", "--report", "docs.npy"]) == 2
    out, err = capfd.readouterr()
    assert " int8 " in out
    assert err.startswith("fewbits: cannot write docs.npy")


# -- encode --------------------------------------------------------------------------------


def test_encode_says_what_it_wrote(succeed: Succeed) -> None:
    out = succeed("encode", "docs.npy", "-o", "small.fewbits", "--method", "pca-rag:dims=16+int8")
    assert out == (
        "small.fewbits: 300 items by pca-rag:dims=16+int8, 16 bytes each (16.0 times smaller), "
        "codec 5,000 bytes\n"
    )
    # Payload and codec are really in the file, and little else is.
    assert 300 * 16 + 5000 < Path("small.fewbits").stat().st_size < 300 * 16 + 5000 + 4096


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("docs.npy", "docs.fewbits"),
        ("folder/docs.v2.parquet", "folder/docs.v2.fewbits"),
        ("no_suffix", "no_suffix.fewbits"),
        ("-", "stdin.fewbits"),
        ("example:python-docs", "python-docs.fewbits"),
        ("archive.d", "archive.d.fewbits"),
        ("archive.d/", "archive.d.fewbits"),
    ],
)
def test_output_is_named_after_the_input(given: str, name: str) -> None:
    Path("archive.d").mkdir()
    assert cli.default_output(given) == Path(name)


def test_encode_without_output_writes_beside_the_input(succeed: Succeed) -> None:
    out = succeed("encode", "docs.npy", "--method", "int8")
    assert out.startswith("docs.fewbits: 300 items by int8")
    assert len(fewbits.load("docs.fewbits")) == 300


def test_encode_reads_standard_input(succeed: Succeed, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(Path("docs.npy").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    succeed("encode", "-", "--method", "float16")
    encoded = fewbits.load("stdin.fewbits")
    assert encoded.source["name"] == "standard input"
    np.testing.assert_allclose(encoded.decode().mean(), np.load("docs.npy").mean(), atol=0.1)


def test_encode_reads_a_column_of_parquet(succeed: Succeed, vectors: Vectors) -> None:
    columns = {"title": vectors[0][:, :8].tolist(), "body": vectors[0].tolist()}
    pq.write_table(pa.table(columns), "docs.parquet")
    options = ("--method", "int8", "--column", "title", "--metric", "l2", "--json")
    about = json.loads(succeed("encode", "docs.parquet", *options))
    assert (about["dims"], about["made_from"], about["metric"]) == (8, "docs.parquet", "l2")


def test_encode_json_says_the_same_as_info(succeed: Succeed) -> None:
    about = json.loads(succeed("encode", "docs.npy", "--method", "pca-rag:dims=8", "--json"))
    assert about.pop("output") == "docs.fewbits"
    assert about == json.loads(succeed("info", "docs.fewbits", "--json"))
    assert about == {
        "method": "pca-rag:dims=8",
        "items": 300,
        "dims": 64,
        "metric": "cosine",
        "bytes_per_item": 32,
        "payload_bytes": 9600,
        "codec_bytes": fewbits.load("docs.fewbits").codec_bytes,
        "ratio": 8,
        "parts": 1,
        "made_from": "docs.npy",
        "digest": fewbits.load("docs.fewbits").codec.digest,
    }


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize(
    ("wish", "choice"),
    [
        (["--keep", "recall@10=0.95"], lambda compared: compared.cheapest(recall_at_10=0.95)),
        (["--keep", "recall@10=95%"], lambda compared: compared.cheapest(recall_at_10=0.95)),
        ([], lambda compared: compared.cheapest(recall_at_10=0.95)),
        (["--keep", "recall@1 = 50%"], lambda compared: compared.cheapest(recall_at_1=0.5)),
        (["--at-most", "48B"], lambda compared: compared.best(48)),
        (["--at-most", "48"], lambda compared: compared.best(48)),
        (["--ratio", "16x"], lambda compared: compared.best(16)),
        (["--ratio", "1.6E1"], lambda compared: compared.best(16)),
    ],
)
def test_encode_chooses_what_the_comparison_says(
    succeed: Succeed, wish: list[str], choice: Callable[[fewbits.Comparison], Any]
) -> None:
    options = ("--queries", "queries.npy", "--json")
    about = json.loads(succeed("encode", "docs.npy", *wish, *options))
    assert about["method"] == choice(fewbits.compare("docs.npy", "queries.npy")).spec


def test_encode_overwrites_only_when_told(succeed: Succeed, codes: str) -> None:
    assert main(["encode", "docs.npy", "-o", codes, "--method", "sign"]) == 2
    assert fewbits.load(codes).codec.spec == "float16"
    succeed("encode", "docs.npy", "-o", codes, "--method", "sign", "--overwrite")
    assert fewbits.load(codes).codec.spec == "sign"


def test_seed_chooses_the_rows_to_learn_from(
    succeed: Succeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.core.encode.FIT_BYTES", 1)  # a sample of 256 rows
    digests = [
        json.loads(succeed("encode", "docs.npy", "--method", "int8", *options))["digest"]
        for options in (
            ("--json", "-o", "0"),
            ("--seed", "0", "--json", "-o", "1"),
            ("--seed", "7", "--json", "-o", "2"),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("method", ["float16", "int8", "sign", "pca-rag:dims=8", "rabitq", "itq"])
def test_constant_columns_are_no_obstacle(succeed: Succeed, vectors: Vectors, method: str) -> None:
    x = vectors[0].copy()
    x[:, 32:] = 1
    np.save("constant.npy", x)
    succeed("encode", "constant.npy", "--method", method)
    succeed("decode", "constant.fewbits", "-o", "back.npy")
    assert np.isfinite(np.load("back.npy")).all()


@pytest.mark.parametrize("method", ["float16", "int8", "rabitq", "turboquant"])
def test_one_row_is_a_collection(succeed: Succeed, vectors: Vectors, method: str) -> None:
    np.save("one.npy", vectors[0][:1])
    succeed("encode", "one.npy", "--method", method)
    out = succeed("search", "one.fewbits", "--queries", "queries.npy", "-k", "1", "--json")
    assert found(out) == [[0]] * 20


def test_directory_of_shards_becomes_a_directory_of_parts(
    succeed: Succeed, vectors: Vectors
) -> None:
    out = succeed("encode", shards(vectors), "--method", "float16")
    assert out.startswith("shards.fewbits: 300 items by float16")
    names = ["codec.fewbits", "part-00000.fewbits", "part-00001.fewbits"]
    assert sorted(path.name for path in Path("shards.fewbits").iterdir()) == names
    assert json.loads(succeed("info", "shards.fewbits", "--json"))["parts"] == 2
    out = succeed("search", "shards.fewbits", "--queries", "queries.npy", "-k", "3", "--json")
    assert found(out) == best_rows(vectors, 3)
    succeed("decode", "shards.fewbits", "-o", "back.npy")
    unit = vectors[0] / np.linalg.norm(vectors[0], axis=1, keepdims=True)
    np.testing.assert_allclose(np.load("back.npy"), unit, atol=1e-3)


# -- decode, search and info ---------------------------------------------------------------


def test_decode_gives_the_vectors_back(succeed: Succeed, codes: str, vectors: Vectors) -> None:
    out = succeed("decode", codes, "--output", "back.npy")
    assert out == "back.npy: 300 vectors of 64 dimensions, float32\n"
    back = np.load("back.npy")
    assert (back.dtype, back.shape) == (np.float32, (300, 64))
    unit = vectors[0] / np.linalg.norm(vectors[0], axis=1, keepdims=True)
    np.testing.assert_allclose(back, unit, atol=1e-3)
    assert main(["decode", codes, "-o", "back.npy"]) == 2
    succeed("decode", codes, "-o", "back.npy", "--overwrite")


def test_search_finds_the_best_items(succeed: Succeed, codes: str, vectors: Vectors) -> None:
    lines = succeed("search", codes, "--queries", "queries.npy", "-k", "3").splitlines()
    for number, (line, rows) in enumerate(zip(lines, best_rows(vectors, 3), strict=True)):
        title, _, matches = line.partition(": ")
        assert title == f"query {number}"
        assert [int(match.partition(":")[0]) for match in matches.split()] == rows


def test_search_json_has_rows_and_falling_scores(succeed: Succeed, codes: str) -> None:
    out = succeed("search", codes, "--queries", "queries.npy", "--json")
    for line in out.splitlines():
        answer = json.loads(line)
        assert set(answer) == {"rows", "scores"}
        assert len(answer["rows"]) == len(answer["scores"]) == 10
        assert answer["scores"] == sorted(answer["scores"], reverse=True)


def test_rescoring_with_the_originals_is_exact(succeed: Succeed, vectors: Vectors) -> None:
    succeed("encode", "docs.npy", "--method", "sign", "-o", "coarse.fewbits")
    search = ("search", "coarse.fewbits", "--queries", "queries.npy", "-k", "10", "--json")
    exact = best_rows(vectors, 10)

    def hits(*rescore: str) -> int:
        rows = found(succeed(*search, *rescore))
        return sum(len(set(mine) & set(true)) for mine, true in zip(rows, exact, strict=True))

    coarse, decoded, original = hits(), hits("--rescore"), hits("--rescore", "docs.npy")
    # A hundred candidates of three hundred hold nearly all of the true ten.
    assert coarse < original
    assert decoded < original
    assert original >= 0.95 * 200
    docs, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
    first = json.loads(succeed(*search, "--rescore", "docs.npy").splitlines()[0])
    np.testing.assert_allclose(first["scores"], docs[first["rows"]] @ queries[0], atol=1e-5)


def test_search_reads_queries_from_a_column(succeed: Succeed, codes: str, vectors: Vectors) -> None:
    np.savez("many.npz", right=vectors[1], wrong=vectors[1][:, :8])
    out = succeed(
        "search", codes, "--queries", "many.npz", "--column", "right", "-k", "2", "--json"
    )
    assert found(out) == best_rows(vectors, 2)


def test_info_prints_every_fact(succeed: Succeed, codes: str) -> None:
    lines = dict(line.strip().split("  ", 1) for line in succeed("info", codes).splitlines())
    assert lines["method"] == "float16"
    assert lines["payload bytes"] == "38,400"
    assert lines["ratio"] == "2.0"
    assert lines["made from"] == "docs.npy"
    assert lines["digest"] == fewbits.load(codes).codec.digest
    assert len(lines) == 11


def test_names_of_files_cannot_steer_the_terminal(succeed: Succeed) -> None:
    name = "new\nline\x1b[31m"
    Path("docs.npy").rename(f"{name}.npy")
    shown = "new\N{REPLACEMENT CHARACTER}line\N{REPLACEMENT CHARACTER}[31m"
    out = succeed("encode", f"{name}.npy", "--method", "int8")
    assert out.startswith(f"{shown}.fewbits: ")
    assert f"made from  {shown}.npy\n" in succeed("info", f"{name}.fewbits")
    assert succeed("decode", f"{name}.fewbits", "-o", f"{name}2.npy").startswith(f"{shown}2.npy: ")


# -- systems -------------------------------------------------------------------------------


def test_systems_json_has_all_papers_with_a_computed_status(
    succeed: Succeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(succeed("systems", "--json"))
    papers = [row for row in rows if row["group"] == "paper"]
    assert len(papers) == 78
    (row,) = [row for row in rows if row["name"] == "pca-rag"]
    assert set(row) == {
        *("name", "title", "arxiv", "room", "kind", "summary", "path", "extra"),
        *("status", "group"),
    }
    assert row["status"] == "available"
    monkeypatch.setattr(catalogue, "installed", lambda module: False)
    assert {row["status"] for row in json.loads(succeed("systems", "--json"))} == {"planned"}


def test_systems_prints_every_name_and_what_it_needs(
    succeed: Succeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = catalogue.installed
    monkeypatch.setattr(catalogue, "installed", lambda name: name != "torch" and installed(name))
    lines = succeed("systems").splitlines()
    named = {line.split()[1] for line in lines if len(line.split()) > 3}
    assert {row.name for row in catalogue.everything()} <= named
    (line,) = [line for line in lines if line.startswith("vectors") and " bebr " in line]
    assert " needs fewbits[torch] " in line
    here = sum(row.status != "planned" for row in catalogue.systems())
    assert lines[-1].startswith(f"{here} of 78 papers are here")


# -- reproduce and demo --------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replaces every reproduction by a tiny one; collects which ones run, at which size."""
    runs: list[tuple[str, str]] = []

    def tiny(name: str) -> Callable[[str], Reproduction]:
        def run(size: str) -> Reproduction:
            runs.append((name, size))
            figures, baselines = {"recall": np.float32(0.75)}, {"recall of others": 0.5}
            holds = np.bool_(name != "bebr")
            reason = "" if holds else "not met: recall above 0.9"
            return Reproduction(name, "It finds more.", figures, baselines, holds, reason, "docs")

        return run

    for name in available():
        monkeypatch.setattr(f"{module_of(find(name))}.run", tiny(name))
    return runs


def test_reproduce_prints_claim_figures_and_verdict(
    succeed: Succeed, asked: list[tuple[str, str]]
) -> None:
    lines = succeed("reproduce", "pca-rag", "bebr", "--size", "quick").splitlines()
    assert asked == [("pca-rag", "quick"), ("bebr", "quick")]
    assert lines == [
        "pca-rag: holds (0.0 s)",
        "  claim: It finds more.",
        "  data: docs",
        "     figure  recall: 0.75",
        "   baseline  recall of others: 0.5",
        "bebr: does not hold here (0.0 s)",
        "  claim: It finds more.",
        "  data: docs",
        "     figure  recall: 0.75",
        "   baseline  recall of others: 0.5",
        "  not met: recall above 0.9",
    ]


def test_figure_that_is_no_number_is_printed_and_left_out_of_json(
    succeed: Succeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Reproduction("pca-rag", "It finds more.", {"recall": math.nan}, {}, False, "lost")
    monkeypatch.setattr(f"{module_of(find('pca-rag'))}.run", lambda size: lost)
    assert "     figure  recall: nan\n" in succeed("reproduce", "pca-rag")
    (result,) = json.loads(succeed("reproduce", "pca-rag", "--json"))
    assert result["figures"] == {"recall": None}


def test_reproduce_all_runs_all_there_are(succeed: Succeed, asked: list[tuple[str, str]]) -> None:
    results = json.loads(succeed("reproduce", "--all", "--json"))
    assert asked == [(name, "small") for name in available()]
    assert [result["system"] for result in results] == available()
    assert {result["system"] for result in results if not result["holds"]} == {"bebr"}
    assert results[0]["figures"] == {"recall": 0.75}


def test_reproduce_checks_every_name_before_it_runs_the_first(
    capfd: pytest.CaptureFixture[str], asked: list[tuple[str, str]]
) -> None:
    assert main(["reproduce", "pca-rag", "muvra"]) == 2
    assert asked == []
    assert "did you mean 'muvera'" in capfd.readouterr().err


def test_demo_command_passes_its_folder_on(
    succeed: Succeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("fewbits.demo.demo", folders.append)
    succeed("demo")
    succeed("demo", "-o", "else/where")
    assert folders == [Path("demo"), Path("else/where")]


# -- interruptions -------------------------------------------------------------------------


def press_control_c_at_the(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt this process when a block of rows is encoded for the `call`-th time."""
    encode, calls = Int8._encode, []

    def interrupted(codec: Int8, x: np.ndarray) -> dict[str, np.ndarray]:
        calls.append(len(x))
        if sum(rows > 1 for rows in calls) == call:
            signal.raise_signal(signal.SIGINT)
        return encode(codec, x)

    monkeypatch.setattr(Int8, "_encode", interrupted)


def test_control_c_takes_one_line_and_leaves_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    press_control_c_at_the(1, monkeypatch)
    assert main(["compare", "docs.npy", "--methods", "int8"]) == 130
    assert capfd.readouterr() == ("", "fewbits: interrupted\n")
    press_control_c_at_the(1, monkeypatch)
    assert main(["encode", "docs.npy", "--method", "int8"]) == 130
    assert capfd.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["docs.npy", "queries.npy"]


def test_interrupted_directory_is_gone_on_with(
    succeed: Succeed,
    vectors: Vectors,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("encode", shards(vectors), "--method", "int8")
    with monkeypatch.context() as patch:
        press_control_c_at_the(2, patch)
        assert main(command) == 130
    assert "finished parts of a directory are kept, run it again" in capfd.readouterr().err
    first = Path("shards.fewbits/part-00000.fewbits")
    written = first.stat().st_mtime_ns
    assert not Path("shards.fewbits/part-00001.fewbits").exists()
    succeed(*command)
    assert first.stat().st_mtime_ns == written
    assert len(fewbits.load("shards.fewbits")) == 300


def test_out_of_memory_takes_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Int8, "_fit", too_large)
    assert main(["compare", "docs.npy", "--methods", "int8"]) == 2
    assert capfd.readouterr().err.startswith("fewbits: out of memory; try a smaller --rows")


# -- the process ---------------------------------------------------------------------------


def test_version_and_help_exit_with_zero(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capfd.readouterr() == (f"fewbits {fewbits.__version__}\n", "")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capfd.readouterr().out
    assert all(f"\n    {command}" in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_explained(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert capfd.readouterr().out.startswith(f"usage: fewbits {command}")
    parsers = next(
        action.choices
        for action in cli.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert all(action.help for action in parsers[command]._actions)


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["encode", "--help"], set()),
        (["systems"], {"rich"}),
        (["systems", "--json"], set()),
    ],
)
def test_light_commands_import_no_heavy_module(arguments: list[str], allowed: set[str]) -> None:
    program = (
        "import sys\nfrom fewbits.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    done = process("-c", program)
    assert done.stdout
    assert done.stderr == f"{sorted(allowed)}\n"


def test_module_runs_as_a_program() -> None:
    done = process("-m", "fewbits", "info", "missing.fewbits")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fewbits: there is no file missing.fewbits\n"


def test_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from fewbits.cli import main; sys.exit(main(['systems', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_standard_output_takes_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fewbits", "systems", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (2, "fewbits: No space left on device\n")


def test_closed_standard_output_is_no_error() -> None:
    done = process("-m", "fewbits", "systems", "--json", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_terminal_without_unicode_gets_question_marks(succeed: Succeed) -> None:
    Path("docs.npy").rename("größe.npy")
    succeed("encode", "größe.npy", "--method", "int8", "-o", "codes.fewbits")
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (["info", "codes.fewbits"], ["systems"]):
        done = process("-m", "fewbits", *arguments, env=plain)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
    done = process("-m", "fewbits", "info", "codes.fewbits", env=plain)
    assert "made from  gr??e.npy" in done.stdout


# -- without torch -------------------------------------------------------------------------


def test_core_works_without_torch(vectors: Vectors) -> None:
    def run(*arguments: str) -> str:
        done = process("-c", WITHOUT_TORCH, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    run("encode", "docs.npy", "--method", "pca-rag:dims=32", "-o", "codes.fewbits")
    search = ("search", "codes.fewbits", "--queries", "queries.npy", "-k", "5", "--json")
    assert len(found(run(*search))) == 20
    np.save("some.npy", vectors[0][:100, :32])
    comparison = json.loads(run("compare", "some.npy", "--json"))
    assert {"float16", "rabitq", "pca-rag:dims=16+int8"} <= {
        point["spec"] for point in comparison["points"]
    }
    needs = {row["method"]: row["why"] for row in comparison["left_out"]}
    assert needs["bebr"] == "needs torch; pip install 'fewbits[torch]'"


def test_what_needs_torch_says_so() -> None:
    done = process("-c", WITHOUT_TORCH, "encode", "docs.npy", "--method", "bebr")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fewbits: bebr needs torch; install with: pip install 'fewbits[torch]'\n"
    done = process("-c", WITHOUT_TORCH, "reproduce", "pca-rag", "bebr", "--size", "quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'fewbits[torch]'" in done.stderr
