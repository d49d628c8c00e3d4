"""All cores of one machine: threads over blocks, processes over shards.

Every block is computed by one thread alone, whatever the number of workers: matrix libraries
add up in another order when their own threads share a product, and codes must not depend on how
many cores there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from fewbits.core.errors import FewbitsError
from fewbits.core.progress import Steps

T = TypeVar("T")
R = TypeVar("R")
Task = Callable[[Any, Steps], None]
"""What a worker does with its piece of work; it calls `Steps.step` after each block."""


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """The number of workers asked for; None is one for each core.

    Raises
    ------
    FewbitsError
        Not a whole number of at least 1.
    """
    if workers is None:
        return cores()
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise FewbitsError(f"workers must be a whole number of at least 1, not {workers!r}")
    return workers


# -- threads -------------------------------------------------------------------------------


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """``map(function, items)`` in order, with `threads` at work; few items are held at a time.

    Matrix libraries keep to one thread each meanwhile.
    """
    with threadpool_limits(1):
        if threads == 1:
            yield from map(function, items)
            return
        # The limit on OpenMP is one of each thread, so that new threads must be told as well.
        with ThreadPoolExecutor(
            threads, initializer=threadpool_limits, initargs=(1, "openmp")
        ) as pool:
            pending: deque[Future[R]] = deque()
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) > threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


# -- processes -----------------------------------------------------------------------------


def run_in_processes(function: Task, tasks: Sequence[Any], workers: int) -> Iterator[int]:
    """Run ``function(task, steps)`` in new processes; gives the number of each task when done.

    When the caller stops, by an error or by Ctrl-C, the workers stop after the block they are
    at, and clean up.

    Raises
    ------
    FewbitsError
        A worker died. What a task raises is raised here.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(stop,)
    )
    try:
        with main_module_hidden():
            numbers = {pool.submit(work, function, t): number for number, t in enumerate(tasks)}
        for future in as_completed(numbers):
            future.result()
            yield numbers[future]
    except BrokenProcessPool:
        raise FewbitsError(
            "a worker process died (was it out of memory?); finished parts are kept: run the same "
            "command again to go on, with fewer --workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep new processes from running the user's script again.

    They would import it as their main module, and a script that calls fewbits outside of
    ``if __name__ == "__main__"`` would start over in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Stop:
    """In a worker: whether it must stop, and whether it is at work."""

    asked: Any = None
    parent_died = threading.Event()
    busy = threading.Lock()

    @classmethod
    def is_set(cls) -> bool:
        return cls.parent_died.is_set() or bool(cls.asked.is_set())


class StoppableSteps(Steps):
    """Steps of a worker, at which it stops when it is told to."""

    def step(self, what: str = "", count: float = 1) -> None:
        if Stop.is_set():
            raise KeyboardInterrupt


def start_worker(stop: Any) -> None:
    """Set up a new process: Ctrl-C is for its parent, which says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Stop.asked = stop
    # For libraries that are loaded later; those that are loaded already are limited as well.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    threadpool_limits(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """End this process, after it has cleaned up, when the one that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    Stop.parent_died.set()
    with Stop.busy:
        os._exit(1)


def work(function: Task, task: Any) -> None:
    with Stop.busy:
        function(task, StoppableSteps())
