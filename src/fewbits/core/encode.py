"""The verb ``encode``: choose a codec, learn it, and encode a collection block by block."""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core import container, parts
from fewbits.core.checks import check_seed
from fewbits.core.code import Code, join
from fewbits.core.codec import Codec, from_spec, pack_state
from fewbits.core.collection import (
    CODEC_FILE,
    Encoded,
    describe_collection,
    describe_source,
    load,
    part_file,
)
from fewbits.core.compare import FIT_ROWS, check_engine
from fewbits.core.errors import FewbitsError
from fewbits.core.locations import is_shared, is_url, local_path
from fewbits.core.progress import Steps, progress
from fewbits.core.readers import open_source
from fewbits.core.search import check_metric
from fewbits.core.source import Source
from fewbits.core.wish import Request, check_wish, choose
from fewbits.core.workers import check_workers, map_in_threads, run_in_processes

FIT_BYTES = 192 * 2**20
"""A codec is learned from a sample of at most so many float bytes."""
PROCESS_BYTES = 512 * 2**20
"""Less float bytes are encoded before other processes would have started."""


def encode(
    x: Any,
    output: str | Path | None = None,
    *,
    method: str | Codec | None = None,
    keep: dict[str, float] | None = None,
    at_most: float | None = None,
    ratio: float | None = None,
    queries: Any = None,
    metric: str = "cosine",
    column: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    engine: str = "local",
    workers: int | None = None,
    show_progress: bool = False,
) -> Encoded:
    """Make a collection small.

    Give at most one of `method`, `keep`, `at_most` and `ratio`; with the last three, methods
    are compared first on a sample, and the cheapest (or the best) is taken, among those whose
    codes and codec together are smaller than the input. Without any, ``recall@10`` is kept at
    0.95.

    Parameters
    ----------
    x : vectors (n, d) or sets of vectors: an array, or anything `readers.open_source` opens.
    output : ``.fewbits`` file to write, or a directory of parts when `x` is a directory of
        shards (or a pattern, or a URL, of several). A directory left unfinished is gone on
        with. None keeps the codes in memory.
    method : spec string, or a codec; a fitted one is used as it is, another one is copied.
    keep : quality to keep, for example ``{"recall@10": 0.95}``.
    at_most : bytes per item to stay within.
    ratio : how many times smaller than the input to become.
    queries : real queries to choose by; None holds out rows.
    column : array or column to read, where there are several; in the queries too.
    seed : of the samples to learn from and to choose by.
    metric : ``cosine`` (rows are scaled to unit length), ``ip`` or ``l2``.
    overwrite : replace an output that exists.
    engine : ``local``, or ``ray`` to encode shards on a Ray cluster whose machines share the
        folder of `output`. The codes are the same.
    workers : how many blocks or shards are encoded at a time; None is one for each core.

    Raises
    ------
    FewbitsError
        Unusable input or options, or a wish that no method meets.
    """
    check_metric(metric)
    seed = check_seed(seed)
    check_engine(engine)
    threads = check_workers(workers)
    check_wish(method, keep, at_most, ratio, queries)
    source = open_source(x, column=column)
    if source.takes == "sets" and metric == "l2":
        raise FewbitsError("sets of vectors are compared by inner products; choose cosine or ip")
    wish = {"keep": keep, "at_most": at_most, "ratio": ratio, "queries": queries, "column": column}
    request = Request(method, wish, metric, seed, overwrite, engine, workers, show_progress)
    if engine == "ray":
        check_shards(source, output)
    if output is not None:
        if is_url(output):
            raise FewbitsError(f"{output} is a URL; write to a local or mounted folder")
        output = Path(output)
        refuse_input(x, source, output)
        if len(source.parts) > 1:
            return encode_parts(source, output, request)
        container.refuse_existing(output, overwrite)
    codec = fitted_codec(source, request)
    with progress("encoding", source.rows, show=show_progress) as bar:
        if output is None:
            codes = list(encode_blocks(codec, source, metric, bar, threads))
            return Encoded(codec, [join(codes)], metric, describe_source(source))
        about = describe_collection(codec, metric, describe_source(source))
        layout = output, "encoded", about, overwrite
        write_codes(layout, codec, source, metric, bar, threads)
    return load(output)


