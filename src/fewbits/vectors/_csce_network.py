"""Network, losses and training of `csce_net.CSCENet` and `csce_net.HashHead`. Needs torch."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.devices import resolve_device, seeded
from fewbits.core.errors import FewbitsError, require
from fewbits.core.training import History, train
from fewbits.primitives.hash_centers import hash_centers

if TYPE_CHECKING:
    from fewbits.vectors.csce_net import CSCENet, HashModel

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet, which pretrained backbones expect to be taken out."""
LARGEST_COSINE = 0.99999
"""Nearer to 1, the gradient of the arc cosine has no bound."""
CONFIG_LIMIT = 2**16
"""Largest whole number in the description of a backbone that is built from a file."""

Fetch = Callable[[np.ndarray, bool], Tensor]
"""From row numbers, and whether it is for training, to a batch of inputs."""


# -- backbones -------------------------------------------------------------------------------


class SmallBackbone(nn.Module):
    """Four stages of one convolution each, for images (b, 3, h, w) of 32 pixels a side or more.

    Gives the maps of the last two stages: (b, 96, h/4, w/4) and (b, 128, h/8, w/8).
    """

    def __init__(self) -> None:
        super().__init__()
        stages = []
        for number, (before, after) in enumerate(((3, 32), (32, 64), (64, 96), (96, 128))):
            convolution = nn.Conv2d(before, after, 3, 1 if number == 0 else 2, 1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-2], maps[-1]


class Backbone(nn.Module):
    """A backbone of `transformers`; gives the maps (b, c, h, w) of its last two stages."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before, last = self.model(x).feature_maps[-2:]
        return before, last


def pretrained_backbone(name: str) -> tuple[Backbone, dict[str, Any]]:
    """A backbone with its weights, and its description, by name on the hub or from a folder.

    Raises
    ------
    FewbitsError
        Nothing of that name, a model that is no backbone, or one that lacks weights.
    """
    transformers: Any = require("transformers", "examples")
    try:
        config = transformers.AutoConfig.from_pretrained(name, out_indices=[-2, -1])
        # AutoBackbone.from_pretrained would look on the hub, also for a folder that is here.
        kind = transformers.MODEL_FOR_BACKBONE_MAPPING[type(config)]
        model, info = kind.from_pretrained(name, config=config, output_loading_info=True)
    except KeyError:
        raise FewbitsError(f"{name} is no backbone; take a ResNet, ConvNeXt, Swin, …") from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise FewbitsError(
            f"cannot load the backbone {name}; give a folder that save_pretrained wrote, a name "
            f"on the Hugging Face hub, or small ({reason})"
        ) from None
    # Norms of the maps belong to the backbone alone; the models it is cut from lack them.
    missing = [key for key in info["missing_keys"] if not key.startswith("hidden_states_norms")]
    if missing:
        raise FewbitsError(
            f"the backbone {name} lacks {len(missing)} weights, such as {missing[0]}"
        )
    return Backbone(model), dict(json.loads(config.to_json_string()))


def described_backbone(about: Mapping[str, Any]) -> Backbone:
    """The backbone that a description stands for, without its weights.

    Raises
    ------
    ValueError
        What is described is no backbone, or is beyond `CONFIG_LIMIT`.
    """
    transformers: Any = require("transformers", "examples")
    check_numbers(about)
    config = transformers.AutoConfig.for_model(**about)
    return Backbone(transformers.MODEL_FOR_BACKBONE_MAPPING[type(config)](config))


def check_numbers(value: Any) -> None:
    """Refuse whole numbers, in any nesting, that would take all memory."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_numbers(item)
    elif isinstance(value, int) and abs(value) > CONFIG_LIMIT:
        raise ValueError(f"the backbone has a number beyond {CONFIG_LIMIT}")


# -- the two branches ------------------------------------------------------------------------


