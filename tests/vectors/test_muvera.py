import dataclasses
import tracemalloc

import numpy as np
import pytest

from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.primitives import sketch
from fewbits.primitives.ragged import Ragged, chamfer
from fewbits.vectors import muvera
from fewbits.vectors.muvera import (
    MUVERA,
    ball_carving,
    chamfer_rerank,
    normalized_score,
    random_matrices,
    single_vector_heuristic,
    theory,
)

DIMS = 6


def unit_sets(lengths, dims=DIMS, seed=0):
    rng = np.random.default_rng(seed)
    sets = [rng.standard_normal((n, dims)).astype(np.float32) for n in lengths]
    return Ragged.from_sets([s / np.linalg.norm(s, axis=1, keepdims=True) for s in sets])


@pytest.fixture
def documents():
    return unit_sets(np.random.default_rng(1).integers(1, 12, 40))


@pytest.fixture
def queries():
    return unit_sets([3, 1, 5, 8, 2], seed=2)


def dots(codec, queries, documents):
    return codec.transform_queries(queries) @ codec.transform(documents).T


def identity(**options):
    return MUVERA(projection="identity", **options)


# -- the method ----------------------------------------------------------------------------


@pytest.mark.parametrize(("repetitions", "bits"), [(1, 0), (7, 3), (3, 6)])
def test_single_vectors_give_their_inner_product_in_every_repetition(repetitions, bits):
    x, y = unit_sets([1] * 20, seed=3), unit_sets([1] * 20, seed=4)
    codec = identity(repetitions=repetitions, bits=bits).fit(y)
    np.testing.assert_allclose(
        dots(codec, x, y), repetitions * x.flat @ y.flat.T, atol=2e-6 * repetitions
    )


def test_one_bucket_gives_the_sum_of_the_query_times_the_mean_of_the_document(queries, documents):
    codec = identity(repetitions=1, bits=0).fit(documents)
    sums = np.stack([q.sum(axis=0) for q in queries])
    means = np.stack([d.mean(axis=0) for d in documents])
    np.testing.assert_allclose(dots(codec, queries, documents), sums @ means.T, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "dense_sign"},
        {"projection": "count_sketch"},
        {"projection": "identity", "final_dims": 20, "final_projection": "count_sketch"},
        {"projection": "identity", "final_dims": 20, "final_projection": "dense_sign"},
    ],
    ids=str,
)
def test_projections_are_right_on_average(queries, documents, options):
    queries, documents = queries[:2], documents[:3]
    errors = []
    for seed in range(200):
        shape = {"repetitions": 2, "bits": 2, "seed": seed}
        exact = identity(**shape).fit(documents)
        projected = MUVERA(projection_dims=4, **shape, **options).fit(documents)
        errors.append(dots(projected, queries, documents) - dots(exact, queries, documents))
    standard_error = np.std(errors, axis=0) / np.sqrt(len(errors))
    assert (np.abs(np.mean(errors, axis=0)) < 3 * standard_error).all()


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_every_vector_is_in_its_own_bucket(bits):
    documents = unit_sets([1] * 50)
    planes, _ = random_matrices(0, DIMS, 1, bits, "identity", DIMS)
    codec = identity(repetitions=1, bits=bits, fill_empty=False).fit(documents)
    blocks = codec.transform(documents).reshape(50, 2**bits, DIMS)
    for vector, own in zip(documents.flat, blocks, strict=True):
        bucket = sum(1 << i for i in range(bits) if vector @ planes[:, i] > 0)
        np.testing.assert_array_equal(own[bucket], vector)
        assert not np.delete(own, bucket, axis=0).any()