def check_shards(source: Source, output: str | Path | None) -> None:
    """Refuse what a cluster cannot work on: it reads shards, and writes parts."""
    if output is None:
        raise FewbitsError("the engine ray needs an output: a folder that all machines share")
    if len(source.parts) < 2:
        raise FewbitsError(
            f"the engine ray encodes shards, but {source.name} is one file; leave --engine out, or "
            "give a directory, a pattern or a URL of several files"
        )
    for part in source.parts:
        if part.location is None or not is_shared(part.location):
            raise FewbitsError(f"no other process can read {part.name}; write it to a file first")


def refuse_input(x: Any, source: Source, output: Path) -> None:
    """The output must not take the place of the input, whatever --overwrite says."""
    if not isinstance(x, (str, Path)):
        return
    locations = [str(local_path(x)), *(part.location or "" for part in source.parts)]
    with container.clear_errors(output):
        for file in (Path(location) for location in locations if not is_url(location)):
            if output.exists() and file.exists() and output.samefile(file):
                raise FewbitsError(f"{output} is the input; choose another name for the output")


def fitted_codec(source: Source, request: Request) -> Codec:
    """The codec to encode with, learned from a sample of bounded size."""
    method = request.method
    if method is None:
        method = choose(source, request)
    codec = from_spec(method) if isinstance(method, str) else method
    if codec.takes != source.takes:
        raise FewbitsError(
            f"{codec.spec} takes {codec.takes}, but {source.name} has {source.takes}"
        )
    if hasattr(codec, "dims_"):
        if codec.dims_ != source.dims:
            raise FewbitsError(
                f"{codec.spec} was fitted on {codec.dims_} dimensions, but {source.name} has "
                f"{source.dims}"
            )
        return codec
    per_item = 4 * source.dims * source.vectors / source.rows
    count = max(256, min(FIT_ROWS, int(FIT_BYTES / per_item)))
    sample = source.sample(count, request.seed, normalize=request.metric == "cosine")
    return copy.deepcopy(codec).fit(sample)


def encode_blocks(
    codec: Codec, source: Source, metric: str, bar: Steps, threads: int = 1
) -> Iterator[Code]:
    """Codes of the blocks of a source, in order; `threads` blocks are encoded at a time."""

    def encode_block(block: tuple[Any, np.ndarray]) -> Code:
        return codec.encode(source.checked(*block, metric == "cosine"))

    for code in map_in_threads(encode_block, source.numbered_blocks(), threads):
        yield code
        bar.step(source.name, len(code))


def write_codes(
    layout: tuple[Path, str, dict[str, Any], bool],
    codec: Codec,
    source: Source,
    metric: str,
    bar: Steps,
    threads: int,
) -> None:
    """Encode a source straight into a file; a whole collection brings its codec along.

    `layout` is the path, the kind of file, what it says of itself, and whether to overwrite.
    """
    path, kind, about, overwrite = layout
    learned = pack_state(codec) if kind == "encoded" else {}
    shapes = {
        f"code.{name}": (np.dtype(dtype), (source.rows, *shape))
        for name, (dtype, shape) in codec.code_layout().items()
    }
    shapes |= {name: (array.dtype, array.shape) for name, array in learned.items()}
    with container.Writer(path, kind, about, shapes, overwrite=overwrite) as writer:
        for name, array in learned.items():
            writer.write(name, array)
        for code in encode_blocks(codec, source, metric, bar, threads):
            for name, array in code.arrays.items():
                writer.write(f"code.{name}", array)


# -- directories of parts ------------------------------------------------------------------


