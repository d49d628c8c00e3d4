"""The folder of a saved KV cache: what its manifest says, checked before it is believed.

``cache.json`` is the manifest, ``level-<n>.bin`` holds all chunks at quality n one after the other
(0 is the finest), ``text.bin`` the token numbers as little-endian int32, ``tables.bin`` the fitted
profile, unless the manifest names another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.core.errors import FewbitsError
from fewbits.core.locations import clear_remote_errors, file_system, is_url, local_path
from fewbits.kv._cachegen_codec import MOST_TOKENS
from fewbits.kv._files import fingerprint

FORMAT, VERSION = "fewbits-kv", 1
MANIFEST, TEXT, TABLES = "cache.json", "text.bin", "tables.bin"
MANIFEST_LIMIT = 64 * 2**20
"""Bytes of the longest manifest that is read."""
DTYPES = ("float32", "float16", "bfloat16")
LARGEST = 2**31 - 1
DIGEST = re.compile(r"[0-9a-f]{64}")
PLACE = re.compile(r"(\.\./)?[A-Za-z0-9_][A-Za-z0-9_.\-]*")
"""A file beside the manifest, or beside its folder."""
AGAIN = "save or copy it again"


def level_file(level: str) -> str:
    """The name of the file that holds all chunks of one level."""
    return f"level-{level}.bin"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Piece:
    """Where a chunk lies in the file of its level, and what its bytes add up to."""

    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ChunkInfo:
    """Some consecutive tokens: the number of the first, how many, and their piece of each level."""

    first: int
    tokens: int
    levels: Mapping[str, Piece]


@dataclass(frozen=True)
class Manifest:
    """What a saved cache is.

    Attributes
    ----------
    model : fingerprint of the model it was made by, as `fewbits.kv._files.fingerprint` makes it.
    dtype : of the keys and values: ``float32``, ``float16`` or ``bfloat16``.
    layers, heads, width : of the model: layers, key heads, numbers in a key of one head.
    tokens : so many were read.
    chunk : tokens of a chunk; the last one may have fewer.
    levels : name → what its steps are multiplied by; finest first, and named ``0``, ``1``, ….
    text, text_sha256 : file of the token numbers, and its digest.
    tables, tables_sha256 : file of the fitted profile, and its digest.
    chunks : in the order of their tokens, without gaps.
    """

    model: Mapping[str, str | int]
    dtype: str
    layers: int
    heads: int
    width: int
    tokens: int
    chunk: int
    levels: Mapping[str, float]
    text: str
    text_sha256: str
    tables: str
    tables_sha256: str
    chunks: tuple[ChunkInfo, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> Manifest:
        """Read a manifest; `where` is what messages call it.

        Raises
        ------
        FewbitsError
            Not a manifest, of a newer version, or its parts do not fit together.
        """
        about = json_object(text, where)
        if about.get("format") != FORMAT:
            raise FewbitsError(f"{where} is not the manifest of a saved cache")
        version = about.get("version")
        if type(version) is int and version > VERSION:
            raise FewbitsError(
                f"{where} has format version {version}, this fewbits reads up to {VERSION}; "
                "upgrade fewbits"
            )
        try:
            made = read_manifest(about)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FewbitsError(f"{where} is damaged: {reason}; {AGAIN}") from None
        return made

    def check_model(self, model: Any) -> None:
        """Refuse a model that this is no cache of.

        Raises
        ------
        FewbitsError
            Another shape, other weights, or another dtype.
        """
        mine = fingerprint(model)
        for what in mine | dict(self.model):
            if self.model.get(what) != mine.get(what):
                raise FewbitsError(
                    f"this is the cache of another model: its {what} is {self.model.get(what)}, "
                    f"here it is {mine.get(what)}; load it with the model that made it"
                )
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != self.dtype:
            raise FewbitsError(
                f"this cache was made in {self.dtype}, and the model computes in {dtype}; load "
                f"the model with dtype={self.dtype}"
            )

    def level_bytes(self, level: str) -> int:
        """Bytes of all chunks at one level."""
        return sum(chunk.levels[level].bytes for chunk in self.chunks)


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    if len(text) > MANIFEST_LIMIT:
        raise FewbitsError(f"{where} is too long for a manifest: {len(text):,} bytes")
    try:
        about = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        raise FewbitsError(f"{where} is not the manifest of a saved cache, or damaged") from None
    if not isinstance(about, dict):
        raise FewbitsError(f"{where} is not the manifest of a saved cache")
    return about


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def read_manifest(about: dict[str, Any]) -> Manifest:
    """The manifest, after checking every field and that they fit together.

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError
        It is malformed.
    """
    if about["version"] != VERSION:
        raise ValueError("its version is no version")
    levels = read_levels(about["levels"])
    chunks = tuple(read_chunk(one, levels) for one in about["chunks"])
    made = Manifest(
        model=read_fingerprint(about["model"]),
        dtype=one_of(about["dtype"], DTYPES),
        **{field: whole(about[field], field, 1) for field in COUNTS},
        levels=levels,
        text=checked(about["text"], PLACE, "the file of its text"),
        text_sha256=checked(about["text_sha256"], DIGEST, "the digest of its text"),
        tables=checked(about["tables"], PLACE, "the file of its tables"),
        tables_sha256=checked(about["tables_sha256"], DIGEST, "the digest of its tables"),
        chunks=chunks,
    )
    if made.chunk > MOST_TOKENS:
        raise ValueError(f"its chunks of {made.chunk:,} tokens are too long")
    check_chunks(made)
    return made


COUNTS = ("layers", "heads", "width", "tokens", "chunk")


def whole(value: Any, what: str, least: int) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{what} is {value!r}")
    return value


def read_fingerprint(about: Any) -> dict[str, str | int]:
    if not isinstance(about, dict) or len(about) > 64:
        raise ValueError("the fingerprint of its model is malformed")
    if not all(type(value) in (str, int) and len(str(value)) <= 256 for value in about.values()):
        raise ValueError("the fingerprint of its model is malformed")
    return about


def one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


def checked(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{what} is malformed")
    return value


def read_levels(about: Any) -> dict[str, float]:
    levels = {str(level): float(scale) for level, scale in about.items()}
    scales = list(levels.values())
    names = [str(number) for number in range(len(levels))]
    rising = all(low < high for low, high in itertools.pairwise(scales))
    if not levels or list(levels) != names or not rising or not 0 < scales[0] <= scales[-1] < 1e6:
        raise ValueError("its levels are malformed")
    return levels


def read_chunk(about: Any, levels: dict[str, float]) -> ChunkInfo:
    if not about["levels"].keys() == levels.keys():
        raise ValueError("a chunk does not have every level")
    pieces = {
        level: Piece(
            whole(piece["offset"], "an offset", 0),
            whole(piece["bytes"], "the size of a piece", 1),
            checked(piece["sha256"], DIGEST, "the digest of a piece"),
        )
        for level, piece in about["levels"].items()
    }
    first, tokens = about["first"], about["tokens"]
    return ChunkInfo(whole(first, "a chunk's first token", 0), whole(tokens, "tokens", 1), pieces)


def check_chunks(made: Manifest) -> None:
    """Chunks cover all tokens in order, and their pieces each level's file, without gaps."""
    place, ends = 0, dict.fromkeys(made.levels, 0)
    for chunk in made.chunks:
        if chunk.first != place or chunk.tokens != min(made.chunk, made.tokens - place):
            raise ValueError("its chunks leave gaps or overlap")
        place += chunk.tokens
        for level, piece in chunk.levels.items():
            if piece.offset != ends[level]:
                raise ValueError(f"the pieces of level {level} leave gaps or overlap")
            ends[level] += piece.bytes
    if place != made.tokens:
        raise ValueError(f"its chunks have {place} tokens of {made.tokens}")