class LocalBranch(nn.Module):
    """Attention over the places of a map (b, d, h, w): unit features (b, c, h, w) by a score."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.feature = nn.Conv2d(dims, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.feature(x))
        score = functional.softplus(self.score(functional.relu(y)))
        return score * functional.normalize(y, dim=1)


class SlidingWindows(nn.Module):
    """All windows of a map (b, d, h, w), of each size: (b, c, windows), sizes in order.

    A window of a×a places has c/a² channels at each, which a 1×1 convolution makes.
    """

    def __init__(self, dims: int, channels: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.reduce = nn.ModuleList(nn.Conv2d(dims, channels // a**2, 1) for a in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        windows = [
            functional.unfold(reduce(x), size)
            for reduce, size in zip(self.reduce, self.sizes, strict=True)
        ]
        return torch.cat(windows, dim=2)


def remove_explained(local: Tensor, windows: Tensor, mode: str) -> Tensor:
    """The part of local features (b, c, places) that windows (b, c, n) do not explain.

    ``paper`` takes out W(Wᵀ L) divided by the squared Frobenius norm of W, which is a projection
    only where there is one window; ``exact`` takes out the projection onto the span of the
    windows, W⁺ being the pseudo-inverse; ``off`` takes out nothing. O(b·c·n·places).
    """
    if mode == "off":
        return local
    if mode == "exact":
        return local - windows @ (torch.linalg.pinv(windows) @ local)
    squared = windows.square().sum(dim=(1, 2), keepdim=True)
    explained = windows @ (windows.transpose(1, 2) @ local)
    return local - explained / squared.clamp_min(torch.finfo(squared.dtype).tiny)


class Branches(nn.Module):
    """From the maps of two stages to the global and the local vector, joined: (b, 2·c)."""

    def __init__(self, plan: CSCENet, before: torch.Size, last: torch.Size) -> None:
        super().__init__()
        self.channels, count = branch_sizes(plan, before[1], last)
        self.aie = plan.aie
        self.local = LocalBranch(before[1], self.channels)
        self.windows = SlidingWindows(last[1], self.channels, plan.windows)
        self.weigh = nn.Linear(count, 1)
        self.dims = 2 * self.channels

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        windows = self.windows(last)
        local = remove_explained(self.local(before).flatten(2), windows, self.aie)
        return torch.cat([self.weigh(windows)[..., 0], local.mean(dim=2)], dim=1)


def branch_sizes(plan: CSCENet, before: int, last: torch.Size) -> tuple[int, int]:
    """Channels of both branches, and how many windows there are.

    Raises
    ------
    FewbitsError
        Windows that do not fit the map, or channels that do not divide into them.
    """
    sides = last[2:]
    if max(plan.windows) > min(sides):
        raise FewbitsError(
            f"csce-net: a window of {max(plan.windows)} does not fit the last map of "
            f"{sides[0]}×{sides[1]}; take larger images or smaller windows"
        )
    count = sum((sides[0] - a + 1) * (sides[1] - a + 1) for a in plan.windows)
    unit = math.lcm(*(a**2 for a in plan.windows))
    channels = before // unit * unit if plan.channels is None else plan.channels
    if channels < 1 or channels % unit:
        raise FewbitsError(
            f"csce-net: channels={channels or before} must be a multiple of {unit}, the "
            f"places of windows {'×'.join(map(str, plan.windows))}"
        )
    if plan.aie == "exact" and count >= channels:
        raise FewbitsError(
            f"csce-net: {count} windows explain all of {channels} channels, so aie=exact leaves "
            "nothing; take smaller images or aie=paper"
        )
    return channels, count


class Pooled(nn.Module):
    """The mean over the last map: (b, d)."""

    def __init__(self, last: torch.Size) -> None:
        super().__init__()
        self.dims = last[1]

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        return last.mean(dim=(2, 3))


class ImageFeatures(nn.Module):
    """From images (b, 3, size, size) to vectors (b, dims)."""

    def __init__(self, backbone: nn.Module, plan: CSCENet) -> None:
        super().__init__()
        self.backbone = backbone
        before, last = map_shapes(backbone, plan.size)
        self.join = Branches(plan, before, last) if plan.branches else Pooled(last)
        self.dims: int = self.join.dims

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*self.backbone(x))


@torch.no_grad()
def map_shapes(backbone: nn.Module, size: int) -> tuple[torch.Size, torch.Size]:
    """Shapes of the maps of one image."""
    before, last = backbone.eval()(torch.zeros(1, 3, size, size))
    return before.shape, last.shape


class Standardised(nn.Module):
    """Vectors (b, d) less their mean, in units of their overall standard deviation."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("scale", torch.ones(()))

    def set(self, mean: np.ndarray, scale: float) -> None:
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class HashNetwork(nn.Module):
    """From inputs to pre-activations v (b, bits), and the threshold t (b,) of each item."""

    def __init__(self, features: nn.Module, dims: int, plan: HashModel) -> None:
        super().__init__()
        self.features = features
        self.code = nn.Linear(dims, plan.bits)
        self.threshold = nn.Linear(dims, 1)
        self.dsf, self.dead_zone = plan.dsf, plan.dead_zone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        v = self.code(features)
        if self.dsf in ("paper", "ste"):
            zone = self.dead_zone
            return v, self.threshold(features)[:, 0].clamp(-zone, zone)
        return v, v.new_full((len(v),), self.dead_zone if self.dsf == "fixed" else 0.0)


