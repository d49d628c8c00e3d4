import numpy as np
import pytest

from fewbits.primitives import sketch
from fewbits.primitives.ragged import Ragged


def random_sets(seed=0, count=6, dims=5):
    rng = np.random.default_rng(seed)
    sets = [rng.standard_normal((n, dims)) for n in rng.integers(1, 9, count)]
    return Ragged.from_sets([s.astype(np.float32) for s in sets])


def test_a_seed_means_the_same_numbers_forever():
    source = sketch.stream(7, 1, 2)
    np.testing.assert_array_equal(
        source.random_raw(2), np.array([8834056210639959753, 2604645062250368442], dtype=np.uint64)
    )
    np.testing.assert_allclose(
        sketch.normals(sketch.stream(7), (3,)), [0.15576835, 0.07226029, -0.95678526], rtol=1e-6
    )
    np.testing.assert_array_equal(
        sketch.signs(sketch.stream(7), (8,)), [-1, -1, 1, -1, 1, 1, 1, -1]
    )
    slots, sign = sketch.count_sketch(sketch.stream(7), 6, 10)
    assert slots.tolist() == [1, 2, 3, 7, 0, 6]
    assert sign.tolist() == [-1, -1, 1, 1, -1, 1]


def test_paths_give_independent_streams():
    one = sketch.normals(sketch.stream(0, 0), (20_000,))
    other = sketch.normals(sketch.stream(0, 1), (20_000,))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_normals_are_standard_normal():
    z = sketch.normals(sketch.stream(0), (99_999,))
    assert z.dtype == np.float32
    assert abs(z.mean()) < 0.015
    assert abs(z.std() - 1) < 0.015
    assert abs((z < 1).mean() - 0.8413) < 0.006
    assert abs(np.corrcoef(z[:49_999], z[50_000:])[0, 1]) < 0.02


def test_signs_are_fair():
    signs = sketch.signs(sketch.stream(0), (300, 333))
    assert signs.dtype == np.float32
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 0.015


def test_buckets_are_plain_binary_numbers_and_zero_counts_as_below():
    dots = np.array([[1, -1, 2], [0, 1, 0], [-1, -1, -1]], dtype=np.float32)
    assert sketch.bucket_ids(dots).tolist() == [0b101, 0b010, 0]
    assert sketch.bucket_ids(np.empty((4, 0), dtype=np.float32)).tolist() == [0] * 4


def test_two_vectors_share_a_hash_bit_as_often_as_their_angle_says():
    planes = sketch.hyperplanes(sketch.stream(0), 8, 20_000)
    x, y = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert abs(((x @ planes > 0) == (y @ planes > 0)).mean() - (1 - angle / np.pi)) < 0.012


@pytest.mark.parametrize("draw", [sketch.sign_matrix, sketch.count_sketch_matrix])
def test_projections_keep_inner_products_on_average(draw):
    x, y = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    dots = []
    for seed in range(400):
        matrix = draw(sketch.stream(seed), 12, 5)
        dots.append((x @ matrix) @ (y @ matrix))
    assert abs(np.mean(dots) - x @ y) < 3 * np.std(dots) / np.sqrt(len(dots))


def test_adding_a_count_sketch_is_multiplying_by_its_matrix():
    x = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    out = np.ones((4, 7), dtype=np.float32)
    sketch.add_count_sketch(out, x, sketch.stream(3))
    matrix = sketch.count_sketch_matrix(sketch.stream(3), 30, 7)
    np.testing.assert_allclose(out, 1 + x @ matrix, atol=1e-5)


def test_a_large_sign_projection_is_one_matrix_in_blocks():
    dims, dims_out = 2 * sketch.SIGN_BLOCK_ROWS + 3, 5
    x = np.random.default_rng(0).standard_normal((4, dims)).astype(np.float32)
    out = np.zeros((4, dims_out), dtype=np.float32)
    sketch.add_sign_projection(out, x, 3, 1)
    probe = np.zeros((dims, dims_out), dtype=np.float32)
    sketch.add_sign_projection(probe, np.eye(dims, dtype=np.float32), 3, 1)
    np.testing.assert_allclose(out, x @ probe, atol=1e-4)
    np.testing.assert_allclose(np.abs(probe), dims_out**-0.5, rtol=1e-6)
    first, second = probe[: 2 * sketch.SIGN_BLOCK_ROWS].reshape(2, -1)
    assert 0.4 < (first == second).mean() < 0.6


def test_the_nearest_member_has_the_fewest_differing_bits():
    rng = np.random.default_rng(0)
    for bits in range(6):
        members = np.where(
            rng.random((20, 2**bits)) < 0.3,
            rng.permuted(np.tile(np.arange(2**bits), (20, 1)), axis=1),
            2**bits,
        )
        members[:, 0] = np.where((members == 2**bits).all(axis=1), 0, members[:, 0])
        found = sketch.nearest_member(members, 2**bits)
        for row, got in zip(members, found, strict=True):
            occupied = np.flatnonzero(row < 2**bits)
            for bucket in range(2**bits):
                expected = min(((bucket ^ int(o)).bit_count(), row[o]) for o in occupied)[1]
                assert got[bucket] == expected


def test_a_vector_is_nearest_to_its_own_bucket():
    sets = random_sets()
    ids = np.random.default_rng(1).integers(0, 16, len(sets.flat))
    nearest = sketch.nearest_by_bits(ids, sets, 16)
    for vector, (owner, bucket) in enumerate(zip(sets.owner, ids, strict=True)):
        same = (sets.owner == owner) & (ids == bucket)
        assert nearest[owner, bucket] == np.flatnonzero(same)[0] <= vector


def test_sums_and_counts_by_bucket():
    sets = random_sets()
    ids = np.random.default_rng(1).integers(0, 4, len(sets.flat))
    sums, counts = sketch.sum_by_bucket(sets.flat, sets, ids, 4)
    for owner in range(len(sets)):
        for bucket in range(4):
            chosen = (sets.owner == owner) & (ids == bucket)
            assert counts[owner, bucket] == chosen.sum()
            np.testing.assert_allclose(
                sums[owner, bucket], sets.flat[chosen].sum(axis=0), atol=1e-5
            )


def test_value_order_does_not_depend_on_the_order_given():
    sets = random_sets()
    shuffled = np.random.default_rng(2).permutation(len(sets.flat))
    shuffled = shuffled[np.argsort(sets.owner[shuffled], kind="stable")]
    one = sketch.in_value_order(sets)
    other = sketch.in_value_order(sets.with_flat(sets.flat[shuffled]))
    np.testing.assert_array_equal(one.flat, other.flat)
    for before, after in zip(sets, one, strict=True):
        assert sorted(map(tuple, before)) == sorted(map(tuple, after))


@pytest.mark.parametrize(("vectors", "count"), [(1, 10), (10, 1), (7, 3), (100, 100)])
def test_batches_cover_all_sets_within_bounds(vectors, count):
    sets = random_sets(count=20)
    parts = list(sketch.batches(sets, vectors, count))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(20))
    for part in parts:
        length = part.stop - part.start
        assert length == 1 or (length <= count and len(sets[part].flat) <= vectors)
