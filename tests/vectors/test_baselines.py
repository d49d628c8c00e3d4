import math
from typing import Any

import faiss
import numpy as np
import pytest

from fewbits.core.code import Code
from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.search import search_array
from fewbits.primitives.bits import unpack
from fewbits.primitives.lloyd_max import normal_levels
from fewbits.primitives.retrieval import overlap
from fewbits.primitives.rotation import project, random_rotation
from fewbits.vectors.baselines import (
    ITQ,
    LSH,
    OPQ,
    PQ,
    Float16,
    Int8,
    RaBitQ,
    Sign,
    TurboQuant,
    byte_grid,
)

DIMS = 32
METRICS = ["cosine", "ip", "l2"]


def correlated(rows: int, dims: int = DIMS, seed: int = 0, mixed: bool = True) -> np.ndarray:
    """Unit rows off the origin whose variances fall, along the axes or (mixed) across them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dims)) * np.geomspace(1, 0.1, dims) + 0.15
    if mixed:
        x = x @ np.linalg.qr(np.random.default_rng(99).standard_normal((dims, dims)))[0]
    return unit(x)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random_units(rows: int, dims: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((rows, dims)))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return correlated(1000)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return correlated(40, seed=1)


def fitted(spec: str, x: np.ndarray) -> tuple[Codec, Code, np.ndarray]:
    """The codec, the code of the rows, and what it decodes to."""
    codec = from_spec(spec).fit(x)
    code = codec.encode(x)
    return codec, code, codec.decode(code)


def squared_error(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(((x.astype(np.float64) - decoded) ** 2).sum(axis=1).mean())


def check_search_ranks_decoded_rows(
    spec: str, x: np.ndarray, queries: np.ndarray, metric: str, atol: float = 1e-5
) -> None:
    """Ten matches have the ten best scores that any decoded rows have."""
    codec, code, decoded = fitted(spec, x)
    scores, rows = codec.search(code, queries, 10, metric)
    np.testing.assert_allclose(
        scores, search_array(queries, decoded, 10, metric)[0], rtol=1e-4, atol=atol
    )
    if metric == "l2":
        own = -((queries[:, None] - decoded[rows]) ** 2).sum(axis=2)
    else:
        own = np.einsum("qd,qkd->qk", queries, decoded[rows])
    np.testing.assert_allclose(scores, own, rtol=1e-4, atol=atol)


# -- float16 and int8 ----------------------------------------------------------------------


def test_float16_holds_a_nearest_half_of_every_number(x: np.ndarray) -> None:
    _, code, decoded = fitted("float16", x)
    np.testing.assert_array_equal(code["codes"].view(np.float16).astype(np.float32), decoded)
    halves = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.abs(decoded - x), np.abs(halves - x))  # ties go either way
    assert (np.abs(decoded - x) <= np.abs(x) * 2.0**-11 + 2.0**-25).all()
    assert code.bytes_per_item == 2 * DIMS


def test_float16_refuses_what_it_cannot_hold() -> None:
    codec = Float16().fit(np.ones((2, 3)))
    assert codec.decode(codec.encode([[65504.0, -65504, 0]])).tolist() == [[65504, -65504, 0]]
    with pytest.raises(FewbitsError, match="65504"):
        codec.encode([[65505.0, 0, 0]])


def test_int8_is_off_by_half_a_step_of_each_dimension_at_most(x: np.ndarray) -> None:
    _, code, decoded = fitted("int8", x)
    assert code["codes"].dtype == np.uint8
    assert code.bytes_per_item == DIMS
    step = (x.max(axis=0) - x.min(axis=0)) / 255
    assert (np.abs(decoded - x) <= step * 0.5 + 1e-6).all()
    assert code["codes"].min(axis=0).tolist() == [0] * DIMS
    assert code["codes"].max(axis=0).tolist() == [255] * DIMS


def test_int8_clips_rows_beyond_the_range_it_learned(x: np.ndarray) -> None:
    codec = Int8().fit(x)
    low, high = x.min(axis=0), x.max(axis=0)
    for factor, edge in ((100, high), (-100, low)):
        decoded = codec.decode(codec.encode(factor * np.ones((1, DIMS))))[0]
        np.testing.assert_allclose(decoded, edge, atol=float((high - low).max()) / 255)


def test_int8_keeps_a_dimension_that_never_changes(x: np.ndarray) -> None:
    x = x.copy()
    x[:, 4] = 0.3
    np.testing.assert_array_equal(fitted("int8", x)[2][:, 4], x[:, 4])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "spec", ["float16", "int8", "pq:bytes=8", "pq:bytes=7", "opq:bytes=4,rounds=5"]
)
def test_codes_in_an_index_are_ranked_as_decoded(
    x: np.ndarray, queries: np.ndarray, spec: str, metric: str
) -> None:
    check_search_ranks_decoded_rows(spec, x, queries, metric)


# -- product quantization ------------------------------------------------------------------


@pytest.mark.parametrize(("size", "width"), [(4, 32), (8, 32), (5, 35), (7, 35)])
def test_pq_is_the_index_of_faiss(
    x: np.ndarray, queries: np.ndarray, size: int, width: int
) -> None:
    codec = PQ(bytes=size, seed=3).fit(x)
    assert codec.centroids_.shape == (size, 256, width // size)
    peer = faiss.IndexPQ(width, size, 8)
    peer.pq.cp.seed = 4
    peer.pq.cp.min_points_per_centroid = 1
    padded = np.pad(x, ((0, 0), (0, width - DIMS)))
    peer.train(padded)
    peer.add(padded)
    code = codec.encode(x)
    assert code.bytes_per_item == size
    np.testing.assert_array_equal(code["codes"], peer.sa_encode(padded))
    distances, _ = peer.search(np.pad(queries, ((0, 0), (0, width - DIMS))), 10)
    np.testing.assert_allclose(codec.search(code, queries, 10, "l2")[0], -distances, atol=1e-6)


def test_pq_decodes_to_its_centroids(x: np.ndarray) -> None:
    codec, code, decoded = fitted("pq:bytes=5", x)
    assert isinstance(codec, PQ)
    parts = [codec.centroids_[group][code["codes"][:, group]] for group in range(5)]
    np.testing.assert_array_equal(decoded, np.concatenate(parts, axis=1)[:, :DIMS])


def test_seeds_of_pq_differ(x: np.ndarray) -> None:
    assert PQ(bytes=4, seed=0).fit(x).digest != PQ(bytes=4, seed=1).fit(x).digest


@pytest.mark.parametrize("dims", [None, 16, 8])
def test_opq_turns_by_an_orthonormal_matrix(x: np.ndarray, dims: int | None) -> None:
    codec = OPQ(bytes=4, dims=dims, rounds=10).fit(x)
    kept = dims or DIMS
    assert codec.rotation_.shape == (DIMS, kept)
    np.testing.assert_allclose(codec.rotation_.T @ codec.rotation_, np.eye(kept), atol=1e-4)
    assert codec.encode(x).bytes_per_item == 4


def test_opq_drops_dimensions_that_do_not_divide() -> None:
    x = correlated(400, dims=22)
    codec, code, decoded = fitted("opq:bytes=5,rounds=5", x)
    assert isinstance(codec, OPQ)
    assert codec.rotation_.shape == (22, 20)
    assert code.bytes_per_item == 5
    assert decoded.shape == (400, 22)


@pytest.mark.parametrize("mixed", [False, True])
def test_opq_beats_pq_where_dimensions_are_not_alike(mixed: bool) -> None:
    x, held_out = correlated(800, mixed=mixed), correlated(500, seed=5, mixed=mixed)
    errors = []
    for codec in (PQ(bytes=4), OPQ(bytes=4, rounds=10)):
        codec.fit(x)
        errors.append(squared_error(held_out, codec.decode(codec.encode(held_out))))
    assert errors[1] < 0.95 * errors[0]


def test_opq_is_the_matrix_of_faiss_before_a_product_quantizer(x: np.ndarray) -> None:
    codec = OPQ(bytes=4, rounds=5, seed=3).fit(x)
    matrix = faiss.OPQMatrix(DIMS, 4, DIMS)
    matrix.niter = 5
    quantizer = faiss.ProductQuantizer(DIMS, 4, 8)
    quantizer.cp.seed = 4
    quantizer.cp.min_points_per_centroid = 1
    matrix.pq = quantizer
    matrix.train(x)
    np.testing.assert_allclose(x @ codec.rotation_, matrix.apply(x), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pq:bytes=0", "bytes=0 must be between 1 and the dimensions, 32"),
        ("pq:bytes=33", "bytes=33"),
        ("opq:bytes=33", "bytes=33"),
        ("opq:bytes=8,dims=12", "multiple of bytes=8"),
        ("opq:bytes=8,dims=40", "at most 32"),
        ("opq:bytes=8,dims=0", "dims=0"),
        ("opq:bytes=8,dims=-8", "dims=-8"),
        ("opq:bytes=8,rounds=0", "rounds=0"),
        ("rabitq:bits=0", "bits=0 must be between 1 and 8"),
        ("rabitq:bits=9", "bits=9"),
        ("turboquant:bits=0", "bits=0"),
        ("turboquant:bits=9", "bits=9"),
        ("lsh:bits=0", "bits=0"),
        ("lsh:bits=-3", "bits=-3"),
        ("lsh:bits=2049", "64 times the dimensions"),
        ("itq:bits=0", "bits=0"),
        ("itq:bits=33", "bits=33"),
    ],
)
def test_impossible_settings_are_refused(x: np.ndarray, spec: str, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        from_spec(spec).fit(x)


@pytest.mark.parametrize("spec", ["pq:bytes=4", "opq:bytes=4"])
def test_too_few_rows_for_the_centroids_are_refused(x: np.ndarray, spec: str) -> None:
    with pytest.raises(FewbitsError, match="at least 256 rows, not 255"):
        from_spec(spec).fit(x[:255])
    from_spec(spec).fit(x[:256])


# -- RaBitQ --------------------------------------------------------------------------------


def rabitq_bytes(dims: int, bits: int) -> int:
    """Signs and two factors; with more bits, the lower bits, an error bound and two factors."""
    signs = -(-dims // 8)
    return signs + 8 if bits == 1 else signs + 20 + -(-dims * (bits - 1) // 8)


@pytest.mark.parametrize("dims", [32, 21])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rabitq_is_the_index_of_faiss_on_turned_rows(bits: int, dims: int) -> None:
    x, queries = correlated(400, dims), correlated(20, dims, seed=1)
    codec = RaBitQ(bits=bits).fit(x)
    np.testing.assert_allclose(codec.rotation_ @ codec.rotation_.T, np.eye(dims), atol=1e-5)
    turned = project(x, codec.rotation_)
    np.testing.assert_allclose(codec.center_, turned.mean(axis=0), atol=1e-6)
    peer = faiss.IndexRaBitQ(dims, faiss.METRIC_L2, bits)
    peer.train(turned)
    faiss.copy_array_to_vector(codec.center_, peer.center)  # the same but for rounding
    peer.qb = 8
    peer.add(turned)
    code = codec.encode(x)
    assert code.bytes_per_item == rabitq_bytes(dims, bits) == peer.sa_code_size()
    signs = code["codes"][:, : -(-dims // 8)]
    expected_signs = turned > codec.center_
    assert (unpack(np.ascontiguousarray(signs), dims, 1) == expected_signs).mean() > 0.999
    distances, rows = peer.search(queries @ codec.rotation_, 10)
    scores, found = codec.search(code, queries, 10, "l2")
    np.testing.assert_allclose(scores, -distances, atol=1e-5)
    np.testing.assert_array_equal(code["codes"], peer.sa_encode(turned))
    assert overlap(found, rows, 10) > 0.99


@pytest.mark.parametrize("dims", [32, 21])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rabitq_decodes_to_the_vectors_that_its_distances_are_made_of(bits: int, dims: int) -> None:
    x, queries = correlated(300, dims), correlated(20, dims, seed=1)
    codec, code, decoded = fitted(f"rabitq:bits={bits}", x)
    assert isinstance(codec, RaBitQ)
    index = codec._index("l2")
    index.qb = 0  # queries as they are
    index.add_sa_codes(code["codes"])
    distances, rows = index.search(queries @ codec.rotation_, 300)
    # With c the centre, |x − c|² is stored, and <x − c, q − c> is estimated by decoded x.
    center = codec.rotation_ @ codec.center_
    to_rows = ((x - center) ** 2).sum(axis=1)
    to_queries = ((queries - center) ** 2).sum(axis=1)
    products = (queries - center) @ (decoded - center).T
    expected = np.maximum(to_queries[:, None] + to_rows - 2 * products, 0)
    np.testing.assert_allclose(distances, np.take_along_axis(expected, rows, axis=1), atol=2e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inner_products_with_decoded_rabitq_rows_are_right_on_average(bits: int) -> None:
    x, queries = correlated(60), correlated(60, seed=1)
    center = x.mean(axis=0)
    exact = (x - center) @ (queries - center).T
    slopes = []
    for seed in range(40):
        decoded = fitted(f"rabitq:bits={bits},seed={seed}", x)[2]
        estimate = (decoded - center) @ (queries - center).T
        slopes.append(float((estimate * exact).sum() / (exact**2).sum()))
    # The nearest point of the grid, without the correcting factor, would give 0.8 with one bit.
    uncertainty = float(np.std(slopes)) / math.sqrt(len(slopes))
    assert np.mean(slopes) == pytest.approx(1, abs=max(4 * uncertainty, 0.002))
    assert uncertainty < 0.01


def test_each_bit_makes_rabitq_more_exact(x: np.ndarray) -> None:
    errors = [squared_error(x, fitted(f"rabitq:bits={bits}", x)[2]) for bits in range(1, 9)]
    assert (np.diff(errors) < 0).all()
    assert errors[3] < 0.03
    assert errors[7] < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rabitq_scores_of_unit_rows_are_cosines(
    x: np.ndarray, queries: np.ndarray, bits: int
) -> None:
    codec, code, decoded = fitted(f"rabitq:bits={bits}", x)
    scores, rows = codec.search(code, queries, 10, "cosine")
    exact = np.einsum("qd,qkd->qk", queries, x[rows])
    by_decoding = np.einsum("qd,qkd->qk", queries, decoded[rows])
    assert np.abs(scores - exact).mean() < [0.4, 0.2, 0.05, 0.005][int(math.log2(bits))]
    assert np.abs(scores - by_decoding).mean() < 0.1
    assert (np.diff(scores, axis=1) <= 0).all()


def test_rabitq_by_inner_product_ranks_decoded_rows(queries: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    x = correlated(500) * np.exp(rng.standard_normal((500, 1))).astype(np.float32)
    for bits in (1, 4):
        check_search_ranks_decoded_rows(f"rabitq:bits={bits}", x, queries, "ip", atol=1e-4)


# -- TurboQuant ----------------------------------------------------------------------------

DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Mean squared error of the best quantizer of a normal variable."""