def encode_parts(source: Source, folder: Path, request: Request) -> Encoded:
    """Encode every shard into a part of its own; parts that are there already are kept."""
    asked = parts.describe_request(
        source, request.method, request.wish, request.metric, request.seed
    )
    parts.check_folder(folder)
    codec = None if request.overwrite else parts.resume(folder, asked)
    if codec is None:
        codec = fitted_codec(source, request)
        parts.remove_parts(folder)
        about = describe_collection(codec, request.metric, describe_source(source))
        about |= {"parts": [part.name for part in source.parts], "request": asked}
        container.write(folder / CODEC_FILE, "codec", about, pack_state(codec))
    missing = [
        number
        for number, part in enumerate(source.parts)
        if not parts.finished(folder, number, part, codec)
    ]
    if not missing:
        raise FewbitsError(f"{folder} exists already; choose another name or pass --overwrite")
    rows = [part.rows for part in source.parts]
    with progress("encoding", sum(rows), show=request.show_progress) as bar:
        bar.step("", sum(rows) - sum(rows[number] for number in missing))
        encode_missing(source, folder, missing, codec, request, bar)
    return load(folder)


def encode_missing(
    source: Source, folder: Path, missing: list[int], codec: Codec, request: Request, bar: Steps
) -> None:
    """Encode the shards `missing`: here, in processes of this machine, or on Ray."""
    workers = check_workers(request.workers)
    processes = min(workers, len(missing))
    if request.engine == "local" and not worth_processes(source, missing, processes):
        for number in missing:
            part = source.parts[number]
            write_part(folder, number, part, codec, request.metric, bar, workers)
        return
    threads = 1 if request.engine == "ray" else workers // processes
    tasks = [
        PartTask.of(source.parts[number], str(folder.resolve()), number, request.metric, threads)
        for number in missing
    ]
    try:
        for place in finished_tasks(tasks, request, processes):
            bar.step(tasks[place].name, tasks[place].rows)
    finally:
        parts.remove_leftovers(folder)


def finished_tasks(tasks: list[PartTask], request: Request, processes: int) -> Iterator[int]:
    """Run the tasks on other processes; gives the place of each when it is done."""
    if request.engine == "local":
        return run_in_processes(encode_part, tasks, processes)
    from fewbits.core.cluster import run_on_ray

    return run_on_ray(encode_part, tasks, request.workers)


def worth_processes(source: Source, missing: list[int], processes: int) -> bool:
    """Whether shards are better encoded by other processes, which take a second to start."""
    shards = [source.parts[number] for number in missing]
    reachable = all(part.location and is_shared(part.location) for part in shards)
    size = sum(4 * part.vectors * part.dims for part in shards)
    return processes > 1 and reachable and size >= PROCESS_BYTES


def write_part(
    folder: Path, number: int, part: Source, codec: Codec, metric: str, bar: Steps, threads: int
) -> None:
    about = parts.describe_part(number, part, codec)
    layout = part_file(folder, number), "part", about, True
    write_codes(layout, codec, part, metric, bar, threads)


@dataclass(frozen=True)
class PartTask:
    """All that another process must know to encode a shard."""

    folder: str
    number: int
    location: str
    column: str | None
    name: str
    rows: int
    metric: str
    threads: int

    @classmethod
    def of(cls, part: Source, folder: str, number: int, metric: str, threads: int) -> PartTask:
        location = str(part.location)
        return cls(folder, number, location, part.column, part.name, part.rows, metric, threads)


def encode_part(task: PartTask, bar: Steps) -> None:
    """Encode one shard, in whatever process, on whatever machine.

    Raises
    ------
    FewbitsError
        The folder or the shard is not there, or the shard is another one by now.
    """
    folder = Path(task.folder)
    if not (folder / CODEC_FILE).exists():
        raise FewbitsError(
            f"{folder} is not seen by the worker on {platform.node()}; the output must be a folder "
            "that all machines share"
        )
    part = open_source(task.location, column=task.column)
    if part.rows != task.rows:
        raise FewbitsError(f"{task.name} was changed while it was encoded; run the command again")
    codec = read_codec(folder / CODEC_FILE, (folder / CODEC_FILE).stat().st_mtime_ns)
    write_part(folder, task.number, part, codec, task.metric, bar, task.threads)


@functools.lru_cache(maxsize=1)
def read_codec(file: Path, written: int) -> Codec:
    """The codec of a directory, read once by each worker; `written` tells a newer file."""
    codec: Codec = Codec.load(file)
    return codec
