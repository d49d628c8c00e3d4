"""What the layers of a network compute, read through forward hooks, batch by batch.

For example, the outputs of two layers for the last token of each text::

    for seen in record(model, {"input_ids": ids, "attention_mask": mask}, ["layers.0", "layers.5"],
                       tokens="last"):
        seen["layers.5"]  # (b, width) tensor on the CPU

Only one batch is held at a time, and of it only what `keep` makes of each layer's values. The
network evaluates (dropout off, batch statistics fixed) without gradients while a batch passes, and
is as it was before and after. No paper names in here.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

ACTIVATION = re.compile(r"elu|silu|swish|mish", re.IGNORECASE)
"""Names of classes whose values have the sign of what goes in: ReLU, LeakyReLU, PReLU, ReLU6, ELU,
GELU, SiLU, Hardswish, Mish, and those that other libraries derive from them."""

Read = Literal["auto", "input", "output"]
Keep = Callable[[str, Tensor], Any]
"""Gets the name of a layer and its values (b, …), gives what to hold on to."""


def activation_layers(model: nn.Module) -> list[str]:
    """Names of the ReLU-like modules of `model`, in the order of its definition."""
    return [name for name, module in model.named_modules() if is_activation(module)]


def is_activation(module: nn.Module) -> bool:
    """Whether a module is ReLU-like, by the name of its class."""
    leaf = next(module.children(), None) is None
    return leaf and ACTIVATION.search(type(module).__name__) is not None


def find_layers(model: nn.Module, layers: str | Sequence[str] = "auto") -> list[str]:
    """The names `layers`, if `model` has them all; with ``auto`` those of its ReLU-like modules.

    Raises
    ------
    ValueError
        A name that it does not have (the nearest is named), no names, or no ReLU-like modules.
    """
    if layers == "auto":
        found = activation_layers(model)
        if not found:
            raise ValueError(
                "this network has no ReLU-like modules (functions cannot be hooked); name the "
                "layers before its activations: layers=[…] out of model.named_modules()"
            )
        return found
    if isinstance(layers, str) or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers={layers!r} must be 'auto' or a list of different names")
    known = [name for name, _ in model.named_modules() if name]
    for name in layers:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the network has no layer {name!r}{hint}")
    return list(layers)


def copied(name: str, values: Tensor) -> Tensor:
    """The values themselves, on the CPU; a later layer may work in place."""
    return values.to("cpu", copy=True)


def record(
    model: nn.Module,
    inputs: Any,
    layers: str | Sequence[str] = "auto",
    *,
    read: Read = "auto",
    tokens: str | int = "all",
    keep: Keep = copied,
    batch: int = 64,
) -> Iterator[dict[str, Any]]:
    """Run `model` over `inputs`, and give what its layers computed for each batch.

    Parameters
    ----------
    inputs : whatever `batches` takes. The model stays on its device, batches are moved there.
    layers : ``auto`` or names out of ``model.named_modules()``.
    read : the ``output`` of a module or its ``input`` (the first tensor of several); ``auto``
        reads pre-activations: the input of a ReLU-like module, the output of any other.
    tokens : which tokens of (b, t, d) values to read: ``all``, ``first``, ``last``, their
        ``mean``, or a number. First, last and mean heed an ``attention_mask`` among the inputs.
    keep : what to hold on to of a layer's values, at once and on their device.
    batch : items at a time.

    Yields
    ------
    Name → what was kept, in the order of the forward pass. A module that runs several times in
    one pass stands there as ``name``, ``name#2``, ``name#3``, …; one that does not run is missing.

    Raises
    ------
    ValueError
        Unusable inputs or names, inputs that the network does not take, or a layer whose values
        do not have one row per item or have NaN.
    """
    names = find_layers(model, layers)
    for part in batches(inputs, batch):
        yield observe(model, part, names, read=read, tokens=tokens, keep=keep)


def observe(
    model: nn.Module,
    part: Any,
    names: Sequence[str],
    *,
    read: Read = "auto",
    tokens: str | int = "all",
    keep: Keep = copied,
) -> dict[str, Any]:
    """What `record` gives for one batch: an array, a tensor, or a mapping of them by name."""
    given = to_model(model, part)
    mask = given.get("attention_mask") if isinstance(given, Mapping) else None
    items = len(next(iter(given.values()))) if isinstance(given, Mapping) else len(given)
    seen: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def take(name: str, value: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        label = name if calls[name] == 1 else f"{name}#{calls[name]}"
        values = first_tensor(value)
        if values is None or values.ndim < 2 or len(values) != items:
            shape = type(value).__name__ if values is None else tuple(values.shape)
            raise ValueError(f"layer {label!r}: {shape} is not one row for each of {items} items")
        if bool(values.isnan().any()):
            raise ValueError(f"layer {label!r} has NaN; check the weights and the inputs")
        seen[label] = keep(label, pick_tokens(values.detach(), tokens, mask))

    with evaluating(model), hooked(model, names, take, read), torch.no_grad():
        try:
            model(**given) if isinstance(given, Mapping) else model(given)
        except (RuntimeError, TypeError, IndexError) as error:
            about = str(error).partition("\n")[0]
            raise ValueError(f"the network does not take these inputs: {about}") from error
    return seen


@contextlib.contextmanager
def hooked(
    model: nn.Module, names: Sequence[str], take: Callable[[str, Any], None], read: Read
) -> Iterator[None]:
    """Call `take` with the values of the layers `names` while the block runs the model."""
    modules = dict(model.named_modules())

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        take(name, (*args, *kwargs.values()))

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        take(name, output)

    with contextlib.ExitStack() as handles:
        for name in names:
            module = modules[name]
            if read == "input" or (read == "auto" and is_activation(module)):
                # Before the module runs, because it may work in place.
                hook = partial(before, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(after, name))
            handles.callback(handle.remove)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_tensor(value: Any) -> Tensor | None:
    """`value`, or the first tensor in it where it is a tuple or a mapping."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None


