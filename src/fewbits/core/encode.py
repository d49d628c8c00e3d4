"""The verb ``encode``: choose a codec, learn it, and encode a collection block by block."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core import container, frontier
from fewbits.core.checks import check_seed
from fewbits.core.code import join
from fewbits.core.codec import Codec, from_description, from_spec, pack_state
from fewbits.core.collection import (
    CODEC_FILE,
    Encoded,
    describe_collection,
    describe_source,
    load,
    load_part,
    part_file,
)
from fewbits.core.compare import CUTS, FIT_ROWS, TARGET, compare, target_of
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.progress import Steps, progress
from fewbits.core.readers import open_source
from fewbits.core.search import check_metric
from fewbits.core.source import Source

FIT_BYTES = 192 * 2**20
"""A codec is learned from a sample of at most so many float bytes."""
DEFAULT_KEEP = {TARGET: 0.95}
PART_FILES = "part-*.fewbits"


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
        shards. A directory left unfinished is gone on with. None keeps the codes in memory.
    method : spec string, or a codec; a fitted one is used as it is, another one is copied.
    keep : quality to keep, for example ``{"recall@10": 0.95}``.
    at_most : bytes per item to stay within.
    ratio : how many times smaller than the input to become.
    queries : real queries to choose by; None holds out rows.
    column : array or column to read, where there are several; in the queries too.
    seed : of the samples to learn from and to choose by.
    metric : ``cosine`` (rows are scaled to unit length), ``ip`` or ``l2``.
    overwrite : replace an output that exists.

    Raises
    ------
    FewbitsError
        Unusable input or options, or a wish that no method meets.
    """
    check_metric(metric)
    seed = check_seed(seed)
    check_wish(method, keep, at_most, ratio, queries)
    source = open_source(x, column=column)
    if source.takes == "sets" and metric == "l2":
        raise FewbitsError("sets of vectors are compared by inner products; choose cosine or ip")
    wish = {"keep": keep, "at_most": at_most, "ratio": ratio, "queries": queries, "column": column}
    if output is not None:
        output = Path(output)
        refuse_input(x, source, output)
        if len(source.parts) > 1:
            return encode_parts(
                source, output, method, wish, metric, seed, overwrite, show_progress
            )
        container.refuse_existing(output, overwrite)
    codec = fitted_codec(source, method, wish, metric, seed, show_progress)
    with progress("encoding", source.rows, show=show_progress) as bar:
        if output is None:
            codes = list(encode_blocks(codec, source, metric, bar))
            return Encoded(codec, [join(codes)], metric, describe_source(source))
        about = describe_collection(codec, metric, describe_source(source))
        write_codes(output, "encoded", about, codec, source, metric, bar, overwrite=overwrite)
    return load(output)


