"""How the bases of `matryoshkakv` are found: calibration, training, and the costs of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.core.errors import FewbitsError
from fewbits.core.schedules import warmup_cosine
from fewbits.core.training import History, train
from fewbits.kv._cache import CompressedCache, Memory, Stage, Step
from fewbits.kv._files import Fingerprint
from fewbits.kv._projected import Bases
from fewbits.kv._transformers import use_attention
from fewbits.primitives.orthogonal import turned
from fewbits.primitives.pca import Moments, principal_components

LEVELS = 8
"""Ranks are drawn from d/8, 2d/8, …, d, and lowered by d/8 in the search."""
WARM_UP_STEPS = 100
GRADIENT_CLIP = 1.0


def rank_step(width: int) -> int:
    """By how much ranks differ."""
    return max(1, width // LEVELS)


def check_tokens(tokens: Tensor, mask: Tensor | None, what: str) -> None:
    """Refuse what is no batch of texts."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise FewbitsError(
            f"{what} must be whole numbers (texts, tokens) with at least 2 tokens each, not "
            f"{tokens.dtype} {tuple(tokens.shape)}"
        )
    if mask is not None and (mask.shape != tokens.shape or not bool((mask != 0).any(dim=1).all())):
        raise FewbitsError(
            f"the mask must be of the shape of {what}, {tuple(tokens.shape)}, and mark a token in "
            "each text"
        )


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """A model whose weights take no gradient inside the block, and are as before behind it."""
    use_attention(model)
    flags = [(weights, weights.requires_grad) for weights in model.parameters()]
    was_training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for weights, flag in flags:
            weights.requires_grad_(flag)
        model.train(was_training)


# -- calibration ---------------------------------------------------------------------------


@dataclass
class Calibration(Stage):
    """Keeps everything, and takes in the moments of keys and values of every head."""

    name: ClassVar[str] = "calibration"

    used: Tensor
    """(b, t) bool, of the texts that are being read: which tokens count."""
    moments: dict[int, list[list[Moments]]] = field(default_factory=dict)
    """By layer: of keys and of values, of each head."""

    def observe(self, step: Step, memory: Memory) -> None:
        heads, width = step.keys.shape[1], step.keys.shape[3]
        if step.values.shape[1:] != step.keys.shape[1:]:
            raise FewbitsError("this model's keys and values are of different shapes")
        own = self.moments.setdefault(
            memory.layer, [[Moments(width) for _ in range(heads)] for _ in range(2)]
        )
        for kind, states in zip(own, (step.keys, step.values), strict=True):
            counted = states.transpose(1, 2)[self.used.to(states.device)].float().cpu().numpy()
            if not np.isfinite(counted).all():
                raise FewbitsError("the model's keys or values are NaN or infinite on these tokens")
            for head, moments in enumerate(kind):
                if len(counted):
                    moments.add(counted[:, head])


@torch.no_grad()
def calibrate(
    model: Any, tokens: Tensor, mask: Tensor | None, first_token: bool, batch: int
) -> Bases:
    """Means and principal directions of the keys and values of each head.

    O(n·t·d²) per head beside the model's own forward pass; memory O(d²) per head.
    """
    check_tokens(tokens, mask, "tokens")
    used = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    if not first_token:
        first = used.int().argmax(dim=1, keepdim=True)
        used = used.scatter(1, first, False)
    stage = Calibration(used)
    with frozen(model):
        for rows in torch.arange(len(tokens)).split(batch):
            stage.used = used[rows]
            given = None if mask is None else mask[rows].to(model.device)
            cache = CompressedCache(model.config, [stage])
            ids = tokens[rows].to(model.device)
            model(ids, attention_mask=given, past_key_values=cache, logits_to_keep=1)
    layers = sorted(stage.moments)
    flat = [one for layer in layers for kind in stage.moments[layer] for one in kind]
    if flat[0].count < 2:
        raise FewbitsError("calibration needs at least 2 tokens that are no padding; give more")
    found = [principal_components(one) for one in flat]
    shape = (len(layers), 2, len(stage.moments[layers[0]][0]))
    basis = torch.tensor(np.stack([one.components.T for one in found]), dtype=torch.float32)
    mean = torch.tensor(np.stack([one.mean for one in found]), dtype=torch.float32)
    return Bases(tuple(layers), basis.unflatten(0, shape), mean.unflatten(0, shape))


# -- a model that sees projected keys and values -------------------------------------------


