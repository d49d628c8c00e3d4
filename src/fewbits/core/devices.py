"""Which device to compute on, its randomness, and how several processes work as one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fewbits.core.errors import FewbitsError, require


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use: `device`, or with None or ``auto`` the first of cuda, mps, cpu there is.

    Raises
    ------
    FewbitsError
        A device that torch does not know or that is not there.
    """
    if device is None or device == "auto":
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = next((name for name, available in here.items() if available), "cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise FewbitsError(f"device {device} cannot be used here; try device=cpu") from None
    return found


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together: usually this one alone.

    Attributes
    ----------
    device : where this process computes.
    index, count : which process this is, and how many there are.
    """

    device: torch.device
    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.index == 0

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of every process's `tensor`."""
        if self.count == 1:
            return tensor
        averaged: torch.Tensor = require("accelerate.utils", "torch").reduce(tensor, "mean")
        return averaged

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        if self.count == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of process 0."""
        if self.count > 1:
            broadcast = require("accelerate.utils", "torch").broadcast
            for tensor in tensors:
                # The copy receives: a tensor that others view must keep its memory.
                tensor.data.copy_(broadcast(tensor.detach().clone()))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes, in one message.

        A parameter that a process's loss did not reach counts as a gradient of zero there.
        """
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            parameter.grad = gradient.copy_(part.reshape(gradient.shape))


def join_processes(device: str | torch.device | None = None) -> Processes:
    """This process alone, or all that ``accelerate launch`` (or ``torchrun``) started.

    Several processes talk through `accelerate`, each on a device of its own (NCCL on GPUs,
    Gloo on CPUs).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(resolve_device(device))
    on_cpu = resolve_device(device).type == "cpu"
    state = require("accelerate", "torch").PartialState(cpu=on_cpu)
    return Processes(state.device, state.process_index, state.num_processes)


def mix(*numbers: int) -> int:
    """A seed that depends on all `numbers` (non-negative), and is unlike that of others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def reseed(device: torch.device, *numbers: int) -> None:
    """Seed torch's generators of the CPU and of `device`."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch's generators inside the block, and put them back after it."""
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=device.type):
        reseed(torch.device(device.type, *devices), seed)
        yield
