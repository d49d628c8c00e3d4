"""The claim of CSCE-Net: two branches, AIE and the dynamic sign function find more images of a
class than a hash head with the same loss, and far more than ITQ, at equal bits.

A ladder with one small backbone, each rung trained on the same images for as many epochs: ITQ on
pooled features, a tanh head, the loss with fixed centres (OrthoHash), then CSCE-Net's parts one by
one. Two sets: scikit-learn's digits, and the same digits pasted at random places on photographs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbits.core.errors import require
from fewbits.core.reproduction import Reproduction
from fewbits.primitives.bits import pack, unpack
from fewbits.primitives.image_folder import ImageTable
from fewbits.vectors.baselines import ITQ
from fewbits.vectors.csce_net import CSCENet, hash_retrieval

BITS, SIDE, CANVAS = 16, 32, 48
BELOW, ABOVE_ITQ, ABOVE = 0.01, 0.15, 0.01
CLAIM = (
    f"{BITS} bits, mAP over all of the database, means over the seeds. On digits CSCE-Net is at "
    f"most {100 * BELOW:.0f} point below a head with the same loss, and {100 * ABOVE_ITQ:.0f} "
    "points above ITQ on pooled features of the same backbone; on digits that are pasted on "
    f"photographs it is at least {100 * ABOVE:.0f} point above that head."
)
POOLED, TANH, HEAD, FULL = "ITQ", "tanh head", "OrthoHash loss", "+ DSF"
UNTRAINED, PIXELS = "ITQ, untrained features", "ITQ, pixels"
PLAIN_SIGN = "+ DSF, encoded by plain signs"
RUNGS: dict[str, dict[str, Any]] = {
    HEAD: {"branches": False, "dsf": "off", "quantization_weight": 0.0},
    "+ two branches": {"aie": "off", "dsf": "off", "quantization_weight": 0.0},
    "+ AIE": {"dsf": "off", "quantization_weight": 0.0},
    FULL: {},
}
"""Options of each rung; the last adds the DSF together with the quantization term it is for."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    epochs: int
    digits: int
    """How many of each class to train on."""
    cluttered: int
    """The same for digits on photographs."""
    queries: int
    database: int


SIZES = {
    "quick": Size((0,), 1, 5, 5, 30, 100),
    "small": Size((0, 1, 2), 30, 20, 40, 500, 897),
}


@dataclass(frozen=True)
class Retrieval:
    """Images (n, s, s, …) uint8 and classes (n,): to train on, to ask with, to be found."""

    train: np.ndarray
    train_labels: np.ndarray
    queries: np.ndarray
    query_labels: np.ndarray
    database: np.ndarray
    database_labels: np.ndarray


def run(size: str = "small") -> Reproduction:
    """Run the ladder on both sets.

    Parameters
    ----------
    size : ``small``: 20 digits of each class to train on (40 on photographs), 500 queries, 897 in
        the database, three seeds, 30 epochs; twenty minutes on one core. ``quick``: 5 of each
        class, one seed, 1 epoch, seconds.
    """
    plan = SIZES[size]
    rows = []
    for seed in plan.seeds:
        sets = {"digits": digits(plan, seed, plan.digits)}
        sets["cluttered"] = cluttered(digits(plan, seed, plan.cluttered), seed)
        for name, data in sets.items():
            rows += [{"data": name, "seed": seed} | row for row in ladder(data, plan, seed)]
    table = averaged(rows)
    figures, baselines = figures_of(table)
    met = conditions({**figures, **baselines})
    failed = [name for name, is_met in met.items() if not is_met]
    return Reproduction(
        "csce-net",
        CLAIM,
        figures,
        baselines,
        not failed,
        "; ".join([*(f"not met: {name}" for name in failed), honest_words(table)]),
        f"scikit-learn digits, {plan.digits} of each class to train on ({plan.cluttered} on "
        f"photographs), {plan.queries} queries, {plan.database} in the database, {plan.epochs} "
        f"epochs, {len(plan.seeds)} seeds",
        details=table,
    )


# -- data ------------------------------------------------------------------------------------


def digits(plan: Size, seed: int, each: int) -> Retrieval:
    """The digits at 32×32, `each` of every class to train on, in an order drawn by `seed`."""
    data: Any = require("sklearn.datasets", "measures").load_digits()
    images = ImageTable(np.round(data.images * 255 / 16).astype(np.uint8))
    order = np.random.default_rng(seed).permutation(len(images))
    ranks = np.empty(len(order), dtype=np.int64)
    for c in range(10):
        own = data.target[order] == c
        ranks[own] = np.arange(own.sum())
    seen, rest = order[ranks < each], order[ranks >= each]
    asked, held = rest[: plan.queries], rest[plan.queries : plan.queries + plan.database]
    parts = [(images.read(rows, SIDE), data.target[rows]) for rows in (seen, asked, held)]
    return Retrieval(*(array for part in parts for array in part))


