"""NTK-Attention as a way to fine-tune: a trained state beside the tokens of every attention.

The model is frozen; Z and k of each attention layer and query head are trained. Any model whose
attention goes through transformers' attention interface can be adapted: language models (with and
without a cache), encoders, vision transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fewbits.core.errors import FewbitsError
from fewbits.kv._attention import allowed_of
from fewbits.kv._cache import CompressedLayer
from fewbits.kv._files import check_model, fingerprint, load_fitted, save_fitted
from fewbits.kv._ntk_state import feature_map, join_terms
from fewbits.kv._transformers import fewbits_attention
from fewbits.primitives.partial_attention import BLOCK_SCORES, soft_cap

NAME = "fewbits-ntk"
KIND = "ntk-adapter"
PLACE = "fewbits_prefix"
"""The attribute of an attention module that its trained prefix is."""
LOOKING = "fewbits-look"
SMALL = 1e-4
"""Standard deviation of a state that does not begin at zero."""


# -- the attention function ----------------------------------------------------------------


def ntk_attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: transformers' own, and what the module's prefix adds to it."""
    prefix = getattr(module, PLACE, None)
    if isinstance(key, CompressedLayer) and prefix is not None:
        raise FewbitsError("an adapted model cannot use a compressed cache; remove the adapter")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, _ = fewbits_attention(
        module, query, key, value, attention_mask, dropout, scale, softcap, s_aux, **kwargs
    )
    if prefix is None:
        return output, None
    if kwargs.get("position_bias") is not None:
        raise FewbitsError("attention with a position bias cannot be adapted")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    masses = log_masses(query, key, attention_mask, scale, softcap, bool(causal))
    if s_aux is not None:
        masses = torch.logaddexp(masses, s_aux.float()[None, :, None])
    return prefix(query, scale, output.transpose(1, 2), masses).transpose(1, 2).contiguous(), None


