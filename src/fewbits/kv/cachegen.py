"""CacheGen: the KV cache of a text that is read again and again, as a small file.

Liu, Li, Cheng, Ray, Huang, Zhang, Du, Yao, Lu, Ananthanarayanan, Maire, Hoffmann, Holtzman, Jiang
2024, *CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving* (arXiv
2310.07240, SIGCOMM 2024).

Keys and values become whole numbers of steps away from a prediction: nothing, the channel's mean,
or the first token of their group of ten, whichever takes the fewest bits in that layer; keys are
taken as attention sees them or before their rotation, likewise. Steps are absolute, and longer in
deeper layers, which bear it. Each channel of each layer has a table of how often each number comes,
learned once from a few texts and used for every other; rANS codes the numbers by them. A text is
cut into chunks that are coded alone, at several levels of quality, from which a reader over a
network may choose (`fewbits.kv.streaming`).

The published code has no differences, and ships tables with every chunk, which outweigh it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.core.errors import FewbitsError
from fewbits.kv._cachegen_codec import (
    HEADER,
    MOST_TOKENS,
    Profile,
    channels_first,
    heads_first,
    opened,
    packed,
    unpacked,
)
from fewbits.kv._cachegen_files import (
    DTYPES,
    MANIFEST,
    TABLES,
    TEXT,
    ChunkInfo,
    Manifest,
    Piece,
    Source,
    check_piece,
    level_file,
    read_levels,
    read_text,
    sha256,
    text_bytes,
    written,
)
from fewbits.kv._cachegen_fit import Settings, Sharing, learn, rotation_of, states_of, texts_of
from fewbits.kv._cachegen_states import filled, states_in
from fewbits.kv._cachegen_tables import MOST_GROUP, profile_of, settings_of, tensors_of
from fewbits.kv._files import (
    Fingerprint,
    check_model,
    fingerprint,
    load_fitted,
    save_fitted,
)

__all__ = [
    "CacheGen",
    "ChunkInfo",
    "Manifest",
    "Piece",
    "check_piece",
    "decode_chunk",
    "encode_chunk",
    "filled",
    "level_file",
    "read_batch",
    "read_local",
    "read_text",
    "save",
]


@dataclass
class CacheGen:
    """A profile of a model's keys and values, by which its caches are coded.

    Parameters
    ----------
    levels : what the steps are multiplied by, finest first; level ``0``, ``1``, …. At 1 they are
        0.5, 1 and 1.5 standard deviations in the first, middle and last third of the layers.
    chunk : tokens that are coded, sent and decoded together.
    group : tokens of which the first one may be the anchor of the others.
    predictor : ``none``, ``mean``, ``anchor`` (the paper's), or ``best``, for each layer's keys
        and values its own.
    rotation : keys ``after`` it (as attention sees them), ``before`` it, or ``best``.
    own_tables : what has tables of its own; others than the default are there to compare.
    """

    name: ClassVar[str] = "cachegen"

    levels: tuple[float, ...] = (0.125, 0.5, 1.0, 2.0, 4.0)
    chunk: int = 1500
    group: int = 10
    predictor: Literal["best", "none", "mean", "anchor"] = "best"
    rotation: Literal["best", "before", "after"] = "best"
    own_tables: Sharing = "layer and channel"
    learned: Profile | None = field(default=None, repr=False)
    model: Fingerprint | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            self.levels = tuple(read_levels(dict(enumerate(self.levels))).values())
        except (TypeError, ValueError):
            raise FewbitsError("cachegen: levels must be rising numbers above 0") from None
        if not 1 <= self.chunk <= MOST_TOKENS:
            raise FewbitsError(f"cachegen: chunk must be from 1 to {MOST_TOKENS:,}")
        if not 2 <= self.group <= MOST_GROUP:
            raise FewbitsError(f"cachegen: group must be from 2 to {MOST_GROUP}")

    # -- learning ----------------------------------------------------------------------------

    def fit(self, model: Any, tokens: Tensor | Sequence[Tensor]) -> Self:
        """Learn from some texts, once for each model; returns a copy. Reads them three times.

        Parameters
        ----------
        model : a causal language model whose layers all hold every token, at one width.
        tokens : (n, t) int64 token numbers, or several of them.

        Raises
        ------
        FewbitsError
            No texts, or layers that differ.
        """
        texts = texts_of(tokens)
        heads = fingerprint(model)["key heads"]
        settings = Settings(
            self.levels, self.chunk, self.group, self.predictor, self.rotation, self.own_tables
        )
        learned = learn(lambda: states_of(model, texts), int(heads), rotation_of(model), settings)
        return replace(self, learned=learned, model=fingerprint(model))

    @property
    def profile(self) -> Profile:
        """What was learned.

        Raises
        ------
        FewbitsError
            Nothing yet.
        """
        if self.learned is None:
            raise FewbitsError(
                "cachegen has no profile of the model; make one with CacheGen().fit(model, tokens)"
            )
        return self.learned

    def check_model(self, model: Any) -> None:
        """Refuse a model that this is no profile of."""
        self.profile  # noqa: B018 - says what to do where nothing was learned
        check_model(self.model or {}, model)

    @property
    def artefact_bytes(self) -> int:
        """Bytes of the profile's file, which all caches of a model share."""
        return len(self.to_bytes())

    def level_number(self, level: str) -> int:
        """The place of a level among the profile's."""
        names = [str(number) for number in range(len(self.levels))]
        if level not in names:
            raise FewbitsError(f"there is no level {level!r}; choose one of {', '.join(names)}")
        return names.index(level)

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the profile to a safetensors file.

        Raises
        ------
        FewbitsError
            Nothing learned, the file is there already, or it cannot be written.
        """
        profile = self.profile
        settings = settings_of(profile) | {name: getattr(self, name) for name in OPTIONS}
        tensors = tensors_of(profile)
        save_fitted(path, self.name, tensors, settings, self.model or {}, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile that `save` wrote.

        Raises
        ------
        FewbitsError
            It cannot be read, is damaged, or no profile.
        """
        tensors, settings, model = load_fitted(path, cls.name)
        learned = profile_of(tensors, settings, str(path))
        try:
            given = {name: settings[name] for name in OPTIONS}
            return cls(levels=learned.levels, **given, learned=learned, model=model)
        except (KeyError, TypeError) as error:
            raise FewbitsError(f"{path} is damaged: {error}; fit and save it again") from None

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TABLES
            self.save(path)
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the profile") -> Self:
        """Read what `to_bytes` gave; `where` is what messages call it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TABLES
            path.write_bytes(data)
            try:
                return cls.load(path)
            except FewbitsError as error:
                raise FewbitsError(str(error).replace(str(path), where)) from None


OPTIONS = ("chunk", "group", "predictor", "rotation", "own_tables")


# -- chunks --------------------------------------------------------------------------------


def encode_chunk(
    profile: CacheGen, keys: Tensor, values: Tensor, first_position: int, level: str
) -> bytes:
    """Some consecutive tokens as one packet.

    Parameters
    ----------
    keys, values : (layers, key heads, t, width) as the model's cache holds them: keys rotated.
    first_position : the position of the first token, by which keys were rotated.
    level : name of the quality: ``0`` is the finest.

    Returns
    -------
    Bytes that say themselves whether they are whole. O(layers · key heads · t · width).

    Raises
    ------
    FewbitsError
        Other shapes than the profile's, NaN or infinity, or no such level.
    """
    fitted, number = profile.profile, profile.level_number(level)
    wanted = (fitted.layers, fitted.heads, fitted.width)
    for states in (keys, values):
        shape = tuple(states.shape)
        if len(shape) != 4 or (*shape[:2], shape[3]) != wanted or states.shape != keys.shape:
            raise FewbitsError(
                f"keys and values must be (layers, key heads, tokens, width) with {wanted[0]}, "
                f"{wanted[1]} and {wanted[2]} of them, not {shape}"
            )
    dtype = str(keys.dtype).removeprefix("torch.")
    if dtype not in DTYPES or values.dtype != keys.dtype:
        raise FewbitsError(f"a cache of {dtype} cannot be saved; use one of {', '.join(DTYPES)}")
    if not 1 <= keys.shape[2] <= MOST_TOKENS or not 0 <= first_position < 2**31:
        raise FewbitsError(f"a chunk has from 1 to {MOST_TOKENS:,} tokens")
    k, v = (channels_first(states.detach().float().cpu().numpy()) for states in (keys, values))
    return packed(fitted, k, v, first_position, number, DTYPES.index(dtype))


def decode_chunk(profile: CacheGen, data: bytes, expected: ChunkInfo) -> tuple[Tensor, Tensor]:
    """The tokens of a packet.

    Parameters
    ----------
    data : of any level, which stands in it.
    expected : what the manifest says of this chunk.

    Returns
    -------
    (layers, key heads, t, width) keys and values on the CPU, in the dtype they were coded from.

    Raises
    ------
    FewbitsError
        The packet is not the one that the manifest speaks of, is damaged, or was coded with
        another profile. Nothing wrong is ever returned.
    """
    if len(data) < HEADER.itemsize:
        raise FewbitsError("a chunk of the saved cache is cut short; read or save it again")
    level = str(int(np.frombuffer(data, HEADER, 1)[0]["level"]))
    if level not in expected.levels:
        raise FewbitsError(f"the chunk has level {level}, which the manifest does not know")
    check_piece(data, expected, level)
    fitted = profile.profile
    header = opened(fitted, data)
    if (header["first"], header["tokens"]) != (expected.first, expected.tokens):
        raise FewbitsError("the chunk has other tokens than the manifest says")
    if header["dtype"] >= len(DTYPES):
        raise FewbitsError("the chunk has a dtype that this fewbits does not know; upgrade fewbits")
    dtype = getattr(torch, DTYPES[header["dtype"]])
    keys, values = (
        torch.from_numpy(heads_first(states, fitted.heads)).to(dtype).contiguous()
        for states in unpacked(fitted, data)
    )
    return keys, values


# -- saving --------------------------------------------------------------------------------


def save(
    cache: Any,
    place: str | Path,
    profile: CacheGen,
    tokens: Tensor | Sequence[int],
    *,
    row: int = 0,
    tables: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Save what a model remembers of a text, at every level of the profile.

    Parameters
    ----------
    cache : ``fewbits.kv.cache(model, "full")`` or transformers' ``DynamicCache``, after the model
        has read the text.
    place : a folder to make, or any URL that fsspec writes.
    tokens : (t,) the token numbers that the cache holds; of a padded row, without padding.
    row : of the batch.
    tables : where the profile lies already, for instance ``../profile.bin``, for caches that share
        one; otherwise it is written beside them.
    overwrite : replace a cache that is there.

    Returns
    -------
    The manifest that was written.

    Raises
    ------
    FewbitsError
        The profile is of another shape, tokens and cache do not agree, the cache has dropped
        tokens, something is there already, or cannot be written. Nothing is half-written.
    """
    ids = token_numbers(tokens)
    layers = states_in(cache, row, len(ids))
    shared = None if tables is None else shared_tables(place, tables, profile)
    own = profile.to_bytes() if shared is None else shared
    text = text_bytes(ids)
    with written(place, overwrite) as create:
        chunks = write_levels(create, layers, profile, len(ids))
        manifest = Manifest(
            model=dict(profile.model or {}),
            dtype=str(layers[0][0].dtype).removeprefix("torch."),
            layers=len(layers),
            heads=profile.profile.heads,
            width=profile.profile.width,
            tokens=len(ids),
            chunk=profile.chunk,
            levels={str(number): scale for number, scale in enumerate(profile.levels)},
            text=TEXT,
            text_sha256=sha256(text),
            tables=tables or TABLES,
            tables_sha256=sha256(own),
            chunks=chunks,
        )
        files = {TEXT: text} | ({TABLES: own} if shared is None else {})
        for name, data in (files | {MANIFEST: manifest.to_json().encode()}).items():
            with create(name) as file:
                file.write(data)
    return manifest


def token_numbers(tokens: Tensor | Sequence[int]) -> np.ndarray:
    """(t,) int64, checked."""
    ids = torch.as_tensor(tokens).reshape(-1).cpu().numpy().astype(np.int64)
    if not len(ids) or ids.min() < 0 or ids.max() >= 2**31:
        raise FewbitsError("tokens must be at least one whole number, each from 0 to 2^31 − 1")
    return ids


def shared_tables(place: str | Path, tables: str, profile: CacheGen) -> bytes:
    """The file of a profile that lies at a place already."""
    data = Source(place).read(tables)
    if CacheGen.from_bytes(data, tables).profile.digest != profile.profile.digest:
        raise FewbitsError(f"{tables} is another profile than the one given; save it there first")
    return data


def write_levels(
    create: Any, layers: list[tuple[Tensor, Tensor]], profile: CacheGen, tokens: int
) -> tuple[ChunkInfo, ...]:
    """Write the file of each level; returns where its chunks lie."""
    found: list[ChunkInfo] = []
    names = [str(number) for number in range(len(profile.levels))]
    starts = range(0, tokens, profile.chunk)
    pieces: dict[tuple[int, str], Piece] = {}
    for level in names:
        place = 0
        with create(level_file(level)) as file:
            for first in starts:
                end = min(first + profile.chunk, tokens)
                keys = torch.stack([k[:, first:end] for k, _ in layers])
                values = torch.stack([v[:, first:end] for _, v in layers])
                data = encode_chunk(profile, keys, values, first, level)
                file.write(data)
                pieces[first, level] = Piece(place, len(data), sha256(data))
                place += len(data)
    for first in starts:
        count = min(profile.chunk, tokens - first)
        found.append(ChunkInfo(first, count, {level: pieces[first, level] for level in names}))
    return tuple(found)


# -- loading -------------------------------------------------------------------------------


def read_local(
    place: str | Path,
    model: Any,
    *,
    level: str = "0",
    profile: CacheGen | None = None,
    into: Any = None,
) -> Any:
    """A cache that goes on where a saved one ends.

    Parameters
    ----------
    place : what `save` made.
    model : the one that read the text.
    level : of quality; ``0`` is the finest.
    profile : where it is at hand already; otherwise it is read, too.
    into : an empty cache of `fewbits.kv.cache` to fill; otherwise transformers' ``DynamicCache``.

    Returns
    -------
    Give it to ``model.generate(…, past_key_values=…)`` with the token numbers of the text and of
    what follows it.

    Raises
    ------
    FewbitsError
        It is the cache of another model, cannot be read, or is damaged.
    """
    keys, values = read_states(place, model, level, profile)
    return filled(model, keys[:, None], values[:, None], into)


def read_batch(
    places: Sequence[str | Path],
    model: Any,
    *,
    level: str = "0",
    profile: CacheGen | None = None,
    into: Any = None,
) -> tuple[Any, Tensor]:
    """Saved caches of several texts as the rows of one cache, padded on the left.

    Returns
    -------
    The cache, and the (b, t) int64 attention mask of what it holds, to which that of new tokens is
    to be appended.
    """
    if not places:
        raise FewbitsError("there are no saved caches to read")
    rows = [read_states(place, model, level, profile) for place in places]
    lengths = [keys.shape[2] for keys, _ in rows]
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    keys, values = (
        torch.stack([pad(row[kind], (0, 0, longest - row[kind].shape[2], 0)) for row in rows], 1)
        for kind in range(2)
    )
    return filled(model, keys, values, into, mask), mask.long().to(model.device)


def read_states(
    place: str | Path, model: Any, level: str, profile: CacheGen | None
) -> tuple[Tensor, Tensor]:
    """(layers, key heads, t, width) keys and values of a saved cache."""
    source = Source(place)
    manifest = source.manifest()
    manifest.check_model(model)
    if profile is None:
        profile = CacheGen.from_bytes(source.tables(manifest), f"{place}/{manifest.tables}")
    profile.check_model(model)
    profile.level_number(level)
    if level not in manifest.levels:
        raise FewbitsError(f"{place} has no level {level}; it has {', '.join(manifest.levels)}")
    found = []
    for chunk in manifest.chunks:
        piece = chunk.levels[level]
        data = source.read(level_file(level), piece.offset, piece.bytes)
        found.append(decode_chunk(profile, data, chunk))
    keys, values = (torch.cat(states, dim=2) for states in zip(*found, strict=True))
    if str(keys.dtype).removeprefix("torch.") != manifest.dtype:
        raise FewbitsError(f"{place} is damaged: its chunks are not in {manifest.dtype}")
    return keys, values
