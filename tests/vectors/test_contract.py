"""What every codec of the room keeps to. Codecs are found by their rows in the catalogue."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.core.catalogue import codecs, find
from fewbits.core.code import Code
from fewbits.core.codec import Codec, DecodingSearcher, Transform, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.search import METRICS
from fewbits.primitives.ragged import Ragged, chamfer

SMALL = {
    "additive-bits": "additive-bits:bytes=4",
    "bebr": "bebr:steps=5",
    "muvera": "muvera:repetitions=6,bits=2",
    "opq": "opq:bytes=4,rounds=4",
    "pca-rag": "pca-rag:dims=12",
    "pq": "pq:bytes=4",
}
"""Settings of codecs whose defaults do not fit 32 dimensions, or take long. Others need none."""
QUICK = {"steps": 1, "rounds": 1}
"""Options that make a setting of a grid quick to learn, and its code no larger or smaller."""
LONG = 1000
"""What follows a transform to more dimensions takes minutes to learn, and is left out."""
ROWS, DIMS = 300, 32

Items = np.ndarray | Ragged
Change = Callable[[np.ndarray], np.ndarray]


# -- what codecs are tried on --------------------------------------------------------------


def embeddings(rows: int, dims: int = DIMS, seed: int = 0) -> np.ndarray:
    """Unit rows off the origin, whose variances fall."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(99).standard_normal((dims, dims)))[0]
    x = (rng.standard_normal((rows, dims)) * np.geomspace(1, 0.2, dims) + 0.2) @ mix
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def items_for(name: str, rows: int, dims: int = DIMS, seed: int = 0) -> Items:
    """Vectors, or sets of one to five of them."""
    takes = find(name).load().takes
    if takes == "vectors":
        return embeddings(rows, dims, seed)
    assert takes == "sets", f"{name} takes {takes}; say here what such items are"
    lengths = np.random.default_rng(seed).integers(1, 6, rows)
    return Ragged(embeddings(lengths.sum(), dims, seed), np.append(0, np.cumsum(lengths)))


def changed(items: Items, change: Change) -> Items:
    """The items with other numbers in their vectors."""
    return items.with_flat(change(items.flat)) if isinstance(items, Ragged) else change(items)


def near(items: Items) -> Items:
    """Items that each lie near one of these."""
    noise = np.random.default_rng(1)

    def change(x: np.ndarray) -> np.ndarray:
        moved = x + 0.08 * noise.standard_normal(x.shape)
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)

    return changed(items, change)


def numbers_of(items: Items) -> np.ndarray:
    return items.flat if isinstance(items, Ragged) else items


def repeated(items: Items, count: int) -> Items:
    """The first three items, over and over."""
    rows = np.arange(count) % 3
    return items.take(rows) if isinstance(items, Ragged) else items[rows]


def fresh(name: str) -> Codec:
    return from_spec(SMALL.get(name, name))


@dataclass(frozen=True)
class Case:
    """A codec fitted on items, and their code."""

    name: str
    codec: Codec
    items: Items
    code: Code
    queries: Items

    @property
    def decoded(self) -> np.ndarray | None:
        """None where the codec says that it cannot decode."""
        try:
            return self.codec.decode(self.code)
        except FewbitsError as error:
            check_message(error)
            return None


@pytest.fixture(scope="module", params=[row.name for row in codecs("vectors")])
def name(request: pytest.FixtureRequest) -> str:
    row = find(request.param)
    if row.missing_packages:
        pytest.skip(f"{row.name} {row.status}")
    return row.name


@pytest.fixture(scope="module")
def case(name: str) -> Case:
    items = items_for(name, ROWS)
    codec = fresh(name).fit(items)
    return Case(name, codec, items, codec.encode(items), near(items[:20]))


def check_message(error: FewbitsError) -> None:
    """One line that says something."""
    assert len(str(error)) > 15
    assert "\n" not in str(error)


def check_refused(action: Callable[[], Any]) -> None:
    with pytest.raises(FewbitsError) as raised:
        action()
    check_message(raised.value)