def by_hand(document, planes, matrix, bits, order):
    """The blocks of one repetition, filled, written out bucket by bucket."""
    ids = [sum(1 << i for i in range(bits) if x @ planes[:, i] > 0) for x in document]
    blocks = []
    for bucket in range(2**bits):
        inside = [x for x, own in zip(document, ids, strict=True) if own == bucket]
        if not inside:
            nearest = min(order, key=lambda t: (ids[t] ^ bucket).bit_count())
            inside = [document[nearest]]
        blocks.append(np.mean(inside, axis=0) @ matrix)
    return np.concatenate(blocks)


@pytest.mark.parametrize("bits", [0, 2, 4])
def test_documents_are_filled_with_the_vector_of_fewest_differing_bits(documents, bits):
    codec = MUVERA(3, bits, 4, seed=5).fit(documents)
    planes, projections = random_matrices(5, DIMS, 3, bits, "dense_sign", 4)
    encodings = codec.transform(documents)
    for document, encoding in zip(documents, encodings, strict=True):
        order = np.argsort(sketch.value_hash(document), kind="stable")
        expected = [
            by_hand(
                document,
                planes[:, r * bits :][:, :bits],
                projections[:, 4 * r :][:, :4],
                bits,
                order,
            )
            for r in range(3)
        ]
        np.testing.assert_allclose(encoding, np.concatenate(expected), atol=1e-5)


def test_queries_are_summed_and_never_filled(queries, documents):
    codec = identity(repetitions=1, bits=4).fit(documents)
    blocks = codec.transform_queries(queries).reshape(len(queries), 16, DIMS)
    np.testing.assert_allclose(blocks.sum(axis=1), [q.sum(axis=0) for q in queries], atol=1e-5)
    assert (blocks[1] != 0).any(axis=1).sum() == 1


@pytest.mark.parametrize("options", [{}, {"final_dims": 50}, {"partition": "kmeans"}], ids=str)
def test_order_and_batches_do_not_matter(documents, options, monkeypatch):
    codec = MUVERA(3, 3, 4, **options).fit(documents)
    whole = codec.transform(documents)
    shuffled = np.random.default_rng(0).permutation(len(documents.flat))
    shuffled = shuffled[np.argsort(documents.owner[shuffled], kind="stable")]
    permuted = documents.with_flat(documents.flat[shuffled])
    np.testing.assert_allclose(codec.transform(permuted), whole, atol=1e-6)
    np.testing.assert_allclose(
        codec.transform_queries(permuted), codec.transform_queries(documents), atol=1e-6
    )
    monkeypatch.setattr(muvera, "BATCH_BYTES", 4000)
    np.testing.assert_allclose(codec.transform(documents), whole, atol=1e-6)
    rows = np.array([7, 0, 31])
    np.testing.assert_allclose(codec.transform(documents.take(rows)), whole[rows], atol=1e-6)


@pytest.mark.parametrize("kind", ["count_sketch", "dense_sign"])
def test_the_final_projection_is_that_of_the_long_encoding(documents, kind):
    codec = MUVERA(3, 3, 4, final_dims=30, final_projection=kind, seed=2).fit(documents)
    long = MUVERA(3, 3, 4, seed=2).fit(documents).transform(documents)
    expected = np.zeros((len(documents), 30), dtype=np.float32)
    for r in range(3):
        part = long[:, 32 * r : 32 * (r + 1)]
        if kind == "count_sketch":
            sketch.add_count_sketch(expected, part, sketch.stream(2, muvera.FINAL, r))
        else:
            sketch.add_sign_projection(expected, part, 2, muvera.FINAL, r)
    np.testing.assert_allclose(codec.transform(documents), expected, atol=1e-5)