@pytest.mark.parametrize("bits", DISTORTION)
def test_turboquant_loses_of_random_unit_rows_what_theory_says(bits: int) -> None:
    x = random_units(500, 256)
    _, code, decoded = fitted(f"turboquant:bits={bits}", x)
    assert squared_error(x, decoded) == pytest.approx(DISTORTION[bits], rel=0.025)
    assert code.bytes_per_item == 256 * bits / 8 + 2


@pytest.mark.parametrize("bits", DISTORTION)
def test_turboquant_loses_no_more_of_the_worst_rows(bits: int) -> None:
    one_hot = np.eye(256, dtype=np.float32)
    decoded = fitted(f"turboquant:bits={bits}", one_hot)[2]
    assert squared_error(one_hot, decoded) == pytest.approx(DISTORTION[bits], rel=0.05)


def test_turboquant_rounds_turned_rows_to_the_nearest_levels() -> None:
    x = random_units(50, 21)
    for bits in range(1, 9):
        codec, code, _ = fitted(f"turboquant:bits={bits}", x)
        assert isinstance(codec, TurboQuant)
        np.testing.assert_allclose(codec.levels, normal_levels(bits) / math.sqrt(21), rtol=1e-6)
        distances = np.abs((x @ codec.rotation_)[:, :, None] - codec.levels)
        chosen = unpack(code["packed"], 21, bits)
        nearest = np.take_along_axis(distances, chosen[:, :, None].astype(int), axis=2)[:, :, 0]
        np.testing.assert_allclose(nearest, distances.min(axis=2), atol=1e-6)


