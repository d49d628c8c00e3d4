"""Learning rates over the course of a training run, as `training.train` takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fewbits.core.errors import FewbitsError

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
"""Makes a scheduler that is stepped after every batch, from the optimizer and the step count."""


# Objects rather than closures: a scheduler's state then holds their numbers, and a checkpoint
# of another schedule is told apart.
@dataclass
class WarmupCosine:
    rising: int
    steps: int
    final: float

    def __call__(self, step: int) -> float:
        if step < self.rising:
            return (step + 1) / self.rising
        done = min(1.0, (step - self.rising) / max(1, self.steps - self.rising))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass
class StepDecay:
    drops: list[int]
    factor: float

    def __call__(self, step: int) -> float:
        return float(self.factor ** sum(step >= drop for drop in self.drops))


def warmup_cosine(warmup: float = 0.0, final: float = 0.0) -> SchedulerFactory:
    """Learning rate up in a line, then down along half a cosine.

    Parameters
    ----------
    warmup : share of all steps in which the rate rises to that of the optimizer.
    final : share of the optimizer's rate that the cosine ends at.
    """
    if not 0 <= warmup < 1 or final < 0:
        raise FewbitsError(f"warmup_cosine: {warmup=}, {final=}; choose 0 ≤ warmup < 1, final ≥ 0")
    return lambda optimizer, steps: LambdaLR(
        optimizer, WarmupCosine(round(warmup * steps), steps, final)
    )


def step_decay(*at: float, factor: float = 0.1) -> SchedulerFactory:
    """Learning rate times `factor` at each of the shares `at` of all steps.

    ``step_decay(0.6)`` divides it by ten after 6 of 10 epochs.
    """
    if not all(0 < share < 1 for share in at) or factor <= 0:
        raise FewbitsError(f"step_decay: {at=}, {factor=}; choose 0 < at < 1 and factor > 0")
    return lambda optimizer, steps: LambdaLR(
        optimizer, StepDecay([round(share * steps) for share in at], factor)
    )
