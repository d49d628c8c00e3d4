"""The verb ``compare``: what does each method cost at each size, on these vectors?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core import frontier
from fewbits.core.catalogue import codecs
from fewbits.core.checks import check_seed
from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.kinds import TARGET, main_quality
from fewbits.core.progress import Steps, progress
from fewbits.core.readers import open_queries, open_source, read_qrels
from fewbits.core.search import Matches, check_metric, search_array
from fewbits.core.source import Source, sample_rows
from fewbits.primitives.ragged import Ragged, chamfer
from fewbits.primitives.retrieval import ndcg, overlap
from fewbits.primitives.sketch import value_hash

CUTS = (1, 10, 100)
"""k of recall@k, as far as the collection goes."""
ROWS = 100_000
FIT_ROWS = 50_000
QUERIES = 1_000
ENGINES = ("local", "ray")
LEAST_ROWS = 20
"""Fewer rows are not split into items and queries."""


@dataclass(frozen=True)
class Comparison:
    """The points of a comparison, by rising size; of vectors or of KV caches.

    Attributes
    ----------
    input : what was compared: name, rows, dims, dtype, bytes per item, metric, queries.
        Of KV caches: ``kind`` kv, model and text, layers, heads, tokens read and scored.
    points : one `Point` per method and setting.
    left_out : methods that were not run, and why.
    tried : where chains were searched for, what each kept in each round.
    """

    input: dict[str, Any]
    points: list[Point]
    left_out: list[dict[str, str]]
    tried: list[dict[str, Any]] = field(default_factory=list)

    def cheapest(self, **limits: float) -> Point:
        """The smallest point that keeps a quality: ``cheapest(recall_at_10=0.95)``.

        Of KL and perplexity it is the most, of all others the least there may be.
        """
        if not limits:
            raise FewbitsError("say what to keep, for example cheapest(recall_at_10=0.95)")
        named = {name.replace("_at_", "@"): value for name, value in limits.items()}
        return frontier.cheapest(self.points, named)

    def best(self, bytes: float, target: str | None = None) -> Point:
        """The best point in `target` (recall@10, KL) of at most so many bytes per item or token."""
        return frontier.best(self.points, bytes, target or target_of(self.points))

    @property
    def frontier(self) -> list[Point]:
        """The points that no other beats in both size and quality."""
        return [point for point in self.points if point.on_frontier]

    def to_json(self) -> dict[str, Any]:
        points = [point.to_json() for point in self.points]
        about = {"input": self.input, "points": points, "left_out": self.left_out}
        return about | ({"tried": self.tried} if self.tried else {})

    def __str__(self) -> str:
        from fewbits.core.report import table_text

        return table_text(self.to_json())

    def report(self, folder: str | Path) -> Path:
        """Write the page, a picture and ``comparison.json``; returns ``report.html``."""
        from fewbits.core.report import write_report

        return write_report(self.to_json(), Path(folder))[0]


@dataclass(frozen=True)
class Trial:
    """Everything the methods are tried on."""

    items: Any
    queries: Any
    truth: np.ndarray
    judged: dict[int, dict[int, float]] | None
    metric: str
    bytes_per_item: float
    first_equal: np.ndarray


def compare(
    x: Any,
    queries: Any = None,
    *,
    methods: str | Sequence[str] | None = None,
    qrels: str | Path | None = None,
    metric: str = "cosine",
    column: str | None = None,
    rows: int = ROWS,
    seed: int = 0,
    engine: str = "local",
    show_progress: bool = False,
) -> Comparison:
    """Run every applicable method over a grid of sizes, and measure size, quality and speed.

    Where rows are equal, recall does not care which of them was found.

    Parameters
    ----------
    x : vectors (n, d), or sets of vectors; an array or anything `readers.open_source` opens.
    queries : (q, d), likewise; None holds out rows of `x` (and does not search them).
    methods : names or spec strings, as a list or joined by commas; a name alone stands for its
        whole grid of settings. None runs all.
    qrels : file of relevance judgements (`readers.read_qrels`); adds nDCG@10.
    metric : ``cosine`` (rows and queries are scaled to unit length), ``ip`` or ``l2``.
    rows : compare on a sample of at most so many rows. Recall falls as collections grow, so
        figures on a sample are an upper bound.
    column : array or column to read, where there are several; in the queries too.
    seed : of held-out rows and samples; the seed of a method is an option of its spec.
    engine : ``local``, or ``ray`` to try the methods at the same time on a Ray cluster, each on
        one core. The figures are the same, except for the speeds.

    Raises
    ------
    FewbitsError
        Unusable input, unknown methods, or no method that applies.
    """
    start = time.perf_counter()
    check_metric(metric)
    check_seed(seed)
    check_rows(rows)
    check_engine(engine)
    asked = parse_methods(methods)
    source = open_source(x, column=column)
    queries = None if queries is None else open_queries(queries, column)
    trial, about = prepare(source, queries, qrels, metric, rows, seed)
    specs, left_out = plan(asked, source, len(trial.items))
    with progress("comparing", len(specs), show=show_progress) as bar:
        results = try_all(specs, trial, seed, engine, bar)
    points = [result for result in results if isinstance(result, Point)]
    left_out += [result for result in results if not isinstance(result, Point)]
    if not points:
        why = left_out[0]["why"] if left_out else "no method takes this kind of input"
        raise FewbitsError(f"nothing could be compared: {why}")
    about["seconds"] = round(time.perf_counter() - start, 1)
    return Comparison(about, frontier.mark_frontier(points, target_of(points)), left_out)


def check_engine(engine: str) -> None:
    """Refuse another engine than the two there are."""
    if engine not in ENGINES:
        raise FewbitsError(f"there is no engine {engine!r}; choose one of {', '.join(ENGINES)}")


def check_rows(rows: int) -> None:
    if not isinstance(rows, (int, np.integer)) or rows < 1:
        raise FewbitsError(f"rows must be a whole number of at least 1, not {rows!r}")


def target_of(points: list[Point]) -> str:
    """The quality that points are ranked by: recall@10, or else the first that was measured."""
    return main_quality(list(points[0].quality)) if points else TARGET


def prepare(
    source: Source, queries: Source | None, qrels: Any, metric: str, rows: int, seed: int
) -> tuple[Trial, dict[str, Any]]:
    """Sample the items, choose the queries, and search exactly once."""
    normalize = metric == "cosine"
    if qrels is not None and (queries is None or source.rows > rows):
        raise FewbitsError(
            f"--qrels needs --queries, and a collection of at most --rows {rows} rows"
        )
    drawn = sample_rows(source.rows, rows, seed)
    if queries is not None:
        check_queries(queries, source)
        items = source.take(drawn, normalize=normalize)
        asked = queries.everything(normalize=normalize)
    else:
        held = hold_out(source, len(drawn), seed)
        items = source.take(drawn[~held], normalize=normalize)
        asked = source.take(drawn[held], normalize=normalize)
    judged = read_qrels(Path(qrels), len(asked), source.rows) if qrels is not None else None
    truth = exact(asked, items, min(max(CUTS), len(items)), metric)[1]
    first = first_equal(items)
    about = {
        "name": source.name,
        "rows": len(items),
        "rows_in_file": source.rows,
        "dims": source.dims,
        "dtype": source.dtype,
        "bytes_per_item": source.bytes_per_item,
        "metric": "chamfer" if source.takes == "sets" else metric,
        "queries": len(asked),
        "queries_from": "held-out rows" if queries is None else "given",
    }
    truth = name_copies(truth, first)
    return Trial(items, asked, truth, judged, metric, source.bytes_per_item, first), about


def check_queries(queries: Source, source: Source) -> None:
    if (queries.dims, queries.takes) != (source.dims, source.takes):
        raise FewbitsError(
            f"the queries ({queries.name}) are {queries.takes} of {queries.dims} dimensions, the "
            f"collection ({source.name}) is {source.takes} of {source.dims}"
        )


def hold_out(source: Source, rows: int, seed: int) -> np.ndarray:
    """(rows,) bool: which of the rows drawn from a source are its queries."""
    if rows < LEAST_ROWS:
        raise FewbitsError(
            f"{rows} rows of {source.name} are too few to hold some out; pass --queries"
        )
    count = min(QUERIES, max(10, rows // 10))
    held = np.zeros(rows, dtype=bool)
    held[np.random.default_rng(seed).choice(rows, count, replace=False)] = True
    return held


def exact(queries: Any, items: Any, k: int, metric: str) -> Matches:
    """The true best k: by `metric` for vectors, by Chamfer score for sets."""
    if not isinstance(items, Ragged):
        return search_array(queries, items, k, metric)
    scores = chamfer(queries, items)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def first_equal(items: Any) -> np.ndarray:
    """(n,) the first item that is the same as each. O(n log n), and reads every item."""
    hashes = value_hash(items.flat if isinstance(items, Ragged) else items)
    if isinstance(items, Ragged):
        hashes = np.add.reduceat(hashes, items.offsets[:-1])  # a set has no order
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first[group]


def name_copies(rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Names of the found rows (q, k) that say which item it is, but not which of its copies.

    Copies have equal scores, so which of them is found first is chance, and must not count.
    O(q·k log k).
    """
    item = first[rows]
    order = np.argsort(item, axis=1, kind="stable")
    begins = np.diff(np.take_along_axis(item, order, axis=1), axis=1, prepend=-1) != 0
    place = np.arange(rows.shape[1])
    copies_before = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    number = np.empty_like(item)
    np.put_along_axis(number, order, copies_before, axis=1)
    return np.where(rows < 0, -1, number * len(first) + item)


