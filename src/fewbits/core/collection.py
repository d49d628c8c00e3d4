"""An encoded collection: a codec and the codes it made, in memory or on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core import container
from fewbits.core.checks import check_k
from fewbits.core.code import Code
from fewbits.core.codec import (
    UNUSABLE,
    Codec,
    describe,
    from_description,
    pack_state,
)
from fewbits.core.errors import FewbitsError
from fewbits.core.readers import open_queries
from fewbits.core.search import (
    Matches,
    Searcher,
    check_metric,
    merge,
    rescore,
    rescore_sets,
)
from fewbits.core.source import BLOCK_BYTES, Source, readable
from fewbits.core.stores.npy_store import write_array

CODEC_FILE = "codec.fewbits"
CANDIDATES = 10
"""Rescoring orders this many times k candidates again."""


class Encoded:
    """A codec, and the codes of a collection in one or more parts.

    Attributes
    ----------
    codec : the fitted codec.
    parts : the codes, in the order of the items.
    metric : what searches compare by: ``cosine``, ``ip`` or ``l2``.
    source : what is remembered of the input: name, rows, dims, dtype, bytes per item.
    """

    def __init__(
        self, codec: Codec, parts: list[Code], metric: str, source: dict[str, Any]
    ) -> None:
        self.codec, self.parts, self.metric, self.source = codec, parts, metric, source
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self._searchers: list[Searcher] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"<{len(self)} items, {self.bytes_per_item:g} bytes each, by {self.codec.spec}>"

    @property
    def nbytes(self) -> int:
        """Payload bytes of all items."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bytes_per_item(self) -> float:
        return self.nbytes / len(self)

    @property
    def codec_bytes(self) -> int:
        return self.codec.codec_bytes

    @property
    def ratio(self) -> float:
        """Bytes per item of the input, over those of the code."""
        return float(self.source["bytes_per_item"]) / self.bytes_per_item

    def blocks(self) -> Iterator[np.ndarray]:
        """Decoded vectors in order, (b, d) float32 at a time."""
        step = max(1, BLOCK_BYTES // (4 * self.codec.dims_))
        for part in self.parts:
            for start in range(0, len(part), step):
                yield self.codec.decode(part.take(slice(start, start + step)))

    def decode(self, rows: np.ndarray | None = None) -> np.ndarray:
        """(n, d) float32: all items, or the given row numbers."""
        if rows is None:
            return np.concatenate(list(self.blocks()))
        rows = self._checked_rows(rows)
        decoded = np.empty((len(rows), self.codec.dims_), dtype=np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            part = self.parts[number].take(rows[mine] - self.starts[number])
            decoded[mine] = self.codec.decode(part)
        return decoded

    def _checked_rows(self, rows: Any) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise FewbitsError("row numbers must be a list of whole numbers")
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise FewbitsError(f"row numbers must be between 0 and {len(self) - 1}")
        return rows.astype(np.int64)

    def decode_to(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the decoded vectors to an ``.npy`` file, block by block."""
        path = Path(path)
        if path.suffix != ".npy":
            raise FewbitsError(f"decode writes .npy files; name the output {path.stem}.npy")
        container.refuse_existing(path, overwrite)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        made = container.make_folder(path)
        try:
            with container.clear_errors(path):
                shape = (len(self), self.codec.dims_)
                write_array(temporary, "float32", shape, self.blocks())
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
            container.remove_empty(made)
        return path

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        rescored: bool | Any = False,
        column: str | None = None,
    ) -> Matches:
        """Find the best `k` items of each query.

        Parameters
        ----------
        queries : (q, d) array, or anything `open_source` opens.
        rescored : True orders the best 10·k again by float query against decoded item; the
            original vectors (array or file) order them again exactly, and original sets by
            their Chamfer score.
        column : array or column to read, where the queries or the originals have several.

        Returns
        -------
        scores (q, k) float32, best first, and rows (q, k) int64.

        Raises
        ------
        FewbitsError
            Queries of another width, k beyond the collection, or originals that do not fit.
        """
        k = check_k(k, len(self))
        opened = open_queries(queries, column)
        self.check_queries(opened)
        asked = opened.everything(normalize=self.metric == "cosine")
        if rescored is False:
            return self._scan(asked, k)
        _, rows = self._scan(asked, min(len(self), k * CANDIDATES))
        fetch = self._fetcher(rescored, column)
        if self.codec.takes == "sets":
            return rescore_sets(asked, rows, fetch, k)
        return rescore(asked, rows, fetch, k, self.metric)

    def check_queries(self, queries: Source) -> None:
        """Refuse queries of another kind or width than the items had."""
        if (queries.dims, queries.takes) != (self.codec.dims_, self.codec.takes):
            raise FewbitsError(
                f"the queries are {queries.takes} of {queries.dims} dimensions, but this "
                f"collection was encoded from {self.codec.takes} of {self.codec.dims_}"
            )

    def _scan(self, queries: Any, k: int) -> Matches:
        if self._searchers is None:
            self._searchers = [self.codec.searcher(part, self.metric) for part in self.parts]
        best: Matches | None = None
        for searcher, part, start in zip(self._searchers, self.parts, self.starts, strict=False):
            found = searcher.search(queries, min(k, len(part)))
            best = merge(best, found, int(start), k)
        assert best is not None
        return best

    def _fetcher(self, rescored: Any, column: str | None) -> Any:
        """What gives the vectors (or sets) of row numbers that candidates are scored by."""
        if rescored is True:
            if self.codec.takes == "sets":
                raise FewbitsError("sets are not held in their codes; rescore by the original file")
            return self.decode
        originals = open_queries(rescored, column)
        if originals.takes != self.codec.takes:
            raise FewbitsError(
                f"{originals.name} has {originals.takes}; give the {self.codec.takes} encoded"
            )
        if (originals.rows, originals.dims) != (len(self), self.codec.dims_):
            raise FewbitsError(
                f"{originals.name} has {originals.rows} × {originals.dims} {originals.takes}, but "
                f"the collection was made from {len(self)} × {self.codec.dims_}"
            )
        normalize = self.metric == "cosine"
        return lambda rows: originals.take(rows, normalize=normalize)

    # -- files ----------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything to one ``.fewbits`` file."""
        names = self.parts[0].arrays
        shapes = {
            f"code.{name}": (array.dtype, (len(self), *array.shape[1:]))
            for name, array in names.items()
        }
        learned = pack_state(self.codec)
        shapes |= {name: (array.dtype, array.shape) for name, array in learned.items()}
        about = describe_collection(self.codec, self.metric, self.source)
        with container.Writer(path, "encoded", about, shapes, overwrite=overwrite) as writer:
            for name, array in learned.items():
                writer.write(name, array)
            for part in self.parts:
                for name, array in part.arrays.items():
                    writer.write(f"code.{name}", array)
        return Path(path)


def describe_source(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "rows": source.rows,
        "dims": source.dims,
        "dtype": source.dtype,
        "bytes_per_item": source.bytes_per_item,
    }


def describe_collection(codec: Codec, metric: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"codec": describe(codec), "metric": metric, "source": source}


def code_of(arrays: dict[str, np.ndarray], codec: Codec, path: Path) -> Code:
    """The code among the arrays of a file."""
    own = {n.removeprefix("code."): a for n, a in arrays.items() if n.startswith("code.")}
    if not own or not all(array.ndim and len(array) for array in own.values()):
        raise FewbitsError(f"{path} holds no code")
    code = Code(own, codec.full_spec, codec.digest)
    expected = codec.code_layout()
    found = {name: (array.dtype.name, array.shape[1:]) for name, array in own.items()}
    if found != expected:
        raise FewbitsError(f"{path} is damaged: its code does not fit {codec.spec}")
    return code


def load(path: str | Path) -> Encoded:
    """Open what `encode` wrote: a ``.fewbits`` file, or a directory of parts.

    Codes are mapped from the file, not read into memory; every digest is checked.

    Raises
    ------
    FewbitsError
        Missing, unreadable, damaged, foreign, of a newer version, or not finished.
    """
    path = Path(path)
    with readable(path):
        exists = path.exists()
    if not exists:
        raise FewbitsError(f"there is no file {path}")
    if path.is_dir() and not (path / CODEC_FILE).exists():
        raise FewbitsError(f"{path} is not an encoded collection: it has no {CODEC_FILE}")
    content = container.read(path / CODEC_FILE if path.is_dir() else path)
    wanted = "codec" if path.is_dir() else "encoded"
    if content.kind != wanted:
        hint = "open its directory instead" if content.kind == "part" else "it holds no items"
        raise FewbitsError(f"{path} is a {content.kind} file, not an encoded collection; {hint}")
    codec = from_description(content.about.get("codec"), content.arrays, path)
    try:
        metric, source = check_metric(content.about["metric"]), dict(content.about["source"])
        if not (isinstance(source["name"], str) and float(source["bytes_per_item"]) > 0):
            raise ValueError
        rows, dims = source["rows"], source["dims"]
        names = list(content.about["parts"]) if path.is_dir() else []
    except UNUSABLE:
        raise FewbitsError(f"{path} is damaged: it does not say what it holds") from None
    if path.is_dir():
        parts = load_parts(path, names, codec)
    else:
        parts = [code_of(content.arrays, codec, path)]
    encoded = Encoded(codec, parts, metric, source)
    if (rows, dims) != (len(encoded), codec.dims_) or not parts:
        raise FewbitsError(f"{path} is damaged: it does not hold the items that it says it holds")
    return encoded


def part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.fewbits"


def load_parts(folder: Path, names: list[str], codec: Codec) -> list[Code]:
    """The codes of all parts; `names` are those of the shards they were made from."""
    files = [part_file(folder, number) for number in range(len(names))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FewbitsError(
            f"{folder} is not finished: {len(missing)} of {len(names)} parts are missing; run the "
            "same encode command again to go on"
        )
    return [load_part(file, number, codec, names[number]) for number, file in enumerate(files)]


def load_part(file: Path, number: int, codec: Codec, shard: str | None = None) -> Code:
    """The code of a part; `shard` is the name of what it must have been made from."""
    content = container.read(file)
    about = content.about
    is_mine = (about.get("codec"), about.get("part")) == (codec.digest, number)
    if content.kind != "part" or not is_mine or shard not in (None, about.get("source")):
        raise FewbitsError(f"{file} does not belong to the codec beside it")
    return code_of(content.arrays, codec, file)
