"""Collections of texts: read from a file and embedded by a model, as a `Source` of vectors."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewbits.core.errors import FewbitsError, require
from fewbits.core.progress import progress
from fewbits.core.readers import temporary_npy
from fewbits.core.source import Source, readable
from fewbits.core.text_encoder import TextEncoder, without_progress_bars

TEXTS_AT_A_TIME = 1024
"""Texts read and embedded at a time; the model makes smaller batches of them."""
LONGEST_FIELD = 2**24
"""Characters in a field of a ``.csv``."""
USUAL_NAME = "text"
"""Where there are several columns of texts, the one of this name is read unless asked."""

Texts = Callable[[], Iterator[str]]
"""Reads all texts, again each time it is called."""
Embed = Callable[[list[str]], np.ndarray]


def open_texts(
    texts: str | Path | Sequence[str],
    model: str | Path | None = None,
    *,
    column: str | None = None,
    queries: bool = False,
    show_progress: bool = False,
) -> Source:
    """Embed texts, for `encode`, `compare` and `search`.

    The vectors go into a temporary file that lives as long as the source, so memory holds only
    `TEXTS_AT_A_TIME` texts and their vectors.

    Parameters
    ----------
    texts : ``.txt`` (one text per line), ``.jsonl``, ``.csv`` with a head line, or ``.parquet``;
        or a list of strings.
    model : name or folder of a sentence-transformers model; None for the packaged
        all-MiniLM-L6-v2. Its weights must be stored as safetensors.
    column : field or column to read, where there are several and none is called ``text``.
    queries : whether these are queries, which some models embed with a prompt of their own.

    Returns
    -------
    (n, d) float32 vectors, row i that of text i. Their lengths are as the model gives them.

    Raises
    ------
    FewbitsError
        No such file or model, a missing extra, no texts, or something that is not a text.
    """
    name, read = reader_of(texts, column)
    with readable(name):
        count = sum(1 for _ in read())  # also finds every mistake before minutes are spent
    if count == 0:
        raise FewbitsError(f"{name} is empty: it has no texts")
    embed = embedder(model, queries)

    def write(file: IO[bytes]) -> None:
        written = 0
        with progress("embedding texts", count, show=show_progress) as bar:
            for batch in batches(read()):
                vectors = checked_vectors(embed(batch), len(batch))
                if written == 0:
                    shape = (count, vectors.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(vectors.data)
                written += len(batch)
                bar.step(count=len(batch))
        if written != count:
            raise FewbitsError(f"{name} changed while it was read; try again")

    return temporary_npy(name, write)


def open_text_queries(
    texts: str | Path, model: str | Path | None, column: str | None, show_progress: bool = False
) -> Source:
    """Embed queries; `column` is for files that have several columns of texts."""
    try:
        return open_texts(texts, model, queries=True, show_progress=show_progress)
    except SeveralTextsError:
        return open_texts(texts, model, column=column, queries=True, show_progress=show_progress)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, TEXTS_AT_A_TIME)):
        yield batch


# -- embedding -----------------------------------------------------------------------------


def embedder(model: str | Path | None, queries: bool) -> Embed:
    """What turns texts into (n, d) vectors."""
    if model is None:
        return TextEncoder().sentences
    library: Any = require("sentence_transformers", "examples")
    transformers: Any = require("transformers", "examples")
    if str(model).startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FewbitsError(
            f"there is no folder {model}; give that of a sentence-transformers model"
        )
    try:
        with without_progress_bars(transformers.utils.logging):
            loaded = library.SentenceTransformer(
                str(model), model_kwargs={"use_safetensors": True}, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise FewbitsError(
            f"cannot load the model {str(model)!r} ({reason}): give the name or the folder of a "
            "sentence-transformers model with safetensors weights"
        ) from None
    # Some models begin queries and documents with different prompts; old versions know one way.
    encode = getattr(loaded, "encode_query" if queries else "encode_document", loaded.encode)
    return lambda texts: encode(texts, show_progress_bar=False, convert_to_numpy=True)


def checked_vectors(vectors: Any, count: int) -> np.ndarray:
    """One vector of equal width per text, as contiguous little-endian float32."""
    table = np.asarray(vectors)
    if table.ndim != 2 or len(table) != count or table.dtype.kind != "f":
        raise FewbitsError(
            f"the model gives {table.dtype} of shape {table.shape} for {count} texts; take one "
            "that gives a vector of floats for each"
        )
    return np.ascontiguousarray(table, dtype="<f4")


# -- reading -------------------------------------------------------------------------------


class SeveralTextsError(FewbitsError):
    """A file has several columns of texts, and none was asked for."""


def reader_of(texts: str | Path | Sequence[str], column: str | None) -> tuple[str, Texts]:
    """A name for messages, and what reads the texts."""
    if not isinstance(texts, (str, Path)):
        listed = list(texts)
        wrong = next((i for i, text in enumerate(listed) if not isinstance(text, str)), None)
        if wrong is not None:
            raise FewbitsError(f"text {wrong} is of type {type(listed[wrong]).__name__}, not str")
        return "the texts", lambda: iter(listed)
    path = Path(texts)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise FewbitsError(
            f"{path} is not a kind of file that texts are read from: {', '.join(READERS)}"
        )
    with readable(path):
        if not path.is_file():
            raise FewbitsError(f"there is no file {path}")
        return path.name, reader(path, column)


def choose_text(path: Path, asked: str | None, names: Sequence[str]) -> str:
    """The asked column, the only one there is, or the one with the usual name."""
    known = ", ".join(names) or "none"
    if asked is not None:
        if asked in names:
            return asked
        raise FewbitsError(f"{path} has no texts called {asked!r}; it has: {known}")
    if USUAL_NAME in names:
        return USUAL_NAME
    if len(names) == 1:
        return names[0]
    if not names:
        raise FewbitsError(f"{path} has no texts in it")
    raise SeveralTextsError(f"{path} has several columns; pass --column with one of: {known}")


def read_lines(path: Path, column: str | None) -> Texts:
    """Every line is a text, blank ones too."""

    def read() -> Iterator[str]:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")

    return read


def read_jsonl(path: Path, column: str | None) -> Texts:
    """One JSON object per line, or one string; blank lines are nothing."""

    def rows() -> Iterator[tuple[int, Any]]:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    raise FewbitsError(f"line {number} of {path} is not JSON") from None

    first = next(rows(), (0, ""))[1]
    field = None
    if isinstance(first, dict):
        strings = [str(key) for key, value in first.items() if isinstance(value, str)]
        field = choose_text(path, column, strings)

    def read() -> Iterator[str]:
        for number, row in rows():
            text = row
            if field is not None:
                text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                what = "a string" if field is None else f"an object with a string {field!r}"
                raise FewbitsError(f"line {number} of {path} is not {what}")
            yield text

    return read


def read_csv(path: Path, column: str | None) -> Texts:
    """A column of a table with its names in the first line."""

    def rows() -> Iterator[list[str]]:
        csv.field_size_limit(LONGEST_FIELD)
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                yield from filter(None, csv.reader(file))
            except csv.Error as error:
                raise FewbitsError(f"cannot read {path}: {error}") from None

    names = next(rows(), [])
    place = names.index(choose_text(path, column, names))

    def read() -> Iterator[str]:
        for number, row in enumerate(itertools.islice(rows(), 1, None)):
            if len(row) != len(names):
                raise FewbitsError(
                    f"row {number} of {path} has {len(row)} fields, but the head line {len(names)}"
                )
            yield row[place]

    return read


def read_parquet(path: Path, column: str | None) -> Texts:
    """A column of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: Any) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    with pq.ParquetFile(path) as file:
        names = [field.name for field in file.schema_arrow if is_text(field.type)]
    name = choose_text(path, column, names)

    def read() -> Iterator[str]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(TEXTS_AT_A_TIME, columns=[name]):
                if batch.column(0).null_count:
                    raise FewbitsError(
                        f"column {name!r} of {path} has missing texts; drop them first"
                    )
                yield from batch.column(0).to_pylist()

    return read


READERS: dict[str, Callable[[Path, str | None], Texts]] = {
    ".txt": read_lines,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
