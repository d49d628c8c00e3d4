"""Directories of parts: one part for each shard, and what is known of unfinished work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.core import container
from fewbits.core.codec import Codec, from_description
from fewbits.core.collection import CODEC_FILE, code_of, part_file
from fewbits.core.errors import FewbitsError
from fewbits.core.source import Source

PART_FILES = "part-*.fewbits"


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


def describe_part(number: int, part: Source, codec: Codec) -> dict[str, Any]:
    """What the file of a part says of itself."""
    return {"codec": codec.digest, "part": number, "source": part.name, "stamp": part.stamp}


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
        stale = leftovers(folder)
        if not (folder / CODEC_FILE).exists() and set(folder.iterdir()) - set(stale):
            raise FewbitsError(f"{folder} exists and is not empty; choose another name")
        for file in stale:
            file.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Half-written files of processes that were killed."""
    return [file for name in (CODEC_FILE, PART_FILES) for file in folder.glob(f".{name}.*.tmp")]


def remove_leftovers(folder: Path) -> None:
    with container.clear_errors(folder):
        for file in leftovers(folder):
            file.unlink(missing_ok=True)


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


def finished(folder: Path, number: int, part: Source, codec: Codec) -> bool:
    """Whether a part is there, whole, of this codec, and of the shard as it is now."""
    file = part_file(folder, number)
    try:
        if not file.exists():
            return False
        content = container.read(file)
        is_mine = content.kind == "part" and content.about == describe_part(number, part, codec)
        return is_mine and len(code_of(content.arrays, codec, file)) == part.rows
    except FewbitsError:
        return False


def remove_parts(folder: Path) -> None:
    """Delete the files of an encoded directory, and nothing else."""
    with container.clear_errors(folder):
        for name in (CODEC_FILE, PART_FILES):
            for file in folder.glob(name):
                file.unlink()
