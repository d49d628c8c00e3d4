"""The cache that every method of this room is a form of, inside transformers' own interfaces.

A layer's ``update`` returns the layer itself in the place of keys and values, and the attention
function ``fewbits`` (registered with transformers) asks it to `attend`. So attention happens
wherever the method keeps its tokens, and full-width keys and values of the past need not exist.
Model code is not changed.

Until the end of the prompt all tokens are exact, and attention is transformers' own: the logits of
the prompt are those of the unchanged model. Then the stages of the method decide what is kept and
in what form. New tokens come in exactly; stages may compress them, too, when there are enough.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from fewbits.core.errors import FewbitsError
from fewbits.kv._attention import (
    allowed_of,
    attend_part,
    exact_attention,
    mask_of_held,
    sink_mass,
)
from fewbits.kv._forms import Exact, Form, Part
from fewbits.primitives.partial_attention import Partial, causal, fold, join, unfold

# -- what a method writes ------------------------------------------------------------------


@dataclass
class Step:
    """What a stage sees of one call of a layer's attention.

    Attributes
    ----------
    queries : (b, heads, t, d) of the new tokens.
    keys, values : (b, key heads, s, d) of all tokens so far, exact, the new ones last.
    allowed : (b, 1, t, s) bool, or None for plain causal attention.
    scaling, cap : of the scores.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    allowed: Tensor | None
    scaling: float
    cap: float | None


@dataclass
class Inputs:
    """What comes into a layer's attention.

    Attributes
    ----------
    states : (b, t, hidden size): what keys and values are made of.
    positions : (b or 1, t) int64 of these tokens; None or more axes where the model has it so.
    first : so many tokens the layer has seen before.
    module : the attention.
    rotary : what makes its rotary embeddings, if the model has it as a module.
    """

    states: Tensor
    positions: Tensor | None
    first: int
    module: Any
    rotary: Any


@dataclass
class Memory:
    """What a stage remembers of a layer.

    Attributes
    ----------
    layer, layers : its number, and how many there are.
    notes : taken while the prompt is read, and dropped when it ends.
    kept : stays; it belongs to what the cache holds, and its tensors count as bytes.
    told : what `CompressedCache.tell` was given about the prompt's tokens; dropped with the notes.
    """

    layer: int
    layers: int
    notes: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Tensor] = field(default_factory=dict)


