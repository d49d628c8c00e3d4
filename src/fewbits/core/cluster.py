"""The same work on a Ray cluster: shards through Ray Data, methods as Ray tasks.

Ray is started on this machine where no cluster is found (``RAY_ADDRESS``, or one that was started
here), and left alone where the user has started it already. Every machine needs fewbits.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fewbits.core.errors import FewbitsError, require
from fewbits.core.progress import Steps
from fewbits.core.workers import Task

BROKEN = (
    "a worker on the cluster failed ({}); finished parts are kept: run the same command again to "
    "go on"
)


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """The module ``ray``, connected to a cluster for the length of a ``with`` block.

    Raises
    ------
    MissingExtraError
        Ray is not installed.
    FewbitsError
        The cluster cannot be reached.
    """
    ray = require("ray", "cluster")
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise FewbitsError(f"Ray cannot be started or reached: {first_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def first_line(error: BaseException) -> str:
    """What went wrong, without the stack that Ray puts around it."""
    error = getattr(error, "cause", None) or error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def is_of_ray(error: Exception) -> bool:
    """Whether Ray itself raised it, and not what it runs: a worker or a machine was lost."""
    return type(error).__module__.partition(".")[0] == "ray"


# -- shards --------------------------------------------------------------------------------


def run_task(row: dict[str, Any], function: Task) -> dict[str, Any]:
    """Run one task in a process of the cluster, and say what went wrong, if anything did."""
    try:
        function(row["task"], Steps())
    except FewbitsError as error:
        return {"number": row["number"], "error": str(error)}
    return {"number": row["number"], "error": ""}


def run_on_ray(function: Task, tasks: Sequence[Any], workers: int | None) -> Iterator[int]:
    """Run ``function(task, steps)`` on the cores of a Ray cluster (or on `workers` of them).

    Gives the number of each task when it is done. A machine that is lost has its tasks run again
    elsewhere, as Ray Data does.

    Raises
    ------
    FewbitsError
        What a task raises, or a worker that is lost for good.
    """
    with connected():
        data = require("ray.data", "cluster")
        quiet(data)
        rows = [{"number": number, "task": task} for number, task in enumerate(tasks)]
        # A shard is a block of its own: otherwise one worker would get many of them at a time.
        done = data.from_items(rows, override_num_blocks=len(rows)).map(
            run_task, fn_kwargs={"function": function}, num_cpus=1, concurrency=workers
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise FewbitsError(row["error"])
                yield int(row["number"])
        except Exception as error:
            if not is_of_ray(error):
                raise
            raise FewbitsError(BROKEN.format(first_line(error))) from None


def quiet(data: Any) -> None:
    """Leave standard error to our own progress bar."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


# -- methods -------------------------------------------------------------------------------


def map_on_ray(
    function: Callable[..., Any], items: Sequence[Any], *shared: Any
) -> Iterator[tuple[int, Any]]:
    """Run ``function(item, *shared)`` for each item as a Ray task on one core.

    What is `shared` is sent once to each machine. Gives (number of the item, result) as they are
    ready.

    Raises
    ------
    FewbitsError
        A task was lost. What a task raises is raised here.
    """
    with connected() as ray:
        held = [ray.put(one) for one in shared]
        remote = ray.remote(num_cpus=1)(function)
        numbers = {remote.remote(item, *held): number for number, item in enumerate(items)}
        waiting = list(numbers)
        try:
            while waiting:
                (ready,), waiting = ray.wait(waiting, num_returns=1)
                yield numbers[ready], ray.get(ready)
        except Exception as error:
            if not is_of_ray(error):
                raise
            raise FewbitsError(f"a worker on the cluster failed: {first_line(error)}") from None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
