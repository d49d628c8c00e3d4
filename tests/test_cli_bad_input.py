"""Bad input on the command line: one line that says what to do, exit code 2, nothing left."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from fewbits.cli import main
from fewbits.core.catalogue import find
from fewbits.core.examples import python_docs

# A warning would be a second line on standard error.
pytestmark = pytest.mark.filterwarnings("error")

ROWS, DIMS = 60, 32

Refused = Callable[..., str]


# -- the files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files. No test may change anything in it."""
    folder = tmp_path_factory.mktemp("files")
    example = python_docs()
    x = example.vectors[:ROWS, :DIMS].copy()
    write_vectors(folder, x, example.queries[:5, :DIMS])
    write_damaged(folder, x)
    write_directories(folder, x)
    write_judgements(folder)
    write_codes(folder)
    return folder


def changed(x: np.ndarray, value: float) -> np.ndarray:
    copy = x.copy()
    copy[7, 3] = value
    return copy


def write_vectors(folder: Path, x: np.ndarray, queries: np.ndarray) -> None:
    zeros = x.copy()
    zeros[5] = 0
    arrays = {
        "docs": x,
        "queries": queries,
        "nan": changed(x, np.nan),
        "infinite": changed(x, np.inf),
        "beyond": changed(x.astype(np.float64), 1e300),
        "zero_row": zeros,
        "none": x[:0],
        "no_width": x[:, :0],
        "one": x[:1],
        "wide": np.concatenate([x, x], axis=1),
        "constant": np.ones_like(x),
        "flat": x.ravel(),
        "cube": x.reshape(6, 10, DIMS),
        "whole": (100 * x).astype(np.int64),
        "complex": x.astype(np.complex64),
        "words": np.array([["a", "b"], ["c", "d"]]),
        "objects": x[:2, :2].astype(object),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.savez(folder / "several.npz", first=x, second=x)
    np.savez(folder / "offsets.npz", flat=x, offsets=np.array([0, 40, 20, ROWS]))
    save_file({"a": x}, folder / "weights.safetensors")
    columns = {"text": ["a", "b"], "ragged": [[1.0, 2.0], [3.0]], "missing": [[1.0, 2.0], None]}
    pq.write_table(pa.table(columns), folder / "odd.parquet")


def write_damaged(folder: Path, x: np.ndarray) -> None:
    whole = (folder / "docs.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:1000])
    (folder / "no_bytes.npy").touch()
    for suffix in ("npy", "npz", "parquet", "arrow", "safetensors", "fvecs", "bvecs", "csv"):
        (folder / f"garbage.{suffix}").write_bytes(b"garbage!")


def write_directories(folder: Path, x: np.ndarray) -> None:
    shards = {
        "empty": {},
        "shards": {"a": x, "b": x},
        "mixed": {"a": x, "b": x[:, :16]},
        "nan_shards": {"a": x, "b": changed(x, np.nan)},
    }
    for name, files in shards.items():
        (folder / name).mkdir()
        for file, array in files.items():
            np.save(folder / name / f"{file}.npy", array)
    (folder / "taken").mkdir()
    (folder / "taken" / "letter.txt").write_text("mine")


def write_judgements(folder: Path) -> None:
    texts = {"judged": "0 1 1\n", "nonsense": "hello\n", "far": "0 999 1\n", "nothing": ""}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def write_codes(folder: Path) -> None:
    codes = folder / "codes.fewbits"
    assert main(["encode", str(folder / "docs.npy"), "--method", "int8"]) == 0
    (folder / "docs.fewbits").rename(codes)
    assert main(["encode", str(folder / "shards"), "--method", "int8"]) == 0
    (folder / "shards.fewbits" / "part-00001.fewbits").unlink()
    whole = codes.read_bytes()
    damaged = {
        "cut_short": whole[:-10],
        "cut_early": whole[:20],
        "empty_file": b"",
        "longer": whole + b"more",
        "flipped": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "newer": whole.replace(b'"version":"1"', b'"version":"9"'),
        "text": b"a text of some length, which is no collection",
    }
    for name, content in damaged.items():
        (folder / f"{name}.fewbits").write_bytes(content)


# -- the check -----------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Everything below a folder; of files, the size and the time of the last change."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {
        path: (about.st_size, about.st_mtime_ns) if path.is_file() else None
        for path, about in found.items()
    }


@pytest.fixture
def refused(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs a command that must be refused, and gives what it says."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # so that leftovers there show as well

    def run(command: str, *, prints: bool = False) -> str:
        capfd.readouterr()
        before = contents(folder)
        try:
            code: Any = main(shlex.split(command))
        except SystemExit as stopped:  # what the parser refuses
            code = stopped.code
        out, err = capfd.readouterr()
        assert code == 2
        assert bool(out) == prints
        assert err.startswith("fewbits: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert contents(folder) == before
        return err

    return run


# -- vectors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nan.npy",
            "row 7 of nan.npy has NaN, infinity or a value beyond 1e+15; repair, scale or drop",
        ),
        ("infinite.npy", "row 7 of infinite.npy has NaN, infinity"),
        ("beyond.npy", "row 7 of beyond.npy has NaN, infinity or a value beyond 1e+15"),
        ("zero_row.npy", "row 5 of zero_row.npy is all zeros and has no cosine; drop it, or use"),
        ("none.npy", "none.npy is empty: 0 rows of 32 dimensions"),
        ("no_width.npy", "no_width.npy is empty: 60 rows of 0 dimensions"),
        ("flat.npy", "flat.npy must be a table of vectors with 2 axes (items, dimensions), not 1"),
        ("cube.npy", "cube.npy must be a table of vectors with 2 axes (items, dimensions), not 3"),
        ("whole.npy", "whole.npy has dtype int64; convert it to one of float16, float32"),
        ("complex.npy", "complex.npy has dtype complex64; convert it to one of"),
        ("words.npy", "words.npy has dtype str32; convert it to one of"),
        ("objects.npy", "objects.npy has dtype object; convert it to one of"),
        ("cut.npy", "cut.npy is cut short: 1000 bytes of 7808"),
        ("no_bytes.npy", "no_bytes.npy is empty: it has no bytes"),
        ("garbage.npy", "garbage.npy is not an .npy file, or its header is damaged"),
        ("garbage.npz", "cannot read garbage.npz: File is not a zip file"),
        ("garbage.parquet", "cannot read garbage.parquet: "),
        ("garbage.arrow", "cannot read garbage.arrow: "),
        ("garbage.safetensors", "cannot read garbage.safetensors: "),
        ("garbage.fvecs", "garbage.fvecs is damaged or cut short"),
        ("garbage.bvecs", "garbage.bvecs is damaged or cut short"),
        ("garbage.csv", "garbage.csv is not a kind of file fewbits reads; it reads .npy, .npz"),
        ("codes.fewbits", "codes.fewbits is not a kind of file fewbits reads"),
        ("missing.npy", "there is no file missing.npy"),
        ("several.npz", "several.npz has several tables of vectors; pass --column with one of: "),
        ("offsets.npz", "offsets.npz: offsets must rise from 0 to the number of vectors, 60"),
        ("several.npz --column third", "has no vectors called 'third'; it has: first, second"),
        ("weights.safetensors --column b", "has no vectors called 'b'; it has: a"),
        ("odd.parquet --column text", "has no vectors called 'text'"),
        ("odd.parquet --column ragged", "column 'ragged' has vectors of different widths"),
        ("odd.parquet --column missing", "column 'missing' has rows without a vector"),
        ("example:nothing", "there is no 'example:nothing'; the built-in example is example:py"),
        ("empty", "empty holds no file that fewbits reads: .npy, .npz"),
        ("mixed", "the files of mixed do not fit together: a.npy has vectors of 32 dimensions"),
        ("nan_shards", "row 67 of nan_shards has NaN, infinity or a value beyond 1e+15"),
    ],
)
def test_unusable_vectors(refused: Refused, name: str, says: str) -> None:
    for command in ("encode {} --method int8 -o new", "compare {} --methods int8 --report new"):
        assert says in refused(command.format(name))


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(1000)])
def test_garbage_on_standard_input(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert "is not an .npy file" in refused("encode - --method int8")


def test_too_few_rows(refused: Refused) -> None:
    assert "1 rows of one.npy are too few to hold some out; pass --queries" in refused(
        "compare one.npy --methods int8"
    )
    assert "pass --queries" in refused("encode one.npy")
    assert "10 rows of docs.npy are too few" in refused("compare docs.npy --rows 10")
    assert "needs at least 256 rows, not 60" in refused("encode docs.npy --method pq:bytes=4")


def test_constant_rows(refused: Refused) -> None:
    says = "pca-rag: all rows are the same; fit on rows that differ"
    assert says in refused("encode constant.npy --method pca-rag:dims=4")
    assert f"nothing could be compared: {says}" in refused(
        "compare constant.npy --methods pca-rag:dims=4"
    )


# -- methods and options -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("nope", "unknown method 'nope'; `fewbits systems` lists the names"),
        ("muvra", "unknown method 'muvra'; did you mean 'muvera'?"),
        ("''", "the method is empty; `fewbits systems` lists the names"),
        ("int8+", "unknown method ''"),
        ("think", "think is a cache, not a codec; it cannot encode a file"),
        ("muvera", "muvera takes sets, but docs.npy has vectors"),
        ("int8+sign", "int8 cannot be followed by another codec: its code is not a vector"),
        ("pca-rag:size=3", "pca-rag has no option 'size'; its options are: dims"),
        ("pca-rag:dims=4,dims=5", "pca-rag has option 'dims' twice; give it once"),
        ("pca-rag:dims", "pca-rag: dims='' is not valid; dims is"),
        ("pca-rag:dims=4.5", "pca-rag: dims='4.5' is not valid; dims is a whole number"),
        ("pca-rag:center=maybe", "center='maybe' is not valid; center is yes or no"),
        ("pca-rag:dims=33", "pca-rag: dims=33 must be between 1 and the dimensions, 32"),
        ("rabitq:bits=9", "rabitq: bits=9 must be between 1 and 8"),
    ],
)
def test_unusable_methods(refused: Refused, method: str, says: str) -> None:
    assert says in refused(f"encode docs.npy --method {method} -o new")


