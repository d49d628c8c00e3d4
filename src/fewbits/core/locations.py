"""Where shards lie: patterns of local files, and URLs that fsspec opens.

Local files are mapped by the readers of `readers.py`, wherever the pattern or a ``file://`` URL
leads. From any other URL, Parquet and ``.npy`` are streamed: no more than a block is held, and
nothing is copied to the local disk.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from fewbits.core.arrow_readers import parquet_source
from fewbits.core.errors import FewbitsError, require
from fewbits.core.npy_header import npy_header
from fewbits.core.source import Source, check_table, sharded_source

SUFFIXES = (".npy", ".npz", ".parquet", ".arrow", ".feather", ".fvecs", ".bvecs", ".safetensors")
STREAMED = (".npy", ".parquet")
"""Kinds of files that are read from a URL."""
OPENED_AT_ONCE = 16
"""Headers of so many remote shards are asked for at a time: each is a wait for the network."""
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
LOCAL = re.compile(r"(file|local)://", re.IGNORECASE)
STAMPS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
"""What the drivers of fsspec call the version or the time of a file, most telling first."""

Stamp = list[int | str | None]
"""Size and time (or version) of a file: another stamp means another content."""


def is_url(x: object) -> bool:
    """Whether `x` names something by a URL that is not of this machine."""
    return isinstance(x, str) and bool(URL.match(x)) and not LOCAL.match(x)


def is_shared(location: str) -> bool:
    """Whether other processes find the same there; ``memory://`` is seen by this one only."""
    return not location.lower().startswith("memory://")


def local_path(x: str | Path) -> Path:
    """The path that a ``file://`` URL, or a path, leads to."""
    found = LOCAL.match(str(x))
    if not found:
        return Path(x)
    rest = str(x)[found.end() :].removeprefix("localhost")
    return Path(rest if Path(rest).exists() else unquote(rest))


