import numpy as np
import pytest

from fewbits.primitives import hamming
from fewbits.primitives.bits import pack
from fewbits.primitives.hamming import (
    class_histograms,
    hamming_search,
    neighbour_vote,
    pairwise_hamming,
    redundancy_ratio,
    unique_codes,
)


def bits(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, size=(rows, width)).astype(np.uint8)


def brute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances of bits that are not packed."""
    return (a[:, None] != b[None]).sum(axis=2)


@pytest.mark.parametrize("width", [1, 7, 8, 21, 64, 130])
def test_packed_and_unpacked_distances_agree(width: int) -> None:
    a, b = bits(40, width), bits(33, width, seed=1)
    assert (pairwise_hamming(pack(a, 1), pack(b, 1)) == brute(a, b)).all()
    assert (pairwise_hamming(pack(a, 1)) == brute(a, a)).all()


@pytest.mark.parametrize("width", [3, 13, 64])
def test_search_finds_the_nearest_and_of_equals_the_earliest(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = bits(300, width), bits(20, width, seed=1)
    distances = brute(queries, rows)
    order = np.argsort(distances, axis=1, kind="stable")[:, :25]
    for block in (hamming.BLOCK_BYTES, 200):  # 200: many blocks, the last ones below k rows
        monkeypatch.setattr(hamming, "BLOCK_BYTES", block)
        near, found = hamming_search(pack(queries, 1), pack(rows, 1), 25)
        assert (found == order).all()
        assert (near == np.take_along_axis(distances, order, axis=1)).all()
    near, found = hamming_search(pack(queries, 1), pack(rows, 1), 300)
    assert (np.sort(found, axis=1) == np.arange(300)).all()


def test_unique_rows_are_those_of_a_set() -> None:
    packed = pack(bits(500, 11), 1)
    known = {row.tobytes() for row in packed}
    different, which = unique_codes(packed)
    assert {row.tobytes() for row in different} == known
    assert len(different) == len(known) < 500
    assert (different[which] == packed).all()
    assert redundancy_ratio(packed) == (500 - len(known)) / 500
    assert redundancy_ratio(packed[:1]) == 0
    assert redundancy_ratio(packed[[0, 0, 0, 0]]) == 0.75


def test_histograms_count_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table, labels = bits(60, 10), np.random.default_rng(2).integers(3, size=60)
    pairs = np.triu_indices(60, 1)
    distances, same = brute(table, table)[pairs], (labels[:, None] == labels)[pairs]
    for cells in (hamming.BLOCK_CELLS, 500):
        monkeypatch.setattr(hamming, "BLOCK_CELLS", cells)
        within, between = class_histograms(pack(table, 1), labels)
        assert (within == np.bincount(distances[same], minlength=17)).all()
        assert (between == np.bincount(distances[~same], minlength=17)).all()


def test_the_majority_votes_and_the_smallest_label_wins_a_tie() -> None:
    rows = pack(np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]), 1)
    labels = np.array(["b", "c", "c", "a"])
    asked = pack(np.array([[0, 0, 0, 0], [1, 1, 1, 0]]), 1)
    assert neighbour_vote(rows, labels, asked, 3).tolist() == ["c", "a"]
    assert neighbour_vote(rows, labels, asked, 1).tolist() == ["b", "a"]
    assert neighbour_vote(rows, labels, asked, 2).tolist() == ["b", "a"]


def test_what_is_not_packed_is_refused() -> None:
    packed = pack(bits(9, 16), 1)
    for bad in (packed[:0], packed[:, :0], packed[0], packed.astype(np.int64)):
        for use in (pairwise_hamming, unique_codes, redundancy_ratio):
            with pytest.raises(ValueError, match="packed codes"):
                use(bad)
    for use in (lambda: hamming_search(packed, packed[:, :1], 1),
                lambda: pairwise_hamming(packed, packed[:, :1])):  # fmt: skip
        with pytest.raises(ValueError, match="do not compare"):
            use()
    for k in (0, 10):
        with pytest.raises(ValueError, match="between 1 and the 9"):
            hamming_search(packed, packed, k)
    with pytest.raises(ValueError, match="as many labels"):
        class_histograms(packed, np.zeros(8))
