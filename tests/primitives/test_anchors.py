import numpy as np
import pytest

from fewbits.primitives.anchors import (
    POLICIES,
    SIMILARITIES,
    AnchorSimilarities,
    StableMap,
    choose_anchors,
    farthest,
    most_frequent,
    nearest_to_centres,
    stratified,
    uniform,
    unit_directions,
)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)


def blobs(rows=300, classes=6, seed=0):
    """Rows around directions far apart, and whose each is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    return (np.eye(classes)[labels] + 0.05 * rng.standard_normal((rows, classes))), labels


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 7, 200])
def test_rows_are_distinct_and_depend_on_the_seed_alone(x, policy, count):
    more = {"labels": np.arange(200) % 5, "counts": np.arange(200)}
    rows = choose_anchors(x, count, policy, seed=3, **more)
    assert rows.dtype == np.int64
    assert len(rows) == len(set(rows.tolist())) == count
    assert rows.min() >= 0
    assert rows.max() < 200
    np.testing.assert_array_equal(rows, choose_anchors(x.copy(), count, policy, seed=3, **more))
    if policy != "frequent" and count == 7:
        assert not np.array_equal(rows, choose_anchors(x, count, policy, seed=4, **more))


def test_uniform_takes_every_row_as_often():
    counts = np.bincount(np.concatenate([uniform(20, 5, seed) for seed in range(2000)]))
    assert counts.shape == (20,)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_farthest_takes_the_row_least_similar_to_those_chosen(x):
    rows = farthest(x, 20, seed=1)
    unit = unit_directions(x)
    cosines = unit @ unit.T
    for place in range(1, 20):
        nearest = cosines[:, rows[:place]].max(axis=1)
        nearest[rows[:place]] = np.inf
        assert cosines[rows[place], rows[:place]].max() == pytest.approx(nearest.min(), abs=1e-6)


def test_farthest_and_centres_spread_more_than_chance():
    data, labels = blobs()
    for choose in (farthest, nearest_to_centres):
        for seed in range(5):
            assert len(set(labels[choose(data, 6, seed)])) == 6
    reached = [len(set(labels[uniform(len(data), 6, seed)])) for seed in range(5)]
    assert np.mean(reached) < 6


def test_the_scale_of_a_row_does_not_matter(x):
    scaled = x * np.geomspace(1e-20, 1e20, len(x)).astype(np.float32)[:, None]
    for choose in (farthest, nearest_to_centres):
        np.testing.assert_array_equal(choose(scaled, 9, 2), choose(x, 9, 2))


def test_duplicates_and_zeros_still_give_different_rows():
    same = np.ones((12, 3), dtype=np.float32)
    for rows in (same, np.zeros_like(same)):
        for choose in (farthest, nearest_to_centres):
            assert len(set(choose(rows, 12, 0).tolist())) == 12


def test_stratified_is_proportional_and_leaves_no_class_out():
    labels = np.repeat(["a", "b", "c"], [600, 390, 10])
    for seed in range(5):
        chosen = np.unique(labels[stratified(labels, 100, seed)], return_counts=True)[1]
        np.testing.assert_allclose(chosen, [60, 39, 1], atol=1.01)
        assert sorted(labels[stratified(labels, 3, seed)]) == ["a", "b", "c"]
    assert len(set(labels[stratified(labels, 2, 0)])) == 2
    whole = stratified(labels, 1000, 0)
    assert sorted(whole) == list(range(1000))


def test_stratified_is_fair_within_a_class():
    labels = np.repeat([0, 1], [10, 10])
    counts = np.bincount(
        np.concatenate([stratified(labels, 4, seed) for seed in range(2000)]), minlength=20
    )
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_most_frequent_by_count_then_by_row():
    assert most_frequent(np.array([3, 9, 9, 1, 5]), 4).tolist() == [1, 2, 4, 0]
    assert most_frequent(np.array([2**60, 2**61, 0], dtype=np.uint64), 2).tolist() == [1, 0]


@pytest.mark.parametrize("count", [0, -1, 201])
def test_counts_that_cannot_be_met(x, count):
    for policy in POLICIES:
        with pytest.raises(ValueError, match=f"cannot choose {count} of 200"):
            choose_anchors(x, count, policy, labels=np.zeros(200), counts=np.ones(200))


def test_what_is_missing_or_unknown_is_named(x):
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        choose_anchors(x, 3, "best")
    with pytest.raises(ValueError, match="needs labels, one per row"):
        choose_anchors(x, 3, "stratified")
    with pytest.raises(ValueError, match="needs counts, one per row"):
        choose_anchors(x, 3, "frequent", counts=np.ones(5))


def test_sums_are_exact_in_any_order():
    rng = np.random.default_rng(1)
    x, matrix = rng.standard_normal((50, 400)), rng.standard_normal((30, 400))
    order = rng.permutation(400)
    one, other = StableMap(matrix), StableMap(matrix[:, order])
    left, right = one.directions @ one.directions.T, other.directions @ other.directions.T
    np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(one(x), x @ matrix.T, rtol=1e-6, atol=1e-6 * 400)


def test_classes_average_and_origins_come_back():
    rng = np.random.default_rng(2)
    anchors, x = rng.standard_normal((6, 4)), rng.standard_normal((9, 4))
    classes = np.array([0, 1, 0, 2, 2, 2])
    for similarity in SIMILARITIES:
        plain = AnchorSimilarities(similarity, anchors, np.ones(4), np.empty(0))(x)
        pooled = AnchorSimilarities(similarity, anchors, np.ones(4), classes)(x)
        wanted = [plain[:, classes == c].mean(axis=1) for c in range(3)]
        np.testing.assert_allclose(pooled, np.stack(wanted, axis=1), atol=1e-6)
    told = AnchorSimilarities("euclidean", anchors, np.ones(4), np.empty(0))
    np.testing.assert_allclose(
        told.to_linear(told(x)), (x - told.origin) @ told.linear.T, atol=1e-9
    )
