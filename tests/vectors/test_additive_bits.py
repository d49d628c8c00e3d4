import itertools

import numpy as np
import pytest

from fewbits.core.codec import DecodingSearcher
from fewbits.core.errors import FewbitsError
from fewbits.primitives.retrieval import overlap
from fewbits.vectors.additive_bits import SIGNS, AdditiveBits, flip, share_bits
from fewbits.vectors.baselines import ITQ


def correlated(rows: int, dims: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, dims + 1))
    turn = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
    x = (rng.standard_normal((rows, dims)) * spread) @ turn
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def squared_error(x: np.ndarray, signs: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return ((x - signs @ directions) ** 2).sum(axis=1)


def test_bits_go_where_they_lower_the_error_most():
    assert share_bits(np.array([16.0, 1.0]), 4).tolist() == [3, 1]
    assert share_bits(np.array([1.0, 1.0, 1.0, 1.0]), 8).tolist() == [2, 2, 2, 2]
    assert share_bits(np.array([1.0, 0.0]), 3).tolist() == [3, 0]


def test_flipping_never_raises_the_error_and_ends_where_no_single_flip_helps():
    rng = np.random.default_rng(1)
    x, directions = rng.standard_normal((50, 12)), rng.standard_normal((16, 12))
    start = SIGNS[rng.integers(0, 2, (50, 16))]
    found = flip(x, directions, start.copy(), sweeps=100)
    error = squared_error(x, found, directions)
    assert (error <= squared_error(x, start, directions) + 1e-9).all()
    for j in range(16):
        other = found.copy()
        other[:, j] *= -1
        assert (squared_error(x, other, directions) >= error - 1e-6).all()


def test_flipping_finds_the_best_signs_of_orthogonal_directions():
    rng = np.random.default_rng(2)
    directions = np.linalg.qr(rng.standard_normal((6, 6)))[0] * rng.uniform(0.5, 2, (6, 1))
    x = rng.standard_normal((20, 6))
    found = flip(x, directions, np.ones((20, 6)), sweeps=2)
    all_signs = np.array(list(itertools.product([-1.0, 1.0], repeat=6)))
    errors = np.stack([squared_error(x, signs[None], directions) for signs in all_signs])
    np.testing.assert_array_equal(found, all_signs[errors.argmin(axis=0)])


def test_size_is_exact_and_decoded_rows_have_the_length_of_the_rows():
    x = correlated(400, 32)
    codec = AdditiveBits(bytes=6).fit(x)
    code = codec.encode(x)
    assert code.bytes_per_item == 6
    np.testing.assert_allclose(np.linalg.norm(codec.decode(code), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_scan_scores_what_decoding_scores(metric):
    x, queries = correlated(500, 32), correlated(40, 32, seed=3)
    codec = AdditiveBits(bytes=5).fit(x)
    code = codec.encode(x)
    scores, rows = codec.search(code, queries, 10, metric)
    exact_scores, exact_rows = DecodingSearcher(codec, code, metric).search(queries, 10)
    np.testing.assert_allclose(scores, exact_scores, atol=1e-5)
    assert overlap(rows, exact_rows, 10) > 0.99


def test_more_bytes_are_nearer_and_sign_bits_are_farther_at_equal_bytes():
    x = correlated(1000, 32)

    def error(codec):
        decoded = codec.fit(x).decode(codec.encode(x))
        return ((decoded - x) ** 2).sum(axis=1).mean()

    errors = [error(AdditiveBits(bytes=size)) for size in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < error(ITQ(bits=32))


def test_learning_from_many_rows_takes_a_seeded_sample(monkeypatch):
    monkeypatch.setattr("fewbits.vectors.additive_bits.FIT_ROWS", 100)
    x = correlated(300, 16)
    same = [AdditiveBits(bytes=4, seed=1).fit(x).digest for _ in range(2)]
    assert same[0] == same[1] != AdditiveBits(bytes=4, seed=2).fit(x).digest


@pytest.mark.parametrize("size", [0, 17])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(FewbitsError, match="between 1 and the dimensions"):
        AdditiveBits(bytes=size).fit(correlated(50, 16))


def test_constant_rows_and_a_single_row_are_refused():
    with pytest.raises(FewbitsError, match="nothing to learn"):
        AdditiveBits(bytes=4).fit(np.ones((50, 16)))
    with pytest.raises(FewbitsError, match="at least 2 rows"):
        AdditiveBits(bytes=4).fit(np.ones((1, 16)))
