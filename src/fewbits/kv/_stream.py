"""How the chunks of a saved cache are received, decoded, and replaced where they do not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from fewbits.core.errors import FewbitsError
from fewbits.kv._cachegen_codec import HEADER
from fewbits.kv._cachegen_files import MANIFEST, MANIFEST_LIMIT, sha256
from fewbits.kv._controller import TEXT, Controller, Fixed, Now, Offer, Policy
from fewbits.kv._link import Folder, MissingFile
from fewbits.kv.cachegen import (
    CacheGen,
    ChunkInfo,
    Manifest,
    check_piece,
    decode_chunk,
    level_file,
    read_text,
)

TRIES = 3
PAUSE = 0.1
"""Seconds before something is asked for again; twice as many before the next time."""
TABLES_LIMIT = 2**31
SAMPLE = 128
"""Tokens that the model reads to find how fast it is."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Arrival:
    """How one chunk came.

    Attributes
    ----------
    chunk, tokens : its number, and how many tokens it has.
    form : the level at which it came, or `TEXT`.
    wanted : what had been asked for first.
    nbytes : bytes that came over the link for it.
    transfer_seconds : from the request until all was there.
    work_seconds : to decode it, or to compute it from text.
    failures : why other forms could not be used, one line each.
    """

    chunk: int
    tokens: int
    form: str
    wanted: str
    nbytes: int
    transfer_seconds: float
    work_seconds: float
    failures: tuple[str, ...]


# -- what lies in the folder ---------------------------------------------------------------


def read_manifest(folder: Folder, url: str | Path) -> Manifest:
    """The manifest of a saved cache, checked."""

    def read() -> Manifest:
        return Manifest.from_json(folder.read_whole(MANIFEST, MANIFEST_LIMIT), f"{url}/{MANIFEST}")

    try:
        return persistently(read)
    except MissingFile as error:
        raise FewbitsError(f"{url} is no saved cache: {error}") from None


def whole_text(folder: Folder, manifest: Manifest) -> np.ndarray:
    """(t,) int64: all token numbers, checked."""
    return persistently(
        lambda: read_text(folder.read_whole(manifest.text, 4 * manifest.tokens), manifest)
    )


def read_tables(folder: Folder, manifest: Manifest) -> CacheGen:
    """The profile that the cache was encoded with, checked."""

    def read() -> bytes:
        data = folder.read_whole(manifest.tables, TABLES_LIMIT)
        if sha256(data) != manifest.tables_sha256:
            raise FewbitsError(f"{manifest.tables} is damaged: it does not match its digest")
        return data

    return CacheGen.from_bytes(persistently(read), manifest.tables)


class OtherProfile(FewbitsError):
    """The user gave a profile that the cache was not saved with."""


def check_profile(profile: CacheGen, data: bytes) -> None:
    """Refuse a profile that a packet was not coded with."""
    if len(data) < HEADER.itemsize:
        return  # no packet, which decoding will say
    coded_with = int(np.frombuffer(data, HEADER, 1)[0]["profile"])
    if coded_with != int(profile.profile.digest, 16):
        raise OtherProfile(
            "this cache was saved with another profile; give that one, or leave profile out to "
            "read it from where the cache lies"
        )


def persistently(read: Callable[[], Result]) -> Result:
    """Read again what did not come or came wrong, a few times."""
    for attempt in range(TRIES - 1):
        try:
            return read()
        except MissingFile:
            raise
        except FewbitsError:
            time.sleep(PAUSE * 2**attempt)
    return read()


