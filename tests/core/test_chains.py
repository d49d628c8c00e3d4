"""The search for chains: what is tried, what goes on, and what comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fewbits.core import chains
from fewbits.core.catalogue import codecs
from fewbits.core.chains import Candidate, candidates, kept, neighbours, sample_sizes, search_chains
from fewbits.core.codec import MOST_DIMS, Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.readers import open_source
from fewbits.primitives.ragged import Ragged
from fewbits.vectors.baselines import Int8, Sign, TurboQuant
from fewbits.vectors.muvera import MUVERA
from fewbits.vectors.pca_rag import PCARAG

DIMS = 32


@pytest.fixture
def x() -> np.ndarray:
    """Rows that lie close to eight directions, as embeddings lie close to some of theirs."""
    rng = np.random.default_rng(0)
    inner = rng.standard_normal((600, 8)) @ rng.standard_normal((8, DIMS))
    return (inner + 0.1 * rng.standard_normal((600, DIMS))).astype(np.float32)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only three codecs that cost nothing to fit, and a reducer."""

    class Row:
        missing_packages: tuple[str, ...] = ()

        def __init__(self, kind: type[Codec]) -> None:
            self.load = lambda: kind

    rows = [Row(kind) for kind in (Int8, Sign, TurboQuant, PCARAG, MUVERA)]
    monkeypatch.setattr(chains, "codecs", lambda room: rows)


# -- what codecs say of how they spend bytes -----------------------------------------------