class Stage:
    """A step of compression. A method is one stage or several after each other.

    Subclasses are dataclasses whose fields are hyper-parameters.
    """

    name: ClassVar[str]
    encodes: ClassVar[bool] = False
    """Whether it changes the form of tokens (and does not only choose among them)."""

    by_blocks: ClassVar[bool] = False
    """Whether the prompt becomes a part for each block, and not one part."""
    drops_later: ClassVar[bool] = False
    """Whether it drops tokens behind the prompt, too, which then must be exact."""
    sees_inputs: ClassVar[bool] = False
    """Whether it looks at what comes into a layer (`companions`)."""
    alone: ClassVar[bool] = False
    """Whether no other stage can come before or after it."""
    first: ClassVar[bool] = False
    """Whether nothing that changes the form of tokens can come before it."""
    followers: ClassVar[tuple[str, ...] | None] = None
    """Names of the stages that can come behind it; None: any."""

    @property
    def window(self) -> int:
        """The newest tokens, which stay exact."""
        return 0

    @property
    def block(self) -> int | None:
        """So many tokens are compressed together; None where those behind the prompt never are."""
        return None

    @property
    def unit(self) -> int | None:
        """The prompt is compressed in a multiple of so many tokens; as `block` if not said."""
        return self.block

    def check(self) -> None:
        """Refuse to be used as it is: a method that must be fitted first, for example."""

    def check_model(self, model: Any) -> None:
        """Refuse a model that the method was not fitted to."""

    def observe(self, step: Step, memory: Memory) -> None:
        """Look at the prompt as it is read."""

    def shown(self, keys: Tensor, values: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """What attention sees of new (b, h, t, d) keys and values, of the prompt, too."""
        return keys, values

    def companions(self, inputs: Inputs, memory: Memory) -> dict[str, Tensor]:
        """(b, 1, t, …) tensors that go with new tokens for as long as these are exact."""
        return {}

    def beside(self, rows: Tensor, memory: Memory) -> Partial | None:
        """Attention of folded and scaled (b, h, r, d) queries over what is no token."""
        return None

    def choose(self, part: Part, memory: Memory) -> Tensor | None:
        """(b, h or 1, k) rising numbers of the tokens to keep at the end of the prompt."""
        return None

    def encode_keys(self, keys: Tensor, memory: Memory) -> Form:
        """The form in which (b, h, s, d) keys are held."""
        return Exact(keys)

    def encode_values(self, values: Tensor, memory: Memory) -> Form:
        """The form in which (b, h, s, d) values are held."""
        return Exact(values)

    def encode(self, part: Part, memory: Memory) -> Part:
        """A part whose exact numbers are held in the form of this stage."""
        keys = part.keys.inner(lambda numbers: self.encode_keys(numbers, memory))
        values = part.values.inner(lambda numbers: self.encode_values(numbers, memory))
        return Part(keys, values, part.valid)

    def aged(self, parts: list[Part]) -> list[Part]:
        """The compressed parts, oldest first, after one was added; older ones may shrink."""
        return parts

    def grown(self, layer: CompressedLayer, memory: Memory, step: Step | None) -> None:
        """Called after new tokens came in behind the prompt; may drop some of `layer.recent`.

        `step` is there where all tokens are exact.
        """


# -- one layer -----------------------------------------------------------------------------


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The tokens of one layer: compressed `parts`, oldest first, and exact `recent` ones.

    Tokens are numbered as the model saw them, however many are still held: `seen` is what
    positions continue from.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, stages: Sequence[Stage], index: int, layers: int) -> None:
        super().__init__()
        self.stages, self.index, self.layers = list(stages), index, layers
        self.held_open = False
        self.has_more = any(type(stage).beside is not Stage.beside for stage in self.stages)
        self.sees_inputs = any(stage.sees_inputs for stage in self.stages)
        self.clear()

    def clear(self) -> None:
        self.parts: list[Part] = []
        self.recent: Part | None = None
        self.incoming: tuple[Tensor, Tensor] | None = None
        self.inputs: Inputs | None = None
        self.seen = 0
        self.reading_prompt = True
        self.memories = [Memory(self.index, self.layers) for _ in self.stages]

    # -- what transformers calls --------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take in new tokens; the attention function has `attend` called next."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.dtype != key_states.dtype:
            raise FewbitsError(
                f"this cache holds {self.dtype} states, but the model gives {key_states.dtype}; "
                "make a new cache for it"
            )
        self.incoming = key_states, value_states
        self.seen += key_states.shape[2]
        return self, self

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self.change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def change(self, function: Any) -> None:
        """Apply a function to every tensor that is held."""
        self.parts = [part.map(function) for part in self.parts]
        if self.recent is not None:
            self.recent = self.recent.map(function)
        for memory in self.memories:
            for name, value in memory.kept.items():
                memory.kept[name] = function(value) if isinstance(value, Tensor) else value

    # -- attention ----------------------------------------------------------------------------

    def attend(
        self,
        module: Any,
        queries: Tensor,
        mask: Tensor | None,
        scaling: float,
        cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """(b, heads, t, d): attention of new tokens over all that is held and themselves."""
        assert self.incoming is not None
        keys, values = self.incoming
        self.incoming = None
        for stage, memory in zip(self.stages, self.memories, strict=True):
            keys, values = stage.shown(keys, values, memory)
        new = Part(Exact(keys), Exact(values), new_valid(mask, queries), self._companions())
        if self.parts or cap is not None or sinks is not None or self.has_more:
            output = self._joined(queries, new, scaling, cap, sinks)
            everything = joined(self.recent, new) if not self.parts else None
        else:
            everything = joined(self.recent, new)
            output = exact_attention(
                module, queries, everything, mask, scaling, self.reading_prompt
            )
        step = None
        if everything is not None:
            exact = everything.keys.read(), everything.values.read()
            allowed = mask_of_held(everything, new.tokens)
            step = Step(queries, *exact, allowed, scaling, cap)
        self.recent = everything or joined(self.recent, new)
        self._taken_in(step)
        return output

    def _companions(self) -> dict[str, Tensor]:
        """What the stages make of the inputs that were handed over."""
        if not self.sees_inputs:
            return {}
        inputs, self.inputs = self.inputs, None
        if inputs is None:
            raise FewbitsError(
                "this cache needs what comes into each layer, and the model does not hand it over; "
                "make the cache with fewbits.kv.cache for this very model, which must have k_proj "
                "and v_proj, or qkv_proj"
            )
        found: dict[str, Tensor] = {}
        for stage, memory in zip(self.stages, self.memories, strict=True):
            found |= stage.companions(inputs, memory)
        return found

    def _taken_in(self, step: Step | None) -> None:
        """Let the stages see what came in, and compress what is due."""
        staged = list(zip(self.stages, self.memories, strict=True))
        if self.reading_prompt:
            assert step is not None
            for stage, memory in staged:
                stage.observe(step, memory)
            if not self.held_open:
                self.end_prompt()
            return
        for stage, memory in staged:
            stage.grown(self, memory, step)
        self._compress(first=False)

    def _joined(
        self,
        queries: Tensor,
        new: Part,
        scaling: float,
        cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        heads = new.keys.read().shape[1]
        rows, groups = fold(queries, heads), queries.shape[1] // heads
        past = [*self.parts, *([self.recent] if self.recent is not None else [])]
        partials = [attend_part(part, rows, scaling, cap, seen(part)) for part in past]
        own = causal(new.tokens, groups, queries.device)
        if new.valid is not None:
            own = own & new.valid[:, :, None]
        partials.append(attend_part(new, rows, scaling, cap, own))
        if sinks is not None:
            partials.append(sink_mass(sinks, partials[0].output, groups))
        for stage, memory in zip(self.stages, self.memories, strict=True):
            more = stage.beside(rows * scaling, memory)
            partials += [more] if more is not None else []
        return unfold(join(partials), queries.shape[1])

    # -- compression --------------------------------------------------------------------------

    def end_prompt(self) -> None:
        """Compress the prompt. What comes in from now on comes in behind it."""
        if not self.reading_prompt or self.recent is None:
            return
        self.reading_prompt = False
        for stage, memory in zip(self.stages, self.memories, strict=True):
            kept = stage.choose(self.recent, memory)
            if kept is not None:
                self.recent = select(self.recent, kept)
        self._compress(first=True)
        for memory in self.memories:
            memory.notes.clear()
            memory.told.clear()

    def _compress(self, *, first: bool) -> None:
        """Compress what has left the window, in whole blocks; after the prompt only if asked."""
        coders = [stage for stage in self.stages if stage.encodes]
        asked = [stage.unit if first else stage.block for stage in coders]
        sizes = [size for size in asked if size is not None]
        if not coders or not (first or sizes) or self.recent is None:
            return
        size = math.lcm(*sizes)
        due = (self.recent.tokens - max(stage.window for stage in coders)) // size * size
        piece = size if any(stage.by_blocks for stage in coders) else max(due, 1)
        for _ in range(0, due, piece):
            self._move_out(piece)

    def _move_out(self, count: int) -> None:
        """Compress the oldest `count` of the exact tokens into a part of their own."""
        if count <= 0 or self.recent is None:
            return
        old, self.recent = split(self.recent, count)
        self.parts.append(self.encoded(old))
        for stage in self.stages:
            self.parts = stage.aged(self.parts)

    def encoded(self, part: Part) -> Part:
        """An exact part in the form that the stages give it, one inside the other."""
        if part.valid is not None:  # padding must not decide how the rest is held
            there = part.valid[..., None]
            keys, values = (Exact(form.read() * there) for form in (part.keys, part.values))
            beside = {name: one * there for name, one in part.companions.items()}
            part = Part(keys, values, part.valid, beside)
        for stage, memory in zip(self.stages, self.memories, strict=True):
            part = stage.encode(part, memory)
        return part

    # -- bytes --------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that is held."""
        for number, part in enumerate(self.parts):
            yield from ((f"parts.{number}.{name}", tensor) for name, tensor in part.tensors())
        if self.recent is not None:
            yield from ((f"recent.{name}", tensor) for name, tensor in self.recent.tensors())
        for memory in self.memories:
            yield from ((f"kept.{n}", t) for n, t in memory.kept.items() if isinstance(t, Tensor))

    @property
    def tokens_held(self) -> int:
        """Tokens still there, in whatever form."""
        return sum(part.tokens for part in self.parts) + (self.recent.tokens if self.recent else 0)


def new_valid(mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """(b, 1, t) which of the new tokens are no padding; None where all are not.

    A token that no query may see, not even its own, is padding.
    """
    if mask is None:
        return None
    tokens = queries.shape[2]
    valid = allowed_of(mask)[..., -tokens:].any(dim=2)
    return None if bool(valid.all()) else valid[:, :1]


def seen(part: Part) -> Tensor | None:
    """(b, 1 or h, 1, s): what of a past part later queries may see."""
    return None if part.valid is None else part.valid[:, :, None]


# -- exact parts ---------------------------------------------------------------------------


def joined(first: Part | None, second: Part) -> Part:
    """Two exact parts as one, which holds only its own bytes."""
    if first is None:
        return Part(own(second.keys), own(second.values), second.valid, second.companions)
    keys = torch.cat([first.keys.read(), second.keys.read()], dim=2)
    values = torch.cat([first.values.read(), second.values.read()], dim=2)
    beside = {
        name: torch.cat([first.companions[name], one], dim=2)
        for name, one in second.companions.items()
    }
    return Part(Exact(keys), Exact(values), joined_valid([first, second]), beside)


def own(form: Form) -> Exact:
    """Exact numbers that are no view of more: fused projections give keys and values in one."""
    numbers = form.read()
    viewed = numbers.untyped_storage().nbytes() > numbers.nbytes
    return Exact(numbers.clone() if viewed else numbers)


def joined_valid(parts: Sequence[Part]) -> Tensor | None:
    """The padding marks of parts, one after the other; None where none has any."""
    if all(part.valid is None for part in parts):
        return None
    marks = [valid_of(part) for part in parts]
    heads = max(mark.shape[1] for mark in marks)
    return torch.cat([mark.expand(-1, heads, -1) for mark in marks], dim=2)


def valid_of(part: Part) -> Tensor:
    if part.valid is not None:
        return part.valid
    _, held = next(part.tensors())
    return torch.ones(len(held), 1, part.tokens, dtype=torch.bool, device=held.device)


def split(part: Part, count: int) -> tuple[Part, Part]:
    """The oldest `count` tokens of an exact part, and the rest; both hold only their own bytes."""

    def piece(begin: int, end: int) -> Part:
        keys, values = (form.read()[:, :, begin:end].clone() for form in (part.keys, part.values))
        valid = None if part.valid is None else part.valid[:, :, begin:end].clone()
        beside = {name: one[:, :, begin:end].clone() for name, one in part.companions.items()}
        return Part(Exact(keys), Exact(values), valid, beside)

    return piece(0, count), piece(count, part.tokens)


def select(part: Part, kept: Tensor) -> Part:
    """The tokens `kept` (b, h or 1, k) of an exact part."""
    keys, values = part.keys.read(), part.values.read()
    heads = keys.shape[1]
    every = kept.expand(-1, heads, -1)
    where = every[..., None].expand(-1, -1, -1, keys.shape[3])
    valid = part.valid
    if valid is not None:
        valid = valid.expand(-1, kept.shape[1], -1).gather(2, kept)
        valid = None if bool(valid.all()) else valid
    return Part(Exact(keys.gather(2, where)), Exact(values.gather(2, where)), valid)


# -- the cache -----------------------------------------------------------------------------


class CompressedCache(DynamicCache):  # type: ignore[misc]
    """A cache for ``model.generate(..., past_key_values=cache)``, with compressed layers.

    Layers that are no full attention (sliding windows, states) are transformers' own.
    """

    def __init__(self, config: Any, stages: Sequence[Stage]) -> None:
        super().__init__(config=config)
        for stage in stages:
            stage.check()
            if stage.alone and len(stages) > 1:
                raise FewbitsError(f"{stage.name} goes with no other method; give it alone")
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        if "full_attention" not in kinds:
            raise FewbitsError(
                "this model has no layer of full attention; there is nothing to hold"
            )
        count = len(kinds)
        own: list[Any] = list(self.layers)
        plain = own + [None] * (count - len(own))
        self.layers: list[Any] = [
            CompressedLayer(stages, number, count) if kind == "full_attention" else layer
            for number, (kind, layer) in enumerate(zip(kinds, plain, strict=True))
        ]
        self.layer_class_to_replicate = None
        self.stages = list(stages)

    @property
    def compressed(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @contextlib.contextmanager
    def prompt(self) -> Iterator[None]:
        """Read one prompt by several calls of the model; it is compressed at the block's end."""
        for layer in self.compressed:
            layer.held_open = True
        try:
            yield
        finally:
            for layer in self.compressed:
                layer.held_open = False
                layer.end_prompt()

    def tell(self, **about: Tensor) -> None:
        """Say something about the tokens of the prompt that is to come, (b, t) numbers by name."""
        for layer in self.compressed:
            for memory in layer.memories:
                memory.told |= about

    def nbytes(self) -> int:
        """Bytes of everything that is held, each storage once, as a whole."""
        return sum(self.breakdown().values())

    def breakdown(self) -> dict[str, int]:
        """The same by kind: exact tokens, compressed ones, and padding marks."""
        found = {"recent": 0, "parts": 0, "kept": 0, "other": 0}
        counted: set[int] = set()
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                named = list(layer.tensors())
            else:
                states = (getattr(layer, "keys", None), getattr(layer, "values", None))
                named = [("other.", state) for state in states if isinstance(state, Tensor)]
            for name, tensor in named:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in counted:
                    counted.add(storage.data_ptr())
                    found[name.partition(".")[0]] += storage.nbytes()
        return found