def check_level(manifest: Manifest, level: str | None, deadline: float | None) -> str:
    """The level of the first chunk, or of all."""
    levels = tuple(manifest.levels)
    if level is None:
        return levels[0] if deadline is None else levels[len(levels) // 2]
    if level not in levels:
        raise FewbitsError(f"there is no level {level!r} here; choose one of {', '.join(levels)}")
    return level


def offers_of(manifest: Manifest, text: int | None = 4) -> list[Offer]:
    """The chunks of a saved cache as a controller sees them.

    `text` is what a token of text takes in bytes: 4 over the link, 0 where it is here already, None
    where it cannot be had.
    """
    return [
        Offer(
            chunk.tokens,
            {level: piece.bytes for level, piece in chunk.levels.items()}
            | ({} if text is None else {TEXT: text * chunk.tokens}),
        )
        for chunk in manifest.chunks
    ]


# -- loading -------------------------------------------------------------------------------


@dataclass
class Received:
    """A chunk that came over the link, and the forms that are left if it is of no use."""

    number: int
    wanted: str
    form: str
    data: bytes
    nbytes: int
    seconds: float
    left: list[str]
    failures: list[str]


class Stream:
    """Loads the chunks of one cache: a thread receives them, this one decodes them."""

    def __init__(self, model: Any, folder: Folder, manifest: Manifest, start: float) -> None:
        self.model, self.folder, self.manifest, self.start = model, folder, manifest, start
        self.levels = list(manifest.levels)
        self.sizes = {level: manifest.level_bytes(level) for level in self.levels}
        self.lost: dict[str, str] = {}
        """Forms that cannot be had at all, and why."""
        self.link = threading.Lock()
        """One transfer at a time, or the bandwidth would be taken for another one."""
        self.now = Now()
        self.busy_until = 0.0
        self.profile: CacheGen | None = None
        self.profile_was_given = False
        self.tokens: np.ndarray | None = None
        shape = (manifest.layers, 1, manifest.heads, manifest.tokens, manifest.width)
        try:
            self.keys, self.values = (
                torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2)
            )
        except RuntimeError:
            raise FewbitsError(f"a cache of {manifest.tokens:,} tokens is too large") from None

    def begin(
        self, profile: CacheGen | str | Path | None, level: str, deadline: float | None
    ) -> None:
        """Read what all chunks need, and with a deadline find how fast the model reads text."""
        if profile is not None:
            self.profile = profile if isinstance(profile, CacheGen) else CacheGen.load(profile)
            self.profile.check_model(self.model)
            self.profile_was_given = True
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self.read_common, deadline is not None)
            speed = prefill_speed(self.model) if deadline is not None else 1.0
            reading.result()
        self.policy: Policy = Fixed(level)
        self.offers = offers_of(self.manifest, None if self.tokens is None else 0)
        if deadline is not None:
            self.policy = Controller(tuple(self.levels), deadline, level, speed, cautious=True)

    def read_common(self, with_text: bool) -> None:
        try:
            self.profile = self.profile or read_tables(self.folder, self.manifest)
        except FewbitsError as error:
            self.lost |= dict.fromkeys(self.levels, str(error))
        if with_text:
            self.text()

    def run(self, on_chunk: Callable[[Arrival], None] | None) -> list[Arrival]:
        """Load all chunks."""
        arrivals = []
        chunks = self.manifest.chunks
        pool = ThreadPoolExecutor(1)
        try:
            coming = pool.submit(self.next, 0)
            for number, chunk in enumerate(chunks):
                received = coming.result()
                self.busy_until = time.perf_counter() + self.expected_work(received)
                if number + 1 < len(chunks):
                    coming = pool.submit(self.next, number + 1)
                arrivals.append(self.take_in(chunk, received))
                if on_chunk is not None:
                    on_chunk(arrivals[-1])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return arrivals

    # -- the thread that receives -------------------------------------------------------------

    def next(self, number: int) -> Received:
        """Choose the form of a chunk, and receive it."""
        wanted = self.choice(number)
        return self.receive(number, wanted, self.forms_from(wanted), [])

    def choice(self, number: int) -> str:
        policy = self.policy
        if not isinstance(policy, Controller):
            return policy.choose(self.offers[number:], self.now)
        levels = tuple(level for level in self.levels if level not in self.lost)
        first = policy.first if policy.first in levels or not levels else levels[-1]
        here = time.perf_counter()
        now = replace(self.now, elapsed=here - self.start, busy=max(self.busy_until - here, 0.0))
        return replace(policy, levels=levels, first=first).choose(self.offers[number:], now)

    def forms_from(self, wanted: str) -> list[str]:
        """The forms to try: the one wanted, coarser ones, then finer ones, then text."""
        if wanted == TEXT:
            return [TEXT, *self.levels]
        place = self.levels.index(wanted)
        return [*self.levels[place:], *reversed(self.levels[:place]), TEXT]

    def receive(
        self, number: int, wanted: str, forms: Sequence[str], failures: list[str]
    ) -> Received:
        """A chunk in the first of the forms that can be had."""
        for place, form in enumerate(forms, 1):
            with self.link:
                moved, start = self.folder.moved, time.perf_counter()
                try:
                    data = self.text_of(number) if form == TEXT else self.piece(number, form)
                except FewbitsError as error:
                    failures = [*failures, f"{form}: {error}"]
                    continue
                moved, seconds = self.folder.moved - moved, time.perf_counter() - start
                self.now = self.now.after(moved, seconds)
            left = list(forms[place:])
            return Received(number, wanted, form, data, moved, seconds, left, failures)
        chunk = self.manifest.chunks[number]
        raise FewbitsError(
            f"tokens {chunk.first} to {chunk.first + chunk.tokens - 1} cannot be had in any form; "
            + "; ".join(failures)
        )

    def piece(self, number: int, level: str) -> bytes:
        """The bytes of a chunk at a level, checked."""
        if level in self.lost:
            raise FewbitsError(self.lost[level])
        chunk, name = self.manifest.chunks[number], level_file(level)
        place = chunk.levels[level]

        def read() -> bytes:
            data = self.folder.read(name, place.offset, place.bytes, self.sizes[level])
            try:
                check_piece(data, chunk, level)
            except FewbitsError:
                self.folder.forget(name)
                raise
            return data

        try:
            return persistently(read)
        except MissingFile as error:
            self.lost[level] = str(error)
            raise

    def text_of(self, number: int) -> bytes:
        """The token numbers of a chunk."""
        if (tokens := self.text()) is None:
            raise FewbitsError(self.lost[TEXT])
        chunk = self.manifest.chunks[number]
        return tokens[chunk.first : chunk.first + chunk.tokens].tobytes()

    def text(self) -> np.ndarray | None:
        """All token numbers, read once; None where they cannot be had."""
        if self.tokens is None and TEXT not in self.lost:
            try:
                self.tokens = self.known_tokens(whole_text(self.folder, self.manifest))
            except FewbitsError as error:
                self.lost[TEXT] = str(error)
        return self.tokens

    def known_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Token numbers, after checking that the model has them."""
        if tokens.min() < 0 or tokens.max() >= vocabulary(self.model):
            raise FewbitsError(f"{self.manifest.text} has tokens that the model does not know")
        return tokens

    # -- the thread that decodes --------------------------------------------------------------

    def expected_work(self, received: Received) -> float:
        """Seconds that decoding or computing a chunk will take."""
        if not isinstance(self.policy, Controller):
            return 0.0
        tokens = self.manifest.chunks[received.number].tokens
        is_text = received.form == TEXT
        return tokens / self.policy.prefill_speed if is_text else self.policy.decode_seconds

    def take_in(self, chunk: ChunkInfo, received: Received) -> Arrival:
        """Decode a chunk or compute it, and take another form where that fails."""
        while True:
            start = time.perf_counter()
            try:
                keys, values = self.states(chunk, received)
                break
            except OtherProfile:
                raise
            except FewbitsError as error:
                failures = [*received.failures, f"{received.form}: {error}"]
                received = self.receive(received.number, received.wanted, received.left, failures)
        place = slice(chunk.first, chunk.first + chunk.tokens)
        self.keys[:, 0, :, place] = keys.to(self.keys.device)
        self.values[:, 0, :, place] = values.to(self.values.device)
        seconds = time.perf_counter() - start
        self.learn(chunk, received.form, seconds)
        return Arrival(
            received.number,
            chunk.tokens,
            received.form,
            received.wanted,
            received.nbytes,
            received.seconds,
            seconds,
            tuple(received.failures),
        )

    def learn(self, chunk: ChunkInfo, form: str, seconds: float) -> None:
        """Let the controller count with what the last chunk took."""
        if not isinstance(self.policy, Controller):
            return
        if form == TEXT:
            self.policy = replace(self.policy, prefill_speed=chunk.tokens / seconds)
        else:
            self.policy = replace(self.policy, decode_seconds=seconds)

    def states(self, chunk: ChunkInfo, received: Received) -> tuple[Tensor, Tensor]:
        """(layers, key heads, tokens, width) keys and values of a chunk."""
        if received.form == TEXT:
            return self.computed(chunk, np.frombuffer(received.data, np.int64))
        assert self.profile is not None
        if self.profile_was_given:
            check_profile(self.profile, received.data)
        keys, values = decode_chunk(self.profile, received.data, chunk)
        expected = (self.manifest.layers, self.manifest.heads, chunk.tokens, self.manifest.width)
        for found in (keys, values):
            if tuple(found.shape) != expected or found.dtype != self.keys.dtype:
                raise FewbitsError("a chunk holds keys or values of another shape or dtype")
        return keys, values

    @torch.no_grad()
    def computed(self, chunk: ChunkInfo, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the model makes of a chunk's text behind all that is loaded."""
        cache = DynamicCache()
        if chunk.first:
            for layer in range(self.manifest.layers):
                before = (held[layer, ..., : chunk.first, :] for held in (self.keys, self.values))
                cache.update(*before, layer)
        ids = torch.tensor(tokens, device=self.keys.device)[None]
        read_by(self.model, ids, cache)
        keys = torch.stack([layer.keys[0, :, chunk.first :] for layer in cache.layers])
        values = torch.stack([layer.values[0, :, chunk.first :] for layer in cache.layers])
        return keys, values


def prefill_speed(model: Any) -> float:
    """Tokens per second that a model reads, the better of two times."""
    ids = (torch.arange(SAMPLE, device=model.device) % vocabulary(model))[None]
    return SAMPLE / min(read_by(model, ids, DynamicCache()) for _ in range(2))


@torch.no_grad()
def read_by(model: Any, ids: Tensor, cache: DynamicCache) -> float:
    """Have a model read (1, t) tokens into a cache. Returns the seconds that it took."""
    start = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    logits[0, -1, 0].item()  # an accelerator has computed only when a number is asked for
    return time.perf_counter() - start


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
