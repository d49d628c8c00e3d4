"""Files of fitted methods: safetensors, with the settings and the model's fingerprint as JSON."""

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

FORMAT = "fewbits-kv-1"
SIGNS = 256
"""Weights of each matrix whose signs tell a model from others of its shape."""

Fingerprint = dict[str, str | int]
"""What tells a model from others: the shape of its cache, and a digest of some weights."""


# -- models --------------------------------------------------------------------------------


def fingerprint(model: Any) -> Fingerprint:
    """What a method that is fitted to a model must find again in the model it is used with.

    The digest is one of signs, so that it is the same in every float type.
    """
    text = model.config.get_text_config(decoder=True)
    signs = hashlib.sha256()
    for weights in model.parameters():
        if weights.ndim > 1 and weights.is_floating_point():
            some = weights.detach().reshape(-1)[:SIGNS]
            signs.update(torch.signbit(some).cpu().numpy().tobytes())
    return {
        "architecture": str(text.model_type),
        "layers": int(text.num_hidden_layers),
        "key heads": int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        "width of a head": head_width(text),
        "hidden size": int(text.hidden_size),
        "weights": signs.hexdigest()[:32],
    }


def head_width(text_config: Any) -> int:
    """Numbers in a key of one head."""
    given = getattr(text_config, "head_dim", None)
    return int(given or text_config.hidden_size // text_config.num_attention_heads)


def check_model(found: Mapping[str, Any], model: Any) -> None:
    """Refuse a model that is not the one with the fingerprint `found`.

    Raises
    ------
    FewbitsError
        It has another shape or other weights.
    """
    for what, mine in fingerprint(model).items():
        fitted = found.get(what)
        if fitted == mine:
            continue
        if what == "weights":
            raise FewbitsError(
                "this was fitted on a model of the same shape with other weights; fit it again "
                "on this one"
            )
        raise FewbitsError(
            f"this was fitted on a model with {what} {fitted}, but this one has {mine}; fit it "
            "again on this one"
        )


# -- files ---------------------------------------------------------------------------------


def save_fitted(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    model_fingerprint: Fingerprint,
    overwrite: bool = False,
) -> None:
    """Write a fitted method to a temporary file, then rename it.

    Parameters
    ----------
    kind : name of the method.
    tensors : what it learned, by name.
    settings : anything else, as JSON can hold it.

    Raises
    ------
    FewbitsError
        The file is there already (and not ``overwrite``), or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FewbitsError(f"{path} exists; choose another name, or overwrite=True")
    about = {"kind": kind, "settings": dict(settings), "model": model_fingerprint}
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    # clone: safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(own, temporary, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise FewbitsError(f"cannot write {path}: {error}") from None


def load_fitted(
    path: str | Path, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any], Fingerprint]:
    """Tensors (on the CPU), settings and the fingerprint of the model from a file.

    Raises
    ------
    FewbitsError
        There is no such file, it is not one of this kind, or it is damaged. The shapes of the
        tensors are for the method to check.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise FewbitsError(f"cannot read {path}: {error}") from None
    except SafetensorError:
        raise FewbitsError(f"{path} is damaged, or no file of a fitted method") from None
    if metadata.get("format") != FORMAT:
        raise FewbitsError(f"{path} is no file of a fitted method that this fewbits wrote")
    about = content_of(metadata.get("about", ""), path)
    if about["kind"] != kind:
        raise FewbitsError(f"{path} is of the method {about['kind']}, not of {kind}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FewbitsError(f"{path} is damaged: {name} has NaN or infinity")
    return tensors, about["settings"], about["model"]


def content_of(text: str, path: Path) -> dict[str, Any]:
    """The JSON of a file, checked."""
    kinds = {"kind": str, "settings": dict, "model": dict}
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not all(
        isinstance(about.get(name), kind) for name, kind in kinds.items()
    ):
        raise FewbitsError(f"{path} is damaged: it does not say what it holds")
    return about