def check_equal(code: Code, other: Code) -> None:
    """The same arrays, bit for bit."""
    assert code.arrays.keys() == other.arrays.keys()
    for key, array in code.arrays.items():
        assert array.dtype == other[key].dtype
        assert array.shape == other[key].shape
        assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(other[key]).tobytes()


# -- making and fitting --------------------------------------------------------------------


def test_making_one_only_stores_what_it_is_given(name: str) -> None:
    codec = fresh(name)
    assert vars(codec) == codec.parameters()
    assert codec.name == name
    assert not any(hasattr(codec, attribute) for attribute in (*codec.learned, "dims_"))
    assert from_spec(codec.full_spec).parameters() == codec.parameters()
    assert from_spec(codec.spec).parameters() == codec.parameters()


def test_fit_returns_the_codec_and_keeps_what_it_learned_under_names_with_an_underscore(
    case: Case,
) -> None:
    codec = fresh(case.name)
    before = codec.parameters()
    assert codec.fit(case.items) is codec
    assert codec.parameters() == before
    assert codec.dims_ == DIMS
    for attribute in codec.learned:
        assert attribute.endswith("_")
        assert isinstance(getattr(codec, attribute), np.ndarray)
    public = {attribute for attribute in vars(codec) if not attribute.startswith("_")}
    own = public - before.keys() - vars(Codec).keys()  # without what all codecs have
    assert all(attribute.endswith("_") for attribute in own)
    assert codec.codec_bytes == sum(array.nbytes for array in codec.state().values())


def test_fitting_twice_gives_the_same_codec_and_the_same_codes(case: Case) -> None:
    again = fresh(case.name).fit(changed(case.items, np.copy))
    assert again.digest == case.codec.digest
    check_equal(again.encode(case.items), case.code)


def test_a_fitted_codec_can_be_fitted_again(case: Case) -> None:
    codec = fresh(case.name).fit(items_for(case.name, ROWS, seed=7))
    codec.fit(case.items)
    assert codec.digest == case.codec.digest
    check_equal(codec.encode(case.items), case.code)


# -- codes ---------------------------------------------------------------------------------


def test_a_code_has_a_row_for_each_item_and_the_size_of_its_arrays(case: Case) -> None:
    code = case.code
    assert len(code) == ROWS
    assert all(len(array) == ROWS for array in code.arrays.values())
    assert code.nbytes == sum(array.nbytes for array in code.arrays.values()) > 0
    assert code.bytes_per_item == code.nbytes / ROWS
    assert code.spec == case.codec.full_spec
    assert code.codec_digest == case.codec.digest
    layout = {key: (array.dtype.name, array.shape[1:]) for key, array in code.arrays.items()}
    assert layout == case.codec.code_layout()


def test_decoded_rows_are_finite_float32(case: Case) -> None:
    decoded = case.decoded
    if decoded is not None:
        assert decoded.shape == (ROWS, DIMS)
        assert decoded.dtype == np.float32
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - numbers_of(case.items)).mean() < np.abs(decoded).mean()


def test_some_rows_of_a_code_decode_to_some_rows(case: Case) -> None:
    decoded = case.decoded
    if decoded is not None:
        rows = np.array([5, 200, 5])
        some = case.codec.decode(case.code.take(rows))
        np.testing.assert_allclose(some, decoded[rows], atol=1e-6)


def test_a_row_alone_is_encoded_as_among_others(case: Case) -> None:
    for size in (1, 7):
        for start in range(0, 98, size):
            part = case.items[start : start + size]
            check_equal(case.codec.encode(part), case.code.take(slice(start, start + size)))


def test_halves_and_singles_are_encoded_alike_up_to_rounding(case: Case) -> None:
    for start, stop in ((0, 1), (50, 51), (0, 150), (150, 300)):
        some = case.codec.encode(case.items[start:stop])
        for key, array in case.code.arrays.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(some[key], array[start:stop], rtol=1e-3, atol=1e-5)
            else:
                assert (some[key] == array[start:stop]).mean() > 0.999