def test_the_long_encoding_never_exists(monkeypatch):
    documents = unit_sets([3] * 32, dims=16)
    codec = MUVERA(40, 6, 16, final_dims=64).fit(documents)
    monkeypatch.setattr(muvera, "BATCH_BYTES", 2**17)
    tracemalloc.start()
    codec.transform(documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 40 * 64 * 16 * 4 / 4  # a quarter of the long encodings


def test_kmeans_puts_each_vector_in_the_bucket_of_its_nearest_centre(documents):
    codec = identity(repetitions=2, bits=2, partition="kmeans", fill_empty=False).fit(documents)
    assert codec.centres_.shape == (2, 4, DIMS)
    assert not np.array_equal(codec.centres_[0], codec.centres_[1])
    singles = Ragged(documents.flat, np.arange(len(documents.flat) + 1))
    blocks = codec.transform(singles).reshape(-1, 2, 4, DIMS)
    for r in range(2):
        gaps = np.linalg.norm(documents.flat[:, None] - codec.centres_[r], axis=2)
        np.testing.assert_array_equal(
            (blocks[:, r] != 0).any(axis=2).argmax(axis=1), gaps.argmin(1)
        )


def test_kmeans_fills_with_the_vector_nearest_to_the_centre(documents):
    codec = identity(repetitions=1, bits=3, partition="kmeans").fit(documents)
    blocks = codec.transform(documents).reshape(-1, 8, DIMS)
    for document, own in zip(documents, blocks, strict=True):
        gaps = np.linalg.norm(document[:, None] - codec.centres_[0], axis=2)
        for bucket in set(range(8)) - set(gaps.argmin(axis=1)):
            np.testing.assert_allclose(own[bucket], document[gaps[:, bucket].argmin()], atol=1e-6)


def test_more_repetitions_come_closer_to_chamfer():
    queries, documents = unit_sets([6] * 20, 16, 5), unit_sets([12] * 60, 16, 6)
    exact = chamfer(queries, documents)

    def correlation(repetitions):
        codec = MUVERA(repetitions, 4, 8).fit(documents)
        return np.corrcoef(dots(codec, queries, documents).ravel(), exact.ravel())[0, 1]

    few, many = correlation(1), correlation(60)
    assert few < many
    assert many > 0.55


# -- as a codec ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"final_dims": 40}, {"partition": "kmeans"}], ids=str)
def test_search_and_files(queries, documents, options, tmp_path):
    codec = MUVERA(4, 3, 4, **options).fit(documents)
    code = codec.encode(documents)
    assert code["vectors"].shape == (len(documents), codec.dims_out_)
    assert code["vectors"].dtype == np.float32
    scores, rows = codec.search(code, queries, 5)
    expected = codec.transform_queries(queries) @ code["vectors"].T
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :5], atol=1e-4)
    np.testing.assert_array_equal(rows[:, 0], expected.argmax(axis=1))
    loaded = Codec.load(codec.save(tmp_path / "codec.fewbits"))
    assert loaded == codec
    np.testing.assert_array_equal(loaded.search(code, queries, 5)[1], rows)


def test_random_matrices_cost_no_bytes(documents):
    assert MUVERA(4, 3, 4).fit(documents).codec_bytes == 0
    assert MUVERA(4, 3, 4, partition="kmeans").fit(documents).codec_bytes == 4 * 4 * 8 * DIMS


def test_a_product_quantizer_can_follow():
    documents = unit_sets([4] * 300, 8)
    codec = from_spec("muvera:repetitions=5,bits=3,projection_dims=4+pq:bytes=40").fit(documents)
    code = codec.encode(documents)
    assert code.nbytes == 300 * 40
    found = codec.search(code, documents[:50], 10)[1]
    assert (found == np.arange(50)[:, None]).any(axis=1).mean() > 0.9
    with pytest.raises(FewbitsError, match="cannot be decoded"):
        codec.decode(code)


def test_decoding_says_that_it_cannot_be_done(documents):
    codec = MUVERA(2, 2, 4).fit(documents)
    with pytest.raises(FewbitsError, match="cannot be decoded"):
        codec.decode(codec.encode(documents))