def image_network(plan: CSCENet, backbone: nn.Module) -> HashNetwork:
    """The network on that backbone; convolutions of the branches start by He's rule."""
    features = ImageFeatures(backbone, plan)
    fresh = [features.join] if isinstance(backbone, Backbone) else [features]
    for module in (module for part in fresh for module in part.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return HashNetwork(features, features.dims, plan)


# -- the dynamic sign function ---------------------------------------------------------------


def signs(v: Tensor) -> Tensor:
    """−1 or +1, never 0: +1 at zero."""
    return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)


def filling(v: Tensor) -> Tensor:
    """(b, 1): the sign that fewer bits of an item have; +1 where they are balanced."""
    positive = (v >= 0).sum(dim=1, keepdim=True)
    return torch.where(2 * positive > v.shape[1], -1.0, 1.0).to(v.dtype)


def dynamic_sign(v: Tensor, threshold: Tensor) -> Tensor:
    """Signs of v (b, bits), but the minority sign wherever −t < v < t, t being (b,).

    Exactly −1 or +1. An item's bits depend on that item alone. O(b·bits).
    """
    ambiguous = v.abs() < threshold[:, None]
    return torch.where(ambiguous, filling(v), signs(v))


def dynamic_sign_through(v: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """The same values, with a gradient for the threshold.

    It is that of a soft dead zone: a bit keeps its sign to the share
    sigmoid((|v| − t) / temperature). None reaches v.
    """
    v = v.detach()
    kept = torch.sigmoid((v.abs() - threshold[:, None]) / temperature)
    soft = kept * signs(v) + (1 - kept) * filling(v)
    return dynamic_sign(v, threshold.detach()) + (soft - soft.detach())


def squashed(v: Tensor) -> Tensor:
    """2·hardtanh(v, −½, ½): from −1 to 1."""
    return 2 * v.clamp(-0.5, 0.5)


# -- losses ----------------------------------------------------------------------------------


def margin_logits(cosines: Tensor, targets: Tensor, margins: Tensor, kind: str) -> Tensor:
    """Cosines (b, c) where the true classes are made harder by a margin.

    Parameters
    ----------
    targets : (b, c), 1 for true classes and 0 for others.
    margins : (b, 1) of each item, in radians for ``arc``.
    kind : ``arc`` for cos(arccos(x) + margin), ``cos`` for x − margin.
    """
    if kind == "cos":
        return cosines - margins * targets
    angles = torch.acos(cosines.clamp(-LARGEST_COSINE, LARGEST_COSINE))
    return torch.cos(angles + margins * targets)


def classification_loss(v: Tensor, labels: Tensor, centers: Tensor, plan: HashModel) -> Tensor:
    """Cross-entropy of the cosines of v (b, bits) with the centres (c, bits) of the classes.

    Labels are (b,) int64 classes, with margins drawn around their mean; or (b, c) indicators, with
    one margin for all, where every true class is to have an equal share.
    """
    cosines = functional.normalize(v, dim=1) @ functional.normalize(centers, dim=1).T
    margins = torch.full((len(v), 1), plan.margin, device=v.device)
    if labels.ndim == 1:
        # Drawn on the CPU, so that every device sees the same margins.
        drawn = plan.margin_deviation * torch.randn(len(v), 1)
        margins = margins + drawn.to(v.device)
        labels = functional.one_hot(labels, len(centers))
    targets = labels.to(v.dtype)
    logits = plan.scale * margin_logits(cosines, targets, margins, plan.margin_kind)
    shares = targets / targets.sum(dim=1, keepdim=True)
    return -(shares * functional.log_softmax(logits, dim=1)).sum(dim=1).mean()


def quantization_loss(v: Tensor, threshold: Tensor, plan: HashModel) -> Tensor:
    """How far the squashed v (b, bits) is from its bits, which get no gradient.

    The threshold gets one with ``dsf="ste"``.
    """
    soft = squashed(v)
    if plan.dsf == "ste":
        bits = dynamic_sign_through(soft, threshold, plan.dead_zone)
    else:
        bits = dynamic_sign(soft.detach(), threshold.detach())
    if plan.quantization == "cs":
        return (1 - functional.cosine_similarity(soft, bits, dim=1)).mean()
    away = soft - bits
    return away.abs().mean() if plan.quantization == "l1" else away.square().mean()


# -- training --------------------------------------------------------------------------------


class WithBest(nn.Module):
    """A network in training beside its best state so far, so that checkpoints hold both."""

    score: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.best = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("score", torch.tensor(-1.0))

    def keep(self, score: float) -> None:
        """Remember the present state where none had a higher score."""
        if torch.tensor(score, dtype=torch.float32) > self.score.cpu():
            self.best.load_state_dict(self.network.state_dict())
            self.score.fill_(score)


def train_network(
    plan: HashModel,
    network: HashNetwork,
    fetch: Fetch,
    labels: np.ndarray,
    measure: Callable[[nn.Module, np.ndarray], float],
    *,
    checkpoint: str | Path | None = None,
    identity: str = "",
    progress: bool = False,
) -> tuple[HashNetwork, History, dict[int, float]]:
    """Train on all rows but those held out; the network, what happened, and scores by epoch.

    `measure` says how good a network is on the rows held out, from 0 to 1; the best state is
    what comes back. Without held-out rows it is the last.
    """
    order = np.random.default_rng(plan.seed).permutation(len(labels))
    count = round(plan.held_out * len(labels))
    asked, seen = np.sort(order[:count]), np.sort(order[count:])
    model = WithBest(network) if count else network
    scores: dict[int, float] = {}

    def look(epoch: int, history: History) -> None:
        if epoch % plan.check_every == 0 or epoch == plan.epochs:
            scores[epoch] = measure(network, asked)
            assert isinstance(model, WithBest)
            model.keep(scores[epoch])

    history = train(
        model,
        objective(plan, network, fetch, labels, seen),
        len(seen),
        epochs=plan.epochs,
        batch_size=plan.batch,
        optimizer=optimizer(plan),
        seed=plan.seed,
        device=resolve_device(plan.device),
        checkpoint=checkpoint,
        identity=identity,
        progress=progress,
        callback=look if count else None,
    )
    if isinstance(model, WithBest):
        network.load_state_dict(model.best.state_dict())
    return network.eval(), history, scores


def objective(
    plan: HashModel, network: HashNetwork, fetch: Fetch, labels: np.ndarray, seen: np.ndarray
) -> Callable[[Tensor], dict[str, Tensor]]:
    """The terms of the loss for numbers of the rows in `seen`."""
    device = resolve_device(plan.device)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    try:
        centers = torch.from_numpy(hash_centers(classes, plan.bits, plan.seed)).float().to(device)
    except ValueError as error:
        raise FewbitsError(f"{plan.name}: {error}") from None

    def loss(numbers: Tensor) -> dict[str, Tensor]:
        rows = seen[numbers.numpy()]
        v, threshold = network(fetch(rows, True).to(device))
        own = torch.from_numpy(labels[rows]).to(device)
        terms = {"classes": classification_loss(v, own, centers, plan)}
        if plan.quantization_weight:
            quantization = quantization_loss(v, threshold, plan)
            terms["quantization"] = plan.quantization_weight * quantization
        return terms

    return loss


def optimizer(plan: HashModel) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """RMSprop as published, or Adam."""
    kind = torch.optim.RMSprop if plan.optimizer == "rmsprop" else torch.optim.Adam
    return partial(kind, lr=plan.learning_rate, weight_decay=plan.weight_decay)


# -- inputs and outputs ----------------------------------------------------------------------


def prepared(images: np.ndarray, size: int, flip: bool, training: bool) -> Tensor:
    """(b, 3, size, size) float32 of (b, side, side, 3) uint8, in units of ImageNet's deviations.

    In training a random part of each, mirrored one time in two where `flip` is; else its centre.
    """
    count, side = images.shape[:2]
    places = np.full((count, 2), (side - size) // 2)
    mirrored = np.zeros(count, dtype=bool)
    if training:
        places = torch.randint(side - size + 1, (count, 2)).numpy()
        mirrored = (torch.rand(count) < 0.5).numpy() & flip
    steps = np.arange(size)
    rows = places[:, :1] + steps
    columns = places[:, 1:] + np.where(mirrored[:, None], steps[::-1], steps)
    parts = images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    x = torch.from_numpy(parts).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return (x - mean[:, None, None]) / deviation[:, None, None]


@torch.no_grad()
def outputs(
    network: nn.Module, plan: HashModel, fetch: Fetch, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v (n, bits) and t (n,) float32 of these rows, and their codes (n, bits) bool."""
    device = resolve_device(plan.device)
    network = network.to(device).eval()
    found: tuple[list[Tensor], ...] = ([], [], [])
    for start in range(0, len(rows), plan.batch):
        v, threshold = network(fetch(rows[start : start + plan.batch], False).to(device))
        bits = dynamic_sign(squashed(v) if plan.consistent else v, threshold) > 0
        for parts, part in zip(found, (v, threshold, bits), strict=True):
            parts.append(part.cpu())
    joined, thresholds, codes = (torch.cat(parts).numpy() for parts in found)
    return joined, thresholds, codes


def state_of(network: nn.Module) -> dict[str, np.ndarray]:
    """Weights and buffers by name."""
    return {name: value.cpu().numpy() for name, value in network.state_dict().items()}


def restore(build: Callable[[], HashNetwork], arrays: Mapping[str, np.ndarray]) -> HashNetwork:
    """The network that `build` makes, with these weights.

    Raises
    ------
    ValueError
        Arrays of other names, shapes or dtypes, or numbers that are not finite.
    """
    with torch.device("meta"):  # takes no memory, so that a false description is found out first
        wanted = build().state_dict()
    if set(wanted) != set(arrays):
        raise ValueError("its weights are not those of its network")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ValueError(f"{name} must be {wanted[name].dtype} {tuple(wanted[name].shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinity")
    with seeded(0):
        network = build()
    network.load_state_dict(tensors)
    return network.eval()