def test_turboquant_keeps_lengths_beside_directions() -> None:
    x = random_units(100, 64) * np.linspace(0, 300, 100, dtype=np.float32)[:, None]
    _, code, decoded = fitted("turboquant:bits=8", x)
    lengths = np.linalg.norm(x, axis=1)
    np.testing.assert_array_equal(code["norms"], lengths.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), lengths, rtol=0.01)
    assert not decoded[0].any()
    with pytest.raises(FewbitsError, match="65504"):
        TurboQuant().fit(x).encode(x * 1e4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_turboquant_search_ranks_decoded_rows(
    x: np.ndarray, queries: np.ndarray, bits: int, metric: str
) -> None:
    check_search_ranks_decoded_rows(f"turboquant:bits={bits}", x, queries, metric)


@pytest.mark.parametrize("bits", [1, 4])
def test_turboquant_search_minds_lengths_that_differ_much(queries: np.ndarray, bits: int) -> None:
    rng = np.random.default_rng(0)
    x = correlated(3000) * np.exp(rng.standard_normal((3000, 1))).astype(np.float32)
    check_search_ranks_decoded_rows(f"turboquant:bits={bits}", x, queries, "ip", atol=1e-3)


# -- signs ---------------------------------------------------------------------------------


def test_sign_decodes_to_the_mean_and_the_mean_size_of_what_differs(x: np.ndarray) -> None:
    codec, code, decoded = fitted("sign", x)
    mean = x.mean(axis=0)
    np.testing.assert_array_equal(unpack(code["bits"], DIMS, 1), x > mean)
    expected = mean + np.where(x > mean, 1, -1) * np.abs(x - mean).mean(axis=0)
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    assert code.bytes_per_item == DIMS / 8
    assert codec.codec_bytes == 2 * 4 * DIMS


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "spec", ["sign", "itq", "itq:bits=20", "lsh", "lsh:bits=13", "lsh:bits=75"]
)
def test_signs_are_scored_exactly_by_float_queries(
    x: np.ndarray, queries: np.ndarray, spec: str, metric: str
) -> None:
    check_search_ranks_decoded_rows(spec, x, queries, metric)