def cluttered(data: Retrieval, seed: int) -> Retrieval:
    """The same digits, white, at random places of 48×48 pieces of two photographs."""
    photos = require("sklearn.datasets", "measures").load_sample_images().images
    rng = np.random.default_rng(seed)
    return Retrieval(
        paste(data.train, photos, rng),
        data.train_labels,
        paste(data.queries, photos, rng),
        data.query_labels,
        paste(data.database, photos, rng),
        data.database_labels,
    )


def paste(images: np.ndarray, photos: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(n, 48, 48, 3) uint8: pieces of photographs, whitened where (n, 32, 32, 3) images are."""
    table, count = np.stack(photos), len(images)
    which = rng.integers(len(table), size=count)
    tops = rng.integers(table.shape[1] - CANVAS + 1, size=count)
    lefts = rng.integers(table.shape[2] - CANVAS + 1, size=count)
    grid = np.arange(CANVAS)
    rows, columns = tops[:, None] + grid, lefts[:, None] + grid
    ground = table[which[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32)
    shares = np.zeros((count, CANVAS, CANVAS, 1), dtype=np.float32)
    tops, lefts = rng.integers(CANVAS - SIDE + 1, size=(2, count))
    rows, columns = tops[:, None] + np.arange(SIDE), lefts[:, None] + np.arange(SIDE)
    places = np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    shares[places] = images[..., :1] / np.float32(255)
    return np.round(ground * (1 - shares) + 255 * shares).astype(np.uint8)


# -- the ladder ------------------------------------------------------------------------------


def ladder(data: Retrieval, plan: Size, seed: int) -> list[dict[str, Any]]:
    """A row of measures for every rung."""
    rows = []
    features, untrained = (classifier(data, plan, seed, epochs) for epochs in (plan.epochs, 0))
    everything = {POOLED: features, UNTRAINED: untrained, PIXELS: pixels}
    for name, vectors in everything.items():
        rows.append({"rung": name} | itq(data, vectors, seed))
    hashed = tanh_head(data, plan, seed)
    rows.append({"rung": TANH} | measured(data, as_signs(hashed), hashed))
    for name, options in RUNGS.items():
        network = CSCENet.small(
            BITS,
            data.train.shape[1],
            epochs=plan.epochs,
            held_out=0.0,
            flip=False,
            seed=seed,
            **options,
        ).fit(data.train, data.train_labels)
        rows.append({"rung": name} | measured(data, encoder(network), network.pre_activations))
    plain = measured(data, as_signs(network.pre_activations), network.pre_activations)
    return [*rows, {"rung": PLAIN_SIGN} | plain]


Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From images to packed codes (n, bits/8), and how many bits of each are ambiguous (n,)."""


def encoder(network: CSCENet) -> Encode:
    def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        code = network.encode(images)
        return code["bits"], code["ambiguous"]

    return encode


def as_signs(values: Callable[[np.ndarray], np.ndarray]) -> Encode:
    return lambda images: (pack(values(images) >= 0, 1), np.zeros(len(images)))


def measured(
    data: Retrieval, encode: Encode, values: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    """Retrieval, and how balanced and how sure the codes of the database are."""
    started = time.perf_counter()
    packed, ambiguous = encode(data.database)
    seconds = time.perf_counter() - started
    asked = encode(data.queries)[0]
    found = hash_retrieval(asked, data.query_labels, packed, data.database_labels)
    signs, v = 2.0 * unpack(packed, BITS, 1) - 1, values(data.database)
    lengths = np.linalg.norm(v, axis=1) * np.sqrt(BITS)
    return found | {
        "ambiguous bits": float(ambiguous.mean()) / BITS,
        "bits from balance": float(np.abs(signs.sum(axis=1)).mean()) / 2,
        "quantization error": float(1 - ((v * signs).sum(axis=1) / lengths).mean()),
        "ms per image": 1000 * seconds / len(packed),
    }


# -- baselines -------------------------------------------------------------------------------


def pixels(images: np.ndarray) -> np.ndarray:
    """(n, s²/16) float32: grey, averaged over 4×4."""
    grey = images.mean(axis=3, dtype=np.float32)
    side = grey.shape[1] // 4
    return grey.reshape(-1, side, 4, side, 4).mean(axis=(2, 4)).reshape(len(grey), -1)


def itq(
    data: Retrieval, features: Callable[[np.ndarray], np.ndarray], seed: int
) -> dict[str, float]:
    """ITQ of features, fitted on all images that are not queries."""
    codec = ITQ(bits=BITS, seed=seed)
    codec.fit(np.concatenate([features(data.train), features(data.database)]))

    def values(images: np.ndarray) -> np.ndarray:
        return (features(images) - codec.mean_) @ codec.projection_

    return measured(data, as_signs(values), values)


def classifier(
    data: Retrieval, plan: Size, seed: int, epochs: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Pooled features (n, 128) of the backbone, trained to classify the same images."""
    import torch

    from fewbits.vectors._csce_network import SmallBackbone

    def build() -> tuple[torch.nn.Module, torch.nn.Module]:
        return SmallBackbone(), torch.nn.Linear(128, 10)

    return trained(data, plan, seed, epochs, build)


def tanh_head(data: Retrieval, plan: Size, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """b units (n, b) on the pooled features, through whose tanh it is trained to classify."""
    import torch

    from fewbits.vectors._csce_network import SmallBackbone

    class Hashed(SmallBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.code = torch.nn.Linear(128, BITS)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            before, last = super().forward(x)
            return before, self.code(last.mean(dim=(2, 3)))[:, :, None, None]

    def build() -> tuple[torch.nn.Module, torch.nn.Module]:
        return Hashed(), torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(BITS, 10))

    return trained(data, plan, seed, plan.epochs, build)


def trained(
    data: Retrieval, plan: Size, seed: int, epochs: int, build: Callable[[], tuple[Any, Any]]
) -> Callable[[np.ndarray], np.ndarray]:
    """The mean over the last map of a backbone that is trained with a classifier on it.

    Start, batches, optimizer and input are those of the other rungs.
    """
    import torch

    from fewbits.core.devices import seeded
    from fewbits.core.training import train
    from fewbits.vectors._csce_network import optimizer, prepared

    settings = CSCENet.small(BITS, epochs=epochs, seed=seed)
    with seeded(seed):
        backbone, classes = build()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    labels = torch.from_numpy(data.train_labels)
    device = next(backbone.parameters()).device

    def pooled(images: np.ndarray) -> torch.Tensor:
        x = prepared(images, images.shape[1], False, False)
        return backbone(x.to(device))[1].mean(dim=(2, 3))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        scores = classes(pooled(data.train[rows.numpy()]))
        return torch.nn.functional.cross_entropy(scores, labels[rows].to(device))

    train(
        torch.nn.ModuleList([backbone, classes]),
        loss,
        len(labels),
        epochs=epochs,
        batch_size=settings.batch,
        optimizer=optimizer(settings),
        seed=seed,
        device="cpu",
    )

    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        parts = np.array_split(images, -(-len(images) // settings.batch))
        return np.asarray(torch.cat([pooled(part) for part in parts]).numpy())

    return features


# -- the figures -----------------------------------------------------------------------------


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and the standard deviation of the mAP."""
    table = []
    for data, rung in dict.fromkeys((row["data"], row["rung"]) for row in rows):
        own = [row for row in rows if (row["data"], row["rung"]) == (data, rung)]
        names = [name for name in own[0] if name not in ("data", "rung", "seed")]
        means = {name: float(np.mean([row[name] for row in own])) for name in names}
        spread = float(np.std([row["mAP"] for row in own]))
        table.append({"data": data, "rung": rung} | means | {"mAP deviation": spread})
    return table


def figures_of(table: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The mAP of CSCE-Net's rungs, and of what it is compared with."""
    maps = {f"{row['data']}, {row['rung']}: mAP": row["mAP"] for row in table}
    own = {name: value for name, value in maps.items() if ", + " in name}
    return own, {name: value for name, value in maps.items() if name not in own}


def conditions(maps: dict[str, float]) -> dict[str, bool]:
    """Each part of the claim, and whether it is met."""
    clean = {rung: maps[f"digits, {rung}: mAP"] for rung in (POOLED, HEAD, FULL)}
    pasted = {rung: maps[f"cluttered, {rung}: mAP"] for rung in (HEAD, FULL)}
    return {
        "digits: not below the OrthoHash head": clean[FULL] >= clean[HEAD] - BELOW,
        "digits: far above ITQ": clean[FULL] >= clean[POOLED] + ABOVE_ITQ,
        "cluttered: above the OrthoHash head": pasted[FULL] >= pasted[HEAD] + ABOVE,
    }


def honest_words(table: Sequence[dict[str, Any]]) -> str:
    """What each part adds."""
    words = []
    for data in dict.fromkeys(row["data"] for row in table):
        own = {row["rung"]: row for row in table if row["data"] == data}
        steps = [POOLED, TANH, *RUNGS]
        shown = ", ".join(
            f"{rung} {own[rung]['mAP']:.3f} ± {own[rung]['mAP deviation']:.3f}" for rung in steps
        )
        gain = 100 * (own[FULL]["mAP"] - own[PLAIN_SIGN]["mAP"])
        words.append(
            f"mAP on {data}: {shown}; the DSF itself adds {gain:+.2f} points, it chooses "
            f"{own[FULL]['ambiguous bits']:.2%} of the bits; ITQ on features that saw no labels "
            f"{own[UNTRAINED]['mAP']:.3f}, on pixels {own[PIXELS]['mAP']:.3f}"
        )
    return "; ".join(words)
