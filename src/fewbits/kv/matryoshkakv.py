"""MatryoshkaKV: hold the first coordinates of keys and values in a trained orthogonal basis.

Lin, Zeng, Xiao, Kou, Hou, Gao, Zhang, Deng 2024, *MatryoshkaKV: Adaptive KV Compression via
Trainable Orthogonal Projection* (arXiv 2410.14731, ICLR 2025).

Of each head, k̃ = (k − μ_K) U_K[:, :r] and ṽ = (v − μ_V) U_V[:, :r] are held. A query is turned
once, q U_K[:, :r], and compared with coordinates; the weighted sum of coordinates comes back
through U_V. The principal directions of keys and values are where U starts (`PCA`). They keep most
of the cache, which is not what the model needs most: so U is trained, by a Cayley map that keeps it
orthogonal, to let the model predict what it did. The rank r of every head is drawn anew at every
step, which sorts the columns by how much they matter: one file serves every budget. A greedy search
spends a budget unevenly over layers, heads, keys and values.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.core.checks import check_seed
from fewbits.core.errors import FewbitsError
from fewbits.core.progress import progress
from fewbits.kv._basis_fitting import (
    Plan,
    RankCost,
    calibrate,
    frozen,
    rank_step,
    tune,
)
from fewbits.kv._cache import Memory, Stage
from fewbits.kv._files import Fingerprint, check_model, fingerprint, load_fitted, save_fitted
from fewbits.kv._forms import Exact, Form, Part
from fewbits.kv._projected import Bases, Projected, Projection, merged
from fewbits.kv.baselines import share
from fewbits.primitives.greedy_budget import Descent, greedy_descent

KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class Fitted:
    """What was learned from a model.

    Attributes
    ----------
    model : which one it was.
    bases : of every head.
    descent : how a search lowered the (l·2·h,) ranks, if there was one.
    """

    model: Fingerprint
    bases: Bases
    descent: Descent | None = None


@dataclass
class PCA(Stage):
    """Keys and values in the basis of their principal directions, cut to a rank.

    Parameters
    ----------
    keep : share of the numbers to keep, above 0 and at most 1.
    searched : ranks from `search`, each head its own; else one rank for all.
    exact_prefill : attention sees the tokens of a call as the model made them, and they lose
        coordinates behind it. Without, all attention sees what will be held, as in training.
    fitted : a file that `save` wrote, to be used without fitting.
    """

    name: ClassVar[str] = "pca"
    encodes: ClassVar[bool] = True
    followers: ClassVar[tuple[str, ...] | None] = ("kivi",)

    keep: float = 0.5
    searched: bool = False
    exact_prefill: bool = False
    fitted: str | None = None
    state: Fitted | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        share(self.name, self.keep)
        self._projections: dict[tuple[int, int], Projection] = {}
        if self.fitted is not None:
            self.state = self._read(self.fitted)
            self.check()

    # -- learning ----------------------------------------------------------------------------

    def fit(
        self,
        model: Any,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        first_token: bool = True,
        batch: int = 8,
    ) -> Self:
        """Find the principal directions of every head; returns a copy.

        Parameters
        ----------
        model : a causal language model of transformers; it is not changed.
        tokens : (n, t) int64, texts for calibration.
        mask : (n, t), 0 for padding.
        first_token : whether the first token of each text counts; models that park attention on it
            give it keys unlike all others.
        batch : texts at a time.

        Raises
        ------
        FewbitsError
            Tokens of another shape, too few of them, or a model whose keys are not finite.
        """
        bases = calibrate(model, tokens, mask, first_token, batch)
        return self.with_state(Fitted(fingerprint(model), bases))

    def search(
        self,
        model: Any,
        prompts: Tensor,
        *,
        mask: Tensor | None = None,
        batch_decrements: int = 1,
        batch: int = 8,
    ) -> Self:
        """Find ranks for each head that spend ``keep`` best (Algorithm 1); returns a copy.

        From full ranks, that of one head's keys or values falls by d/8 at a time: the one whose
        fall lets the predictions on the prompts diverge least from those of the whole cache. The
        ranks for all larger budgets lie on the way.

        Parameters
        ----------
        prompts : (n, t) int64; the divergence is the mean over all. 4·n·t·v bytes are held.
        mask : (n, t), 0 for padding.
        batch_decrements : so many fall in each round, after one look at each; more is faster.
        batch : prompts at a time.

        Raises
        ------
        FewbitsError
            Not fitted, or fitted to another model; prompts of another shape.

        Notes
        -----
        2·l·h forward passes over the prompts for each round.
        """
        bases = self.learned.bases
        if batch_decrements < 1:
            raise FewbitsError(f"{self.name}: batch_decrements must be at least 1")
        self.check_model(model)
        step, entries = rank_step(bases.width), bases.mean[..., 0].numel()
        start = np.full(entries, bases.width)
        falls = math.ceil((1 - self.keep) * start.sum() / step)
        total = math.ceil(falls / batch_decrements) * entries
        with frozen(model), progress("searching ranks", total) as bar:
            cost = RankCost(model, bases, prompts, mask, batch)
            descent = greedy_descent(
                start,
                cost,
                self.keep * start.sum(),
                step=step,
                least=step,
                batch=batch_decrements,
                told=bar.step,
            )
        return replace(self, searched=True, fitted=None).with_state(
            replace(self.learned, descent=descent)
        )

    def with_state(self, state: Fitted) -> Self:
        """A copy that has learned something else."""
        made = replace(self, fitted=None)
        made.state = state
        return made

    def with_keep(self, keep: float, *, searched: bool | None = None) -> Self:
        """A copy at another budget, from the same bases."""
        wanted = self.searched if searched is None else searched
        made = replace(self, keep=keep, searched=wanted, fitted=None)
        made.state = self.state
        return made

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what was learned: the bases, and the way down that a search took.

        Raises
        ------
        FewbitsError
            Not fitted, or the file exists (and not ``overwrite``) or cannot be written.
        """
        state = self.learned
        settings: dict[str, Any] = {"layers": list(state.bases.layers)}
        if state.descent is not None:
            settings |= {"step": state.descent.step, "order": list(state.descent.order)}
        save_fitted(path, self.name, state.bases.named(), settings, state.model, overwrite)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """What `save` wrote, with options such as ``keep``.

        Raises
        ------
        FewbitsError
            No such file, one of another kind, or a damaged one.
        """
        return cls(fitted=str(path), **options)

    def _read(self, path: str) -> Fitted:
        tensors, settings, model = load_fitted(path, self.name)
        layers: Any = settings.get("layers")
        if not layers or not is_numbers(layers) or layers != sorted(set(layers)):
            raise FewbitsError(f"{path} is damaged: it does not say which layers it is for")
        try:
            bases = Bases.of_named(tensors, layers)
        except FewbitsError as error:
            raise FewbitsError(f"{path} is damaged: {error}") from None
        return Fitted(model, bases, descent_of(settings, bases, path))

    # -- using -------------------------------------------------------------------------------

    @property
    def learned(self) -> Fitted:
        """What was learned.

        Raises
        ------
        FewbitsError
            Nothing was.
        """
        if self.state is None:
            raise FewbitsError(
                f"{self.name} must be fitted to the model: {type(self).__name__}().fit(model, "
                f"tokens).save(FILE), then {self.name}:fitted=FILE"
            )
        return self.state

    @property
    def artefact_bytes(self) -> int:
        """Bytes of the bases, which all caches share."""
        return self.learned.bases.nbytes

    @property
    def ranks(self) -> np.ndarray:
        """(l, 2, h) int64: coordinates that the keys and the values of each head keep.

        Raises
        ------
        FewbitsError
            Not fitted, or ``searched`` where no search went so far down.
        """
        state = self.learned
        shape, width = tuple(state.bases.mean.shape[:3]), state.bases.width
        if not self.searched:
            return np.full(shape, max(1, math.floor(self.keep * width + 1e-9)))
        found = None
        if state.descent is not None:
            found = state.descent.within(self.keep * state.descent.start.sum())
        if found is None:
            raise FewbitsError(
                f"{self.name}: no search went down to keep={self.keep}; search(model, prompts) at "
                "this keep first, or take searched=no"
            )
        return found.reshape(shape)

    def check(self) -> None:
        self.ranks  # noqa: B018 - raises

    def check_model(self, model: Any) -> None:
        """Refuse a model that this was not fitted to.

        Raises
        ------
        FewbitsError
            It is another one.
        """
        check_model(self.learned.model, model)

    def shown(self, keys: Tensor, values: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        found = self._projection(KEYS, keys, memory), self._projection(VALUES, values, memory)
        if self.exact_prefill:
            return keys, values
        return found[KEYS].projected(keys), found[VALUES].projected(values)

    @property
    def block(self) -> int:
        return 1

    def encode(self, part: Part, memory: Memory) -> Part:
        if not isinstance(part.keys, Exact) or not isinstance(part.values, Exact):
            raise FewbitsError(f"{self.name} projects whole keys and values; put it first")
        return super().encode(part, memory)

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        return Projected.of(keys, self._projection(KEYS, keys, memory))

    def encode_values(self, values: Tensor, memory: Memory) -> Form:
        return Projected.of(values, self._projection(VALUES, values, memory))

    def aged(self, parts: list[Part]) -> list[Part]:
        return merged(parts)

    def _projection(self, kind: int, states: Tensor, memory: Memory) -> Projection:
        """That of the keys or the values of a layer, where the states are."""
        place, bases = (memory.layer, kind), self.learned.bases
        shape = states.shape[1], states.shape[3]
        if memory.layer not in bases.layers or shape != (bases.heads, bases.width):
            raise FewbitsError(
                f"{self.name} was fitted to another model: layers {bases.layers} of "
                f"{bases.heads} key heads of width {bases.width}; fit it to this one"
            )
        if place not in self._projections:
            row = bases.layers.index(memory.layer)
            self._projections[place] = Projection(
                bases.basis[row, kind], bases.mean[row, kind], self.ranks[row, kind]
            )
        return self._projections[place].on(states.device)


def is_numbers(found: Any) -> bool:
    """Whether something from a file is a list of whole numbers that are not negative."""
    return isinstance(found, list) and all(type(one) is int and one >= 0 for one in found)


def descent_of(settings: dict[str, Any], bases: Bases, path: str) -> Descent | None:
    """The way down that a file tells of, checked; None where there was no search."""
    if "order" not in settings:
        return None
    order, step = settings["order"], settings.get("step")
    start = np.full(bases.mean[..., 0].numel(), bases.width)
    if is_numbers(order) and type(step) is int and step >= 1 and max(order, default=0) < len(start):
        descent = Descent(start, step, tuple(order))
        if descent.levels().min() >= 1:
            return descent
    raise FewbitsError(f"{path} is damaged: the ranks that a search found make no sense")


@dataclass
class MatryoshkaKV(PCA):
    """Keys and values in a basis that is trained for every rank at once.

    The parameters are those of `PCA`.
    """

    name: ClassVar[str] = "matryoshkakv"

    def fit(
        self,
        model: Any,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        first_token: bool = True,
        batch: int = 8,
        steps: int = 1000,
        learning_rate: float = 1e-3,
        divergence_weight: float = 0.25,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Self:
        """Train the bases from the principal directions on; returns a copy.

        AdamW with 100 steps of warm-up, then half a cosine; gradients no longer than 1. A progress
        bar shows where standard error is a terminal.

        Parameters
        ----------
        model, tokens, mask, first_token : as for `PCA.fit`; the weights of the model stay.
        batch : texts in each step.
        steps : of training.
        divergence_weight : λ of the loss λ·KL(whole cache ‖ this one) + (1 − λ)·cross-entropy.
        seed : of the order of texts and of the ranks that are drawn.
        checkpoint : a file to go on from after an interruption.

        Raises
        ------
        FewbitsError
            As for `PCA.fit`; numbers out of range; a loss that is not finite.
        """
        plan = Plan(
            steps, batch, learning_rate, divergence_weight, check_seed(seed), checkpoint=checkpoint
        )
        made_for = fingerprint(model)
        start = calibrate(model, tokens, mask, first_token, batch)
        bases, _ = tune(model, start, tokens, mask, plan, made_for)
        return self.with_state(Fitted(made_for, bases))


# -- folding -------------------------------------------------------------------------------

CHECKED_TOKENS = 16
FOLDING_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of logits, over their spread; half floats get 0.1."""


def fold_values(model: Any, method: PCA) -> tuple[Any, PCA]:
    """Put the bases of the values into the model's weights, so that they cost nothing at run time.

    W_V becomes U_Vᵀ W_V and W_O becomes W_O U_V of each head, and the means go into biases. Keys
    cannot be folded: the rotary embedding lies between.

    Returns
    -------
    A copy of the model that computes the same, whose values are coordinates already; and the method
    for it, which cuts values off and leaves them otherwise.

    Raises
    ------
    FewbitsError
        Another model than `method` was fitted to, or one whose layers are not made so that the
        folded copy computes the same.
    """
    method.check_model(model)
    state = method.learned
    bases = state.bases
    folded = copy.deepcopy(model)
    attentions = {
        module.layer_idx: module
        for module in folded.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "v_proj") and hasattr(module, "o_proj")
    }
    for row, layer in enumerate(bases.layers):
        if layer not in attentions:
            raise FewbitsError("folding needs layers with v_proj and o_proj of their own")
        basis, mean = bases.basis[row, VALUES], bases.mean[row, VALUES]
        fold_layer(attentions[layer].v_proj, attentions[layer].o_proj, basis, mean)
    check_folded(model, folded)
    plain, centre = bases.basis.clone(), bases.mean.clone()
    plain[:, VALUES] = torch.eye(bases.width)
    centre[:, VALUES] = 0
    rest = Bases(bases.layers, plain, centre)
    return folded, method.with_state(Fitted(fingerprint(folded), rest, state.descent))


@torch.no_grad()
def fold_layer(value: nn.Linear, output: nn.Linear, basis: Tensor, mean: Tensor) -> None:
    """Turn the values of one layer, in place."""
    heads, width = mean.shape
    dtype, device = value.weight.dtype, value.weight.device
    basis, mean = basis.to(device), mean.to(device)
    bias = torch.zeros(heads, width, device=device) if value.bias is None else value.bias.float()
    turned_bias = torch.einsum("hd,hdr->hr", bias.view(heads, width) - mean, basis)
    weights = value.weight.float().unflatten(0, (heads, width))
    value.weight.copy_(torch.einsum("hdi,hdr->hri", weights, basis).flatten(0, 1))
    value.bias = nn.Parameter(turned_bias.flatten().to(dtype), requires_grad=False)
    groups = output.weight.shape[1] // (heads * width)
    columns = output.weight.float().unflatten(1, (heads, groups, width))
    offset = torch.einsum("ohgd,hd->o", columns, mean)
    output.weight.copy_(torch.einsum("ohgd,hdr->ohgr", columns, basis).flatten(1))
    whole = offset if output.bias is None else output.bias.float() + offset
    output.bias = nn.Parameter(whole.to(dtype), requires_grad=False)


@torch.no_grad()
def check_folded(model: Any, folded: Any) -> None:
    """Refuse a copy that does not compute what the model does."""
    # Not padding: where the embedding is zero, the norm behind it makes rounding errors large.
    known = model.get_input_embeddings().weight.any(dim=1).nonzero()[:, 0]
    ids = known[None, :: max(1, len(known) // CHECKED_TOKENS)]
    expected, found = (one(ids, use_cache=False).logits.float() for one in (model, folded))
    allowed = FOLDING_ERROR.get(model.dtype, 0.1)
    if not bool((expected - found).abs().max() <= allowed * expected.std()):
        raise FewbitsError(
            "the values of this model are changed behind v_proj, so that they cannot be folded"
        )