@pytest.mark.parametrize("spec", ["sign", "itq", "lsh:bits=64"])
def test_float_queries_find_more_than_the_distance_of_signs(
    x: np.ndarray, queries: np.ndarray, spec: str
) -> None:
    codec, code, _ = fitted(spec, x)
    truth = search_array(queries, x, 10, "ip")[1]
    asked, stored = codec.encode(queries)["bits"], code["bits"]
    differ = np.unpackbits(asked[:, None] ^ stored[None], axis=2).sum(axis=2)
    by_signs = np.argsort(differ, axis=1, kind="stable")[:, :10]
    rows = codec.search(code, queries, 10)[1]
    assert overlap(rows, truth, 10) > overlap(by_signs, truth, 10) + 0.05


def test_signs_of_lsh_differ_as_often_as_angles_are_wide() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 16))
    codec = LSH(bits=1024).fit(np.concatenate([x, -x]))
    np.testing.assert_allclose(codec.mean_, 0, atol=1e-6)
    one, other = rng.standard_normal((2, 50, 16))
    mixed = np.linspace(0, 1, 50)[:, None]
    other = mixed * other + (1 - mixed) * one  # from no angle to wide ones
    bits = [unpack(codec.encode(side)["bits"], 1024, 1) for side in (one, other)]
    cosines = (unit(one) * unit(other)).sum(axis=1).clip(-1, 1)
    differ = (bits[0] != bits[1]).mean(axis=1)
    np.testing.assert_allclose(differ, np.arccos(cosines) / math.pi, atol=0.06)
    assert abs((differ - np.arccos(cosines) / math.pi).mean()) < 0.01


