"""Training of `bt2.BT2`, and of the baseline it is compared with. Needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal

from fewbits.core.checks import check_vectors, unit_rows
from fewbits.core.devices import resolve_device, seeded
from fewbits.core.errors import FewbitsError
from fewbits.core.schedules import warmup_cosine
from fewbits.core.training import History, train
from fewbits.vectors._bebr_network import Linear, regression

if TYPE_CHECKING:
    from fewbits.vectors.bt2 import BT2

Inputs = Tensor | np.ndarray | Callable[[Tensor], Tensor]
"""A table of inputs, or a function from (b,) row numbers to a batch of them."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises; 5 of 100 epochs in the paper."""


# -- the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The same items in both embeddings, unit rows, and the class of each, if there are classes."""

    old: np.ndarray
    new: np.ndarray
    classes: np.ndarray | None = None

    def digest(self) -> str:
        """What tells these items from others."""
        arrays = [self.old, self.new] + ([] if self.classes is None else [self.classes])
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def class_means(old: np.ndarray, classes: np.ndarray) -> Tensor:
    """(N, d_o) float32: the mean of the old rows of each class, not made unit again. O(n·d_o)."""
    sums = np.zeros((int(classes.max()) + 1, old.shape[1]))
    np.add.at(sums, classes, old)
    return torch.from_numpy((sums / np.bincount(classes)[:, None]).astype(np.float32))


class BasisTransformation(nn.Module):
    """From h (b, d_n + d_o) to n (b, d_n) and z (b, d_n + a).

    n is the first part of h at unit length, o a linear map of ReLU(h). Then v joins a coordinates
    of o, at unit length, to Q_p of C·n, and Q_o turns the first d_o coordinates of v.
    """

    def __init__(self, new: int, old: int, extra: int, scale: float) -> None:
        super().__init__()
        self.new, self.old, self.scale = new, old, scale
        # The old branch has d_o outputs in the paper, but only the first a of them are used.
        self.branch = nn.Linear(new + old, extra) if extra else None
        self.new_basis = nn.Linear(new, new, bias=False)
        self.old_basis = nn.Linear(old, old, bias=False)
        for basis in (self.new_basis, self.old_basis):
            nn.init.orthogonal_(basis.weight)

    def make_orthogonal(self) -> None:
        """Let both bases move among orthogonal matrices only, from where they stand.

        By Cayley's map: a tenth of the time of the matrix exponential at 384 dimensions.
        """
        for basis in (self.new_basis, self.old_basis):
            orthogonal(basis, orthogonal_map="cayley")

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        n = functional.normalize(h[:, : self.new], dim=1)
        v = self.new_basis(self.scale * n)
        if self.branch is not None:
            o = functional.normalize(self.branch(functional.relu(h)), dim=1)
            v = torch.cat([o, v], dim=1)
        return n, torch.cat([self.old_basis(v[:, : self.old]), v[:, self.old :]], dim=1)


class Model(nn.Module):
    """What is trained: a backbone (or one linear map), the transformation, and a classifier."""

    def __init__(
        self, backbone: nn.Module, transformation: BasisTransformation, classes: int
    ) -> None:
        super().__init__()
        self.backbone, self.transformation = backbone, transformation
        made = nn.Linear(transformation.new, classes, bias=False) if classes else None
        self.classifier = made


# -- where it starts -------------------------------------------------------------------------


