"""Relative representations' claim: nets and encoders made apart understand each other without
any fitting, through their similarities to the same anchors.

*Stitching*: encoders and decoders of digits, trained from several seeds, and every encoder with
every decoder. *Retrieval*: two unlike encoders of the same texts; does one find the item that
the other embedded? *Rate*: the same, by the bits of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.core.codec import from_spec
from fewbits.core.errors import require
from fewbits.core.examples import python_docs
from fewbits.core.reproduction import Reproduction
from fewbits.primitives.alignment import (
    counterpart_mrr,
    linear_cka,
    mean_cosine,
    neighbour_jaccard,
    procrustes,
)
from fewbits.vectors.relative_representations import (
    RelativeRepresentations,
    latent_similarity,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT, CHANCE, ERROR_SHARE, TIMES, INT8_LOSS = 0.9, 0.3, 1 / 3, 10, 0.01
CLAIM = (
    "Digits, stitched without fitting: relative classifiers keep at least "
    f"{KEPT:g} of their own accuracy where absolute ones fall below {CHANCE:g}, and relative "
    "autoencoders err at most a third as much as absolute ones. Across two text encoders, the "
    f"MRR of the counterpart with 100 anchors is at least {TIMES} times that of the absolute "
    f"vectors, rises with every number of anchors, and int8 loses less than {INT8_LOSS:.0%} of it."
)
LATENT, HIDDEN, ANCHORS = 50, 128, 100
TRAINED_DIGITS = 1300
FORMATS = {"float32": None, "int8": 8, "4-bit": 4, "1-bit": 1}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    epochs: int
    counts: tuple[int, ...]
    """Numbers of anchors for texts; 100 is among them."""
    word_dims: int
    pool: int
    """Texts that anchors are chosen among; the others are searched."""


SIZES = {
    "quick": Size((0, 1), 8, (10, 30, 100), 64, 200),
    "small": Size((0, 1, 2), 60, (10, 30, 100, 300), 128, 1000),
}


TEXTS = {
    "quick": "a fifth of the passages of Python's documentation",
    "small": "functions of the standard library",
}


@dataclass(frozen=True)
class Spaces:
    """The same items in two spaces, (n, d) and (n, d'); `pool` gives anchors, `test` is searched.

    The second space asks for the items of the first.
    """

    name: str
    """What they are, in one word."""
    items: np.ndarray
    queries: np.ndarray
    pool: np.ndarray
    test: np.ndarray
    labels: np.ndarray | None = None


def run(size: str = "small") -> Reproduction:
    """Run the three tables.

    Parameters
    ----------
    size : ``small``: 1,797 digits, three seeds, 60 epochs; about 3,900 functions of the standard
        library, embedded by MiniLM and by the words they share; a minute or two, and a few
        more where MiniLM runs for the first time. ``quick``: two seeds, 8 epochs; a fifth of
        the passages of Python's documentation, whose MiniLM embeddings come with fewbits.
    """
    plan = SIZES[size]
    stitched, digits = stitching(plan)
    texts = text_spaces(size, plan)
    retrieved = retrieval(texts, plan.counts, plan.seeds)
    for number, pair in enumerate(digits):
        retrieved += retrieval(pair, (10, 30, ANCHORS), (number,))
    policies = policy_table(texts, ANCHORS, plan.seeds, ("uniform", "farthest", "kmeans"))
    some = ("uniform", "farthest", "kmeans", "stratified")
    policies += [row for pair in digits for row in policy_table(pair, 10, plan.seeds, some)]
    rates = rate_table(texts, plan.counts, plan.seeds)
    tables = [*averaged(stitched), *averaged(retrieved), *averaged(policies), *averaged(rates)]
    figures, baselines = figures_of(tables)
    figures["debiased CKA of the two text encoders"] = linear_cka(
        texts.items, texts.queries, debiased=True
    )
    met = conditions(figures, baselines, plan.counts)
    failed = [name for name, is_met in met.items() if not is_met]
    reason = (
        f"not met: {'; '.join(failed)}" if failed else honest_words(figures, baselines, plan.counts)
    )
    data = (
        f"scikit-learn digits, {len(plan.seeds)} seeds, {ANCHORS} anchors; {TEXTS[size]}, "
        f"{texts.items.shape[1]} and {texts.queries.shape[1]} dimensions, {len(texts.test)} of "
        f"{len(texts.items)} searched"
    )
    return Reproduction(
        "relative-representations",
        CLAIM,
        figures,
        baselines,
        not failed,
        reason,
        data,
        details=tables,
    )


# -- stitching -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Pixels in 0..1, (n, 64), and labels; the first `TRAINED_DIGITS` rows are to train on."""

    pixels: Tensor
    labels: Tensor
    anchors: np.ndarray
    """Rows of the anchors, all of them trained on."""


def stitching(plan: Size) -> tuple[list[dict[str, Any]], list[Spaces]]:
    """The quality of every encoder with every decoder, and the latents of the absolute
    autoencoders, pair by pair."""
    digits, rows, latents = load_digits(), [], []
    for task, relative in product(("classification", "reconstruction"), (False, True)):
        models = [trained(task, relative, digits, seed, plan.epochs) for seed in plan.seeds]
        for (i, one), (j, other) in product(enumerate(models), enumerate(models)):
            what = f"{task}, {'relative' if relative else 'absolute'}"
            pair = "own" if i == j else "stitched"
            value = quality(task, joined(one, other, relative), digits)
            rows.append({"table": "stitching", "method": what, "pair": pair, "value": value})
        if task == "reconstruction" and not relative:
            latents = [encoded(model[0], digits.pixels) for model in models]  # type: ignore[index]
    turned = [*latents[1:], latents[0]]
    return rows, [digit_spaces(a, b, digits) for a, b in zip(latents, turned, strict=True)]


def load_digits() -> Digits:
    """1,797 digits in a random order, and anchors among those to train on."""
    torch: Any = require("torch", "torch")
    data: Any = require("sklearn.datasets", "examples").load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    pixels = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    anchors = np.random.default_rng(1).choice(TRAINED_DIGITS, ANCHORS, replace=False)
    return Digits(pixels, torch.tensor(data.target[order]), anchors)


def trained(task: str, relative: bool, digits: Digits, seed: int, epochs: int) -> nn.Module:
    """An encoder and a decoder. The absolute one differs by the projection alone: its decoder,
    too, begins with a LayerNorm, which makes it a stronger baseline on both tasks."""
    from torch import nn
    from torch.nn import functional

    from fewbits.core.devices import seeded
    from fewbits.vectors._relative_network import RelativeModel, train_model

    inputs = digits.pixels[:TRAINED_DIGITS]
    classify = task == "classification"
    with seeded(seed):
        encoder = perceptron(inputs.shape[1], HIDDEN, HIDDEN, LATENT)
        outputs = 10 if classify else inputs.shape[1]
        decoder = perceptron(ANCHORS if relative else LATENT, HIDDEN, outputs)
        model: nn.Module = nn.Sequential(encoder, nn.LayerNorm(LATENT), decoder)
        if relative:
            model = RelativeModel(encoder, digits.pixels[digits.anchors], decoder)
    train_model(
        model,
        inputs,
        digits.labels[:TRAINED_DIGITS] if classify else inputs,
        functional.cross_entropy if classify else functional.mse_loss,
        epochs=epochs,
        seed=seed,
        device="cpu",
    )
    return model


def perceptron(*widths: int) -> nn.Sequential:
    """Linear maps of these widths with ReLU between them."""
    from torch import nn

    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def joined(one: Any, other: Any, relative: bool) -> nn.Module:
    """The encoder of one model with the decoder of another."""
    from torch import nn

    from fewbits.vectors._relative_network import stitch

    return stitch(one, other) if relative else nn.Sequential(one[0], other[1], other[2]).eval()


def quality(task: str, model: nn.Module, digits: Digits) -> float:
    """Accuracy, or mean squared error, on the digits not trained on."""
    outputs = encoded(model, digits.pixels)[TRAINED_DIGITS:]
    if task == "classification":
        return float((outputs.argmax(axis=1) == digits.labels[TRAINED_DIGITS:].numpy()).mean())
    return float(np.square(outputs - digits.pixels[TRAINED_DIGITS:].numpy()).mean())


def encoded(model: nn.Module, inputs: Tensor) -> np.ndarray:
    """What a model makes of inputs, as an array."""
    import torch

    with torch.inference_mode():
        found: np.ndarray = model(inputs).numpy()
    return found


def digit_spaces(items: np.ndarray, queries: np.ndarray, digits: Digits) -> Spaces:
    pool, test = np.arange(TRAINED_DIGITS), np.arange(TRAINED_DIGITS, len(items))
    return Spaces("digits", items, queries, pool, test, digits.labels.numpy())


# -- retrieval -------------------------------------------------------------------------------


def text_spaces(size: str, plan: Size) -> Spaces:
    """MiniLM embeddings, and latent semantic analysis of the words, of the same texts."""
    from fewbits.reproductions.vectors import bebr

    if size == "quick":
        example = python_docs()
        texts, items = [text.lower() for text in example.texts[::5]], example.vectors[::5]
        queries = bebr.word_vectors(texts[:1], texts, plan.word_dims)[1]
    else:
        pairs = bebr.stdlib_pairs(plan.word_dims)
        items, queries = pairs.documents, pairs.old_documents
    order = np.random.default_rng(0).permutation(len(items))
    return Spaces("texts", items, queries, order[: plan.pool], order[plan.pool :])


def fitted(
    spaces: Spaces, count: int, seed: int, **options: Any
) -> tuple[RelativeRepresentations, RelativeRepresentations]:
    """Codecs of both spaces with the same anchors, chosen in the first."""
    labels = None if spaces.labels is None else spaces.labels[spaces.pool]
    policy = options.pop("policy", "uniform")
    one = RelativeRepresentations(anchors=count, policy=policy, seed=seed, **options)
    one.fit_items(spaces.items[spaces.pool], ids=spaces.pool.tolist(), labels=labels)
    asked = spaces.queries[spaces.pool]
    other = RelativeRepresentations(**options)
    return one, other.fit_anchors(asked[one.rows_], one.anchor_ids, sample=asked)


def retrieval(spaces: Spaces, counts: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Finding each item of one space by its counterpart in the other, several ways."""
    items, queries = spaces.items[spaces.test], spaces.queries[spaces.test]
    padded = np.zeros_like(items)
    padded[:, : queries.shape[1]] = queries
    rows = [compared(spaces, "absolute", 0, padded, items)]
    for count, seed in product(counts, seeds):
        for center in (False, True):
            words = ", centred" if center else ""
            one, other = fitted(spaces, count, seed, bits=None, center=center)
            found = latent_similarity(other, queries, one, items)
            row = {"cosine": found.cosine, "Jaccard@10": found.jaccard, "MRR": found.mrr}
            about = {"table": "retrieval", "data": spaces.name, "anchors": count}
            rows.append(about | {"method": f"relative{words}"} | row)
            anchors = spaces.pool[one.rows_]
            align = procrustes(spaces.queries[anchors], spaces.items[anchors], center=center)
            moved = align(queries) - align.target
            name = f"Procrustes{words}"
            rows.append(compared(spaces, name, count, moved, items - align.target))
    return rows


def compared(
    spaces: Spaces, method: str, count: int, queries: np.ndarray, items: np.ndarray
) -> dict[str, Any]:
    """A row of the table for vectors that are compared as they are."""
    about = {"table": "retrieval", "data": spaces.name, "anchors": count, "method": method}
    return about | {
        "cosine": mean_cosine(queries, items),
        "Jaccard@10": neighbour_jaccard(queries, items, 10),
        "MRR": counterpart_mrr(queries, items),
    }


def policy_table(
    spaces: Spaces, count: int, seeds: Sequence[int], policies: Sequence[str]
) -> list[dict[str, Any]]:
    """The MRR by how the anchors are chosen; each seed is another choice."""
    rows = []
    for policy, seed in product(policies, seeds):
        one, other = fitted(spaces, count, seed, bits=None, policy=policy)
        r = other.transform(spaces.queries[spaces.test]), one.transform(spaces.items[spaces.test])
        about = {"table": "policies", "data": spaces.name, "anchors": count, "method": policy}
        rows.append(about | {"MRR": counterpart_mrr(*r)})
    return rows


def rate_table(spaces: Spaces, counts: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The MRR by the bits of the items' codes; queries stay in floats."""
    rows = []
    items, queries = spaces.items[spaces.test], spaces.queries[spaces.test]
    for count, seed, center in product(counts, seeds, (False, True)):
        for name, bits in FORMATS.items():
            one, other = fitted(spaces, count, seed, bits=bits, center=center)
            code = one.encode(items)
            stored = one._compared(one.relative(code), "cosine")
            asked = other._compared(other.transform(queries), "cosine")
            size = code.bytes_per_item
            rows.append(rate_row(spaces, count, name, center, size, asked, stored))
        one, other = fitted(spaces, count, seed, bits=None, center=center)
        for name, spec in (("turboquant, 4 bits", "turboquant:bits=4"), ("sign", "sign")):
            # How other codecs of few bits do on the same numbers.
            follower = from_spec(spec).fit(one.transform(spaces.items[spaces.pool]))
            code = follower.encode(one.transform(items))
            asked, stored = other.transform(queries), follower.decode(code)
            size = code.bytes_per_item
            rows.append(rate_row(spaces, count, name, center, size, asked, stored))
    return rows


def rate_row(
    spaces: Spaces,
    count: int,
    name: str,
    center: bool,
    size: float,
    asked: np.ndarray,
    stored: np.ndarray,
) -> dict[str, Any]:
    about = {"table": "rate", "data": spaces.name, "anchors": count, "bytes": size}
    method = f"{name}{', centred' if center else ''}"
    return about | {"method": method, "MRR": counterpart_mrr(asked, stored)}


# -- the figures -----------------------------------------------------------------------------


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all that differ in their numbers alone: means, and the spread of the last."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    named = ("table", "data", "method", "pair", "anchors", "bytes")
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in named), []).append(row)
    means = []
    for group in groups.values():
        about = {name: value for name, value in group[0].items() if name in named}
        measured = [name for name in group[0] if name not in named]
        values = {name: float(np.mean([row[name] for row in group])) for name in measured}
        spread = float(np.std([row[measured[-1]] for row in group]))
        means.append(about | values | {"spread": spread, "runs": len(group)})
    return means