def test_a_code_of_another_codec_is_refused(case: Case) -> None:
    other = fresh(case.name).fit(items_for(case.name, ROWS, seed=3))
    if other.digest == case.codec.digest:  # it learns nothing
        other = fresh(case.name).fit(items_for(case.name, ROWS, dims=DIMS - 8))
    check_refused(lambda: other.decode(case.code))
    check_refused(lambda: other.searcher(case.code))


# -- files ---------------------------------------------------------------------------------


def test_a_codec_from_a_file_is_the_same_codec(case: Case, tmp_path: Path) -> None:
    path = case.codec.save(tmp_path / "codec.fewbits")
    loaded = Codec.load(path)
    assert type(loaded) is type(case.codec)
    assert loaded.parameters() == case.codec.parameters()
    assert loaded.digest == case.codec.digest
    check_equal(loaded.encode(case.items), case.code)
    if case.decoded is not None:
        np.testing.assert_array_equal(loaded.decode(case.code), case.decoded)
    for metric in metrics_of(case):
        for one, other in zip(
            loaded.search(case.code, case.queries, 10, metric),
            case.codec.search(case.code, case.queries, 10, metric),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


# -- input ---------------------------------------------------------------------------------


def with_value(value: float) -> Change:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[len(x) // 2, -1] = value
        return x

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(case: Case, value: float) -> None:
    bad = changed(case.items, with_value(value))
    check_refused(lambda: fresh(case.name).fit(bad))
    check_refused(lambda: case.codec.encode(bad))
    check_refused(lambda: case.codec.search(case.code, bad, 3))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "U8", "object"])
def test_other_dtypes_are_refused(case: Case, dtype: str) -> None:
    bad = changed(case.items, lambda x: x.astype(dtype))
    check_refused(lambda: fresh(case.name).fit(bad))
    check_refused(lambda: case.codec.encode(bad))
    check_refused(lambda: case.codec.search(case.code, bad, 3))


def test_nothing_at_all_is_refused(case: Case) -> None:
    for bad in (case.items[:0], changed(case.items, lambda x: x[:, :0])):
        check_refused(lambda bad=bad: fresh(case.name).fit(bad))
        check_refused(lambda bad=bad: case.codec.encode(bad))
        check_refused(lambda bad=bad: case.codec.search(case.code, bad, 3))


def test_things_that_are_not_a_table_are_refused(case: Case) -> None:
    flat = numbers_of(case.items)
    for bad in (flat[0], flat[0, 0], flat[:4].reshape(2, 2, 2, -1), "text", None):
        check_refused(lambda bad=bad: fresh(case.name).fit(bad))
        check_refused(lambda bad=bad: case.codec.encode(bad))


@pytest.mark.parametrize("width", [1, DIMS - 1])
def test_another_width_is_refused(case: Case, width: int) -> None:
    narrow = changed(case.items, lambda x: x[:, :width])
    check_refused(lambda: case.codec.encode(narrow))
    check_refused(lambda: case.codec.search(case.code, narrow, 3))


def test_a_codec_that_is_not_fitted_says_so(case: Case, tmp_path: Path) -> None:
    codec = fresh(case.name)
    for action in (
        lambda: codec.encode(case.items),
        lambda: codec.decode(case.code),
        lambda: codec.search(case.code, case.queries, 3),
        lambda: codec.save(tmp_path / "codec.fewbits"),
        lambda: codec.digest,
        lambda: codec.state(),
    ):
        with pytest.raises(FewbitsError, match="fit"):
            action()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_read_as_float32(case: Case, dtype: type) -> None:
    given = changed(case.items, lambda x: x.astype(dtype))
    same = changed(given, lambda x: x.astype(np.float32))
    check_equal(case.codec.encode(given), case.codec.encode(same))
    assert fresh(case.name).fit(given).digest == fresh(case.name).fit(same).digest


def test_the_layout_of_the_input_in_memory_does_not_matter(case: Case) -> None:
    for change in (np.asfortranarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2]):
        check_equal(case.codec.encode(changed(case.items, change)), case.code)


