"""BEBR's claim: each further round of binarisation brings the codes closer to the floats.

Three tables. *Fidelity*, which decides: recall@10 against exact search, by bits. *Pairs*: does
training on query–document pairs help to find the right document? *Upgrade*: can queries of a
new embedding search the codes of an old one?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbits.core.checks import unit_rows
from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import MissingExtraError
from fewbits.core.examples import python_docs, stdlib_functions
from fewbits.core.reproduction import Reproduction
from fewbits.core.search import search_array
from fewbits.core.text_encoder import TextEncoder, cached_arrays
from fewbits.primitives.retrieval import hit_rate, mean_reciprocal_rank, overlap
from fewbits.vectors._bebr_network import float_control
from fewbits.vectors.bebr import BEBR, SymmetricSearcher

HASH_MARGIN, SIMHASH_MARGIN, FOUR_BITS_REACH = 0.05, 0.1, 0.9
CLAIM = (
    "Codes searched by codes: recall@10 rises with every round of binarisation (1 to 4 bits per "
    f"dimension) and reaches {FOUR_BITS_REACH} with 4; at equal size, 2 bits per dimension beat "
    f"twice as many learned single bits by {HASH_MARGIN} and SimHash by {SIMHASH_MARGIN}. On every "
    "collection, as means over the seeds."
)
WORDS = 2_000
"""Vocabulary of the old embedding in the upgrade table."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    steps: int
    batch: int
    held_out: int
    old_dims: int


SIZES = {"quick": Size((0,), 10, 200, 100, 32), "small": Size((0, 1, 2), 300, 512, 800, 256)}