def test_unusable_list_of_methods(refused: Refused) -> None:
    assert "unknown method 'nope'" in refused("compare docs.npy --methods int8,nope")
    assert "no methods are named; `fewbits systems` lists the names" in refused(
        "compare docs.npy --methods ,"
    )
    assert "leave out --methods" in refused("compare docs.npy --search-chains 48B --methods int8")
    assert "write it like 48B" in refused("compare docs.npy --search-chains 0")
    assert "nothing could be compared: rabitq: bits=9" in refused(
        "compare docs.npy --methods rabitq:bits=9"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("squeeze docs.npy", "invalid choice: 'squeeze'"),
        ("compare", "the following arguments are required: file (see fewbits compare --help)"),
        ("decode codes.fewbits", "arguments are required: -o/--output"),
        ("search codes.fewbits", "arguments are required: --queries"),
        ("encode docs.npy --unknown", "unrecognized arguments: --unknown"),
        ("systems 'new\nline'", "unrecognized arguments: new line"),
        ("encode docs.npy -o", "argument -o/--output: expected one argument"),
        ("encode docs.npy --metric l1", "invalid choice: 'l1'"),
        ("encode docs.npy --method int8 --ratio 4", "not allowed with argument --method"),
        ("encode docs.npy --keep recall@1=1 --at-most 9", "not allowed with argument --keep"),
        ("encode docs.npy --at-most 0", "argument --at-most: '0': write it like 48B"),
        ("encode docs.npy --at-most -4", "'-4': write it like 48B"),
        ("encode docs.npy --at-most nan", "'nan': write it like 48B"),
        ("encode docs.npy --at-most 1.2.3", "'1.2.3': write it like 48B"),
        ("encode docs.npy --at-most 1e999", "'1e999': write it like 48B"),
        ("encode docs.npy --at-most 16x", "'16x': write it like 48B"),
        ("encode docs.npy --ratio 0x", "argument --ratio: '0x': write it like 16x"),
        ("encode docs.npy --ratio 48B", "'48B': write it like 16x"),
        ("encode docs.npy --keep nonsense", "'nonsense': write it like recall@10=0.95"),
        ("encode docs.npy --keep recall@10=", "'recall@10=': write it like recall@10=0.95"),
        ("encode docs.npy --keep recall@10=nan", "must be above 0 and at most 1, not nan"),
        ("encode docs.npy --keep recall@10=95", "must be above 0 and at most 1, not 95"),
        ("encode docs.npy --keep recall@10=-5%", "must be above 0 and at most 1, not -0.05"),
        ("encode docs.npy --keep recall@7=0.9", "'recall@7' cannot be kept; choose one of"),
        ("encode docs.npy --method int8 --seed -1", "seed=-1 is not valid; a seed is a"),
        ("compare docs.npy --methods int8 --seed -1", "seed=-1 is not valid"),
        ("encode docs.npy --seed x", "argument --seed: invalid int value: 'x'"),
        ("compare docs.npy --rows 0", "argument --rows: '0' is not a whole number of at least 1"),
        ("compare docs.npy --rows 2.5", "'2.5' is not a whole number of at least 1"),
        ("search codes.fewbits --queries queries.npy -k 0", "argument -k: '0' is not a whole"),
        ("search codes.fewbits --queries queries.npy -k 61", "the collection has only 60 rows"),
        ("reproduce", "name the systems, or pass --all; there are: "),
        ("reproduce pca-rag --all", "name the systems, or pass --all; there are: "),
        ("reproduce nope", "unknown method 'nope'"),
        ("reproduce snapkv", "snapkv has no reproduction; there is one for: "),
        ("reproduce pca-rag --size huge", "invalid choice: 'huge'"),
    ],
)
def test_unusable_options(refused: Refused, command: str, says: str) -> None:
    assert says in refused(command)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("--at-most 3.5", "nothing that was compared fits into 3.5 bytes; the smallest is sign"),
        ("--ratio 1000x", "nothing that was compared fits into 0.128 bytes; the smallest is sign"),
        ("--keep recall@10=99%", "nothing that was compared keeps recall@10 at 0.99; the best is"),
    ],
)
def test_wish_that_nothing_meets(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, wish: str, says: str
) -> None:
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: [find("sign")])
    assert says in refused(f"encode docs.npy {wish}")


