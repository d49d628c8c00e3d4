"""Exports into real stores: what is in them, what they find, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

import fewbits
from fewbits.core import export as export_module
from fewbits.core.collection import Encoded
from fewbits.core.errors import FewbitsError, MissingExtraError
from fewbits.core.examples import python_docs
from fewbits.core.export import FILES, STORES, Exported, export, export_queries, store_queries
from fewbits.core.stores import lancedb_store
from fewbits.primitives.bits import unpack
from fewbits.primitives.hamming import hamming_search
from fewbits.primitives.ragged import Ragged
from fewbits.primitives.retrieval import overlap

ROWS, DIMS, K = 900, 48, 10
LIBRARIES = {"lancedb": "lancedb", "qdrant": "qdrant_edge"}
EXACT = ("faiss", "lancedb", "parquet", "npy")
"""Stores that compare all rows, as long as there are few."""

Vectors = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """Passages and queries of the built-in example, cut to 48 dimensions; not of unit length."""
    example = python_docs()
    scale = np.linspace(0.5, 2, ROWS)[:, None].astype(np.float32)
    return example.vectors[:ROWS, :DIMS] * scale, example.queries[:30, :DIMS] * 3


def encoded_by(method: str, vectors: Vectors, metric: str = "cosine") -> Encoded:
    return fewbits.encode(vectors[0], method=method, metric=metric)


def place(to: str, folder: Path) -> Path:
    return folder / (f"out.{to}" if to in FILES else f"out-{to}")


def exported(encoded: Encoded, to: str, folder: Path, **options: Any) -> Exported:
    if to in LIBRARIES:
        pytest.importorskip(LIBRARIES[to])
    return export(encoded, to, place(to, folder), **options)


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# -- what stores find ----------------------------------------------------------------------


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize(
    ("method", "metric"),
    [
        ("float16", "l2"),
        ("int8", "cosine"),
        ("pca-rag:dims=16", "l2"),
        ("pca-rag:dims=16+int8", "ip"),
        ("opq:bytes=8,rounds=2", "cosine"),
        ("pca-rag:dims=24+turboquant", "cosine"),
    ],
)
def test_exact_stores_find_what_the_codes_find(
    to: str, method: str, metric: str, vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by(method, vectors, metric)
    out = exported(encoded, to, tmp_path)
    scores, rows = out.search(vectors[1], K)
    assert overlap(rows, encoded.search(vectors[1], K)[1], K) > 0.99
    assert rows.shape == scores.shape == (30, K)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    assert left(tmp_path) == [out.path.name]
    assert len(out) == ROWS


@pytest.mark.parametrize(
    ("method", "metric", "least"),
    [
        ("float16", "l2", 0.99),
        ("int8", "cosine", 0.97),
        ("pca-rag:dims=16+int8", "cosine", 0.9),
        ("itq:bits=40", "cosine", 0.95),
        ("opq:bytes=8,rounds=2", "ip", 0.99),
    ],
)
def test_qdrant_finds_what_the_codes_find_up_to_its_own_quantization(
    method: str, metric: str, least: float, vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by(method, vectors, metric)
    scores, rows = exported(encoded, "qdrant", tmp_path).search(vectors[1], K)
    assert overlap(rows, encoded.search(vectors[1], K)[1], K) > least
    assert (np.diff(scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("to", ["lancedb", "parquet", "npy"])
@pytest.mark.parametrize("method", ["itq:bits=20", "pca-rag:dims=16+sign"])
def test_bits_are_searched_by_their_hamming_distance(
    to: str, method: str, vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by(method, vectors)
    out = exported(encoded, to, tmp_path)
    asked = out.store_queries(vectors[1])
    distances, _ = hamming_search(asked, encoded.parts[0]["bits"], K)
    scores, rows = out.search(vectors[1], K)
    np.testing.assert_array_equal(-scores, distances)
    apart = np.bitwise_count(asked[:, None] ^ encoded.parts[0]["bits"][rows]).sum(axis=2)
    np.testing.assert_array_equal(apart, distances)
    assert not out.raw_queries


def test_bits_in_faiss_are_searched_with_float_queries(vectors: Vectors, tmp_path: Path) -> None:
    encoded = encoded_by("itq:bits=20", vectors)
    out = exported(encoded, "faiss", tmp_path)
    assert out.raw_queries
    assert out.holds == "3 bytes each"
    assert overlap(out.search(vectors[1], K)[1], encoded.search(vectors[1], K)[1], K) > 0.99


def test_sets_of_vectors_are_exported_as_their_encodings(tmp_path: Path, vectors: Vectors) -> None:
    sets = Ragged(vectors[0], np.arange(0, ROWS + 1, 3))
    asked = Ragged(vectors[1], np.arange(0, 31, 3))
    encoded = fewbits.encode(sets, method="muvera:repetitions=3,bits=2")
    for to in EXACT:
        out = exported(encoded, to, tmp_path)
        assert overlap(out.search(asked, K)[1], encoded.search(asked, K)[1], K) > 0.99
        assert not out.raw_queries


# -- what is in the stores, read without fewbits -------------------------------------------


def test_raw_queries_search_the_faiss_file_by_themselves(vectors: Vectors, tmp_path: Path) -> None:
    encoded = encoded_by("pca-rag:dims=16+int8", vectors)
    index = faiss.read_index(str(exported(encoded, "faiss", tmp_path).path))
    assert (index.d, index.ntotal) == (DIMS, ROWS)
    scores, rows = index.search(vectors[1], K)
    truth = encoded.search(vectors[1], K)
    assert overlap(rows, truth[1], K) > 0.99
    again, _ = index.search(vectors[1] * 7, K)  # scaled to unit length first
    np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-5)
    inner = faiss.downcast_index(faiss.downcast_index(index).index)
    codes = faiss.vector_to_array(inner.codes).reshape(ROWS, 16)
    np.testing.assert_array_equal(codes, encoded.parts[0]["codes"])


def test_a_lancedb_table_has_ids_bits_and_where_they_come_from(
    vectors: Vectors, tmp_path: Path
) -> None:
    lancedb = pytest.importorskip("lancedb")
    encoded = encoded_by("sign", vectors)
    path = exported(encoded, "lancedb", tmp_path).path
    table = lancedb.connect(path).open_table("items")
    data = table.to_arrow()
    np.testing.assert_array_equal(data["id"].to_numpy(), np.arange(ROWS))
    bits = np.stack(data["vector"].to_numpy())
    np.testing.assert_array_equal(bits, encoded.parts[0]["bits"])
    about = json.loads((path / "fewbits.json").read_text("utf-8"))
    assert about["digest"] == encoded.codec.digest
    assert about["spec"] == "sign"
    assert about["compared by"] == "hamming"


@pytest.mark.parametrize(("method", "index"), [("sign", "IvfFlat"), ("int8", "IvfSq")])
def test_many_rows_get_an_index_in_lancedb(
    method: str, index: str, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lancedb = pytest.importorskip("lancedb")
    monkeypatch.setattr(lancedb_store, "INDEX_ROWS", ROWS)
    encoded = encoded_by(method, vectors)
    out = exported(encoded, "lancedb", tmp_path)
    (found,) = lancedb.connect(out.path).open_table("items").list_indices()
    assert (found.index_type, found.num_indexed_rows) == (index, ROWS)
    if method == "int8":
        truth = encoded.search(vectors[1], K)[1]
        assert overlap(out.search(vectors[1], K)[1], truth, K) > 0.95


def test_a_qdrant_shard_has_signs_and_binary_quantization(vectors: Vectors, tmp_path: Path) -> None:
    edge = pytest.importorskip("qdrant_edge")
    encoded = encoded_by("itq:bits=40", vectors)
    path = exported(encoded, "qdrant", tmp_path).path
    shard = edge.EdgeShard.load(str(path))
    assert shard.count(edge.CountRequest()) == ROWS
    config = json.loads((path / "edge_config.json").read_text("utf-8"))["vectors"][""]
    assert config["quantization_config"] == {"binary": {"query_encoding": "scalar8bits"}}
    assert config["datatype"] == "float16"
    record = shard.retrieve([5], with_payload=False, with_vector=True)[0]
    signs = unpack(encoded.parts[0]["bits"][5:6], 40, 1)[0] * 2.0 - 1
    np.testing.assert_array_equal(record.vector, signs)
    shard.close()


@pytest.mark.parametrize(
    ("method", "dtype", "width"),
    [
        ("sign", "uint8", 6),
        ("int8", "uint8", 48),
        ("float16", "float16", 48),
        ("pq:bytes=6", "float32", 48),
    ],
)
def test_files_hold_the_same_array_and_few_bytes(
    method: str, dtype: str, width: int, vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by(method, vectors)
    array = np.load(exported(encoded, "npy", tmp_path).path)
    assert (array.shape, array.dtype.name) == ((ROWS, width), dtype)
    out = exported(encoded, "parquet", tmp_path)
    table = pq.read_table(out.path)
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), array)
    np.testing.assert_array_equal(table["id"].to_numpy(), np.arange(ROWS))
    assert table.schema.metadata[b"fewbits.digest"].decode() == encoded.codec.digest
    assert table.schema.metadata[b"fewbits.spec"].decode() == encoded.codec.spec
    assert out.nbytes < array.nbytes * 1.2 + 8 * ROWS + 10_000
    assert fewbits.encode(out.path, method="float16").source["rows"] == ROWS  # read as vectors


def test_blocks_and_parts_are_joined_in_order(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded_by("int8", vectors)
    (code,) = whole.parts
    cuts = (slice(0, 100), slice(100, 101), slice(101, ROWS))
    parts = Encoded(whole.codec, [code.take(cut) for cut in cuts], "cosine", whole.source)
    monkeypatch.setattr(export_module, "BLOCK_BYTES", 4 * DIMS * 70)
    for to in STORES:
        (tmp_path / to).mkdir()
        first, second = exported(whole, to, tmp_path), exported(parts, to, tmp_path / to)
        np.testing.assert_array_equal(
            first.search(vectors[1], K)[1], second.search(vectors[1], K)[1]
        )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), code["codes"])
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "out.npy"), code["codes"])


# -- queries -------------------------------------------------------------------------------


def test_queries_are_scaled_and_turned_into_what_the_store_compares(
    vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by("pca-rag:dims=16+sign", vectors)
    unit = vectors[1] / np.linalg.norm(vectors[1], axis=1, keepdims=True)
    bits = store_queries(encoded, vectors[1], "npy")
    assert (bits.shape, bits.dtype) == ((30, 2), np.uint8)
    expected = encoded.codec.stored().queries
    assert expected is not None
    np.testing.assert_array_equal(bits, expected(unit))
    np.testing.assert_allclose(store_queries(encoded, vectors[1], "faiss"), unit, rtol=1e-6)
    path = export_queries(encoded, vectors[1], "npy", tmp_path / "new" / "q.npy")
    np.testing.assert_array_equal(np.load(path), bits)


def test_queries_and_codes_may_be_files(vectors: Vectors, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", vectors[1])
    fewbits.encode(vectors[0], tmp_path / "x.fewbits", method="sign")
    bits = store_queries(tmp_path / "x.fewbits", str(tmp_path / "q.npy"), "parquet")
    out = export(str(tmp_path / "x.fewbits"), "npy", tmp_path / "x.npy")
    np.testing.assert_array_equal(out.store_queries(vectors[1]), bits)


@pytest.mark.parametrize(
    "queries", [np.ones((3, DIMS + 1)), np.full((3, DIMS), np.nan), np.zeros((3, DIMS))]
)
def test_queries_that_do_not_fit_are_refused(
    queries: np.ndarray, vectors: Vectors, tmp_path: Path
) -> None:
    encoded = encoded_by("sign", vectors)
    with pytest.raises(FewbitsError):
        store_queries(encoded, queries, "npy")
    with pytest.raises(FewbitsError):
        export_queries(encoded, queries, "npy", tmp_path / "q.npy")
    assert left(tmp_path) == []


def test_one_row_can_be_exported_and_found(vectors: Vectors, tmp_path: Path) -> None:
    codec = encoded_by("int8", vectors).codec
    encoded = fewbits.encode(vectors[0][:1], method=codec)
    for to in STORES:
        assert exported(encoded, to, tmp_path).search(vectors[1], 1)[1].tolist() == [[0]] * 30


# -- what is refused, and what is left behind ----------------------------------------------


@pytest.mark.parametrize("to", STORES)
def test_an_existing_output_is_only_replaced_on_request(
    to: str, vectors: Vectors, tmp_path: Path
) -> None:
    exported(encoded_by("int8", vectors), to, tmp_path)
    other = fewbits.encode(vectors[0][:50], method="float16")
    with pytest.raises(FewbitsError, match="exists already"):
        exported(other, to, tmp_path)
    out = exported(other, to, tmp_path, overwrite=True)
    assert out.search(vectors[1], K)[1].max() < 50
    assert left(tmp_path) == [out.path.name]


def test_folders_and_files_of_others_are_never_replaced(vectors: Vectors, tmp_path: Path) -> None:
    encoded = encoded_by("sign", vectors)
    (tmp_path / "mine.npy").mkdir()
    (tmp_path / "mine.npy" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for to in ("lancedb", "qdrant"):
        pytest.importorskip(LIBRARIES[to])
        with pytest.raises(FewbitsError, match="did not export"):
            export(encoded, to, tmp_path / "mine.npy", overwrite=True)
        with pytest.raises(FewbitsError, match="takes a folder"):
            export(encoded, to, tmp_path / "file", overwrite=True)
    with pytest.raises(FewbitsError, match="did not export"):
        export(encoded, "npy", tmp_path / "mine.npy", overwrite=True)
    assert (tmp_path / "mine.npy" / "letter.txt").read_text() == "dear"
    assert left(tmp_path) == ["file", "mine.npy"]


@pytest.mark.parametrize("to", STORES)
def test_a_failure_leaves_nothing_behind(
    to: str, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: Any) -> np.ndarray:
        raise OSError(28, "No space left on device")

    if to in LIBRARIES:
        pytest.importorskip(LIBRARIES[to])
    encoded = encoded_by("additive-bits:bytes=4", vectors)
    monkeypatch.setattr(encoded.codec, "_decode", fail)
    with pytest.raises((FewbitsError, OSError)):
        export(encoded, to, tmp_path / "new" / place(to, tmp_path).name)
    assert left(tmp_path) == []


def test_what_is_wrong_is_said_in_one_line(vectors: Vectors, tmp_path: Path) -> None:
    encoded = encoded_by("sign", vectors)
    with pytest.raises(FewbitsError, match="unknown store 'redis'"):
        export(encoded, "redis", tmp_path / "x")
    with pytest.raises(FewbitsError, match=r"name the output x\.faiss"):
        export(encoded, "faiss", tmp_path / "x.index")
    with pytest.raises(FewbitsError, match="there is no file"):
        export(tmp_path / "nothing.fewbits", "npy", tmp_path / "x.npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(FewbitsError, match="is a file, not a folder"):
        export(encoded, "npy", tmp_path / "file" / "x.npy")
    out = export(encoded, "npy", tmp_path / "x.npy")
    for k in (0, ROWS + 1):
        with pytest.raises(FewbitsError, match="k "):
            out.search(vectors[1], k)


@pytest.mark.parametrize("to", ["lancedb", "qdrant"])
def test_a_missing_library_is_named_with_its_extra(
    to: str, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[to], None)
    with pytest.raises(MissingExtraError, match=r"fewbits\[stores\]"):
        export(encoded_by("sign", vectors), to, tmp_path / "out")
    assert left(tmp_path) == []