# -- pieces --------------------------------------------------------------------------------


def check_piece(data: bytes, chunk: ChunkInfo, level: str) -> None:
    """Refuse bytes that are not the piece that the manifest speaks of.

    Raises
    ------
    FewbitsError
        Another length or another digest.
    """
    piece = chunk.levels[level]
    where = f"level {level} of tokens {chunk.first} to {chunk.first + chunk.tokens - 1}"
    if len(data) != piece.bytes:
        raise FewbitsError(f"{where} has {len(data)} bytes of {piece.bytes}; {AGAIN}")
    if sha256(data) != piece.sha256:
        raise FewbitsError(f"{where} is damaged: it does not match its digest; {AGAIN}")


def text_bytes(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def read_text(data: bytes, manifest: Manifest) -> np.ndarray:
    """(t,) int64: the token numbers of ``text.bin``.

    Raises
    ------
    FewbitsError
        They do not match the manifest.
    """
    if sha256(data) != manifest.text_sha256 or len(data) != 4 * manifest.tokens:
        raise FewbitsError(f"{manifest.text} is damaged: it does not match the manifest; {AGAIN}")
    return np.frombuffer(data, "<i4").astype(np.int64)


# -- places --------------------------------------------------------------------------------


class Source:
    """The files of a saved cache: in a folder, or behind any URL that fsspec reads."""

    def __init__(self, place: str | Path) -> None:
        self.where = str(place)
        if is_url(place):
            self.system, self.path = file_system(str(place))
        else:
            self.system, self.path = None, str(local_path(place))

    def read(self, name: str, offset: int = 0, count: int | None = None) -> bytes:
        """Bytes of a file, from `offset` on: `count` of them, or all.

        Raises
        ------
        FewbitsError
            It cannot be read.
        """
        path = posixpath.normpath(posixpath.join(self.path, name))
        if self.system is not None:
            with clear_remote_errors(f"{self.where}/{name}"):
                end = None if count is None else offset + count
                return bytes(self.system.cat_file(path, start=offset, end=end))
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(-1 if count is None else count)
        except OSError as error:
            reason = error.strerror or error
            raise FewbitsError(f"cannot read {path}: {reason}") from None

    def manifest(self) -> Manifest:
        return Manifest.from_json(self.read(MANIFEST), f"{self.where}/{MANIFEST}")

    def tables(self, manifest: Manifest) -> bytes:
        """The file of the profile, held against its digest."""
        data = self.read(manifest.tables)
        if sha256(data) != manifest.tables_sha256:
            raise FewbitsError(
                f"{self.where}/{manifest.tables} is not the profile that the cache was saved "
                f"with, or damaged; {AGAIN}"
            )
        return data

    def has(self, name: str) -> bool:
        if self.system is None:
            return (Path(self.path) / name).exists()
        with clear_remote_errors(self.where):
            return bool(self.system.exists(posixpath.join(self.path, name)))


@contextlib.contextmanager
def written(place: str | Path, overwrite: bool) -> Iterator[Callable[[str], Any]]:
    """Gives what opens a file to write, by its name; the manifest is to be written last.

    A local folder gets its name when all is there. Behind a URL the manifest comes last, so what
    has none is no cache.

    Raises
    ------
    FewbitsError
        There is something already (and not `overwrite`), or it cannot be written.
    """
    source = Source(place)
    if source.system is not None:
        if source.has(MANIFEST) and not overwrite:
            raise FewbitsError(f"{place} has a cache already; choose another, or overwrite=True")
        with clear_remote_errors(str(place)):
            if source.has(MANIFEST):
                source.system.rm_file(posixpath.join(source.path, MANIFEST))
            source.system.makedirs(source.path, exist_ok=True)
            yield lambda name: source.system.open(posixpath.join(source.path, name), "wb")
        return
    folder = Path(source.path)
    if folder.exists() and not overwrite:
        raise FewbitsError(f"{folder} exists; choose another name, or overwrite=True")
    if folder.exists() and not (folder / MANIFEST).exists():
        raise FewbitsError(f"{folder} is no saved cache; it is not replaced by one")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield lambda name: (temporary / name).open("wb")
        replace_folder(temporary, folder)
    except OSError as error:
        raise FewbitsError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, old: Path) -> None:
    """Rename a folder to a name that another one may have, which is removed then."""
    if not old.exists():
        new.rename(old)
        return
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
