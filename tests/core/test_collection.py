"""Encoded collections: opened from a file or a directory, decoded, searched and saved."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewbits
from fewbits.core import collection as collection_module
from fewbits.core import container
from fewbits.core.codec import Codec
from fewbits.core.collection import Encoded
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged, chamfer

ROWS, DIMS = 60, 8
SPLITS = (25, 28)
"""The shards have 25, 3 and 32 rows."""


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Rows of very different lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.2, 5, (ROWS, 1))
    return (rng.standard_normal((ROWS, DIMS)) * lengths).astype(np.float32)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, DIMS)).astype(np.float32)


@pytest.fixture(scope="module")
def codec(x: np.ndarray) -> Codec:
    return fewbits.from_spec("pca-rag:dims=5+int8").fit(x)


@pytest.fixture(scope="module")
def shards(x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "shards"
    folder.mkdir()
    for name, part in zip("abc", np.split(x, SPLITS), strict=True):
        np.save(folder / f"{name}.npy", part)
    return folder


@pytest.fixture
def folder(shards: Path, codec: Codec, tmp_path: Path) -> Path:
    """A directory of three parts, which a test may damage."""
    fewbits.encode(shards, tmp_path / "codes", method=codec, metric="ip")
    return tmp_path / "codes"


@pytest.fixture
def file(x: np.ndarray, codec: Codec, tmp_path: Path) -> Path:
    fewbits.encode(x, tmp_path / "codes.fewbits", method=codec, metric="ip")
    return tmp_path / "codes.fewbits"


def in_parts(x: np.ndarray, codec: Codec, metric: str) -> Encoded:
    """The same rows encoded in memory, in three parts."""
    whole = fewbits.encode(x, method=codec, metric=metric)
    (code,) = whole.parts
    slices = (slice(0, SPLITS[0]), slice(*SPLITS), slice(SPLITS[1], ROWS))
    return Encoded(codec, [code.take(part) for part in slices], metric, whole.source)


def brute_force(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """(q, n) scores in float64."""
    queries, vectors = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return -np.square(queries[:, None] - vectors[None]).sum(axis=2)
    return queries @ vectors.T


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def refusal(path: Path) -> str:
    """What is said about a bad collection, in one line."""
    with pytest.raises(FewbitsError) as caught:
        fewbits.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- opening -------------------------------------------------------------------------------


def test_file_and_directory_hold_the_same(
    file: Path, folder: Path, x: np.ndarray, codec: Codec
) -> None:
    whole, parts = fewbits.load(file), fewbits.load(folder)
    assert [len(part) for part in parts.parts] == [25, 3, 32]
    for encoded in (whole, parts):
        assert len(encoded) == ROWS
        assert (encoded.codec.digest, encoded.metric) == (codec.digest, "ip")
        assert (encoded.nbytes, encoded.bytes_per_item) == (ROWS * 5, 5)
        assert encoded.codec_bytes == codec.codec_bytes
        assert encoded.ratio == 4 * DIMS / 5
        assert (encoded.source["rows"], encoded.source["dims"]) == (ROWS, DIMS)
        assert repr(encoded) == "<60 items, 5 bytes each, by pca-rag:dims=5+int8>"
        assert np.array_equal(encoded.decode(), codec.decode(codec.encode(x)))
    assert (whole.source["name"], parts.source["name"]) == ("the input", "shards")


def test_codes_are_mapped_from_the_file(file: Path) -> None:
    (code,) = fewbits.load(file).parts
    assert isinstance(code["codes"], np.memmap)
    assert not code["codes"].flags.writeable


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing") == f"there is no file {tmp_path / 'missing'}"
    assert "is not an encoded collection: it has no codec.fewbits" in refusal(tmp_path)
    assert "cannot read" in refusal(tmp_path / ("n" * 300))


def test_files_that_hold_no_collection_are_refused(folder: Path, codec: Codec) -> None:
    alone = codec.save(folder.with_name("codec.fewbits"))
    assert refusal(alone).endswith("is a codec file, not an encoded collection; it holds no items")
    assert refusal(folder / "part-00001.fewbits").endswith("open its directory instead")
    shutil.copy(alone, folder / "codec.fewbits")
    assert "is damaged: it does not say what it holds" in refusal(folder)


def test_missing_parts_are_counted(folder: Path) -> None:
    for number in (2, 0):
        (folder / f"part-0000{number}.fewbits").unlink()
    assert "is not finished: 2 of 3 parts are missing; run the same encode com" in refusal(folder)
    (folder / "codec.fewbits").unlink()
    assert "has no codec.fewbits" in refusal(folder)


def test_damaged_part_is_named(folder: Path) -> None:
    part = folder / "part-00001.fewbits"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert "part-00001.fewbits is cut short" in refusal(folder)
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "part-00001.fewbits is damaged: array 'code.codes'" in refusal(folder)


def test_foreign_parts_are_refused(folder: Path, file: Path, shards: Path, codec: Codec) -> None:
    part = folder / "part-00001.fewbits"
    other = folder.with_name("other")
    foreign = {
        "of another number": folder / "part-00000.fewbits",
        "no part": file,
        "a codec": folder / "codec.fewbits",
    }
    fewbits.encode(shards, other, method="sign", metric="ip")
    foreign["of another codec"] = other / part.name
    renamed = folder.with_name("renamed")
    renamed.mkdir()
    for name in "abc":
        shutil.copy(shards / f"{name}.npy", renamed / f"{name}{name}.npy")
    fewbits.encode(renamed, folder.with_name("more"), method=codec, metric="ip")
    foreign["of another shard"] = folder.with_name("more") / part.name
    for path in foreign.values():
        shutil.copy(path, folder.with_name("copy"))
        part.unlink()
        folder.with_name("copy").rename(part)
        assert refusal(folder) == f"{part} does not belong to the codec beside it"


def test_part_with_other_rows_is_refused(
    folder: Path, shards: Path, x: np.ndarray, codec: Codec
) -> None:
    longer = folder.with_name("longer")
    shutil.copytree(shards, longer)
    np.save(longer / "b.npy", x[:10])
    fewbits.encode(longer, folder.with_name("other"), method=codec, metric="ip")
    shutil.copy(folder.with_name("other") / "part-00001.fewbits", folder)
    assert "is damaged: it does not hold the items that it says it holds" in refusal(folder)


def rewritten(
    path: Path, kind: str, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> str:
    """Change a collection file, with all digests right, and say how it is refused."""
    content = container.read(path)
    about, arrays = json.loads(json.dumps(content.about)), dict(content.arrays)
    change(about, arrays)
    container.write(path, kind, about, arrays, overwrite=True)
    return refusal(path.parent if path.name == "codec.fewbits" else path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about, arrays: about.pop("metric"), "does not say what it holds"),
        (lambda about, arrays: about.update(metric="dot"), "does not say what it holds"),
        (lambda about, arrays: about.update(metric=[]), "does not say what it holds"),
        (lambda about, arrays: about.pop("source"), "does not say what it holds"),
        (lambda about, arrays: about.update(source="x"), "does not say what it holds"),
        (lambda about, arrays: about["source"].pop("bytes_per_item"), "does not say what it holds"),
        (lambda about, arrays: about.pop("codec"), "does not hold a usable codec"),
        (lambda about, arrays: arrays.pop("code.codes"), "holds no code"),
        (lambda about, arrays: arrays.update({"code.codes": np.zeros((0, 5), "u1")}), "no code"),
        (lambda about, arrays: arrays.update({"code.codes": np.zeros((), "u1")}), "no code"),
        (lambda about, arrays: arrays.update({"code.codes": np.zeros((60, 6), "u1")}), "not fit"),
        (lambda about, arrays: arrays.update({"code.codes": np.zeros((60, 5), "i1")}), "not fit"),
        (
            lambda about, arrays: arrays.update({"code.codes": np.zeros((60, 1, 5), "u1")}),
            "not fit",
        ),
        (lambda about, arrays: arrays.update({"code.more": np.zeros((60, 5), "u1")}), "not fit"),
        (lambda about, arrays: arrays.update({"code.more": np.zeros((59, 5), "u1")}), "equally"),
        (lambda about, arrays: arrays.update({"code.codes": np.zeros((59, 5), "u1")}), "the items"),
    ],
)
def test_files_that_do_not_say_what_they_hold_are_refused(
    file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], says: str
) -> None:
    assert says in rewritten(file, "encoded", change)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "does not hold the items"),
        (None, "does not say what it holds"),
        (3, "does not say what it holds"),
        (["a.npy", "b.npy"], "does not hold the items"),
        (["a.npy", "b.npy", "c.npy", "d.npy"], "1 of 4 parts are missing"),
        (["a.npy", "c.npy", "b.npy"], "does not belong to the codec beside it"),
    ],
)
def test_directory_with_other_parts_than_it_says_is_refused(
    folder: Path, parts: Any, says: str
) -> None:
    path = folder / "codec.fewbits"
    assert says in rewritten(path, "codec", lambda about, arrays: about.update(parts=parts))


def test_directory_of_nothing_is_refused(folder: Path) -> None:
    def empty(about: dict[str, Any], arrays: dict[str, Any]) -> None:
        about["parts"] = []
        about["source"]["rows"] = 0

    says = rewritten(folder / "codec.fewbits", "codec", empty)
    assert "does not hold the items that it says it holds" in says


# -- decoding ------------------------------------------------------------------------------


def test_rows_are_decoded_in_the_order_asked_for(folder: Path) -> None:
    encoded = fewbits.load(folder)
    everything = encoded.decode()
    rows = np.array([59, 0, 24, 25, 27, 28, 27, 0])
    assert np.array_equal(encoded.decode(rows), everything[rows])
    assert np.array_equal(encoded.decode(np.arange(ROWS, dtype=np.uint8)), everything)
    assert np.array_equal(encoded.decode(rows.tolist()), everything[rows])
    assert encoded.decode([]).shape == (0, DIMS)


@pytest.mark.parametrize(
    "rows", [[-1], [ROWS], [0, 2**40], [0.5], [True] * ROWS, 3, [[0, 1]], ["0"], [None]]
)
def test_rows_that_are_not_there_are_refused(folder: Path, rows: Any) -> None:
    with pytest.raises(FewbitsError, match="row numbers must be"):
        fewbits.load(folder).decode(rows)


def test_blocks_are_small_and_together_everything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = fewbits.load(folder)
    everything = encoded.decode()
    monkeypatch.setattr(collection_module, "BLOCK_BYTES", 10 * 4 * DIMS)
    blocks = list(encoded.blocks())
    assert [len(block) for block in blocks] == [10, 10, 5, 3, 10, 10, 10, 2]
    assert np.array_equal(np.concatenate(blocks), everything)


def test_decoded_file_is_a_plain_npy(folder: Path, tmp_path: Path) -> None:
    encoded = fewbits.load(folder)
    path = tmp_path / "new" / "decoded.npy"
    assert encoded.decode_to(path) == path
    loaded = np.load(path)
    assert (loaded.dtype, loaded.flags.c_contiguous) == (np.float32, True)
    assert np.array_equal(loaded, encoded.decode())
    with pytest.raises(FewbitsError, match=r"decoded\.npy exists already; choose another name or"):
        encoded.decode_to(path)
    assert encoded.decode_to(path, overwrite=True) == path
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["decoded.txt", "decoded", "decoded.npy.gz", "decoded.fewbits"])
def test_only_npy_files_are_written(file: Path, name: str) -> None:
    before = sorted(file.parent.iterdir())
    with pytest.raises(FewbitsError, match=r"writes \.npy files; name the output decoded"):
        fewbits.load(file).decode_to(file.with_name(name))
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_the_old_npy(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "output" / "decoded.npy"
    if existing:
        path.parent.mkdir()
        path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FewbitsError, match=r"disk is full while writing .*decoded\.npy; free some"):
        fewbits.load(file).decode_to(path, overwrite=True)
    assert (path.parent.exists(), path.exists()) == (existing, existing)
    if existing:
        assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("decoded.npy", "old")]


def test_interrupted_decoding_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = fewbits.load(file)

    def interrupted(code: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoded.codec, "decode", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        encoded.decode_to(tmp_path / "decoded.npy")
    assert sorted(tmp_path.iterdir()) == before


# -- searching -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("k", [1, 10, ROWS])
def test_search_across_parts_is_that_of_the_whole(
    x: np.ndarray, queries: np.ndarray, codec: Codec, metric: str, k: int
) -> None:
    whole, parts = fewbits.encode(x, method=codec, metric=metric), in_parts(x, codec, metric)
    scores, rows = whole.search(queries, k)
    found_scores, found_rows = parts.search(queries, k)
    assert (rows.shape, rows.dtype, scores.dtype) == ((5, k), np.int64, np.float32)
    assert np.array_equal(found_rows, rows)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=1e-5)
    # And it is exact among the decoded vectors.
    asked = unit(queries) if metric == "cosine" else queries
    true = brute_force(asked, whole.decode(), metric)
    assert np.array_equal(rows, np.argsort(-true, axis=1)[:, :k])


def test_search_of_files_is_that_of_memory(
    file: Path, folder: Path, x: np.ndarray, queries: np.ndarray, codec: Codec
) -> None:
    scores, rows = fewbits.encode(x, method=codec, metric="ip").search(queries, 10)
    np.save(file.with_name("queries.npy"), queries)
    for path in (file, folder):
        encoded = fewbits.load(path)
        for asked in (queries, queries.tolist(), file.with_name("queries.npy")):
            found = encoded.search(asked)
            assert np.array_equal(found[1], rows)
            np.testing.assert_allclose(found[0], scores, rtol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("k", [1, 6, ROWS])
def test_rescoring_with_originals_gives_the_exact_order(
    x: np.ndarray, queries: np.ndarray, codec: Codec, tmp_path: Path, metric: str, k: int
) -> None:
    np.save(tmp_path / "originals.npy", x)
    originals, asked = (unit(x), unit(queries)) if metric == "cosine" else (x, queries)
    true = brute_force(asked, originals, metric)
    for encoded in (fewbits.encode(x, method=codec, metric=metric), in_parts(x, codec, metric)):
        # Ten times as many candidates are looked at: with 6, that is all 60 rows.
        _, candidates = encoded.search(queries, min(ROWS, 10 * k))
        for given in (x, tmp_path / "originals.npy"):
            scores, rows = encoded.search(queries, k, rescored=given)
            assert (rows.shape, scores.dtype) == ((5, k), np.float32)
            for number, candidate in enumerate(candidates):
                best = candidate[np.argsort(-true[number, candidate])][:k]
                assert rows[number].tolist() == best.tolist()
            wanted = np.take_along_axis(true, rows, axis=1)
            np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_rescoring_with_decoded_vectors_gives_their_exact_order(
    x: np.ndarray, queries: np.ndarray, metric: str
) -> None:
    # Its scan quantises queries as well, so that its own scores are not exact.
    rough = fewbits.from_spec("rabitq:bits=1").fit(x)
    encoded = in_parts(x, rough, metric)
    asked = unit(queries) if metric == "cosine" else queries
    true = brute_force(asked, encoded.decode(), metric)
    scores, rows = encoded.search(queries, 6, rescored=True)
    assert np.array_equal(rows, np.argsort(-true, axis=1, kind="stable")[:, :6])
    wanted = np.take_along_axis(true, rows, axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescored", [False, True])
@pytest.mark.parametrize("k", [0, -3, ROWS + 1, 2.0, True, None])
def test_impossible_numbers_of_matches_are_refused(
    folder: Path, queries: np.ndarray, k: Any, rescored: bool
) -> None:
    with pytest.raises(FewbitsError, match=r"k must be|k is 61, but the collection has"):
        fewbits.load(folder).search(queries, k, rescored=rescored)


def test_unfit_queries_are_refused(folder: Path, queries: np.ndarray) -> None:
    encoded = fewbits.load(folder)
    bad = {
        "the queries are vectors of 5 dimensions, but this collection": queries[:, :5],
        "the queries are sets of 8 dimensions": Ragged(queries, np.array([0, 2, 5])),
        "row 2 of the input has NaN": np.where(np.arange(5)[:, None] == 2, np.nan, queries),
        "the input is empty": queries[:0],
        "with 2 axes": queries[0],
        "there is no file": folder / "missing.npy",
    }
    for says, asked in bad.items():
        with pytest.raises(FewbitsError, match=says):
            encoded.search(asked, 3)


def test_query_without_direction_has_no_cosine(
    x: np.ndarray, queries: np.ndarray, codec: Codec
) -> None:
    zeros = np.zeros_like(queries)
    with pytest.raises(FewbitsError, match="row 0 of the input is all zeros and has no cosine"):
        fewbits.encode(x, method=codec).search(zeros, 3)
    scores, _ = fewbits.encode(x, method=codec, metric="ip").search(zeros, 3)
    assert np.isfinite(scores).all()


def test_unfit_originals_are_refused(folder: Path, x: np.ndarray, queries: np.ndarray) -> None:
    encoded = fewbits.load(folder)
    says = "has .* vectors, but the collection was made from 60 × 8"
    for originals in (x[1:], x[:, :5], np.concatenate([x, x])):
        with pytest.raises(FewbitsError, match=says):
            encoded.search(queries, 3, rescored=originals)
    with pytest.raises(FewbitsError, match="has sets; give the vectors encoded"):
        encoded.search(queries, 3, rescored=Ragged(x, np.arange(ROWS + 1)))
    with pytest.raises(FewbitsError, match="there is no file"):
        encoded.search(queries, 3, rescored=folder / "missing.npy")


def test_sets_are_rescored_by_their_chamfer_score(x: np.ndarray, tmp_path: Path) -> None:
    sets = Ragged(x, np.arange(0, ROWS + 1, 3))
    np.savez(tmp_path / "sets.npz", vectors=sets.flat, offsets=sets.offsets)
    method = "muvera:repetitions=1,bits=0,projection_dims=1"  # so coarse that its order is poor
    encoded = fewbits.encode(sets, method=method, metric="ip")
    exact = chamfer(sets, sets)
    best = np.argsort(-exact, axis=1, kind="stable")[:, :4]
    for originals in (sets, tmp_path / "sets.npz"):
        scores, rows = encoded.search(sets, 4, rescored=originals)
        assert rows.tolist() == best.tolist()
        np.testing.assert_allclose(scores, np.take_along_axis(exact, best, 1), rtol=1e-5)
    with pytest.raises(FewbitsError, match="has vectors; give the sets encoded"):
        encoded.search(sets, 1, rescored=x)
    with pytest.raises(FewbitsError, match="has 19 × 8 sets, but the collection was made from 20"):
        encoded.search(sets, 1, rescored=sets[1:])


def test_sets_are_searched_but_not_decoded(x: np.ndarray) -> None:
    sets = Ragged(x, np.arange(0, ROWS + 1, 3))
    encoded = fewbits.encode(sets, method="muvera:repetitions=3,bits=1,projection_dims=8")
    _, rows = encoded.search(sets, 1)
    assert rows.ravel().tolist() == list(range(20))
    with pytest.raises(FewbitsError, match="rescore by the original file"):
        encoded.search(sets, 1, rescored=True)
    with pytest.raises(FewbitsError, match=r"vectors of 8 dimensions, but .* from sets of 8"):
        encoded.search(x, 1)
    with pytest.raises(FewbitsError, match="muvera cannot be decoded"):
        encoded.decode()


# -- saving --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_codes_in_memory_can_be_saved(
    x: np.ndarray, queries: np.ndarray, codec: Codec, tmp_path: Path, metric: str
) -> None:
    for number, encoded in enumerate(
        (fewbits.encode(x, method=codec, metric=metric), in_parts(x, codec, metric))
    ):
        path = tmp_path / "new" / f"{number}.fewbits"
        assert encoded.save(path) == path
        loaded = fewbits.load(path)
        assert (loaded.codec.digest, loaded.metric) == (codec.digest, metric)
        assert loaded.source == encoded.source
        assert (loaded.nbytes, len(loaded.parts)) == (encoded.nbytes, 1)
        assert np.array_equal(loaded.decode(), encoded.decode())
        assert np.array_equal(loaded.search(queries, 9)[1], encoded.search(queries, 9)[1])
    first, second = (tmp_path / "new" / f"{number}.fewbits" for number in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_saved_codes_are_those_that_encode_writes(
    file: Path, x: np.ndarray, codec: Codec, tmp_path: Path
) -> None:
    path = fewbits.encode(x, method=codec, metric="ip").save(tmp_path / "saved.fewbits")
    assert path.read_bytes() == file.read_bytes()


def test_directory_can_become_one_file(folder: Path, tmp_path: Path) -> None:
    encoded = fewbits.load(folder)
    loaded = fewbits.load(encoded.save(tmp_path / "one.fewbits"))
    assert np.array_equal(loaded.decode(), encoded.decode())
    assert loaded.source == encoded.source


def test_saving_refuses_what_exists_and_may_replace_its_own_file(file: Path) -> None:
    encoded = fewbits.load(file)
    before = file.read_bytes()
    with pytest.raises(FewbitsError, match="exists already"):
        encoded.save(file)
    encoded.save(file, overwrite=True)
    assert file.read_bytes() == before
    assert np.array_equal(fewbits.load(file).decode(), encoded.decode())
    assert list(file.parent.iterdir()) == [file]