def test_the_grid_goes_from_small_to_large_and_can_be_built():
    specs = MUVERA.grid(384, 5000)
    assert len(specs) == len(set(specs))
    documents = unit_sets([2] * 10, 384)
    sizes = [from_spec(spec).fit(documents).dims_out_ for spec in specs if "+" not in spec]
    assert sizes == sorted(sizes)
    for spec in specs:
        from_spec(spec)
    assert not any("pq" in spec for spec in MUVERA.grid(384, 100))


# -- around it -----------------------------------------------------------------------------


def test_reranking_all_documents_is_exact_chamfer(queries, documents):
    exact = chamfer(queries, documents)
    everything = np.tile(np.arange(len(documents))[::-1], (len(queries), 1))
    scores, rows = chamfer_rerank(queries, documents, everything, 7)
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :7])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :7], rtol=1e-5)


def test_reranking_keeps_to_the_candidates(queries, documents):
    exact = chamfer(queries, documents)
    candidates = np.array([[4, -1, 9, 30], [1, 2, 3, -1], [0, 5, 6, 7], [8, 9, 10, 11], [-1] * 4])
    scores, rows = chamfer_rerank(queries, documents, candidates, 4)
    for query in range(4):
        there = candidates[query][candidates[query] >= 0]
        expected = there[np.argsort(-exact[query, there])]
        assert rows[query, : len(there)].tolist() == expected.tolist()
    assert rows[0, 3] == rows[1, 3] == -1
    assert np.isneginf(scores[4]).all()


def test_carving_replaces_groups_by_their_sums():
    query = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [-1, 0]], dtype=np.float32)
    np.testing.assert_allclose(ball_carving(query, 0.7), [[1.9, 0.1], [0.1, 1.9], [-1, 0]])
    np.testing.assert_array_equal(ball_carving(query, 1.1), query)
    assert len(ball_carving(query, -1.1)) == 1


def test_reranking_with_carved_queries_of_equal_vectors_is_exact(documents):
    doubled = Ragged.from_sets([np.repeat(q, 2, axis=0) for q in unit_sets([2, 3], seed=8)])
    rows = np.tile(np.arange(40), (2, 1))
    exact = chamfer_rerank(doubled, documents, rows, 10)
    carved = chamfer_rerank(doubled, documents, rows, 10, carve=0.999)
    np.testing.assert_array_equal(carved[1], exact[1])
    np.testing.assert_allclose(carved[0], exact[0], rtol=1e-5)


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_the_heuristic_pools_one_search_per_query_vector(queries, documents, n, deduplicate):
    lists = single_vector_heuristic(queries, documents, n, deduplicate)
    for query, found in zip(queries, lists, strict=True):
        hits = documents.owner[np.argsort(-(query @ documents.flat.T), axis=1)]
        expected = hits.T.ravel().tolist()
        if deduplicate:
            expected = list(dict.fromkeys(expected))
        assert found.tolist() == expected[:n]


def test_the_heuristic_goes_deeper_only_as_needed(queries, documents, monkeypatch):
    monkeypatch.setattr(muvera, "HITS_AT_A_TIME", 10)
    lists = single_vector_heuristic(queries, documents, len(documents))
    np.testing.assert_array_equal(np.sort(lists, axis=1), np.tile(np.arange(40), (5, 1)))


def test_a_short_list_ends_in_minus_one():
    documents = unit_sets([2, 2])
    lists = single_vector_heuristic(unit_sets([1], seed=1), documents, 4, deduplicate=False)
    assert sorted(lists[0]) == [0, 0, 1, 1]


def test_theory_grows_as_the_theorem_says():
    bits, width = theory(0.5, 0.1, 100)
    assert (bits, width) == (14, 31)  # ln(1000) / 0.5 and ln(2000) / 0.25
    assert theory(0.25, 0.1, 100)[0] == 28