@dataclass(frozen=True)
class Collection:
    """Unit rows to be found, and unit queries."""

    name: str
    items: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Row i of `queries` asks for row i of `documents`; `old` embeds the same another way."""

    queries: np.ndarray
    documents: np.ndarray
    old_queries: np.ndarray
    old_documents: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> Pairs:
        """The four tables, in order, with rows of unit length."""
        queries, documents, old_queries, old_documents = map(unit_rows, parts)
        return cls(queries, documents, old_queries, old_documents)

    def take(self, rows: np.ndarray) -> Pairs:
        tables = (self.queries, self.documents, self.old_queries, self.old_documents)
        return Pairs.of(table[rows] for table in tables)


def run(size: str = "small") -> Reproduction:
    """Run the three tables.

    Parameters
    ----------
    size : ``small``: about 3,900 functions of the standard library (docstrings search bodies)
        and 4,000 passages of Python's documentation, MiniLM embeddings, three seeds, minutes.
        ``quick``: some of the passages at 64 dimensions, one seed, seconds.
    """
    settings = SIZES[size]
    collections, pairs = data(size, settings)
    fidelity = [row for one in collections for row in fidelity_table(one, settings)]
    tasks = pair_table(pairs, settings)
    upgrades = upgrade_table(pairs, settings)
    failed = failures(fidelity, [one.name for one in collections])
    own = [row for row in fidelity if row["method"].startswith("bebr")]
    others = [row for row in fidelity if not row["method"].startswith("bebr")]
    figures = {f"{row['data']}: {row['method']}": row["recall@10"] for row in own}
    figures |= {f"pairs, {row['method']}, MRR": row["MRR"] for row in tasks}
    figures |= {f"upgrade, {row['method']}, recall@10": row["recall@10"] for row in upgrades}
    return Reproduction(
        system="bebr",
        claim=CLAIM,
        figures=figures,
        baselines={f"{row['data']}: {row['method']}": row["recall@10"] for row in others},
        holds=not failed,
        reason="; ".join([*failed, pair_words(tasks)]),
        data=", ".join(
            f"{one.name} ({len(one.items)} × {one.items.shape[1]})" for one in collections
        )
        + f", {len(settings.seeds)} seeds",
        details=[*fidelity, *tasks, *upgrades],
    )


# -- data ------------------------------------------------------------------------------------


def data(size: str, settings: Size) -> tuple[list[Collection], Pairs]:
    """The collections of the first table, and the pairs of the other two."""
    example = python_docs()
    known = example.answers >= 0
    if size == "quick":
        items = unit_rows(example.vectors[:800, :64])
        queries, answers = example.queries[known], example.vectors[example.answers[known]]
        small = Collection("python-docs", items, unit_rows(example.queries[:, :64]))
        new, old = slice(0, 64), slice(64, 64 + settings.old_dims)
        parts = (queries[:, new], answers[:, new], queries[:, old], answers[:, old])
        return [small], Pairs.of(parts)
    pairs = stdlib_pairs(settings.old_dims)
    docs = Collection("python-docs", unit_rows(example.vectors), unit_rows(example.queries))
    return [Collection("stdlib", pairs.documents, pairs.queries), docs], pairs


def stdlib_pairs(old_dims: int) -> Pairs:
    """Docstrings and bodies of functions, by MiniLM and (old) by the words they share."""
    queries, documents = stdlib_functions()
    try:
        encoder = TextEncoder()
    except MissingExtraError as error:
        raise MissingExtraError(f"the small size embeds texts: {error}") from None

    def embed() -> dict[str, np.ndarray]:
        return {"queries": encoder.sentences(queries), "documents": encoder.sentences(documents)}

    new = cached_arrays(f"bebr-stdlib-{encoder.key([*queries, *documents])}", embed)
    old = word_vectors(queries, documents, old_dims)
    return Pairs(new["queries"], new["documents"], *old)


def word_vectors(
    queries: list[str], documents: list[str], dims: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latent semantic analysis: unit rows of tf-idf, reduced to `dims` by the documents' SVD."""
    texts = [text.split() for text in (*documents, *queries)]
    vocabulary, counts = np.unique(np.concatenate(texts[: len(documents)]), return_counts=True)
    kept = np.sort(vocabulary[np.argsort(-counts, kind="stable")[:WORDS]])
    table = np.zeros((len(texts), len(kept)), dtype=np.float32)
    for row, words in enumerate(texts):
        found = np.searchsorted(kept, words).clip(max=len(kept) - 1)
        np.add.at(table[row], found[kept[found] == words], 1)
    frequency = (table[: len(documents)] > 0).sum(axis=0)
    weighted = np.log1p(table) * np.log(len(documents) / np.maximum(frequency, 1))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    gram = weighted[: len(documents)].T @ weighted[: len(documents)]
    reduced = weighted @ np.linalg.eigh(gram)[1][:, ::-1][:, :dims] + 1e-9
    reduced = unit_rows(reduced.astype(np.float32))
    return reduced[len(documents) :], reduced[: len(documents)]


# -- fidelity --------------------------------------------------------------------------------


def fidelity_table(data: Collection, settings: Size) -> list[dict[str, Any]]:
    """Recall@10 against exact search for every method; mean and spread over the seeds."""
    truth = search_array(data.queries, data.items, 10, "cosine")[1]
    d = data.items.shape[1]
    rows = []

    def add(method: str, bytes_per_item: float, found: Iterable[np.ndarray]) -> None:
        recalls = [overlap(one, truth, 10) for one in found]
        mean, spread = float(np.mean(recalls)), float(np.std(recalls))
        rows.append(
            {"data": data.name, "method": method, "bytes": bytes_per_item}
            | {"recall@10": mean, "spread": spread}
        )

    options, first = f"steps={settings.steps},batch={settings.batch}", settings.seeds[:1]
    for scoring, steps, words, seeds in (
        ("symmetric", options, "symmetric", settings.seeds),
        ("symmetric", "steps=0", "symmetric, untrained", settings.seeds),
        ("asymmetric", options, "asymmetric", first),  # for comparison; nothing rests on it
    ):
        for bits, dims in [(1, d), (2, d), (3, d), (4, d), (1, 2 * d)]:
            spec = f"bebr:bits={bits},dims={dims},scoring={scoring},{steps}"
            seeded = [f"{spec},seed={seed}" for seed in seeds]
            label = f"bebr {bits} bits × {dims} ({words})"
            add(label, bits * dims / 8, (found_by(one, data) for one in seeded))
    for bits in (d, 2 * d):
        seeded_hashes = (simhash(data, bits, seed) for seed in settings.seeds)
        add(f"simhash {bits} (symmetric)", bits / 8, seeded_hashes)
    for spec in opponents(d):
        codec = from_spec(spec).fit(data.items)
        code = codec.encode(data.items)
        add(f"{spec} (asymmetric)", code.bytes_per_item, [codec.search(code, data.queries, 10)[1]])
        add(f"{spec} (symmetric)", code.bytes_per_item, [quantised_queries(codec, data)])
    return rows


