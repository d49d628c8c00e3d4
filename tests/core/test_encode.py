"""``encode``: the codec it takes, the files it writes, and how unfinished work is gone on with."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.core import encode as encode_module
from fewbits.core import source as source_module
from fewbits.core.catalogue import find
from fewbits.core.checks import unit_rows as unit
from fewbits.core.codec import Codec, from_spec
from fewbits.core.collection import CODEC_FILE, Encoded, load
from fewbits.core.compare import compare
from fewbits.core.encode import encode
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged
from fewbits.vectors.baselines import Int8, Sign

ROWS, DIMS = 300, 16
SHARDS = {"a.npy": slice(0, 120), "b.npy": slice(120, 130), "c.npy": slice(130, ROWS)}

pytestmark = pytest.mark.usefixtures("few_methods")


@pytest.fixture
def x() -> np.ndarray:
    """(300, 16) float32 around six centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, DIMS))
    noise = 0.5 * rng.standard_normal((ROWS, DIMS))
    return (centres[np.arange(ROWS) % 6] + noise).astype(np.float32)


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to choose among every codec of the catalogue."""
    rows = [find(name) for name in ("float16", "int8", "sign")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: rows)


@pytest.fixture
def shards(x: np.ndarray, tmp_path: Path) -> Path:
    """A directory of three files, 120, 10 and 170 rows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, rows in SHARDS.items():
        np.save(folder / name, x[rows])
    return folder


def codes(encoded: Encoded) -> dict[str, np.ndarray]:
    """The arrays of all parts, joined."""
    names = encoded.parts[0].arrays
    return {name: np.concatenate([part[name] for part in encoded.parts]) for name in names}


