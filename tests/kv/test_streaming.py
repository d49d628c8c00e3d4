"""Streaming of saved caches: the controller, recorded links, and loading over links that fail."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.core.language_model import held_out_text, load_language_model
from fewbits.kv import _stream
from fewbits.kv._controller import Now
from fewbits.kv._link import MissingFile, open_folder
from fewbits.kv.cachegen import CacheGen, Manifest, decode_chunk, read_local, save
from fewbits.kv.store import go_on, save_text, saved_lines
from fewbits.kv.streaming import (
    TEXT,
    Arrival,
    Controller,
    Fixed,
    Offer,
    Trace,
    bench_link,
    load,
    offers_of,
    read_tokens,
    simulate,
)

LEVELS = ("0", "1", "2")


def offer(tokens: int = 100, fine: int = 40_000, text: int = 400) -> Offer:
    """A chunk of three levels, each half as long as the one before."""
    return Offer(tokens, {"0": fine, "1": fine // 2, "2": fine // 4, TEXT: text})


def controller(**changes: Any) -> Controller:
    options = {"levels": LEVELS, "deadline": 10.0, "first": "1", "prefill_speed": 10.0}
    return Controller(**(options | changes))


# -- the controller ------------------------------------------------------------------------


@pytest.mark.parametrize(("speed", "best"), [(1000.0, TEXT), (1.0, "0")])
def test_ample_bandwidth_gets_the_best_form_for_every_chunk(speed: float, best: str) -> None:
    offers, policy = [offer()] * 6, controller(prefill_speed=speed)
    for place in range(6):
        assert policy.choose(offers[place:], Now(0.1 * place, 1e9)) == best


def test_no_bandwidth_gets_text() -> None:
    for speed in (1.0, 1000.0):
        assert controller(prefill_speed=speed).choose([offer()] * 3, Now(1.0, 0.0)) == TEXT


def test_the_first_chunk_comes_at_the_configured_level() -> None:
    for level in LEVELS:
        assert controller(first=level, prefill_speed=1.0).choose([offer()] * 3, Now()) == level


def test_the_finest_level_that_fits_is_chosen() -> None:
    """Against a plain search, over many situations."""
    draw = random.Random(0)
    chosen = set()
    for _ in range(500):
        offers = [offer(100, draw.randrange(4_000, 80_000)) for _ in range(draw.randrange(1, 6))]
        now = Now(draw.uniform(0, 9), draw.uniform(2_000, 60_000))
        left = 10.0 - now.elapsed
        fits = [
            level
            for level in LEVELS
            if sum(one.nbytes[level] for one in offers) / now.bandwidth <= left
        ]
        found = controller(prefill_speed=0.1).choose(offers, now)
        assert found == (fits[0] if fits else "2")
        chosen.add((found, bool(fits)))
    assert chosen == {("0", True), ("1", True), ("2", True), ("2", False)}


def test_text_comes_first_where_all_that_remains_can_be_computed_in_time() -> None:
    offers = [offer()] * 4  # 400 tokens
    at_hand = [replace(one, nbytes=dict(one.nbytes) | {TEXT: 0}) for one in offers]
    assert controller(prefill_speed=40.0).choose(at_hand, Now(0.0, 1e9)) == TEXT
    assert controller(prefill_speed=39.9).choose(at_hand, Now(0.0, 1e9)) == "0"
    assert controller(prefill_speed=40.0).choose(at_hand, Now(0.01, 1e9)) == "0"
    assert controller(prefill_speed=40.0).choose(at_hand[1:], Now(0.01, 1e9)) == TEXT


def test_work_that_is_not_done_yet_counts() -> None:
    policy, offers = controller(prefill_speed=40.0), [offer(text=0)] * 3  # 7.5 s of text
    assert policy.choose(offers, Now(0.0, 1e9, busy=2.5)) == TEXT
    assert policy.choose(offers, Now(0.0, 1e9, busy=2.6)) == "0"
    slow = controller(prefill_speed=1.0, decode_seconds=3.0)
    assert slow.level_seconds(offers, "0", Now(), 120_000.0) == pytest.approx(9.0)
    assert slow.level_seconds(offers, "0", Now(), 12_000.0) == pytest.approx(13.0)
    assert slow.level_seconds(offers, "0", Now(busy=2.0), 120_000.0) == pytest.approx(11.0)


def test_a_cautious_controller_counts_on_half_of_the_lowest_bandwidth() -> None:
    now = Now().after(20_000, 1.0).after(8_000, 1.0).after(40_000, 1.0)
    offers = [offer(fine=40_000)]
    assert controller(prefill_speed=0.1).choose(offers, replace(now, elapsed=8.0)) == "0"
    assert controller(prefill_speed=0.1, cautious=True).choose(offers, now) == "0"
    later = replace(now, elapsed=0.1)
    assert controller(prefill_speed=0.1, cautious=True).choose(offers, later) == "1"


def test_a_hopeless_level_is_given_up_for_text() -> None:
    """Text takes 20 seconds and is late; so is the coarsest level, of 10,000 bytes."""
    policy, offers = controller(prefill_speed=5.0), [offer(text=0)]
    assert policy.choose(offers, Now(0.0, 126.0)) == "2"
    assert policy.choose(offers, Now(0.0, 124.0)) == TEXT


def test_only_the_forms_that_there_are_are_chosen() -> None:
    without_text = Offer(100, {level: offer().nbytes[level] for level in LEVELS})
    assert controller(prefill_speed=1e9).choose([without_text], Now(0.0, 1e9)) == "0"
    assert controller().choose([without_text], Now(0.0, 0.0)) == "2"
    assert controller(levels=()).choose([offer()], Now(11.0, 1e9)) == TEXT


def test_bandwidth_is_of_the_newest_transfer() -> None:
    now = Now().after(10_000, 2.0)
    assert now.bandwidth == 5_000
    assert now.after(0, 100.0) == now
    assert now.after(1_000, 1.0) == Now(0.0, 1_000.0, lowest=1_000.0)
    assert now.after(9_000, 1.0) == Now(0.0, 9_000.0, lowest=5_000.0)
    assert now.after(10_000, 0.0).bandwidth == math.inf


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"deadline": 0.0}, "deadline=0.0 must be above 0"),
        ({"deadline": math.nan}, "deadline=nan"),
        ({"prefill_speed": 0.0}, "prefill_speed=0.0"),
        ({"first": "7"}, "no level '7' here; choose one of 0, 1, 2"),
    ],
)
def test_controllers_that_make_no_sense_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        controller(**changes)


# -- recorded links ------------------------------------------------------------------------


def random_trace(seed: int, every: float = 0.2) -> Trace:
    """0.1 to 10 Mb/s, drawn anew every so many seconds."""
    drawn = np.random.default_rng(seed).uniform(12_500, 1_250_000, 100)
    return Trace(tuple(every * np.arange(100)), tuple(drawn))


def test_transfers_take_exactly_the_time_that_the_trace_says() -> None:
    trace = Trace((0.0, 1.0, 3.0, 4.0), (100.0, 0.0, 50.0, 200.0))
    assert trace.arrival(0.0, 100) == 1.0
    assert trace.arrival(0.0, 101) == 3.02
    assert trace.arrival(0.5, 50) == 1.0
    assert trace.arrival(1.5, 50) == 4.0
    assert trace.arrival(1.5, 250) == 5.0
    assert trace.arrival(9.0, 200) == 10.0
    assert trace.arrival(2.0, 0) == 2.0
    assert Trace((0.0, 1.0), (10.0, 0.0)).arrival(0.0, 11) == math.inf


def test_two_transfers_take_as_long_as_one_of_both() -> None:
    draw = random.Random(1)
    for seed in range(20):
        trace, start = random_trace(seed), draw.uniform(0, 25)
        first, second = draw.randrange(1, 10**6), draw.randrange(1, 10**6)
        apart = trace.arrival(trace.arrival(start, first), second)
        assert apart == pytest.approx(trace.arrival(start, first + second))


@pytest.mark.parametrize(
    ("starts", "bandwidths", "says"),
    [
        ((), (), "at least one"),
        ((0.0, 1.0), (1.0,), "a bandwidth for each"),
        ((1.0,), (1.0,), "rise from 0"),
        ((0.0, 0.0), (1.0, 1.0), "rise from 0"),
        ((0.0, math.nan), (1.0, 1.0), "rise from 0"),
        ((0.0,), (-1.0,), "at least 0"),
        ((0.0,), (math.inf,), "finite"),
    ],
)
def test_traces_that_make_no_sense_are_refused(
    starts: tuple[float, ...], bandwidths: tuple[float, ...], says: str
) -> None:
    with pytest.raises(FewbitsError, match=says):
        Trace(starts, bandwidths)


def test_decoding_overlaps_with_the_next_transfer() -> None:
    offers, trace = [offer(fine=1000)] * 3, Trace.constant(1000.0)  # 1 s each
    assert simulate(Fixed("0"), offers, trace, 1.0).delay == 3.0
    assert simulate(Fixed("0"), offers, trace, 1.0, decode_seconds=0.5).delay == 3.5
    # transfers end at 1, 2 and 4 (the third is asked for when the first is decoded, at 3)
    assert simulate(Fixed("0"), offers, trace, 1.0, decode_seconds=2.0).delay == 7.0


def test_text_takes_the_time_of_its_bytes_and_of_the_model() -> None:
    passage = simulate(Fixed(TEXT), [offer(text=500)] * 2, Trace.constant(1000.0), 100.0)
    assert passage.forms == (TEXT, TEXT)
    assert passage.delay == 0.5 + 1.0 + 1.0
    assert passage.violates(2.4)
    assert not passage.violates(2.5)


def test_a_link_that_stops_never_delivers() -> None:
    passage = simulate(Fixed("0"), [offer()], Trace.constant(0.0), 1.0)
    assert passage.delay == math.inf
    assert passage.violates(1e9)
    # text that needs no link comes all the same, once nothing is known to come through
    at_hand = [offer(text=0)] * 4
    trace = Trace((0.0, 1.0), (20_000.0, 10.0))
    assert simulate(controller(prefill_speed=50.0), at_hand, trace, 50.0).delay < 10


def test_what_is_chosen_depends_on_the_past_alone() -> None:
    """Whatever a link does from some time on, what was asked for before is the same."""
    policy, offers = controller(deadline=2.0, prefill_speed=150.0), [offer(fine=200_000)] * 8
    seen = set()
    for seed in range(50):
        trace = random_trace(seed)
        changed = Trace(
            trace.starts, (*trace.bandwidths[:4], *random_trace(seed + 99).bandwidths[4:])
        )
        asked: dict[int, list[tuple[float, str]]] = {0: [], 1: []}
        for number, link in enumerate((trace, changed)):

            class Watched:
                def choose(self, remaining: Sequence[Offer], now: Now, to: int = number) -> str:
                    form = policy.choose(remaining, now)
                    asked[to].append((now.elapsed, form))  # noqa: B023
                    return form

            simulate(Watched(), offers, link, 150.0)
        before = [[one for one in asks if one[0] <= 0.8] for asks in asked.values()]
        assert before[0] == before[1]
        assert len(before[0]) >= 2
        seen |= {form for _, form in asked[0]}
    assert len(seen) >= 3


def late(policies: dict[float, Any], offers: list[Offer], speed: float) -> float:
    """Share of caches that come late over random links, for a policy of each deadline."""
    links = [random_trace(seed, every) for seed in range(80) for every in (0.2, 1.0, 5.0)]
    found = [
        simulate(policy, offers, link, speed).violates(deadline)
        for deadline, policy in policies.items()
        for link in links
    ]
    return float(np.mean(found))


def test_it_is_late_no_more_often_than_the_best_fixed_level() -> None:
    """Where reading all as text (3.2 s) would be too late."""
    offers, speed, deadlines = [offer(fine=300_000, text=0)] * 8, 250.0, (1.0, 1.5, 2.0, 3.0)
    fixed = [late(dict.fromkeys(deadlines, Fixed(level)), offers, speed) for level in LEVELS]

    def ours(cautious: bool) -> float:
        options = {"prefill_speed": speed, "first": "2", "cautious": cautious}
        made = {deadline: controller(deadline=deadline, **options) for deadline in deadlines}
        return late(made, offers, speed)

    assert 0 < ours(cautious=True) <= min(fixed)
    assert min(fixed) <= ours(cautious=False) < fixed[1]


# -- links that fail -----------------------------------------------------------------------


class Server:
    """Serves a folder on this machine, with the faults that a test asks for.

    `fault(name, start, attempt)` says what goes wrong with a request: ``"drop"`` closes the
    connection in the middle, ``"corrupt"`` changes a byte, ``"busy"`` and ``"missing"`` are answers
    503 and 404, ``"stall"`` sends half and then nothing. `shift` is added to the places asked for.
    """

    def __init__(self, folder: Path, ranges: bool = True, rate: float | None = None) -> None:
        self.folder, self.ranges, self.rate = folder, ranges, rate
        self.fault: Callable[[str, int, int], str | None] = lambda name, start, attempt: None
        self.asked: list[tuple[str, int]] = []
        self.paths: list[str] = []
        self.shift = 0
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.serve(self)

            def log_message(self, *about: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/saved"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].rpartition("/")[2]
        wanted = request.headers.get("Range", "") if self.ranges else ""
        first, last = map(int, wanted.removeprefix("bytes=").split("-")) if wanted else (0, -1)
        fault = self.fault(name, first, sum(one == (name, first) for one in self.asked))
        self.asked.append((name, first))
        self.paths.append(request.path)
        path = self.folder / name
        if fault in ("busy", "missing") or not path.exists():
            request.send_error(503 if fault == "busy" else 404)
            return
        data = path.read_bytes()
        size = len(data)
        first, last = first + self.shift, last + self.shift
        if wanted:
            data = data[first : last + 1]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(data)))
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        request.end_headers()
        self.send(request, data, fault)

    def send(self, request: BaseHTTPRequestHandler, data: bytes, fault: str | None) -> None:
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault in ("drop", "stall"):
            data = data[: len(data) // 2]
        for place in range(0, len(data), 512):
            piece = data[place : place + 512]
            if self.rate is not None:
                time.sleep(len(piece) / self.rate)
            request.wfile.write(piece)
        if fault == "stall":
            self.closing.wait(5)
        request.close_connection = True

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


CHUNK, COUNT = 12, 44


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def profile(model: Any) -> CacheGen:
    return CacheGen(chunk=CHUNK, levels=(0.1, 1.0, 4.0)).fit(
        model, tokens(rows=2, count=48, seed=9)
    )


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return tokens(rows=1, count=COUNT)


@pytest.fixture(scope="module")
def saved(
    model: Any, profile: CacheGen, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved cache of four chunks, the last one shorter."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    folder: Path = tmp_path_factory.mktemp("saved") / "saved"
    save(cache, folder, profile, ids[0])
    return folder


@pytest.fixture
def server(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(_stream, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    made = Server(saved)
    yield made
    made.close()


def states(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers, key heads, t, width) keys and values of a cache."""
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    return keys, torch.stack([layer.values[0] for layer in cache.layers])