def log_masses(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None = None,
    causal: bool = False,
) -> Tensor:
    """(b, heads, t) float32: logsumexp of the scores that each query may see.

    Parameters
    ----------
    query, key : (b, heads, t, d), (b, key heads, s, d).
    mask : (b, 1 or heads, t, ≥ s) bool, or to be added to the scores.
    causal : whether no mask means that token t sees the first t keys.
    """
    heads, tokens, held = key.shape[1], query.shape[2], key.shape[2]
    rows = query.unflatten(1, (heads, -1))
    if mask is None and causal and tokens > 1:
        key = key[:, :, :tokens]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).tril()[None, None]
    elif mask is not None:
        mask = mask[..., :held]
        own_heads = mask.shape[1] == query.shape[1]
        mask = mask.unflatten(1, (heads, -1)) if own_heads else mask[:, :, None]
    keys = key.float().transpose(2, 3)[:, :, None]
    step = max(1, BLOCK_SCORES // (query.shape[0] * query.shape[1] * held))
    found = []
    for start in range(0, tokens, step):
        scores = soft_cap(rows[:, :, :, start : start + step].float() @ keys * scaling, cap)
        if mask is not None:
            part = mask[..., start : start + step, :] if mask.shape[-2] > 1 else mask
            if part.dtype != torch.bool:
                scores = scores + part.float()
            scores = scores.masked_fill(~allowed_of(part), -torch.inf)
        found.append(torch.logsumexp(scores, dim=-1))
    return torch.cat(found, dim=-1).flatten(1, 2)


# -- what is trained -----------------------------------------------------------------------


class TrainedPrefix(nn.Module):
    """Z and k of one attention layer, per query head, float32 whatever the model is.

    Parameters
    ----------
    heads, width, value_width : query heads, and numbers of a query and of a value.
    features : name of the feature map Φ.
    start : ``zeros``: the model begins exactly as it was. ``random``: N(0, 1)·1e-4.
    dropout : of Φ(q), in training.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        value_width: int,
        features: str = "elu",
        start: str = "zeros",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features, self.dropout = feature_map(features), dropout
        count = self.features.width(width)
        drawn = torch.zeros if start == "zeros" else torch.randn
        self.z = nn.Parameter(drawn(heads, count, value_width) * SMALL)
        self.k = nn.Parameter(drawn(heads, count) * SMALL)

    def forward(self, query: Tensor, scaling: float, output: Tensor, log_mass: Tensor) -> Tensor:
        """Join the prefix to attention over tokens.

        Parameters
        ----------
        query, output : (b, heads, t, d): the latter is attention over the tokens.
        log_mass : (b, heads, t) float32, see `log_masses`.
        """
        mapped = self.features(query.float() * math.sqrt(scaling)).float()
        mapped = functional.dropout(mapped, self.dropout, self.training)
        added = torch.einsum("bhtr,hrd->bhtd", mapped, self.z.float())
        mass = torch.einsum("bhtr,hr->bht", mapped, absolute(self.k.float()))
        return join_terms(output, log_mass, added, mass)


def absolute(x: Tensor) -> Tensor:
    """|x|, with the slope 1 at 0: with a slope of 0 what begins at zero would stay there."""
    return x * torch.where(x >= 0, 1.0, -1.0)


# -- adapting a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """Query heads of an attention module, and numbers in a query and in a value."""

    heads: int
    width: int
    value_width: int


class NTKAdapter:
    """A state that stands for an infinitely long prefix, in each attention layer of a model.

    The model is frozen, but for the state and for `train`; train it as any other. Cast the model
    before, not after. State: heads·(d² + d) float32 per layer with ``elu`` features.

    Parameters
    ----------
    model : a model of transformers; it is changed in place.
    features : ``elu``, or ``taylor-2``.
    start : ``zeros``: the model begins exactly as it was. ``random``: N(0, 1)·1e-4.
    dropout : of the features of queries, in training.
    train : names of modules that are trained, too, such as ``classifier``.
    example : what the model takes by name, to find its attention layers with; made up if not given.
    seed : of the random start.

    Raises
    ------
    FewbitsError
        Attention that cannot be replaced, a model that is adapted already, unknown names.
    """

    def __init__(
        self,
        model: Any,
        features: str = "elu",
        start: Literal["zeros", "random"] = "zeros",
        dropout: float = 0.0,
        train: tuple[str, ...] = (),
        example: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if start not in ("zeros", "random"):
            raise FewbitsError(f"start={start!r} must be zeros or random")
        if not 0 <= dropout < 1:
            raise FewbitsError(f"dropout={dropout} must be at least 0 and below 1")
        feature_map(features)
        if not hasattr(model, "set_attn_implementation"):
            raise FewbitsError("only models of transformers can be adapted; give one")
        modules = dict(model.named_modules())
        unknown = [name for name in train if name not in modules]
        if unknown:
            raise FewbitsError(f"the model has no module {unknown[0]!r} to train")
        self.model, self.trained_modules = model, tuple(train)
        self.options: dict[str, Any] = {"features": features, "dropout": float(dropout)}
        self.was_trainable = {name: one.requires_grad for name, one in model.named_parameters()}
        self.attention_before = str(model.config._attn_implementation)
        self.fingerprint = fingerprint(getattr(model, "base_model", model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.attached = attach(
                model,
                lambda shape: TrainedPrefix(
                    shape.heads, shape.width, shape.value_width, features, start, dropout
                ),
                example,
            )
        model.requires_grad_(False)
        for part in (*self.attached.values(), *(modules[name] for name in train)):
            part.requires_grad_(True)

    @property
    def states(self) -> dict[str, nn.Module]:
        """The trained prefix of each attention module, by the module's name."""
        return self.attached

    @property
    def nbytes(self) -> int:
        """Bytes of all states together."""
        states = (one for prefix in self.attached.values() for one in prefix.parameters())
        return sum(one.untyped_storage().nbytes() for one in states)

    def remove(self) -> None:
        """Make the model what it was, but for the modules that were trained, too."""
        detach(self.model, self.attention_before)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.was_trainable[name])

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the states, and the modules that were trained with them, to a safetensors file.

        Raises
        ------
        FewbitsError
            The file is there already (and not ``overwrite``), or cannot be written.
        """
        settings = {**self.options, "train": list(self.trained_modules)}
        tensors = dict(self.trained_tensors())
        save_fitted(path, KIND, tensors, settings, self.fingerprint, overwrite)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that is trained."""
        modules = dict(self.model.named_modules())
        parts = [(f"{name}.{PLACE}", prefix) for name, prefix in self.attached.items()]
        parts += [(name, modules[name]) for name in self.trained_modules]
        for name, part in parts:
            yield from ((f"{name}.{inner}", one) for inner, one in part.state_dict().items())

    @classmethod
    def load(
        cls, path: str | Path, model: Any, example: Mapping[str, Tensor] | None = None
    ) -> NTKAdapter:
        """Adapt a model as it was trained before.

        Raises
        ------
        FewbitsError
            No such file, one of another kind, a damaged one, or one for another model.
        """
        tensors, settings, found = load_fitted(path, KIND)
        check_model(found, getattr(model, "base_model", model))
        features, dropout, train = (settings.get(name) for name in ("features", "dropout", "train"))
        if not (
            isinstance(features, str) and isinstance(dropout, float) and isinstance(train, list)
        ):
            raise FewbitsError(f"{path} is damaged: its settings are missing")
        names = tuple(str(name) for name in train)
        adapter = cls(model, features, "zeros", dropout, names, example)
        own = dict(adapter.trained_tensors())
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            adapter.remove()
            raise FewbitsError(f"{path} does not fit the attention layers of this model")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        return adapter


