"""Small networks that learned codecs are made of."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval


def mlp(inputs: int, outputs: int, *, hidden: int = 0, blocks: int = 1) -> nn.Sequential:
    """`blocks` × (Linear, BatchNorm, ReLU), then Linear; with ``blocks=0`` just Linear.

    Maps (n, inputs) to (n, outputs) float32. Weights start Xavier-normal and biases at zero,
    drawn from torch's global generator. O(inputs·h + blocks·h² + h·outputs) for each row, with
    h = `hidden`.

    Raises
    ------
    ValueError
        A width below 1 that is needed, or a negative number of blocks.
    """
    if min(inputs, outputs) < 1 or blocks < 0 or (blocks > 0 and hidden < 1):
        raise ValueError(f"no network has {inputs=}, {outputs=}, {hidden=}, {blocks=}")
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [_linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        inputs = hidden
    return nn.Sequential(*layers, _linear(inputs, outputs))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def fold_batch_norm(network: nn.Sequential) -> nn.Sequential:
    """A copy of `network` in evaluation mode, each BatchNorm folded into the Linear before it.

    It computes what `network` computes in evaluation mode, up to rounding, with two thirds of
    its layers. O(parameters).

    Raises
    ------
    ValueError
        A BatchNorm that does not follow a Linear, or that has no statistics or no scale.
    """
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(network).eval():
        if not isinstance(layer, nn.BatchNorm1d):
            layers.append(layer)
            continue
        if not layers or not isinstance(layers[-1], nn.Linear):
            raise ValueError("a BatchNorm can only be folded into a Linear right before it")
        if layer.running_var is None or layer.weight is None:
            raise ValueError("a BatchNorm without running statistics or scale cannot be folded")
        layers[-1] = fuse_linear_bn_eval(layers[-1], layer)
    return nn.Sequential(*layers).eval()
