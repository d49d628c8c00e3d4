"""CSKV: keys and values as few features of what a layer makes them of.

Wang, Li, Ning, Zhou, Yan, Dai, Yang, Wang 2024, *CSKV: Training-Efficient Channel Shrinking for KV
Cache in Long-Context Scenarios* (arXiv 2409.10593).

Keys and values are linear in the layer's input x. In the place of (W_K x, W_V x) the cache holds
the features (x A_K, x A_V), whose rank is shared by all heads, and multiplies by B_K and B_V where
it needs them. Keys are rebuilt before their rotary embedding, where they have a far lower rank than
behind it; values never are: attention mixes their features, and B_V comes last.

The factors start from a singular value decomposition in which inputs count by their size (ASVD),
and are then trained so that each layer's keys and values are as before, with the model frozen and
the original keys and values everywhere. Without bits this has a closed form, too. The newest tokens
are exact beside their features: a window that fills up and is then left to the features as a whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fewbits.core.errors import FewbitsError
from fewbits.core.schedules import warmup_cosine
from fewbits.core.training import train
from fewbits.kv._cache import CompressedCache, Inputs, Memory, Stage, Step, joined_valid
from fewbits.kv._files import Fingerprint, check_model, fingerprint, load_fitted, save_fitted
from fewbits.kv._forms import Exact, Form, Part
from fewbits.kv._projections import KeyValueLayer
from fewbits.kv._quantized import BITS, Grouped
from fewbits.kv._transformers import use_attention
from fewbits.primitives.low_rank import LowRank, fitted_to_outputs, input_scale, truncated

CHECKED_TOKENS = 32
"""Tokens of the calibration text on which keys and values are compared with the model's own."""
TOLERANCE = 0.03
"""Relative error up to which they count as the model's; rounding to bfloat16 makes 0.004."""
ROWS = 8
"""Texts in memory at a time where errors are measured."""
KINDS = ("keys", "values")
SIDES = [(kind, side) for kind in KINDS for side in ("down", "up")]
HYPER_PARAMETERS: dict[str, tuple[type, ...]] = {
    "density_keys": (float, int),
    "density_values": (float, int),
    "recent": (int,),
    "sliding": (bool,),
    "bits": (int, type(None)),
}

Start = Literal["asvd", "regression"]


