"""The forms in which stores hold codes: rows and queries there rank as `search` does."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.examples import python_docs
from fewbits.core.stored import Stored, grid_form, linear_step
from fewbits.core.stores.plan import search_blocks
from fewbits.primitives.bits import pack, unpack
from fewbits.primitives.ragged import Ragged
from fewbits.primitives.retrieval import overlap

ROWS, DIMS, K = 600, 60, 10
SAME = (
    "float16",
    "int8",
    "pq:bytes=7",
    "opq:bytes=6,dims=30,rounds=3",
    "turboquant",
    "turboquant:bits=3",
    "pca-rag:dims=20",
    "pca-rag:dims=20,whiten=0.5,dtype=float16",
    "pca-rag:dims=20,normalize=yes,scoring=reduced,post_normalize=yes",
    "pca-rag:dims=20,scoring=reduced",
    "pca-rag:dims=20+int8",
    "pca-rag:dims=20+pq:bytes=6",
    "pca-rag:dims=20,scoring=reduced,post_normalize=yes+turboquant",
    "additive-bits:bytes=4",
    "relative-representations",
)
"""Codecs whose rows in a store rank as their codes do."""
BITS = ("sign", "itq:bits=20", "lsh:bits=90", "pca-rag:dims=20+sign")
"""Codecs of bits, which `search` compares with float queries."""
FAISS_CODES = {
    "float16": 120,
    "int8": 60,
    "pq:bytes=7": 7,
    "opq:bytes=6,dims=30,rounds=3": 6,
    "rabitq:bits=2": 36,
    "turboquant": 30,
    "sign": 8,
    "itq:bits=20": 3,
    "lsh:bits=90": 12,
    "pca-rag:dims=20+int8": 20,
    "pca-rag:dims=20+sign": 3,
}
"""Bytes per item in faiss, where that is what the codec spends."""

Vectors = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """Unit rows and unit queries of the built-in example, cut to 60 dimensions."""
    example = python_docs()
    cut = (example.vectors[:ROWS, :DIMS], example.queries[:40, :DIMS])
    items, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in cut)
    return items, queries


def made(form: Stored, queries: Any) -> np.ndarray:
    return np.asarray(queries if form.queries is None else form.queries(queries))


def found(codec: Codec, form: Stored, vectors: Vectors) -> np.ndarray:
    """The best rows by brute force over what the store would hold."""
    rows = form.rows(codec.encode(vectors[0]))
    asked = made(form, vectors[1])
    if form.metric == "cosine":
        asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
    return search_blocks([rows[:250], rows[250:]], asked, K, form.metric)[1]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("spec", SAME)
def test_stored_rows_rank_as_the_codes_do(spec: str, metric: str, vectors: Vectors) -> None:
    codec = from_spec(spec).fit(vectors[0])
    truth = codec.search(codec.encode(vectors[0]), vectors[1], K, metric)[1]
    stored = codec.stored(metric)
    for form in (stored, stored.floats):
        assert overlap(found(codec, form, vectors), truth, K) > 0.99
    assert stored.floats.kind == "floats"


@pytest.mark.parametrize("spec", [*SAME, *BITS])
def test_rows_have_the_shape_and_dtype_that_the_form_says(spec: str, vectors: Vectors) -> None:
    codec = from_spec(spec).fit(vectors[0])
    code, stored = codec.encode(vectors[0]), codec.stored()
    for form in (stored, stored.floats):
        rows, asked = form.rows(code), made(form, vectors[1])
        assert rows.shape == (ROWS, form.width)
        assert rows.dtype == form.dtype
        assert form.bytes_per_item == rows.nbytes / ROWS
        assert asked.shape == (40, form.width)
        assert asked.dtype == (np.uint8 if form.kind == "bits" else np.float32)


def test_reduced_vectors_keep_only_their_dimensions(vectors: Vectors) -> None:
    stored = from_spec("pca-rag:dims=20+int8").fit(vectors[0]).stored()
    assert (stored.kind, stored.dims, stored.dtype, stored.metric) == (
        "integers",
        20,
        "uint8",
        "ip",
    )
    assert (stored.floats.dims, stored.floats.dtype) == (20, "float16")


@pytest.mark.parametrize("spec", BITS)
def test_bits_are_those_of_the_code_and_queries_are_encoded_likewise(
    spec: str, vectors: Vectors
) -> None:
    codec = from_spec(spec).fit(vectors[0])
    stored = codec.stored()
    assert (stored.kind, stored.metric) == ("bits", "hamming")
    np.testing.assert_array_equal(
        stored.rows(codec.encode(vectors[0])), codec.encode(vectors[0])["bits"]
    )
    if len(codec.stages) == 1:  # behind a transform, queries are treated otherwise than items
        np.testing.assert_array_equal(made(stored, vectors[1]), codec.encode(vectors[1])["bits"])


@pytest.mark.parametrize("spec", BITS)
def test_plus_and_minus_one_rank_as_the_search_with_float_queries(
    spec: str, vectors: Vectors
) -> None:
    codec = from_spec(spec).fit(vectors[0])
    truth = codec.search(codec.encode(vectors[0]), vectors[1], K)[1]
    floats = codec.stored().floats
    assert set(np.unique(floats.rows(codec.encode(vectors[0])))) == {-1, 1}
    assert overlap(found(codec, floats, vectors), truth, K) > 0.99


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("spec", [*SAME, *BITS, "rabitq:bits=2"])
def test_the_faiss_index_finds_what_the_codes_find(
    spec: str, metric: str, vectors: Vectors
) -> None:
    codec = from_spec(spec).fit(vectors[0])
    code = codec.encode(vectors[0])
    truth = codec.search(code, vectors[1], K, metric)[1]
    form = codec.faiss_form(metric)
    form.index.add_sa_codes(form.codes(code))
    assert form.index.ntotal == ROWS
    asked = vectors[1] if form.queries is None else form.queries(vectors[1])
    for step in form.steps:
        asked = step.apply(np.ascontiguousarray(asked))
    _, rows = form.index.search(np.ascontiguousarray(asked), K)
    assert overlap(rows, truth, K) > 0.99
    if metric == "cosine" and spec in FAISS_CODES:
        assert form.index.sa_code_size() == FAISS_CODES[spec]
        norms = 2 if spec == "turboquant" else 0  # unit rows need none
        assert code.bytes_per_item == FAISS_CODES[spec] + norms


def test_a_range_far_from_zero_is_not_stored_in_half_precision() -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (50, 4)).astype(np.float32)
    assert from_spec("int8").fit(rows).stored("l2").dtype == "float16"
    assert from_spec("int8").fit(rows + 300).stored("l2").dtype == "float32"
    assert from_spec("int8").fit(rows * 1e6).stored("l2").dtype == "float32"
    assert from_spec("int8").fit(rows * 0 + 3).stored("l2").dtype == "float16"


def test_symmetric_codes_are_compared_code_with_code(vectors: Vectors) -> None:
    pytest.importorskip("torch")
    for bits, kind in ((1, "bits"), (2, "integers")):
        spec = f"bebr:bits={bits},dims=44,scoring=symmetric,steps=2"
        codec = from_spec(spec).fit(vectors[0])
        truth = codec.search(codec.encode(vectors[0]), vectors[1], K)[0]
        stored = codec.stored()
        assert stored.kind == kind
        decoded = codec.searcher(codec.encode(vectors[0])).search(vectors[1], ROWS)
        scores = np.take_along_axis(decoded[0], np.argsort(decoded[1], axis=1), axis=1)
        for form in (stored, stored.floats):
            rows = found(codec, form, vectors)
            mine = np.take_along_axis(scores, rows, axis=1)  # equal distances in any order
            np.testing.assert_allclose(mine, truth, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 4])
def test_symmetric_bits_are_a_hamming_index_in_faiss(hidden: int, vectors: Vectors) -> None:
    pytest.importorskip("torch")
    codec = from_spec(f"bebr:bits=1,dims=44,hidden={hidden},scoring=symmetric,steps=2")
    code = codec.fit(vectors[0]).encode(vectors[0])
    form = codec.faiss_form()
    assert (form.queries is None) == (hidden == 0)
    form.index.add_sa_codes(form.codes(code))
    assert form.index.sa_code_size() == code.bytes_per_item == 6
    asked = vectors[1] if form.queries is None else form.queries(vectors[1])
    for step in form.steps:
        asked = step.apply(np.ascontiguousarray(asked))
    distances, _ = form.index.search(np.ascontiguousarray(asked), K)
    bits = [unpack(codec.encode(x)["packed"], 44, 1) for x in vectors]
    apart = (bits[1][:, None] != bits[0][None]).sum(axis=2)
    np.testing.assert_array_equal(distances, np.sort(apart, axis=1)[:, :K])


@pytest.mark.parametrize(
    "spec", ["muvera:repetitions=3,bits=2", "muvera:repetitions=3,bits=2+sign"]
)
def test_sets_are_held_as_their_encodings(spec: str, vectors: Vectors) -> None:
    sets = Ragged(vectors[0], np.arange(0, ROWS + 1, 3))
    asked = Ragged(vectors[1], np.arange(0, 41, 2))
    codec = from_spec(spec).fit(sets)
    code = codec.encode(sets)
    truth = codec.search(code, asked, K)[1]
    form = codec.stored().floats
    rows = search_blocks([form.rows(code)], made(form, asked), K, form.metric)[1]
    assert overlap(rows, truth, K) > 0.99
    with_faiss = codec.faiss_form()
    with_faiss.index.add_sa_codes(with_faiss.codes(code))
    assert with_faiss.queries is not None
    queries = with_faiss.queries(asked)
    for step in with_faiss.steps:
        queries = step.apply(queries)
    assert overlap(with_faiss.index.search(queries, K)[1], truth, K) > 0.99


def test_what_cannot_be_searched_or_is_not_fitted_has_no_form(vectors: Vectors) -> None:
    with pytest.raises(FewbitsError, match="not fitted"):
        from_spec("sign").stored()
    with pytest.raises(FewbitsError, match="not fitted"):
        from_spec("sign").faiss_form()
    codec = from_spec("sign").fit(vectors[0])
    with pytest.raises(FewbitsError, match="unknown metric"):
        codec.stored("hamming")
    with pytest.raises(FewbitsError, match="post_normalize"):
        from_spec("pca-rag:dims=9,scoring=reduced+int8").fit(vectors[0]).stored()


# -- bricks --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [1, 7, 16])
def test_a_grid_index_decodes_to_the_values(bits: int, dims: int) -> None:
    rng = np.random.default_rng(bits)
    numbers = rng.integers(0, 2**bits, (30, dims)).astype(np.uint8)
    values = rng.standard_normal((dims, 2**bits)).astype(np.float32)
    form = grid_form("packed", values, bits)
    form.index.add_sa_codes(pack(numbers, bits))
    decoded = form.index.reconstruct_n(0, 30)
    np.testing.assert_array_equal(decoded[:, :dims], values[np.arange(dims), numbers])
    assert not decoded[:, dims:].any()
    queries = rng.standard_normal((3, dims)).astype(np.float32)
    for step in form.steps:
        queries = step.apply(queries)
    assert queries.shape == (3, form.index.d)


def test_a_linear_step_is_the_product_and_the_sum() -> None:
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((5, 4)).astype("f4"), rng.standard_normal((4, 3)).astype("f4")
    np.testing.assert_allclose(linear_step(matrix).apply(x), x @ matrix, rtol=1e-5)
    bias = np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(linear_step(matrix, bias).apply(x), x @ matrix + bias, rtol=1e-5)
    assert isinstance(linear_step(matrix), faiss.LinearTransform)
