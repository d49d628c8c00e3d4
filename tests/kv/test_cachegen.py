"""CacheGen: what is lost and what is not, sizes, files, and going on from a saved cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import tiny_model, tokens

import fewbits
from fewbits.core.errors import FewbitsError
from fewbits.kv._cachegen_codec import (
    ANCHOR,
    HEADER,
    KEYS,
    Profile,
    anchors_of,
    channels_first,
    heads_first,
    pieces,
    quantised,
    restored,
    rule,
    sections,
    tables_of,
    turn,
    unpacked,
)
from fewbits.kv._cachegen_codec import contexts_of as contexts_of_places
from fewbits.kv._cachegen_files import sha256
from fewbits.kv._cachegen_fit import Histogram, context_numbers, depth_steps, rotation_of
from fewbits.kv.cachegen import (
    CacheGen,
    ChunkInfo,
    Manifest,
    Piece,
    decode_chunk,
    encode_chunk,
    filled,
    read_batch,
    read_local,
    read_text,
    save,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def profile(model: Any) -> CacheGen:
    return CacheGen(chunk=40).fit(model, tokens(rows=8, count=96, seed=7))


@torch.no_grad()
def live(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    cache = fewbits.kv.cache(model, "full")
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def states(model: Any, count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers, key heads, t, width) keys and values of a text."""
    cache = live(model, tokens(rows=1, count=count, seed=seed))
    keys, values = (
        torch.stack([getattr(layer.recent, name).read()[0] for layer in cache.compressed])
        for name in ("keys", "values")
    )
    return keys, values


def expected(data: bytes, first: int = 0, count: int = 40, level: str = "0") -> ChunkInfo:
    return ChunkInfo(first, count, {level: Piece(0, len(data), sha256(data))})


# -- whole numbers -------------------------------------------------------------------------


def drawn(channels: int = 6, count: int = 47, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((channels, count)) * 3 + 1).astype(np.float32)