def file_stamp(path: Path) -> Stamp:
    """Size in bytes, and time of the last change in nanoseconds."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def is_pattern(path: Path) -> bool:
    """Whether a path that leads nowhere has wildcards in it."""
    return glob.has_magic(str(path)) and not path.exists()


def matching_files(pattern: Path) -> list[Path]:
    """The files fewbits reads that a pattern (``*``, ``?``, ``[ab]``, ``**``) matches, in order.

    Raises
    ------
    FewbitsError
        There are none.
    """
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 - takes any absolute pattern
    found = (Path(name) for name in names)
    files = sorted(f for f in found if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise FewbitsError(f"{pattern} matches no file that fewbits reads: {', '.join(SUFFIXES)}")
    return files


def fixed_folder(pattern: str | Path) -> Path:
    """The folder in front of the first wildcard of a path or URL."""
    parts = PurePosixPath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def url_name(url: str) -> str:
    """The name of the file behind a URL, or of the folder in front of its first wildcard."""
    about = urlsplit(url)
    return fixed_folder(about.path).name or about.netloc


# -- URLs ----------------------------------------------------------------------------------


def url_source(url: str, column: str | None = None) -> Source:
    """Open a file, a folder or a pattern of files behind a URL.

    Raises
    ------
    FewbitsError
        Nothing there, a kind that cannot be streamed, or a driver or its access that fails.
    MissingExtraError
        fsspec is not installed.
    """
    system, path = file_system(url)
    with clear_remote_errors(url):
        system.invalidate_cache()
        listed = list_files(system, path, url)
    files = [about for about in listed if suffix_of(about["name"]) in SUFFIXES]
    if not files:
        raise FewbitsError(f"{url} holds no file that is read from a URL: {', '.join(STREAMED)}")
    base = url[: URL.match(url).end()]  # type: ignore[union-attr]
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        parts = list(pool.map(lambda about: remote_source(system, base, about, column), files))
    if len(parts) == 1 and files[0]["name"] == path:
        return parts[0]
    return sharded_source(url_name(url), url, parts)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    fsspec = require("fsspec", "cluster")
    protocol = url.partition("://")[0].lower()
    known = require("fsspec.registry", "cluster").known_implementations
    if protocol not in fsspec.available_protocols():
        raise FewbitsError(f"{protocol}:// is no kind of URL that fsspec knows; see its drivers")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError:
        driver = known[protocol]["class"].partition(".")[0] if protocol in known else protocol
        raise FewbitsError(
            f"{protocol}:// needs the driver {driver}; install it with: pip install {driver}"
        ) from None
    except Exception as error:
        raise cannot_read(url, error) from None
    return system, path


def list_files(system: Any, path: str, url: str) -> list[dict[str, Any]]:
    """What is known of the file, or of the files of the folder or pattern, by rising names."""
    if "*" in path or "[" in path:  # a question mark may begin the query of an http URL
        found = list(system.glob(path, detail=True).values())
    elif suffix_of(path) in SUFFIXES and not url.endswith("/"):
        found = [system.info(path)] if system.exists(path) else []
        if found and found[0]["type"] == "directory":
            found = system.ls(path, detail=True)
    else:
        found = system.ls(path, detail=True) if system.isdir(path) else []
    if not found:
        raise FewbitsError(f"there is nothing at {url}")
    files = (about for about in found if about["type"] == "file")
    return sorted(files, key=lambda about: str(about["name"]))


def suffix_of(name: str) -> str:
    return PurePosixPath(urlsplit(name).path).suffix.lower()


def remote_source(system: Any, base: str, about: dict[str, Any], column: str | None) -> Source:
    """Open one remote file; `about` is what its file system says of it."""
    path = str(about["name"])
    url = path if URL.match(path) else base + path.lstrip("/")
    if suffix_of(path) not in STREAMED:
        raise FewbitsError(
            f"{url} cannot be streamed; copy it to this machine first, or keep it as one of "
            f"{', '.join(STREAMED)}"
        )
    if about.get("size") == 0:
        raise FewbitsError(f"{url} is empty: it has no bytes")
    with clear_remote_errors(url):
        if suffix_of(path) == ".npy":
            source = remote_npy(system, path, url, about.get("size"))
        else:
            name = PurePosixPath(urlsplit(path).path).name
            source = parquet_source(url, name, lambda: system.open(path, "rb"), column)
        version = next((str(about[key]) for key in STAMPS if about.get(key)), None)
    source.location, source.stamp, source.column = url, [about.get("size"), version], column
    return source


def remote_npy(system: Any, path: str, url: str, size: int | None) -> Source:
    """An ``.npy`` that is read in one stream, block by block."""
    with system.open(path, "rb") as file:
        shape, fortran, dtype = npy_header(file, url)
        offset = file.tell()
    check_table(url, shape, dtype.name)
    if fortran and min(shape) > 1:
        raise FewbitsError(
            f"{url} is stored column by column and cannot be streamed; copy it to this machine "
            "first, or save it with numpy.ascontiguousarray"
        )
    row = shape[1] * dtype.itemsize
    if size is not None and size < offset + shape[0] * row:
        raise FewbitsError(f"{url} is cut short: {size} bytes of {offset + shape[0] * row}")

    def read(rows: int) -> Iterator[np.ndarray]:
        with clear_remote_errors(url), system.open(path, "rb") as file:
            file.seek(offset)
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = file.read(count * row)
                if len(data) < count * row:
                    raise FewbitsError(f"{url} is cut short")
                yield np.frombuffer(data, dtype).reshape(count, shape[1])

    return Source(PurePosixPath(urlsplit(path).path).name, shape[0], shape[1], dtype.name, read)


@contextlib.contextmanager
def clear_remote_errors(url: str) -> Iterator[None]:
    """Turn whatever a driver raises (each has errors of its own) into one line."""
    try:
        yield
    except FewbitsError:
        raise
    except Exception as error:
        raise cannot_read(url, error) from None


def cannot_read(url: str, error: Exception) -> FewbitsError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    lines = str(reason).strip().splitlines() or [type(error).__name__]
    return FewbitsError(f"cannot read {url}: {lines[0]}")