def opponents(d: int) -> list[str]:
    """Established methods at about the sizes of 1 to 4 bits per dimension."""
    specs = ["sign", f"itq:bits={d}", f"lsh:bits={d}", f"lsh:bits={2 * d}"]
    specs += [f"turboquant:bits={bits}" for bits in (1, 2, 3, 4)]
    specs += [f"rabitq:bits={bits}" for bits in (1, 2, 3, 4)]
    return [*specs, f"pq:bytes={d // 8}", f"pq:bytes={d // 4}", f"pq:bytes={d // 2}"]


def found_by(spec: str, data: Collection) -> np.ndarray:
    """The ten rows that a codec finds for each query."""
    codec = from_spec(spec).fit(data.items)
    return codec.search(codec.encode(data.items), data.queries, 10)[1]


def quantised_queries(codec: Codec, data: Collection) -> np.ndarray:
    """The same when queries are encoded, too: Hamming distance of bits, else decoded rows."""
    code, asked = codec.encode(data.items), codec.encode(data.queries)
    if "bits" in code.arrays:
        return nearest_bits(*(np.unpackbits(one["bits"], axis=1) for one in (asked, code)))
    return search_array(codec.decode(asked), codec.decode(code), 10, "cosine")[1]


def simhash(data: Collection, bits: int, seed: int) -> np.ndarray:
    """Hamming distance between signs of independent Gaussian projections around zero."""
    shape = (data.items.shape[1], bits)
    directions = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return nearest_bits(data.queries @ directions > 0, data.items @ directions > 0)