def test_lsh_projects_on_random_orthonormal_directions_as_far_as_they_go(x: np.ndarray) -> None:
    for bits in (10, 32, 80):
        projection = LSH(bits=bits).fit(x).projection_
        assert projection.shape == (DIMS, bits)
        for start in range(0, bits, DIMS):
            block = projection[:, start : start + DIMS]
            np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
    assert LSH().fit(x).projection_.shape == (DIMS, DIMS)
    assert not np.allclose(LSH(seed=1).fit(x).projection_, LSH().fit(x).projection_)


def test_more_signs_are_nearer(x: np.ndarray) -> None:
    for spec, sizes in (("lsh", (8, 32, 128, 512)), ("itq", (8, 16, 32))):
        errors = [squared_error(x, fitted(f"{spec}:bits={bits}", x)[2]) for bits in sizes]
        assert errors == sorted(errors, reverse=True)


def sign_loss(coordinates: np.ndarray) -> float:
    """What the paper minimises: squared distance of coordinates from the corners ±1."""
    return float(((np.where(coordinates > 0, 1, -1) - coordinates) ** 2).mean())


@pytest.mark.parametrize("bits", [8, 20, 32])
def test_itq_turns_principal_directions_so_that_signs_lose_less(x: np.ndarray, bits: int) -> None:
    codec = ITQ(bits=bits).fit(x)
    centred = x - x.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:bits].T
    # The same space as that of the leading components, and a rotation within it.
    np.testing.assert_allclose(
        codec.projection_ @ codec.projection_.T, directions @ directions.T, atol=1e-3
    )
    np.testing.assert_allclose(codec.projection_.T @ codec.projection_, np.eye(bits), atol=1e-4)
    turned = [sign_loss(centred @ directions @ random_rotation(bits, seed)) for seed in range(10)]
    assert sign_loss(centred @ codec.projection_) < min(turned)
    assert sign_loss(centred @ codec.projection_) < sign_loss(centred @ directions)