# -- queries and judgements ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "says"),
    [
        ("wide.npy", "vectors of 64"),
        ("missing.npy", "there is no file missing.npy"),
        ("none.npy", "none.npy is empty"),
        ("nan.npy", "row 7 of nan.npy has NaN"),
        ("zero_row.npy", "row 5 of zero_row.npy is all zeros"),
        ("garbage.npy", "garbage.npy is not an .npy file"),
        ("several.npz", "pass --column with one of: first, second"),
        ("empty", "empty holds no file that fewbits reads"),
    ],
)
def test_unusable_queries(refused: Refused, queries: str, says: str) -> None:
    assert says in refused(f"search codes.fewbits --queries {queries}")
    assert says in refused(f"compare docs.npy --methods int8 --queries {queries}")
    assert says in refused(f"encode docs.npy --queries {queries}")


@pytest.mark.parametrize(
    ("originals", "says"),
    [
        ("one.npy", "one.npy has 1 × 32 vectors, but the collection was made from 60 × 32"),
        ("wide.npy", "wide.npy has 60 × 64 vectors"),
        ("missing.npy", "there is no file missing.npy"),
        ("nan.npy", "row 7 of nan.npy has NaN"),
    ],
)
def test_unusable_originals(refused: Refused, originals: str, says: str) -> None:
    command = f"search codes.fewbits --queries queries.npy --rescore {originals}"
    assert says in refused(command)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--qrels judged.txt", "--qrels needs --queries"),
        ("--queries queries.npy --qrels judged.txt --rows 30", "of at most --rows 30 rows"),
        ("--queries queries.npy --qrels nonsense.txt", "is not a table of judgements"),
        ("--queries queries.npy --qrels docs.npy", "is not a table of judgements"),
        ("--queries queries.npy --qrels nothing.txt", "nothing.txt holds no judgements"),
        ("--queries queries.npy --qrels far.txt", "must be within 5 queries and 60 rows"),
        ("--queries queries.npy --qrels missing.txt", "cannot read missing.txt"),
        ("--queries queries.npy --qrels empty", "cannot read empty"),
    ],
)
def test_unusable_judgements(refused: Refused, options: str, says: str) -> None:
    assert says in refused(f"compare docs.npy --methods int8 {options}")