def check_wish(
    method: Any,
    keep: dict[str, float] | None,
    at_most: float | None,
    ratio: float | None,
    queries: Any,
) -> None:
    given = [value for value in (method, keep, at_most, ratio) if value is not None]
    if len(given) > 1:
        raise FewbitsError("give one of method, keep, at_most (--at-most) and ratio, not several")
    if method is not None and queries is not None:
        raise FewbitsError("queries help to choose a method; leave them out where you name one")
    for name, value in (("at_most", at_most), ("ratio", ratio)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise FewbitsError(f"{name} must be a number above 0, not {value}")
    measured = [f"recall@{cut}" for cut in CUTS]
    for name, value in (keep or {}).items():
        if name not in measured:
            raise FewbitsError(f"{name!r} cannot be kept; choose one of {', '.join(measured)}")
        if not 0 < value <= 1:
            raise FewbitsError(f"{name} must be above 0 and at most 1, not {value}")


def refuse_input(x: Any, source: Source, output: Path) -> None:
    """The output must not take the place of the input, whatever --overwrite says."""
    if not isinstance(x, (str, Path)):
        return
    with container.clear_errors(output):
        for file in (Path(x), *(Path(x) / part.name for part in source.parts)):
            if output.exists() and file.exists() and output.samefile(file):
                raise FewbitsError(f"{output} is the input; choose another name for the output")


def choose(
    source: Source, wish: dict[str, Any], metric: str, seed: int, show_progress: bool
) -> str:
    """Spec string of the codec that meets the wish best on a sample of the collection."""
    compared = compare(
        source,
        wish["queries"],
        metric=metric,
        column=wish["column"],
        seed=seed,
        show_progress=show_progress,
    )
    points = worth_it(compared.points, source)
    at_most = wish["at_most"]
    if wish["ratio"] is not None:
        at_most = source.bytes_per_item / wish["ratio"]
    if at_most is not None:
        return frontier.best(points, at_most, target_of(points)).spec
    return frontier.cheapest(points, wish["keep"] or DEFAULT_KEEP).spec


def worth_it(points: list[Point], source: Source) -> list[Point]:
    """Points whose codes and codec together are smaller than the input; all where none is."""
    whole = source.bytes_per_item * source.rows
    smaller = [p for p in points if p.bytes_per_item * source.rows + p.codec_bytes < whole]
    return smaller or points


def fitted_codec(
    source: Source,
    method: str | Codec | None,
    wish: dict[str, Any],
    metric: str,
    seed: int,
    show_progress: bool,
) -> Codec:
    """The codec to encode with, learned from a sample of bounded size."""
    if method is None:
        method = choose(source, wish, metric, seed, show_progress)
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
    return copy.deepcopy(codec).fit(source.sample(count, seed, normalize=metric == "cosine"))


def encode_blocks(codec: Codec, source: Source, metric: str, bar: Steps) -> Any:
    """Codes of the blocks of a source, in order."""
    for block in source.blocks(normalize=metric == "cosine"):
        yield codec.encode(block)
        bar.step(source.name, len(block))


def write_codes(
    path: Path,
    kind: str,
    about: dict[str, Any],
    codec: Codec,
    source: Source,
    metric: str,
    bar: Steps,
    *,
    overwrite: bool = False,
) -> None:
    """Encode a source straight into a file; a whole collection brings its codec along."""
    learned = pack_state(codec) if kind == "encoded" else {}
    layout = codec.code_layout()
    shapes = {
        f"code.{name}": (np.dtype(dtype), (source.rows, *shape))
        for name, (dtype, shape) in layout.items()
    }
    shapes |= {name: (array.dtype, array.shape) for name, array in learned.items()}
    with container.Writer(path, kind, about, shapes, overwrite=overwrite) as writer:
        for name, array in learned.items():
            writer.write(name, array)
        for code in encode_blocks(codec, source, metric, bar):
            for name, array in code.arrays.items():
                writer.write(f"code.{name}", array)


# -- directories of parts ------------------------------------------------------------------


def encode_parts(
    source: Source,
    folder: Path,
    method: str | Codec | None,
    wish: dict[str, Any],
    metric: str,
    seed: int,
    overwrite: bool,
    show_progress: bool,
) -> Encoded:
    """Encode every shard into a part of its own; parts that are there already are kept."""
    request = describe_request(source, method, wish, metric, seed)
    check_folder(folder)
    codec = None if overwrite else resume(folder, request)
    if codec is None:
        codec = fitted_codec(source, method, wish, metric, seed, show_progress)
        remove_parts(folder)
        about = describe_collection(codec, metric, describe_source(source))
        about |= {"parts": [part.name for part in source.parts], "request": request}
        container.write(folder / CODEC_FILE, "codec", about, pack_state(codec))
    files = [part_file(folder, number) for number in range(len(source.parts))]
    done = [
        finished(file, number, codec, part.rows)
        for number, (file, part) in enumerate(zip(files, source.parts, strict=True))
    ]
    if all(done):
        raise FewbitsError(f"{folder} exists already; choose another name or pass --overwrite")
    with progress("encoding", source.rows, show=show_progress) as bar:
        for number, part in enumerate(source.parts):
            if done[number]:
                bar.step(part.name, part.rows)
                continue
            about = {"codec": codec.digest, "part": number, "source": part.name}
            write_codes(files[number], "part", about, codec, part, metric, bar, overwrite=True)
    return load(folder)


def describe_request(
    source: Source, method: str | Codec | None, wish: dict[str, Any], metric: str, seed: int
) -> dict[str, Any]:
    """What was asked for, so that only the same request goes on with unfinished work."""
    if isinstance(method, Codec):
        fitted = f" {method.digest}" if hasattr(method, "dims_") else ""
        method = method.full_spec + fitted
    queries = wish["queries"]
    asked = wish | {"queries": str(queries) if isinstance(queries, (str, Path)) else None}
    parts = [[part.name, part.rows, part.dims, part.dtype] for part in source.parts]
    return {"method": method, "metric": metric, "seed": seed, "input": parts} | asked


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else; leftovers of a killed process are deleted.

    Raises
    ------
    FewbitsError
        It is a file, or a folder with other things in it.
    """
    with container.clear_errors(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise FewbitsError(f"{folder} is a file, but sharded input is encoded into a directory")
        stale = [f for name in (CODEC_FILE, PART_FILES) for f in folder.glob(f".{name}.*.tmp")]
        if not (folder / CODEC_FILE).exists() and set(folder.iterdir()) - set(stale):
            raise FewbitsError(f"{folder} exists and is not empty; choose another name")
        for file in stale:
            file.unlink()


def resume(folder: Path, request: dict[str, Any]) -> Codec | None:
    """The codec of a directory made by the same request; None where there is none yet.

    Raises
    ------
    FewbitsError
        The directory holds another encoding.
    """
    file = folder / CODEC_FILE
    if not file.exists():
        return None
    content = container.read(file)
    if content.about.get("request") != request:
        raise FewbitsError(
            f"{folder} holds another encoding; choose another name or pass --overwrite"
        )
    return from_description(content.about.get("codec"), content.arrays, file)


def finished(file: Path, number: int, codec: Codec, rows: int) -> bool:
    """Whether a part is there, whole, and of this codec."""
    try:
        return file.exists() and len(load_part(file, number, codec)) == rows
    except FewbitsError:
        return False


def remove_parts(folder: Path) -> None:
    """Delete the files of an encoded directory, and nothing else."""
    with container.clear_errors(folder):
        for name in (CODEC_FILE, PART_FILES):
            for file in folder.glob(name):
                file.unlink()
