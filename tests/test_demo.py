"""The demo, from the comparison to the report, on a piece of the built-in example."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fewbits
from fewbits import demo
from fewbits.core import examples
from fewbits.core.catalogue import find

PASSAGES = 300


@pytest.fixture
def small_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first passages, the questions without a known answer and a few more; few methods.

    Returns the folder to write to.
    """
    passages, questions = tmp_path / "passages.parquet", tmp_path / "questions.parquet"
    pq.write_table(pq.read_table(examples.python_docs_path()).slice(0, PASSAGES), passages)
    asked = pq.read_table(examples.python_docs_queries_path())
    by_hand = np.flatnonzero(asked["answer"].to_numpy() < 0)
    few = pa.concat_tables([asked.slice(0, 20), asked.take(by_hand[:3])])
    pq.write_table(few, questions)
    monkeypatch.setattr(examples, "python_docs_path", lambda: passages)
    monkeypatch.setattr(examples, "python_docs_queries_path", lambda: questions)
    methods = [find("int8"), find("sign"), find("turboquant")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: methods)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "new" / "demo"


def test_demo_compares_chooses_encodes_searches_decodes_and_reports(
    small_example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.demo(small_example)
    out, err = capsys.readouterr()
    assert err == ""
    example = examples.python_docs()
    assert out.startswith("300 passages of Python's documentation, 384 dimensions, 23 queries\n")
    assert " turboquant:bits=2 " in out

    comparison = json.loads((small_example / "comparison.json").read_text())
    enough = [point for point in comparison["points"] if point["quality"]["recall@10"] >= demo.KEEP]
    cheapest = min(enough, key=lambda point: point["bytes_per_item"])
    assert f"The cheapest that keeps recall@10 at 0.9: {cheapest['spec']}\n" in out

    encoded = fewbits.load(small_example / "python-docs.fewbits")
    assert encoded.codec.spec == cheapest["spec"]
    assert f"{encoded.nbytes:,} bytes instead of {PASSAGES * 384 * 2:,}" in out
    rows = encoded.search(example.queries[-3:], k=3)[1]
    for question, found in zip(example.query_texts[-3:], rows, strict=True):
        answers = out.partition(f"\n  {question}\n")[2].splitlines()[:3]
        assert [line.split(":")[0].strip() for line in answers] == [
            example.ids[row].split(":")[0] for row in found
        ]
    cosine = float(out.partition("mean cosine with the originals ")[2].split()[0])
    assert 0.9 < cosine < 1
    page, picture = small_example / "report.html", small_example / "recall.png"
    assert out.endswith(f"The report: {page} and {picture}\n")
    assert page.exists()
    assert picture.exists()


def test_demo_may_run_again(small_example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.demo(small_example)
    first = capsys.readouterr().out
    before = sorted(path.name for path in small_example.iterdir())
    demo.demo(small_example)
    assert sorted(path.name for path in small_example.iterdir()) == before
    chosen = "The cheapest that keeps"
    assert capsys.readouterr().out.partition(chosen)[2] == first.partition(chosen)[2]