def test_input_is_only_read(case: Case) -> None:
    items, queries = (changed(x, np.copy) for x in (case.items, case.queries))
    for given in (items, queries):
        numbers_of(given).flags.writeable = False
    codec = fresh(case.name).fit(items)
    code = codec.encode(items)
    for array in code.arrays.values():
        array.flags.writeable = False  # as arrays mapped from a file are
    codec.search(code, queries, 5)
    np.testing.assert_array_equal(numbers_of(items), numbers_of(case.items))
    np.testing.assert_array_equal(numbers_of(queries), numbers_of(case.queries))
    check_equal(code, case.code)


def test_a_seed_that_is_none_is_refused(case: Case) -> None:
    if "seed" in case.codec.parameters():
        for seed in (-1, 2**40, 0.5):
            codec = fresh(case.name)
            codec.seed = seed  # type: ignore[attr-defined]
            check_refused(lambda codec=codec: codec.fit(case.items))


# -- data that is hard to learn from -------------------------------------------------------


def works_or_says_why(name: str, items: Items) -> None:
    """Fit, encode, decode and search: all give finite numbers, or one line says why not."""
    codec = fresh(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            code = codec.fit(items).encode(items)
        except FewbitsError as error:
            check_message(error)
            return
        count = min(3, len(items))
        scores, rows = codec.search(code, items, count)
        assert np.isfinite(scores).all()
        assert ((rows >= 0) & (rows < len(items))).all()
        assert all(len(set(found)) == count for found in rows.tolist())
        try:
            assert np.isfinite(codec.decode(code)).all()
        except FewbitsError as error:
            check_message(error)


@pytest.mark.parametrize("rows", [1, 2, 3, 255])
def test_few_rows(case: Case, rows: int) -> None:
    works_or_says_why(case.name, case.items[:rows])


@pytest.mark.parametrize("value", [0, 1, -0.3, 1e-6])
def test_rows_that_are_all_the_same(case: Case, value: float) -> None:
    works_or_says_why(case.name, changed(case.items, lambda x: np.full_like(x, value)))


def test_few_different_rows(case: Case) -> None:
    works_or_says_why(case.name, repeated(case.items, ROWS))


def test_rows_along_one_line(case: Case) -> None:
    works_or_says_why(case.name, changed(case.items, lambda x: np.outer(x[:, 0], x[0])))


def test_dimensions_that_say_nothing(case: Case) -> None:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[:, 3], x[:, 5:20] = 0.25, 0
        return x

    works_or_says_why(case.name, changed(case.items, change))


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_small_and_large_rows(case: Case, factor: float) -> None:
    works_or_says_why(case.name, changed(case.items, lambda x: x * np.float32(factor)))


def test_a_row_of_zeros_among_others(case: Case) -> None:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[:7] = 0
        return x

    items = changed(case.items, change)
    works_or_says_why(case.name, items)
    code = case.codec.encode(items)
    if case.decoded is not None:
        assert np.isfinite(case.codec.decode(code)).all()


# -- searching -----------------------------------------------------------------------------


def metrics_of(case: Case) -> list[str]:
    """The metrics a codec can be searched by; it says why it cannot by the others."""
    found = []
    for metric in METRICS:
        try:
            case.codec.searcher(case.code, metric)
            case.codec.search(case.code, case.queries, 1, metric)
        except FewbitsError as error:
            check_message(error)
        else:
            found.append(metric)
    return found


def all_scores(queries: Items, items: Items, metric: str) -> np.ndarray:
    """(q, n) scores of all items for each query."""
    if isinstance(queries, Ragged) and isinstance(items, Ragged):
        return chamfer(queries, items)
    if metric == "l2":
        return -((queries[:, None] - items[None]) ** 2).sum(axis=2)
    return queries @ items.T


def share_of_best(scores: np.ndarray, rows: np.ndarray) -> float:
    """Share of the rows found that are among the best by `scores`; ties in any order."""
    last = -np.sort(-scores, axis=1)[:, rows.shape[1] - 1, None]
    return float((np.take_along_axis(scores, rows, axis=1) >= last - 1e-5).mean())


def test_every_codec_can_be_searched_by_cosine(case: Case) -> None:
    assert "cosine" in metrics_of(case)


@pytest.mark.parametrize("k", [1, 10, ROWS])
def test_searching_gives_distinct_rows_best_first(case: Case, k: int) -> None:
    for metric in metrics_of(case):
        scores, rows = case.codec.search(case.code, case.queries, k, metric)
        assert scores.shape == rows.shape == (20, k)
        assert scores.dtype == np.float32
        assert rows.dtype == np.int64
        assert np.isfinite(scores).all()
        assert (np.diff(scores, axis=1) <= 0).all()
        assert ((rows >= 0) & (rows < ROWS)).all()
        assert all(len(set(found)) == k for found in rows.tolist())


@pytest.mark.parametrize("metric", METRICS)
def test_searching_finds_what_brute_force_finds_among_the_decoded_rows(
    case: Case, metric: str
) -> None:
    decoded = case.decoded
    if metric not in metrics_of(case) or decoded is None:
        return
    scores, rows = case.codec.search(case.code, case.queries, 10, metric)
    exact = all_scores(case.queries, decoded, metric)
    if isinstance(case.codec.searcher(case.code, metric), DecodingSearcher):
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-5)
        assert share_of_best(exact, rows) == 1
    if share_of_best(exact, rows) < 0.95:
        # It may know more of the rows than decoding tells, and then must do better.
        truth = all_scores(case.queries, case.items, metric)
        by_decoding = np.argsort(-exact, axis=1)[:, :10]
        assert share_of_best(truth, rows) > share_of_best(truth, by_decoding)