@dataclass
class Simulated(Stage):
    """What attention sees where coordinates beyond the ranks are lost; everything is held.

    For training and for the search of ranks: attention at full width, with gradients.
    """

    name: ClassVar[str] = "simulated"

    layers: tuple[int, ...]
    projector: Tensor
    """(l, 2, h, d, d) U_r U_rᵀ."""
    offset: Tensor
    """(l, 2, h, 1, d) μ − μ U_r U_rᵀ."""

    @classmethod
    def of(cls, bases: Bases, ranks: Tensor) -> Simulated:
        """`ranks` are (l, 2, h)."""
        places = torch.arange(bases.width, device=ranks.device)
        kept = (places < ranks[..., None]).to(bases.basis.dtype)
        projector = bases.basis * kept[..., None, :] @ bases.basis.mT
        mean = bases.mean[..., None, :]
        return cls(bases.layers, projector, mean - mean @ projector)

    def shown(self, keys: Tensor, values: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        row = self.layers.index(memory.layer)
        keys, values = (
            (states.float() @ self.projector[row, kind] + self.offset[row, kind]).to(states.dtype)
            for kind, states in enumerate((keys, values))
        )
        return keys, values


def log_probabilities(model: Any, ids: Tensor, mask: Tensor | None, stage: Stage) -> Tensor:
    """(b, t, v) float32 of the next token, with what a stage lets attention see."""
    cache = CompressedCache(model.config, [stage])
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    return torch.as_tensor(logits.float().log_softmax(dim=-1))


def divergence(whole: Tensor, found: Tensor, mask: Tensor | None) -> Tensor:
    """KL(whole ‖ found) of (b, t, v) log-probabilities in nats, mean over tokens no padding."""
    each = (whole.exp() * (whole - found)).sum(dim=2)
    return each.mean() if mask is None else each[mask != 0].mean()


def cross_entropy(found: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of what (b, t, v) log-probabilities say against the next of (b, t) tokens."""
    each = -found[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return each.mean() if mask is None else each[(mask[:, 1:] * mask[:, :-1]) != 0].mean()


# -- training ------------------------------------------------------------------------------


class TrainedBases(nn.Module):
    """Bases turned by Cayley maps that start at the identity, and their means."""

    def __init__(self, start: Bases) -> None:
        super().__init__()
        self.layers = start.layers
        self.register_buffer("start", start.basis.clone())
        self.start: Tensor
        self.free = nn.Parameter(torch.zeros_like(start.basis))
        self.mean = nn.Parameter(start.mean.clone())

    def bases(self) -> Bases:
        return Bases(self.layers, turned(self.start, self.free), self.mean)


Draw = Callable[[torch.Size, int], Tensor]
"""Ranks of a (l, 2, h) shape for heads of a width, for one step of training."""


def drawn_ranks(shape: torch.Size, width: int) -> Tensor:
    """From d/8, 2d/8, …, d for each head, and for its keys and values apart."""
    return (torch.randint(1, LEVELS + 1, shape) * width // LEVELS).clamp(min=1)


@dataclass(frozen=True)
class Plan:
    """How bases are trained; see `MatryoshkaKV.fit`."""

    steps: int
    batch: int
    learning_rate: float
    divergence_weight: float
    seed: int
    checkpoint: str | Path | None = None
    draw: Draw = drawn_ranks

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.learning_rate > 0:
            raise FewbitsError("steps and batch must be at least 1, and learning_rate above 0")
        if not 0 <= self.divergence_weight <= 1:
            raise FewbitsError("divergence_weight must be from 0 to 1")


def tune(
    model: Any, start: Bases, tokens: Tensor, mask: Tensor | None, plan: Plan, made_for: Fingerprint
) -> tuple[Bases, History]:
    """Turn bases so that the model predicts what it does with its whole cache, at any ranks.

    The weights of the model take no gradient. Each step costs a forward pass of the model with
    its whole cache, and a forward and backward pass with drawn ranks.
    """
    trained, device = TrainedBases(start), model.device
    weight, texts, batch = plan.divergence_weight, len(tokens), min(plan.batch, len(tokens))

    def loss(rows: Tensor) -> dict[str, Tensor]:
        rows = rows % texts
        ids, given = tokens[rows].to(device), None if mask is None else mask[rows].to(device)
        with torch.no_grad():
            whole = log_probabilities(model, ids, given, Stage())
        ranks = plan.draw(trained.mean.shape[:3], start.width).to(device)
        found = log_probabilities(model, ids, given, Simulated.of(trained.bases(), ranks))
        return {
            "divergence": weight * divergence(whole, found, given),
            "cross-entropy": (1 - weight) * cross_entropy(found, ids, given),
        }

    with frozen(model):
        history = train(
            trained,
            loss,
            plan.steps * batch,  # numbers that go round the texts: so many steps exactly
            epochs=1,
            batch_size=batch,
            optimizer=partial(torch.optim.AdamW, lr=plan.learning_rate, weight_decay=0.0),
            scheduler=warmup_cosine(min(0.5, WARM_UP_STEPS / plan.steps)),
            seed=plan.seed,
            device=device,
            gradient_clip=GRADIENT_CLIP,
            checkpoint=plan.checkpoint,
            identity=str((made_for, texts, plan.divergence_weight)),
            progress=True,
        )
    with torch.no_grad():
        found = trained.to("cpu").bases()
    return Bases(start.layers, found.basis.detach(), found.mean.detach().clone()), history


# -- what ranks cost -----------------------------------------------------------------------


class RankCost:
    """KL of the model's predictions on some prompts, by the ranks of all heads.

    The predictions with the whole cache are computed once: 4·n·t·v bytes are held.
    """

    def __init__(
        self, model: Any, bases: Bases, prompts: Tensor, mask: Tensor | None, batch: int
    ) -> None:
        check_tokens(prompts, mask, "prompts")
        device = model.device
        self.model = model
        self.bases = Bases(bases.layers, bases.basis.to(device), bases.mean.to(device))
        ids = prompts.to(device).split(batch)
        masks = [None] * len(ids) if mask is None else mask.to(device).split(batch)
        self.batches = list(zip(ids, masks, strict=True))
        with torch.no_grad():
            self.whole = [log_probabilities(model, *one, Stage()) for one in self.batches]

    @torch.no_grad()
    def __call__(self, ranks: np.ndarray) -> float:
        """The mean over the prompts, in nats, with (l·2·h,) ranks."""
        shaped = torch.as_tensor(ranks, device=self.model.device).view(self.bases.mean.shape[:3])
        stage = Simulated.of(self.bases, shaped)
        sums, rows = 0.0, 0
        for (ids, mask), whole in zip(self.batches, self.whole, strict=True):
            found = log_probabilities(self.model, ids, mask, stage)
            sums += float(divergence(whole, found, mask)) * len(ids)
            rows += len(ids)
        return sums / rows
