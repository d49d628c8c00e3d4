import dataclasses
import warnings

import numpy as np
import pytest

from fewbits.core.checks import unit_rows
from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.examples import python_docs
from fewbits.core.search import search_array
from fewbits.primitives.retrieval import overlap
from fewbits.vectors.pca_rag import DRIFT_LIMIT, PCARAG, PIPELINES

DIMS = 24


def decaying(rows=400, dims=DIMS, seed=0):
    """Rows off the origin whose variances fall."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(99).standard_normal((dims, dims)))[0]
    scaled = rng.standard_normal((rows, dims)) * np.geomspace(2, 0.05, dims)
    return (scaled @ mix + np.linspace(-1, 1, dims)).astype(np.float32)


@pytest.fixture(scope="module")
def x():
    return decaying()


@pytest.fixture(scope="module")
def queries():
    return decaying(30, seed=1)


@pytest.fixture(scope="module")
def docs():
    example = python_docs()
    return unit_rows(example.vectors), unit_rows(example.queries)


def distances(one, other):
    return np.linalg.norm(one[:, None].astype(np.float64) - other[None], axis=2)


def order_by_decoding(codec, code, queries, metric):
    return search_array(queries, codec.decode(code), len(code), metric)[1]


# -- all components ------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_all_components_give_everything_back(x, center, whiten):
    codec = PCARAG(dims=DIMS, center=center, whiten=whiten).fit(x)
    decoded = codec.decode(codec.encode(x))
    assert decoded.dtype == np.float32
    assert np.linalg.norm(decoded - x) < 1e-5 * np.linalg.norm(x)


def test_all_components_keep_all_distances(x):
    y = PCARAG(dims=DIMS).fit(x).transform(x[:50])
    np.testing.assert_allclose(distances(y, y), distances(x[:50], x[:50]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [0.0, 0.7])
def test_all_components_keep_inner_products_up_to_a_number_per_query(x, queries, whiten):
    codec = PCARAG(dims=DIMS, whiten=whiten).fit(x)
    dots = codec.transform_queries(queries, "ip") @ codec.transform(x).T
    constant = queries @ codec.mean_
    np.testing.assert_allclose(dots + constant[:, None], queries @ x.T, atol=1e-4)


# -- fewer components ----------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 5, 16])
def test_error_is_the_discarded_variance(x, dims):
    codec = PCARAG(dims=dims).fit(x)
    error = np.mean(np.sum((codec.decode(codec.encode(x)) - x).astype(np.float64) ** 2, axis=1))
    variances = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))[::-1]
    assert error == pytest.approx(variances[dims:].sum() * (len(x) - 1) / len(x), rel=1e-4)
    assert codec.fit_error == pytest.approx(error, rel=1e-4)
    assert codec.explained_variance == pytest.approx(variances[:dims].sum() / variances.sum())


@pytest.mark.parametrize("dims", [1, 5, 16])
def test_no_other_linear_code_of_this_width_has_a_smaller_error(x, dims):
    codec = PCARAG(dims=dims).fit(x)
    rng = np.random.default_rng(0)
    encoders = [
        np.eye(DIMS)[:, :dims],
        rng.standard_normal((DIMS, dims)),
        np.linalg.qr(rng.standard_normal((DIMS, dims)))[0],
        PCARAG(dims=dims).fit(x[:200]).components_.T,
        codec.components_.T + 0.01 * rng.standard_normal((DIMS, dims)),
    ]
    for encoder in encoders:
        given = np.column_stack([x @ encoder, np.ones(len(x))])
        best_decoder = np.linalg.lstsq(given, x, rcond=None)[0]
        error = np.mean(np.sum((given @ best_decoder - x) ** 2, axis=1))
        assert codec.fit_error <= error * (1 + 1e-5)


def test_reduced_distances_never_exceed_the_originals(x, queries):
    full = distances(queries, x)
    for dims in (2, 9, 24):
        codec = PCARAG(dims=dims).fit(x)
        reduced = distances(codec.transform_queries(queries, "l2"), codec.transform(x))
        assert (reduced <= full * (1 + 1e-5)).all()


def test_blocks_fit_like_the_whole(x):
    whole = PCARAG(dims=6).fit(x)
    cuts = np.sort(np.random.default_rng(3).choice(np.arange(1, len(x)), 7, replace=False))
    streamed = PCARAG(dims=6).fit_blocks(iter(np.split(x, cuts)))
    outside = whole.components_ - whole.components_ @ streamed.components_.T @ streamed.components_
    assert np.linalg.norm(outside, 2) < 1e-4
    np.testing.assert_allclose(streamed.components_, whole.components_, atol=1e-6)
    np.testing.assert_allclose(streamed.mean_, whole.mean_, atol=1e-6)
    assert int(streamed.rows_[0]) == len(x)
    np.testing.assert_allclose(streamed.transform(x), whole.transform(x), atol=1e-5)


def test_fit_agrees_with_scikit_learn(x):
    decomposition = pytest.importorskip("sklearn.decomposition")
    codec, peer = PCARAG(dims=7).fit(x), decomposition.PCA(7).fit(x)
    signs = np.sign(np.sum(codec.components_ * peer.components_, axis=1))
    np.testing.assert_allclose(codec.components_, peer.components_ * signs[:, None], atol=1e-4)
    np.testing.assert_allclose(codec.transform(x), peer.transform(x) * signs, atol=1e-3)
    whitened = PCARAG(dims=7, whiten=1.0).fit(x).transform(x)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(7), atol=1e-3)


def test_recall_rises_with_dims_and_beats_random_projection(docs):
    x, queries = docs
    truth = search_array(queries, x, 10, "cosine")[1]
    whole = PCARAG(dims=256).fit(x)

    def recall(codec):
        return overlap(codec.search(codec.encode(x), queries, 10)[1], truth, 10)

    recalls = [recall(whole.truncated(dims)) for dims in (8, 16, 32, 64, 128, 256)]
    assert (np.diff(recalls) > 0).all()
    assert recalls[-1] > 0.95
    gaussian = np.random.default_rng(0).standard_normal((384, 64)).astype(np.float32)
    projected = search_array(unit_rows(queries @ gaussian), unit_rows(x @ gaussian), 10, "cosine")
    assert recalls[3] >= overlap(projected[1], truth, 10) + 0.10


# -- searching -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": False},
        {"whiten": 0.5},
        {"whiten": 1.0, "center": False},
        {"post_normalize": True},
        {"normalize": True},
        {"dtype": "float16"},
    ],
)
def test_reconstruction_scoring_orders_like_the_decoded_vectors(x, queries, metric, options):
    if metric == "cosine":
        x, queries = unit_rows(x), unit_rows(queries)
    codec = PCARAG(dims=6, **options).fit(x)
    code = codec.encode(x)
    asked = unit_rows(queries) if options.get("normalize") else queries
    found = codec.search(code, queries, 20, metric)[1]
    assert overlap(found, order_by_decoding(codec, code, asked, metric), 20) > 0.995
    assert (found[:, 0] == order_by_decoding(codec, code, asked, metric)[:, 0]).mean() > 0.95


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("options", [{}, {"whiten": 0.5}, {"post_normalize": True}])
def test_reduced_scoring_compares_both_sides_in_the_reduced_space(x, queries, metric, options):
    codec = PCARAG(dims=6, scoring="reduced", **options).fit(x)
    y, asked = codec.transform(x), codec.transform(queries)
    expected_y = (x - x.mean(axis=0)) @ codec.components_.T
    if "whiten" in options:
        expected_y /= codec.variances_[:6] ** 0.25
    if "post_normalize" in options:
        expected_y = unit_rows(expected_y)
    np.testing.assert_allclose(y, expected_y, atol=1e-4)
    if metric == "cosine":
        y, asked = unit_rows(y), unit_rows(asked)
    scores, rows = codec.search(codec.encode(x), queries, 15, metric)
    wanted_scores, wanted_rows = search_array(asked, y, 15, metric)
    assert overlap(rows, wanted_rows, 15) > 0.995
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-3)


def test_reconstruction_and_reduced_scoring_differ_on_a_mean(x, queries):
    one, other = (PCARAG(dims=6, scoring=s).fit(x) for s in ("reconstruction", "reduced"))
    truth = search_array(queries, x, 10, "ip")[1]
    recalls = [
        overlap(c.search(c.encode(x), queries, 10, "ip")[1], truth, 10) for c in (one, other)
    ]
    assert recalls[0] > recalls[1]


def test_a_query_alone_is_the_query_in_a_batch(x, queries):
    for options in ({}, {"scoring": "reduced", "post_normalize": True}):
        codec = PCARAG(dims=6, whiten=0.3, **options).fit(x)
        for metric in ("ip", "l2"):
            batch = codec.transform_queries(queries, metric)
            alone = np.concatenate([codec.transform_queries(q[None], metric) for q in queries])
            np.testing.assert_allclose(alone, batch, atol=1e-5)
    chained = from_spec("pca-rag:dims=6+int8").fit(x)
    code = chained.encode(x)
    batch = chained.search(code, queries, 5)[0]
    alone = np.concatenate([chained.search(code, q[None], 5)[0] for q in queries])
    np.testing.assert_allclose(alone, batch, atol=1e-4)
    one_row = np.concatenate([chained.encode(row[None])["codes"] for row in x[:40]]).astype(int)
    assert np.abs(one_row - code["codes"][:40]).max() <= 1
    assert (one_row == code["codes"][:40]).mean() > 0.99


# -- codes, chains and files ---------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_codes_take_the_bytes_of_their_numbers(x, dtype, size):
    codec = PCARAG(dims=6, dtype=dtype).fit(x)
    code = codec.encode(x)
    assert code["vectors"].dtype == dtype
    assert code.bytes_per_item == 6 * size
    assert codec.dims_for_bytes(6 * size + size - 1) == 6
    np.testing.assert_allclose(code["vectors"].astype(np.float32), codec.transform(x), atol=5e-3)


def test_int8_may_follow(x, queries):
    chained = from_spec("pca-rag:dims=12+int8").fit(x)
    code = chained.encode(x)
    assert code.bytes_per_item == 12
    alone = PCARAG(dims=12).fit(x)
    difference = np.abs(chained.decode(code) - alone.decode(alone.encode(x)))
    assert difference.max() < 0.1
    assert difference.max() > 0
    for metric in ("ip", "l2"):
        wanted = search_array(queries, chained.decode(code), 10, metric)[1]
        assert overlap(chained.search(code, queries, 10, metric)[1], wanted, 10) > 0.98


def test_a_chain_refuses_what_it_could_only_order_wrongly(x, queries):
    for spec, metric, way_out in (
        ("pca-rag:dims=6,whiten=0.5+int8", "l2", "whiten=0"),
        ("pca-rag:dims=6,scoring=reduced+int8", "cosine", "post_normalize"),
    ):
        chained = from_spec(spec).fit(x)
        with pytest.raises(FewbitsError, match=way_out):
            chained.search(chained.encode(x), queries, 3, metric)
    fine = from_spec("pca-rag:dims=6,scoring=reduced,post_normalize=yes+int8").fit(x)
    assert fine.search(fine.encode(x), queries, 3, "cosine")[1].shape == (30, 3)


def test_saving_and_loading(x, queries, tmp_path):
    codec = PCARAG(dims=6, whiten=0.5, normalize=True, dtype="float16").fit(x)
    loaded = Codec.load(codec.save(tmp_path / "codec.fewbits"))
    assert loaded == codec
    assert loaded.digest == codec.digest
    code = codec.encode(x)
    np.testing.assert_array_equal(loaded.encode(x)["vectors"], code["vectors"])
    np.testing.assert_array_equal(loaded.decode(code), codec.decode(code))
    np.testing.assert_array_equal(
        loaded.search(code, queries, 4)[1], codec.search(code, queries, 4)[1]
    )


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mean", np.zeros(3, np.float32)),
        ("components", np.zeros((7, DIMS), np.float32)),
        ("components", np.zeros(DIMS, np.float32)),
        ("components", np.full((6, DIMS), np.nan, np.float32)),
        ("components", np.zeros((6, DIMS), np.int32)),
        ("variances", np.zeros(DIMS)),
        ("variances", -np.ones(DIMS)),
        ("rows", np.zeros(2, np.int64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(x, name, array):
    codec = PCARAG(dims=6).fit(x)
    state = codec.state() | {name: array}
    with pytest.raises(ValueError):
        PCARAG(dims=6)._restore(DIMS, state)


def test_fitting_twice_gives_the_same_bytes(x):
    assert PCARAG(dims=6).fit(x).digest == PCARAG(dims=6).fit(x.copy()).digest


@pytest.mark.parametrize("spec", PIPELINES.values(), ids=PIPELINES)
def test_named_pipelines_run(x, queries, spec):
    codec = from_spec(spec.format(dims=12, bytes=6)).fit(x)
    code = codec.encode(x)
    truth = search_array(queries, x, 10, "ip")[1]
    assert overlap(codec.search(code, queries, 10, "ip")[1], truth, 10) > 0.35


@pytest.mark.parametrize(("dims", "rows"), [(384, 5000), (16, 400), (3, 30), (1, 5)])
def test_grid_runs_and_stays_short(dims, rows):
    specs = PCARAG.grid(dims, rows)
    assert len(specs) == len(set(specs)) <= 16
    for spec in specs:
        assert from_spec(spec).stages[0].dims < min(dims, rows)
    if dims == 16:
        x = decaying(rows, dims)
        sizes = [from_spec(spec).fit(x).encode(x).bytes_per_item for spec in specs]
        assert min(sizes) <= 4
        assert max(sizes) == 16


# -- choosing dims and watching drift ------------------------------------------------------


def test_without_dims_variance_decides_up_to_a_quarter():
    x = decaying(dims=40)
    variances = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))[::-1]
    shares = np.cumsum(variances) / variances.sum()
    assert len(PCARAG(variance=0.5).fit(x).components_) == int(np.argmax(shares >= 0.5)) + 1
    assert len(PCARAG(variance=1.0).fit(x).components_) == 10
    assert len(PCARAG(variance=1.0).fit(x[:5]).components_) == 4


def test_truncated_is_a_fit_with_fewer_dims(x):
    short, fitted = (
        PCARAG(dims=12, whiten=0.5).fit(x).truncated(5),
        PCARAG(dims=5, whiten=0.5).fit(x),
    )
    assert short == fitted
    assert short.digest == fitted.digest
    with pytest.raises(FewbitsError, match="between 1 and the 5"):
        short.truncated(6)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "whiten": 0.5}])
def test_choose_dims_finds_the_fewest(x, queries, options):
    x, queries = unit_rows(x), unit_rows(queries)
    truth = search_array(queries, x, 10, "cosine")[1]
    chosen = PCARAG(**options).choose_dims(x, queries, recall_at_10=0.8)

    def recall(dims):
        codec = PCARAG(dims=dims, **options).fit(x)
        return overlap(codec.search(codec.encode(x), queries, 10)[1], truth, 10)

    assert 1 < chosen < DIMS
    assert recall(chosen) >= 0.8 > recall(chosen - 1)


def test_choose_dims_says_when_no_number_is_enough(x, queries):
    reduced = PCARAG(scoring="reduced")
    with pytest.raises(FewbitsError, match="all 24 components reach"):
        reduced.choose_dims(x, queries, recall_at_10=1.0, metric="ip")
    with pytest.raises(FewbitsError, match="recall_at_10"):
        reduced.choose_dims(x, queries, recall_at_10=95)


def test_drift_report_tells_new_rows_of_the_same_kind_from_others(x):
    codec = PCARAG(dims=8).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = codec.drift_report(decaying(300, seed=5))
    assert not same.drifted
    assert 0.8 < same.ratio < 1.3
    assert same.rows == 300
    outside = codec.decode(codec.encode(x)) - x
    assert codec.drift_report(x).error == pytest.approx(
        np.mean(np.sum(outside**2, axis=1)), rel=1e-4
    )
    assert codec.drift_report(x).ratio == pytest.approx(1, rel=1e-4)
    with pytest.warns(UserWarning, match="fit again"):
        other = codec.drift_report(np.roll(x, 5, axis=1))
    assert other.drifted
    assert other.ratio > DRIFT_LIMIT


def test_drift_of_a_codec_that_loses_nothing(x):
    assert PCARAG(dims=DIMS).fit(x).drift_report(decaying(50, seed=5)).ratio == pytest.approx(1)


# -- other libraries -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"whiten": 1.0}, {"center": False, "whiten": 0.5}])
def test_faiss_matrix_agrees(x, queries, options):
    codec = PCARAG(dims=9, scoring="reduced", **options).fit(x)
    matrix = codec.to_faiss()
    for rows in (x, queries):
        np.testing.assert_allclose(matrix.apply(rows), codec.transform(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"whiten": 1.0}])
def test_dense_layer_agrees(docs, options):
    pytest.importorskip("sentence_transformers")
    import torch

    x, queries = docs
    codec = PCARAG(dims=48, scoring="reduced", **options).fit(x[:600])
    layer = codec.to_sentence_transformers()
    with torch.no_grad():
        made = layer({"sentence_embedding": torch.from_numpy(queries)})["sentence_embedding"]
    expected = codec.transform_queries(queries, "ip")
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(made.numpy(), codec.to_faiss().apply(queries), atol=2e-5)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 0}, "between 1 and the dimensions, 24"),
        ({"dims": 25}, "between 1 and the dimensions, 24"),
        ({"variance": 0.0}, "variance=0"),
        ({"variance": float("nan")}, "variance=nan"),
        ({"whiten": 1.5}, "whiten=1.5"),
        ({"dtype": "int8"}, "float32 or float16"),
        ({"scoring": "full"}, "reconstruction or reduced"),
    ],
)
def test_bad_hyper_parameters(x, options, message):
    with pytest.raises(FewbitsError, match=message):
        PCARAG(**options).fit(x)
    with pytest.raises(FewbitsError, match=message):
        PCARAG(**options).fit_blocks([x])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((1, 4)), "at least 2 rows"),
        (np.full((9, 4), 0.3), "all rows are the same"),
        (np.zeros((0, 4)), "empty"),
        (np.array([[1.0, 2], [np.nan, 1]]), "row 1"),
    ],
)
def test_rows_nothing_can_be_learned_from(rows, message):
    for fit in (PCARAG().fit, lambda x: PCARAG().fit_blocks([x])):
        with pytest.raises(FewbitsError, match=message):
            fit(rows)


def test_more_dims_than_the_rows_hold(x):
    with pytest.raises(FewbitsError, match="dims=10 is more than the 7 directions"):
        PCARAG(dims=10).fit(x[:8])
    flat = x[:, :3] @ np.random.default_rng(0).standard_normal((3, 30)).astype(np.float32)
    with pytest.raises(FewbitsError, match="take dims=3 or less"):
        PCARAG(dims=4).fit(flat)
    assert PCARAG(variance=1.0).fit(flat).components_.shape == (3, 30)
    duplicates = np.repeat(x[:3], 100, axis=0)
    assert PCARAG(variance=1.0).fit(duplicates).components_.shape == (2, DIMS)


def test_bad_blocks_name_the_row_of_the_whole(x):
    with pytest.raises(FewbitsError, match="at least 2 rows"):
        PCARAG().fit_blocks([])
    with pytest.raises(FewbitsError, match="different widths"):
        PCARAG().fit_blocks([x, x[:, :5]])
    bad = x[:4].copy()
    bad[2, 1] = np.inf
    with pytest.raises(FewbitsError, match="row 402"):
        PCARAG().fit_blocks([x, bad])
    bad[2] = 0
    with pytest.raises(FewbitsError, match="row 402"):
        PCARAG(normalize=True).fit_blocks([x, bad])


def test_unfitted_wrong_width_and_overflow(x):
    for ask in ("to_faiss", "to_sentence_transformers"):
        with pytest.raises(FewbitsError, match="not fitted"):
            getattr(PCARAG(), ask)()
    codec = PCARAG(dims=4, dtype="float16").fit(x)
    with pytest.raises(FewbitsError, match="24 dimensions"):
        codec.encode(x[:, :9])
    with pytest.raises(FewbitsError, match="24 dimensions"):
        codec.drift_report(x[:, :9])
    with pytest.raises(FewbitsError, match="take dtype=float32"):
        codec.encode(x * 1e6)
    with pytest.raises(FewbitsError, match="cannot hold one"):
        codec.dims_for_bytes(1)


def test_whitening_is_spelled_out_in_the_spec():
    codec = from_spec("pca-rag:dims=110,whiten=0.5,scoring=reduced,dtype=float16")
    assert codec == PCARAG(dims=110, whiten=0.5, scoring="reduced", dtype="float16")
    assert from_spec(codec.full_spec) == codec
    assert from_spec(PCARAG().full_spec) == dataclasses.replace(codec, **PCARAG().parameters())