@torch.no_grad()
def expected(model: Any, folder: Path, profile: CacheGen, forms: Sequence[str]) -> Any:
    """A cache whose chunks have these forms, made without the code that is tested."""
    manifest = Manifest.from_json((folder / "cache.json").read_bytes())
    text = np.fromfile(folder / "text.bin", "<i4").astype(np.int64)
    cache = DynamicCache()
    for chunk, form in zip(manifest.chunks, forms, strict=True):
        if form == TEXT:
            some = text[chunk.first : chunk.first + chunk.tokens]
            model(torch.from_numpy(some)[None], past_key_values=cache)
            continue
        piece = chunk.levels[form]
        data = (folder / f"level-{form}.bin").read_bytes()[piece.offset :][: piece.bytes]
        for layer, (keys, values) in enumerate(
            zip(*decode_chunk(profile, data, chunk), strict=True)
        ):
            cache.update(keys[None], values[None], layer)
    return cache


def assert_same(found: Any, wanted: Any) -> None:
    for mine, theirs in zip(states(found), states(wanted), strict=True):
        assert torch.equal(mine, theirs)


def loaded(model: Any, url: str | Path, **options: Any) -> tuple[Any, list[Arrival]]:
    """A cache, and how its chunks came."""
    arrivals: list[Arrival] = []
    return load(model, url, on_chunk=arrivals.append, **options), arrivals