def assert_same_codes(encoded: Encoded, codec: Codec, x: np.ndarray) -> None:
    """That the collection holds what the codec makes of all rows at once."""
    expected = codec.encode(x).arrays
    assert codes(encoded).keys() == expected.keys()
    for name, array in codes(encoded).items():
        np.testing.assert_array_equal(array, expected[name])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and bytes of every file in a folder."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(FewbitsError) as caught:
        encode(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is asked for ---------------------------------------------------------------------


def test_method_is_the_codec_that_is_named(x: np.ndarray) -> None:
    encoded = encode(x, method="pca-rag:dims=4+int8")
    assert encoded.codec.spec == "pca-rag:dims=4+int8"
    assert (len(encoded), encoded.bytes_per_item, encoded.ratio) == (ROWS, 4, 16)
    assert_same_codes(encoded, encoded.codec, unit(x))


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_rows_are_scaled_only_for_cosine(x: np.ndarray, metric: str) -> None:
    encoded = encode(x, method="int8", metric=metric)
    assert encoded.metric == metric
    given = unit(x) if metric == "cosine" else x
    np.testing.assert_allclose(encoded.decode(), given, atol=0.02)
    assert_same_codes(encoded, Int8().fit(given), given)


def test_fitted_codec_is_used_as_it_is(x: np.ndarray) -> None:
    codec = Int8().fit(unit(x[:50]))
    digest = codec.digest
    encoded = encode(x, method=codec)
    assert encoded.codec is codec
    assert codec.digest == digest
    assert_same_codes(encoded, codec, unit(x))


def test_unfitted_codec_is_copied(x: np.ndarray) -> None:
    codec = Int8()
    encoded = encode(x, method=codec)
    assert not hasattr(codec, "dims_")
    assert encoded.codec.digest == Int8().fit(unit(x)).digest


def test_keep_takes_the_cheapest_that_keeps_it(x: np.ndarray) -> None:
    points = compare(x).points
    assert [p.spec for p in points] == ["sign", "int8", "float16"]
    for point in points:
        recall = point.quality["recall@10"]
        for wish in (recall, recall - 0.01):
            encoded = encode(x, keep={"recall@10": wish})
            assert encoded.codec.spec == point.spec
            assert encoded.bytes_per_item == point.bytes_per_item


def test_wishes_of_keep_are_all_kept(x: np.ndarray) -> None:
    wish = {"recall@1": 0.1, "recall@10": 0.9}
    assert encode(x, keep=wish).codec.spec == "int8"
    wish = {"recall@1": 0.1, "recall@10": 1}
    says = "nothing that was compared keeps recall@1 at 0.1 and recall@10 at 1; the best is float16"
    assert says in refusal(x, keep=wish)


def test_without_a_wish_recall_is_kept_at_95_percent(x: np.ndarray) -> None:
    assert encode(x).codec.spec == encode(x, keep={"recall@10": 0.95}).codec.spec == "int8"


@pytest.mark.parametrize(
    ("wish", "spec"),
    [
        ({"at_most": 2}, "sign"),
        ({"at_most": 15.9}, "sign"),
        ({"at_most": 16}, "int8"),
        ({"ratio": 32}, "sign"),
        ({"ratio": 4.1}, "sign"),
        ({"ratio": 4}, "int8"),
    ],
)
def test_size_takes_the_best_that_fits(x: np.ndarray, wish: dict[str, float], spec: str) -> None:
    encoded = encode(x, **wish)  # type: ignore[arg-type]
    assert encoded.codec.spec == spec
    assert encoded.bytes_per_item <= wish.get("at_most", 64 / wish.get("ratio", 1))


def test_size_is_kept_in_small_collections_too(x: np.ndarray) -> None:
    encoded = encode(x[:9], at_most=16, queries=x[9:])
    assert encoded.codec.spec == compare(x[:9], x[9:]).best(16).spec
    assert encoded.bytes_per_item <= 16


def test_codec_that_outweighs_what_it_saves_is_not_taken(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rows have 128 bytes. The learned arrays of int8 and sign alone are as large.
    assert encode(x[:2], at_most=32, queries=x[2:]).codec.spec == "float16"
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: [find("int8"), find("sign")])
    assert encode(x[:2], at_most=2, queries=x[2:]).codec.spec == "sign"


def test_given_queries_decide(x: np.ndarray) -> None:
    # Queries along the first axis alone: one bit of it finds nothing of its order.
    queries = np.eye(1, DIMS, dtype=np.float32).repeat(3, axis=0)
    sign = {p.spec: p for p in compare(x, queries).points}["sign"].quality["recall@10"]
    held_out = {p.spec: p for p in compare(x).points}["sign"].quality["recall@10"]
    between = (sign + held_out) / 2
    assert sign < between < held_out
    assert encode(x, keep={"recall@10": between}).codec.spec == "sign"
    assert encode(x, keep={"recall@10": between}, queries=queries).codec.spec == "int8"


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"at_most": 1.5}, "nothing that was compared fits into 1.5 bytes; the smallest is sign"),
        ({"ratio": 64}, "nothing that was compared fits into 1 bytes; the smallest is sign with 2"),
    ],
)
def test_impossible_size_names_the_nearest(
    x: np.ndarray, tmp_path: Path, wish: dict[str, float], says: str
) -> None:
    assert says in refusal(x, tmp_path / "new" / "codes.fewbits", **wish)
    assert list(tmp_path.iterdir()) == []