def test_normalized_scores_estimate_the_mean_best_inner_product(queries, documents):
    codec = identity(repetitions=3, bits=0).fit(documents)
    scores = dots(codec, queries, documents)
    expected = [[(q @ d.T).mean() for d in documents] for q in queries]
    np.testing.assert_allclose(normalized_score(scores, queries, 3), expected, atol=1e-5)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": 0}, "repetitions=0"),
        ({"bits": 17}, "bits=17"),
        ({"bits": -1}, "bits=-1"),
        ({"bits": 2.5}, "bits=2.5"),
        ({"projection_dims": DIMS + 1}, "projection_dims=7"),
        ({"projection": "none"}, "projection=none"),
        ({"final_projection": "identity"}, "final_projection=identity"),
        ({"partition": "tree"}, "partition=tree"),
        ({"final_dims": 0}, "final_dims=0"),
        ({"repetitions": 1, "bits": 0, "final_dims": 100}, "leave final_dims out"),
        ({"seed": -1}, "seed=-1"),
        ({"repetitions": 60, "bits": 8, "projection": "identity"}, "92,160 .* set final_dims"),
        ({"repetitions": 70, "bits": 16, "final_dims": 100}, "too many even to sketch"),
        ({"bits": 9, "repetitions": 1, "partition": "kmeans"}, "needs 512 vectors"),
    ],
    ids=str,
)
def test_bad_settings(documents, options, message):
    with pytest.raises(FewbitsError, match=message):
        MUVERA(**{"projection_dims": 4, **options}).fit(documents)


def test_bad_sets(documents):
    codec = MUVERA(2, 2, 4).fit(documents)
    holed = documents.flat.copy()
    holed[3, 1] = np.nan
    with pytest.raises(FewbitsError, match="has NaN"):
        codec.encode(documents.with_flat(holed))
    with pytest.raises(FewbitsError, match="set 1 is empty"):
        codec.encode([np.ones((2, DIMS)), np.ones((0, DIMS))])
    with pytest.raises(FewbitsError, match="6 dimensions, but this has 5"):
        codec.encode([np.ones((2, 5))])
    with pytest.raises(FewbitsError, match="sets of vectors"):
        codec.encode(np.ones((4, DIMS)))
    with pytest.raises(FewbitsError, match="metric"):
        codec.search(codec.encode(documents), documents, 3, "l2")


def test_bad_candidates(queries, documents):
    good = np.zeros((len(queries), 3), dtype=int)
    with pytest.raises(FewbitsError, match="one row for each of the 5 queries"):
        chamfer_rerank(queries, documents, good[:2], 2)
    with pytest.raises(FewbitsError, match="rows of the 40 documents"):
        chamfer_rerank(queries, documents, good + 40, 2)
    with pytest.raises(FewbitsError, match="k is 4"):
        chamfer_rerank(queries, documents, good, 4)
    narrow = unit_sets([2], dims=4)
    with pytest.raises(FewbitsError, match="4 dimensions"):
        chamfer_rerank(narrow, documents, good[:1], 2)
    with pytest.raises(FewbitsError, match="4 dimensions"):
        single_vector_heuristic(narrow, documents, 3)
    with pytest.raises(FewbitsError, match="k is 41"):
        single_vector_heuristic(queries, documents, 41)


def test_bad_theory():
    for epsilon, delta, tokens in ((0, 0.1, 10), (0.1, 1, 10), (0.1, 0.1, 1)):
        with pytest.raises(FewbitsError, match="between 0 and 1"):
            theory(epsilon, delta, tokens)


@pytest.mark.parametrize("kind", ["shape", "dtype", "nan"])
def test_centres_from_a_file_must_fit(documents, kind):
    codec = MUVERA(2, 2, 4, partition="kmeans").fit(documents)
    bad = {
        "shape": codec.centres_[:1],
        "dtype": codec.centres_.astype(np.float64),
        "nan": codec.centres_ * np.float32("nan"),
    }[kind]
    with pytest.raises(ValueError, match="centres must be"):
        dataclasses.replace(codec)._restore(DIMS, {"centres": bad})