def test_searching_finds_the_item_that_a_query_lies_next_to(case: Case) -> None:
    for metric in metrics_of(case):
        best = all_scores(case.queries, case.items, metric).argmax(axis=1)
        rows = case.codec.search(case.code, case.queries, 10, metric)[1]
        assert (rows == best[:, None]).any(axis=1).mean() > 0.8


def test_a_query_alone_finds_what_it_finds_among_others(case: Case) -> None:
    for metric in metrics_of(case):
        batch = case.codec.search(case.code, case.queries, 5, metric)[0]
        alone = [
            case.codec.search(case.code, case.queries[place : place + 1], 5, metric)[0]
            for place in range(20)
        ]
        np.testing.assert_allclose(np.concatenate(alone), batch, atol=1e-4)


@pytest.mark.parametrize("k", [0, -1, ROWS + 1, 2.5, True])
def test_impossible_numbers_of_matches_are_refused(case: Case, k: Any) -> None:
    check_refused(lambda: case.codec.search(case.code, case.queries, k))


def test_unknown_metrics_are_refused(case: Case) -> None:
    check_refused(lambda: case.codec.search(case.code, case.queries, 3, "hamming"))


# -- grids ---------------------------------------------------------------------------------


def width_between(codec: Codec, items: Items) -> int:
    """Width of what the first codec of a chain gives the others."""
    first = codec.stages[0]
    assert isinstance(first, Transform)
    return first.fit(items).transform(items[:1]).shape[1]


def grid_sizes(name: str, items: Items, dims: int) -> list[float]:
    """Bytes per item of all settings that can be learned quickly."""
    specs = type(fresh(name)).grid(dims, len(items))
    assert len(set(specs)) == len(specs)
    sizes = []
    for codec in map(from_spec, specs):
        for stage in codec.stages:
            for option in QUICK.keys() & stage.parameters().keys():
                setattr(stage, option, QUICK[option])
        if len(codec.stages) == 1 or width_between(codec, items) <= LONG:
            sizes.append(codec.fit(items).encode(items[:2]).bytes_per_item)
    return sizes


def test_the_grid_goes_from_small_to_large(name: str) -> None:
    sizes = grid_sizes(name, items_for(name, ROWS, 64), 64)
    assert sizes
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("rows", "dims"), [(300, 7), (40, 5), (20, 1), (3, 16)])
def test_the_grid_for_few_rows_or_dimensions_can_be_fitted(name: str, rows: int, dims: int) -> None:
    assert all(size > 0 for size in grid_sizes(name, items_for(name, rows, dims), dims))