def forms(arrivals: Sequence[Arrival]) -> list[str]:
    return [arrival.form for arrival in arrivals]


# -- loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_cache_over_http_is_the_local_one_bit_for_bit(
    model: Any, server: Server, saved: Path, level: str
) -> None:
    cache, arrivals = loaded(model, server.url, level=level)
    assert_same(cache, read_local(saved, model, level=level))
    assert forms(arrivals) == [level] * 4
    assert cache.get_seq_length() == COUNT
    manifest = Manifest.from_json((saved / "cache.json").read_bytes())
    assert [arrival.nbytes for arrival in arrivals] == [
        chunk.levels[level].bytes for chunk in manifest.chunks
    ]
    assert ("text.bin", 0) not in server.asked  # nothing is read that is not needed


def test_a_folder_and_other_urls_give_the_same(model: Any, saved: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(saved), "/streaming", recursive=True)
    local = read_local(saved, model, level="1")
    for place in (saved, str(saved), saved.as_uri(), "memory://streaming"):
        assert_same(loaded(model, place, level="1")[0], local)


def test_the_finest_level_is_the_default(model: Any, saved: Path) -> None:
    assert forms(loaded(model, saved)[1]) == ["0"] * 4


@torch.no_grad()
def test_generation_goes_on_from_what_was_loaded(model: Any, server: Server) -> None:
    ids = read_tokens(server.url)
    assert torch.equal(ids, tokens(rows=1, count=COUNT))
    more = torch.cat([ids, tokens(rows=1, count=3, seed=1)], dim=1)
    local = load(model, server.url)
    answer = model.generate(more, past_key_values=local, max_new_tokens=8, do_sample=False)
    assert answer.shape == (1, COUNT + 3 + 8)
    assert local.get_seq_length() == COUNT + 3 + 7


