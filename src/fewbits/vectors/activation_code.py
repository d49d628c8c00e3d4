"""Activation codes: which units of a network are on, as a binary code of the input.

He, Lei, Ji, Tao 2021, *Neural networks behave as hash encoders: An empirical study* (arXiv
2101.05490).

A ReLU network cuts its inputs into regions, in each of which it is linear. Which ReLUs are on says
which region an input is in: bit = 1 where the pre-activation is above 0, for every hidden unit.
The paper finds that of a network wide and trained enough, almost every input has a code of its own
(determinism), and that inputs of one class have codes that are near in Hamming distance
(categorisation); `analyse` measures both, `sweep` over many networks, and `phase_chart` draws it.

Ours, beside the paper: GELU, SiLU and their kin by the sign of the pre-activation; chosen tokens of
transformers; the fewest bits that do (`ActivationCode.bits_needed`); numbers for the regimes
(`with_regimes`), which the paper defines by the shape of curves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from fewbits.core import container
from fewbits.core.checks import check_seed
from fewbits.core.code import Code
from fewbits.core.codec import UNUSABLE, format_spec, learned, rows_per_block
from fewbits.core.errors import FewbitsError, require
from fewbits.primitives.bits import pack, packed_width, unpack
from fewbits.primitives.hamming import redundancy_ratio
from fewbits.vectors._activation_analysis import analyse as analyse
from fewbits.vectors._activation_analysis import averaged as averaged
from fewbits.vectors._activation_analysis import bit_information as bit_information
from fewbits.vectors._activation_analysis import phase_chart as phase_chart
from fewbits.vectors._activation_analysis import separating_bits as separating_bits
from fewbits.vectors._activation_analysis import telling_bits as telling_bits
from fewbits.vectors._activation_analysis import with_regimes as with_regimes
from fewbits.vectors._binary_encoder import BinaryEncoder

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "activation-code"


@dataclass(frozen=True)
class Layer:
    """One call of one layer, and what of it can be a bit.

    Attributes
    ----------
    name : of the module; ``name#2`` is its second call in a forward pass.
    shape : of its values for one item.
    units : how many bits it has before constant ones are dropped.
    """

    name: str
    shape: tuple[int, ...]
    units: int


@dataclass
class ActivationCode(BinaryEncoder):
    """The on/off pattern of a network's units as packed bits: bits/8 bytes per input.

    `fit` finds the units that are not the same for all inputs; `encode` packs those. Nothing is
    trained. The network stays the caller's: it is not stored, and is evaluated (dropout off,
    batch statistics fixed) whatever mode it is in, then put back. Give it its weights first; codes
    of other weights cannot be compared.

    A batch costs its forward pass, and memory for `batch` × bits beside it. Of a module that runs
    several times in a pass, every call has bits of its own.

    Parameters
    ----------
    model : any ``nn.Module``. Models of several arguments take mappings as inputs.
    layers : ``auto`` for all ReLU-like modules, or names out of ``model.named_modules()``. Of a
        module that is no activation the output counts as the pre-activation: name the layer
        before an activation that is called as a function.
    mode : ``unit`` for a bit per unit; ``channel`` for one per channel of a map, on where any
        place of it is.
    sample_bits : keep at most so many bits, a random choice of those that are not constant.
    seed : of that choice.
    tokens : which tokens of (b, t, d) values: ``first``, ``last``, ``all`` or a number; ``auto``
        is the first (the pooled token of a ViT or BERT), and an error in networks with
        one-dimensional convolutions, whose maps (b, channels, length) look alike.
    channel_axis : where ``mode="channel"`` finds the channels; None for axis 1 of maps and the
        last of tokens. ConvNeXt has maps with channels last: -1.
    batch : items at a time.
    """

    maker: ClassVar[str] = "encoder"

    model: nn.Module = field(repr=False)
    layers: str | Sequence[str] = "auto"
    mode: Literal["unit", "channel"] = "unit"
    sample_bits: int | None = None
    seed: int = 0
    tokens: str | int = "auto"
    channel_axis: int | None = None
    batch: int = 64

    layers_: tuple[Layer, ...] = learned()
    """Where the units are, in the order of the forward pass."""
    mask_: np.ndarray = learned()
    """(ceil(units / 8),) uint8: which units are bits of the code, packed."""
    network_: tuple[str, str] = learned()
    """SHA-256 of the network's structure, and of its weights, at the time of `fit`."""

    # -- fitting --------------------------------------------------------------------------

    def fit(self, *inputs: Any) -> Self:
        """Keep the units that differ among all these inputs; returns self.

        Parameters
        ----------
        inputs : one or several collections, such as train and test, whose union counts (as in
            the paper; with the train inputs alone, nothing is learned from the test). Each is an
            array or tensor (n, …), a mapping of them by the names of the model's arguments, or an
            iterable of batches of either kind, such as a DataLoader.

        Raises
        ------
        FewbitsError
            Unusable inputs or options, no such layer (the nearest is named), no ReLU-like layers,
            layers that do not run, fewer than two inputs, or units that are all constant.
        """
        self._check_parameters()
        ons: dict[str, np.ndarray] = {}
        layers: dict[str, Layer] = {}
        rows = 0

        def count(name: str, values: Tensor) -> tuple[Layer, np.ndarray, int]:
            bits = self._bits(values)
            layer = Layer(name, tuple(values.shape[1:]), bits.shape[1])
            return layer, bits.sum(dim=0).cpu().numpy(), len(bits)

        for given in inputs:
            for seen in self._record(given, count):
                if not seen:
                    raise FewbitsError(f"{NAME}: none of the layers runs; name others: layers=[…]")
                found = {name: layer for name, (layer, _, _) in seen.items()}
                layers = layers or found
                self._check_layers(layers, found)
                for name, (_, on, _) in seen.items():
                    ons[name] = ons.get(name, 0) + on
                rows += next(iter(seen.values()))[2]
        if rows < 2:
            raise FewbitsError(f"{NAME} needs two inputs at least to see which units differ")
        on = np.concatenate(list(ons.values()))
        columns = self._chosen(np.flatnonzero((on > 0) & (on < rows)))
        self.layers_, self.network_ = tuple(layers.values()), network_digests(self.model)
        self._keep_columns(columns)
        return self

    def _chosen(self, columns: np.ndarray) -> np.ndarray:
        """The units to keep out of those that are not constant."""
        if not len(columns):
            raise FewbitsError(
                f"{NAME}: every unit is the same for all inputs; give inputs that differ more"
            )
        if self.sample_bits is None or self.sample_bits >= len(columns):
            return columns
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(columns, self.sample_bits, replace=False))

    def _keep_columns(self, columns: np.ndarray) -> None:
        on = np.zeros((1, sum(layer.units for layer in self.layers_)), dtype=np.uint8)
        on[0, columns] = 1
        self.mask_ = pack(on, 1)[0]

    @property
    def units(self) -> int:
        """Bits before any are dropped."""
        self.require_fitted()
        return sum(layer.units for layer in self.layers_)

    @property
    def columns(self) -> np.ndarray:
        """(bits,) int64: the units that are bits of the code, counted through all layers."""
        self.require_fitted()
        return np.flatnonzero(unpack(self.mask_[None], self.units, 1)[0])

    @property
    def bits(self) -> int:
        """Bits of a code."""
        self.require_fitted()
        return int(np.unpackbits(self.mask_).sum())

    def bits_by_layer(self) -> dict[str, int]:
        """How many bits of the code each layer gives, in the order of the forward pass."""
        return {layer.name: len(own) for layer, own in zip(self.layers_, self._own(), strict=True)}

    def _own(self) -> list[np.ndarray]:
        """The columns of each layer, counted within it."""
        ends = np.cumsum([layer.units for layer in self.layers_])
        parts = np.split(self.columns, np.searchsorted(self.columns, ends[:-1]))
        return [part - start for part, start in zip(parts, [0, *ends[:-1]], strict=True)]

    def all_units(self) -> ActivationCode:
        """The encoder of every unit, also of constant ones: inputs with equal codes then lie in
        one linear region of a network of ReLU-like steps, all of which are hooked."""
        self.require_fitted()
        return self._with_columns(np.arange(self.units))

    def keep(self, columns: Any) -> ActivationCode:
        """The encoder of some bits of this one, in rising order; `bits_needed` chooses well.

        Parameters
        ----------
        columns : whole numbers from 0 below `bits`, all different.
        """
        return self._with_columns(self.columns[self._checked_columns(columns)])

    def keep_code(self, code: Code, columns: Any) -> Code:
        """What ``self.keep(columns)`` makes of the items of `code`, from the code alone."""
        self.check_code(code)
        chosen = self._checked_columns(columns)
        step = rows_per_block(self.bits)
        parts = [
            pack(unpack(code["bits"][start : start + step], self.bits, 1)[:, chosen], 1)
            for start in range(0, len(code), step)
        ]
        return self.keep(columns)._code(np.concatenate(parts))

    def _with_columns(self, columns: np.ndarray) -> ActivationCode:
        other = dataclasses.replace(self)
        other.layers_, other.network_ = self.layers_, self.network_
        other._keep_columns(columns)
        return other

    def _checked_columns(self, columns: Any) -> np.ndarray:
        chosen = np.sort(np.asarray(columns), axis=None)
        whole = np.ndim(columns) == 1 and chosen.dtype.kind in "iu" and len(chosen) > 0
        if not whole or chosen[0] < 0 or chosen[-1] >= self.bits or not np.diff(chosen).all():
            raise FewbitsError(
                f"{NAME}: columns must be different whole numbers from 0 below {self.bits}"
            )
        return chosen.astype(np.int64)

    # -- codes ----------------------------------------------------------------------------

    def encode(self, inputs: Any, to: str | Path | None = None, *, overwrite: bool = False) -> Code:
        """The codes of `inputs`: an array ``bits`` (n, ceil(bits / 8)) uint8, packed by `pack`.

        Parameters
        ----------
        inputs : as in `fit`.
        to : a ``.fewbits`` file to stream the codes to, which the result is then mapped from; for
            more inputs than have codes that fit into memory. `read_code` opens it again.
        overwrite : replace a file that exists.

        Raises
        ------
        FewbitsError
            Not fitted, unusable inputs, inputs of another size than those of `fit`, or a file
            that cannot be written.
        """
        self.require_fitted()
        if to is not None:
            return self._stream(inputs, Path(to), overwrite)
        return self._code(np.concatenate(list(self._packed(inputs))))

    def _packed(self, inputs: Any) -> Iterator[np.ndarray]:
        """Packed codes (b, w) batch by batch."""
        known = {layer.name: layer for layer in self.layers_}
        own = dict(zip(known, self._own(), strict=True))

        def take(name: str, values: Tensor) -> tuple[Layer, np.ndarray]:
            bits = self._bits(values)
            layer = Layer(name, tuple(values.shape[1:]), bits.shape[1])
            self._check_layers({name: known.get(name)}, {name: layer})
            return layer, bits[:, own[name]].cpu().numpy()

        for seen in self._record(inputs, take):
            self._check_layers(known, {name: layer for name, (layer, _) in seen.items()})
            yield pack(np.concatenate([seen[name][1] for name in known], axis=1), 1)

    def _bits(self, values: Tensor) -> Tensor:
        """(b, units) bool of pre-activations (b, …)."""
        if self.tokens == "auto" and values.ndim == 3:  # left so by `_record`
            raise FewbitsError(
                f"{NAME}: in a network with Conv1d, (batch, {values.shape[1]}, {values.shape[2]}) "
                "may be tokens or a map; set tokens=first for tokens, or tokens=all with "
                "channel_axis=1 for a map"
            )
        on = values > 0
        if self.mode == "channel" and on.ndim > 2:
            axis = self.channel_axis
            if axis is None:
                axis = -1 if on.ndim == 3 else 1
            on = on.movedim(axis, 1).flatten(2).any(dim=2)
        return on.flatten(1)

    def _has_one_dimensional_maps(self) -> bool:
        kind = require("torch.nn", "torch").Conv1d
        return any(isinstance(module, kind) for module in self.model.modules())

    def _record(self, inputs: Any, keep: Any) -> Iterator[dict[str, Any]]:
        require("torch", "torch")
        hooks: Any = importlib.import_module("fewbits.primitives.activation_hooks")
        tokens = self.tokens
        if tokens == "auto":
            tokens = "all" if self._has_one_dimensional_maps() else "first"
        try:
            yield from hooks.record(
                self.model, inputs, self.layers, tokens=tokens, keep=keep, batch=self.batch
            )
        except FewbitsError:
            raise
        except ValueError as error:
            raise FewbitsError(f"{NAME}: {error}") from error

    def _check_layers(
        self, known: Mapping[str, Layer | None], found: Mapping[str, Layer | None]
    ) -> None:
        """Refuse values of another layout than those seen first."""
        for name in {**known, **found}:
            one, other = known.get(name), found.get(name)
            alike = one and other and one.units == other.units
            if not alike or (one != other and self.mode == "unit"):
                shapes = [str(layer.shape) if layer else "nothing" for layer in (one, other)]
                raise FewbitsError(
                    f"{NAME}: layer {name!r} gives {shapes[1]} for these inputs, before it gave "
                    f"{shapes[0]}; give inputs of one size, or mode=channel for maps of any size"
                )

    def _code(self, packed: np.ndarray) -> Code:
        return Code({"bits": packed}, self.spec, self.digest)

    # -- using codes ----------------------------------------------------------------------

    def bits_needed(
        self,
        code: Code,
        labels: Any = None,
        *,
        tau: float = 0.01,
        delta: float = 0.01,
        k: int = 9,
    ) -> np.ndarray:
        """Few bits of the code that do as well as all, the most useful first, for `keep`.

        Chosen greedily: see `separating_bits` and `telling_bits` for how, and what it costs.

        Parameters
        ----------
        code : of the items to choose by.
        labels : (n,) classes. Without them the redundancy ratio stays at or below `tau`; with
            them the accuracy of the k-NN vote, leaving one out, stays within `delta` of that of
            all bits.

        Returns
        -------
        (m,) int64 columns, 1 ≤ m ≤ `bits`.

        Raises
        ------
        FewbitsError
            A code of another encoder, labels that do not pair up, `tau` or `delta` below 0, or
            `tau` below what all bits reach.
        """
        self.check_code(code)
        if tau < 0 or delta < 0:
            raise FewbitsError(f"{NAME}: tau={tau:g} and delta={delta:g} must be at least 0")
        packed = code["bits"]
        if labels is None:
            return separating_bits(packed, self.bits, tau)
        return telling_bits(packed, labels, self.bits, delta, k=k, seed=self.seed)

    # -- files ----------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The options, as codes and files name them."""
        names = self.layers if isinstance(self.layers, str) else "|".join(self.layers)
        options = {"layers": names, "mode": self.mode, "sample_bits": self.sample_bits}
        options |= {"seed": self.seed, "tokens": self.tokens, "channel_axis": self.channel_axis}
        return format_spec(NAME, options)

    @property
    def digest(self) -> str:
        """SHA-256 of options, layers, mask, and the network's structure and weights."""
        self.require_fitted()
        told = json.dumps(self._about(), sort_keys=True)
        return hashlib.sha256(told.encode() + self.mask_.tobytes()).hexdigest()

    def _about(self) -> dict[str, Any]:
        names = self.layers if isinstance(self.layers, str) else list(self.layers)
        options = {"layers": names, "mode": self.mode, "sample_bits": self.sample_bits}
        options |= {"seed": self.seed, "tokens": self.tokens, "channel_axis": self.channel_axis}
        found = [[layer.name, list(layer.shape), layer.units] for layer in self.layers_]
        return {"options": options, "layers": found, "network": list(self.network_)}

    def require_fitted(self) -> None:
        if not hasattr(self, "mask_"):
            raise FewbitsError(f"{self.spec} is not fitted yet; call fit(inputs) first")

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write options, layers and mask to a ``.fewbits`` file, not the network."""
        about = {"codec": {"spec": self.spec, "digest": self.digest}, NAME: self._about()}
        return container.write(path, "codec", about, {"mask": self.mask_}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> ActivationCode:
        """Read what `save` wrote, for the network it was fitted on.

        Raises
        ------
        FewbitsError
            A file that is damaged or of something else, or a network of another structure or
            with other weights.
        """
        content = container.read(path)
        try:
            about, mask = content.about[NAME], content.arrays["mask"]
            layers = [Layer(str(n), tuple(s), int(u)) for n, s, u in about["layers"]]
            encoder = cls(model, **about["options"])
            encoder._check_parameters()
            encoder.layers_, encoder.network_ = tuple(layers), tuple(about["network"])
            encoder.mask_ = np.array(mask)
            units = encoder.units
            fits = mask.dtype == np.uint8 and mask.shape == (packed_width(units, 1),)
            if not (fits and encoder.bits and encoder.digest == content.about["codec"]["digest"]):
                raise ValueError("it does not match its digest")
        except UNUSABLE as error:
            reason = str(error) or type(error).__name__
            raise FewbitsError(f"{path} does not hold an {NAME} encoder ({reason})") from None
        structure, weights = network_digests(model)
        if structure != encoder.network_[0]:
            raise FewbitsError(f"{path} was fitted on a network of another structure; give that")
        if weights != encoder.network_[1]:
            raise FewbitsError(
                f"{path} was fitted on the same network with other weights; load those, or fit anew"
            )
        return encoder

    def _stream(self, inputs: Any, path: Path, overwrite: bool) -> Code:
        """Write codes to a file as they come; how many is known only at the end."""
        container.refuse_existing(path, overwrite)
        width = packed_width(self.bits, 1)
        made = container.make_folder(path)
        try:
            with container.clear_errors(path):
                spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
            with spool:
                for block in self._packed(inputs):
                    with container.clear_errors(path):
                        spool.write(block.tobytes())
                shape: tuple[int, ...] = spool.tell() // width, width
                about = {"codec": {"spec": self.spec, "digest": self.digest}}
                spool.seek(0)
                shapes = {"bits": (np.dtype(np.uint8), shape)}
                with container.Writer(
                    path, "encoded", about, shapes, overwrite=overwrite
                ) as writer:
                    while piece := spool.read(math.ceil(container.CHUNK / width) * width):
                        writer.write("bits", np.frombuffer(piece, np.uint8).reshape(-1, width))
        finally:
            container.remove_empty(made)
        return self.read_code(path)

    def read_code(self, path: str | Path) -> Code:
        """Open the codes that ``encode(inputs, to=path)`` wrote; they are mapped, not loaded.

        Raises
        ------
        FewbitsError
            A file that is damaged or of something else, or codes of another encoder.
        """
        self.require_fitted()
        content = container.read(path)
        packed, about = content.arrays.get("bits"), content.about.get("codec")
        shape = (packed_width(self.bits, 1),)
        if packed is None or packed.dtype != np.uint8 or packed.shape[1:] != shape:
            raise FewbitsError(f"{path} does not hold codes of {self.bits} bits of {NAME}")
        if not isinstance(about, dict) or about.get("digest") != self.digest:
            raise FewbitsError(f"{path} holds codes of another encoder; use that one")
        return self._code(packed)

    def _check_parameters(self) -> None:
        check_seed(self.seed)
        if self.mode not in ("unit", "channel"):
            raise FewbitsError(f"{NAME}: mode={self.mode!r} must be unit or channel")
        if self.sample_bits is not None and self.sample_bits < 1:
            raise FewbitsError(f"{NAME}: sample_bits={self.sample_bits} must be at least 1")
        if not isinstance(self.tokens, int) and self.tokens not in ("auto", "first", "last", "all"):
            raise FewbitsError(
                f"{NAME}: tokens={self.tokens!r} must be auto, first, last, all or a number"
            )


def network_digests(model: nn.Module) -> tuple[str, str]:
    """SHA-256 of the structure of a network (names and classes of modules, names and shapes of
    their tensors) and of its weights and buffers. O(weights)."""
    torch: Any = require("torch", "torch")
    modules = [[name, type(module).__name__] for name, module in model.named_modules()]
    shapes, weights = [], hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            shapes.append([name, list(value.shape)])
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            weights.update(flat.numpy().data)
    structure = hashlib.sha256(json.dumps([modules, shapes]).encode())
    return structure.hexdigest(), weights.hexdigest()


# -- analysis ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledData:
    """Inputs (n, …) and labels (n,) to train on, and (m, …) and (m,) to test with."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def measure_network(
    model: nn.Module, data: LabelledData, *, k: int = 9, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Encode the data by a network, with the units that differ on train ∪ test, and `analyse`.

    Parameters
    ----------
    k, seed : as in `analyse`.
    options : of `ActivationCode`, such as ``mode="channel"``.

    Returns
    -------
    What `analyse` does; ``units`` and ``bits``, before and after constant ones are dropped; and
    ``redundancy random``, of as many uniform random inputs as there are to train on.
    """
    encoder = ActivationCode(model, seed=seed, **options).fit(data.train, data.test)
    train, test = (encoder.encode(inputs)["bits"] for inputs in (data.train, data.test))
    found = analyse(train, data.train_labels, test, data.test_labels, k=k, seed=seed)
    noise = uniform_inputs(data.train, len(data.train), seed)
    random = {"redundancy random": redundancy_ratio(encoder.encode(noise)["bits"])}
    return {"units": encoder.units, "bits": encoder.bits} | found | random


def uniform_inputs(inputs: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """(count, …) float32 uniform between the least and the largest number of `inputs`."""
    shape = (count, *inputs.shape[1:])
    low, high = float(inputs.min()), float(inputs.max())
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def sweep(
    networks: Iterable[tuple[Mapping[str, Any], nn.Module, LabelledData]], **options: Any
) -> list[dict[str, Any]]:
    """Measure one network after the other: a row of settings and measures for each.

    Parameters
    ----------
    networks : (settings, network, data) of each; a generator need hold but one. Settings are what
        is varied, by name: ``width``, ``epochs`` (0 for a network that is not trained),
        ``samples``, ``weight decay``, ``noise``, ``seed``, …
    options : of `measure_network`.

    `averaged` makes one row of all that differ in their seed, `with_regimes` names their regimes,
    `phase_chart` draws them.
    """
    return [
        dict(settings) | measure_network(network, data, **options)
        for settings, network, data in networks
    ]


def region_diameters(
    encoder: ActivationCode,
    inputs: np.ndarray,
    directions: np.ndarray | None = None,
    *,
    reach: float = 5.0,
    step: float = 0.05,
    seed: int = 0,
) -> np.ndarray:
    """How far the linear region of each input goes along a line through it.

    The codes of all units along x + α·u for α from −`reach` to `reach`: the diameter is `step`
    times the points without a gap around α = 0 that have the code of x, itself among them. (The
    released program counts every point of the line with that code.)

    Parameters
    ----------
    inputs : (n, …) float.
    directions : (n, …) for each its u, such as the way to the mean of its class; random by
        default. They are scaled to unit length.

    Returns
    -------
    (n,) float64, from `step` to 2·`reach` + `step`, where the region goes beyond the line.
    Cost: n·(2·reach/step + 1) forward passes.

    Raises
    ------
    FewbitsError
        Directions that do not pair up or have no length, or a step that does not fit the reach.
    """
    if not 0 < step <= reach:
        raise FewbitsError(f"step={step:g} must be above 0 and at most reach={reach:g}")
    if directions is None:
        directions = np.random.default_rng(seed).standard_normal(inputs.shape)
    if np.shape(directions) != inputs.shape:
        raise FewbitsError(f"directions {np.shape(directions)} must have shape {inputs.shape}")
    lengths = np.linalg.norm(directions.reshape(len(inputs), -1), axis=1)
    if not (lengths > 0).all():
        raise FewbitsError(f"direction {int(lengths.argmin())} has no length; leave it out")
    unit = directions / lengths.reshape(-1, *[1] * (inputs.ndim - 1))
    whole, points = encoder.all_units(), round(reach / step)
    alphas = step * np.arange(-points, points + 1)
    runs = []
    for x, u in zip(inputs, unit, strict=True):
        line = x + alphas.reshape(-1, *[1] * x.ndim) * u
        packed = whole.encode(line)["bits"]
        same = (packed == packed[points]).all(axis=1)
        before, after = same[points::-1], same[points:]
        runs.append(sum(int(np.logical_and.accumulate(side).sum()) for side in (before, after)) - 1)
    return step * np.array(runs, dtype=np.float64)