def test_itq_is_a_fixed_point_of_its_two_steps(x: np.ndarray) -> None:
    codec = ITQ(bits=8).fit(x)
    coordinates = (x - x.mean(axis=0)) @ codec.projection_
    left, _, right = np.linalg.svd(coordinates.T @ np.where(coordinates > 0, 1.0, -1.0))
    assert np.linalg.norm(left @ right - np.eye(8)) < 0.05


def test_itq_keeps_more_than_lsh_of_the_same_size(x: np.ndarray, queries: np.ndarray) -> None:
    truth = search_array(queries, x, 10, "ip")[1]
    recalls = []
    for spec in ("lsh:bits=16", "itq:bits=16"):
        codec, code, _ = fitted(spec, x)
        recalls.append(overlap(codec.search(code, queries, 10)[1], truth, 10))
    assert recalls[1] > recalls[0] + 0.05


# -- all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "array"),
    [
        ("int8", "range", np.zeros((2, 31), np.float32)),
        ("int8", "range", np.zeros((2, 32), np.float64)),
        ("pq:bytes=4", "centroids", np.zeros((4, 256, 7), np.float32)),
        ("pq:bytes=4", "centroids", np.zeros((4, 255, 8), np.float32)),
        ("pq:bytes=4", "centroids", np.zeros((4, 256, 8), np.float64)),
        ("opq:bytes=4,rounds=2", "rotation", np.zeros((32, 28), np.float32)),
        ("opq:bytes=4,rounds=2", "centroids", np.zeros((4, 256, 7), np.float32)),
        ("rabitq", "rotation", np.zeros((32, 31), np.float32)),
        ("rabitq", "center", np.zeros(31, np.float32)),
        ("rabitq", "center", np.zeros(32, np.int32)),
        ("turboquant", "rotation", np.zeros((31, 32), np.float32)),
        ("sign", "mean", np.zeros(31, np.float32)),
        ("sign", "scale", np.zeros(33, np.float32)),
        ("lsh:bits=9", "projection", np.zeros((32, 32), np.float32)),
        ("lsh:bits=9", "scale", np.zeros(32, np.float32)),
        ("itq:bits=9", "projection", np.zeros((9, 32), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    x: np.ndarray, spec: str, name: str, array: np.ndarray
) -> None:
    state: dict[str, Any] = from_spec(spec).fit(x).state()
    assert name in state
    with pytest.raises(ValueError, match=name):
        from_spec(spec)._restore(DIMS, state | {name: array})


@pytest.mark.parametrize(
    ("dims", "most", "sizes"),
    [
        (384, None, [12, 24, 48, 96]),
        (384, 48, [12, 24, 48]),
        (32, None, [2, 4, 8]),
        (8, None, [2]),
        (7, None, []),
    ],
)
def test_grids_of_bytes_take_a_thirty_second_to_a_quarter_of_the_dimensions(
    dims: int, most: int | None, sizes: list[int]
) -> None:
    assert byte_grid(dims, most) == sizes


def test_grids_leave_out_what_the_rows_are_too_few_for() -> None:
    assert PQ.grid(384, 255) == OPQ.grid(384, 255) == []
    assert PQ.grid(384, 256) == [f"pq:bytes={size}" for size in (12, 24, 48, 96)]
    assert "opq:bytes=24,dims=96" in OPQ.grid(384, 256)
    assert ITQ.grid(384, 384) == ["itq:bits=192"]
    assert LSH.grid(384, 1) == ["lsh:bits=192", "lsh:bits=384", "lsh:bits=768"]
    assert Sign.grid(384, 1) == ["sign"]