def figures_of(
    tables: Sequence[dict[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """What is ours, and what is a baseline, by name."""
    figures: dict[str, float] = {}
    baselines: dict[str, float] = {}
    for row in tables:
        method = row["method"]
        if row["table"] == "rate" and "centred" in method:
            continue  # in the table
        if row["table"] == "stitching":
            name, value = f"{method}, {row['pair']}", row["value"]
        else:
            anchors = f", {row['anchors']} anchors" if row["anchors"] else ""
            size = f", {row['bytes']:g} bytes" if "bytes" in row else ""
            name, value = f"{row['data']}, {method}{anchors}{size}: MRR", row["MRR"]
        rival = any(word in method for word in ("absolute", "Procrustes", "turboquant", "sign"))
        (baselines if rival else figures)[name] = value
    return figures, baselines


def conditions(
    figures: dict[str, float], baselines: dict[str, float], counts: Sequence[int]
) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""
    rank = {count: figures[f"texts, relative, {count} anchors: MRR"] for count in counts}
    exact = figures[f"texts, float32, {ANCHORS} anchors, {4 * ANCHORS} bytes: MRR"]
    int8 = figures[f"texts, int8, {ANCHORS} anchors, {ANCHORS} bytes: MRR"]
    return {
        f"relative classifiers keep {KEPT:g}": figures["classification, relative, stitched"]
        >= KEPT * figures["classification, relative, own"],
        "absolute classifiers are lost": baselines["classification, absolute, stitched"] < CHANCE,
        "relative autoencoders err a third as much": figures["reconstruction, relative, stitched"]
        <= ERROR_SHARE * baselines["reconstruction, absolute, stitched"],
        f"{TIMES} times the MRR of absolute vectors": rank[ANCHORS]
        >= TIMES * baselines["texts, absolute: MRR"],
        "the MRR rises with the anchors": bool((np.diff(list(rank.values())) > 0).all()),
        f"int8 loses less than {INT8_LOSS:.0%}": int8 > (1 - INT8_LOSS) * exact,
    }


def honest_words(
    figures: dict[str, float], baselines: dict[str, float], counts: Sequence[int]
) -> str:
    """What the claim does not say."""
    own, stitched = (figures[f"reconstruction, relative, {pair}"] for pair in ("own", "stitched"))
    absolute = baselines["reconstruction, absolute, own"]
    rivals = [
        f"{figures[f'texts, relative, centred, {count} anchors: MRR']:.3f} and "
        f"{baselines[f'texts, Procrustes, centred, {count} anchors: MRR']:.3f} with {count}"
        for count in (counts[0], counts[-1])
    ]
    return (
        f"stitching is not lossless: reconstruction errs by {stitched:.4f}, with its own decoder "
        f"by {own:.4f}, without anchors by {absolute:.4f}; a Procrustes map fitted on the same "
        f"anchors is the rival to beat: MRR of relative (centred) and Procrustes "
        f"{', '.join(rivals)} anchors"
    )
