"""Files that a training run can be continued from: safetensors, with the numbers as JSON.

A state is any nesting of dicts, lists, tuples, tensors, numbers, strings and None, such as
``state_dict()`` returns. The settings are strings that say which run the state belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbits.core.errors import FewbitsError

FORMAT = "fewbits-checkpoint-1"

Settings = Mapping[str, str]


def write_checkpoint(path: Path, settings: Settings, state: Mapping[str, Any]) -> None:
    """Write `state` to a temporary file, then rename it, so that nobody sees half a file.

    Raises
    ------
    FewbitsError
        The file cannot be written, or the state holds something other than named above.
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps({"settings": dict(settings), "state": pack(state, "state", tensors)})
    about = {"format": FORMAT, "content": content, "sha256": digest(content, tensors)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=about)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise FewbitsError(f"cannot write the checkpoint {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, settings: Settings) -> Any:
    """The state in the file `path`, its tensors on the CPU. O(file size): its digest is checked.

    Raises
    ------
    FewbitsError
        The file cannot be read, is damaged, or was written with other settings.
    """
    about, tensors = read_file(path)
    if about.get("format") != FORMAT:
        raise FewbitsError(f"{path} is not a checkpoint that this fewbits wrote; move it away")
    if digest(about.get("content", ""), tensors) != about.get("sha256"):
        raise damaged(path)
    try:
        content = json.loads(about["content"])
        written, state = content["settings"], unpack(content["state"], tensors)
        other = sorted(name for name in settings if written.get(name) != settings[name])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged(path) from None
    if other:
        raise FewbitsError(
            f"the checkpoint {path} belongs to another run (other {', '.join(other)}); "
            "delete it to start again, or choose another file"
        )
    return state


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except OSError as error:
        raise FewbitsError(f"cannot read the checkpoint {path}: {error}") from None
    except SafetensorError:
        raise damaged(path) from None


def damaged(path: Path) -> FewbitsError:
    return FewbitsError(f"the checkpoint {path} is damaged; delete it to start again")


def digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a checkpoint's JSON and of its tensors, on the CPU."""
    result = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; the tensors in it go to `tensors`, under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[k, pack(item, f"{name}/{k}", tensors)] for k, item in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FewbitsError(f"a checkpoint cannot hold {name}, which is a {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unpack(item, tensors) for key, item in content}
    return (tuple if kind == "tuple" else list)(unpack(item, tensors) for item in content)
