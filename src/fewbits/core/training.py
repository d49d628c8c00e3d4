"""The one training loop: seeded, resumable, on any device, with a progress bar.

For example, pairs of (n, 384) tensors mapped closer together::

    with seeded(7):
        model = mlp(384, 128, hidden=256)
    history = train(
        model,
        lambda rows: info_nce(model(queries[rows]), model(documents[rows])),
        len(queries),
        epochs=20,
        batch_size=512,
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        scheduler=warmup_cosine(0.05),
        seed=7,
    )
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fewbits.core.checkpoint import damaged, pack, read_checkpoint, write_checkpoint
from fewbits.core.devices import Processes, join_processes, mix, reseed, seeded
from fewbits.core.errors import FewbitsError
from fewbits.core.progress import Steps
from fewbits.core.progress import progress as progress_bar
from fewbits.core.schedules import SchedulerFactory

Loss = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes the optimizer of these parameters, for example ``partial(torch.optim.Adam, lr=1e-3)``."""


@dataclass
class History:
    """What a training run did.

    Attributes
    ----------
    loss : mean loss over the rows of each epoch.
    terms : the same for each named term, when the loss gives several.
    steps : optimizer steps taken, including those before an interruption.
    seconds : time spent, including that before an interruption.
    resumed_at : the step this call began at; 0 unless it found a checkpoint.
    """

    loss: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    resumed_at: int = 0


Callback = Callable[[int, History], None]


def train(
    model: nn.Module,
    loss: Loss,
    rows: int,
    *,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer | OptimizerFactory,
    scheduler: SchedulerFactory | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    gradient_clip: float | None = None,
    drop_last: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    identity: str = "",
    progress: bool = False,
    callback: Callback | None = None,
) -> History:
    """Minimise `loss` over `rows` items by shuffled batches.

    The model is moved to `device`, trained in training mode, and left there in evaluation
    mode. The same seed gives the same weights, bit for bit on a CPU; randomness inside the
    loss (dropout, noise from torch's global generators) is seeded anew at every step, and the
    caller's generators are afterwards as they were.

    With `checkpoint`, the state is written there every `checkpoint_seconds` and at Ctrl-C,
    and a later call with the same arguments goes on from it to exactly the weights an
    uninterrupted run gives. What the loss remembers between batches must therefore be in
    buffers of the model. The file is removed when training is done.

    Started by ``accelerate launch``, several processes share each batch and average their
    gradients; batch normalisation and in-batch negatives then see a process's share of it,
    and buffers follow process 0.

    Parameters
    ----------
    loss : gets a batch of row numbers, (b,) int64 on the CPU (they index NumPy arrays and
        tensors on any device), and gives a scalar, or several by name that are added up.
    rows : how many items there are; the row numbers are 0..rows-1.
    batch_size : rows per step over all processes; more than `rows` means all of them.
    optimizer : one that is made already, or a function that makes it from the model's
        trainable parameters.
    scheduler : a function that makes a learning-rate scheduler from the optimizer and the
        number of steps, such as `warmup_cosine` and `step_decay` in `schedules` give; it is
        stepped after every batch.
    device : by default the first of cuda, mps, cpu that is there.
    gradient_clip : largest length of the gradient of all parameters together.
    drop_last : leave out the smaller batch at the end of each epoch.
    identity : what else the run depends on (a spec, a digest of the data); a checkpoint of
        another identity is refused.
    progress : show a progress bar, if the standard error is a terminal.
    callback : called after each epoch with its number, from 1, and the history so far.

    Raises
    ------
    FewbitsError
        Numbers out of range, a loss or weight that is not finite, or a checkpoint that is
        damaged or belongs to another run.
    """
    processes = join_processes(device)
    plan = Plan(rows, epochs, batch_size, drop_last, seed, processes.index, processes.count)
    model.to(processes.device)
    run = Run(model, loss, plan, processes, optimizer, scheduler, gradient_clip)
    keeper = None
    if checkpoint is not None:
        keeper = Keeper(Path(checkpoint), run, run.settings(identity), checkpoint_seconds)
    with (
        seeded(seed, processes.device),
        torch.enable_grad(),
        held_interrupts(keeper is not None) as interrupted,
        progress_bar("training", plan.steps, show=progress and processes.main) as bar,
    ):
        if keeper is not None:
            keeper.resume()
        processes.share([*model.parameters(), *model.buffers()])
        try:
            go_on(run, keeper, interrupted, bar, callback)
        except NotFiniteError:
            if keeper is not None:
                keeper.remove()  # it would lead here again
            raise
    run.optimizer.zero_grad(set_to_none=True)
    model.eval()
    if keeper is not None:
        keeper.remove()
    return run.history