def aligned_bases(items: Items, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Q_p and Q_o that bring new rows as close to old ones as d_o − a directions can.

    With XᵀY = U S Vᵀ (Procrustes), Q_p spends the leading columns of U on compatibility, and Q_o
    turns them onto the leading columns of V; the other a directions of V are left to o.
    """
    left, _, right = np.linalg.svd(items.new.T @ items.old)
    shared = items.old.shape[1] - extra
    old_basis = np.concatenate([right[shared:], right[:shared]]).T
    return left.T, old_basis


def branch_start(h: np.ndarray, items: Items, old_basis: np.ndarray, extra: int) -> Linear:
    """The regression, on ReLU(h), of what `aligned_bases` leave to o."""
    return regression(np.maximum(h, 0), items.old @ old_basis[:, :extra])


@torch.no_grad()
def set_linear(layer: nn.Linear, map_: Linear) -> None:
    layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(map_[0].T)))
    layer.bias.copy_(torch.from_numpy(map_[1]))


def made(codec: BT2, items: Items, backbone: nn.Module | None) -> Model:
    """The model before training; with no backbone, h is a linear map that begins with x itself."""
    new, old = items.new.shape[1], items.old.shape[1]
    extra = codec.extra_of(new, old)
    with seeded(codec.seed):
        transformation = BasisTransformation(new, old, extra, codec.scale)
        head = nn.Linear(new, new + old) if backbone is None else None
        classes = 0 if items.classes is None else int(items.classes.max()) + 1
        model = Model(head or backbone, transformation, classes)  # type: ignore[arg-type]
    if head is not None:
        with torch.no_grad():
            head.weight[:new] = torch.eye(new)
            head.bias[:new] = 0
    if codec.start == "aligned":
        bases = aligned_bases(items, extra)
        for layer, matrix in zip(
            (transformation.new_basis, transformation.old_basis), bases, strict=True
        ):
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(matrix)))
        if head is not None and transformation.branch is not None:
            with torch.no_grad():
                h = head(torch.from_numpy(items.new)).numpy()
            set_linear(transformation.branch, branch_start(h, items, bases[1], extra))
    transformation.make_orthogonal()
    return model


# -- training --------------------------------------------------------------------------------


def upgrade(
    codec: BT2,
    items: Items,
    backbone: nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> tuple[Model, dict[str, float]]:
    """Train everything on the paper's loss; the model on the CPU, and the last value of each term.

    Only the cosine terms are there when there are no classes.
    """
    device = resolve_device(codec.device)
    model = made(codec, items, backbone)
    fetch = fetcher(items.new if inputs is None else inputs, len(items.new))
    check_backbone(model, fetch, device)
    loss = objective(codec, model, items, fetch, device)
    identity = f"{codec} {items.digest()}" if checkpoint is not None else ""
    history = train(
        model,
        loss,
        len(items.new),
        epochs=epochs(codec, len(items.new)),
        **optimisation(codec),
        device=device,
        checkpoint=checkpoint,
        identity=identity,
        progress=progress,
    )
    return model.to("cpu"), {name: values[-1] for name, values in history.terms.items()}


def objective(
    codec: BT2,
    model: Model,
    items: Items,
    fetch: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Callable[[Tensor], dict[str, Tensor]]:
    """The weighted terms of the loss for a batch of row numbers."""
    old, new = torch.from_numpy(items.old), torch.from_numpy(items.new)
    labels = None if items.classes is None else torch.from_numpy(items.classes)
    means = None if items.classes is None else class_means(items.old, items.classes).to(device)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        n, z = model.transformation(model.backbone(fetch(rows).to(device)))
        z_old = functional.normalize(z[:, : old.shape[1]], dim=1)
        terms = {
            "new": codec.new_weight * away(n, new[rows].to(device)),
            "old": codec.old_weight * away(z_old, old[rows].to(device)),
        }
        if labels is not None and means is not None and model.classifier is not None:
            own = labels[rows].to(device)
            terms["classes"] = functional.cross_entropy(model.classifier(n), own)
            logits = z_old @ means.T / codec.temperature
            terms["old classes"] = codec.class_weight * functional.cross_entropy(logits, own)
        return terms

    return loss


def away(x: Tensor, target: Tensor) -> Tensor:
    """1 − cosine of (b, d) unit rows and their targets, averaged."""
    return 1 - (x * target).sum(dim=1).mean()


def optimisation(plan: BT2 | Plan) -> dict[str, Any]:
    """Adam with warm-up and a cosine, by the options of `plan`."""
    adam = partial(torch.optim.Adam, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    return {
        "batch_size": plan.batch,
        "optimizer": adam,
        "scheduler": warmup_cosine(WARMUP),
        "seed": plan.seed,
    }


def epochs(plan: BT2 | Plan, rows: int) -> int:
    """How many give about as many steps as asked."""
    return -(-plan.steps // max(1, rows // plan.batch))


def fetcher(inputs: Inputs, rows: int) -> Callable[[Tensor], Tensor]:
    """From row numbers to a batch of inputs."""
    if callable(inputs):
        return inputs
    if len(inputs) != rows:
        raise FewbitsError(f"{len(inputs)} inputs and {rows} vectors do not pair up")
    table = torch.as_tensor(inputs)
    return lambda numbers: table[numbers]


@torch.no_grad()
def check_backbone(model: Model, fetch: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Refuse a backbone whose h has another shape."""
    wanted = model.transformation.new + model.transformation.old
    h = model.to(device).eval().backbone(fetch(torch.arange(2)).to(device))
    if h.shape != (2, wanted):
        raise FewbitsError(
            f"bt2: the module must give (rows, {wanted}), new and old width together, "
            f"not {tuple(h.shape)} for 2 rows"
        )


# -- the baseline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How `train_bct` is optimised."""

    steps: int = 1000
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 3e-5
    seed: int = 0


def train_bct(
    module: nn.Module,
    inputs: Inputs,
    labels: Any,
    old_vectors: Any = None,
    *,
    alpha: float = 10.0,
    smoothing: float = 0.1,
    temperature: float = 1.0,
    device: str | torch.device | None = None,
    **plan: Any,
) -> History:
    """Backward-compatible training (BCT), the baseline that BT² improves on.

    Shen, Xiong, Xia, Soatto 2020, *Towards Backward-Compatible Representation Learning* (arXiv
    2003.11942).

    The embedding f(module(x)), f to unit length, is trained by CE(W_c f, y) + alpha·CE(W_p f, y):
    by a classifier of its own, and by the class means W_p of the old vectors. Where the embedding
    is wider than the old vectors, W_p sees its first coordinates ("naive widening"). Without old
    vectors only the first term remains: an independent model.

    Parameters
    ----------
    module : maps a batch of inputs to (b, d_n); trained in place, left in evaluation mode.
    inputs : (n, …), or a function from (b,) row numbers to a batch.
    labels : (n,) the class of each.
    old_vectors : (n, d_o) the same items in the old embedding, d_o ≤ d_n.
    alpha : weight of the old classes, 10 in the paper.
    smoothing : of the labels, in both terms.
    temperature : what the logits of the old classes are divided by; 1 in the paper.
    plan : ``steps``, ``batch``, ``learning_rate``, ``weight_decay`` and ``seed``.

    Raises
    ------
    FewbitsError
        Rows that do not pair up, fewer than two classes, or an embedding that is too narrow.
    """
    from fewbits.vectors.bt2 import class_numbers

    there, settings = resolve_device(device), Plan(**plan)
    targets = class_numbers(labels, len(labels))
    classes, fetch = int(targets.max()) + 1, fetcher(inputs, len(targets))
    own = torch.from_numpy(targets)
    means = None if old_vectors is None else checked_means(old_vectors, targets).to(there)
    with torch.no_grad():
        width = module.to(there).eval()(fetch(torch.arange(2)).to(there)).shape[1]
    if means is not None and width < means.shape[1]:
        raise FewbitsError(
            f"the module gives {width} dimensions, fewer than the {means.shape[1]} of the old "
            "vectors; make it as wide"
        )
    with seeded(settings.seed):
        classifier = nn.Linear(width, classes, bias=False)
    cross_entropy = partial(functional.cross_entropy, label_smoothing=smoothing)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        n = functional.normalize(module(fetch(rows).to(there)), dim=1)
        y = own[rows].to(there)
        terms = {"classes": cross_entropy(classifier(n), y)}
        if means is not None:
            logits = n[:, : means.shape[1]] @ means.T / temperature
            terms["old classes"] = alpha * cross_entropy(logits, y)
        return terms

    return train(
        nn.ModuleList([module, classifier]),
        loss,
        len(targets),
        epochs=epochs(settings, len(targets)),
        **optimisation(settings),
        device=there,
    )


def checked_means(old_vectors: Any, targets: np.ndarray) -> Tensor:
    """`class_means` of what a user gave."""
    old = unit_rows(check_vectors(old_vectors, what="the old vectors"))
    if len(old) != len(targets):
        raise FewbitsError(f"{len(old)} old vectors and {len(targets)} labels do not pair up")
    return class_means(old, targets)