def test_a_compressed_cache_is_filled(model: Any, saved: Path) -> None:
    into = fewbits.kv.cache(model, "kivi:bits=4,group=8,recent=4")
    cache, _ = loaded(model, saved, into=into)
    assert cache is into
    assert cache.get_seq_length() == COUNT
    exact = sum(state.nbytes for state in states(read_local(saved, model)))
    assert cache.nbytes() < 0.6 * exact


def test_a_profile_at_hand_is_not_read_again(
    model: Any, server: Server, profile: CacheGen, tmp_path: Path
) -> None:
    profile.save(tmp_path / "profile.bin")
    for given in (profile, tmp_path / "profile.bin"):
        assert_same(load(model, server.url, profile=given), load(model, server.url))
    assert sum(name == "tables.bin" for name, _ in server.asked) == 2


def test_a_query_of_the_url_goes_with_each_request(model: Any, server: Server, saved: Path) -> None:
    assert_same(load(model, f"{server.url}/?key=7"), read_local(saved, model))
    assert len(server.paths) == 6
    assert all(re.fullmatch(r"/saved/[^/]+[?]key=7", path) for path in server.paths)


# -- with a deadline -----------------------------------------------------------------------


def test_where_there_is_time_everything_comes_as_text(
    model: Any, server: Server, saved: Path, profile: CacheGen
) -> None:
    cache, arrivals = loaded(model, server.url, deadline=60.0)
    assert forms(arrivals) == [TEXT] * 4
    assert_same(cache, expected(model, saved, profile, [TEXT] * 4))
    assert not any(name.startswith("level") for name, _ in server.asked)


