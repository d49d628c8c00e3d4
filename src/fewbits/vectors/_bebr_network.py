"""Training of `bebr.BEBR`: where its head starts, and the losses it minimises. Needs torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.devices import resolve_device, seeded
from fewbits.core.schedules import step_decay, warmup_cosine
from fewbits.core.training import OptimizerFactory, train
from fewbits.primitives.blocks import fold_batch_norm, mlp
from fewbits.primitives.contrastive import info_nce
from fewbits.primitives.pca import Moments, principal_components
from fewbits.primitives.rotation import random_rotation
from fewbits.primitives.straight_through import sign_through
from fewbits.vectors._bebr_codes import unit

if TYPE_CHECKING:
    from fewbits.vectors.bebr import BEBR

Linear = tuple[np.ndarray, np.ndarray]
"""Weights (inputs, outputs) and bias (outputs,) of a linear map, float32."""

HARDEST = 5
"""Negatives per anchor in the pair loss."""
RIDGE = 0.01
"""Regularisation of regressions on codes, as a share of the mean variance of a coordinate."""
GRADIENT_CLIP = 5.0


# -- the head --------------------------------------------------------------------------------


class Block(nn.Module):
    """A linear path, an MLP, or their sum."""

    def __init__(
        self, inputs: int, outputs: int, *, linear: bool, hidden: int, blocks: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs) if linear else None
        if self.linear is not None:
            nn.init.xavier_normal_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.mlp = mlp(inputs, outputs, hidden=hidden, blocks=blocks) if hidden else None

    @torch.no_grad()
    def start(self, map_: Linear) -> None:
        """Compute `map_`: it becomes the linear path, and the MLP adds zero to it."""
        if self.linear is not None:
            self.linear.weight.copy_(torch.from_numpy(map_[0].T))
            self.linear.bias.copy_(torch.from_numpy(map_[1]))
            if self.mlp is not None:
                self.mlp[-1].weight.zero_()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None or self.mlp is None:
            return (self.linear or self.mlp)(x)  # type: ignore[misc]
        return self.linear(x) + self.mlp(x)

    def arrays(self) -> list[np.ndarray]:
        """What `bebr.block_shapes` lists, with BatchNorm folded away."""
        found: list[Any] = []
        bias: Any = 0.0
        if self.linear is not None:
            found.append(self.linear.weight.T)
            bias = bias + self.linear.bias
        if self.mlp is not None:
            layers = [x for x in fold_batch_norm(self.mlp) if isinstance(x, nn.Linear)]
            for layer in layers[:-1]:
                found += [layer.weight.T, layer.bias]
            found.append(layers[-1].weight.T)
            bias = bias + layers[-1].bias
        return [array.detach().cpu().numpy() for array in (*found, bias)]


class Head(nn.Module):
    """Recurrent binarisation; with ``binary=False`` its float control.

    b ← sign(W(x)), then for each further bit b ← b + 2^-i · sign(R(x − unit(B(b)))).
    """

    def __init__(self, codec: BEBR, inputs: int, *, binary: bool = True) -> None:
        super().__init__()
        width = codec.dims or inputs
        rounds = codec.bits - 1 if binary else 0
        make = partial(Block, linear=codec.has_linear, hidden=codec.hidden, blocks=codec.blocks)
        shapes = [(inputs, width), *[(width, inputs), (inputs, width)] * rounds]
        self.blocks = nn.ModuleList(make(*shape) for shape in shapes)
        self.decoder = nn.Linear(width, inputs)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.sign: Callable[[Tensor], Tensor] = sign_through if binary else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, m) codes b of (n, d) unit rows."""
        code = self.sign(self.blocks[0](x))
        for i in range(1, len(self.blocks), 2):
            left = x - functional.normalize(self.blocks[i](code), dim=1)
            code = code + 0.5 ** ((i + 1) // 2) * self.sign(self.blocks[i + 1](left))
        return code

    def arrays(self) -> list[np.ndarray]:
        return [array for block in self.blocks for array in block.arrays()]  # type: ignore[operator]


def made(codec: BEBR, inputs: int, start: list[Linear], *, binary: bool = True) -> Head:
    """A head that computes `start` (in ``mode="paper"``: a random one)."""
    with seeded(codec.seed):
        head = Head(codec, inputs, binary=binary)
    for block, map_ in zip(head.blocks, start, strict=False):
        block.start(map_)  # type: ignore[operator]
    return head


# -- where it starts -------------------------------------------------------------------------


def rotation_start(
    x: np.ndarray, width: int, rounds: int, *, centred: bool, seed: int
) -> list[Linear]:
    """Random rotations of the leading directions of (n, d) unit rows, and the way back.

    A code wider than d takes several rotations. O(n·d² + d³), and O(n·d·m) per round.
    """
    principal = principal_components(Moments(x.shape[1]).add(x), center=centred)
    mean = principal.mean.astype(np.float32)
    directions = min(width, x.shape[1])
    basis = principal.components[:directions].T
    turns = [random_rotation(directions, seed * 64 + t) for t in range(-(-width // directions))]
    turned = (basis @ np.concatenate(turns, axis=1)[:, :width]).astype(np.float32)
    spread = ((x - mean) @ turned).std()
    return unrolled(x, (turned / spread, -mean @ turned / spread), mean, rounds)


def regression_start(x: np.ndarray, codes: np.ndarray, rounds: int) -> list[Linear]:
    """The linear map that comes closest to given (n, m) codes of the same items."""
    weights, bias = regression(x, codes)
    spread = np.maximum((x @ weights + bias).std(), 1e-12)
    return unrolled(x, (weights / spread, bias / spread), np.zeros_like(x[0]), rounds)


def unrolled(x: np.ndarray, first: Linear, mean: np.ndarray, rounds: int) -> list[Linear]:
    """W, B_0, R_0, B_1, …: each B is W transposed around `mean`, at the scale that fits the rows
    best, and each R is W at the scale that gives unit variance.

    A regression in place of the transpose fits the rows better, but then codes say less of
    each other: recall with quantised queries falls from 0.90 to 0.68 (m = 384, 3 bits).
    """
    weights, bias = first
    maps, code = [first], signs(x @ weights + bias)
    for i in range(rounds):
        back = code @ weights.T
        fit = np.float32((back * (x - mean)).sum() / np.maximum(np.square(back).sum(), 1e-12))
        left = x - unit(fit * back + mean)
        ahead = weights / np.maximum((left @ weights).std(), 1e-12)
        maps += [(fit * weights.T, mean), (ahead, np.zeros_like(bias))]
        code = code + np.float32(0.5 ** (i + 1)) * signs(left @ ahead)
    return maps


def signs(y: np.ndarray) -> np.ndarray:
    """−1 or +1, +1 at zero."""
    return np.where(y >= 0, np.float32(1), np.float32(-1))


def regression(inputs: np.ndarray, outputs: np.ndarray) -> Linear:
    """Ridge regression with a bias. O(n·i² + i³)."""
    middle, target = inputs.mean(axis=0), outputs.mean(axis=0)
    centred = (inputs - middle).astype(np.float64)
    gram = centred.T @ centred
    gram += max(RIDGE * gram.trace() / len(gram), 1e-9) * np.eye(len(gram))
    weights = np.linalg.solve(gram, centred.T @ (outputs - target)).astype(np.float32)
    return weights, (target - middle @ weights).astype(np.float32)


@torch.no_grad()
def fit_decoder(head: Head, x: np.ndarray) -> None:
    """Make the decoder the regression of (n, d) unit rows on their codes."""
    head.eval()
    codes = [head(torch.from_numpy(x[s : s + 8192])).numpy() for s in range(0, len(x), 8192)]
    weights, bias = regression(np.concatenate(codes), x)
    head.decoder.weight.copy_(torch.from_numpy(weights.T))
    head.decoder.bias.copy_(torch.from_numpy(bias))


# -- training --------------------------------------------------------------------------------


def optimise(
    codec: BEBR, model: nn.Module, loss: Callable[[Tensor], Tensor], rows: int, rate: float
) -> None:
    """About ``codec.steps`` steps over shuffled batches of the rows; `rate` is Adam's default."""
    optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=codec.learning_rate or rate)
    if codec.mode == "paper":
        rate = codec.learning_rate or 0.08 * codec.batch / 4096
        optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=1e-3)
    train(
        model,
        loss,
        rows,
        epochs=-(-codec.steps // max(1, rows // codec.batch)),
        batch_size=codec.batch,
        optimizer=optimizer,
        scheduler=step_decay(0.6) if codec.mode == "paper" else warmup_cosine(0.05),
        seed=codec.seed,
        device=codec.device,
        gradient_clip=GRADIENT_CLIP,
    )
    model.to("cpu")


def distil(codec: BEBR, head: Head, x: np.ndarray) -> None:
    """Teach the codes of (n, d) unit rows the similarities that the rows have.

    For each row, the softmax of its similarities to the rest of the batch is a distribution;
    the loss is KL(floats ‖ codes). With ``scoring="asymmetric"`` the similarity of two items
    is the float row of one with the decoded code of the other.
    """
    device = resolve_device(codec.device)
    items = torch.from_numpy(x).to(device)

    def loss(rows: Tensor) -> Tensor:
        batch = items[rows.to(device)]
        code = head(batch)
        if codec.scoring == "symmetric":
            unit_code = functional.normalize(code, dim=1)
            given = unit_code @ unit_code.T
        else:
            given = batch @ functional.normalize(head.decoder(code), dim=1).T
        # Similarities of codes are on a scale of their own, which is learned.
        itself = torch.eye(len(batch), dtype=torch.bool, device=device)
        student = (given * head.log_scale.exp() / codec.temperature).masked_fill(itself, -1e4)
        teacher = (batch @ batch.T / codec.temperature).masked_fill(itself, -1e4)
        return functional.kl_div(
            student.log_softmax(dim=1),
            teacher.log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )

    optimise(codec, head, loss, len(x), rate=5e-5)


@dataclass(frozen=True)
class Pairs:
    """Aligned (n, d) unit rows, whose item each pair is, and codes that must stay compatible."""

    queries: np.ndarray
    documents: np.ndarray
    ids: np.ndarray
    old_codes: np.ndarray | None = None


class Queue(nn.Module):
    """Codes of past documents, as more negatives; `encoder` makes them.

    With momentum the encoder is a copy of the head that follows it slowly.
    """

    def __init__(self, head: Head, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder = copy.deepcopy(head).requires_grad_(False) if momentum else None
        width = head.decoder.in_features
        self.register_buffer("codes", torch.zeros(size, width))
        self.register_buffer("ids", torch.full((size,), -1))
        self.codes: Tensor
        self.ids: Tensor

    def filled(self) -> tuple[Tensor, Tensor] | None:
        """Codes and ids held so far."""
        here = self.ids >= 0
        return (self.codes[here], self.ids[here]) if bool(here.any()) else None

    @torch.no_grad()
    def encode(self, head: Head, documents: Tensor) -> Tensor | None:
        """Codes of the slow copy, after it has moved; None where there is none."""
        if self.encoder is None:
            return None
        for slow, fast in zip(self.encoder.parameters(), head.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)
        return self.encoder(documents)

    @torch.no_grad()
    def push(self, codes: Tensor, ids: Tensor) -> None:
        """Put a batch in front; the oldest drop out."""
        self.codes.copy_(torch.cat([codes, self.codes])[: len(self.codes)])
        self.ids.copy_(torch.cat([ids, self.ids])[: len(self.ids)])


def contrast(codec: BEBR, head: Head, pairs: Pairs) -> None:
    """Make each query's code pick the code of its own document from the hardest others."""
    device = resolve_device(codec.device)
    queries, documents = (torch.from_numpy(a).to(device) for a in (pairs.queries, pairs.documents))
    ids = torch.from_numpy(pairs.ids).to(device)
    old = None if pairs.old_codes is None else torch.from_numpy(pairs.old_codes).to(device)
    nce = partial(info_nce, temperature=codec.temperature, hardest=HARDEST)
    queue = Queue(head, codec.queue, codec.momentum) if codec.queue else None
    model = nn.ModuleList([head] if queue is None else [head, queue])

    def loss(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        query, document, own = head(queries[rows]), head(documents[rows]), ids[rows]
        past = queue.filled() if queue is not None else None
        more: Any = {} if past is None else {"queue": past[0], "queue_ids": past[1]}
        total = nce(query, document, ids=own, **more)
        if old is not None:
            total = total + nce(query, old[rows], ids=own)
        if queue is not None:
            slow = queue.encode(head, documents[rows])
            queue.push(document.detach() if slow is None else slow, own)
        return total

    if codec.steps:
        optimise(codec, model, loss, len(ids), rate=5e-4)


def float_control(
    codec: BEBR, queries: np.ndarray, documents: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """What the loss of `contrast` does without any bits: the first network of a codec, trained
    as its head would be, as a function from (n, d) rows to (n, m) floats."""
    queries, documents = unit(queries), unit(documents)
    start = rotation_start(
        documents, codec.dims or len(documents[0]), 0, centred=False, seed=codec.seed
    )
    head = made(codec, documents.shape[1], start, binary=False)
    contrast(codec, head, Pairs(queries, documents, np.arange(len(queries))))

    @torch.no_grad()
    def transform(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = head.eval()(torch.from_numpy(unit(x))).numpy()
        return found

    return transform
