"""The claim of *Neural networks behave as hash encoders*: which ReLUs are on tells inputs apart
and tells their class, once the network is wide enough and trained.

*Sweep*: redundancy and categories of the codes of small networks on scikit-learn's digits, over
width, epochs, training samples, label noise and weight decay. *Baselines*: other codes of as many
bits, and the pixels. *Probes*: how large linear regions are, how far codes of a class are apart,
how few bits would do. MNIST as well, where there is some.
"""

from __future__ import annotations

import copy
import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.core.codec import from_spec
from fewbits.core.errors import FewbitsError, require
from fewbits.core.reproduction import Reproduction
from fewbits.primitives.bits import pack
from fewbits.primitives.clustering import kmeans, matched_accuracy, purity
from fewbits.primitives.hamming import class_histograms, neighbour_vote
from fewbits.primitives.pca import Moments, principal_components
from fewbits.vectors.activation_code import (
    ActivationCode,
    LabelledData,
    analyse,
    averaged,
    phase_chart,
    region_diameters,
    sweep,
    with_regimes,
)

if TYPE_CHECKING:
    from torch import nn

WIDTH = 60
"""Units of the networks that the claim is about."""
REDUNDANT, OF_NETWORK, CLUSTERS, COLLAPSE = 0.02, 0.03, 0.08, 0.15
CLAIM = (
    "One hidden layer on digits: the redundancy of train codes "
    f"falls with every width, and is below {REDUNDANT:.0%} with {WIDTH} units. Of those {WIDTH} "
    f"bits, the 9-NN vote is within {100 * OF_NETWORK:.0f} points of the network's own accuracy "
    "and above SimHash and the untrained network, and K-means is "
    f"{100 * CLUSTERS:.0f} points purer than on pixels, SimHash and the untrained network (than "
    "on pixels also where weights start by Xavier's rule, as in the paper). Trained "
    f"on random labels, redundancy stays below {REDUNDANT:.0%}, but K-means loses "
    f"{100 * COLLAPSE:.0f} points. Means over the seeds."
)
BATCH, RATE, DECAY = 64, 1e-2, 1e-6
SETTINGS = ("data", "start", "width", "epochs", "samples", "noise", "decay")
"""What the rows of the sweep vary."""
CLUSTERED, VOTED = "k-means purity train", "9-NN test"


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    digits: tuple[int, int]
    """How many to train on, and to test with."""
    widths: tuple[int, ...]
    epochs: tuple[int, ...]
    """When networks are looked at; the last one ends the training."""
    samples: tuple[int, ...]
    noise: tuple[float, ...]
    """Shares of the training labels that are shuffled."""
    decay: tuple[float, ...]
    starts: tuple[str, ...]
    """Other ways to start the weights than PyTorch's."""
    probed: int
    """Test digits whose linear regions are measured."""
    mnist: bool


SIZES = {
    "quick": Size((0,), (500, 200), (7, WIDTH), (0, 5), (), (1.0,), (), (), 5, False),
    "small": Size(
        (0, 1, 2),
        (1300, 497),
        (3, 7, 15, 30, WIDTH, 100),
        (0, 1, 3, 30),
        (50, 200),
        (0.25, 0.5, 1.0),
        (0.0, 1e-3),
        ("xavier",),
        50,
        True,
    ),
}