def split_methods(methods: str) -> list[str]:
    """Names and specs of one string; the commas between options stay."""
    found: list[str] = []
    for piece in filter(None, (part.strip() for part in methods.split(","))):
        # "dims=96" after "pca-rag:center=no" is an option, not a method.
        is_option = "=" in piece and ":" not in piece.partition("=")[0]
        if is_option and found:
            found[-1] += "," + piece
        else:
            found.append(piece)
    return found


def parse_methods(methods: str | Sequence[str] | None) -> dict[str, Codec] | None:
    """What was asked for, and an unfitted codec of each; None when nothing was."""
    if methods is None:
        return None
    asked = split_methods(methods) if isinstance(methods, str) else methods
    if not asked:
        raise FewbitsError("no methods are named; `fewbits systems` lists the names")
    return {text: from_spec(text) for text in asked}


def plan(
    asked: dict[str, Codec] | None, source: Source, rows: int
) -> tuple[list[str], list[dict[str, str]]]:
    """Spec strings to run, and what is left out and why."""
    specs: list[str] = []
    if asked is not None:
        for text, codec in asked.items():
            plain = ":" not in text and "+" not in text
            # Where the grid has nothing, the method itself says why when it is run.
            specs += (type(codec).grid(source.dims, rows) if plain else []) or [text]
        return list(dict.fromkeys(specs)), []
    left_out = []
    for row in codecs("vectors"):
        if row.missing_packages:
            why = f"needs {', '.join(row.missing_packages)}; pip install 'fewbits[{row.extra}]'"
            left_out.append({"method": row.name, "why": why})
            continue
        codec_type = row.load()
        if codec_type.takes != source.takes:
            continue
        grid = codec_type.grid(source.dims, rows)
        specs += grid
        if not grid:
            why = f"nothing to choose for {rows} rows of {source.dims} dimensions"
            left_out.append({"method": row.name, "why": why})
    return list(dict.fromkeys(specs)), left_out