def pick_tokens(values: Tensor, tokens: str | int, mask: Tensor | None = None) -> Tensor:
    """(b, d) of the chosen tokens of (b, t, d) values; other shapes, and ``all``, stay.

    `mask` (b, t) is not 0 where a token is one.
    """
    if tokens == "all" or values.ndim != 3:
        return values
    if isinstance(tokens, int):
        if not -values.shape[1] <= tokens < values.shape[1]:
            raise ValueError(f"tokens={tokens}, but there are {values.shape[1]} tokens")
        return values[:, tokens]
    if tokens not in ("first", "last", "mean"):
        raise ValueError(f"tokens={tokens!r} must be all, first, last, mean or a number")
    there = torch.ones(values.shape[:2], device=values.device) if mask is None else mask
    there = (there != 0).int()
    if there.shape != values.shape[:2]:
        raise ValueError(f"the attention mask {tuple(there.shape)} does not fit the tokens")
    if tokens == "mean":
        total = torch.einsum("btd,bt->bd", values, there.to(values.dtype))
        return total / there.sum(dim=1, keepdim=True)
    if tokens == "last":
        place = there.shape[1] - 1 - there.flip(1).argmax(dim=1)
    else:
        place = there.argmax(dim=1)
    return values[torch.arange(len(values), device=values.device), place]


# -- inputs --------------------------------------------------------------------------------


def batches(inputs: Any, batch: int) -> Iterator[Any]:
    """Cut `inputs` into batches of at most so many items.

    Parameters
    ----------
    inputs : an array or tensor (n, …), which may be mapped from a file; a mapping of them by
        the names of the model's arguments; or an iterable of batches of either kind, such as a
        DataLoader: they are taken as they come, and of a batch that is a tuple or list, such as
        inputs and labels, the first.

    Raises
    ------
    ValueError
        Nothing there, numbers that are not finite, or something else.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    first = 0
    for part in cut(inputs, batch):
        part = part[0] if isinstance(part, (tuple, list)) and part else part
        rows = row_count(part)
        check_finite(part, first)
        first += rows
        yield part
    if not first:
        raise ValueError("the input is empty; give one item at least")


def cut(inputs: Any, batch: int) -> Iterator[Any]:
    if isinstance(inputs, (np.ndarray, Tensor, Mapping)):
        for start in range(0, row_count(inputs), batch):
            rows = slice(start, start + batch)
            if isinstance(inputs, Mapping):
                yield {name: value[rows] for name, value in inputs.items()}
            else:
                yield inputs[rows]
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes)):
        yield from inputs
    else:
        raise ValueError(
            f"inputs must be an array, a tensor, a mapping of them or batches, not a "
            f"{type(inputs).__name__}"
        )


def row_count(part: Any) -> int:
    """Items of an array, a tensor, or a mapping of them."""
    values = list(part.values()) if isinstance(part, Mapping) else [part]
    if not values or not all(isinstance(value, (np.ndarray, Tensor)) for value in values):
        raise ValueError("a batch must be an array, a tensor, or a mapping of them by name")
    if any(value.ndim < (1 if isinstance(part, Mapping) else 2) for value in values):
        raise ValueError("inputs need two axes at least: items, and what is known of each")
    if len({len(value) for value in values}) > 1:
        raise ValueError(f"inputs differ in length: {[len(value) for value in values]}")
    return len(values[0])


def check_finite(part: Any, first: int) -> None:
    """Refuse NaN and infinity; `first` is the number of the first item."""
    for value in part.values() if isinstance(part, Mapping) else [part]:
        if isinstance(value, Tensor):
            bad = ~value.isfinite().flatten(1).all(dim=1).cpu().numpy()
        elif value.dtype.kind == "f":
            bad = ~np.isfinite(value).reshape(len(value), -1).all(axis=1)
        elif value.dtype.kind in "iub":
            continue
        else:
            raise ValueError(f"inputs have dtype {value.dtype}; convert them to numbers")
        if bad.any():
            raise ValueError(f"item {first + int(bad.argmax())} has NaN or infinity; repair it")


def to_model(model: nn.Module, part: Any) -> Any:
    """A batch as tensors where the model is; floats get the dtype of its parameters."""
    if isinstance(part, Mapping):
        return {name: to_model(model, value) for name, value in part.items()}
    # A copy: what is mapped from a file cannot be written to, which torch warns of.
    tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return tensor
    kind = weight.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(weight.device, kind)