def slow_model(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    """Have the model taken for one that reads so many tokens a second."""
    monkeypatch.setattr(_stream, "prefill_speed", lambda model: speed)


def test_a_fast_link_brings_the_finest_level_behind_the_first_chunk(
    model: Any,
    server: Server,
    saved: Path,
    profile: CacheGen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow_model(monkeypatch, 0.01)
    cache, arrivals = loaded(model, server.url, deadline=60.0)
    assert forms(arrivals) == ["1", "0", "0", "0"]
    assert_same(cache, expected(model, saved, profile, ["1", "0", "0", "0"]))
    assert forms(loaded(model, server.url, deadline=60.0, level="2")[1])[0] == "2"


def test_a_throttled_link_brings_coarser_levels(
    model: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_model(monkeypatch, 0.01)
    server.rate = 20_000.0
    _, arrivals = loaded(model, server.url, deadline=0.1)
    assert forms(arrivals)[0] == "1"
    assert set(forms(arrivals)[1:]) == {"2"}
    assert all(one.nbytes / one.transfer_seconds < server.rate for one in arrivals)


def test_text_that_cannot_be_had_is_not_asked_for(
    model: Any, server: Server, saved: Path, profile: CacheGen
) -> None:
    server.fault = lambda name, start, attempt: "missing" if name == "text.bin" else None
    cache, arrivals = loaded(model, server.url, deadline=60.0)
    assert TEXT not in forms(arrivals)
    assert_same(cache, expected(model, saved, profile, forms(arrivals)))


# -- what does not come --------------------------------------------------------------------


def second_chunk(saved: Path, level: str = "0") -> int:
    return Manifest.from_json((saved / "cache.json").read_bytes()).chunks[1].levels[level].offset


@pytest.mark.parametrize("fault", ["drop", "corrupt", "busy"])
def test_what_fails_once_is_asked_for_again(
    model: Any, server: Server, saved: Path, fault: str
) -> None:
    """Every file and every chunk fails at first."""
    server.fault = lambda name, start, attempt: fault if attempt == 0 else None
    cache, arrivals = loaded(model, server.url)
    assert_same(cache, read_local(saved, model))
    assert forms(arrivals) == ["0"] * 4
    assert sorted(server.asked) == sorted(2 * list(set(server.asked)))


def test_a_server_that_falls_silent_is_asked_again(model: Any, server: Server, saved: Path) -> None:
    place = second_chunk(saved)
    server.fault = lambda name, start, attempt: (
        "stall" if (name, start, attempt) == ("level-0.bin", place, 0) else None
    )
    cache, arrivals = loaded(model, server.url, timeout=1.0)
    assert_same(cache, read_local(saved, model))
    assert arrivals[1].transfer_seconds >= 1.0


@pytest.mark.parametrize("fault", ["drop", "corrupt", "busy", "missing"])
def test_what_fails_again_and_again_comes_at_another_level(
    model: Any, server: Server, saved: Path, profile: CacheGen, fault: str
) -> None:
    place = second_chunk(saved)

    def fails(name: str, start: int, attempt: int) -> str | None:
        return fault if name == "level-0.bin" and start == place else None

    server.fault = fails
    with pytest.warns(UserWarning, match=r"of 4 chunks .* chunk 1 as 1, for 0: "):
        cache, arrivals = loaded(model, server.url)
    wanted = ["0", "1", "1", "1"] if fault == "missing" else ["0", "1", "0", "0"]
    assert forms(arrivals) == wanted
    assert [arrival.wanted for arrival in arrivals] == ["0"] * 4
    assert len(arrivals[1].failures) == 1
    assert server.asked.count(("level-0.bin", place)) == (1 if fault == "missing" else 3)
    assert_same(cache, expected(model, saved, profile, wanted))


def test_a_level_whose_file_is_missing_is_asked_for_once(
    model: Any, server: Server, saved: Path
) -> None:
    server.fault = lambda name, start, attempt: "missing" if name == "level-1.bin" else None
    with pytest.warns(UserWarning, match="4 of 4 chunks"):
        cache, _ = loaded(model, server.url, level="1")
    assert_same(cache, read_local(saved, model, level="2"))
    assert sum(name == "level-1.bin" for name, _ in server.asked) == 1


def test_chunks_that_no_level_brings_are_computed_from_text(
    model: Any, server: Server, saved: Path, profile: CacheGen
) -> None:
    places = {f"level-{level}.bin": second_chunk(saved, level) for level in LEVELS}
    server.fault = lambda name, start, attempt: "corrupt" if places.get(name) == start else None
    with pytest.warns(UserWarning, match="1 of 4 chunks"):
        cache, arrivals = loaded(model, server.url)
    assert forms(arrivals) == ["0", TEXT, "0", "0"]
    assert_same(cache, expected(model, saved, profile, ["0", TEXT, "0", "0"]))
    assert [failure[:2] for failure in arrivals[1].failures] == ["0:", "1:", "2:"]


@torch.no_grad()
@pytest.mark.parametrize("broken", ["level", "tables"])
def test_where_every_level_is_broken_all_is_computed(
    model: Any, server: Server, ids: torch.Tensor, broken: str
) -> None:
    server.fault = lambda name, start, attempt: "corrupt" if name.startswith(broken) else None
    with pytest.warns(UserWarning, match="4 of 4 chunks"):
        cache, arrivals = loaded(model, server.url)
    assert forms(arrivals) == [TEXT] * 4
    whole = DynamicCache()
    model(ids, past_key_values=whole)
    for mine, theirs in zip(states(cache), states(whole), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deadline", [None, 60.0])
def test_where_nothing_comes_there_is_no_cache(
    model: Any, server: Server, deadline: float | None
) -> None:
    server.fault = lambda name, start, attempt: "corrupt" if name != "cache.json" else None
    with pytest.raises(FewbitsError, match=r"tokens 0 to 11 cannot be had in any form; .*text"):
        load(model, server.url, deadline=deadline)


def test_a_late_failure_leaves_no_cache(model: Any, server: Server, saved: Path) -> None:
    places = {f"level-{level}.bin": second_chunk(saved, level) for level in LEVELS}
    places["text.bin"] = 0
    server.fault = lambda name, start, attempt: "drop" if places.get(name) == start else None
    into = DynamicCache()
    with pytest.raises(FewbitsError, match="tokens 12 to 23 cannot be had in any form"):
        load(model, server.url, into=into)
    assert into.get_seq_length() == 0


def test_a_chunk_that_cannot_be_decoded_comes_at_another_level(
    model: Any,
    saved: Path,
    profile: CacheGen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its digest is right, but what was saved was wrong already."""
    place = second_chunk(saved)
    wrong = (saved / "level-0.bin").read_bytes()[place : place + 40]

    def decode(profile: CacheGen, data: bytes, chunk: Any) -> Any:
        if data[:40] == wrong:
            raise FewbitsError("no such chunk")
        return decode_chunk(profile, data, chunk)

    monkeypatch.setattr(_stream, "decode_chunk", decode)
    with pytest.warns(UserWarning, match="chunk 1 as 1, for 0: no such chunk"):
        cache, arrivals = loaded(model, saved)
    assert forms(arrivals) == ["0", "1", "0", "0"]
    assert_same(cache, expected(model, saved, profile, forms(arrivals)))


def test_the_next_chunk_is_on_its_way_while_one_is_decoded(
    model: Any, server: Server, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[bool] = []
    asked = threading.Event()

    def seen(name: str, start: int, attempt: int) -> None:
        if name == "level-0.bin" and start == second_chunk(saved):
            asked.set()

    def decode(profile: CacheGen, data: bytes, chunk: Any) -> Any:
        came.append(asked.wait(20))
        return decode_chunk(profile, data, chunk)

    server.fault = seen
    monkeypatch.setattr(_stream, "decode_chunk", decode)
    load(model, server.url)
    assert came == [True] * 4


# -- servers without ranges ----------------------------------------------------------------


def test_a_server_without_ranges_sends_each_file_once(
    model: Any, server: Server, saved: Path
) -> None:
    server.ranges = False
    cache, arrivals = loaded(model, server.url)
    assert_same(cache, read_local(saved, model))
    assert [name for name, _ in server.asked] == ["cache.json", "tables.bin", "level-0.bin"]
    size = (saved / "level-0.bin").stat().st_size
    assert [arrival.nbytes for arrival in arrivals] == [size, 0, 0, 0]


def test_a_wrong_file_of_such_a_server_is_asked_for_again(
    model: Any, server: Server, saved: Path
) -> None:
    server.ranges = False
    server.fault = lambda name, start, attempt: (
        "corrupt" if name == "level-0.bin" and attempt == 0 else None
    )
    cache, arrivals = loaded(model, server.url)
    assert_same(cache, read_local(saved, model))
    assert forms(arrivals) == ["0"] * 4
    assert [name for name, _ in server.asked].count("level-0.bin") == 2


def test_a_server_that_gives_another_piece_is_not_believed(server: Server) -> None:
    folder = open_folder(server.url, 5.0)
    assert len(folder.read("level-0.bin", 5, 10, 1000)) == 10
    server.shift = 1
    with pytest.raises(FewbitsError, match="gave another piece than was asked for: bytes 6-15/"):
        folder.read("level-0.bin", 5, 10, 1000)


def test_files_that_are_too_short_too_long_or_not_there(server: Server, saved: Path) -> None:
    for place in (server.url, saved):
        folder = open_folder(place, 5.0)
        with pytest.raises(FewbitsError, match="cut short"):
            folder.read("level-0.bin", 0, 10**6, 10**7)
        with pytest.raises(MissingFile):
            folder.read("nothing.bin", 0, 1, 10)
        with pytest.raises(FewbitsError, match="longer than the 5 bytes"):
            folder.read_whole("cache.json", 5)


# -- bad input -----------------------------------------------------------------------------


def test_the_cache_of_another_model_is_refused(server: Server) -> None:
    other = tiny_model(num_hidden_layers=2)
    with pytest.raises(FewbitsError, match="another model"):
        load(other, server.url)
    assert [name for name, _ in server.asked] == ["cache.json"]


def test_the_cache_of_another_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(FewbitsError, match=r"float32.*bfloat16"):
        load(tiny_model().to(torch.bfloat16), saved)


def test_another_profile_is_refused(model: Any, saved: Path) -> None:
    other = CacheGen(chunk=CHUNK, levels=(0.1, 1.0, 4.0)).fit(
        model, tokens(rows=2, count=48, seed=5)
    )
    with pytest.raises(FewbitsError, match="another profile"):
        load(model, saved, profile=other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": "9"}, "no level '9' here; choose one of 0, 1, 2"),
        ({"deadline": 0.0}, "deadline=0.0 must be above 0"),
        ({"deadline": -1.0}, "deadline=-1.0 must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model: Any, saved: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FewbitsError, match=says):
        load(model, saved, **options)


def test_places_without_a_cache_are_refused(model: Any, server: Server, tmp_path: Path) -> None:
    for place in (tmp_path, f"{server.url}/deeper", "memory://nothing-here"):
        server.fault = lambda name, start, attempt: "missing"
        with pytest.raises(FewbitsError, match="is no saved cache"):
            load(model, place)
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(FewbitsError, match="not the manifest"):
        load(model, tmp_path)


def test_a_server_that_is_not_there_is_one_clear_line(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stream, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(
        FewbitsError, match=r"cannot read http://127.0.0.1:9/saved/cache\.json: "
    ) as e:
        load(model, "http://127.0.0.1:9/saved")
    assert "\n" not in str(e.value)


def test_tokens_that_the_model_does_not_know_are_not_computed(
    model: Any, profile: CacheGen, saved: Path, tmp_path: Path
) -> None:
    cache = read_local(saved, model)
    save(cache, tmp_path / "odd", profile, torch.full((COUNT,), 128))
    (tmp_path / "odd" / "level-0.bin").unlink()
    with pytest.warns(UserWarning, match="4 of 4"):
        loaded(model, tmp_path / "odd")
    for level in LEVELS[1:]:
        (tmp_path / "odd" / f"level-{level}.bin").unlink()
    with pytest.raises(FewbitsError, match="does not know"):
        load(model, tmp_path / "odd")


# -- is it worth it? -----------------------------------------------------------------------


def test_a_link_is_measured(model: Any, server: Server, saved: Path) -> None:
    server.rate = 20_000.0
    report = bench_link(model, server.url)
    assert (report.tokens, report.chunks) == (COUNT, 4)
    assert report.bandwidth < 20_000
    assert report.nbytes == {
        level: (saved / f"level-{level}.bin").stat().st_size for level in LEVELS
    }
    assert list(report.load_seconds) == list(LEVELS)
    assert report.load_seconds["0"] > report.load_seconds["1"] > report.load_seconds["2"]
    assert report.worth == []  # a tiny model reads 44 tokens in no time
    assert report.lines()[-1].startswith("do not load it here")


def test_a_report_says_from_which_bandwidth_on_loading_is_worth_it() -> None:
    from fewbits.kv.streaming import LinkReport

    report = LinkReport(
        1000, 4, 10.0, 1e6, 0.5, {"0": 9_500_000, "1": 950_000}, {"0": 10.1, "1": 2.0}
    )
    assert report.needed_bandwidth("0") == 1e6
    assert report.worth == ["1"]
    assert report.lines()[-1] == "load it: level 1 is 5.0 times as fast as reading the text"
    assert "level 0: 9,500,000 bytes, 10.10 s; worth it from 8.0 Mb/s on" in report.lines()
    slow = replace(report, decode_seconds=2.5)
    assert slow.needed_bandwidth("0") == math.inf
    assert "worth it never" in slow.lines()[2]


def test_figures_of_a_damaged_cache_are_not_given(model: Any, server: Server) -> None:
    server.fault = lambda name, start, attempt: "missing" if name == "level-0.bin" else None
    with (
        pytest.warns(UserWarning, match="4 of 4"),
        pytest.raises(FewbitsError, match="is damaged"),
    ):
        bench_link(model, server.url)


def test_offers_are_what_the_manifest_says(saved: Path) -> None:
    manifest = Manifest.from_json((saved / "cache.json").read_bytes())
    offers = offers_of(manifest)
    assert [one.tokens for one in offers] == [12, 12, 12, 8]
    assert [one.nbytes[TEXT] for one in offers] == [48, 48, 48, 32]
    for level in LEVELS:
        assert sum(one.nbytes[level] for one in offers) == manifest.level_bytes(level)
    assert TEXT not in offers_of(manifest, None)[0].nbytes


# -- from words to words -------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load_language_model()


WORDS = held_out_text()[5000:5400]


@pytest.fixture(scope="module")
def words(reference: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = reference
    ids = torch.tensor([tokenizer(WORDS)["input_ids"]])
    fitted = CacheGen(chunk=48, levels=(0.1, 1.0)).fit(model, ids)
    folder: Path = tmp_path_factory.mktemp("words") / "words.kv"
    manifest = save_text(model, tokenizer, WORDS, folder, profile=fitted)
    assert manifest.tokens == ids.shape[1]
    assert torch.equal(read_tokens(folder), ids)
    return folder


def test_the_model_goes_on_as_if_it_had_read_the_text(
    reference: tuple[Any, Any], words: Path
) -> None:
    model, tokenizer = reference
    question = "\n\n    def __init__(self"
    ids = tokenizer(WORDS)["input_ids"] + tokenizer(question)["input_ids"]
    live = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    written = go_on(model, tokenizer, words, question, new_tokens=8, deadline=600.0)
    assert written.text == tokenizer.decode(live[0, len(ids) :], skip_special_tokens=True)
    assert {arrival.form for arrival in written.arrivals} == {TEXT}
    coded = go_on(model, tokenizer, words, question, new_tokens=8)
    assert coded.text
    assert re.fullmatch(r"\d+ tokens in .* s: \d+ at level 0; [\d,]+ bytes", coded.lines()[0])


def test_what_was_saved_is_said_in_words(words: Path) -> None:
    manifest = Manifest.from_json((words / "cache.json").read_bytes())
    first, *levels = saved_lines(manifest)
    assert first == f"{manifest.tokens} tokens in {len(manifest.chunks)} chunks"
    size = (words / "level-1.bin").stat().st_size
    numbers = 2 * manifest.layers * manifest.heads * manifest.width * manifest.tokens
    assert levels[1].startswith(f"level 1: {size:,} bytes, {8 * size / numbers:.2f} bits")


def test_words_that_make_no_sense_are_refused(
    reference: tuple[Any, Any], words: Path, tmp_path: Path
) -> None:
    model, tokenizer = reference
    with pytest.raises(FewbitsError, match="the text is empty"):
        save_text(model, tokenizer, "", tmp_path / "saved")
    with pytest.raises(FewbitsError, match="reads at most 4,096"):
        save_text(model, tokenizer, "word " * 5000, tmp_path / "saved")
    with pytest.raises(FewbitsError, match="the question is empty"):
        go_on(model, tokenizer, words, "")
    with pytest.raises(FewbitsError, match="new_tokens=0"):
        go_on(model, tokenizer, words, "a", new_tokens=0)
    assert not (tmp_path / "saved").exists()