@pytest.mark.parametrize("name", [row.name for row in codecs("vectors")])
@pytest.mark.parametrize("size", [24, 30])
def test_what_spends_a_size_stays_within_it_and_comes_near(
    name: str, size: int, x: np.ndarray
) -> None:
    """Fitted on the widest vectors it says it takes, a codec takes at most the size."""
    kind = next(row.load() for row in codecs("vectors") if row.name == name)
    measured = 0
    for spec, widest in kind.spending(size):
        width = {None: DIMS, MOST_DIMS: 8 * DIMS}.get(widest, widest)
        if width < 1:
            continue  # the size is too small for it
        measured += 1
        rows = np.tile(x, (1, -(-width // DIMS)))[:, :width]
        rows = rows + 0.01 * np.random.default_rng(1).standard_normal(rows.shape)
        codec = from_spec(spec + (",steps=0" if name == "bebr" else ""))
        used = codec.fit(rows.astype(np.float32)).encode(rows[:5]).bytes_per_item
        assert 0.7 * size <= used <= size, spec
    assert measured or name in ("muvera", "relative-representations")


def test_reducers_and_openings_give_the_width_they_say() -> None:
    x = np.random.default_rng(0).standard_normal((300, DIMS)).astype(np.float32)
    reducer = from_spec(PCARAG.to_width(5)).fit(x)
    assert reducer.transform(x).shape == (300, 5)  # type: ignore[attr-defined]
    sets = Ragged(x, np.arange(0, 301, 3))
    for spec, width in MUVERA.openings(DIMS):
        assert from_spec(spec).fit(sets).transform(sets).shape == (100, width)  # type: ignore[attr-defined]


# -- what is tried -------------------------------------------------------------------------


def specs(found: list[Candidate]) -> list[str]:
    return [candidate.spec for candidate in found]


def test_vectors_are_shortened_just_as_far_as_the_size_asks(few: None, x: np.ndarray) -> None:
    assert specs(candidates(open_source(x), 10)) == [
        "pca-rag:dims=10+int8",
        "sign",  # 32 bits fit as they are
        "turboquant:bits=1",
        "turboquant:bits=2",
        "pca-rag:dims=21+turboquant:bits=3",
        "pca-rag:dims=16+turboquant:bits=4",
        "pca-rag:dims=5,dtype=float16",
    ]


def test_where_the_width_is_a_choice_parts_of_it_are_tried(x: np.ndarray) -> None:
    found = specs(candidates(open_source(x), 4))
    behind = [f"pca-rag:dims={width}+pq:bytes=4" for width in (4, 8, 12, 16, 20, 24, 28)]
    assert [spec for spec in found if spec.endswith("pq:bytes=4") and "opq" not in spec] == [
        "pq:bytes=4",
        *behind,
    ]
    assert [spec for spec in found if spec.endswith("+additive-bits:bytes=4")] == [
        f"pca-rag:dims={width}+additive-bits:bytes=4" for width in (8, 16, 24)
    ]
    assert not [spec for spec in found if spec.startswith("pca") and "bebr" in spec]


def test_sets_are_opened_reduced_and_compressed(few: None) -> None:
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    found = specs(candidates(open_source(Ragged(x, np.arange(0, 61, 3))), 80))
    opening = "muvera:repetitions=10,bits=3,projection_dims=8"
    assert f"{opening}+sign" in found
    assert f"{opening}+pca-rag:dims=80+int8" in found
    assert all(spec.startswith("muvera:") for spec in found)
    # 2,560 and 5,120 dimensions are too many for principal components.
    assert not [spec for spec in found if "bits=4,projection" in spec and "pca-rag" in spec]


def test_neighbours_are_a_little_narrower_and_wider() -> None:
    free = Candidate("", PCARAG, 2, "pq:bytes=4", 2)
    bound = Candidate("", PCARAG, 4, "int8", 0)
    found = specs(list(neighbours([free, bound])))
    assert found == ["pca-rag:dims=4+pq:bytes=4"]  # a width of 0 is none


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(100, [100]), (2000, [2000]), (2001, [2000, 2001]), (200_000, [2000, 20_000, 200_000])],
)
def test_rounds_grow_to_all_rows(rows: int, expected: list[int]) -> None:
    assert sample_sizes(rows) == expected


def test_a_quarter_goes_on_but_not_fewer_than_six() -> None:
    assert [kept(count) for count in (4, 18, 60)] == [6, 6, 15]


# -- what comes of it ----------------------------------------------------------------------


def test_the_best_chain_of_the_search_is_found(
    few: None, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "FIRST_ROWS", 150)
    found = search_chains(x, at_most=10)
    # Eight directions hold nearly all: 8 bits for each of ten beat fewer bits for more.
    assert found.best(10).spec == "pca-rag:dims=10+int8"
    assert all(point.bytes_per_item <= 10 for point in found.points)
    assert [entry["round"] for entry in found.tried] == [1] * 7 + [2] * 6
    assert {entry["rows"] for entry in found.tried} == {135, 540}  # a tenth is held out
    assert found.input["at_most"] == 10
    assert found.to_json()["tried"] == found.tried
    last = {entry["spec"]: entry["quality"] for entry in found.tried if entry["round"] == 2}
    assert {point.spec: point.quality for point in found.points} == last


def test_the_same_seed_finds_the_same(few: None, x: np.ndarray) -> None:
    first, second = (search_chains(x, at_most=6).tried for _ in range(2))
    assert first == second


def test_chains_that_do_not_work_are_named(few: None, x: np.ndarray) -> None:
    found = search_chains(x[:25], x[25:30], at_most=60)  # more components than rows allow
    assert {entry["method"] for entry in found.left_out}
    assert all(entry["why"] for entry in found.left_out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"at_most": 0}, "at_most must be at least 1 byte per item, not 0"),
        ({"at_most": float("nan")}, "at_most must be at least 1 byte"),
        ({"at_most": float("inf")}, "at_most must be at least 1 byte"),
        ({"at_most": 8, "metric": "l1"}, "unknown metric 'l1'"),
        ({"at_most": 8, "rows": 0}, "rows must be a whole number of at least 1"),
        ({"at_most": 8, "seed": -1}, "a seed is a whole number"),
        ({"at_most": 8, "queries": np.ones((3, 4))}, "of 4 dimensions"),
        ({"at_most": 8, "qrels": "missing.txt"}, "--qrels needs --queries"),
    ],
)
def test_bad_wishes_are_refused(
    few: None, x: np.ndarray, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FewbitsError, match=says):
        search_chains(x, **options)


def test_a_budget_that_nothing_meets_is_refused(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "codecs", lambda room: [])
    with pytest.raises(FewbitsError, match="no chain fits into 3 bytes per item: there is none"):
        search_chains(x, at_most=3)
