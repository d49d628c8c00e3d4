import numpy as np
import pytest

from fewbits.primitives.ragged import Ragged, chamfer, join


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 3)).astype(np.float32) for n in (2, 1, 4, 3)]


def test_sets_come_back_as_they_went_in(sets):
    ragged = Ragged.from_sets(sets)
    assert (len(ragged), ragged.dims) == (4, 3)
    assert ragged.offsets.tolist() == [0, 2, 3, 7, 10]
    assert ragged.lengths.tolist() == [2, 1, 4, 3]
    assert ragged.owner.tolist() == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3]
    for back, given in zip(ragged, sets, strict=True):
        np.testing.assert_array_equal(back, given)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(None), slice(2, 2), slice(None, None, -2)])
def test_slices_are_like_those_of_a_list(sets, rows):
    part = Ragged.from_sets(sets)[rows]
    assert len(part) == len(sets[rows])
    for back, given in zip(part, sets[rows], strict=True):
        np.testing.assert_array_equal(back, given)


def test_take_keeps_the_order_asked_for_and_allows_repeats(sets):
    rows = [3, 0, 0, 2]
    for back, row in zip(Ragged.from_sets(sets).take(np.array(rows)), rows, strict=True):
        np.testing.assert_array_equal(back, sets[row])


def test_join_is_the_inverse_of_cutting(sets):
    ragged = Ragged.from_sets(sets)
    joined = join([ragged[:1], ragged[1:3], ragged[3:]])
    np.testing.assert_array_equal(joined.flat, ragged.flat)
    np.testing.assert_array_equal(joined.offsets, ragged.offsets)


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_chamfer_is_the_sum_of_the_best_inner_products(sets, block):
    queries = [sets[0] * 2, sets[3] + 1]
    scores = chamfer(Ragged.from_sets(queries), Ragged.from_sets(sets), block=block)
    assert scores.dtype == np.float32
    for q, query in enumerate(queries):
        for d, document in enumerate(sets):
            expected = sum(max(float(a @ b) for b in document) for a in query)
            assert scores[q, d] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("flat", "offsets", "message"),
    [
        (np.zeros(4), [0, 4], "2 axes"),
        (np.zeros((4, 2)), [1, 4], "start at 0"),
        (np.zeros((4, 2)), [0, 3], "end at 3"),
        (np.zeros((4, 2)), [0, 2, 2, 4], "set 1 is empty"),
        (np.zeros((4, 2)), [0, 3, 2, 4], "set 1 is empty"),
    ],
)
def test_what_is_no_collection_of_sets_is_refused(flat, offsets, message):
    with pytest.raises(ValueError, match=message):
        Ragged(flat, np.array(offsets))


def test_sets_of_different_widths_are_refused(sets):
    with pytest.raises(ValueError):
        Ragged.from_sets([sets[0], np.zeros((2, 4), dtype=np.float32)])
