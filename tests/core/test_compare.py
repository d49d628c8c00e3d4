"""``compare``: what each method costs and keeps, on the same items and queries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewbits.core import catalogue
from fewbits.core.catalogue import find
from fewbits.core.compare import (
    Comparison,
    compare,
    name_copies,
    prepare,
    split_methods,
)
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.readers import open_source
from fewbits.primitives.ragged import Ragged
from fewbits.vectors.baselines import Int8

ROWS, DIMS = 150, 16
TIMES = ("fit_seconds", "encode_per_second", "search_per_second")


@pytest.fixture
def x() -> np.ndarray:
    """(150, 16) float16 around four centres, no two rows alike."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, DIMS))
    return (centres[np.arange(ROWS) % 4] + rng.standard_normal((ROWS, DIMS))).astype(np.float16)


@pytest.fixture
def queries() -> np.ndarray:
    """(12, 16) float16."""
    return np.random.default_rng(1).standard_normal((12, DIMS)).astype(np.float16)


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to run every codec of the catalogue."""
    rows = [find(name) for name in ("float16", "int8", "sign")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: rows)


def sets_of(x: np.ndarray) -> Ragged:
    """Sets of 1 to 4 of the rows."""
    ends = np.cumsum(np.tile([1, 4, 2, 3], len(x) // 10))
    return Ragged(x[: ends[-1]].astype(np.float32), np.concatenate([[0], ends]))


def by_spec(comparison: Comparison) -> dict[str, Point]:
    return {point.spec: point for point in comparison.points}


def figures(comparison: Comparison) -> list[dict[str, Any]]:
    """The points without what depends on the clock."""
    points = [point.to_json() for point in comparison.points]
    return [{key: value for key, value in p.items() if key not in TIMES} for p in points]


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(FewbitsError) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def true_scores(queries: np.ndarray, items: np.ndarray, metric: str) -> np.ndarray:
    """(q, n) scores in float64, by their definition."""
    q, x = queries.astype(np.float64), items.astype(np.float64)
    if metric == "l2":
        return -np.square(q[:, None] - x[None]).sum(axis=2)
    if metric == "cosine":
        q, x = (y / np.linalg.norm(y, axis=1, keepdims=True) for y in (q, x))
    return np.asarray(q @ x.T)


# -- the schema ----------------------------------------------------------------------------


@pytest.mark.usefixtures("few_methods")
def test_json_has_the_schema_that_is_promised(x: np.ndarray) -> None:
    comparison = compare(x)
    data = json.loads(json.dumps(comparison.to_json()))
    assert set(data) == {"input", "points", "left_out"}
    assert data["left_out"] == []
    about = data["input"]
    assert about.pop("seconds") >= 0
    assert about == {
        "name": "the input",
        "rows": 135,
        "rows_in_file": ROWS,
        "dims": DIMS,
        "dtype": "float16",
        "bytes_per_item": 32,
        "metric": "cosine",
        "queries": 15,
        "queries_from": "held-out rows",
    }
    assert [point["spec"] for point in data["points"]] == ["sign", "int8", "float16"]
    for point in data["points"]:
        assert set(point) == {
            "method",
            "spec",
            "bytes_per_item",
            "codec_bytes",
            "ratio",
            "quality",
            "on_frontier",
            *TIMES,
        }
        assert set(point["quality"]) == {"recall@1", "recall@10", "recall@100"}
        assert all(0 <= value <= 1 for value in point["quality"].values())
        assert min(point["encode_per_second"], point["search_per_second"]) > 0


def test_sizes_are_the_bytes_really_stored(x: np.ndarray) -> None:
    points = by_spec(compare(x, methods="sign,int8,float16,pca-rag:dims=4+int8"))
    sizes = {spec: (p.bytes_per_item, p.codec_bytes, p.ratio) for spec, p in points.items()}
    assert sizes["sign"] == (2, 2 * DIMS * 4, 16)
    assert sizes["int8"] == (16, 2 * DIMS * 4, 2)
    assert sizes["float16"] == (32, 0, 1)
    assert sizes["pca-rag:dims=4+int8"][0] == 4
    assert points["pca-rag:dims=4+int8"].method == "pca-rag+int8"


def test_frontier_is_marked_by_recall(x: np.ndarray) -> None:
    comparison = compare(x, methods="float16,sign,int8,lsh:bits=16")
    assert comparison.points[-1].spec == "float16"
    best = -1.0
    for point in comparison.points:
        assert point.on_frontier == (point.quality["recall@10"] > best)
        best = max(best, point.quality["recall@10"])
    assert comparison.frontier == [p for p in comparison.points if p.on_frontier]


def test_every_kind_of_input_is_compared(x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", x)
    table = pa.table({"text": ["a"] * ROWS, "v": list(x), "w": list(x[::-1])})
    pq.write_table(table, tmp_path / "docs.parquet")
    from_array = figures(compare(x, methods="int8"))
    assert figures(compare(tmp_path / "docs.npy", methods=["int8"])) == from_array
    by_column = compare(str(tmp_path / "docs.parquet"), methods="int8", column="v")
    assert figures(by_column) == from_array
    assert by_column.input["name"] == "docs.parquet"
    assert "pass --column with one of: v, w" in refusal(tmp_path / "docs.parquet", methods="int8")


# -- items and queries ---------------------------------------------------------------------


def test_held_out_queries_are_not_among_the_items(x: np.ndarray) -> None:
    trial, about = prepare(open_source(x), None, None, "ip", 1000, 0)
    items, held = ({tuple(row) for row in part.tolist()} for part in (trial.items, trial.queries))
    assert not items & held
    assert items | held == {tuple(row) for row in x.tolist()}
    assert (about["rows"], about["queries"]) == (len(items), len(held)) == (135, 15)


def test_given_queries_are_asked_of_all_rows(x: np.ndarray, queries: np.ndarray) -> None:
    trial, about = prepare(open_source(x), open_source(queries), None, "ip", 1000, 0)
    np.testing.assert_array_equal(trial.items, x)
    np.testing.assert_array_equal(trial.queries, queries)
    assert (about["rows"], about["queries"], about["queries_from"]) == (ROWS, 12, "given")


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_recall_is_the_share_of_the_true_best(
    x: np.ndarray, queries: np.ndarray, metric: str
) -> None:
    (point,) = compare(x, queries, methods="sign", metric=metric).points
    items = x.astype(np.float32)
    asked = queries.astype(np.float32)
    if metric == "cosine":
        items, asked = (y / np.linalg.norm(y, axis=1, keepdims=True) for y in (items, asked))
    codec = find("sign").load()().fit(items)
    _, found = codec.search(codec.encode(items), asked, 100, metric)
    truth = np.argsort(-true_scores(queries, x, metric), axis=1, kind="stable")
    for k in (1, 10, 100):
        shared = [len({*a[:k]} & {*b[:k]}) / k for a, b in zip(found, truth, strict=True)]
        assert point.quality[f"recall@{k}"] == pytest.approx(np.mean(shared), abs=1e-5)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_float16_loses_nothing_of_float16(x: np.ndarray, metric: str) -> None:
    (point,) = compare(x, methods="float16", metric=metric).points
    assert point.quality == {"recall@1": 1, "recall@10": 1, "recall@100": 1}


def test_sample_is_drawn_of_large_collections(x: np.ndarray, queries: np.ndarray) -> None:
    about = compare(x, methods="int8", rows=60).input
    assert (about["rows"], about["queries"], about["rows_in_file"]) == (50, 10, ROWS)
    about = compare(x, queries, methods="int8", rows=60).input
    assert (about["rows"], about["queries"], about["rows_in_file"]) == (60, 12, ROWS)


def test_same_seed_gives_the_same_points(x: np.ndarray) -> None:
    methods = "sign,int8,lsh:bits=8"
    first = figures(compare(x, methods=methods, rows=100, seed=3))
    assert figures(compare(x, methods=methods, rows=100, seed=3)) == first
    assert figures(compare(x, methods=methods, rows=100, seed=4)) != first
    held_out = [prepare(open_source(x), None, None, "ip", ROWS, seed)[0].queries for seed in (3, 4)]
    assert not np.array_equal(*held_out)


def test_a_codec_is_learned_from_a_bounded_sample(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.core.compare.FIT_ROWS", 30)
    seen: list[int] = []
    fit = Int8._fit

    def counted(codec: Int8, sample: np.ndarray) -> None:
        seen.append(len(sample))
        fit(codec, sample)

    monkeypatch.setattr(Int8, "_fit", counted)
    assert len(compare(x, methods="int8").points) == 1
    assert seen == [30]


# -- small and strange collections ---------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 19])
def test_too_few_rows_to_hold_some_out(x: np.ndarray, rows: int) -> None:
    says = f"{rows} rows of the input are too few to hold some out; pass --queries"
    assert refusal(x[:rows], methods="int8") == says
    assert refusal(x, methods="int8", rows=rows) == says


def test_twenty_rows_are_split(x: np.ndarray) -> None:
    comparison = compare(x[:20], methods="int8")
    assert (comparison.input["rows"], comparison.input["queries"]) == (10, 10)
    assert set(comparison.points[0].quality) == {"recall@1", "recall@10"}


def test_small_collection_is_compared_as_far_as_it_goes(x: np.ndarray, queries: np.ndarray) -> None:
    one = compare(x[:1], queries, methods="int8,sign")
    assert [p.quality for p in one.points] == [{"recall@1": 1}] * 2
    few = compare(x[:9], queries, methods="int8,sign")
    assert all(set(p.quality) == {"recall@1"} for p in few.points)
    assert few.frontier
    assert few.best(bytes=16).quality["recall@1"] == max(p.quality["recall@1"] for p in few.points)
    with pytest.raises(FewbitsError, match="'recall@10' was not measured; choose one of recall@1"):
        few.cheapest(recall_at_10=0.9)


def test_constant_columns_are_compared(x: np.ndarray) -> None:
    x[:, :5] = 3
    comparison = compare(x, methods="int8,sign,pca-rag:dims=4,turboquant")
    assert not comparison.left_out
    assert by_spec(comparison)["int8"].quality["recall@10"] > 0.9


def test_constant_rows_leave_out_only_what_cannot_learn(x: np.ndarray) -> None:
    x[:] = x[0]
    comparison = compare(x, methods="float16,int8,sign,turboquant,pca-rag:dims=4")
    (left_out,) = comparison.left_out
    assert left_out == {
        "method": "pca-rag:dims=4",
        "why": "pca-rag: all rows are the same; fit on rows that differ",
    }
    assert {p.method for p in comparison.points} == {"float16", "int8", "sign", "turboquant"}
    assert {p.quality["recall@10"] for p in comparison.points} == {1}


@pytest.mark.parametrize("method", ["float16", "turboquant:bits=8", "sign"])
def test_recall_does_not_care_which_copy_is_found(
    x: np.ndarray, queries: np.ndarray, method: str
) -> None:
    copied = np.repeat(x[:15], 10, axis=0)[np.random.default_rng(2).permutation(ROWS)]
    (point,) = compare(copied, queries, methods=method, metric="ip").points
    (single,) = compare(x[:15], queries, methods=method, metric="ip").points
    # Ten copies of the best item are the best ten, and are found where the item alone is.
    assert point.quality["recall@10"] == pytest.approx(single.quality["recall@1"], abs=1e-5)


def test_copies_of_an_item_share_their_names() -> None:
    first = np.array([0, 1, 0, 3, 1, 0])  # items 2 and 5 are copies of 0, item 4 is one of 1
    names = name_copies(np.array([[0, 1, 2, 3], [5, 4, 0, 3], [2, 1, 5, -1], [1, 2, 4, -1]]), first)
    assert names[0].tolist() == names[1].tolist()
    assert names[2].tolist() == [*names[0, :3].tolist(), -1]
    assert len({*names.ravel().tolist()} - {-1}) == 5  # 0 twice, 1 twice, and 3
    different = np.array([[4, 2, 0], [1, 3, -1]])
    assert name_copies(different, np.arange(5)).tolist() == different.tolist()


def test_row_that_cannot_be_compared_is_named(x: np.ndarray) -> None:
    x[7] = 0
    says = "row 7 of the input is all zeros and has no cosine; drop it, or use --metric ip"
    assert refusal(x, methods="int8") == says
    assert compare(x, methods="int8", metric="ip").points
    x[7, 0] = np.nan
    assert "row 7 of the input has NaN" in refusal(x, methods="int8", metric="ip")


def test_queries_of_another_kind_are_refused(x: np.ndarray, queries: np.ndarray) -> None:
    says = (
        "the queries (the input) are vectors of 15 dimensions, the collection (the input) is "
        "vectors of 16"
    )
    assert refusal(x, queries[:, 1:], methods="int8") == says
    assert "are sets of 16 dimensions" in refusal(x, sets_of(x), methods="int8")
    assert "is sets of 16" in refusal(sets_of(x), queries, methods="muvera")
    assert "the input is empty" in refusal(x, queries[:0], methods="int8")


def test_options_that_make_no_sense_are_refused(x: np.ndarray) -> None:
    assert "unknown metric 'l1'" in refusal(x, methods="int8", metric="l1")
    assert "a seed is a whole number" in refusal(x, methods="int8", seed=-1)
    for rows in (0, -5, 2.5):
        says = f"rows must be a whole number of at least 1, not {rows}"
        assert refusal(x, methods="int8", rows=rows) == says


# -- sets ----------------------------------------------------------------------------------


def chamfer_by_hand(queries: Ragged, items: Ragged) -> np.ndarray:
    return np.array([[(q @ d.T).max(axis=1).sum() for d in items] for q in queries])


def test_sets_are_compared_by_their_chamfer_score(x: np.ndarray) -> None:
    sets = sets_of(x)
    method = "muvera:repetitions=40,bits=1,projection=identity"
    comparison = compare(list(sets), sets[:10], methods=method, metric="ip")
    about = comparison.input
    assert (about["metric"], about["rows"], about["dims"]) == ("chamfer", 60, DIMS)
    assert about["bytes_per_item"] == 150 * DIMS * 4 / 60
    codec = find("muvera").load()(repetitions=40, bits=1, projection="identity").fit(sets)
    _, found = codec.search(codec.encode(sets), sets[:10], 10, "ip")
    truth = np.argsort(-chamfer_by_hand(sets[:10], sets), axis=1, kind="stable")[:, :10]
    shared = [len({*a} & {*b}) / 10 for a, b in zip(found, truth, strict=True)]
    assert comparison.points[0].quality["recall@10"] == pytest.approx(np.mean(shared))
    assert np.mean(shared) > 0.4  # and not by chance, which would find a sixth


def test_held_out_sets_are_not_among_the_items(x: np.ndarray) -> None:
    sets = sets_of(x)
    trial, about = prepare(open_source(sets), None, None, "ip", 1000, 0)
    items, held = ({s.tobytes() for s in part} for part in (trial.items, trial.queries))
    assert not items & held
    assert items | held == {s.tobytes() for s in sets}
    assert (about["rows"], about["queries"]) == (50, 10)


@pytest.mark.usefixtures("few_methods")
def test_methods_for_vectors_are_not_run_on_sets(x: np.ndarray) -> None:
    says = "nothing could be compared: no method takes this kind of input"
    assert refusal(sets_of(x)) == says
    assert "takes vectors, but these are sets of vectors" in refusal(sets_of(x), methods="int8")
    assert "nothing could be compared: " in refusal(x, methods="muvera")


# -- methods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int8", ["int8"]),
        (" int8 , sign ,", ["int8", "sign"]),
        ("pca-rag:dims=4,center=no,sign", ["pca-rag:dims=4,center=no", "sign"]),
        ("a:x=1,y=2+b:z=3,w=4,c", ["a:x=1,y=2+b:z=3,w=4", "c"]),
        ("a:x=1,b:x=2,y=3", ["a:x=1", "b:x=2,y=3"]),
        ("", []),
        (",", []),
    ],
)
def test_methods_in_one_string_are_told_from_their_options(text: str, found: list[str]) -> None:
    assert split_methods(text) == found


def test_a_name_alone_stands_for_its_whole_grid(x: np.ndarray) -> None:
    grid = find("turboquant").load().grid(DIMS, 135)
    specs = {"turboquant" if spec.endswith("bits=4") else spec for spec in grid}
    assert len(specs) == 4
    assert {p.spec for p in compare(x, methods=["turboquant"]).points} == specs
    assert set(by_spec(compare(x, methods="turboquant:bits=3"))) == {"turboquant:bits=3"}
    assert set(by_spec(compare(x, methods="turboquant,int8,turboquant"))) == {*specs, "int8"}


def test_method_that_fails_is_left_out_and_the_others_run(x: np.ndarray) -> None:
    comparison = compare(x, methods="pq:bytes=4,int8,rabitq:bits=9,sign")
    assert [point.spec for point in comparison.points] == ["sign", "int8"]
    assert comparison.to_json()["left_out"] == [
        {
            "method": "pq:bytes=4",
            "why": "pq learns 256 centroids and needs at least 256 rows, not 135",
        },
        {"method": "rabitq:bits=9", "why": "rabitq: bits=9 must be between 1 and 8"},
    ]
    says = "nothing could be compared: pq learns 256 centroids"
    assert says in refusal(x, methods="pq:bytes=4")


def test_method_without_settings_for_this_size_says_why(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [find("pq"), find("int8"), find("muvera")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: rows)
    comparison = compare(x)
    why = "nothing to choose for 135 rows of 16 dimensions"
    assert comparison.left_out == [{"method": "pq", "why": why}]
    assert "nothing could be compared: pq: bytes=48 must be" in refusal(x, methods="pq")


def test_method_whose_library_gives_up_is_left_out(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(self: Any, x: np.ndarray) -> None:
        raise RuntimeError("Error in train:\n  no memory")

    monkeypatch.setattr("fewbits.vectors.baselines.Int8._fit", give_up)
    comparison = compare(x, methods=["int8", "sign"])
    assert [point.spec for point in comparison.points] == ["sign"]
    assert comparison.left_out == [{"method": "int8", "why": "Error in train: no memory"}]


def test_missing_extra_is_left_out_by_name(x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [find("bebr"), find("int8")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: rows)
    installed = catalogue.installed
    monkeypatch.setattr(catalogue, "installed", lambda name: name != "torch" and installed(name))
    comparison = compare(x)
    assert [point.spec for point in comparison.points] == ["int8"]
    (left_out,) = comparison.left_out
    assert left_out["method"] == "bebr"
    assert "torch" in left_out["why"]
    assert "pip install 'fewbits[torch]'" in left_out["why"]
    assert "pip install 'fewbits[torch]'" in refusal(x, methods="int8,bebr")


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("nope", "unknown method 'nope'; `fewbits systems` lists the names"),
        ("int8,muvra", "unknown method 'muvra'; did you mean 'muvera'?"),
        ("think", "think is a cache, not a codec"),
        ("int8:size=3", "int8 has no option 'size'"),
        ("int8+sign", "int8 cannot be followed by another codec"),
        ("", "no methods are named"),
        ([], "no methods are named"),
        ([""], "the method is empty"),
    ],
)
def test_methods_that_do_not_exist_are_refused(x: np.ndarray, methods: Any, says: str) -> None:
    assert says in refusal(x, methods=methods)


# -- judgements ----------------------------------------------------------------------------

JUDGED = {0: {3: 1.0, 50: 2.0}, 1: {0: 1.0}, 5: {7: 0.0}}


@pytest.mark.parametrize("name", ["judged.txt", "judged.json"])
def test_judgements_add_ndcg(x: np.ndarray, queries: np.ndarray, tmp_path: Path, name: str) -> None:
    lines = [f"{q} 0 {d} {value}" for q, found in JUDGED.items() for d, value in found.items()]
    text = json.dumps(JUDGED) if name.endswith("json") else "\n".join(lines)
    (tmp_path / name).write_text(text)
    queries[0], queries[1] = x[50], x[0]  # the best match of both is judged
    comparison = compare(x, queries, methods="float16", metric="l2", qrels=str(tmp_path / name))
    assert set(comparison.points[0].quality) == {"recall@1", "recall@10", "recall@100", "ndcg@10"}
    order = np.argsort(-true_scores(queries[:1], x, "l2")[0])
    rank = 1 + order.tolist().index(3)
    gain = 2 + (1 / np.log2(rank + 1) if rank <= 10 else 0)
    expected = np.mean([gain / (2 + 1 / np.log2(3)), 1])  # query 5 has nothing relevant
    assert comparison.points[0].quality["ndcg@10"] == pytest.approx(expected, abs=1e-5)
    assert comparison.best(100, "ndcg@10").spec == "float16"


def test_judgements_need_queries_and_the_whole_collection(
    x: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "judged.txt").write_text("0 0 1\n")
    options = {"methods": "int8", "qrels": tmp_path / "judged.txt"}
    says = "--qrels needs --queries, and a collection of at most --rows 100 rows"
    assert refusal(x, rows=100, **options) == says
    assert refusal(x, queries, rows=100, **options) == says
    assert compare(x, queries, rows=ROWS, **options).points
    (tmp_path / "judged.txt").write_text(f"0 {ROWS} 1\n")
    assert "must be within 12 queries and 150 rows" in refusal(x, queries, **options)
    (tmp_path / "judged.txt").write_text("query document relevance\n")
    assert "is not a table of judgements" in refusal(x, queries, **options)


# -- the result ----------------------------------------------------------------------------


@pytest.mark.usefixtures("few_methods")
def test_comparison_chooses_prints_and_reports(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.core.report.png_bytes", lambda comparison: b"picture")
    comparison = compare(x)
    assert comparison.cheapest(recall_at_10=0.9).spec == "int8"
    assert comparison.cheapest(recall_at_10=0.9, recall_at_1=0.99).spec in ("int8", "float16")
    assert comparison.best(bytes=15).spec == "sign"
    with pytest.raises(FewbitsError, match="fits into 1 bytes; the smallest is sign with 2"):
        comparison.best(bytes=1)
    with pytest.raises(FewbitsError, match="say what to keep, for example"):
        comparison.cheapest()
    assert re.search(r"the input: 135 × 16 float16.*cosine, 15 queries", str(comparison))
    page = comparison.report(tmp_path / "report")
    assert page.name == "report.html"
    written = json.loads((page.parent / "comparison.json").read_text())
    assert written == comparison.to_json()