@pytest.mark.parametrize("predictor", ["none", "mean", "anchor"])
@pytest.mark.parametrize("count", [1, 9, 10, 11, 47])
@pytest.mark.parametrize("step", [0.01, 0.7, 40.0])
def test_no_number_is_off_by_more_than_half_a_step(predictor: str, count: int, step: float) -> None:
    x = drawn(count=count)
    mean = x.mean(axis=1)
    symbols = quantised(x, predictor, mean, step, 10)
    found = restored(symbols, predictor, mean, step, 10, count)
    most = np.full(x.shape, step / 2)
    if predictor == "anchor":  # anchors have steps of their own
        assert symbols.anchors is not None
        assert symbols.scales is not None
        most[:, ::10] = symbols.scales / 2
        assert symbols.anchors.shape == (6, -(-count // 10))
        assert symbols.differences.shape == (6, count - -(-count // 10))
    assert (np.abs(found - x) <= most + 1e-5).all()


def test_differences_are_from_the_anchor_as_it_is_decoded() -> None:
    """A token like its anchor differs from it by what 8 bits lost, which is made up for."""
    x = np.repeat(drawn(count=1), 10, axis=1)
    symbols = quantised(x, "anchor", x[:, 0], 1e-4, 10)
    found = restored(symbols, "anchor", x[:, 0], 1e-4, 10, 10)
    assert symbols.scales is not None
    lost = np.abs(found - x)
    assert lost[:, 1:].max() <= 0.6e-4
    assert lost[:, 0].max() > 1e-3


def test_tokens_of_zeros_are_safe() -> None:
    x = drawn(count=20)
    x[:, 10] = 0
    anchors, scales = anchors_of(x[:, ::10])
    assert scales[1] == 0
    assert not anchors[:, 1].any()
    found = restored(quantised(x, "anchor", x[:, 0], 0.1, 10), "anchor", x[:, 0], 0.1, 10, 20)
    assert np.isfinite(found).all()
    assert not found[:, 10].any()


def test_rotation_is_undone_and_done_again(model: Any) -> None:
    """Before its rotation, the key of one token at another place is the same."""
    keys = np.random.default_rng(0).standard_normal((3, 32, 50)).astype(np.float32)
    frequencies = rotation_of(model)
    assert frequencies.shape == (8,)
    back = turn(keys, frequencies, 5, 2, back=True)
    np.testing.assert_allclose(turn(back, frequencies, 5, 2, back=False), keys, atol=1e-5)
    with torch.no_grad():
        rotary = model.model.rotary_emb
        cosine, sine = rotary(torch.zeros(1), torch.arange(5, 55)[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plain = torch.from_numpy(heads_first(back, 2).copy())
    turned, _ = apply_rotary_pos_emb(plain, plain, cosine, sine)
    np.testing.assert_allclose(channels_first(turned.numpy()), keys, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "steps"),
    [
        (1, [0.5]),
        (2, [0.5, 1.0]),
        (3, [0.5, 1, 1.5]),
        (6, [0.5, 0.5, 1, 1, 1.5, 1.5]),
    ],
)
def test_steps_grow_by_thirds_of_the_depth(layers: int, steps: list[float]) -> None:
    assert depth_steps(layers).tolist() == steps


# -- the profile ---------------------------------------------------------------------------


def test_steps_are_in_standard_deviations(model: Any, profile: CacheGen) -> None:
    """Of values: about the channels' means, over all texts."""
    every = [states(model, 96, seed=s)[1] for s in range(3)]
    values = np.stack([channels_first(one.numpy()) for one in every], axis=2).reshape(3, 32, -1)
    spread = values.std(axis=2)
    steps = profile.profile.steps[1] / depth_steps(3)
    np.testing.assert_allclose(steps, np.sqrt((spread**2).mean(axis=1)), rtol=0.1)


def test_the_cheapest_predictor_is_taken(model: Any) -> None:
    texts = tokens(rows=6, count=96, seed=7)
    best = CacheGen(chunk=96).fit(model, texts)
    keys, values = states(model, 96)
    sizes = {
        (predictor, rotation): len(
            encode_chunk(
                CacheGen(chunk=96, predictor=predictor, rotation=rotation).fit(model, texts),
                keys,
                values,
                0,
                "2",
            )
        )
        for predictor in ("none", "mean", "anchor")
        for rotation in ("before", "after")
    }
    assert len(encode_chunk(best, keys, values, 0, "2")) <= 1.02 * min(sizes.values())
    assert max(sizes.values()) > 1.1 * min(sizes.values())


def test_tables_are_as_long_as_they_must_be() -> None:
    made = Histogram(1, 1, 50)
    made.add(0, 0, np.repeat([-3, 0, 7, 200], [5000, 20000, 3, 1])[None])
    short = made.shortened()
    assert short.most == 7
    assert short.counts[0, 0, 0, -1] == 1
    assert short.counts.sum() == made.counts.sum() == 25004
    few = Histogram(1, 1, 50)
    few.add(0, 0, np.repeat([-3, 0, 7], [5000, 20000, 2])[None])
    assert few.shortened().most == 3
    assert few.shortened().counts[0, 0, 0, -1] == 2


@pytest.mark.parametrize(
    ("own", "tables"), [("layer and channel", 30), ("layer", 6), ("channel", 10), ("none", 2)]
)
def test_what_has_a_table_of_its_own(own: Any, tables: int) -> None:
    numbers = context_numbers(3, 5, own)
    assert numbers.shape == (2, 3, 5)
    assert sorted(set(numbers.ravel().tolist())) == list(range(tables))
    assert not set(numbers[0].ravel().tolist()) & set(numbers[1].ravel().tolist())


def test_channels_that_never_change_can_be_coded(model: Any) -> None:
    keys, values = states(model)
    fitted = CacheGen(chunk=40).fit(model, torch.full((2, 40), 5))
    found, _ = decode_chunk(
        fitted, data := encode_chunk(fitted, keys, values, 0, "0"), expected(data)
    )
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_few_layers_work(layers: int) -> None:
    few = tiny_model(num_hidden_layers=layers)
    fitted = CacheGen(chunk=40).fit(few, tokens(rows=2, count=40))
    keys, values = states(few)
    data = encode_chunk(fitted, keys, values, 0, "0")
    assert decode_chunk(fitted, data, expected(data))[0].shape == (layers, 2, 40, 16)


# -- chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["none", "mean", "anchor"])
@pytest.mark.parametrize("rotation", ["before", "after"])
@pytest.mark.parametrize("level", ["0", "2", "4"])
def test_what_is_decoded_is_within_half_a_step(
    model: Any, predictor: Any, rotation: Any, level: str
) -> None:
    kind = CacheGen(chunk=40, predictor=predictor, rotation=rotation)
    fitted = kind.fit(model, tokens(rows=2, count=40))
    keys, values = states(model, 67)
    piece = keys[:, :, 27:], values[:, :, 27:]
    data = encode_chunk(fitted, *piece, 27, level)
    found = decode_chunk(fitted, data, expected(data, 27, 40, level))
    learned = fitted.profile
    scale = fitted.levels[int(level)]
    for which, (whole, coded) in enumerate(zip(found, piece, strict=True)):
        a, b = (channels_first(one.numpy()) for one in (whole, coded))
        if which == KEYS and rotation == "before":
            a, b = (turn(one, learned.frequencies, 27, 2, back=True) for one in (a, b))
        lost = np.abs(a - b)
        if predictor == "anchor":
            largest = np.abs(b[:, :, ::10]).max(axis=1, keepdims=True)
            assert (lost[:, :, ::10] <= largest / 254 + 1e-4).all()
            lost[:, :, ::10] = 0
        assert (lost <= learned.steps[which][:, None, None] * scale / 2 + 1e-4).all()
        assert lost.max() > 0


def test_keys_are_turned_back_by_their_true_positions(model: Any) -> None:
    """Told wrong positions, it decodes as well, but into more bytes."""
    fitted = CacheGen(chunk=500, rotation="before", predictor="mean").fit(
        model, tokens(rows=3, count=96)
    )
    keys, values = states(model, 200)
    right = encode_chunk(fitted, keys[:, :, 100:], values[:, :, 100:], 100, "1")
    wrong = encode_chunk(fitted, keys[:, :, 100:], values[:, :, 100:], 3, "1")
    found, _ = decode_chunk(fitted, wrong, expected(wrong, 3, 100, "1"))
    most = fitted.profile.steps[0].max() * fitted.levels[1]
    assert float((found - keys[:, :, 100:]).abs().max()) < most
    assert len(wrong) != len(right)


def test_levels_take_ever_fewer_bytes(model: Any, profile: CacheGen) -> None:
    keys, values = states(model)
    sizes = [len(encode_chunk(profile, keys, values, 0, str(n))) for n in range(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < keys.numel() * 2 * 7 / 8
    assert sizes[0] > 2 * sizes[2]


def test_payload_is_within_one_in_a_hundred_of_the_least(model: Any, profile: CacheGen) -> None:
    """Under the tables of the profile, on a text that they were not learned from."""
    keys, values = states(model, 400)
    for level in ("0", "2"):
        data = encode_chunk(profile, keys, values, 0, level)
        least = ideal_bytes(profile.profile, data)
        count = len(list(sections(profile.profile, 400)))
        assert least < len(data) <= 1.01 * least + 32 * count + HEADER.itemsize + 4


def ideal_bytes(learned: Profile, data: bytes) -> float:
    """What the numbers of a packet cost at least, and what is beside them."""
    bits = 0.0
    for symbols, contexts, level, anchors in numbers_of(learned, data):
        bits += tables_of(learned, level, anchors).bits(symbols, contexts)
    return bits / 8


def numbers_of(learned: Profile, data: bytes) -> list[tuple[np.ndarray, np.ndarray, int, bool]]:
    from fewbits.primitives.entropy_coding import decode

    header = np.frombuffer(data, HEADER, 1)[0]
    level, count = int(header["level"]), int(header["tokens"])
    parts, _ = pieces(learned, data, int(header["sections"]), count)
    found = []
    for (some, anchors), part in zip(sections(learned, count), parts, strict=True):
        contexts = contexts_of_places(learned, some, anchors)
        symbols = decode(part, contexts, tables_of(learned, level, anchors))
        found.append((symbols, contexts, level, anchors))
    return found


@pytest.mark.parametrize("level", ["0", "1", "2", "3", "4"])
def test_packets_are_smaller_than_zstd_makes_the_same_numbers(
    model: Any, profile: CacheGen, level: str
) -> None:
    keys, values = states(model, 400)
    data = encode_chunk(profile, keys, values, 0, level)
    numbers = np.concatenate([one[0] for one in numbers_of(profile.profile, data)])
    assert np.abs(numbers).max() < 128
    zstd = pa.Codec("zstd", compression_level=19)
    assert len(data) < len(zstd.compress(numbers.astype(np.int8).tobytes()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_comes_back(model: Any, profile: CacheGen, dtype: torch.dtype) -> None:
    keys, values = (one.to(dtype) for one in states(model))
    data = encode_chunk(profile, keys, values, 0, "0")
    found = decode_chunk(profile, data, expected(data))
    assert found[0].dtype == found[1].dtype == dtype


def test_numbers_far_beyond_the_tables_come_back(model: Any, profile: CacheGen) -> None:
    keys, values = states(model)
    keys[1, 0, 3] *= 1000
    values[2] += 50
    data = encode_chunk(profile, keys, values, 0, "0")
    found = decode_chunk(profile, data, expected(data))
    most = float(profile.profile.steps.max()) * profile.levels[0]
    for one, other in zip(found, (keys, values), strict=True):
        assert float((one - other).abs().max()) < most + 1e-3


# -- damage --------------------------------------------------------------------------------


def test_every_changed_bit_is_noticed(model: Any, profile: CacheGen) -> None:
    data = encode_chunk(profile, *states(model), 0, "3")
    info = expected(data, level="3")
    places = {*range(HEADER.itemsize + 8), *range(50, len(data), 97), len(data) - 1}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(FewbitsError):
            decode_chunk(profile, bytes(changed), info)
        with pytest.raises(FewbitsError):  # even where the manifest was changed, too
            unpacked(profile.profile, bytes(changed))


@pytest.mark.parametrize("length", [0, 3, 20, 40, 60, -5, -1])
def test_a_packet_that_is_cut_is_refused(model: Any, profile: CacheGen, length: int) -> None:
    data = encode_chunk(profile, *states(model), 0, "0")
    with pytest.raises(FewbitsError):
        decode_chunk(profile, data[:length], expected(data))
    with pytest.raises(FewbitsError):
        decode_chunk(profile, data[:length], expected(data[:length]))


def test_a_packet_of_another_chunk_is_refused(model: Any, profile: CacheGen) -> None:
    data = encode_chunk(profile, *states(model), 0, "0")
    with pytest.raises(FewbitsError, match="other tokens"):
        decode_chunk(profile, data, expected(data, first=40))
    with pytest.raises(FewbitsError, match="does not know"):
        decode_chunk(profile, data, expected(data, level="2"))


def test_a_packet_of_another_profile_is_refused(model: Any, profile: CacheGen) -> None:
    other = CacheGen(chunk=40).fit(model, tokens(rows=2, count=40, seed=3))
    data = encode_chunk(profile, *states(model), 0, "0")
    with pytest.raises(FewbitsError, match="another profile"):
        decode_chunk(other, data, expected(data))


def test_states_that_cannot_be_coded_are_refused(model: Any, profile: CacheGen) -> None:
    keys, values = states(model)
    bad = keys.clone()
    bad[0, 0, 0, 0] = torch.nan
    cases: list[tuple[Any, Any, str, str]] = [
        (bad, values, "0", "NaN"),
        (keys, values * 1e30, "0", "far beyond"),
        (keys[:2], values[:2], "0", "must be"),
        (keys, values[:, :, :-1], "0", "must be"),
        (keys[0], values[0], "0", "must be"),
        (keys[:, :, :0], values[:, :, :0], "0", "has from 1"),
        (keys.double(), values.double(), "0", "float64"),
        (keys, values, "9", "no level '9'; choose one of 0, 1"),
    ]
    for k, v, level, says in cases:
        with pytest.raises(FewbitsError, match=says):
            encode_chunk(profile, k, v, 0, level)


def test_scales_that_are_no_numbers_are_refused(model: Any) -> None:
    """Where somebody made the checksum fit."""
    fitted = CacheGen(chunk=40, predictor="anchor").fit(model, tokens(rows=2, count=40))
    data = bytearray(encode_chunk(fitted, *states(model), 0, "0"))
    count = int(np.frombuffer(data, HEADER, 1)[0]["sections"])
    place = HEADER.itemsize + 4 * count
    data[place : place + 4] = np.array([np.nan], "<f4").tobytes()
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    with pytest.raises(FewbitsError, match="scale of an anchor"):
        decode_chunk(fitted, bytes(data), expected(bytes(data)))


def test_anchors_refuse_infinity(model: Any) -> None:
    fitted = CacheGen(chunk=40, predictor="anchor").fit(model, tokens(rows=2, count=40))
    assert (fitted.profile.predictors == ANCHOR).all()
    keys, values = states(model)
    keys[0, 0, 0, 0] = torch.inf
    with pytest.raises(FewbitsError, match="infinity"):
        encode_chunk(fitted, keys, values, 0, "0")


# -- the profile's file --------------------------------------------------------------------


def test_a_profile_comes_back(profile: CacheGen, model: Any, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.bin")
    found = CacheGen.load(tmp_path / "p.bin")
    keys, values = states(model)
    data = encode_chunk(profile, keys, values, 0, "1")
    assert encode_chunk(found, keys, values, 0, "1") == data
    decode_chunk(found, data, expected(data, level="1"))
    assert found.levels == profile.levels
    assert found.profile.digest == profile.profile.digest
    assert profile.artefact_bytes == (tmp_path / "p.bin").stat().st_size
    found.check_model(model)


def test_a_profile_is_not_overwritten(profile: CacheGen, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.bin")
    with pytest.raises(FewbitsError, match="exists"):
        profile.save(tmp_path / "p.bin")
    profile.save(tmp_path / "p.bin", overwrite=True)


def test_a_changed_profile_is_refused(profile: CacheGen) -> None:
    """Every array is under the digest."""
    data = profile.to_bytes()
    refused = 0
    for place in range(len(data) - 1, 2000, -len(data) // 25):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(FewbitsError):
            CacheGen.from_bytes(bytes(changed))
        refused += 1
    assert refused > 10
    with pytest.raises(FewbitsError, match="some profile"):
        CacheGen.from_bytes(data[:-10], "some profile")


def test_settings_that_do_not_fit_the_arrays_are_refused(profile: CacheGen) -> None:
    from fewbits.kv._cachegen_tables import profile_of, settings_of, tensors_of

    learned = profile.profile
    tensors = tensors_of(learned)
    good = settings_of(learned)
    assert profile_of(tensors, good, "it").digest == learned.digest
    bad: list[dict[str, Any]] = [
        {"heads": 3},
        {"width": -16},
        {"levels": [1.0]},
        {"levels": "abc"},
        {"reaches": [1]},
        {"reaches": [0] * 5},
        {"reaches": [10**6] * 5},
        {"group": 1000},
        {"digest": "0" * 16},
        {"heads": "2"},
    ]
    for change in bad:
        with pytest.raises(FewbitsError, match="it is damaged"):
            profile_of(tensors, good | change, "it")
    for name in tensors:
        with pytest.raises(FewbitsError, match="it is damaged"):
            profile_of({key: one for key, one in tensors.items() if key != name}, good, "it")
        with pytest.raises(FewbitsError):
            profile_of(tensors | {name: torch.zeros(2, 2)}, good, "it")


def test_what_was_not_fitted_says_how(model: Any, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"CacheGen\(\)\.fit\(model, tokens\)"):
        CacheGen().save(tmp_path / "p.bin")
    with pytest.raises(FewbitsError, match="fit"):
        encode_chunk(CacheGen(), *states(model), 0, "0")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": ()}, "levels"),
        ({"levels": (2.0, 1.0)}, "rising"),
        ({"levels": (0.0, 1.0)}, "above 0"),
        ({"levels": ("a",)}, "levels"),
        ({"chunk": 0}, "chunk"),
        ({"group": 1}, "group"),
        ({"group": 256}, "group"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitsError, match=says):
        CacheGen(**options)


def test_texts_are_needed(model: Any) -> None:
    with pytest.raises(FewbitsError, match="needs texts"):
        CacheGen().fit(model, [])
    with pytest.raises(FewbitsError, match="needs texts"):
        CacheGen().fit(model, torch.zeros(0, 5, dtype=torch.long))


def test_models_with_sliding_windows_are_refused() -> None:
    with pytest.raises(FewbitsError, match="sliding window"):
        CacheGen().fit(tiny_model("gemma2"), tokens(rows=1, count=40))


# -- saved caches --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_once(
    model: Any, profile: CacheGen, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    ids, place = tokens(rows=1, count=192, seed=1), tmp_path_factory.mktemp("saved") / "c"
    save(live(model, ids), place, profile, ids[0])
    return place, ids


@pytest.fixture
def saved(saved_once: tuple[Path, torch.Tensor], tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder of the test's own, and the tokens that were saved there."""
    place, ids = saved_once
    shutil.copytree(place, tmp_path / "c")
    return tmp_path / "c", ids


@torch.no_grad()
def continued(model: Any, cache: Any, ids: torch.Tensor, mask: Any = None, count: int = 32) -> Any:
    """The `count` tokens that follow."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("method", [None, "full"])
def test_a_loaded_cache_goes_on_as_the_live_one(
    model: Any, saved: tuple[Path, torch.Tensor], method: str | None
) -> None:
    place, ids = saved
    into = None if method is None else fewbits.kv.cache(model, method)
    cache = read_local(place, model, into=into)
    assert cache.get_seq_length() == 192
    more = torch.cat([ids, tokens(rows=1, count=3, seed=9)], dim=1)
    assert torch.equal(continued(model, cache, more), continued(model, live(model, ids), more))
    assert cache.get_seq_length() == 192 + 3 + 31


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma"])
def test_other_families_go_on_as_well(family: str, tmp_path: Path) -> None:
    other = tiny_model(family, initializer_range=0.1)
    fitted = CacheGen(levels=(0.01, 1), chunk=50).fit(other, tokens(rows=3, count=64, seed=4))
    ids = tokens(rows=1, count=64)
    save(live(other, ids), tmp_path / "c", fitted, ids[0])
    more = torch.cat([ids, tokens(rows=1, count=1, seed=9)], dim=1)
    found = continued(other, read_local(tmp_path / "c", other), more, count=8)
    assert torch.equal(found, continued(other, live(other, ids), more, count=8))


def test_rows_of_different_length_are_saved_and_go_on(model: Any, tmp_path: Path) -> None:
    profile = CacheGen(levels=(0.01, 1), chunk=40).fit(model, tokens(rows=3, count=64, seed=4))
    ids, mask = tokens(rows=2, count=96), torch.ones(2, 96, dtype=torch.long)
    mask[0, :33] = 0
    cache = live(model, ids, mask)
    places = [tmp_path / "a", tmp_path / "b"]
    lengths = [63, 96]
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        manifest = save(cache, place, profile, ids[row, -length:], row=row)
        assert manifest.tokens == length
    new = tokens(rows=2, count=2, seed=5)
    more, whole = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    expected_tokens = continued(model, live(model, ids, mask), more, whole)
    for into in (None, fewbits.kv.cache(model, "full")):
        loaded, found = read_batch(places, model, into=into)
        assert torch.equal(found, mask)
        assert loaded.get_seq_length() == 96
        assert torch.equal(continued(model, loaded, more, whole), expected_tokens)


def test_a_cache_of_transformers_is_saved_alike(
    model: Any, saved: tuple[Path, torch.Tensor], profile: CacheGen, tmp_path: Path
) -> None:
    from transformers import DynamicCache

    place, ids = saved
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    save(cache, tmp_path / "d", profile, ids[0])
    for name in ("level-0.bin", "level-4.bin", "text.bin"):
        assert (tmp_path / "d" / name).read_bytes() == (place / name).read_bytes()


def test_a_loaded_cache_may_be_compressed(model: Any, saved: tuple[Path, torch.Tensor]) -> None:
    place, ids = saved
    kept = read_local(place, model, into=fewbits.kv.cache(model, "kivi:bits=4,group=16,recent=16"))
    usual = fewbits.kv.cache(model, "kivi:bits=4,group=16,recent=16")
    with torch.no_grad():
        model(ids, past_key_values=usual)
    assert kept.get_seq_length() == 192
    assert kept.nbytes() == usual.nbytes()
    with pytest.raises(FewbitsError, match="think must see the prompt"):
        read_local(place, model, into=fewbits.kv.cache(model, "think"))
    with pytest.raises(FewbitsError, match="into has tokens already"):
        read_local(place, model, into=kept)
    with pytest.raises(FewbitsError, match="into must be"):
        read_local(place, model, into={})


def test_bytes_of_a_filled_cache_are_those_of_its_tokens(
    model: Any, saved: tuple[Path, torch.Tensor]
) -> None:
    cache = read_local(saved[0], model, into=fewbits.kv.cache(model, "full"))
    assert cache.nbytes() == 3 * 2 * 2 * 192 * 16 * 4


def test_the_folder_is_what_its_manifest_says(
    saved: tuple[Path, torch.Tensor], profile: CacheGen
) -> None:
    place, ids = saved
    manifest = Manifest.from_json((place / "cache.json").read_text())
    assert [chunk.tokens for chunk in manifest.chunks] == [40, 40, 40, 40, 32]
    for level in manifest.levels:
        assert (place / f"level-{level}.bin").stat().st_size == manifest.level_bytes(level)
    assert np.array_equal(read_text((place / "text.bin").read_bytes(), manifest), ids[0])
    tables = CacheGen.from_bytes((place / "tables.bin").read_bytes())
    assert tables.profile.digest == profile.profile.digest
    assert manifest.levels == {"0": 0.125, "1": 0.5, "2": 1.0, "3": 2.0, "4": 4.0}
    assert sorted(path.name for path in place.parent.iterdir()) == ["c"]


def test_caches_may_share_a_profile(model: Any, profile: CacheGen, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.bin")
    ids = tokens(rows=1, count=50)
    manifest = save(live(model, ids), tmp_path / "c", profile, ids[0], tables="../p.bin")
    assert manifest.tables == "../p.bin"
    assert not (tmp_path / "c" / "tables.bin").exists()
    assert read_local(tmp_path / "c", model).get_seq_length() == 50
    other = CacheGen(chunk=40).fit(model, tokens(rows=2, count=40, seed=3))
    with pytest.raises(FewbitsError, match="another profile"):
        save(live(model, ids), tmp_path / "d", other, ids[0], tables="../p.bin")
    assert not (tmp_path / "d").exists()
    other.save(tmp_path / "p.bin", overwrite=True)
    with pytest.raises(FewbitsError, match="not the profile"):
        read_local(tmp_path / "c", model)


def test_a_url_is_a_place_too(model: Any, profile: CacheGen) -> None:
    ids = tokens(rows=1, count=50)
    place = "memory://fewbits-test/c"
    save(live(model, ids), place, profile, ids[0])
    assert read_local(place, model, level="2").get_seq_length() == 50
    with pytest.raises(FewbitsError, match="has a cache already"):
        save(live(model, ids), place, profile, ids[0])
    save(live(model, ids), place, profile, ids[0], overwrite=True)
    with pytest.raises(FewbitsError, match="cannot read"):
        read_local("memory://fewbits-test/nothing", model)


def test_a_cache_is_not_overwritten_unless_asked(
    model: Any, saved: tuple[Path, torch.Tensor], profile: CacheGen
) -> None:
    place, ids = saved
    cache = live(model, ids[:, :50])
    with pytest.raises(FewbitsError, match="exists"):
        save(cache, place, profile, ids[0, :50])
    assert read_local(place, model).get_seq_length() == 192
    save(cache, place, profile, ids[0, :50], overwrite=True)
    assert read_local(place, model).get_seq_length() == 50
    (place.parent / "other").mkdir()
    with pytest.raises(FewbitsError, match="no saved cache"):
        save(cache, place.parent / "other", profile, ids[0, :50], overwrite=True)


def test_nothing_is_left_of_what_fails(model: Any, profile: CacheGen, tmp_path: Path) -> None:
    ids = tokens(rows=1, count=50)
    cache = live(model, ids)
    cache.compressed[1].recent.keys.numbers[0, 0, 45] = torch.nan
    with pytest.raises(FewbitsError, match="NaN"):
        save(cache, tmp_path / "c", profile, ids[0])
    assert list(tmp_path.iterdir()) == []


def test_tokens_must_be_those_of_the_cache(model: Any, profile: CacheGen, tmp_path: Path) -> None:
    ids = tokens(rows=1, count=50)
    cache = live(model, ids)
    place = tmp_path / "c"
    with pytest.raises(FewbitsError, match="50 tokens of row 0, but 49"):
        save(cache, place, profile, ids[0, :49])
    with pytest.raises(FewbitsError, match="no row 3"):
        save(cache, place, profile, ids[0], row=3)
    with pytest.raises(FewbitsError, match="whole number"):
        save(cache, place, profile, -ids[0])
    with pytest.raises(FewbitsError, match="nothing in this cache"):
        save(object(), place, profile, ids[0])
    small = fewbits.kv.cache(model, "window:keep=0.5")
    with torch.no_grad():
        model(ids, past_key_values=small)
    with pytest.raises(FewbitsError, match="holds 25 of 50 tokens"):
        save(small, place, profile, ids[0])


def test_the_cache_of_another_model_is_refused(saved: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(FewbitsError, match="cache of another model"):
        read_local(saved[0], tiny_model(num_hidden_layers=2))
    with pytest.raises(FewbitsError, match="made in float32"):
        read_local(saved[0], tiny_model(initializer_range=0.1).half())
    with pytest.raises(FewbitsError, match="no level '7'"):
        read_local(saved[0], tiny_model(initializer_range=0.1), level="7")


@pytest.mark.parametrize("name", ["level-0.bin", "tables.bin", "cache.json"])
def test_damaged_folders_are_refused(
    model: Any, saved: tuple[Path, torch.Tensor], name: str
) -> None:
    path = saved[0] / name
    data = path.read_bytes()
    for changed in (data[:-9], data[: len(data) // 2], b"", data[:2000] + b"~" + data[2001:]):
        path.write_bytes(changed)
        with pytest.raises(FewbitsError):
            read_local(saved[0], model)
    path.unlink()
    with pytest.raises(FewbitsError, match="cannot read"):
        read_local(saved[0], model)


def test_a_changed_text_is_refused(saved: tuple[Path, torch.Tensor]) -> None:
    manifest = Manifest.from_json((saved[0] / "cache.json").read_bytes())
    data = (saved[0] / "text.bin").read_bytes()
    for changed in (data[:-4], b"\1" + data[1:], data + b"\0\0\0\0"):
        with pytest.raises(FewbitsError, match="does not match the manifest"):
            read_text(changed, manifest)


# -- the manifest --------------------------------------------------------------------------


def test_a_manifest_comes_back(saved: tuple[Path, torch.Tensor]) -> None:
    text = (saved[0] / "cache.json").read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": "1"},
        {"version": 0},
        {"dtype": "int8"},
        {"layers": 0},
        {"layers": True},
        {"heads": 2.5},
        {"tokens": 191},
        {"tokens": 10**12},
        {"chunk": 41},
        {"chunk": 10**6},
        {"levels": {}},
        {"levels": {"0": 2, "1": 1}},
        {"levels": {"x": 1}},
        {"levels": 3},
        {"text": "/etc/passwd"},
        {"text": "../../x"},
        {"tables": "a/b"},
        {"tables": "http://x"},
        {"text_sha256": "0"},
        {"tables_sha256": 7},
        {"model": "x"},
        {"model": {"a": [1]}},
        {"chunks": []},
        {"chunks": None},
        {"chunks": [{}]},
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    saved: tuple[Path, torch.Tensor], change: dict[str, Any]
) -> None:
    about = json.loads((saved[0] / "cache.json").read_text()) | change
    with pytest.raises(FewbitsError):
        Manifest.from_json(json.dumps(about))


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", -1), ("offset", 5), ("bytes", 0), ("bytes", "9"), ("sha256", "zz")],
)
def test_pieces_that_cannot_be_are_refused(
    saved: tuple[Path, torch.Tensor], field: str, value: Any
) -> None:
    about = json.loads((saved[0] / "cache.json").read_text())
    about["chunks"][1]["levels"]["2"][field] = value
    with pytest.raises(FewbitsError, match="damaged"):
        Manifest.from_json(json.dumps(about))


def test_what_is_no_manifest_is_refused() -> None:
    for text in ("", "[]", "{", "{}", '{"a": 1, "a": 2}', "[" * 100_000, b"\xff\xfe"):
        with pytest.raises(FewbitsError, match=r"cache\.json"):
            Manifest.from_json(text)


def test_a_newer_version_says_to_upgrade(saved: tuple[Path, torch.Tensor]) -> None:
    about = json.loads((saved[0] / "cache.json").read_text()) | {"version": 2}
    with pytest.raises(FewbitsError, match="upgrade fewbits"):
        Manifest.from_json(json.dumps(about))


def test_filled_takes_plain_tensors(model: Any) -> None:
    keys, values = states(model)
    cache = filled(model, keys[:, None], values[:, None])
    assert cache.get_seq_length() == 40
    assert torch.equal(cache.layers[2].keys[0], keys[2])


def test_the_digest_covers_every_part(profile: CacheGen) -> None:
    from fewbits.kv._cachegen_codec import digest_of

    learned = profile.profile
    assert digest_of(learned) == learned.digest
    for name in ("steps", "means", "predictors", "contexts", "frequencies"):
        changed = getattr(learned, name).copy()
        changed.reshape(-1)[0] += 1
        assert digest_of(dataclasses.replace(learned, **{name: changed})) != learned.digest
    assert rule(learned, 0, 0, 2)[2] == pytest.approx(float(learned.steps[0, 0]))