# -- encoded collections -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        ("missing.fewbits", "there is no file missing.fewbits"),
        ("empty_file.fewbits", "empty_file.fewbits is not a .fewbits file"),
        ("text.fewbits", "text.fewbits is not a .fewbits file"),
        ("docs.npy", "docs.npy is not a .fewbits file"),
        ("weights.safetensors", "is not a .fewbits file (a safetensors file of another kind?)"),
        ("cut_early.fewbits", "cut_early.fewbits is not a .fewbits file, or it is cut short"),
        ("cut_short.fewbits", "cut_short.fewbits is cut short or has bytes left over"),
        ("longer.fewbits", "longer.fewbits is cut short or has bytes left over"),
        ("flipped.fewbits", "flipped.fewbits is damaged: array"),
        ("newer.fewbits", "newer.fewbits has format version 9, this fewbits reads up to 1; up"),
        ("shards.fewbits", "1 of 2 parts are missing; run the same encode command again"),
        ("shards.fewbits/codec.fewbits", "is a codec file, not an encoded collection"),
        ("shards.fewbits/part-00000.fewbits", "is a part file, not an encoded collection; open"),
        ("empty", "empty"),
        ("shards", "shards"),
    ],
)
def test_unusable_collections(refused: Refused, codes: str, says: str) -> None:
    for command in ("info {}", "decode {} -o new.npy", "search {} --queries queries.npy"):
        assert says in refused(command.format(codes))


