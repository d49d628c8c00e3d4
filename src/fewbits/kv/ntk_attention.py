"""NTK-Attention: a prefix of any length as a state of fixed size.

Liang, Shi, Song, Yang 2024, *Toward Infinite-Long Prefix in Transformer* (arXiv 2406.14036).

Attention of a query q over m prefix keys κ and values ν adds Σ e^{q·κ/√d} ν to the numerator of the
softmax, and Σ e^{q·κ/√d} to its denominator. With features Φ(q)·Φ(κ) ≈ e^{q·κ/√d} these are Φ(q)ᵀZ
and Φ(q)ᵀk, where Z = Σ Φ(κ)νᵀ and k = Σ Φ(κ): for the paper's Φ(x) = elu(x·d^-1/4) + 1 they are
d² + d numbers per head, however long the prefix. There are two uses:

- `NTKAdapter` trains Z and k beside a frozen model, in place of a prefix;
- `NTKAttention` turns a given prompt into Z and k, which a cache then stands on.

Why a longer trained prefix is better is what the paper shows with the neural tangent kernel;
`train_prefix` measures it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError
from fewbits.kv._cache import Memory, Stage
from fewbits.kv._files import (
    Fingerprint,
    check_model,
    fingerprint,
    load_fitted,
    save_fitted,
)
from fewbits.kv._ntk_adapter import NTKAdapter, TrainedPrefix
from fewbits.kv._ntk_encoding import SOLVERS, errors, watch_prompt
from fewbits.kv._ntk_state import PrefixState, feature_map
from fewbits.kv._ntk_theory import PrefixTraining, train_prefix
from fewbits.primitives.partial_attention import Partial

__all__ = [
    "EncodedPrompt",
    "NTKAdapter",
    "NTKAttention",
    "PrefixTraining",
    "TrainedPrefix",
    "train_prefix",
]

LARGE_ERROR = 0.1
"""Relative error of a head's attention from which a warning is given."""


@dataclass(frozen=True)
class EncodedPrompt:
    """What stands for a prompt.

    Attributes
    ----------
    states : of each layer, per key head.
    scaling : of the scores of each layer.
    tokens : of the prompt.
    errors : (layers, key heads) relative error of attention over prompt and text together, on
        queries that were not fitted to.
    model : what tells the model apart.
    """

    states: tuple[PrefixState, ...]
    scaling: tuple[float, ...]
    tokens: int
    errors: Tensor
    model: Fingerprint