# -- finding and changing attention modules ------------------------------------------------


def attach(
    model: Any,
    make: Callable[[AttentionShape], nn.Module],
    example: Mapping[str, Tensor] | None = None,
) -> dict[str, nn.Module]:
    """Give each attention module of a model something beside its tokens.

    Parameters
    ----------
    make : gives a module that is called as `TrainedPrefix` is.

    Returns
    -------
    What was made, by the names of the attention modules.

    Raises
    ------
    FewbitsError
        Attention that cannot be replaced, or a model that has an adapter already.
    """
    if any(hasattr(module, PLACE) for module in model.modules()):
        raise FewbitsError("the model is adapted already; remove that adapter first")
    shapes = attention_shapes(model, example)
    replace_attention(model, NAME, ntk_attention)
    attached = {}
    for name, module in model.named_modules():
        if id(module) in shapes:
            prefix = make(shapes[id(module)]).to(next(module.parameters()).device)
            attached[name] = prefix.train(module.training)
    for name, prefix in attached.items():
        module = model.get_submodule(name)
        setattr(module, PLACE, prefix)
        prefix.guard = module.register_forward_pre_hook(check_in_use)
    return attached


def detach(model: Any, before: str) -> None:
    """Take away what `attach` gave; `before` is the attention function that the model had."""
    for module in list(model.modules()):
        prefix = getattr(module, PLACE, None)
        if prefix is not None:
            prefix.guard.remove()
            delattr(module, PLACE)
    model.set_attn_implementation(before)


def check_in_use(module: Any, arguments: Any) -> None:
    """Complain where something else replaced the attention function behind the adapter's back."""
    used = module.config._attn_implementation
    if used != NAME:
        raise FewbitsError(
            f"the attention of this adapted model was switched to {used}, which leaves the "
            f"adapter out; remove the adapter, or model.set_attn_implementation({NAME!r})"
        )


@torch.no_grad()
def attention_shapes(model: Any, example: Mapping[str, Tensor] | None) -> dict[int, AttentionShape]:
    """The shape of each module that calls the attention function, by the module's identity."""
    found: dict[int, AttentionShape] = {}

    def look(
        module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        found[id(module)] = AttentionShape(query.shape[1], query.shape[3], value.shape[3])
        return fewbits_attention(module, query, key, value, attention_mask, **kwargs)

    before = replace_attention(model, LOOKING, look)
    training = model.training
    try:
        model.eval()
        inputs = made_up_inputs(model) if example is None else example
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FewbitsError(
            f"{type(model).__name__} cannot read what its attention layers were to be found with; "
            f"give an example of its input: {reason}"
        ) from None
    finally:
        model.train(training)
        model.set_attn_implementation(before)
    if not found:
        raise FewbitsError(f"no attention layer of {type(model).__name__} can be adapted")
    return found


def replace_attention(model: Any, name: str, function: Any) -> str:
    """Have a model call an attention function; returns the name of the one it had."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    refused = f"{type(model).__name__} does not let its attention be replaced"
    if not hasattr(model, "set_attn_implementation"):
        raise FewbitsError(f"{refused}; give a model of transformers")
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise FewbitsError(f"{refused} ({error})") from None
    if model.config._attn_implementation != name:
        raise FewbitsError(refused)
    return before


def made_up_inputs(model: Any) -> dict[str, Tensor]:
    """Something that a model can read: two tokens, or an image of zeros."""
    config = model.config
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        sides = config.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype)}
    raise FewbitsError(
        f"it is not known what {type(model).__name__} reads; give an example of its input"
    )
