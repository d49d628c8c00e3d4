"""The ``.fewbits`` file: a safetensors file that checks itself.

Layout (docs/format.md says it byte by byte): 8 bytes little-endian length of the header, the
header as JSON, then the arrays without gaps. The header's ``__metadata__`` holds ``format``,
``version``, ``kind``, ``about`` (JSON), ``sha256`` (JSON, one digest per array) and ``digest``
(SHA-256 of all the rest of the header). A reader believes nothing before it has checked it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fewbits.core.errors import FewbitsError

VERSION = 1
HEADER_LIMIT = 16 * 2**20
CHUNK = 8 * 2**20
KINDS = ("encoded", "codec", "part")
DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
NAMES = {np.dtype(code).str: name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class Content:
    """What a file holds: `kind`, `about` (from JSON), and arrays mapped from the file."""

    kind: str
    about: dict[str, Any]
    arrays: dict[str, np.ndarray]


def little(dtype: np.dtype) -> np.dtype:
    """The dtype with the byte order that files have."""
    return dtype.newbyteorder("<")


def dtype_name(dtype: np.dtype) -> str:
    try:
        return NAMES[little(dtype).str]
    except KeyError:
        raise FewbitsError(f"a .fewbits file cannot hold arrays of dtype {dtype}") from None


def refuse_existing(path: Path, overwrite: bool) -> None:
    with clear_errors(path):
        exists = path.exists()
    if exists and not overwrite:
        raise FewbitsError(f"{path} exists already; choose another name or pass --overwrite")


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FewbitsError(f"the disk is full while writing {path}; free some space") from None
        raise FewbitsError(f"cannot write {path}: {error.strerror or error}") from None


def make_folder(file: Path) -> list[Path]:
    """Make the folder that `file` goes to; returns the folders made, innermost first."""
    with clear_errors(file):
        missing = [folder for folder in file.parents if not folder.exists()]
        there = next(folder for folder in file.parents if folder.exists())
        if not there.is_dir():
            raise FewbitsError(f"cannot write {file}: {there} is a file, not a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove what `make_folder` made, where nothing was put into it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


class Writer:
    """Writes arrays piece by piece to a temporary file, renamed when all is there.

    Use as a context manager; after an error nothing is left behind.

    Parameters
    ----------
    path : where the finished file goes.
    kind : ``encoded``, ``codec`` or ``part``.
    about : JSON-able description.
    shapes : name → (dtype, shape) of every array that will be written.
    overwrite : replace an existing file.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        about: dict[str, Any],
        shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        refuse_existing(self.path, overwrite)
        self.kind, self.about = kind, about
        # Wider elements first, so that every array starts at a multiple of its element size.
        order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
        self.shapes = {name: (little(shapes[name][0]), shapes[name][1]) for name in order}
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in self.shapes.items():
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            self.places[name] = (begin, end)
        self.done = dict.fromkeys(self.shapes, 0)
        self.hashes = {name: hashlib.sha256() for name in self.shapes}
        self.header_length = len(self._header())
        if self.header_length > HEADER_LIMIT:
            raise FewbitsError(
                f"{path} would need a header of {self.header_length:,} bytes, and at most "
                f"{HEADER_LIMIT:,} can be read back; encode fewer shards at a time"
            )
        self.file: Any = None
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Writer:
        self.made = make_folder(self.path)
        try:
            with clear_errors(self.path):
                self.file = open(self.temporary, "wb")
                # Reserve the header, so that a full disk shows early; it is written last.
                self.file.write(bytes(8 + self.header_length))
        except BaseException:
            self._clean_up()
            raise
        return self

    def write(self, name: str, rows: np.ndarray) -> None:
        """Append `rows` to the array `name`."""
        dtype, shape = self.shapes[name]
        if little(rows.dtype) != dtype or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{name} was announced as {dtype} of shape {shape}")
        data = np.ascontiguousarray(rows, dtype=dtype).view(np.uint8).reshape(-1).data
        begin, end = self.places[name]
        if begin + self.done[name] + len(data) > end:
            raise ValueError(f"more rows for {name} than were announced")
        with clear_errors(self.path):
            self.file.seek(8 + self.header_length + begin + self.done[name])
            self.file.write(data)
        self.hashes[name].update(data)
        self.done[name] += len(data)

    def _header(self) -> bytes:
        digests = {name: self.hashes[name].hexdigest() for name in self.shapes}
        return build_header(self.kind, self.about, self.shapes, self.places, digests)

    def _finish(self) -> None:
        short = [n for n, (b, e) in self.places.items() if self.done[n] != e - b]
        if short:
            raise ValueError(f"not all rows of {', '.join(short)} were written")
        with clear_errors(self.path):
            header = self._header()
            self.file.seek(0)
            self.file.write(len(header).to_bytes(8, "little") + header)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        """Leave nothing but the finished file, if there is one."""
        with contextlib.suppress(OSError):
            if self.file is not None:
                self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()
        remove_empty(self.made)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def header_digest(entries: dict[str, Any], metadata: dict[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    return hashlib.sha256(canonical([entries, rest]).encode()).hexdigest()


def build_header(
    kind: str,
    about: dict[str, Any],
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
    places: dict[str, tuple[int, int]],
    digests: dict[str, str],
) -> bytes:
    entries = {
        name: {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": list(places[name]),
        }
        for name, (dtype, shape) in shapes.items()
    }
    metadata = {
        "format": "fewbits",
        "version": str(VERSION),
        "kind": kind,
        "about": canonical(about),
        "sha256": canonical(digests),
    }
    metadata["digest"] = header_digest(entries, metadata)
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % 8)


def write(
    path: str | Path,
    kind: str,
    about: dict[str, Any],
    arrays: dict[str, np.ndarray],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a whole file at once."""
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with Writer(path, kind, about, shapes, overwrite=overwrite) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return Path(path)


# -- reading -------------------------------------------------------------------------------


def read(path: str | Path) -> Content:
    """Open a ``.fewbits`` file; arrays are mapped, not loaded. O(file size): digests are checked.

    Raises
    ------
    FewbitsError
        Unreadable, cut short, damaged, of another program, or of a newer version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, header = read_header(file, size, path)
        metadata = header.pop("__metadata__", None)
        check_metadata(metadata, path)
        arrays = map_arrays(path, header, start, size)
        if header_digest(header, metadata) != metadata.get("digest"):
            raise FewbitsError(f"{path} is damaged: its header does not match its digest")
        check_arrays(path, start, header, load_json(metadata["sha256"], path))
    except OSError as error:
        raise FewbitsError(f"cannot read {path}: {error.strerror or error}") from None
    return Content(metadata["kind"], load_json(metadata["about"], path), arrays)


def read_header(file: Any, size: int, path: Path) -> tuple[int, dict[str, Any]]:
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > HEADER_LIMIT:
        raise FewbitsError(f"{path} is not a .fewbits file")
    if 8 + length > size:
        raise FewbitsError(f"{path} is not a .fewbits file, or it is cut short")
    header = load_json(file.read(length), path)
    return 8 + length, header


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def load_json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        raise FewbitsError(f"{path} is not a .fewbits file, or it is damaged") from None
    if not isinstance(value, dict):
        raise FewbitsError(f"{path} is not a .fewbits file, or it is damaged")
    return value


def check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or metadata.get("format") != "fewbits":
        raise FewbitsError(f"{path} is not a .fewbits file (a safetensors file of another kind?)")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise FewbitsError(f"{path} is damaged: its header is malformed")
    version = metadata.get("version", "")
    if version.isascii() and version.isdigit() and int(version[:9]) > VERSION:
        raise FewbitsError(
            f"{path} has format version {version[:9]}, this fewbits reads up to {VERSION}; "
            "upgrade fewbits"
        )
    if version != str(VERSION) or metadata.get("kind") not in KINDS:
        raise FewbitsError(f"{path} is damaged: its header is malformed")
    if "about" not in metadata or "sha256" not in metadata:
        raise FewbitsError(f"{path} is damaged: its header is malformed")


def map_arrays(path: Path, entries: dict[str, Any], start: int, size: int) -> dict[str, np.ndarray]:
    """Map every array, after checking that together they cover the file exactly."""
    places = []
    for name, entry in entries.items():
        try:
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(v) is int and 0 <= v <= size for v in (*shape, begin, end))
            if not whole or len(shape) > 8 or end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError
            # An empty array may claim other axes that are longer than NumPy can count.
            if len(entry) > 3 or math.prod(v or 1 for v in shape) > 2**48:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FewbitsError(f"{path} is damaged: array {name!r} is malformed") from None
        places.append((begin, end, name, dtype, shape))
    places.sort(key=lambda place: place[:2])
    ends = [0] + [place[1] for place in places]
    if any(place[0] != end for place, end in zip(places, ends, strict=False)):
        raise FewbitsError(f"{path} is damaged: its arrays overlap or leave gaps")
    if start + ends[-1] != size:
        raise FewbitsError(f"{path} is cut short or has bytes left over; copy or encode it again")
    # One mapping for all, because a process may have only so many.
    data = np.memmap(path, dtype=np.uint8, mode="r")[start:]
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        for begin, end, name, dtype, shape in places
    }


def check_arrays(path: Path, start: int, entries: dict[str, Any], digests: dict[str, Any]) -> None:
    """Hold every array against its digest; read, not mapped, so that memory stays bounded."""
    if set(digests) != set(entries):
        raise FewbitsError(f"{path} is damaged: digests and arrays differ")
    with open(path, "rb") as file:
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            digest, left = hashlib.sha256(), end - begin
            while left and (data := file.read(min(CHUNK, left))):
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != digests[name]:
                raise FewbitsError(f"{path} is damaged: array {name!r} does not match its digest")