@dataclass
class NTKAttention(Stage):
    """A prompt that is held as h·(r·d + r) numbers per layer, and no token of it.

    Little is lost where the logits of the prompt are small; the error grows fast with them. Look
    at `prompt.errors` before use.

    Parameters
    ----------
    features : ``elu`` as in the paper's experiments, r = d; ``taylor-2`` as in its theory: nearer,
        and r = (d + 1)(d + 2)/2; ``random-R``: R features.
    solver : ``least-squares``: the least error over the queries of some texts. ``mass``: the
        closed form times a number per head, so that the mean mass of the softmax is true; a few
        queries of huge mass decide it. ``closed-form``: the paper's alone.
    fitted : the file of a fitted method (`save`).

    Examples
    --------
    >>> method = NTKAttention().fit(model, prompt, texts)
    >>> method.save("prompt.safetensors")
    >>> cache = fewbits.kv.cache(model, "ntk-attention:fitted=prompt.safetensors")
    """

    name: ClassVar[str] = "ntk-attention"

    features: str = "elu"
    solver: Literal["least-squares", "mass", "closed-form"] = "least-squares"
    fitted: str = ""
    prompt: EncodedPrompt | None = field(init=False, repr=False, default=None)
    """From `fit` or a file."""

    def __post_init__(self) -> None:
        feature_map(self.features)
        if self.solver not in SOLVERS:
            raise FewbitsError(
                f"ntk-attention: solver={self.solver!r} must be one of {', '.join(SOLVERS)}"
            )
        if self.fitted:
            found = type(self).load(self.fitted)
            self.features, self.solver, self.prompt = found.features, found.solver, found.prompt

    def check(self) -> None:
        if self.prompt is None:
            raise FewbitsError(
                "ntk-attention must be fitted to a prompt first: NTKAttention().fit(model, "
                "prompt, texts).save(PATH), then ntk-attention:fitted=PATH"
            )

    def check_model(self, model: Any) -> None:
        """Refuse a model that the prompt was not encoded for.

        Raises
        ------
        FewbitsError
            It is another one.
        """
        check_model(self.encoded.model, model)

    @property
    def encoded(self) -> EncodedPrompt:
        """The prompt, after checking that there is one."""
        self.check()
        assert self.prompt is not None
        return self.prompt

    @property
    def artefact_bytes(self) -> int:
        """Bytes of the states of all layers, which all sequences share."""
        return sum(state.nbytes for state in self.encoded.states)

    def features_of(self, dims: int) -> int:
        """How many features a key of so many numbers has."""
        return feature_map(self.features).width(dims)

    # -- learning ----------------------------------------------------------------------------

    def fit(self, model: Any, prompt: Tensor, texts: Tensor, batch: int = 8) -> Self:
        """Encode a prompt for a model; returns a copy.

        The state holds for queries as far behind the prompt as those of the texts: rotary
        positions make attention depend on the distance. A cache of it begins at position 0, right
        behind the prompt.

        Parameters
        ----------
        model : a causal language model of transformers with full attention in all layers.
        prompt : (m,) or (1, m) int64.
        texts : (n, t) int64, of the kind that will follow the prompt; its queries are fitted to,
            and measured with.
        batch : texts at a time.

        Warns
        -----
        UserWarning
            The error of a head is above a tenth.

        Raises
        ------
        FewbitsError
            Tokens of a wrong shape, or a model with sliding windows.
        """
        mapped, row = feature_map(self.features), token_row(prompt)
        if texts.ndim != 2 or texts.numel() == 0 or texts.is_floating_point():
            raise FewbitsError(
                f"texts must be (n, t) token numbers, at least one, not {tuple(texts.shape)}"
            )
        found = watch_prompt(model, row, texts, batch)
        states = tuple(SOLVERS[self.solver](one.fitted(), mapped) for one in found)
        pairs = zip(found, states, strict=True)
        wrong = torch.stack([errors(one.measured(), state, mapped) for one, state in pairs]).cpu()
        warn_of(wrong)
        fitted = replace(self, fitted="")
        scaling = tuple(one.scaling for one in found)
        fitted.prompt = EncodedPrompt(states, scaling, len(row), wrong, fingerprint(model))
        return fitted

    # -- attention ---------------------------------------------------------------------------

    def beside(self, rows: Tensor, memory: Memory) -> Partial:
        """Attention of (b, h, r, d) queries, folded and scaled, over the prompt."""
        state, scaling = self.encoded.states[memory.layer], self.encoded.scaling[memory.layer]
        on_device = PrefixState(state.z.to(rows.device), state.k.to(rows.device))
        return on_device.seen_by(rows, scaling, feature_map(self.features))

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the encoded prompt to a safetensors file.

        Raises
        ------
        FewbitsError
            The file is there already (and not ``overwrite``), or cannot be written.
        """
        encoded = self.encoded
        tensors = {
            "z": torch.stack([state.z for state in encoded.states]),
            "k": torch.stack([state.k for state in encoded.states]),
            "errors": encoded.errors,
        }
        settings = {
            "features": self.features,
            "solver": self.solver,
            "tokens": encoded.tokens,
            "scaling": list(encoded.scaling),
        }
        save_fitted(path, self.name, tensors, settings, encoded.model, overwrite)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Self:
        """An encoded prompt from a file.

        Parameters
        ----------
        model : checked to be the one that the prompt was encoded for, if given.

        Raises
        ------
        FewbitsError
            No such file, one of another kind, a damaged one, or one for another model.
        """
        tensors, settings, found = load_fitted(path, cls.name)
        damaged = FewbitsError(f"{path} is damaged: its parts do not fit together")
        features, solver = settings.get("features"), settings.get("solver")
        prompt = prompt_of(tensors, settings, found)
        if prompt is None or not isinstance(features, str) or solver not in SOLVERS:
            raise damaged
        if model is not None:
            check_model(prompt.model, model)
        loaded = cls(features, solver)
        width, (count, dims) = found.get("width of a head"), prompt.states[0].z.shape[1:]
        heads = found.get("layers"), found.get("key heads")
        if dims != width or heads != prompt.errors.shape or count != loaded.features_of(dims):
            raise damaged
        loaded.prompt = prompt
        return loaded


def token_row(prompt: Tensor) -> Tensor:
    """(m,) token numbers of a prompt."""
    row = prompt[0] if prompt.ndim == 2 and len(prompt) == 1 else prompt
    if row.ndim != 1 or len(row) == 0 or row.is_floating_point():
        raise FewbitsError(
            f"the prompt must be (m,) or (1, m) token numbers, at least one, not "
            f"{tuple(prompt.shape)}"
        )
    return row


def warn_of(wrong: Tensor) -> None:
    """Warn where the error of heads is large."""
    large = (wrong > LARGE_ERROR).nonzero()
    if len(large):
        layer, head = divmod(int(wrong.argmax()), wrong.shape[1])
        warnings.warn(
            f"ntk-attention: {len(large)} of {wrong.numel()} heads miss the attention that they "
            f"stand for by more than {LARGE_ERROR:.0%} (layer {layer}, head {head}: "
            f"{float(wrong.max()):.0%}); the logits of this prompt are large for the "
            "features, so look at what it costs, or keep its tokens",
            stacklevel=3,
        )


def prompt_of(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], model: Fingerprint
) -> EncodedPrompt | None:
    """The encoded prompt that a file holds; None where its parts do not fit together."""
    z, k, wrong = (tensors.get(name) for name in ("z", "k", "errors"))
    tokens, scaling = settings.get("tokens"), settings.get("scaling")
    if z is None or k is None or wrong is None or not isinstance(tokens, int):
        return None
    fits = z.ndim == 4 and k.shape == z.shape[:3] and wrong.shape == z.shape[:2]
    if (
        not fits
        or len(z) == 0
        or not z.dtype == k.dtype == torch.float32
        or not isinstance(scaling, list)
    ):
        return None
    if len(scaling) != len(z) or not all(isinstance(one, float) and one > 0 for one in scaling):
        return None
    # clone: each layer holds only its own bytes.
    states = tuple(PrefixState(z[i].clone(), k[i].clone()) for i in range(len(z)))
    return EncodedPrompt(states, tuple(scaling), tokens, wrong, model)