def run(size: str = "small") -> Reproduction:
    """Run the sweep, the baselines and the probes.

    Parameters
    ----------
    size : ``small``: 1,797 digits, 1,300 to train on, three seeds, six widths, up to 30 epochs; and
        10,000 MNIST digits where the folder FEWBITS_DATA has ``mnist``; a few minutes. ``quick``:
        700 digits, one seed, two widths, 5 epochs, seconds.
    """
    plan = SIZES[size]
    digits = load_digits(*plan.digits)
    rows = sweep(swept(digits, plan), k=9)
    rivals = [row for seed in plan.seeds for row in baselines("digits", digits, seed)]
    probes = probe(digits, plan)
    if plan.mnist and (mnist := load_mnist()) is not None:
        rows += sweep(compared("mnist", mnist, plan), k=9)
        rivals += [row for seed in plan.seeds for row in baselines("mnist", mnist, seed)]
    table, others = averaged(rows, SETTINGS), averaged(rivals, ("data", "method"))
    figures = figures_of(table, plan) | {row["probe"]: row["value"] for row in probes}
    baseline = {
        f"{row['data']}, {row['method']}: {name}": row[name]
        for row in others
        for name in (CLUSTERED, VOTED)
    }
    met = conditions(figures, baseline, [row for row in table if is_of_widths(row, plan)])
    failed = [name for name, is_met in met.items() if not is_met]
    return Reproduction(
        "activation-code",
        CLAIM,
        figures,
        baseline,
        not failed,
        "; ".join([*(f"not met: {name}" for name in failed), honest_words(figures, baseline)]),
        f"scikit-learn digits, {len(digits.train)} to train on and {len(digits.test)} to test, "
        f"{len(plan.seeds)} seeds" + (", MNIST test digits" if "mnist" in str(table) else ""),
        details=[{"table": "sweep"} | row for row in regimes_of(table)]
        + [{"table": "baselines"} | row for row in others]
        + [{"table": "probes"} | row for row in probes],
    )


# -- data ------------------------------------------------------------------------------------


def load_digits(train: int = 1300, test: int = 497) -> LabelledData:
    """So many of scikit-learn's 1,797 digits, always the same; pixels in 0..1."""
    data: Any = require("sklearn.datasets", "measures").load_digits()
    pixels, labels = (data.data / 16).astype(np.float32), data.target
    return split(pixels, labels, train, test)


