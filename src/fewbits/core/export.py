"""The verb ``export``: put an encoded collection into a vector store, in few bits there too."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core import container
from fewbits.core.checks import check_k
from fewbits.core.collection import Encoded, load
from fewbits.core.errors import FewbitsError, require
from fewbits.core.progress import Steps, progress
from fewbits.core.readers import open_queries
from fewbits.core.search import Matches
from fewbits.core.source import Source
from fewbits.core.stored import FaissForm, Prepare, Stored
from fewbits.core.stores.npy_store import write_array
from fewbits.core.stores.plan import Plan

STORES = ("faiss", "lancedb", "qdrant", "parquet", "npy")
FILES = ("faiss", "parquet", "npy")
"""Stores that are one file; the others are a folder."""
PACKAGES = {"lancedb": "lancedb", "qdrant": "qdrant_edge"}
"""Packages of the extra ``fewbits[stores]``."""
MARK = "fewbits.json"
"""In a folder: where it comes from. Only folders with it are ever replaced."""
BLOCK_BYTES = 16 * 2**20
"""Float bytes made at a time."""


@dataclass(frozen=True)
class Exported:
    """A collection in a store.

    Attributes
    ----------
    path : the file or folder.
    to : kind of store.
    holds : what the store holds of an item, in words.
    raw_queries : whether the store takes queries as the model makes them. If not, use
        `store_queries`.
    form : how rows and queries are compared there.
    encoded : what was exported.
    """

    path: Path
    to: str
    holds: str
    raw_queries: bool
    form: Stored
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __repr__(self) -> str:
        return f"<{len(self)} items in {self.to}: {self.holds}, by {self.encoded.codec.spec}>"

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(map(bytes_on_disk, filter(Path.is_file, self.path.rglob("*"))))

    def store_queries(self, queries: Any, *, column: str | None = None) -> np.ndarray:
        """(q, w): raw queries as the store takes them."""
        return store_queries(self.encoded, queries, self.to, column=column)

    def search(self, queries: Any, k: int = 10, *, column: str | None = None) -> Matches:
        """Search the store with raw queries, as its own users would.

        Returns
        -------
        The store's scores (q, k) float32, best and highest first, and rows (q, k) int64.
        """
        k = check_k(k, len(self))
        asked = self.store_queries(queries, column=column)
        return module_of(self.to).search(self.path, self.form, asked, k)


def export(
    encoded: Encoded | str | Path,
    to: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Exported:
    """Write an encoded collection to a vector store.

    Memory is bounded by a block of rows, but for faiss, which builds its index in memory.

    Parameters
    ----------
    encoded : what `encode` returned or `load` opened, or the path of its file or directory.
    to : ``faiss``, ``lancedb``, ``qdrant``, ``parquet`` or ``npy``.
    output : the file (``.faiss``, ``.parquet``, ``.npy``) or folder to write.
    overwrite : replace an output that exists; a folder only if it is an earlier export.

    Raises
    ------
    FewbitsError
        Unknown store, an output that cannot be written, or codes that cannot be decoded for it.
    MissingExtraError
        The store's library is not installed.
    """
    encoded = opened(encoded, to)
    output = Path(output)
    check_output(output, to, overwrite)
    with progress("exporting", len(encoded), show=show_progress) as bar:
        plan, queries = plan_of(encoded, to, bar)
        made = container.make_folder(output)
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            with container.clear_errors(output):
                write(temporary, plan, to, output)
                put_in_place(temporary, output)
        finally:
            remove(temporary)
            container.remove_empty(made)
    return Exported(output, to, held(plan, to), queries is None, plan.form, encoded)


def store_queries(
    encoded: Encoded | str | Path, queries: Any, to: str, *, column: str | None = None
) -> np.ndarray:
    """Raw queries as a store holding `encoded` takes them.

    Parameters
    ----------
    queries : (q, d) array, sets of vectors, or anything `readers.open_source` opens.
    to : kind of store.

    Returns
    -------
    (q, w): float32, or uint8 packed bits where the store compares bits.
    """
    return np.concatenate(list(query_blocks(*prepared(encoded, queries, to, column))))


def export_queries(
    encoded: Encoded | str | Path,
    queries: Any,
    to: str,
    output: str | Path,
    *,
    column: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `store_queries` returns to an ``.npy`` file, block by block."""
    output = Path(output)
    check_output(output, "npy", overwrite)
    source, normalize, prepare = prepared(encoded, queries, to, column)
    made = container.make_folder(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with container.clear_errors(output):
            one = next(query_blocks(source, normalize, prepare, rows=1))
            shape = (source.rows, one.shape[1])
            blocks = query_blocks(source, normalize, prepare)
            write_array(temporary, one.dtype.name, shape, blocks)
            os.replace(temporary, output)
    finally:
        remove(temporary)
        container.remove_empty(made)
    return output


# -- what to write -------------------------------------------------------------------------


def opened(encoded: Encoded | str | Path, to: str) -> Encoded:
    """The collection, where it can be exported to this kind of store."""
    if to not in STORES:
        raise FewbitsError(f"unknown store {to!r}; choose one of {', '.join(STORES)}")
    if to in PACKAGES:
        require(PACKAGES[to], "stores")
    return encoded if isinstance(encoded, Encoded) else load(encoded)


def module_of(to: str) -> Any:
    return importlib.import_module(f"fewbits.core.stores.{to}_store")


def plan_of(encoded: Encoded, to: str, bar: Steps | None = None) -> tuple[Plan, Prepare | None]:
    """What to write, and what raw queries must go through, or None."""
    codec = encoded.codec
    stored = codec.stored(encoded.metric)
    holds_all = to in ("npy", "parquet") or (to == "lancedb" and stored.kind == "bits")
    form = stored if holds_all else stored.floats
    rows, queries, index = form.rows, form.queries, None
    if to == "faiss":
        index = faiss_form(encoded)
        rows, queries = index.codes, index.queries
    about = {
        "made by": "fewbits export",
        "spec": codec.spec,
        "digest": codec.digest,
        "metric": encoded.metric,
        "rows": f"{form.dims} {form.kind} ({form.dtype})",
        "compared by": form.metric,
    }
    step = max(1, BLOCK_BYTES // (4 * max(codec.dims_, form.dims)))

    def blocks() -> Iterator[np.ndarray]:
        for part in encoded.parts:
            for start in range(0, len(part), step):
                block = rows(part.take(slice(start, start + step)))
                yield block
                if bar is not None:
                    bar.step(count=len(block))

    return Plan(form, stored.kind, index, len(encoded), about, blocks), queries


def held(plan: Plan, to: str) -> str:
    """What the store holds of an item, in words."""
    if plan.faiss is not None:
        return f"{plan.faiss.index.sa_code_size()} bytes each"
    number = "bits" if plan.form.kind == "bits" else plan.form.dtype
    quantized = {"bits": ", quantized to bits", "integers": ", quantized to int8"}
    more = quantized.get(plan.kind, "") if to == "qdrant" else ""
    return f"{plan.form.dims} × {number} each{more}, compared by {plan.form.metric}"


def faiss_form(encoded: Encoded) -> FaissForm:
    """The codec's, with raw queries scaled to unit length first where that is the metric."""
    import faiss

    form = encoded.codec.faiss_form(encoded.metric)
    if encoded.metric != "cosine" or form.queries is not None:
        return form
    unit = faiss.NormalizationTransform(encoded.codec.dims_, 2.0)
    return FaissForm(form.index, form.codes, [unit, *form.steps])


def prepared(
    encoded: Encoded | str | Path, queries: Any, to: str, column: str | None
) -> tuple[Source, bool, Prepare | None]:
    """The checked queries, whether they are scaled to unit length, and what they go through."""
    encoded = opened(encoded, to)
    source = open_queries(queries, column)
    encoded.check_queries(source)
    return source, encoded.metric == "cosine", plan_of(encoded, to)[1]


def query_blocks(
    source: Source, normalize: bool, prepare: Prepare | None, rows: int | None = None
) -> Iterator[np.ndarray]:
    for block in source.blocks(rows, normalize=normalize):
        yield block if prepare is None else prepare(block)


def bytes_on_disk(file: Path) -> int:
    """What a file takes; stores reserve more, which is not written yet."""
    status = file.stat()
    return min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))