def go_on(
    run: Run,
    keeper: Keeper | None,
    interrupted: threading.Event,
    bar: Steps,
    callback: Callback | None,
) -> None:
    """Train from where `run` stands to its end."""
    bar.step(count=run.history.steps)
    while not run.done:
        epoch_ended = run.advance()
        bar.step(run.where)
        if epoch_ended and callback is not None:
            try:
                callback(len(run.history.loss), run.history)
            except KeyboardInterrupt:
                interrupted.set()
        leave = run.processes.any(interrupted.is_set())
        if keeper is not None:
            keeper.keep(now=leave)
        if leave:
            raise KeyboardInterrupt
    if not all(bool(parameter.isfinite().all()) for parameter in run.parameters):
        # The last step did it, after the last look at the loss.
        raise NotFiniteError("training: a weight became infinite; lower the learning rate")


class NotFiniteError(FewbitsError):
    """The loss or the weights became NaN or infinite."""


@dataclass(frozen=True)
class Plan:
    """Which rows each step of a run sees: a function of the seed alone."""

    rows: int
    epochs: int
    batch_size: int
    drop_last: bool
    seed: int
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        least = {"rows": 1, "epochs": 0, "batch_size": 1, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise FewbitsError(
                    f"training: {name}={getattr(self, name)}; it must be at least {lowest}"
                )
        if self.batch_size % self.processes or self.rows < self.processes:
            raise FewbitsError(
                f"training: batch_size={self.batch_size} of {self.rows} rows cannot be shared "
                f"equally by {self.processes} processes; choose a multiple of {self.processes}"
            )
        whole = self.rows // self.processes * self.processes
        object.__setattr__(self, "batch_size", min(self.batch_size, whole))

    @property
    def rows_per_epoch(self) -> int:
        """Rows seen in one epoch: every process must get equally many."""
        unit = self.batch_size if self.drop_last else self.processes
        return self.rows // unit * unit

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def order(self, epoch: int) -> Tensor:
        """(rows_per_epoch,) int64: the rows of `epoch`, shuffled."""
        generator = torch.Generator().manual_seed(mix(self.seed, 1, epoch))
        return torch.randperm(self.rows, generator=generator)[: self.rows_per_epoch]

    def share(self, order: Tensor, batch: int) -> Tensor:
        """This process's rows of a batch."""
        start = batch * self.batch_size
        return order[start : start + self.batch_size][self.process :: self.processes]


class Run:
    """A model in training, and everything that decides how it goes on."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        plan: Plan,
        processes: Processes,
        optimizer: Optimizer | OptimizerFactory,
        scheduler: SchedulerFactory | None,
        gradient_clip: float | None,
    ) -> None:
        self.model, self.loss, self.plan, self.processes = model, loss, plan, processes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise FewbitsError("training: the model has no trainable parameters")
        if gradient_clip is not None and gradient_clip <= 0:
            raise FewbitsError(f"training: gradient_clip={gradient_clip}; it must be positive")
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(self.parameters)
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else scheduler(optimizer, plan.steps)
        self.gradient_clip = gradient_clip
        self.history = History()
        self.order = plan.order(0)
        self.start_epoch()

    def start_epoch(self) -> None:
        self.seen, self.sums = 0, dict[str, float]()
        self.model.train()  # a callback may have left it in evaluation mode

    @property
    def done(self) -> bool:
        return self.history.steps >= self.plan.steps

    @property
    def means(self) -> dict[str, float]:
        """Mean of each term of the loss over the rows of this epoch so far."""
        return {name: total / self.seen for name, total in self.sums.items()}

    @property
    def where(self) -> str:
        """Epoch, loss and pace, for people."""
        epoch = (self.history.steps - 1) // self.plan.steps_per_epoch + 1
        rate = self.history.steps / max(self.history.seconds, 1e-9)
        loss = sum(self.means.values())
        return f"epoch {epoch}/{self.plan.epochs}, loss {loss:.4g}, {rate:.1f} steps/s"

    def advance(self) -> bool:
        """Take one step; True when it ended an epoch."""
        started = time.monotonic()
        epoch, batch = divmod(self.history.steps, self.plan.steps_per_epoch)
        if batch == 0:
            self.start_epoch()
            self.order = self.plan.order(epoch)
        rows = self.plan.share(self.order, batch)
        for name, value in self.update(rows).items():
            self.sums[name] = self.sums.get(name, 0.0) + value * len(rows)
        self.seen += len(rows)
        self.history.steps += 1
        self.history.seconds += time.monotonic() - started
        if batch + 1 < self.plan.steps_per_epoch:
            return False
        self.history.loss.append(sum(self.means.values()))
        for name, mean in self.means.items():
            if name:
                self.history.terms.setdefault(name, []).append(mean)
        return True

    def update(self, rows: Tensor) -> dict[str, float]:
        """One optimizer step; the terms of the loss, named "" when there is but one."""
        step = self.history.steps
        reseed(self.processes.device, self.plan.seed, 2, step, self.plan.process)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.loss(rows)
        if isinstance(terms, Tensor):
            terms = {"": terms}
        values = torch.stack([term.detach().float() for term in terms.values()])
        numbers = dict(zip(terms, self.processes.mean(values).tolist(), strict=True))
        if not all(map(math.isfinite, numbers.values())):
            epoch = step // self.plan.steps_per_epoch + 1
            rate = self.optimizer.param_groups[0]["lr"]
            raise NotFiniteError(
                f"training: the loss became {sum(numbers.values())} in epoch {epoch} "
                f"(step {step + 1}); lower the learning rate, which is now {rate:.3g}"
            )
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        self.processes.average_gradients(self.parameters)
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip)
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.processes.share(self.model.buffers())
        return numbers

    def settings(self, identity: str) -> dict[str, str]:
        """What must be the same for another run to go on from this one's state."""
        shapes = {k: [str(v.dtype), list(v.shape)] for k, v in self.model.state_dict().items()}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        schedule = self.scheduler and self.scheduler.state_dict()
        settings = asdict(self.plan) | {
            "process": None,  # any of the processes
            "model": [shapes, trained],
            "optimizer": [type(self.optimizer).__name__, self.optimizer.defaults],
            "scheduler": [type(self.scheduler).__name__, schedule],
            "gradient_clip": self.gradient_clip,
            "identity": identity,
        }
        return {name: json.dumps(pack(value, name, {})) for name, value in settings.items()}

    def state(self) -> dict[str, Any]:
        """Where the run stands."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "history": asdict(self.history),
            "epoch": [self.seen, self.sums],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history = History(**state["history"])
        self.history.resumed_at = self.history.steps
        self.seen, self.sums = state["epoch"]
        self.order = self.plan.order(self.history.steps // self.plan.steps_per_epoch)


@dataclass
class Keeper:
    """Keeps the state of `run` in a file, so that it can be continued."""

    path: Path
    run: Run
    settings: dict[str, str]
    seconds: float

    def __post_init__(self) -> None:
        self.written = time.monotonic()

    def resume(self) -> None:
        """Put the run where the file left off; nothing happens when there is no file."""
        processes = self.run.processes
        processes.any(False)  # waits for process 0, which may still be writing the file
        here = self.path.exists()
        if not processes.any(here):
            return
        if processes.any(not here):
            raise FewbitsError(
                f"not every process sees the checkpoint {self.path}; put it on a disk they share"
            )
        state = read_checkpoint(self.path, self.settings)
        try:
            self.run.restore(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise damaged(self.path) from None

    def keep(self, *, now: bool) -> None:
        """Write the file when it is time to, or `now`."""
        due = not self.run.done and time.monotonic() - self.written >= self.seconds
        if self.run.processes.main and (now or due):
            write_checkpoint(self.path, self.settings, self.run.state())
            self.written = time.monotonic()

    def remove(self) -> None:
        if self.run.processes.main:
            self.path.unlink(missing_ok=True)


# -- interruption -----------------------------------------------------------------------------


@contextlib.contextmanager
def held_interrupts(hold: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets instead of raising; a second one raises at once.

    Only where Ctrl-C has its usual meaning, and in the main thread, which is where it arrives.
    """
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not (hold and usual and threading.current_thread() is threading.main_thread()):
        yield interrupted
        return

    def on_interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
