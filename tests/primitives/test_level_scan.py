import numpy as np
import pytest

from fewbits.primitives import level_scan
from fewbits.primitives.bits import pack
from fewbits.primitives.level_scan import LevelScan, nearly_alike

LEVELS = {
    1: np.array([-1, 1], dtype=np.float32),
    2: np.array([-1.5, -0.4, 0.5, 1.6], dtype=np.float32),
    4: np.linspace(-2, 2.2, 16, dtype=np.float32),
}


def numbers_of(rows: int, dims: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, dims), dtype=np.uint8)


def queries_of(count: int, dims: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)


def scan_of(numbers: np.ndarray, bits: int, scale: np.ndarray | None = None) -> LevelScan:
    return LevelScan(pack(numbers, bits), numbers.shape[1], bits, LEVELS[bits], scale)


def all_scores(
    numbers: np.ndarray, bits: int, queries: np.ndarray, scale: np.ndarray | None = None
) -> np.ndarray:
    """(q, n) float64: the inner product of every query with every row."""
    scores = queries.astype(np.float64) @ LEVELS[bits][numbers].astype(np.float64).T
    return scores if scale is None else scores * scale


def check_matches(scores: np.ndarray, rows: np.ndarray, exact: np.ndarray, k: int) -> None:
    """Exact scores of distinct rows, the best first."""
    assert scores.shape == rows.shape == (len(exact), k)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    assert all(len(set(row)) == k for row in rows.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    expected = np.take_along_axis(exact, rows, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 7, 33, 64])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_are_ranked_exactly(bits: int, dims: int, count: int) -> None:
    numbers, queries = numbers_of(30, dims, bits), queries_of(count, dims)
    exact = all_scores(numbers, bits, queries)
    scores, rows = scan_of(numbers, bits).search(queries, 10)
    check_matches(scores, rows, exact, 10)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("dims", "rows"), [(48, 2000), (131, 999), (384, 1500)])
def test_many_rows_are_ranked_by_exact_scores_of_the_best(bits: int, dims: int, rows: int) -> None:
    numbers, queries = numbers_of(rows, dims, bits), queries_of(67, dims)
    exact = all_scores(numbers, bits, queries)
    scores, found = scan_of(numbers, bits).search(queries, 10)
    check_matches(scores, found, exact, 10)
    tenth = np.sort(exact, axis=1)[:, -10, None]
    assert (scores >= tenth - 1e-4).mean() > 0.995


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 31, 33])
def test_all_rows_can_be_asked_for(bits: int, rows: int) -> None:
    numbers, queries = numbers_of(rows, 12, bits), queries_of(3, 12)
    scores, found = scan_of(numbers, bits).search(queries, rows)
    check_matches(scores, found, all_scores(numbers, bits, queries), rows)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_queries_of_zeros_find_distinct_rows_with_score_zero(bits: int) -> None:
    numbers = numbers_of(500, 20, bits)
    queries = queries_of(3, 20)
    queries[1] = 0
    scores, rows = scan_of(numbers, bits).search(queries, 8)
    check_matches(scores, rows, all_scores(numbers, bits, queries), 8)
    assert not scores[1].any()


def test_the_one_good_row_is_found_though_all_others_are_equally_bad() -> None:
    numbers = numbers_of(1000, 32, 1)
    numbers[:, 3] = 0
    numbers[900, 3] = 1
    query = np.zeros((1, 32), dtype=np.float32)
    query[0, 3] = 1
    scores, rows = scan_of(numbers, 1).search(query, 5)
    check_matches(scores, rows, all_scores(numbers, 1, query), 5)
    assert rows[0, 0] == 900


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_equal_rows_are_told_apart_by_number(bits: int) -> None:
    numbers = np.repeat(numbers_of(1, 16, bits), 300, axis=0)
    queries = queries_of(4, 16)
    scores, rows = scan_of(numbers, bits).search(queries, 20)
    check_matches(scores, rows, all_scores(numbers, bits, queries), 20)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 2.0])
def test_factors_of_rows_count_however_much_they_differ(bits: int, spread: float) -> None:
    rng = np.random.default_rng(5)
    scale = np.exp(spread * rng.standard_normal(3000)).astype(np.float32)
    scale[17] = 0
    numbers, queries = numbers_of(3000, 40, bits), queries_of(9, 40)
    exact = all_scores(numbers, bits, queries, scale)
    scores, rows = scan_of(numbers, bits, scale).search(queries, 10)
    check_matches(scores, rows, exact, 10)
    tenth = np.sort(exact, axis=1)[:, -10, None]
    assert (scores >= tenth - 1e-4).mean() > 0.98


def test_one_row_much_longer_than_the_others_is_found() -> None:
    numbers, queries = numbers_of(5000, 40, 2), queries_of(30, 40)
    scale = np.ones(5000, dtype=np.float32)
    scale[4321] = 6
    best = all_scores(numbers, 2, queries, scale).argmax(axis=1)
    assert (best == 4321).any()
    np.testing.assert_array_equal(scan_of(numbers, 2, scale).search(queries, 1)[1][:, 0], best)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], True),
        ([0.95, 1.05, 1.0, 1.0], True),
        ([0.5, 1.5, 1.0, 1.0], False),
        ([1.0] * 10_000 + [3.0], False),
        ([0.0, 0.0], True),
    ],
)
def test_whether_factors_are_nearly_alike(scale: list[float], expected: bool) -> None:
    assert nearly_alike(np.array(scale, dtype=np.float32)) is expected


@pytest.mark.parametrize("cells", [40, 700, 10**6])
@pytest.mark.parametrize("scaled", [False, True])
def test_scoring_all_rows_goes_block_by_block(
    monkeypatch: pytest.MonkeyPatch, cells: int, scaled: bool
) -> None:
    monkeypatch.setattr(level_scan, "BLOCK_CELLS", cells)
    scale = np.linspace(0.1, 3, 50, dtype=np.float32) if scaled else None
    numbers, queries = numbers_of(50, 20, 4), queries_of(6, 20)
    exact = all_scores(numbers, 4, queries, scale)
    scores, rows = scan_of(numbers, 4, scale).search_all(queries, 12)
    check_matches(scores, rows, exact, 12)
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :12])


def test_packed_rows_and_queries_may_be_read_only_and_stay_as_they_are() -> None:
    packed, queries = pack(numbers_of(40, 10, 2), 2), queries_of(2, 10)
    before = packed.copy(), queries.copy()
    packed.flags.writeable = queries.flags.writeable = False
    LevelScan(packed, 10, 2, LEVELS[2]).search(queries, 5)
    np.testing.assert_array_equal(packed, before[0])
    np.testing.assert_array_equal(queries, before[1])