def test_impossible_quality_names_the_nearest(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: [find("sign")])
    says = refusal(x, keep={"recall@10": 0.99})
    assert says.startswith("nothing that was compared keeps recall@10 at 0.99; the best is sign")
    few = x[:9]
    says = "'recall@10' was not measured; choose one of recall@1"
    assert says in refusal(few, keep={"recall@10": 0.5}, queries=x[9:])


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"method": "int8", "keep": {"recall@10": 0.9}}, "give one of method, keep, at_most"),
        ({"method": "int8", "at_most": 4}, "give one of"),
        ({"at_most": 4, "ratio": 4}, "give one of"),
        ({"keep": {"recall@10": 0.9}, "ratio": 4}, "give one of"),
        ({"at_most": 0}, "at_most must be a number above 0, not 0"),
        ({"at_most": float("nan")}, "at_most must be a number above 0, not nan"),
        ({"ratio": float("inf")}, "ratio must be a number above 0, not inf"),
        ({"ratio": -2}, "ratio must be a number above 0, not -2"),
        ({"keep": {"recall@10": 0}}, "recall@10 must be above 0 and at most 1, not 0"),
        ({"keep": {"recall@10": 95}}, "recall@10 must be above 0 and at most 1, not 95"),
        ({"keep": {"recall": 0.9}}, "'recall' cannot be kept; choose one of recall@1, recall@10"),
        ({"keep": {"ndcg@10": 0.9}}, "'ndcg@10' cannot be kept"),
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"method": "muvera"}, "muvera takes sets, but the input has vectors"),
        ({"method": "int8", "metric": "l1"}, "unknown metric 'l1'"),
        ({"method": "int8", "queries": np.ones((2, DIMS))}, "queries help to choose a method"),
        ({"method": "int8", "seed": -1}, "a seed is a whole number"),
        ({"method": "pca-rag:dims=17"}, "pca-rag: dims=17 must be between 1 and the dimensions"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(
    x: np.ndarray, tmp_path: Path, wish: dict[str, Any], says: str
) -> None:
    assert says in refusal(x, tmp_path / "codes.fewbits", **wish)
    assert list(tmp_path.iterdir()) == []


def test_codec_of_another_width_is_refused(x: np.ndarray) -> None:
    codec = Int8().fit(x[:, :8])
    says = "int8 was fitted on 8 dimensions, but the input has 16"
    assert refusal(x, method=codec) == says


def test_sets_are_encoded(x: np.ndarray, tmp_path: Path) -> None:
    sets = Ragged(x, np.arange(0, ROWS + 1, 3))
    method = "muvera:repetitions=2,bits=1,projection_dims=4"
    encoded = encode(sets, tmp_path / "codes.fewbits", method=method, metric="ip")
    assert (len(encoded), encoded.source["bytes_per_item"]) == (100, 3 * DIMS * 4)
    assert_same_codes(encoded, encoded.codec, sets)
    assert refusal(sets, method="int8") == "int8 takes vectors, but the input has sets"
    assert "choose cosine or ip" in refusal(sets, method=method, metric="l2")


def test_codec_is_learned_from_a_bounded_sample(
    x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "FIT_BYTES", 1)
    sampled, again = (encode(x, method="int8", seed=1).codec.digest for _ in range(2))
    assert sampled == again
    assert sampled != encode(x, method="int8", seed=2).codec.digest
    assert sampled != Int8().fit(unit(x)).digest


# -- files ---------------------------------------------------------------------------------


def test_file_holds_what_memory_holds(x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", x)
    in_memory = encode(x, method="int8")
    written = encode(tmp_path / "docs.npy", tmp_path / "new" / "docs.fewbits", method="int8")
    for encoded in (written, load(tmp_path / "new" / "docs.fewbits")):
        assert encoded.codec.digest == in_memory.codec.digest
        assert_same_codes(encoded, in_memory.codec, unit(x))
        assert encoded.source == {**in_memory.source, "name": "docs.npy"}
    assert encoded.source["bytes_per_item"] == 64


@pytest.mark.parametrize("spec", ["int8", "sign", "turboquant", "pca-rag:dims=4+int8"])
def test_blocks_do_not_show_in_the_codes(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    codec = from_spec(spec).fit(unit(x))
    whole = encode(x, tmp_path / "whole.fewbits", method=codec)
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 7 * 4 * DIMS)
    in_blocks = encode(x, tmp_path / "blocks.fewbits", method=codec)
    for name, array in codes(whole).items():
        np.testing.assert_array_equal(array, codes(in_blocks)[name])


def test_output_that_exists_is_replaced_only_when_told(x: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "codes.fewbits"
    encode(x, output, method="int8")
    before = contents(tmp_path)
    says = "exists already; choose another name or pass --overwrite"
    assert says in refusal(x, output, method="sign")
    assert contents(tmp_path) == before
    assert encode(x, output, method="sign", overwrite=True).codec.spec == "sign"
    assert load(output).codec.spec == "sign"
    assert [p.name for p in tmp_path.iterdir()] == ["codes.fewbits"]


def test_output_never_takes_the_place_of_the_input(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    file = tmp_path / "docs.npy"
    np.save(file, x)
    (tmp_path / "link.npy").symlink_to(file)
    alone = tmp_path / "alone"
    alone.mkdir()
    np.save(alone / "only.npy", x)
    before = [contents(shards), contents(alone), file.read_bytes()]
    for given, output in [
        (file, file),
        (file, tmp_path / "link.npy"),
        (tmp_path / "link.npy", file),
        (shards, shards),
        (shards, shards / "a.npy"),
        (alone, alone),
        (alone, alone / "only.npy"),
    ]:
        for path in (given, str(given)):
            says = f"{output} is the input; choose another name for the output"
            assert refusal(path, output, method="int8", overwrite=True) == says
    assert [contents(shards), contents(alone), file.read_bytes()] == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_unusable_row_of_a_later_block_is_named_and_leaves_nothing(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 100 * 4 * DIMS)
    codec = Int8().fit(unit(x))
    x[234, 5] = value
    for given in (codec, "int8"):
        says = "row 234 of the input has NaN, infinity or a value beyond"
        assert says in refusal(x, tmp_path / "new" / "codes.fewbits", method=given)
    x[234] = 0
    assert "row 234 of the input is all zeros" in refusal(
        x, tmp_path / "codes.fewbits", method=codec
    )
    assert list(tmp_path.iterdir()) == []


def test_directory_of_one_file_becomes_one_file(x: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "a.npy", x)
    encoded = encode(tmp_path / "one", tmp_path / "one.fewbits", method="int8")
    assert (tmp_path / "one.fewbits").is_file()
    assert (len(encoded), encoded.source["name"]) == (ROWS, "one")


# -- directories of parts ------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, shard: str, act: Callable[[], None]) -> None:
    """Call `act` when the first block of a shard was encoded, but its part is not finished."""
    encode_blocks = encode_module.encode_blocks

    def stopped(codec: Codec, source: Any, *arguments: Any) -> Iterator[Any]:
        for code in encode_blocks(codec, source, *arguments):
            yield code
            if source.name == shard:
                act()

    monkeypatch.setattr(encode_module, "encode_blocks", stopped)


def press_control_c() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of an encoding that was interrupted in its second part."""
    output = tmp_path / "codes"
    with monkeypatch.context() as patch:
        interrupt(patch, "b.npy", press_control_c)
        with pytest.raises(KeyboardInterrupt):
            encode(shards, output, method="int8")
    return output


def test_shards_become_parts_of_one_collection(x: np.ndarray, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    encoded = encode(shards, output, method="int8")
    parts = [f"part-0000{number}.fewbits" for number in range(3)]
    assert sorted(p.name for p in output.iterdir()) == sorted([CODEC_FILE, *parts])
    assert [len(part) for part in encoded.parts] == [120, 10, 170]
    assert encoded.codec.digest == Int8().fit(unit(x)).digest
    for collection in (encoded, load(output)):
        assert_same_codes(collection, encoded.codec, unit(x))
        assert collection.source["name"] == "shards"
    joined = encode(x, method=encoded.codec)
    for mine, theirs in zip(joined.search(x[:5]), encoded.search(x[:5]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_shards_can_stay_in_memory(x: np.ndarray, shards: Path) -> None:
    encoded = encode(shards, method="int8")
    assert len(encoded.parts) == 1
    assert_same_codes(encoded, encoded.codec, unit(x))


def test_sharded_collection_is_chosen_for_like_a_file(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    chosen = encode(shards, tmp_path / "codes", keep={"recall@10": 0.9})
    assert chosen.codec.digest == encode(x, keep={"recall@10": 0.9}).codec.digest


def test_interrupted_run_goes_on_at_the_next_part(
    x: np.ndarray, shards: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(unfinished)
    assert sorted(before) == [CODEC_FILE, "part-00000.fewbits"]
    with pytest.raises(FewbitsError, match="is not finished: 2 of 3 parts are missing; run the"):
        load(unfinished)
    with monkeypatch.context() as patch:
        interrupt(patch, "a.npy", lambda: pytest.fail("the first part is encoded again"))
        patch.setattr(Int8, "_fit", lambda codec, x: pytest.fail("it is learned again"))
        encoded = encode(shards, unfinished, method="int8")
    after = contents(unfinished)
    assert {name: after[name] for name in before} == before
    assert_same_codes(encoded, Int8().fit(unit(x)), unit(x))


def test_killed_run_goes_on_at_the_next_part(x: np.ndarray, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    program = f"""
import os, signal
from fewbits.core import encode as module

encode_blocks = module.encode_blocks

def killed(codec, source, *arguments):
    for code in encode_blocks(codec, source, *arguments):
        yield code
        if source.name == "c.npy":
            os.kill(os.getpid(), signal.SIGKILL)

module.encode_blocks = killed
module.encode({str(shards)!r}, {str(output)!r}, method="int8")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    before = contents(output)
    (left_over,) = [name for name in before if name.endswith(".tmp")]
    assert left_over.startswith(".part-00002.fewbits.")
    assert {"part-00000.fewbits", "part-00001.fewbits"} < before.keys()
    encoded = encode(shards, output, method="int8")
    after = contents(output)
    assert after.keys() - before.keys() == {"part-00002.fewbits"}
    assert before.keys() - after.keys() == {left_over}
    assert all(after[name] == before[name] for name in before if name != left_over)
    assert_same_codes(encoded, Int8().fit(unit(x)), unit(x))


def test_damaged_part_is_encoded_again(x: np.ndarray, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method="int8")
    part = output / "part-00001.fewbits"
    part.write_bytes(part.read_bytes()[:-3])
    before = contents(output)
    encoded = encode(shards, output, method="int8")
    changed = {name for name, content in contents(output).items() if content != before[name]}
    assert changed == {"part-00001.fewbits"}
    assert_same_codes(encoded, encoded.codec, unit(x))


def test_finished_directory_is_refused(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method="int8")
    before = contents(output)
    says = f"{output} exists already; choose another name or pass --overwrite"
    assert refusal(shards, output, method="int8") == says
    assert contents(output) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sign"},
        {"method": None, "keep": {"recall@10": 0.9}},
        {"method": None, "at_most": 16},
        {"method": None},
        {"metric": "ip"},
        {"seed": 1},
        {"column": "v"},
        {"method": None, "queries": "queries.npy"},
    ],
)
def test_another_request_does_not_go_on_with_it(
    shards: Path, unfinished: Path, changes: dict[str, Any]
) -> None:
    before = contents(unfinished)
    says = f"{unfinished} holds another encoding; choose another name or pass --overwrite"
    assert refusal(shards, unfinished, **{"method": "int8", **changes}) == says
    assert contents(unfinished) == before


def test_other_shards_or_another_fitted_codec_do_not_go_on_with_it(
    x: np.ndarray, shards: Path, unfinished: Path
) -> None:
    says = "holds another encoding"
    assert says in refusal(shards, unfinished, method=Int8().fit(x))
    np.save(shards / "d.npy", x)
    assert says in refusal(shards, unfinished, method="int8")
    (shards / "d.npy").unlink()
    np.save(shards / "b.npy", x[:9])
    assert says in refusal(shards, unfinished, method="int8")


def test_codec_of_the_same_options_goes_on_with_it(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method=Sign())
    (output / "part-00002.fewbits").unlink()
    assert len(encode(shards, output, method=Sign())) == ROWS
    fitted = load(output).codec
    encode(shards, output, method=fitted, overwrite=True)
    (output / "part-00000.fewbits").unlink()
    assert len(encode(shards, output, method=fitted)) == ROWS
    (output / "part-00000.fewbits").unlink()
    says = "holds another encoding"
    assert says in refusal(shards, output, method=Sign().fit(x))  # learned something else


def test_overwriting_replaces_all_parts_and_nothing_else(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method="int8")
    (output / "notes.txt").write_text("mine")
    (shards / "c.npy").unlink()
    encoded = encode(shards, output, method="sign", overwrite=True)
    assert (encoded.codec.spec, len(encoded)) == ("sign", 130)
    names = [CODEC_FILE, "notes.txt", "part-00000.fewbits", "part-00001.fewbits"]
    assert sorted(p.name for p in output.iterdir()) == names


def test_wish_that_fails_leaves_the_old_parts(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    encode(shards, output, method="int8")
    before = contents(output)
    says = "nothing that was compared fits into 1 bytes"
    assert says in refusal(shards, output, at_most=1, overwrite=True)
    assert contents(output) == before


def test_unusable_row_of_a_shard_can_be_repaired(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "codes"
    codec = Int8().fit(unit(x))
    broken = x[SHARDS["b.npy"]].copy()
    broken[4, 2] = np.nan
    np.save(shards / "b.npy", broken)
    assert "row 4 of b.npy has NaN" in refusal(shards, output, method=codec)
    before = contents(output)
    assert sorted(before) == [CODEC_FILE, "part-00000.fewbits"]
    np.save(shards / "b.npy", x[SHARDS["b.npy"]])
    encoded = encode(shards, output, method=codec)
    assert contents(output)["part-00000.fewbits"] == before["part-00000.fewbits"]
    assert_same_codes(encoded, codec, unit(x))


def test_unusable_row_that_is_learned_from_leaves_no_folder(
    x: np.ndarray, shards: Path, tmp_path: Path
) -> None:
    x[125, 2] = np.nan
    np.save(shards / "b.npy", x[SHARDS["b.npy"]])
    assert "row 125 of shards has NaN" in refusal(shards, tmp_path / "codes", method="int8")
    assert not (tmp_path / "codes").exists()


def test_left_overs_are_removed_and_other_files_are_not(shards: Path, unfinished: Path) -> None:
    for name in (".part-00001.fewbits.4711.tmp", ".codec.fewbits.4711.tmp"):
        (unfinished / name).write_bytes(b"half a file")
    kept = (".docs.fewbits.4711.tmp", "notes.tmp", "letter.txt")
    for name in kept:
        (unfinished / name).write_text("mine")
    encode(shards, unfinished, method="int8")
    names = {p.name for p in unfinished.iterdir()}
    assert names - {CODEC_FILE, *(f"part-0000{n}.fewbits" for n in range(3))} == {*kept}


def test_run_that_was_killed_before_its_codec_was_written_starts_anew(
    shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "codes"
    output.mkdir()
    (output / ".codec.fewbits.4711.tmp").write_bytes(b"half a file")
    assert len(encode(shards, output, method="int8")) == ROWS
    assert len(list(output.iterdir())) == 4


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_something_else_is_refused_as_it_is(
    x: np.ndarray, shards: Path, tmp_path: Path, overwrite: bool
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / ".docs.fewbits.4711.tmp").write_bytes(b"another encode is writing this")
    (taken / ".part-00000.fewbits.4711.tmp").write_bytes(b"and this")
    before = contents(taken)
    says = f"{taken} exists and is not empty; choose another name"
    assert refusal(shards, taken, method="int8", overwrite=overwrite) == says
    assert contents(taken) == before
    file = tmp_path / "file"
    file.write_text("mine")
    says = f"{file} is a file, but sharded input is encoded into a directory"
    assert refusal(shards, file, method="int8", overwrite=overwrite) == says
    says = refusal(shards, file / "codes", method="int8", overwrite=overwrite)
    assert says.startswith("cannot write")
    assert file.read_text() == "mine"


def test_sharded_sets_are_encoded(x: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    np.savez(folder / "a.npz", v=x[:120], offsets=np.arange(0, 121, 3))
    np.savez(folder / "b.npz", v=x[120:], offsets=np.arange(0, 181, 3))
    method = "muvera:repetitions=2,bits=1,projection_dims=4"
    encoded = encode(folder, tmp_path / "codes", method=method, metric="ip")
    assert [len(part) for part in encoded.parts] == [40, 60]
    assert_same_codes(encoded, encoded.codec, Ragged(x, np.arange(0, ROWS + 1, 3)))