def nearest_bits(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    asked, found = (np.where(one, np.float32(1), np.float32(-1)) for one in (queries, rows))
    return search_array(asked, found, 10, "ip")[1]


def failures(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """What of the claim is not so, in words."""
    failed = []
    for name in names:
        recall = {row["method"]: row["recall@10"] for row in rows if row["data"] == name}
        failed += [f"{name}: {words}" for words in shortfalls(recall)]
    return failed


def shortfalls(recall: dict[str, float]) -> list[str]:
    """The same for the recall by method on one collection."""
    *by_bits, wide = [value for key, value in recall.items() if key.endswith("(symmetric)")][:5]
    simhash_wide = [value for key, value in recall.items() if key.startswith("simhash")][1]
    checks = {
        "recall does not rise with every bit": bool((np.diff(by_bits) > 0).all()),
        "2 bits are not far enough above twice as many single bits": by_bits[1] - wide
        >= HASH_MARGIN,
        "2 bits are not far enough above SimHash": by_bits[1] - simhash_wide >= SIMHASH_MARGIN,
        f"4 bits do not reach {FOUR_BITS_REACH}": by_bits[3] >= FOUR_BITS_REACH,
    }
    return [words for words, holds in checks.items() if not holds]


# -- pairs and upgrade -----------------------------------------------------------------------


def pair_table(pairs: Pairs, settings: Size) -> list[dict[str, Any]]:
    """Finding the right document among all: before and after training on other pairs.

    Each seed holds out other pairs. The float control has the same loss, and no bits.
    """
    results: dict[str, list[tuple[float, float]]] = {}
    d = pairs.documents.shape[1]
    for seed in settings.seeds:
        train, test = split(len(pairs.queries), settings.held_out, seed)
        seen, asked = pairs.take(train), pairs.queries[test]

        def add(method: str, found: np.ndarray, test: np.ndarray = test) -> None:
            quality = hit_rate(found, test, 10), mean_reciprocal_rank(found, test)
            results.setdefault(method, []).append(quality)

        add("float", search_array(asked, pairs.documents, 100, "cosine")[1])
        for bits, dims in ((2, d), (1, 2 * d)):
            for steps, words in ((0, "untrained"), (settings.steps, "pairs")):
                codec = compared(settings, bits, dims, seed, steps)
                if steps:
                    codec.fit_pairs(seen.queries, seen.documents)
                else:
                    codec.fit(seen.documents)
                code = codec.encode(pairs.documents)
                add(f"bebr {bits} bits × {dims}, {words}", codec.search(code, asked, 100)[1])
        control = compared(settings, 1, d, seed, settings.steps)
        transform = float_control(control, seen.queries, seen.documents)
        sought, documents = (unit_rows(transform(rows)) for rows in (asked, pairs.documents))
        add(f"float × {d}, pairs", search_array(sought, documents, 100, "cosine")[1])
    return [
        {"method": method, "R@10": hits, "MRR": rank, "MRR of seeds": [q[1] for q in qualities]}
        for method, qualities in results.items()
        for hits, rank in [np.mean(qualities, axis=0).tolist()]
    ]


def pair_words(rows: list[dict[str, Any]]) -> str:
    """How the pair-trained codes compare, in words."""
    trained = [row for row in rows if row["method"].endswith("pairs")]
    multi, single = (row["MRR"] for row in trained if row["method"].startswith("bebr"))
    which = "ahead of" if multi > single else "not ahead of"
    return (
        f"trained on pairs, 2 bits per dimension are {which} twice as many single bits "
        f"(MRR {multi:.3f} and {single:.3f})"
    )


def upgrade_table(pairs: Pairs, settings: Size) -> list[dict[str, Any]]:
    """Finding the right document when the embedding changes and old codes stay.

    ``new queries, old codes`` needs the compatibility term; heads trained apart speak other
    languages.
    """
    results: dict[str, list[float]] = {}
    d = pairs.old_documents.shape[1]
    for seed in settings.seeds:
        train, test = split(len(pairs.queries), settings.held_out, seed)
        seen = pairs.take(train)
        old, compatible, apart = (
            compared(settings, 2, d, seed + shift, settings.steps) for shift in (0, 0, 1)
        )
        old.fit_pairs(seen.old_queries, seen.old_documents)
        compatible.fit_compatible(old, seen.queries, seen.documents, seen.old_documents)
        apart.fit_pairs(seen.queries, seen.documents)
        code, asked = old.encode(pairs.old_documents), pairs.queries[test]
        new_code = compatible.encode(pairs.documents)
        found = {
            "old queries, old codes": old.search(code, pairs.old_queries[test], 10),
            "new queries, old codes": compatible.search_old(old, code, asked, 10),
            "new queries, old codes, trained apart": SymmetricSearcher(apart, old, code).search(
                asked, 10
            ),
            "new queries, new codes": compatible.search(new_code, asked, 10),
            "new queries, new codes, trained apart": apart.search(
                apart.encode(pairs.documents), asked, 10
            ),
        }
        for method, (_, rows) in found.items():
            results.setdefault(method, []).append(hit_rate(rows, test, 10))
    return [
        {"method": method, "recall@10": float(np.mean(values)), "of seeds": values}
        for method, values in results.items()
    ]


def compared(settings: Size, bits: int, dims: int, seed: int, steps: int) -> BEBR:
    """A codec as the pair tables use it."""
    options = {"steps": steps, "batch": settings.batch, "seed": seed}
    return BEBR(bits=bits, dims=dims, scoring="symmetric", **options)  # type: ignore[arg-type]


def split(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out."""
    order = np.random.default_rng(seed).permutation(count)
    return order[held_out:], order[:held_out]
