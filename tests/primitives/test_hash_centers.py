import numpy as np
import pytest

from fewbits.primitives.hash_centers import (
    balanced_rows,
    distances_between,
    hadamard_rows,
    hash_centers,
)


def distances(centers: np.ndarray) -> np.ndarray:
    """All pairwise Hamming distances, the slow way."""
    return (centers[:, None] != centers[None]).sum(axis=2)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_up_to_as_many_classes_as_bits_differ_in_exactly_half_the_bits(bits: int) -> None:
    for classes in (2, bits // 2 + 1, bits):
        centers = hash_centers(classes, bits)
        assert centers.shape == (classes, bits)
        assert centers.dtype == np.int8
        assert set(np.unique(centers)) <= {-1, 1}
        apart = distances(centers)
        assert (apart[~np.eye(classes, dtype=bool)] == bits // 2).all()


@pytest.mark.parametrize("bits", [8, 16, 64])
def test_up_to_twice_as_many_are_complements_or_differ_in_half(bits: int) -> None:
    centers = hash_centers(2 * bits, bits)
    apart = distances(centers)
    assert (apart[~np.eye(2 * bits, dtype=bool)] >= bits // 2).all()
    assert (centers[:bits] == -centers[bits:]).all()
    assert (np.diagonal(apart, bits) == bits).all()
    assert ((apart == bits).sum(axis=1) == 1).all()


def test_further_classes_are_balanced_and_as_far_apart_as_the_rule_says() -> None:
    centers = hash_centers(140, 64, seed=3)
    assert (centers[:128] == hash_centers(128, 64)).all()
    assert (centers[128:].sum(axis=1) == 0).all()
    apart = distances(centers)[np.triu_indices(140, 1)]
    assert apart.min() > 16
    assert apart.mean() >= 32
    assert (centers == hash_centers(140, 64, seed=3)).all()
    assert (centers != hash_centers(140, 64, seed=4)).any()


def test_other_lengths_than_powers_of_two_are_random_and_balanced() -> None:
    for bits in (24, 40):
        centers = hash_centers(10, bits)
        assert (centers.sum(axis=1) == 0).all()
        assert distances(centers)[np.triu_indices(10, 1)].min() > bits / 4
    assert hadamard_rows(24).shape == (0, 24)
    assert (balanced_rows(5, 9, np.random.default_rng(0)).sum(axis=1) == 1).all()


def test_the_best_draw_is_taken_where_none_meets_the_rule() -> None:
    # Every other row of 8 bits is within 2 bits of one of the first 16.
    centers = hash_centers(20, 8)
    assert distances(centers)[np.triu_indices(20, 1)].min() == 2


def test_distances_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.where(np.random.default_rng(0).random((23, 10)) < 0.4, -1, 1).astype(np.int8)
    apart = distances(rows)[np.triu_indices(23, 1)]
    for cells in (10, 4_000_000):
        monkeypatch.setattr("fewbits.primitives.hash_centers.BLOCK_CELLS", cells)
        assert distances_between(rows) == pytest.approx((apart.min(), apart.mean()))


def test_bad_input_is_refused() -> None:
    for classes, bits in ((0, 8), (3, 1)):
        with pytest.raises(ValueError, match="2 bits at least"):
            hash_centers(classes, bits)
    with pytest.raises(ValueError, match="take more bits"):
        hash_centers(200, 8)  # 16 Hadamard rows and 70 balanced ones