# -- where to write ------------------------------------------------------------------------


def check_output(output: Path, to: str, overwrite: bool) -> None:
    """Refuse a name or a place that is not this store's to write.

    Raises
    ------
    FewbitsError
        Another suffix, something that exists, or, to be replaced, that is no earlier export.
    """
    if to in FILES and output.suffix != f".{to}":
        raise FewbitsError(f"this writes .{to} files; name the output {output.stem}.{to}")
    container.refuse_existing(output, overwrite)
    if output.is_dir() and (to in FILES or not (output / MARK).is_file()):
        raise FewbitsError(f"{output} is a folder that fewbits did not export; choose another name")
    if output.is_file() and to not in FILES:
        raise FewbitsError(f"{output} is a file, but {to} takes a folder; choose another name")


def write(place: Path, plan: Plan, to: str, output: Path) -> None:
    try:
        module_of(to).write(place, plan)
    except FewbitsError:
        raise
    except (RuntimeError, ValueError) as error:  # what the libraries of stores raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise FewbitsError(f"{to} cannot write {output}: {reason}") from None
    if to not in FILES:
        (place / MARK).write_text(json.dumps(plan.about, indent=2) + "\n", encoding="utf-8")


def put_in_place(temporary: Path, output: Path) -> None:
    """Rename what was written; an old folder is moved aside until the new one is there."""
    if not output.is_dir():
        os.replace(temporary, output)
        return
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    os.replace(output, old)
    try:
        os.replace(temporary, output)
    except OSError:
        os.replace(old, output)
        raise
    shutil.rmtree(old)


def remove(place: Path) -> None:
    """Delete a temporary file or folder, if it is still there."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            place.unlink()