@dataclass
class Factors:
    """The two maps of one layer, in two factors each."""

    keys: LowRank
    values: LowRank

    def to(self, like: Tensor) -> Factors:
        return Factors(self.keys.to(like), self.values.to(like))

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name: ``keys.down`` and so on."""
        return {f"{kind}.{side}": getattr(getattr(self, kind), side) for kind, side in SIDES}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Factors:
        return cls(*(LowRank(tensors[f"{kind}.down"], tensors[f"{kind}.up"]) for kind in KINDS))


@dataclass
class CSKV(Stage):
    """Features of low rank, and exact newest tokens.

    Parameters
    ----------
    density_keys, density_values : share of the channels of each head that the rank is worth; of
        the file, where there is one.
    recent : the newest tokens are exact until there are so many; then all of them become features.
    sliding : rather keep so many newest tokens exact all the time.
    bits : hold the features in 1, 2, 4 or 8 bits, those of keys in groups of `recent` tokens,
        those of values in groups of as many as a head is worth; none: as the model computes.
        Training with bits fits the features as they are held.
    fitted : the file of a fitted method (`save`).
    """

    name: ClassVar[str] = "cskv"
    encodes: ClassVar[bool] = True
    sees_inputs: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    density_keys: float = 0.5
    density_values: float = 0.5
    recent: int = 32
    sliding: bool = False
    bits: int | None = None
    fitted: str | None = None
    factors: dict[int, Factors] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Of each layer, by its number."""
    fingerprints: dict[int, Fingerprint] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    """Of each layer that factors were fitted to."""
    placed: dict[Any, Factors] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The factors where a model is, and in its dtype."""

    def __post_init__(self) -> None:
        for name in ("density_keys", "density_values"):
            density = getattr(self, name)
            if not 0 < density <= 1:
                raise FewbitsError(f"cskv: {name}={density} must be above 0 and at most 1")
        if self.recent < 0:
            raise FewbitsError(f"cskv: recent={self.recent} must be at least 0")
        if self.bits is not None and self.bits not in BITS:
            raise FewbitsError(f"cskv: bits={self.bits} must be one of 1, 2, 4, 8, or none")
        if self.bits is not None and self.recent == 0:
            raise FewbitsError("cskv: tokens share scales where there are bits; choose recent=32")
        if self.fitted:
            found = type(self).load(self.fitted)
            self.density_keys, self.density_values = found.density_keys, found.density_values
            self.factors, self.fingerprints = found.factors, found.fingerprints

    def check(self) -> None:
        if not self.factors:
            raise FewbitsError(
                "cskv must be fitted to the model first: CSKV().fit(model, tokens).save(PATH), "
                "then cskv:fitted=PATH"
            )

    @property
    def artefact_bytes(self) -> int:
        """Of the factors, which all caches of a model share."""
        return sum(t.nbytes for one in self.factors.values() for t in one.tensors().values())

    # -- fitting -----------------------------------------------------------------------------

    def fit(
        self,
        model: Any,
        tokens: Tensor,
        *,
        start: Start = "regression",
        alpha: float = 0.5,
        epochs: int = 0,
        batch_size: int = 1,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: bool = False,
    ) -> Self:
        """Find the factors of a model from calibration text; returns a copy.

        Parameters
        ----------
        model : a causal language model of transformers, whose keys are made by ``k_proj`` (or
            ``qkv_proj``), perhaps a norm, and rotary embeddings of the whole head.
        tokens : (n, t) int64, pieces of text without padding; some thousand tokens in all.
        start : ``regression``: in closed form what training looks for, the least error on this
            text; training adds nothing but where there are bits. ``asvd``, the paper's: from the
            weights, with inputs counting by the power `alpha` of their mean size (0: a plain
            singular value decomposition); then train.
        epochs : passes over the text by AdamW, all layers together; 0: the start as it is.

        Raises
        ------
        FewbitsError
            A model of another build, tokens of another shape, or densities too small for a rank.
        """
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            raise FewbitsError(
                f"cskv is fitted to token numbers (texts, tokens), not to {tuple(tokens.shape)} "
                f"of {tokens.dtype}"
            )
        if start not in ("asvd", "regression"):
            raise FewbitsError(f"cskv: start={start!r} must be 'asvd' or 'regression'")
        check_model_build(model, tokens[:1, :CHECKED_TOKENS])
        seen = statistics(model, tokens, batch_size)
        fitted = copy.copy(self)
        fitted.fitted, fitted.placed = None, {}
        fitted.factors = {n: self.started(one, start, alpha) for n, one in seen.items()}
        fitted.fingerprints = {n: fingerprint(one.layer.module) for n, one in seen.items()}
        if epochs:
            network = Trained(fitted.factors)
            train(
                network,
                lambda rows: fitted.loss(model, tokens[rows], network.factors()),
                len(tokens),
                epochs=epochs,
                batch_size=batch_size,
                optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0),
                scheduler=warmup_cosine(),
                seed=seed,
                device=model.device,
                progress=progress,
            )
            fitted.factors = network.factors(detached=True)
        return fitted

    def started(self, seen: Seen, start: Start, alpha: float) -> Factors:
        """The factors of a layer that training begins with."""
        layer, found = seen.layer, []
        for kind, weight in zip(KINDS, (layer.key_weight, layer.value_weight), strict=True):
            density = getattr(self, f"density_{kind}")
            rank = min(rank_of(density, layer.width, layer.heads), *weight.shape)
            if start == "asvd":
                scale = input_scale(seen.sizes, alpha)
                found.append(truncated(weight.detach().float(), rank, scale))
            else:
                found.append(fitted_to_outputs(weight.detach().float(), seen.outputs[kind], rank))
        return Factors(*found)

    def loss(self, model: Any, tokens: Tensor, factors: dict[int, Factors]) -> dict[str, Tensor]:
        """Mean squared errors of keys and values, summed over the layers."""
        sums: dict[str, Tensor] = {}
        inputs: list[Inputs] = []
        read_layers(model, tokens, lambda one, memory: inputs.append(one))
        for one in inputs:
            for kind, error in self.errors_of(one, factors[one.module.layer_idx]).items():
                sums[kind] = sums.get(kind, 0) + error
        return sums

    def errors_of(self, inputs: Inputs, factors: Factors) -> dict[str, Tensor]:
        """Mean squared errors of one layer. Gradients pass straight through the bits."""
        layer, states = KeyValueLayer.of(inputs), inputs.states.float()
        factors, found = factors.to(states), {}
        for kind, weight in zip(KINDS, (layer.key_weight, layer.value_weight), strict=True):
            maps = getattr(factors, kind)
            features = (states @ maps.down)[:, None]
            if self.bits is not None:
                held = self.held(features.detach(), kind, layer.heads).read()
                # Groups have their own least and greatest, so nothing is clipped, and the
                # gradient is 1 everywhere: at the least and the greatest, too.
                features = features + (held - features).detach()
            target = states @ weight.detach().float().T
            found[kind] = (features[:, 0] @ maps.up - target).square().mean()
        return found

    def errors(self, model: Any, tokens: Tensor) -> dict[int, dict[str, float]]:
        """Mean squared errors of keys (before norm and rotary embedding) and values on a text.

        Parameters
        ----------
        tokens : (n, t) int64.

        Returns
        -------
        By number of the layer, then ``keys`` and ``values``. With bits, of what is held then.
        """
        self.check()
        found = {number: dict.fromkeys(KINDS, 0.0) for number in self.factors}

        def look(inputs: Inputs, memory: Memory) -> None:
            share = len(inputs.states) / len(tokens)
            for kind, error in self.errors_of(inputs, self.factors[memory.layer]).items():
                found[memory.layer][kind] += share * float(error)

        for rows in tokens.split(ROWS):
            read_layers(model, rows, look)
        return found

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the factors and settings to a safetensors file.

        Raises
        ------
        FewbitsError
            Nothing fitted, a file that is there already, or that cannot be written.
        """
        self.check()
        tensors = {
            f"layers.{number}.{name}": tensor
            for number, one in self.factors.items()
            for name, tensor in one.tensors().items()
        }
        settings: dict[str, Any] = {name: getattr(self, name) for name in HYPER_PARAMETERS}
        settings["weights"] = {str(n): one["weights"] for n, one in self.fingerprints.items()}
        model = next(iter(self.fingerprints.values()))
        save_fitted(path, self.name, tensors, settings, model, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A fitted method from its file.

        Raises
        ------
        FewbitsError
            No such file, one of another method, or a damaged one.
        """
        tensors, settings, model = load_fitted(path, cls.name)
        damaged = FewbitsError(f"{path} is damaged: its factors and settings do not fit together")
        weights = settings.pop("weights", None)
        if not isinstance(weights, dict) or set(settings) != set(HYPER_PARAMETERS):
            raise damaged
        if any(type(settings[name]) not in kinds for name, kinds in HYPER_PARAMETERS.items()):
            raise damaged
        try:
            found = cls(**settings)
            for number, digest in weights.items():
                found.fingerprints[int(number)] = model | {"weights": str(digest)}
                names = [f"layers.{int(number)}.{kind}.{side}" for kind, side in SIDES]
                own = {name.split(".", 2)[2]: tensors.pop(name) for name in names}
                found.factors[int(number)] = Factors.of(own)
        except (TypeError, ValueError, KeyError):
            raise damaged from None
        if tensors or not found.factors or not all(map(fits, found.factors.values())):
            raise damaged
        return found

    # -- in the cache ------------------------------------------------------------------------

    @property
    def window(self) -> int:
        return self.recent if self.sliding else 0

    @property
    def block(self) -> int:
        return 1 if self.sliding and self.bits is None else max(1, self.recent)

    def companions(self, inputs: Inputs, memory: Memory) -> dict[str, Tensor]:
        if "reader" not in memory.kept:
            memory.kept["reader"] = self.reader(inputs, memory)
        note_positions(inputs, memory)
        factors = memory.kept["reader"].factors
        return {
            "keys": (inputs.states @ factors.keys.down)[:, None],
            "values": (inputs.states @ factors.values.down)[:, None],
        }

    def reader(self, inputs: Inputs, memory: Memory) -> Reader:
        """What rebuilds keys and values of a layer; refuses a layer of another model."""
        if memory.layer not in self.factors:
            raise FewbitsError("cskv was fitted to another model; fit it to this one")
        check_model(self.fingerprints[memory.layer], inputs.module)
        layer, states = KeyValueLayer.of(inputs), inputs.states
        place = memory.layer, states.dtype, states.device
        if place not in self.placed:
            self.placed[place] = self.factors[memory.layer].to(states)
        factors = self.placed[place]
        for maps in (factors.keys, factors.values):
            if maps.shape != (states.shape[2], layer.heads * layer.width):
                raise FewbitsError("cskv was fitted to another model; fit it to this one")
        return Reader(layer, factors, memory)

    def held(self, features: Tensor, kind: str, heads: int) -> Form:
        """(b, 1, s, rank) features in the form in which they stay."""
        if self.bits is None:
            return Exact(features)
        if kind == "keys":
            return Grouped.of(features, self.bits, self.recent, along=2)
        return Grouped.of(features, self.bits, -(-features.shape[3] // heads), along=3)

    def encode(self, part: Part, memory: Memory) -> Part:
        reader = memory.kept["reader"]
        keys, values = (self.held(part.companions[k], k, reader.layer.heads) for k in KINDS)
        return Part(FeatureKeys(keys, reader), FeatureValues(values, reader), part.valid)

    def aged(self, parts: list[Part]) -> list[Part]:
        """One part, so that a step rebuilds all keys of a layer at once."""
        if len(parts) == 1:
            return parts
        keys, values = ([getattr(part, kind).features for part in parts] for kind in KINDS)
        reader = parts[0].keys.reader  # type: ignore[attr-defined]
        forms = FeatureKeys(joined(keys), reader), FeatureValues(joined(values), reader)
        return [Part(*forms, joined_valid(parts))]


def fits(factors: Factors) -> bool:
    """Whether the factors from a file are matrices that can be multiplied."""
    return all(
        maps.down.ndim == maps.up.ndim == 2
        and maps.down.shape[1] == maps.up.shape[0] > 0
        and maps.down.is_floating_point()
        and maps.up.is_floating_point()
        for maps in (factors.keys, factors.values)
    )


def rank_of(density: float, width: int, heads: int) -> int:
    """⌊density·width⌋·heads: whole channels of a head, though the rank is shared by all heads."""
    channels = int(density * width + 1e-9)
    if channels < 1:
        raise FewbitsError(
            f"cskv: density {density} of {width} channels is less than one; choose at least "
            f"{1 / width:.3g}"
        )
    return channels * heads


# -- what a layer holds --------------------------------------------------------------------


@dataclass
class Reader:
    """Makes keys and values of the features of one layer. It holds nothing of its own."""

    layer: KeyValueLayer
    factors: Factors
    memory: Memory

    def keys(self, features: Tensor) -> Tensor:
        """(b, h, s, d) from (b, 1, s, rank) of the first s tokens. O(b·s·rank·h·d)."""
        positions = self.memory.kept.get("positions")
        if positions is None:
            positions = torch.arange(features.shape[2], device=features.device)[None]
        places = positions[:, : features.shape[2]]
        return self.layer.keys(features[:, 0] @ self.factors.keys.up, places)

    def values(self, features: Tensor) -> Tensor:
        return self.layer.values(features[:, 0] @ self.factors.values.up)

    def mixed(self, features: Tensor, weights: Tensor) -> Tensor:
        """(b, h, r, d) sums of values: features are mixed first, O(b·h·r·rank·(s + d))."""
        mass = weights.sum(dim=3, keepdim=True)
        return self.layer.mixed_values(weights @ features, self.factors.values.up, mass)


@dataclass
class FeatureKeys(Form):
    """Keys as (b, 1, s, rank) features of the layer's input."""

    features: Form
    reader: Reader

    @property
    def tokens(self) -> int:
        return self.features.tokens

    def read(self) -> Tensor:
        return self.reader.keys(self.features.read())

    def inner(self, change: Callable[[Tensor], Form]) -> Form:
        return dataclasses.replace(self, features=self.features.inner(change))


@dataclass
class FeatureValues(FeatureKeys):
    """Values as (b, 1, s, rank) features of the layer's input."""

    def read(self) -> Tensor:
        return self.reader.values(self.features.read())

    def mix(self, weights: Tensor) -> Tensor:
        return self.reader.mixed(self.features.read(), weights)


def joined(forms: list[Any]) -> Form:
    """Features, one after the other."""
    if isinstance(forms[0], Grouped):
        return Grouped.cat(forms)
    return Exact(torch.cat([form.read() for form in forms], dim=2))


def note_positions(inputs: Inputs, memory: Memory) -> None:
    """Remember the positions of all tokens, (b, s) int32, where they are not 0, 1, 2, …"""
    given, batch = inputs.positions, inputs.states.shape[0]
    count, held = inputs.states.shape[1], memory.kept.get("positions")
    plain = torch.arange(inputs.first + count, device=inputs.states.device)[None]
    if given is None or (held is None and bool((given == plain[:, inputs.first :]).all())):
        return
    if held is None:
        held = plain[:, : inputs.first].expand(batch, -1)
    memory.kept["positions"] = torch.cat([held, given.expand(batch, -1)], dim=1).int()


# -- reading calibration text --------------------------------------------------------------


@dataclass
class Watch(Stage):
    """Keeps everything, and shows what comes into each layer."""

    name: ClassVar[str] = "watch"
    sees_inputs: ClassVar[bool] = True

    look: Callable[[Inputs, Memory], None]

    def companions(self, inputs: Inputs, memory: Memory) -> dict[str, Tensor]:
        self.look(inputs, memory)
        return {}


@dataclass
class Compare(Stage):
    """Compares the keys and values that the model has with those that its parts give."""

    name: ClassVar[str] = "compare"
    sees_inputs: ClassVar[bool] = True

    def companions(self, inputs: Inputs, memory: Memory) -> dict[str, Tensor]:
        memory.notes["inputs"] = inputs
        return {}

    def observe(self, step: Step, memory: Memory) -> None:
        inputs = memory.notes["inputs"]
        layer, states = KeyValueLayer.of(inputs), inputs.states
        positions = inputs.positions
        keys = layer.keys(states @ layer.key_weight.T, positions)
        values = layer.values(states @ layer.value_weight.T)
        for mine, theirs in ((keys, step.keys), (values, step.values)):
            if mine.shape != theirs.shape or far(mine.float(), theirs.float()):
                raise FewbitsError(
                    f"layer {memory.layer}: {type(layer.module).__name__} makes its keys or values "
                    "in a way that cskv does not know; use another method"
                )


def far(mine: Tensor, theirs: Tensor) -> bool:
    return not float((mine - theirs).norm()) <= TOLERANCE * float(theirs.norm())


@torch.no_grad()
def read_with(model: Any, tokens: Tensor, stage: Stage) -> None:
    """Have a model read (b, t) tokens with a stage in every layer of full attention."""
    use_attention(model)
    cache = CompressedCache(model.config, [stage])
    model(tokens.to(model.device), past_key_values=cache, logits_to_keep=1)


def read_layers(model: Any, tokens: Tensor, look: Callable[[Inputs, Memory], None]) -> None:
    read_with(model, tokens, Watch(look))


def check_model_build(model: Any, tokens: Tensor) -> None:
    """Refuse a model whose keys and values its projections, norm and rotary do not give."""
    read_with(model, tokens, Compare())


@dataclass
class Seen:
    """Statistics of a layer.

    Attributes
    ----------
    sizes : (hidden size,) float64, the sum of absolute inputs.
    outputs : by kind, (h·d, h·d) float64, the sum of y yᵀ over its keys or values y without bias.
    """

    layer: KeyValueLayer
    sizes: Tensor
    outputs: dict[str, Tensor]


def statistics(model: Any, tokens: Tensor, batch_size: int) -> dict[int, Seen]:
    """What starts need to know of each layer, by its number."""
    found: dict[int, Seen] = {}

    def look(inputs: Inputs, memory: Memory) -> None:
        layer, states = KeyValueLayer.of(inputs), inputs.states.flatten(0, 1)
        sizes = states.abs().double().sum(dim=0)
        outputs = {}
        for kind, weight in zip(KINDS, (layer.key_weight, layer.value_weight), strict=True):
            made = (states @ weight.T).double()
            outputs[kind] = made.T @ made
        if memory.layer in found:
            earlier = found[memory.layer]
            sizes += earlier.sizes
            outputs = {kind: one + earlier.outputs[kind] for kind, one in outputs.items()}
        found[memory.layer] = Seen(layer, sizes, outputs)

    for rows in tokens.split(batch_size):
        read_layers(model, rows, look)
    return found


class Trained(nn.Module):
    """The factors of all layers as parameters."""

    def __init__(self, factors: dict[int, Factors]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number, one in factors.items():
            named = {name.replace(".", "_"): t.clone() for name, t in one.tensors().items()}
            self.layers[str(number)] = nn.ParameterDict(named)

    def factors(self, *, detached: bool = False) -> dict[int, Factors]:
        found = {}
        for number, held in self.layers.items():
            tensors = {f"{kind}.{side}": held[f"{kind}_{side}"] for kind, side in SIDES}  # type: ignore[index]
            if detached:
                tensors = {name: tensor.detach() for name, tensor in tensors.items()}
            found[int(number)] = Factors.of(tensors)
        return found
