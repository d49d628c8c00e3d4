"""What the bits of `activation_code` say: of classes, of redundancy, and which bits say it.

Codes are packed rows (n, w) uint8. `bits` is how many bits a row has; what fills up the last byte
is 0 and changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.container import clear_errors, make_folder, refuse_existing
from fewbits.core.errors import FewbitsError, require
from fewbits.primitives.bits import unpack
from fewbits.primitives.clustering import kmeans, matched_accuracy, purity
from fewbits.primitives.hamming import (
    neighbour_vote,
    pairwise_hamming,
    redundancy_ratio,
    vote,
)
from fewbits.primitives.sketch import add_sign_projection

BLOCK_CELLS = 16_000_000
"""Numbers that a summary of many bits holds at a time."""
WIDE, PROJECTED = 4096, 1024
"""Codes of more bits than `WIDE` are projected to `PROJECTED` floats before k-means."""
REDUNDANT, BEHIND = 0.01, 0.01
"""The rule of `regime`: most redundancy, and how far test accuracy may be behind the best."""
CLOSENESS = np.float32(np.exp(-1))
"""What one more differing bit leaves of the weight of a neighbour in `telling_bits`."""


# -- redundancy and classes ----------------------------------------------------------------


def analyse(
    train: np.ndarray,
    train_labels: Any,
    test: np.ndarray,
    test_labels: Any,
    *,
    k: int = 9,
    seed: int = 0,
) -> dict[str, float]:
    """The paper's measures of packed codes: does every input have its own, do classes show?

    Parameters
    ----------
    train, test : packed codes (n, w) and (m, w) uint8; labels (n,) and (m,).
    k : neighbours that vote.
    seed : of the k-means starts.

    Returns
    -------
    Redundancy ratios of both sets; k-means with as many clusters as classes, on each set, by
    purity (several clusters may stand for a class; the paper's rule) and one to one; accuracy on
    the test codes of the k-NN vote by Hamming distance and of logistic regression (one against
    one), learned from the train codes. Needs scikit-learn. The regressions cost most,
    O(classes·n·bits) a step.

    Raises
    ------
    FewbitsError
        Codes and labels that do not pair up, fewer than two classes, or fewer rows than classes.
    """
    optimum: Any = require("sklearn.linear_model", "measures")
    pairwise: Any = require("sklearn.multiclass", "measures")
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    for codes, labels in ((train, train_labels), (test, test_labels)):
        if labels.shape != (len(codes),):
            raise FewbitsError(f"{len(codes)} codes need as many labels, not {labels.shape}")
    classes = len(np.unique(train_labels))
    if classes < 2 or len(train) < max(k, classes) or len(test) < classes:
        raise FewbitsError(
            f"{classes} classes in {len(train)} and {len(test)} codes are too few to analyse; "
            f"give two classes, {k} training codes and a code of each class at least"
        )
    found = {}
    for name, codes, labels in (("train", train, train_labels), ("test", test, test_labels)):
        found[f"redundancy {name}"] = redundancy_ratio(codes)
        clusters = kmeans(as_floats(codes), classes, seed=seed)
        found[f"k-means purity {name}"] = purity(labels, clusters)
        found[f"k-means one to one {name}"] = matched_accuracy(labels, clusters)
    voted = neighbour_vote(train, train_labels, test, k)
    found[f"{k}-NN test"] = float((voted == test_labels).mean())
    learner = pairwise.OneVsOneClassifier(optimum.LogisticRegression(max_iter=1000))
    bits, asked = (
        unpack(codes, 8 * codes.shape[1], 1).astype(np.float32) for codes in (train, test)
    )
    # Many small problems: threads only wait for each other.
    with require("threadpoolctl", "measures").threadpool_limits(limits=1):
        guessed = learner.fit(bits, train_labels).predict(asked)
    found["logistic test"] = float((guessed == test_labels).mean())
    return found


def as_floats(packed: np.ndarray) -> np.ndarray:
    """(n, bits) float32 zeros and ones; of very wide codes, a projection that keeps distances."""
    bits = 8 * packed.shape[1]
    if bits <= WIDE:
        return unpack(packed, bits, 1).astype(np.float32)
    found = np.zeros((len(packed), PROJECTED), dtype=np.float32)
    step = max(1, BLOCK_CELLS // bits)
    for start in range(0, len(packed), step):
        block = unpack(packed[start : start + step], bits, 1).astype(np.float32)
        add_sign_projection(found[start : start + step], block, 0)
    return found


def bit_information(packed: np.ndarray, labels: Any, bits: int) -> np.ndarray:
    """(bits,) float64: mutual information of each bit with the label, in bits.

    ``np.argsort(-bit_information(…))`` ranks them. O(n·bits), bounded memory.
    """
    classes, row = np.unique(np.asarray(labels), return_inverse=True)
    if len(row) != len(packed):
        raise FewbitsError(f"{len(packed)} codes need as many labels, not {len(row)}")
    sizes = np.bincount(row).astype(np.float64)
    ones = np.zeros((len(classes), bits))
    step = max(1, BLOCK_CELLS // bits)
    for start in range(0, len(packed), step):
        block = unpack(packed[start : start + step], bits, 1).astype(np.float32)
        member = row[start : start + step] == np.arange(len(classes))[:, None]
        ones += member.astype(np.float32) @ block
    joint = np.stack([ones, sizes[:, None] - ones]) / len(packed)
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    surprise = np.log2(joint / apart, out=np.zeros_like(joint), where=joint > 0)
    return np.asarray((joint * surprise).sum(axis=(0, 1)))


# -- the fewest bits -----------------------------------------------------------------------


def separating_bits(packed: np.ndarray, bits: int, tau: float) -> np.ndarray:
    """Few bits that keep the redundancy ratio at or below `tau`, in the order chosen.

    Greedy: the next bit is the one that separates most pairs of rows that are still equal. That
    is within a factor of about log n of the fewest. O(n·bits) for each bit chosen.

    Raises
    ------
    FewbitsError
        All bits together do not do it.
    """
    least = redundancy_ratio(packed)
    if least > tau:
        raise FewbitsError(
            f"tau={tau:g} cannot be met: with all {bits} bits the redundancy is {least:.3g}"
        )
    chosen: list[int] = []
    group = np.zeros(len(packed), dtype=np.int64)
    codes = 1
    while not chosen or (len(packed) - codes) / len(packed) > tau:
        best = int(separated_pairs(packed, group, bits).argmax())
        chosen.append(best)
        bit = packed[:, best // 8] >> np.uint8(best % 8) & 1
        different, group = np.unique(2 * group + bit, return_inverse=True)
        codes = len(different)
    return np.array(chosen, dtype=np.int64)


def separated_pairs(packed: np.ndarray, group: np.ndarray, bits: int) -> np.ndarray:
    """(bits,) int64: pairs of rows of one group that each bit tells apart."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(starts, append=len(group))[:, None]
    found = np.empty(bits, dtype=np.int64)
    step = max(1, BLOCK_CELLS // len(group) // 8)  # bytes, of 8 bits each
    for start in range(0, packed.shape[1], step):
        block = packed[order, start : start + step]
        columns = slice(8 * start, min(bits, 8 * (start + step)))
        table = unpack(block, columns.stop - columns.start, 1)
        ones = np.add.reduceat(table, starts, axis=0, dtype=np.int64)
        found[columns] = (ones * (sizes - ones)).sum(axis=0)
    return found


def telling_bits(
    packed: np.ndarray,
    labels: Any,
    bits: int,
    delta: float,
    *,
    k: int = 9,
    rows: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Few bits whose k-NN vote is within `delta` of the accuracy of all, in the order chosen.

    Greedy: every row looks at the others with weight exp(−distance) in the bits so far, and the
    next bit is the one that puts most weight on rows of its own class. Accuracy is that of
    leaving one out, on at most `rows` rows; on other rows it is somewhat lower.
    O(rows²·bits) for each bit chosen.

    Raises
    ------
    FewbitsError
        Labels that do not pair up, or too few rows for the vote.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(packed),) or len(packed) <= k:
        raise FewbitsError(f"{len(packed)} codes, labels {labels.shape}: give one each, over {k}")
    if len(packed) > rows:
        some = np.sort(np.random.default_rng(seed).choice(len(packed), rows, replace=False))
        packed, labels = packed[some], labels[some]
    table = unpack(packed, bits, 1).astype(np.float32)
    same = (labels[:, None] == labels).astype(np.float32)
    weight = 1 - np.eye(len(labels), dtype=np.float32)
    wanted = left_out_accuracy(table, labels, k) - delta
    chosen: list[int] = []
    while len(chosen) < bits:
        own, every = (kept_weight(w, table) for w in (weight * same, weight))
        gain = (own / np.maximum(every, 1e-30)).mean(axis=0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        bit = table[:, chosen[-1]]
        weight *= np.where(bit[:, None] == bit, np.float32(1), CLOSENESS)
        weight /= weight.max(axis=1, keepdims=True)  # only ratios matter; keep them in range
        if left_out_accuracy(table[:, chosen], labels, k) >= wanted:
            break
    return np.array(chosen, dtype=np.int64)


def kept_weight(weight: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(r, bits): the weight (r, r) of each row's neighbours when one more of the bits counts."""
    differing = table * weight.sum(axis=1, keepdims=True) + (1 - 2 * table) * (weight @ table)
    return np.asarray(weight.sum(axis=1, keepdims=True) - (1 - CLOSENESS) * differing)


def left_out_accuracy(table: np.ndarray, labels: np.ndarray, k: int) -> float:
    """How often the `k` nearest other rows of (r, bits) zeros and ones vote right."""
    distances = pairwise_hamming(np.packbits(table.astype(np.uint8), axis=1)).astype(np.int64)
    np.fill_diagonal(distances, 1 + table.shape[1])
    # Of rows equally far away the earlier one is nearer.
    order = distances * len(table) + np.arange(len(table))
    near = np.argpartition(order, k - 1, axis=1)[:, :k]
    return float((vote(labels, near) == labels).mean())


# -- sweeps --------------------------------------------------------------------------------


def averaged(rows: Iterable[Mapping[str, Any]], settings: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that are equal in `settings`: means of the numbers, in first-come order."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    found = []
    for key, group in groups.items():
        numbers = {name for name, value in group[0].items() if isinstance(value, (int, float))}
        measured = [name for name in group[0] if name in numbers - {*settings, "seed"}]
        means = {name: float(np.mean([row[name] for row in group])) for name in measured}
        found.append(dict(zip(settings, key, strict=True)) | means)
    return found


def with_regimes(
    rows: Sequence[Mapping[str, Any]], k: int = 9, *, best: float | None = None
) -> list[dict[str, Any]]:
    """The rows of a sweep, each with its ``regime``; our rule, the paper has shapes only.

    ``under`` where more than 1 % of the train codes are redundant; ``critical`` where not, but
    test k-NN accuracy is more than a point below its `best` in the sweep; else ``sufficient``.
    """
    highest = max(row[f"{k}-NN test"] for row in rows) if best is None else best

    def regime(row: Mapping[str, Any]) -> str:
        if row["redundancy train"] > REDUNDANT:
            return "under"
        return "critical" if highest - row[f"{k}-NN test"] > BEHIND + 1e-9 else "sufficient"

    return [dict(row) | {"regime": regime(row)} for row in rows]


# -- the chart -----------------------------------------------------------------------------

REGIMES = {"under": "#f2c9a8", "critical": "#f7eeb5", "sufficient": "#b9dec5"}
PANELS = ("redundancy train", "k-means purity train", "9-NN test", "logistic test")


def phase_chart(
    path: str | Path,
    grids: Sequence[tuple[Sequence[Mapping[str, Any]], str, str]],
    *,
    overwrite: bool = False,
) -> Path:
    """Draw the activation hash phase chart: regimes, redundancy and the three accuracies.

    Parameters
    ----------
    path : of the PNG file to write; it is there as a whole or not at all.
    grids : for each row of panels (rows of a sweep, name of the setting along x, and along y).
        Rows that differ in other settings alone are averaged; the best accuracy of all grids
        decides on the regimes.

    Raises
    ------
    FewbitsError
        A file is there already, or cannot be written; grids that are empty or lack a setting.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    path = Path(path)
    refuse_existing(path, overwrite)
    if not grids or not all(len(rows) for rows, *_ in grids):
        raise FewbitsError("there is nothing to draw; give a sweep of one network at least")
    for rows, x, y in grids:
        missing = {x, y, *PANELS} - set(rows[0])
        if missing:
            raise FewbitsError(f"the rows of a phase chart lack {', '.join(sorted(missing))}")
    cells = [averaged(rows, (x, y)) for rows, x, y in grids]
    best = max(cell["9-NN test"] for grid in cells for cell in grid)
    figure = Figure(figsize=(14, 0.7 + 2.3 * len(grids)), dpi=75, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever the screen
    axes = figure.subplots(len(grids), 1 + len(PANELS), squeeze=False)
    for own, grid, (_, x, y) in zip(axes, cells, grids, strict=True):
        for axis, measure in zip(own, ("regime", *PANELS), strict=True):
            draw_grid(axis, with_regimes(grid, best=best), measure, x, y)
    patches = [Patch(color=shade, label=name) for name, shade in REGIMES.items()]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False)
    with written(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def draw_grid(axis: Any, rows: Sequence[Mapping[str, Any]], measure: str, x: str, y: str) -> None:
    """One panel: a cell for each of the settings; the brighter the better."""
    from matplotlib.colors import ListedColormap

    names = list(REGIMES)
    across, up = (sorted({row[name] for row in rows}) for name in (x, y))
    cells = np.full((len(up), len(across)), np.nan)
    for row in rows:
        value = names.index(row["regime"]) if measure == "regime" else row[measure]
        cells[up.index(row[y]), across.index(row[x])] = value
    top = len(names) - 1 if measure == "regime" else 1
    shades: Any = "viridis_r" if measure == "redundancy train" else "viridis"
    if measure == "regime":
        shades = ListedColormap(list(REGIMES.values()))
    axis.imshow(cells, origin="lower", aspect="auto", cmap=shades, vmin=0, vmax=top)
    for (j, i), value in np.ndenumerate(cells):
        if measure != "regime" and np.isfinite(value):
            dark = value > 0.4 if measure == "redundancy train" else value < 0.6
            color = "white" if dark else "black"
            axis.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(across)), [str(value) for value in across])
    axis.set_yticks(range(len(up)), [str(value) for value in up])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(measure, fontsize=10)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which becomes it when the block is done."""
    make_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with clear_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
