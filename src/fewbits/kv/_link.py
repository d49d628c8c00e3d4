"""Pieces of the files of one folder: on this machine, behind HTTP, or behind another URL of fsspec.

HTTP is read by Python's own library, for what fsspec's driver hides is needed here: whether a
server knows byte ranges, and whether all bytes came.
"""

from __future__ import annotations

import contextlib
import http.client
import posixpath
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit

from fewbits.core.errors import FewbitsError
from fewbits.core.locations import cannot_read, file_system, is_url, local_path

WEB = re.compile(r"https?://", re.IGNORECASE)
LASTING = (400, 401, 403, 404, 405, 410, 416)
"""Answers of a server that will be the same when it is asked again."""


class MissingFile(FewbitsError):
    """A file is not there, or may not be read; asking again will not help."""


class Folder:
    """A folder whose files can be read in pieces. Any thread may call it.

    `moved` counts the bytes that came from it: of a server without byte ranges, more than asked.
    """

    def __init__(self) -> None:
        self.moved = 0

    def read(self, name: str, start: int, nbytes: int, size: int) -> bytes:
        """So many bytes of a file from `start` on; `size` is how long the file should be.

        Raises
        ------
        MissingFile
            There is no such file.
        FewbitsError
            The bytes did not come, or not all of them.
        """
        raise NotImplementedError  # abstract

    def read_whole(self, name: str, limit: int) -> bytes:
        """All bytes of a file of at most `limit`."""
        raise NotImplementedError  # abstract

    def forget(self, name: str) -> None:
        """What was read of a file was wrong: keep nothing of it."""

    def counted(self, data: bytes) -> bytes:
        self.moved += len(data)
        return data


def open_folder(location: str | Path, timeout: float) -> Folder:
    """The folder at a path or URL.

    Parameters
    ----------
    location : a path, or a URL of ``http``, ``https``, ``file`` or any kind that fsspec opens.
    timeout : seconds without a byte after which a read over HTTP has failed.

    Raises
    ------
    FewbitsError
        A kind of URL that nothing here opens.
    """
    if isinstance(location, str) and WEB.match(location):
        return WebFolder(location, timeout)
    if is_url(location):
        return RemoteFolder(str(location))
    return LocalFolder(local_path(location))


def beside(folder: str, name: str) -> str:
    """The path of a file in a folder, or next to it (``../name``), without dots."""
    return posixpath.normpath(posixpath.join(folder or "/", name))


def check_length(where: str, data: bytes, nbytes: int) -> bytes:
    if len(data) != nbytes:
        raise FewbitsError(f"{where} gave {len(data):,} of {nbytes:,} bytes: it was cut short")
    return data


def check_limit(where: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FewbitsError(f"{where} is longer than the {limit:,} bytes that it may have")
    return data


class LocalFolder(Folder):
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def read(self, name: str, start: int, nbytes: int, size: int) -> bytes:
        with self.opened(name) as (where, file):
            file.seek(start)
            return self.counted(check_length(where, file.read(nbytes), nbytes))

    def read_whole(self, name: str, limit: int) -> bytes:
        with self.opened(name) as (where, file):
            return self.counted(check_limit(where, file.read(limit + 1), limit))

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[str, Any]]:
        path = self.path / name
        try:
            with open(path, "rb") as file:
                yield str(path), file
        except FileNotFoundError:
            raise MissingFile(f"there is no {path}") from None
        except OSError as error:
            raise cannot_read(str(path), error) from None


class RemoteFolder(Folder):
    """A folder behind a URL that fsspec opens."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url.rstrip("/")
        self.system, self.path = file_system(self.url)

    def read(self, name: str, start: int, nbytes: int, size: int) -> bytes:
        with self.errors(name) as (where, path):
            data = self.system.cat_file(path, start=start, end=start + nbytes)
            return self.counted(check_length(where, data, nbytes))

    def read_whole(self, name: str, limit: int) -> bytes:
        with self.errors(name) as (where, path), self.system.open(path, "rb") as file:
            return self.counted(check_limit(where, file.read(limit + 1), limit))

    @contextlib.contextmanager
    def errors(self, name: str) -> Iterator[tuple[str, str]]:
        """The URL and the path of a file; drivers have errors of their own, all of them here."""
        where = f"{self.url}/{name}"
        try:
            yield where, beside(self.path, name)
        except FewbitsError:
            raise
        except FileNotFoundError:
            raise MissingFile(f"there is no {where}") from None
        except Exception as error:
            raise cannot_read(where, error) from None


class WebFolder(Folder):
    """A folder behind HTTP. What stands behind ``?`` in its URL goes with each request.

    A server that does not know byte ranges sends whole files; they are kept, so that each is read
    once and not for each chunk.
    """

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__()
        self.parts, self.timeout = urlsplit(url), timeout
        self.kept: dict[str, bytes] = {}

    def url(self, name: str) -> str:
        path = beside(self.parts.path, quote(name))
        return urlunsplit(self.parts._replace(path=path, fragment=""))

    def read(self, name: str, start: int, nbytes: int, size: int) -> bytes:
        url, kept = self.url(name), self.kept.get(name)
        if kept is not None:
            return check_length(url, kept[start : start + nbytes], nbytes)
        wanted = {"Range": f"bytes={start}-{start + nbytes - 1}"} if nbytes < size else {}
        with self.answer(url, wanted) as answer:
            if answer.status == 206:
                found = answer.headers.get("Content-Range", "")
                if not found.startswith(f"bytes {start}-"):
                    raise FewbitsError(f"{url} gave another piece than was asked for: {found}")
                return self.counted(check_length(url, answer.read(nbytes), nbytes))
            whole = self.counted(check_length(url, answer.read(size), size))
        self.kept[name] = whole
        return whole[start : start + nbytes]

    def read_whole(self, name: str, limit: int) -> bytes:
        url = self.url(name)
        with self.answer(url, {}) as answer:
            data = self.counted(check_limit(url, answer.read(limit + 1), limit))
            length = answer.headers.get("Content-Length")
            return check_length(url, data, int(length)) if length else data

    def forget(self, name: str) -> None:
        self.kept.pop(name, None)

    @contextlib.contextmanager
    def answer(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        request = urllib.request.Request(url, headers=headers | {"Accept-Encoding": "identity"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                yield answer
        except HTTPError as error:
            kind = MissingFile if error.code in LASTING else FewbitsError
            raise kind(f"{url}: the server says {error.code} {error.reason}") from None
        except URLError as error:
            reason = error.reason
            raise cannot_read(url, reason if isinstance(reason, OSError) else error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, FewbitsError):
                raise
            raise cannot_read(url, error) from None