def try_all(
    specs: list[str], trial: Trial, seed: int, engine: str, bar: Steps
) -> list[Point | dict[str, str]]:
    """For each spec string its point, or why it has none."""
    if engine == "local":
        results = []
        for spec in specs:
            bar.step(spec, 0)
            results.append(try_method(spec, trial, seed))
            bar.step()
        return results
    from fewbits.core.cluster import map_on_ray

    found = {}
    for number, result in map_on_ray(try_method, specs, trial, seed):
        found[number] = result
        bar.step(specs[number])
    return [found[number] for number in range(len(specs))]


def try_method(spec: str, trial: Trial, seed: int) -> Point | dict[str, str]:
    """The point of one method, or why it has none."""
    try:
        return measure_point(from_spec(spec), trial, seed)
    except (FewbitsError, RuntimeError, np.linalg.LinAlgError) as error:
        # What a library says about one method must not cost the others.
        return {"method": spec, "why": " ".join(str(error).split())}


def measure_point(codec: Codec, trial: Trial, seed: int) -> Point:
    """Fit, encode and search once, timed."""
    fit_items = fit_sample(trial.items, seed)
    fitting = time.perf_counter()
    codec.fit(fit_items)
    encoding = time.perf_counter()
    code = codec.encode(trial.items)
    encoded = time.perf_counter()
    searcher = codec.searcher(code, trial.metric)
    searching = time.perf_counter()
    _, found = searcher.search(trial.queries, min(max(CUTS), len(code)))
    searched = time.perf_counter()
    cuts = [cut for cut in CUTS if cut <= len(code)]
    named = name_copies(found, trial.first_equal)
    quality = {f"recall@{cut}": overlap(named, trial.truth, cut) for cut in cuts}
    if trial.judged is not None:
        quality["ndcg@10"] = ndcg(found, trial.judged, 10)
    return Point(
        method="+".join(stage.name for stage in codec.stages),
        spec=codec.spec,
        bytes_per_item=round(code.bytes_per_item, 3),
        codec_bytes=codec.codec_bytes,
        ratio=round(trial.bytes_per_item / code.bytes_per_item, 2),
        quality={name: round(value, 5) for name, value in quality.items()},
        fit_seconds=round(encoding - fitting, 3),
        encode_per_second=round(len(code) / (encoded - encoding), 1),
        search_per_second=round(len(trial.queries) / (searched - searching), 1),
    )


def fit_sample(items: Any, seed: int) -> Any:
    """The items to learn from: all, or a sample of bounded size."""
    rows = sample_rows(len(items), FIT_ROWS, seed)
    if len(rows) == len(items):
        return items
    return items.take(rows) if isinstance(items, Ragged) else items[rows]