def load_mnist() -> LabelledData | None:
    """MNIST's test digits, 8,000 of them to train on; None where there are none."""
    folder = Path(os.environ.get("FEWBITS_DATA", "")) / "mnist"
    files = [folder / f"t10k-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    if not all(file.is_file() for file in files):
        return None
    pixels, labels = (read_idx(file) for file in files)
    return split((pixels.reshape(len(pixels), -1) / 255).astype(np.float32), labels, 8000, 2000)


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped idx file: a magic number that ends in the number of axes,
    their lengths as big-endian 32-bit numbers, the bytes."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if content[:3] != b"\0\0\x08" or values.size != np.prod(shape, dtype=np.int64):
        raise FewbitsError(f"{path} is not an idx file of bytes, or it is damaged")
    return values.reshape(shape)


def split(inputs: np.ndarray, labels: np.ndarray, train: int, test: int) -> LabelledData:
    """So many rows to train on and to test with, in a random order that is always the same."""
    order = np.random.default_rng(0).permutation(len(inputs))
    seen, asked = order[:train], order[train : train + test]
    return LabelledData(inputs[seen], labels[seen], inputs[asked], labels[asked])


# -- networks --------------------------------------------------------------------------------

Swept = Iterator[tuple[dict[str, Any], "nn.Module", LabelledData]]


def swept(data: LabelledData, plan: Size) -> Swept:
    """Every network of the sweep over digits, with its settings."""
    last, whole = plan.epochs[-1], len(data.train)
    for seed in plan.seeds:
        for width in plan.widths:
            yield from trained(data, seed, width, plan.epochs)
            for samples in plan.samples:
                epochs = plan.epochs if width == WIDTH else (last,)
                yield from trained(data, seed, width, epochs, samples=samples)
        for noise in plan.noise:
            yield from trained(data, seed, WIDTH, (last,), samples=whole, noise=noise)
        for decay in plan.decay:
            yield from trained(data, seed, WIDTH, (last,), samples=whole, decay=decay)
        for start in plan.starts:
            yield from trained(data, seed, WIDTH, (last,), samples=whole, start=start)


def compared(name: str, data: LabelledData, plan: Size) -> Swept:
    """The networks of the claim on other data: trained, untrained, trained on random labels."""
    last = plan.epochs[-1]
    for seed in plan.seeds:
        for options in ({"epochs": (0, last)}, {"epochs": (last,), "noise": 1.0}):
            for settings, network, own in trained(data, seed, WIDTH, **options):
                yield settings | {"data": name}, network, own


def trained(
    data: LabelledData,
    seed: int,
    width: int,
    epochs: Sequence[int],
    *,
    samples: int | None = None,
    noise: float = 0.0,
    decay: float = DECAY,
    start: str = "pytorch",
) -> Swept:
    """One network, after each of the numbers of `epochs`; true labels come with it.

    As in the released programs: Adam, a tenth of the rate every 20 epochs; with fewer samples they
    are repeated, so that an epoch always has as many steps.
    """
    import torch

    from fewbits.core.training import train

    samples = samples or len(data.train)
    given = np.array(data.train_labels[:samples])
    rng = np.random.default_rng(seed)
    noisy = rng.permutation(samples)[: round(noise * samples)]
    given[noisy] = given[rng.permutation(noisy)]
    network = untrained(data.train.shape[1], width, seed, start)
    kept = {0: copy.deepcopy(network)}
    inputs, labels = torch.from_numpy(data.train[:samples]), torch.from_numpy(given).long()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        own = rows % samples
        return torch.nn.functional.cross_entropy(network(inputs[own]), labels[own])

    def keep(epoch: int, history: object) -> None:
        if epoch in epochs:
            kept[epoch] = copy.deepcopy(network)

    train(
        network,
        loss,
        len(data.train),
        epochs=epochs[-1],
        batch_size=BATCH,
        optimizer=lambda weights: torch.optim.Adam(weights, lr=RATE, weight_decay=decay),
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(
            optimizer, max(1, 20 * steps // max(epochs[-1], 1)), gamma=0.1
        ),
        drop_last=False,
        seed=seed,
        device="cpu",
        callback=keep,
    )
    own = replace(data, train=data.train[:samples], train_labels=data.train_labels[:samples])
    about = {"data": "digits", "start": start, "width": width, "samples": samples}
    for count in epochs:
        settings = about | {"epochs": count, "noise": noise, "decay": decay, "seed": seed}
        yield settings | accuracy(kept[count], data), kept[count], own


def untrained(inputs: int, width: int, seed: int, start: str = "pytorch") -> nn.Module:
    """Linear, BatchNorm, ReLU, Linear; weights start as in PyTorch, or by Xavier's rule as in
    Keras, which the released program uses for its MNIST networks."""
    from torch import nn

    from fewbits.core.devices import seeded
    from fewbits.primitives.blocks import mlp

    with seeded(seed):
        if start == "xavier":
            return mlp(inputs, 10, hidden=width).eval()
        layers = nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)
        return nn.Sequential(*layers).eval()


def accuracy(network: nn.Module, data: LabelledData) -> dict[str, float]:
    """How often the network itself is right on the test inputs."""
    import torch

    with torch.inference_mode():
        guessed = network.eval()(torch.from_numpy(data.test)).argmax(dim=1).numpy()
    return {"network test": float((guessed == data.test_labels).mean())}


# -- baselines and probes --------------------------------------------------------------------


def baselines(name: str, data: LabelledData, seed: int) -> list[dict[str, Any]]:
    """The same measures for codes of as many bits that know no labels, and for the pixels."""
    sides = (data.train, data.test)
    mean = data.train.mean(axis=0)
    directions = np.random.default_rng(seed).standard_normal((data.train.shape[1], WIDTH))
    principal = principal_components(Moments(data.train.shape[1]).add(data.train))
    basis = principal.components[:WIDTH].T
    medians = np.median((data.train - mean) @ basis, axis=0)
    itq = from_spec(f"itq:bits={WIDTH},seed={seed}").fit(data.train)
    codes = {
        "SimHash": [pack((side - mean) @ directions > 0, 1) for side in sides],
        "PCA, medians": [pack((side - mean) @ basis > medians, 1) for side in sides],
        "ITQ": [itq.encode(side)["bits"] for side in sides],
    }
    rows = [
        {"data": name, "method": f"{method}, {WIDTH} bits", "seed": seed}
        | analyse(train, data.train_labels, test, data.test_labels, seed=seed)
        for method, (train, test) in codes.items()
    ]
    return [*rows, {"data": name, "method": "pixels", "seed": seed} | of_pixels(data, seed)]


def of_pixels(data: LabelledData, seed: int) -> dict[str, float]:
    """K-means and the 9-NN vote (Euclidean) on the inputs themselves."""
    from fewbits.core.search import search_array
    from fewbits.primitives.hamming import vote

    found = {}
    for side, inputs, labels in (
        ("train", data.train, data.train_labels),
        ("test", data.test, data.test_labels),
    ):
        clusters = kmeans(inputs, 10, seed=seed)
        found[f"k-means purity {side}"] = purity(labels, clusters)
        found[f"k-means one to one {side}"] = matched_accuracy(labels, clusters)
    near = search_array(data.test, data.train, 9, "l2")[1]
    return found | {VOTED: float((vote(data.train_labels, near) == data.test_labels).mean())}


def probe(data: LabelledData, plan: Size) -> list[dict[str, Any]]:
    """Figures of trained and untrained networks beside the sweep: means over the seeds."""
    found: dict[str, list[float]] = {}
    for seed in plan.seeds:
        for settings, network, _ in trained(data, seed, WIDTH, (0, plan.epochs[-1])):
            words = "trained" if settings["epochs"] else "untrained"
            encoder = ActivationCode(network).fit(data.train, data.test)
            train, test = (encoder.encode(inputs) for inputs in (data.train, data.test))
            histograms = class_histograms(train["bits"], data.train_labels)
            for kind, counts in zip(("within a class", "between classes"), histograms, strict=True):
                bits = float(counts @ np.arange(len(counts)) / counts.sum())
                found.setdefault(f"bits apart {kind}, {words}", []).append(bits)
            some, labels = data.test[: plan.probed], data.test_labels[: plan.probed]
            centres = np.stack([data.train[data.train_labels == c].mean(axis=0) for c in labels])
            for where, ways in (("its class mean", centres - some), ("anywhere", None)):
                mean = float(region_diameters(encoder, some, ways, seed=seed).mean())
                found.setdefault(f"region diameter towards {where}, {words}", []).append(mean)
            if settings["epochs"]:
                for name, value in fewest(encoder, train, test, data).items():
                    found.setdefault(name, []).append(value)
    return [{"probe": name, "value": float(np.mean(values))} for name, values in found.items()]


def fewest(encoder: ActivationCode, train: Any, test: Any, data: LabelledData) -> dict[str, float]:
    """How few bits do, and the 9-NN vote of the ones chosen by it."""
    telling = encoder.bits_needed(train, data.train_labels, delta=0.01)
    kept = [encoder.keep_code(code, telling)["bits"] for code in (train, test)]
    voted = neighbour_vote(kept[0], data.train_labels, kept[1])
    return {
        "bits needed for 1 % redundancy": len(encoder.bits_needed(train, tau=0.01)),
        "bits needed for 9-NN within a point": len(telling),
        "9-NN test of those bits": float((voted == data.test_labels).mean()),
    }


# -- the figures -----------------------------------------------------------------------------


def label_of(row: dict[str, Any], plan: Size) -> str:
    """What sets a network apart from the one of the claim, in words."""
    words = [f"{row['data']}, {row['width']} units"]
    words += [f"{row['epochs']} epochs"] * (row["epochs"] != plan.epochs[-1])
    words += [f"{row['samples']} samples"] * (row["samples"] in plan.samples)
    words += [f"{row['noise']:.0%} random labels"] * (row["noise"] > 0)
    words += [f"weight decay {row['decay']:g}"] * (row["decay"] != DECAY)
    words += ["Xavier start"] * (row["start"] != "pytorch")
    return ", ".join(words)


def is_of_widths(row: dict[str, Any], plan: Size) -> bool:
    """Whether a row is of the sweep over widths: all the rest as in the claim."""
    return label_of(row, plan) == f"digits, {row['width']} units"


def figures_of(table: Sequence[dict[str, Any]], plan: Size) -> dict[str, float]:
    """Figures of networks that differ from that of the claim in one respect; the rest is in the
    table."""
    found = {}
    for row in table:
        label = label_of(row, plan)
        respects = label.count(", ") - 1
        if respects == 0:
            found[f"{label}: network test"] = row["network test"]
        if respects == 0 or (respects == 1 and row["width"] == WIDTH and row["decay"] == DECAY):
            for name in ("redundancy train", CLUSTERED, VOTED):
                found[f"{label}: {name}"] = row[name]
    return found


def conditions(
    figures: dict[str, float], baseline: dict[str, float], widths: Sequence[dict[str, Any]]
) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""
    own = f"digits, {WIDTH} units"
    redundancy = [row["redundancy train"] for row in sorted(widths, key=lambda row: row["width"])]
    clustered, voted = figures[f"{own}: {CLUSTERED}"], figures[f"{own}: {VOTED}"]
    rivals = {
        "pixels": baseline[f"digits, pixels: {CLUSTERED}"],
        "SimHash": baseline[f"digits, SimHash, {WIDTH} bits: {CLUSTERED}"],
        "the untrained network": figures[f"{own}, 0 epochs: {CLUSTERED}"],
    }
    random = f"{own}, 100% random labels"
    met = {
        "redundancy falls with every width": bool((np.diff(redundancy) <= 0).all())
        and redundancy[0] > redundancy[-1],
        f"{WIDTH} units leave little redundancy": figures[f"{own}: redundancy train"] < REDUNDANT,
        "9-NN is close to the network": voted >= figures[f"{own}: network test"] - OF_NETWORK,
        "9-NN is above SimHash": voted > baseline[f"digits, SimHash, {WIDTH} bits: {VOTED}"],
        "9-NN is above the untrained network": voted > figures[f"{own}, 0 epochs: {VOTED}"],
        "random labels leave little redundancy": figures[f"{random}: redundancy train"] < REDUNDANT,
        "random labels cost the categories": figures[f"{random}: {CLUSTERED}"]
        <= clustered - COLLAPSE,
    }
    met |= {
        f"K-means is far above {name}": clustered >= value + CLUSTERS
        for name, value in rivals.items()
    }
    # PyTorch's start is the kinder one; the paper's must not be left out of the verdict for that.
    other = figures.get(f"{own}, Xavier start: {CLUSTERED}")
    if other is not None:
        met["K-means is far above pixels, Xavier start"] = other >= rivals["pixels"] + CLUSTERS
    return met


def honest_words(figures: dict[str, float], baseline: dict[str, float]) -> str:
    """What the claim does not say."""
    own, other = f"digits, {WIDTH} units", f"mnist, {WIDTH} units"
    words = [
        f"9-NN hardly tells a trained network ({figures[f'{own}: {VOTED}']:.3f}) from ITQ, which "
        f"knows no labels ({baseline[f'digits, ITQ, {WIDTH} bits: {VOTED}']:.3f})"
    ]
    if f"{own}, Xavier start: {CLUSTERED}" in figures:
        pixels = baseline[f"digits, pixels: {CLUSTERED}"]
        leads = [
            100 * (figures[f"{own}{start}: {CLUSTERED}"] - pixels)
            for start in ("", ", Xavier start")
        ]
        words.append(
            f"K-means leads pixels by {leads[0]:.1f} points where weights start as in PyTorch, and "
            f"by {leads[1]:.1f} where they start as in Keras, as in the paper"
        )
    if f"{other}: {CLUSTERED}" in figures:
        words.append(
            f"K-means on MNIST: {figures[f'{other}: {CLUSTERED}']:.3f}, pixels "
            f"{baseline[f'mnist, pixels: {CLUSTERED}']:.3f}, untrained "
            f"{figures[f'{other}, 0 epochs: {CLUSTERED}']:.3f}, random labels "
            f"{figures[f'{other}, 100% random labels: {CLUSTERED}']:.3f}"
        )
    return "; ".join(words)


def regimes_of(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the regime of each, within its data."""
    names = dict.fromkeys(row["data"] for row in table)
    return [
        row for name in names for row in with_regimes([row for row in table if row["data"] == name])
    ]


def chart(details: Sequence[dict[str, Any]], path: str | Path, *, overwrite: bool = False) -> Path:
    """Draw the phase chart of a reproduction's `details`: width, epochs and samples by pairs."""
    rows = [row for row in details if row["table"] == "sweep" and row["data"] == "digits"]
    plain = [
        row for row in rows if (row["noise"], row["decay"], row["start"]) == (0.0, DECAY, "pytorch")
    ]
    whole, last = max(row["samples"] for row in plain), max(row["epochs"] for row in plain)
    grids = [
        ([row for row in plain if row["samples"] == whole], "width", "epochs"),
        ([row for row in plain if row["epochs"] == last], "width", "samples"),
        ([row for row in plain if row["width"] == WIDTH], "epochs", "samples"),
    ]
    return phase_chart(path, grids, overwrite=overwrite)
