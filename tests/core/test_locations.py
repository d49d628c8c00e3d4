"""Patterns and URLs: what they find, that it is streamed, and what is said where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewbits.core import locations
from fewbits.core.encode import encode
from fewbits.core.errors import FewbitsError, MissingExtraError
from fewbits.core.locations import fixed_folder, is_shared, is_url, local_path
from fewbits.core.readers import open_source

DIMS = 4
MEMORY = "memory://bucket/shards"


@pytest.fixture
def x() -> np.ndarray:
    """(60, 4) float32."""
    return np.random.default_rng(0).standard_normal((60, DIMS)).astype(np.float32)


@pytest.fixture
def shards(x: np.ndarray, tmp_path: Path) -> Path:
    """A folder of b-1.npy, b-2.npy, c.parquet and files that are no vectors; 20 rows each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "b-1.npy", x[:20])
    np.save(folder / "b-2.npy", x[20:40])
    write_parquet(folder / "c.parquet", x[40:])
    (folder / "_SUCCESS").write_text("")
    return folder


def write_parquet(file: Any, x: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIMS)
    pq.write_table(pa.table({"v": column}), file, row_group_size=7)


@pytest.fixture
def memory(shards: Path) -> Any:
    """The file system of ``memory://``, with the shards in ``bucket/shards``."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (fewbits[cluster])")
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    for file in shards.iterdir():
        system.pipe(f"/bucket/shards/{file.name}", file.read_bytes())
    return system


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(FewbitsError) as caught:
        open_source(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- patterns ------------------------------------------------------------------------------


def test_pattern_gives_what_it_matches_in_order(x: np.ndarray, shards: Path) -> None:
    source = open_source(shards / "b-*.npy")
    assert [part.name for part in source.parts] == ["b-1.npy", "b-2.npy"]
    assert source.name == "shards"
    np.testing.assert_array_equal(source.everything(), x[:40])
    np.testing.assert_array_equal(open_source(str(shards / "*")).everything(), x)
    np.testing.assert_array_equal(
        open_source(f"{shards.parent}/**/b-[12].npy").everything(), x[:40]
    )


def test_pattern_is_read_like_the_directory(shards: Path) -> None:
    by_pattern, by_folder = open_source(shards / "*"), open_source(shards)
    assert [part.location for part in by_pattern.parts] == [p.location for p in by_folder.parts]
    assert [part.stamp for part in by_pattern.parts] == [part.stamp for part in by_folder.parts]
    assert by_pattern.name == by_folder.name


def test_pattern_of_relative_files_names_the_folder(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    source = open_source("*.npy")
    assert source.name == "shards"
    assert source.parts[0].location == str(shards / "b-1.npy")


def test_file_whose_name_has_wildcards_is_a_file(x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a[1].npy", x)
    assert open_source(tmp_path / "a[1].npy").name == "a[1].npy"


def test_pattern_that_matches_nothing_is_refused(shards: Path) -> None:
    assert refusal(shards / "z*.npy").endswith(f"matches no file that fewbits reads: {KINDS}")
    assert "matches no file" in refusal(shards / "_S*")


KINDS = ", ".join(locations.SUFFIXES)


def test_shards_of_different_widths_are_refused(x: np.ndarray, shards: Path) -> None:
    np.save(shards / "b-3.npy", x[:, :3])
    assert "do not fit together" in refusal(shards / "b-*.npy")


def test_damaged_shard_is_named(shards: Path) -> None:
    (shards / "b-2.npy").write_bytes(b"nothing")
    assert refusal(shards / "b-*.npy").startswith("b-2.npy is not an .npy file")


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        ("a/b/*.npy", "a/b"),
        ("/a/*/c.npy", "/a"),
        ("*.npy", "."),
        ("a/b", "a/b"),
        ("s3://bucket/x/*.npy", "s3:/bucket/x"),
    ],
)
def test_fixed_folder_is_what_stands_before_the_wildcards(pattern: str, folder: str) -> None:
    assert fixed_folder(pattern) == Path(folder)


# -- URLs of local files -------------------------------------------------------------------


def test_file_url_is_the_local_file(x: np.ndarray, shards: Path) -> None:
    for url in (f"file://{shards}/b-1.npy", f"local://{shards}/b-1.npy"):
        source = open_source(url)
        np.testing.assert_array_equal(source.everything(), x[:20])
        assert source.location == str(shards / "b-1.npy")
    np.testing.assert_array_equal(open_source(f"file://{shards}").everything(), x)
    np.testing.assert_array_equal(open_source(f"file://{shards}/b-*").everything(), x[:40])


def test_file_url_may_have_escaped_characters(x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a b.npy", x)
    assert local_path(f"file://{tmp_path}/a%20b.npy") == tmp_path / "a b.npy"
    assert local_path(f"file://localhost{tmp_path}/a b.npy") == tmp_path / "a b.npy"


def test_urls_are_told_from_paths() -> None:
    for url in ("s3://b/x.npy", "memory://x", "https://host/x.parquet", "gcs://b"):
        assert is_url(url)
    for path in ("a/b.npy", "file:///a", "C:\\a.npy", "c://a", Path("s3://b"), "-", 3, "example:x"):
        assert not is_url(path)
    assert is_shared("s3://b/x.npy")
    assert not is_shared("memory://b/x.npy")


# -- URLs that are streamed ----------------------------------------------------------------


def test_folder_pattern_and_file_are_read_from_a_url(x: np.ndarray, memory: Any) -> None:
    for url, rows in [
        (MEMORY, x),
        (MEMORY + "/", x),
        (MEMORY + "/b-*.npy", x[:40]),
        (MEMORY + "/*.parquet", x[40:]),
        (MEMORY + "/b-2.npy", x[20:40]),
        (MEMORY + "/c.parquet", x[40:]),
    ]:
        source = open_source(url)
        np.testing.assert_array_equal(source.everything(), rows)
        assert list(map(len, source.raw_blocks(20))) == [20] * (len(rows) // 20)
        assert all(part.location.startswith(MEMORY) for part in source.parts)  # type: ignore[union-attr]
    assert source.name == "c.parquet"
    assert open_source(MEMORY + "/").name == "shards"


def test_url_is_read_block_by_block(
    x: np.ndarray, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    file_type = type(memory.open("/bucket/shards/b-1.npy"))
    read = file_type.read

    def counted(self: Any, size: int = -1) -> bytes:
        asked.append(size)
        return read(self, size)  # type: ignore[no-any-return]

    source = open_source(MEMORY + "/b-1.npy")
    monkeypatch.setattr(file_type, "read", counted)
    blocks = list(source.raw_blocks(6))
    assert [len(block) for block in blocks] == [6, 6, 6, 2]
    assert asked == [6 * 16, 6 * 16, 6 * 16, 2 * 16]


def test_codes_from_a_url_are_those_from_files(shards: Path, memory: Any, tmp_path: Path) -> None:
    from_url = encode(MEMORY, tmp_path / "a", method="int8")
    from_files = encode(shards, tmp_path / "b", method="int8")
    assert from_url.codec.digest == from_files.codec.digest
    for mine, theirs in zip(from_url.parts, from_files.parts, strict=True):
        np.testing.assert_array_equal(mine["codes"], theirs["codes"])


def test_replaced_remote_shard_is_encoded_again(x: np.ndarray, memory: Any, tmp_path: Path) -> None:
    codec = encode(MEMORY, tmp_path / "codes", method="int8").codec
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "codes").iterdir()}
    with memory.open("/bucket/shards/b-2.npy", "wb") as file:
        np.save(file, x[20:40][::-1])
    encoded = encode(MEMORY, tmp_path / "codes", method="int8")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "codes").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"part-00001.fewbits"}
    assert encoded.codec.digest == codec.digest


def test_column_by_column_table_is_not_streamed(x: np.ndarray, memory: Any) -> None:
    with memory.open("/bucket/f.npy", "wb") as file:
        np.save(file, np.asfortranarray(x))
    assert "stored column by column and cannot be streamed" in refusal("memory://bucket/f.npy")


def test_kinds_that_cannot_be_streamed_are_refused_not_skipped(memory: Any) -> None:
    memory.pipe("/bucket/shards/d.npz", b"x")
    for url in (MEMORY, MEMORY + "/d.npz"):
        says = f"{MEMORY}/d.npz cannot be streamed; copy it to this machine first, or keep it as"
        assert refusal(url).startswith(says)


def test_unusable_remote_files_are_named(x: np.ndarray, memory: Any) -> None:
    whole = memory.cat("/bucket/shards/b-1.npy")
    for content, says in [
        (b"", "is empty: it has no bytes"),
        (b"nothing to see", "is not an .npy file, or its header is damaged"),
        (whole[:-3], f"is cut short: {len(whole) - 3} bytes of {len(whole)}"),
    ]:
        memory.pipe("/bucket/shards/b-1.npy", content)
        assert refusal(MEMORY) == f"{MEMORY}/b-1.npy {says}"
    memory.pipe("/bucket/p.parquet", b"nothing to see")
    assert refusal("memory://bucket/p.parquet").startswith("cannot read memory://bucket/p.parquet")
    with memory.open("/bucket/i.npy", "wb") as file:
        np.save(file, np.ones((3, 2), dtype=np.int64))
    assert "has dtype int64" in refusal("memory://bucket/i.npy")


def test_remote_file_that_shrinks_while_it_is_read_is_cut_short(memory: Any) -> None:
    source = open_source(MEMORY + "/b-1.npy")
    memory.pipe("/bucket/shards/b-1.npy", memory.cat("/bucket/shards/b-1.npy")[:200])
    with pytest.raises(FewbitsError, match=r"b-1\.npy is cut short"):
        list(source.blocks(5))


@pytest.mark.parametrize("url", ["memory://bucket/none", MEMORY + "/none.npy", MEMORY + "/z*.npy"])
def test_nothing_at_a_url_is_said(memory: Any, url: str) -> None:
    assert refusal(url) == f"there is nothing at {url}"


def test_folder_without_vectors_is_refused(memory: Any) -> None:
    memory.pipe("/bucket/other/readme.txt", b"hello")
    says = "memory://bucket/other holds no file that is read from a URL: .npy, .parquet"
    assert refusal("memory://bucket/other") == says


def test_missing_driver_is_named(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations

    about = {"class": "no_such_driver.System", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "nowhere", about)
    says = "nowhere:// needs the driver no_such_driver; install it with: pip install no_such_driver"
    assert refusal("nowhere://x/y.npy") == says
    assert refusal("never-heard-of://x") == (
        "never-heard-of:// is no kind of URL that fsspec knows; see its drivers"
    )


def test_missing_fsspec_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"needs fsspec; .*'fewbits\[cluster\]'"):
        open_source("memory://x.npy")


def test_what_a_driver_raises_is_one_line(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class CredentialsError(Exception):
        pass

    def fail(*arguments: Any, **options: Any) -> Any:
        raise CredentialsError("Unable to locate credentials\nsee the manual")

    monkeypatch.setattr(type(memory), "isdir", fail)
    assert refusal(MEMORY) == f"cannot read {MEMORY}: Unable to locate credentials"


def test_output_must_not_be_a_url(x: np.ndarray) -> None:
    with pytest.raises(FewbitsError, match="is a URL; write to a local or mounted folder"):
        encode(x, "s3://bucket/codes.fewbits", method="int8")


# -- files that change ---------------------------------------------------------------------


def test_replaced_shard_is_encoded_again(x: np.ndarray, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    codec = encode(shards, output, method="int8").codec
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    np.save(shards / "b-1.npy", x[:20][::-1])
    encoded = encode(shards, output, method="int8")
    changed = {p.name for p in output.iterdir() if p.read_bytes() != before[p.name]}
    assert changed == {"part-00000.fewbits"}
    assert encoded.codec.digest == codec.digest
    np.testing.assert_array_equal(
        encoded.parts[0]["codes"], open_codes(before, tmp_path)["codes"][::-1]
    )


def open_codes(content: dict[str, bytes], folder: Path) -> Any:
    """The codes of the first part among the files of an earlier run."""
    earlier = folder / "earlier"
    earlier.mkdir()
    for name, data in content.items():
        (earlier / name).write_bytes(data)
    from fewbits.core.collection import load

    return load(earlier).parts[0]


def test_shard_of_another_time_is_encoded_again(shards: Path, tmp_path: Path) -> None:
    encode(shards, tmp_path / "codes", method="int8")
    os.utime(shards / "b-2.npy", ns=(1, 1))
    encode(shards, tmp_path / "codes", method="int8")
    with pytest.raises(FewbitsError, match="exists already"):
        encode(shards, tmp_path / "codes", method="int8")


def test_sample_of_many_shards_reads_few_of_them(
    x: np.ndarray, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(shards)
    monkeypatch.setattr("fewbits.core.source.SAMPLED_SHARDS", 2)
    sample = source.sample(10, seed=0)
    assert sample.shape == (10, DIMS)
    rows = [int(np.flatnonzero((x == one).all(axis=1))[0]) for one in sample]
    assert rows == sorted(set(rows))
    assert len({row // 20 for row in rows}) == 2
    np.testing.assert_array_equal(source.sample(10, seed=0), sample)
    assert len(source.sample(1000, seed=0)) == 40


def test_help_starts_without_fsspec_and_ray() -> None:
    program = (
        "import sys; from fewbits.cli import build_parser; build_parser();"
        "print({'fsspec', 'ray', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
