"""CSCE-Net: images of one class get binary codes that differ in few bits.

Xue, Shi, He, Xu, Pan 2022, *Cross-Scale Context Extracted Hashing for Fine-Grained Image Binary
Encoding* (arXiv 2210.07572, ACML 2022).

A network is trained on labelled images to give b numbers v, whose signs are the code:

    f3, f4 = the maps of the last two stages of a backbone
    W = all windows of f4, of two sizes                          what the image shows as a whole
    L = attention over the places of f3                          detail
    F = [weighted sum of W ; mean of L − W(Wᵀ L)/‖W‖²]           detail that the whole lacks (AIE)
    v = A·F + c,   t = clamp(w·F + d, −0.01, 0.01)

Each class has a fixed centre of ±1, a row of a Hadamard matrix; v is drawn to the centre of its
class by a softmax over cosines with a random angular margin, and to ±½ or beyond by a term
1 − cos(v, bits). The dynamic sign function (DSF) makes the bits: where |v| < t, a bit is not
trusted, and has the sign that fewer bits of the image have.

As released, no gradient reaches t, which is a fixed random projection then (``dsf="paper"``);
``dsf="ste"`` trains it. The loss that does so is least with no bit changed, so it closes the zone.
`HashHead` is the last step alone, for embeddings that are there already.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from fewbits.core import container
from fewbits.core.checks import as_array, check_seed, check_vectors, numbered_classes
from fewbits.core.code import Code
from fewbits.core.codec import (
    UNUSABLE,
    format_spec,
    hyper_parameters,
    learned,
    state_digest,
)
from fewbits.core.errors import FewbitsError, require
from fewbits.primitives.bits import pack
from fewbits.primitives.hamming import pairwise_hamming
from fewbits.primitives.image_folder import ImageFiles, ImageTable, image_folder
from fewbits.primitives.label_retrieval import (
    average_precision,
    precision_within,
    ranked_relevance,
)
from fewbits.vectors._binary_encoder import BinaryEncoder

MOST_BITS = 4096
LARGEST_SIDE = 2048
"""Of images as the network sees them, in pixels."""
WHOLE = ("bits", "batch", "epochs", "check_every", "size", "resize")
"""Options that are whole numbers, of either estimator."""
NEAR = 2
"""Radius, in bits, of the precision that papers on hashing report."""
BLOCK_CELLS = 4_000_000
"""Distances held at a time."""
CODE_ARRAYS = {"bits": np.uint8, "threshold": np.float32, "ambiguous": np.uint16}


class Inputs(Protocol):
    """Rows that can be told from others."""

    def __len__(self) -> int: ...

    def digest(self) -> str: ...


# -- what both estimators share --------------------------------------------------------------


@dataclass
class HashModel(BinaryEncoder):
    """Options and files of `CSCENet` and `HashHead`."""

    name: ClassVar[str]
    maker: ClassVar[str] = "model"

    bits: int = 64
    margin: float = 0.15
    margin_deviation: float = 0.125
    margin_kind: Literal["arc", "cos"] = "arc"
    scale: float = 10.0
    quantization: Literal["cs", "l1", "l2"] = "cs"
    quantization_weight: float = 1.0
    dsf: Literal["off", "paper", "fixed", "ste"] = "paper"
    dead_zone: float = 0.01
    consistent: bool = False
    optimizer: Literal["rmsprop", "adam"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    batch: int = 50
    epochs: int = 60
    held_out: float = 0.1
    check_every: int = 5
    seed: int = 0
    device: str | None = None

    network_: Any = learned()
    """The trained network, an `nn.Module`."""
    about_: dict[str, Any] = learned()
    """What the network is built from, besides the options."""
    digest: str = learned()
    """SHA-256 of options and weights."""
    scores_: dict[int, float] = learned()
    """mAP of the images held out after some epochs; empty after loading."""

    # -- what differs ---------------------------------------------------------------------

    def _inputs(self, given: Any) -> Inputs:
        """Checked inputs."""
        raise NotImplementedError  # abstract

    def _batch(self, inputs: Any, rows: np.ndarray, training: bool) -> Any:
        """A tensor of these rows for the network."""
        raise NotImplementedError  # abstract

    def _build(self, about: Mapping[str, Any]) -> Any:
        """The network that `about` describes, with random weights."""
        raise NotImplementedError  # abstract

    # -- training -------------------------------------------------------------------------

    def _train(
        self,
        network: Any,
        about: dict[str, Any],
        inputs: Inputs,
        labels: np.ndarray,
        checkpoint: str | Path | None,
        progress: bool,
    ) -> Self:
        identity = ""
        if checkpoint is not None:
            told = hashlib.sha256(labels.tobytes()).hexdigest()
            identity = f"{self.spec} {inputs.digest()} {told}"
        network, _, self.scores_ = torch_part().train_network(
            self,
            network,
            lambda rows, training: self._batch(inputs, rows, training),
            labels,
            lambda trained, rows: self._score(trained, inputs, labels, rows),
            checkpoint=checkpoint,
            identity=identity,
            progress=progress,
        )
        self._keep(network, about)
        return self

    def _score(self, network: Any, inputs: Inputs, labels: np.ndarray, rows: np.ndarray) -> float:
        """mAP of some rows among themselves."""
        packed = pack(self._outputs(network, inputs, rows)[2], 1)
        own = np.arange(len(rows))
        asked = labels[rows]
        ranked, _ = ranked_relevance(
            pairwise_hamming(packed), asked, asked, itself=own, distances=True
        )
        return float(average_precision(ranked).mean())

    def _keep(self, network: Any, about: dict[str, Any]) -> None:
        self.network_, self.about_ = network, about
        told = f"{self.spec} {json.dumps(about, sort_keys=True)}"
        self.digest = state_digest(told, [self.bits], torch_part().state_of(network))

    def _outputs(
        self, network: Any, inputs: Inputs, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return torch_part().outputs(
            network, self, lambda some, training: self._batch(inputs, some, training), rows
        )

    def _check_trainable(self, rows: int) -> None:
        held = round(self.held_out * rows)
        if rows - held < 2 or held == 1:
            raise FewbitsError(
                f"{self.name}: of {rows} rows, held_out={self.held_out:g} leaves {rows - held} to "
                f"train on and {held} to compare; give more rows, or set held_out=0"
            )

    # -- codes ----------------------------------------------------------------------------

    def encode(self, inputs: Any, to: str | Path | None = None, *, overwrite: bool = False) -> Code:
        """The codes of `inputs`, and what is needed to judge each.

        Parameters
        ----------
        inputs : as in `fit`, without labels.
        to : a ``.fewbits`` file to write the codes to; `read_code` opens it again.
        overwrite : replace a file that exists.

        Returns
        -------
        A `Code` of ``bits`` (n, bits/8) uint8, which faiss's ``IndexBinaryFlat`` takes as they
        are; ``threshold`` (n,) float32, t of each item; and ``ambiguous`` (n,) uint16, how many of
        its bits the dynamic sign function chose. Searching needs the bits alone.

        Raises
        ------
        FewbitsError
            Not fitted, unusable inputs, or a file that cannot be written.
        """
        self.require_fitted()
        if to is not None:
            container.refuse_existing(Path(to), overwrite)
        found = self._inputs(inputs)
        with readable_errors():
            v, thresholds, bits = self._outputs(self.network_, found, np.arange(len(found)))
        used = np.clip(2 * v, -1, 1) if self.consistent else v
        ambiguous = (np.abs(used) < thresholds[:, None]).sum(axis=1)
        arrays = {"bits": pack(bits, 1), "threshold": thresholds, "ambiguous": ambiguous}
        code = self._code({n: array.astype(CODE_ARRAYS[n]) for n, array in arrays.items()})
        if to is not None:
            about = {"codec": {"spec": self.spec, "digest": self.digest}}
            container.write(to, "encoded", about, code.arrays, overwrite=overwrite)
        return code

    def pre_activations(self, inputs: Any) -> np.ndarray:
        """(n, bits) float32: v, whose signs are the bits but for those the DSF chooses."""
        self.require_fitted()
        found = self._inputs(inputs)
        with readable_errors():
            return self._outputs(self.network_, found, np.arange(len(found)))[0]

    def read_code(self, path: str | Path) -> Code:
        """Open the codes that ``encode(inputs, to=path)`` wrote; they are mapped, not loaded.

        Raises
        ------
        FewbitsError
            A file that is damaged or of something else, or codes of another model.
        """
        self.require_fitted()
        content = container.read(path)
        about = content.about.get("codec")
        if not isinstance(about, dict) or about.get("digest") != self.digest:
            raise FewbitsError(f"{path} holds no codes of this model; use the one that made them")
        widths = {"bits": (self.bits // 8,), "threshold": (), "ambiguous": ()}
        for name, width in widths.items():
            array = content.arrays.get(name)
            if array is None or array.shape[1:] != width or array.dtype != CODE_ARRAYS[name]:
                raise FewbitsError(f"{path} does not hold codes of {self.bits} bits")
        return self._code({name: content.arrays[name] for name in widths})

    def _code(self, arrays: dict[str, np.ndarray]) -> Code:
        return Code(arrays, self.spec, self.digest)

    def require_fitted(self) -> None:
        if not hasattr(self, "network_"):
            raise FewbitsError(f"{self.name} is not fitted yet; call fit first")

    # -- files ----------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Everything that was chosen, but for the device, as JSON has it."""
        chosen = {f.name: getattr(self, f.name) for f in hyper_parameters(self)}
        del chosen["device"]
        return json.loads(json.dumps(chosen))

    @property
    def spec(self) -> str:
        """The options, as codes and files name them."""
        options = self.options().items()
        flat = {n: "|".join(map(str, v)) if isinstance(v, list) else v for n, v in options}
        return format_spec(self.name, flat)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write options and weights to a ``.fewbits`` file."""
        self.require_fitted()
        about = {
            "codec": {"spec": self.spec, "digest": self.digest},
            self.name: {"options": self.options(), "network": self.about_},
        }
        arrays = torch_part().state_of(self.network_)
        return container.write(path, "codec", about, arrays, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Read what `save` wrote; nothing is downloaded.

        Raises
        ------
        FewbitsError
            A file that is damaged or of something else, or one that does not fit together.
        """
        content = container.read(path)
        if cls.name not in content.about:
            raise FewbitsError(f"{path} does not hold a {cls.name} model")
        try:
            about = content.about[cls.name]
            model = cls(**about["options"], device=device)
            model._check_parameters()
            network = torch_part().restore(lambda: model._build(about["network"]), content.arrays)
            model._keep(network, about["network"])
            model.scores_ = {}
            if model.digest != content.about["codec"]["digest"]:
                raise ValueError("it does not match its digest")
        except UNUSABLE as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise FewbitsError(f"{path} does not hold a usable {cls.name} ({reason})") from None
        return model

    def _check_parameters(self) -> None:
        check_seed(self.seed)
        for name in WHOLE:
            if not isinstance(getattr(self, name, 0), int):
                raise FewbitsError(f"{self.name}: {name} must be a whole number")
        if self.bits % 8 or not 8 <= self.bits <= MOST_BITS:
            raise FewbitsError(
                f"{self.name}: bits={self.bits} must be a multiple of 8 from 8 to {MOST_BITS}"
            )
        least = {"margin_deviation": 0, "quantization_weight": 0, "dead_zone": 0}
        least |= {"weight_decay": 0, "held_out": 0, "epochs": 0, "batch": 2, "check_every": 1}
        for name, lowest in least.items():
            if not lowest <= getattr(self, name) < np.inf:
                raise FewbitsError(
                    f"{self.name}: {name}={getattr(self, name)} must be at least {lowest}"
                )
        for name in ("scale", "learning_rate"):
            if not 0 < getattr(self, name) < np.inf:
                raise FewbitsError(f"{self.name}: {name}={getattr(self, name)} must be positive")
        if not -np.inf < self.margin < np.inf or self.held_out >= 1:
            raise FewbitsError(f"{self.name}: margin must be finite, and held_out below 1")
        for name, kind in typing.get_type_hints(type(self)).items():
            words = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            if words and getattr(self, name) not in words:
                raise FewbitsError(
                    f"{self.name}: {name}={getattr(self, name)!r} must be {' or '.join(words)}"
                )
        if self.dsf == "ste" and self.dead_zone == 0:
            raise FewbitsError(f"{self.name}: dsf=ste needs a dead_zone above 0")