# -- outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("encode docs.npy -o codes.fewbits", "exists already; choose another name or pass --ov"),
        ("encode docs.npy -o taken", "taken exists already; choose another name"),
        ("encode docs.npy -o taken --overwrite", "cannot write taken: Is a directory"),
        ("encode docs.npy -o docs.npy --overwrite", "docs.npy is the input; choose another name"),
        ("encode docs.npy -o judged.txt/new.fewbits", "cannot write judged.txt/new.fewbits: "),
        ("encode .", ". has no name to call the output by; pass --output"),
        ("encode shards -o shards", "shards is the input; choose another name for the output"),
        ("encode shards -o codes.fewbits", "sharded input is encoded into a directory"),
        ("encode shards -o codes.fewbits --overwrite", "sharded input is encoded into a directory"),
        ("encode shards -o taken", "taken exists and is not empty; choose another name"),
        ("encode shards -o taken --overwrite", "taken exists and is not empty"),
        ("encode shards -o shards.fewbits --seed 3", "shards.fewbits holds another encoding; ch"),
        ("decode codes.fewbits -o docs.npy", "docs.npy exists already; choose another name"),
        ("decode codes.fewbits -o new.txt", "decode writes .npy files; name the output new.npy"),
        ("decode codes.fewbits -o empty", "decode writes .npy files; name the output empty.npy"),
        ("decode codes.fewbits -o judged.txt/new.npy", "judged.txt is a file, not a folder"),
        ("decode codes.fewbits -o codes.fewbits --overwrite", "decode writes .npy files"),
    ],
)
def test_unusable_outputs(refused: Refused, command: str, says: str) -> None:
    method = " --method int8" if command.startswith("encode") else ""
    assert says in refused(command + method)


@pytest.mark.parametrize("report", ["judged.txt", "judged.txt/new"])
def test_unusable_report_folder(refused: Refused, report: str) -> None:
    command = f"compare docs.npy --methods int8 --report {report}"
    assert f"cannot write {report}/" in refused(command, prints=True)


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("encode docs.npy --method int8 -o new.fewbits", "new.fewbits"),
        ("encode docs.npy --method int8 -o codes.fewbits --overwrite", "codes.fewbits"),
        ("decode codes.fewbits -o new.npy", "new.npy"),
        ("decode codes.fewbits -o docs.npy --overwrite", "docs.npy"),
    ],
)
def test_full_disk(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    assert f"the disk is full while writing {name}; free some space" in refused(command)


def test_full_disk_for_the_report(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    command = "compare docs.npy --methods int8 --report taken"
    assert "the disk is full while writing taken/comparison.json" in refused(command, prints=True)


@pytest.mark.parametrize(
    ("name", "mode", "command"),
    [
        ("docs.npy", 0o000, "encode docs.npy --method int8 -o new"),
        ("queries.npy", 0o000, "search codes.fewbits --queries queries.npy"),
        ("taken", 0o555, "encode docs.npy --method int8 -o taken/new.fewbits"),
        ("taken", 0o555, "decode codes.fewbits -o taken/new.npy"),
        ("taken", 0o555, "compare docs.npy --methods int8 --report taken/new"),
    ],
)
def test_without_permission(
    refused: Refused,
    folder: Path,
    request: pytest.FixtureRequest,
    name: str,
    mode: int,
    command: str,
) -> None:
    path = folder / name
    before = path.stat().st_mode
    request.addfinalizer(lambda: path.chmod(before))
    path.chmod(mode)
    if os.access(path, os.W_OK):
        pytest.skip("this user may read and write everything")
    assert "Permission denied" in refused(command, prints="--report" in command)
