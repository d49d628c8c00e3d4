"""The end-to-end side of `relative_representations`: anchors inside a network. Needs torch.

A model is an encoder, the projection on its anchors, and a decoder that sees nothing else. Two
models with the same anchors can exchange their decoders without any training (`stitch`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.devices import resolve_device
from fewbits.core.errors import FewbitsError
from fewbits.core.training import History, train
from fewbits.primitives.straight_through import round_through


def similarities(z: Tensor, anchors: Tensor, similarity: str = "cosine") -> Tensor:
    """(b, K) similarities of latents (b, d) with anchors (K, d), as the codec of that name has
    them. O(b·K·d), and for ``basis`` O(K·d·min(K, d))."""
    if similarity == "euclidean":
        return -torch.cdist(z, anchors)
    if similarity == "inner":
        return z @ anchors.T / z.shape[1] ** 0.5
    if similarity == "basis":
        return z @ torch.linalg.pinv(anchors)
    if similarity != "cosine":
        raise FewbitsError(f"similarity={similarity!r} must be cosine, euclidean, inner or basis")
    return functional.normalize(z, dim=1) @ functional.normalize(anchors, dim=1).T


class RelativeLayer(nn.Module):
    """An encoder whose output is the similarities to anchors, through a LayerNorm.

    The anchors are embedded anew with the current weights at every step of training, without a
    gradient: it reaches the encoder through the batch alone. In evaluation they are embedded
    once; `train`, moving the module and loading weights drop what was kept. Anchors and batch go
    through the encoder in two calls, so that neither sees the other's batch statistics.

    Parameters
    ----------
    encoder : maps inputs (b, …) to latents (b, d).
    anchors : (K, …) inputs of the anchors.
    ids : their K names, or None for a checksum of the inputs. Where two encoders take the anchors
        in different forms (another language, another modality), equal names say that they
        correspond.
    similarity : ``cosine``, ``euclidean``, ``inner`` or ``basis``.
    bits : round cosines to 2^bits even steps over [−1, 1], with gradients that pass straight
        through; None for floats.
    norm : LayerNorm over the K similarities. Cosines sit in a narrow band: without it, training
        is slow.

    Raises
    ------
    FewbitsError
        No anchors, names that are not one per anchor, or `bits` for what is not a cosine.
    """

    def __init__(
        self,
        encoder: nn.Module,
        anchors: Tensor,
        *,
        ids: Sequence[str | int] | None = None,
        similarity: str = "cosine",
        bits: int | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if len(anchors) < 1 or (ids is not None and len(ids) != len(anchors)):
            names = "none" if ids is None else len(ids)
            raise FewbitsError(
                f"a relative layer needs anchors and a name for each: {len(anchors)}, {names} named"
            )
        if bits is not None and (similarity != "cosine" or not 1 <= bits <= 8):
            raise FewbitsError(f"{bits=}: take 1 to 8, and only with similarity=cosine")
        self.encoder = encoder
        self.anchors: Tensor
        self.register_buffer("anchors", anchors.detach().clone())
        self.similarity, self.bits = similarity, bits
        self.norm = nn.LayerNorm(len(anchors)) if norm else nn.Identity()
        names = inputs_of(anchors) if ids is None else json.dumps([str(name) for name in ids])
        self.checksum = hashlib.sha256(names.encode()).hexdigest()
        self._kept: Tensor | None = None
        self.register_load_state_dict_post_hook(after_loading)

    def _drop(self) -> None:
        self._kept = None

    def train(self, mode: bool = True) -> Self:
        self._drop()
        return super().train(mode)

    def _apply(self, *given: Any, **options: Any) -> Self:
        self._drop()
        return super()._apply(*given, **options)

    def anchor_latents(self) -> Tensor:
        """(K, d) latents of the anchors: of the current weights in training, else kept."""
        if self._kept is not None and not self.training:
            return self._kept
        with torch.no_grad():
            latents: Tensor = self.encoder(self.anchors)
        if not self.training:
            self._kept = latents
        return latents

    def relative(self, x: Tensor) -> Tensor:
        """(b, K) similarities of a batch of inputs, before the LayerNorm."""
        r = similarities(self.encoder(x), self.anchor_latents(), self.similarity)
        if self.bits is None:
            return r
        steps = (2**self.bits - 1) / 2
        return round_through((r + 1) * steps) / steps - 1

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.relative(x))
        return normed


def after_loading(layer: Any, keys: object) -> None:
    """Loaded weights place the anchors elsewhere."""
    layer._drop()


def inputs_of(anchors: Tensor) -> str:
    """What names anchors that have no names: their values."""
    values = anchors.detach().cpu().contiguous()
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return json.dumps([str(values.dtype), list(values.shape), digest])


class RelativeModel(nn.Module):
    """A `RelativeLayer`, and a decoder (or classifier) that maps its (b, K) to an output.

    The further arguments are those of `RelativeLayer`.
    """

    def __init__(
        self, encoder: nn.Module, anchors: Tensor, decoder: nn.Module, **options: Any
    ) -> None:
        super().__init__()
        self.layer = RelativeLayer(encoder, anchors, **options)
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.layer(x))
        return decoded


class Stitched(nn.Module):
    """The encoder (and anchors) of one model before the LayerNorm and decoder of another."""

    def __init__(self, encoder: RelativeModel, decoder: RelativeModel) -> None:
        super().__init__()
        self.encoding, self.decoding = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.decoding.decoder(
            self.decoding.layer.norm(self.encoding.layer.relative(x))
        )
        return decoded


def stitch(encoder: RelativeModel, decoder: RelativeModel) -> Stitched:
    """A model from the encoder of one and the decoder of another; nothing is trained or copied.

    In evaluation mode. It is not without loss: two nets place things only about alike.

    Raises
    ------
    FewbitsError
        The two were not built with the same anchors in the same order, or measure similarity
        differently.
    """
    one, other = encoder.layer, decoder.layer
    if one.checksum != other.checksum:
        raise FewbitsError(
            "these models have different anchors and cannot be stitched; build both with the same "
            "anchors in the same order, or give their common ids"
        )
    if one.similarity != other.similarity:
        raise FewbitsError(
            f"these models cannot be stitched: similarity is {one.similarity} and "
            f"{other.similarity}; build both alike"
        )
    return Stitched(encoder, decoder).eval()


def train_model(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    gradient_clip: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> History:
    """Train any model that maps a batch of inputs to outputs, by Adam; see `training.train`.

    Parameters
    ----------
    inputs, targets : (n, …) each.
    objective : scalar loss of (b, …) outputs and targets.

    Raises
    ------
    FewbitsError
        Inputs and targets that do not pair up, and whatever `training.train` raises.
    """
    if len(inputs) != len(targets):
        raise FewbitsError(f"{len(inputs)} inputs and {len(targets)} targets do not pair up")
    there = resolve_device(device)
    inputs, targets = inputs.to(there), targets.to(there)

    def loss(rows: Tensor) -> Tensor:
        rows = rows.to(there)
        return objective(model(inputs[rows]), targets[rows])

    return train(
        model,
        loss,
        len(inputs),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=learning_rate),
        seed=seed,
        device=there,
        gradient_clip=gradient_clip,
        progress=progress,
    )