# -- images ----------------------------------------------------------------------------------


@dataclass
class CSCENet(HashModel):
    """Images to binary codes, learned from labelled images.

    The defaults are the published ones: a pretrained ResNet-50, 500 epochs of RMSprop.
    `CSCENet.small` is a network that a CPU trains in minutes. A code takes bits/8 bytes.

    Parameters
    ----------
    bits : length of the code, a multiple of 8. Powers of two give the best centres.
    margin, margin_deviation : mean and standard deviation of the margin, in radians for ``arc``.
        With several labels per image the margin is always the mean.
    margin_kind : ``arc`` adds the margin to the angle, ``cos`` takes it from the cosine.
    scale : what the cosines are multiplied by.
    quantization : ``cs`` for 1 − cosine of squashed v and its bits, ``l1``, or ``l2``.
    quantization_weight : of that term beside the classification; 0 leaves it out.
    dsf : the threshold of the dynamic sign function. ``paper``: clamp(w·F + d), without a
        gradient, as released; ``ste``: the same with a gradient through a soft dead zone;
        ``fixed``: `dead_zone` for all; ``off``: signs as they are.
    dead_zone : largest threshold.
    consistent : apply the DSF to squashed v when encoding, as in training. As published it is
        applied to v itself, in which the same threshold means a zone twice as wide.
    optimizer, learning_rate, weight_decay, batch, epochs : of training.
    held_out : share of the images that are not trained on, but searched among themselves to find
        the best epoch by mAP. 0 trains on all and keeps the last.
    check_every : epochs between two such searches.
    seed : of weights, batches, margins, crops and random centres.
    device : what to compute on; None for the best there is.
    backbone : ``small``; or a backbone of `transformers`, by name on the Hugging Face hub or as
        a folder that ``save_pretrained`` wrote.
    branches : False for the mean over the last map in place of both branches.
    aie : ``paper``, ``exact`` for the orthogonal projection, or ``off`` for all detail.
    windows : sides of the sliding windows, in places of the last map.
    channels : of either branch, a multiple of the squares of all windows. None for as many as
        the stage before the last has, rounded down to such a multiple.
    size : side of the square that the network sees, 32 or more.
    resize : side that images are scaled to before; the difference to `size` is cropped at random
        in training.
    flip : mirror images at random in training; not for text, digits, …

    Notes
    -----
    AIE costs O(c·windows·places) per image, beside the backbone. Images are read batch by batch:
    memory does not grow with their number, but for the codes.
    """

    name: ClassVar[str] = "csce-net"

    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    learning_rate: float = 1e-5
    epochs: int = 500

    backbone: str = "microsoft/resnet-50"
    branches: bool = True
    aie: Literal["off", "paper", "exact"] = "paper"
    windows: tuple[int, ...] = (2, 4)
    channels: int | None = None
    size: int = 224
    resize: int = 256
    flip: bool = True

    @classmethod
    def small(cls, bits: int = 64, size: int = 32, **options: Any) -> Self:
        """A network of four convolutions for images of `size` pixels, trained by Adam."""
        settings = {
            "backbone": "small",
            "windows": (2, 3),
            "resize": size,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "epochs": 60,
        }
        return cls(bits=bits, size=size, **{**settings, **options})

    def fit(
        self,
        images: Any,
        labels: Any = None,
        *,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """Learn from labelled images; returns self.

        Parameters
        ----------
        images : (n, h, w, 3) or grey (n, h, w) uint8; a folder with a folder of images per class;
            or what `image_folder` or `image_list` of `primitives.image_folder` gives.
        labels : (n,) classes, numbers or names; or (n, c) of 0 and 1, for images with several
            labels. Not needed where `images` has them.
        checkpoint, progress : as in `core.training.train`.

        Raises
        ------
        FewbitsError
            Unusable images, labels or options, fewer than two classes, too few images, a backbone
            that cannot be loaded, or maps that the windows do not fit.
        """
        self._check_parameters()
        found = self._inputs(images)
        labels = getattr(found, "labels", None) if labels is None else labels
        targets = class_targets(labels, len(found))
        self._check_trainable(len(found))
        network = torch_part()
        with seeded_weights(self.seed):
            about: dict[str, Any] = {}
            if self.backbone == "small":
                backbone = network.SmallBackbone()
            else:
                backbone, about = network.pretrained_backbone(self.backbone)
            made = network.image_network(self, backbone)
        return self._train(made, about, found, targets, checkpoint, progress)

    def _build(self, about: Mapping[str, Any]) -> Any:
        network = torch_part()
        small = self.backbone == "small"
        backbone = network.SmallBackbone() if small else network.described_backbone(about)
        return network.image_network(self, backbone)

    def _inputs(self, given: Any) -> ImageFiles | ImageTable:
        if isinstance(given, (ImageFiles, ImageTable)):
            return given
        with readable_errors():
            if isinstance(given, (str, Path)):
                return image_folder(given)
            return ImageTable(as_array(given, "the images"))

    def _batch(self, inputs: Any, rows: np.ndarray, training: bool) -> Any:
        with readable_errors():
            images = inputs.read(rows, self.resize)
        return torch_part().prepared(images, self.size, self.flip, training)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if not 32 <= self.size <= self.resize <= LARGEST_SIDE:
            raise FewbitsError(
                f"csce-net: size={self.size} must be at least 32, and at most "
                f"resize={self.resize}, which is at most {LARGEST_SIDE}"
            )
        self.windows = tuple(self.windows)  # a file holds a list
        if not self.windows or not all(isinstance(a, int) and a >= 1 for a in self.windows):
            raise FewbitsError(f"csce-net: windows={self.windows} must be sides of at least 1")


# -- vectors ---------------------------------------------------------------------------------


@dataclass
class HashHead(HashModel):
    """The last step of CSCE-Net alone: embeddings to binary codes, learned from labels.

    Centres, margins, quantization and the dynamic sign function are those of `CSCENet`, on a linear
    map of the standardised embeddings. The options are described there.
    """

    name: ClassVar[str] = "csce-net-head"

    def fit(
        self,
        vectors: Any,
        labels: Any,
        *,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """Learn from labelled vectors; returns self.

        Parameters
        ----------
        vectors : (n, d) finite numbers.
        labels : (n,) classes, numbers or names; or (n, c) of 0 and 1.
        checkpoint, progress : as in `core.training.train`.

        Raises
        ------
        FewbitsError
            Unusable vectors, labels or options, fewer than two classes, too few rows, or rows that
            are all the same.
        """
        self._check_parameters()
        table = VectorTable(check_vectors(vectors, what="the vectors"))
        targets = class_targets(labels, len(table))
        self._check_trainable(len(table))
        mean = table.rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        scale = float(table.rows.std(axis=0, dtype=np.float64).mean())
        if scale <= 1e-6 * float(np.abs(mean).max()):
            raise FewbitsError("csce-net-head: the vectors are all the same; nothing to learn")
        about = {"dims": len(mean)}
        with seeded_weights(self.seed):
            made = self._build(about)
        made.features.set(mean, scale)
        return self._train(made, about, table, targets, checkpoint, progress)

    def _build(self, about: Mapping[str, Any]) -> Any:
        network, dims = torch_part(), about["dims"]
        return network.HashNetwork(network.Standardised(dims), dims, self)

    def _inputs(self, given: Any) -> VectorTable:
        table = VectorTable(check_vectors(given, what="the vectors"))
        dims = self.about_["dims"]
        if table.rows.shape[1] != dims:
            raise FewbitsError(
                f"csce-net-head was fitted on {dims} dimensions, but these vectors have "
                f"{table.rows.shape[1]}"
            )
        return table

    def _batch(self, inputs: Any, rows: np.ndarray, training: bool) -> Any:
        return require("torch", "torch").from_numpy(inputs.rows[rows])


@dataclass(frozen=True)
class VectorTable:
    """Checked vectors (n, d) float32."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        return hashlib.sha256(self.rows.data).hexdigest()


# -- labels and quality ----------------------------------------------------------------------


def class_targets(labels: Any, rows: int) -> np.ndarray:
    """Classes (n,) int64 from 0 without gaps, or indicators (n, c) float32.

    Raises
    ------
    FewbitsError
        No labels, not one (or one row) per item, other than 0 and 1 in a row, a row without a
        label, or a single class.
    """
    if labels is None:
        raise FewbitsError("csce-net learns from labels; give labels, or a folder per class")
    labels = as_array(labels, "the labels")
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise FewbitsError(
            f"labels must be one per item ({rows}), or a row of 0 and 1, not {labels.shape}"
        )
    if labels.ndim == 2:
        return class_indicators(labels)
    return numbered_classes(labels, "", "give items of two classes at least")


def class_indicators(labels: np.ndarray) -> np.ndarray:
    """(n, c) float32 of checked 0/1 labels."""
    if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        raise FewbitsError("labels with a column per class are 0 or 1")
    if labels.shape[1] < 2:
        raise FewbitsError("labels have one column; give items of two classes at least")
    without = ~labels.any(axis=1)
    if without.any():
        raise FewbitsError(f"row {int(without.argmax())} has no label; leave such items out")
    return labels.astype(np.float32)


def hash_retrieval(
    queries: np.ndarray,
    query_labels: Any,
    rows: np.ndarray,
    row_labels: Any,
    *,
    cut: int | None = None,
    k: int = 100,
) -> dict[str, float]:
    """How well packed codes find items that share a label, as papers on hashing measure it.

    Parameters
    ----------
    queries, rows : (q, w) and (n, w) uint8 packed codes.
    query_labels, row_labels : (q,) and (n,) classes, or (q, c) and (n, c) of 0 and 1.
    cut : ranks that count for the mAP (the papers' mAP@cut); None for all.
    k : of the recall, at most the rows.

    Returns
    -------
    ``mAP``: mean over the queries of the precision at each relevant row within `cut`, averaged
    over those found there, so that missing others costs nothing; 0 for a query that finds none.
    ``recall@k``: share of a query's relevant rows among the first k. ``precision within 2``: share
    of relevant rows among those that differ in at most 2 bits. Of rows equally far away the
    earlier come first. O(q·n·(w + log n)), in blocks of queries.

    Raises
    ------
    FewbitsError
        Codes and labels that do not pair up, codes of two widths, or a cut below 1.
    """
    asked, held = np.asarray(query_labels), np.asarray(row_labels)
    sums = np.zeros(3)
    try:
        if len(asked) != len(queries) or len(held) != len(rows):
            raise ValueError("codes and labels do not pair up")
        if k < 1 or (cut is not None and cut < 1):
            raise ValueError(f"cut={cut} and k={k} must be at least 1")
        shown = min(k, len(rows))
        step = max(1, BLOCK_CELLS // max(len(rows), 1))
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            distances = pairwise_hamming(queries[some], rows)
            ranked, totals = ranked_relevance(distances, asked[some], held, distances=True)
            near = precision_within(distances, asked[some], held, NEAR)
            recall = ranked[:, :shown].sum(axis=1) / np.maximum(totals, 1)
            sums += average_precision(ranked[:, :cut]).sum(), recall.sum(), near * len(ranked)
    except ValueError as error:
        raise FewbitsError(f"hash_retrieval: {error}") from None
    names = ("mAP", f"recall@{shown}", f"precision within {NEAR}")
    return dict(zip(names, (sums / len(queries)).tolist(), strict=True))


# -- torch -----------------------------------------------------------------------------------


def torch_part() -> Any:
    """The part that needs torch."""
    require("torch", "torch")
    return importlib.import_module("fewbits.vectors._csce_network")


def seeded_weights(seed: int) -> Any:
    """A context in which torch's random numbers are those of `seed`."""
    require("torch", "torch")
    return importlib.import_module("fewbits.core.devices").seeded(seed)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """What reading images complains of, as an error for users."""
    try:
        yield
    except FewbitsError:
        raise
    except ValueError as error:
        raise FewbitsError(f"csce-net: {error}") from None
