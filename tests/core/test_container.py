"""The .fewbits file: its bytes, writing it safely, and refusing everything that is not one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fewbits.core import container
from fewbits.core.container import HEADER_LIMIT, Writer, read, write
from fewbits.core.errors import FewbitsError

DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}

ABOUT = {"codec": {"spec": "größe:bits=2"}, "list": [1, 2.5, None, True]}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """One array of every type, of several shapes."""
    rng = np.random.default_rng(0)
    made = {}
    for number, (name, code) in enumerate(DTYPES.items()):
        shape = [(3,), (5, 7), (2, 3, 1), ()][number % 4]
        made[f"array.{name}"] = np.asarray(rng.integers(0, 2, shape)).astype(code)
    return made | {"empty": np.empty((0, 9), np.float32), "ü": np.array([-1.5, np.inf], "f8")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file: 11 bytes of `a`, 12 of `b`."""
    content = {"a": np.arange(11, dtype=np.uint8), "b": np.arange(3, dtype=np.float32)}
    return write(tmp_path / "small.fewbits", "codec", {"name": "small"}, content)


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and the bytes after it, read by nothing but struct and json."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def digest_of(header: dict[str, Any]) -> str:
    """What the metadata must have as ``digest``."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "digest"}
    text = json.dumps([entries, metadata], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], None], body: bytes | None = None
) -> Path:
    """Change the header of a file, and make all digests right again."""
    header, old = parse(path)
    change(header)
    body = old if body is None else body
    digests = {}
    for name, entry in header.items():
        if name != "__metadata__" and isinstance(entry, dict) and "data_offsets" in entry:
            begin, end = entry["data_offsets"]
            digests[name] = hashlib.sha256(body[begin:end]).hexdigest()
    header["__metadata__"]["sha256"] = json.dumps(digests)
    header["__metadata__"]["digest"] = digest_of(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def refusal(path: Path) -> str:
    """What is said about a bad file, in one line that names it."""
    with pytest.raises(FewbitsError) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- layout --------------------------------------------------------------------------------


def test_layout_is_the_one_described(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "file.fewbits", "encoded", ABOUT, arrays)
    header, body = parse(path)
    metadata = header["__metadata__"]
    assert next(iter(header)) == "__metadata__"
    assert all(isinstance(value, str) for value in metadata.values())
    assert (metadata["format"], metadata["version"]) == ("fewbits", "1")
    assert metadata["kind"] == "encoded"
    assert json.loads(metadata["about"]) == ABOUT
    assert metadata["digest"] == digest_of(header)
    digests = json.loads(metadata["sha256"])
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert entries.keys() == digests.keys() == arrays.keys()
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        assert digests[name] == hashlib.sha256(body[begin:end]).hexdigest()
        found = np.frombuffer(body[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        assert found.dtype == arrays[name].dtype
        assert found.shape == arrays[name].shape
        assert found.tobytes() == arrays[name].tobytes()


def test_arrays_follow_each_other_without_gaps_and_aligned(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write(tmp_path / "file.fewbits", "encoded", ABOUT, arrays)
    header, body = parse(path)
    start = path.stat().st_size - len(body)
    assert start % 8 == 0
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    places = sorted(entry["data_offsets"] for entry in entries)
    assert [begin for begin, _ in places] == [0] + [end for _, end in places[:-1]]
    assert places[-1][1] == len(body)
    for entry in entries:
        assert (start + entry["data_offsets"][0]) % np.dtype(DTYPES[entry["dtype"]]).itemsize == 0


def test_safetensors_reads_the_same_arrays(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "file.fewbits", "encoded", ABOUT, arrays)
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(loaded[name], array)
    with safe_open(path, "np") as opened:
        assert opened.metadata()["format"] == "fewbits"


def test_read_gives_back_what_was_written(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    content = read(write(tmp_path / "new" / "file.fewbits", "part", ABOUT, arrays))
    assert (content.kind, content.about) == ("part", ABOUT)
    assert content.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        found = content.arrays[name]
        assert isinstance(found, np.memmap) or not found.size
        assert not found.flags.writeable
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)


def test_file_without_arrays_is_a_file(tmp_path: Path) -> None:
    content = read(write(tmp_path / "file.fewbits", "codec", {}, {}))
    assert (content.about, content.arrays) == ({}, {})


def test_same_content_gives_the_same_bytes(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    turned = dict(reversed(arrays.items()))
    one = write(tmp_path / "one", "codec", {"a": 1, "b": 2}, arrays)
    other = write(tmp_path / "other", "codec", {"b": 2, "a": 1}, turned)
    assert one.read_bytes() == other.read_bytes()


def test_byte_order_and_strides_do_not_matter(tmp_path: Path) -> None:
    table = np.arange(12, dtype=">f4").reshape(3, 4)
    arrays = {"big": table, "turned": table.T, "every": table[:, ::2], "whole": table.astype(">i8")}
    found = read(write(tmp_path / "file.fewbits", "codec", {}, arrays)).arrays
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert all(array.dtype.isnative for array in found.values())


@pytest.mark.parametrize(
    "array", [np.zeros(2, complex), np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]")]
)
def test_arrays_that_files_cannot_hold_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(FewbitsError, match="cannot hold arrays of dtype"):
        write(tmp_path / "file.fewbits", "codec", {}, {"a": array})
    assert list(tmp_path.iterdir()) == []


# -- writing -------------------------------------------------------------------------------

SHAPES = {"a": (np.dtype(np.uint8), (4, 2)), "b": (np.dtype(np.float32), (3,))}


def test_arrays_can_be_written_piece_by_piece(tmp_path: Path) -> None:
    a, b = np.arange(8, dtype=np.uint8).reshape(4, 2), np.arange(3, dtype=np.float32)
    with Writer(tmp_path / "pieces", "codec", {}, SHAPES) as writer:
        writer.write("a", a[:1])
        writer.write("b", b)
        writer.write("a", a[1:1])
        writer.write("a", a[1:])
    whole = write(tmp_path / "whole", "codec", {}, {"a": a, "b": b})
    assert (tmp_path / "pieces").read_bytes() == whole.read_bytes()


def test_nothing_is_seen_before_all_is_written(file: Path) -> None:
    before = file.read_bytes()
    for path in (file, file.with_name("new.fewbits")):
        with Writer(path, "codec", {}, SHAPES, overwrite=True) as writer:
            writer.write("a", np.zeros((4, 2), np.uint8))
            writer.write("b", np.zeros(3, np.float32))
            assert (path.read_bytes() == before) if path == file else not path.exists()
        assert list(read(path).arrays) == ["b", "a"]
    assert len(list(file.parent.iterdir())) == 2


def write_and_stop(path: Path, error: type[BaseException]) -> None:
    with Writer(path, "codec", {}, SHAPES, overwrite=True) as writer:
        writer.write("a", np.zeros((2, 2), np.uint8))
        raise error("stop")


@pytest.mark.parametrize("error", [ValueError, FewbitsError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(file: Path, error: type[BaseException]) -> None:
    before = file.read_bytes()
    for path in (file, file.parent / "new" / "folder" / "new.fewbits"):
        with pytest.raises(error, match="stop"):
            write_and_stop(path, error)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before


def test_existing_output_is_refused(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(
        FewbitsError, match=r"small\.fewbits exists already; choose another name or"
    ):
        write(file, "codec", {}, {})
    assert file.read_bytes() == before
    write(file, "codec", {"name": "new"}, {}, overwrite=True)
    assert read(file).about == {"name": "new"}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("a", np.zeros((5, 2), np.uint8), "more rows for a than were announced"),
        ("a", np.zeros((3, 2), np.uint8), r"not all rows of b, a were written"),
        ("a", np.zeros((8, 1), np.uint8), "a was announced as uint8 of shape"),
        ("a", np.zeros((4, 2), np.float32), "a was announced as uint8 of shape"),
        ("b", np.zeros((3, 1), np.float32), "b was announced as float32 of shape"),
        ("b", np.zeros(3, np.float64), "b was announced as float32 of shape"),
    ],
)
def test_other_rows_than_announced_are_refused(
    tmp_path: Path, name: str, rows: np.ndarray, says: str
) -> None:
    with (
        pytest.raises(ValueError, match=says),
        Writer(tmp_path / "file.fewbits", "codec", {}, SHAPES) as writer,
    ):
        writer.write(name, rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["taken/new.fewbits", "taken/deep/new.fewbits", "folder"])
def test_impossible_places_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FewbitsError, match="cannot write "):
        write(tmp_path / place, "codec", {}, {}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "file.fewbits"):
        with pytest.raises(FewbitsError, match=r"cannot write .*File name too long"):
            write(path, "codec", {}, {})
        with pytest.raises(FewbitsError, match=r"cannot read .*File name too long"):
            read(path)


def test_header_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "HEADER_LIMIT", 2000)
    write(tmp_path / "small", "codec", {"parts": ["a"] * 100}, {})
    with pytest.raises(FewbitsError, match="at most 2,000 can be read back"):
        write(tmp_path / "large", "codec", {"parts": ["a"] * 1000}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# -- a full disk ---------------------------------------------------------------------------


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def small_disk(size: int) -> Callable[..., Any]:
    """What stands in for `open` on a disk that holds so many bytes."""

    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > size:
                raise no_space()
            return super().write(data)

    return lambda path, mode: Full(io.FileIO(path, mode))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("size", [0, 100, 4000, 12000])
def test_full_disk_takes_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, existing: bool
) -> None:
    # Full at the header, at the first array, at the second, and not at all.
    arrays = {name: np.zeros(5000, np.uint8) for name in "ab"}
    path = tmp_path / "file.fewbits"
    if existing:
        path.write_text("old")
    monkeypatch.setattr(container, "open", small_disk(size), raising=False)
    if size < 12000:
        with pytest.raises(FewbitsError, match=r"disk is full while writing .*; free some space"):
            write(path, "codec", {}, arrays, overwrite=True)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == (
            [("file.fewbits", "old")] if existing else []
        )
    else:
        write(path, "codec", {}, arrays, overwrite=True)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (no_space(), "the disk is full while writing .*small.fewbits; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full while writing"),
        (OSError(errno.EIO, "Input/output error"), "cannot write .*small.fewbits: Input/output"),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_disk_that_fails_at_the_end_keeps_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: OSError, says: str
) -> None:
    before = file.read_bytes()

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(FewbitsError, match=says):
        write(file, "codec", {}, {"a": np.zeros(3)}, overwrite=True)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before


# -- damage --------------------------------------------------------------------------------


def test_file_cut_short_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    cut = file.with_name("cut.fewbits")
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        says = refusal(cut)
        if length < 8:
            assert says.endswith("is not a .fewbits file")
        elif length < len(whole) - 23:
            assert says.endswith("is not a .fewbits file, or it is cut short")
        else:
            assert "is cut short or has bytes left over" in says


def test_bytes_left_over_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    assert "is cut short or has bytes left over; copy or encode it again" in refusal(file)


@pytest.mark.parametrize("name", ["a", "b"])
def test_changed_array_is_refused_by_name(file: Path, name: str) -> None:
    header, body = parse(file)
    whole = bytearray(file.read_bytes())
    whole[len(whole) - len(body) + header[name]["data_offsets"][0]] ^= 1
    file.write_bytes(whole)
    assert f"is damaged: array '{name}' does not match its digest" in refusal(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 100,
        b"a text of some length, which is no collection",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 1) + b"{",
        struct.pack("<Q", HEADER_LIMIT + 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 3) + b'"a"',
        struct.pack("<Q", 4) + b"{\xff}\0",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 120_000) + b'{"a":' * 24_000,
        struct.pack("<Q", 10_005) + b'{"a":' + b"9" * 10_000,
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.fewbits").write_bytes(content)
    assert "is not a .fewbits file" in refusal(tmp_path / "other.fewbits")


def test_header_that_is_longer_than_the_file_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in (len(whole) - 7, len(whole), HEADER_LIMIT):
        file.write_bytes(struct.pack("<Q", length) + whole[8:])
        assert refusal(file).endswith("is not a .fewbits file, or it is cut short")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"version": "1"}])
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path, metadata)
    assert refusal(path).endswith("(a safetensors file of another kind?)")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "missing.fewbits")
    assert "cannot read" in refusal(tmp_path)


# -- files with right digests, but wrong otherwise -----------------------------------------


def test_rewritten_file_is_read(file: Path) -> None:
    """Or else the tests that follow would show nothing."""
    content = read(rewrite(file, lambda header: None))
    assert content.arrays["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2", "has format version 2, this fewbits reads up to 1; upgrade fewbits"),
        ("10", "has format version 10, this"),
        ("9" * 5000, "has format version 999999999, this fewbits reads up to 1"),
        ("0", "is damaged: its header is malformed"),
        ("01", "is damaged: its header is malformed"),
        ("1.0", "is damaged: its header is malformed"),
        ("-1", "is damaged: its header is malformed"),
        ("²", "is damaged: its header is malformed"),
        ("", "is damaged: its header is malformed"),
    ],
)
def test_only_the_version_known_is_read(file: Path, version: str, says: str) -> None:
    assert says in refusal(rewrite(file, lambda h: h["__metadata__"].update(version=version)))


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.pop("about"),
        lambda metadata: metadata.pop("version"),
        lambda metadata: metadata.pop("kind"),
        lambda metadata: metadata.update(kind="index"),
        lambda metadata: metadata.update(kind=1),
        lambda metadata: metadata.update(about={}),
        lambda metadata: metadata.update(version=1),
        lambda metadata: metadata.update(more=None),
        lambda metadata: metadata.update(about="[]"),
        lambda metadata: metadata.update(about="{"),
        lambda metadata: metadata.update(about='{"a":1,"a":1}'),
        lambda metadata: metadata.update(about="{" * 10_000),
        lambda metadata: metadata.update(about=""),
    ],
)
def test_malformed_metadata_is_refused(
    file: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    assert "damaged" in refusal(rewrite(file, lambda header: change(header["__metadata__"])))


@pytest.mark.parametrize("digests", ["{}", '{"a":"0"}', "[]", '{"a":1,"b":2}', '{"a":null}', ""])
def test_wrong_digests_are_refused(file: Path, digests: str) -> None:
    header, body = parse(file)
    header["__metadata__"]["sha256"] = digests
    header["__metadata__"]["digest"] = digest_of(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert "damaged" in refusal(file)
    # And where only the digest of the header is wrong.
    header["__metadata__"]["digest"] = "0" * 64
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert "its header does not match its digest" in refusal(file)


def offsets(**places: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    """Places the arrays of bytes elsewhere."""

    def change(header: dict[str, Any]) -> None:
        for name, (begin, end) in places.items():
            size = max(end - begin, 0)
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, end]}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (offsets(a=(0, 12), b=(11, 23)), "its arrays overlap or leave gaps"),
        (offsets(a=(0, 23), b=(0, 23)), "its arrays overlap or leave gaps"),
        (offsets(a=(0, 23), b=(5, 5)), "its arrays overlap or leave gaps"),
        (offsets(a=(0, 10), b=(11, 23)), "its arrays overlap or leave gaps"),
        (offsets(a=(1, 11), b=(11, 23)), "its arrays overlap or leave gaps"),
        (offsets(a=(0, 11), b=(11, 22)), "is cut short or has bytes left over"),
        (offsets(a=(0, 11), b=(11, 24)), "is cut short or has bytes left over"),
        (offsets(a=(11, 0), b=(0, 23)), "array 'a' is malformed"),
        (offsets(a=(-11, 0), b=(0, 23)), "array 'a' is malformed"),
        (offsets(a=(0, 2**62), b=(0, 23)), "array 'a' is malformed"),
    ],
)
def test_overlapping_and_gapped_arrays_are_refused(
    file: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    assert says in refusal(rewrite(file, change))


def test_empty_arrays_may_lie_between_others(file: Path) -> None:
    content = read(rewrite(file, offsets(c=(12, 12), d=(0, 0), e=(23, 23))))
    sizes = {name: len(array) for name, array in content.arrays.items()}
    assert sizes == {"d": 0, "b": 3, "c": 0, "a": 11, "e": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": "u8"},
        {"dtype": None},
        {"dtype": ["U8"]},
        {"shape": [12]},
        {"shape": [-11]},
        {"shape": [-1, -11]},
        {"shape": [11.0]},
        {"shape": [True, 11]},
        {"shape": "11"},
        {"shape": 11},
        {"shape": None},
        {"shape": {"11": 0}},
        {"shape": [1] * 8 + [11]},
        {"shape": [2**62, 2**62]},
        {"shape": [10**400]},
        {"data_offsets": [12]},
        {"data_offsets": [12, 23, 23]},
        {"data_offsets": [12.0, 23.0]},
        {"data_offsets": ["12", "23"]},
        {"data_offsets": None},
        {"more": 1},
        {"more": json.loads("[" * 900 + "]" * 900)},
    ],
)
def test_malformed_arrays_are_refused(file: Path, change: dict[str, Any]) -> None:
    header, body = parse(file)
    assert header["a"]["data_offsets"] == [12, 23]
    header["a"].update(change)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert "is damaged: array 'a' is malformed" in refusal(file)


@pytest.mark.parametrize("entry", [None, [], "U8", 3, {}])
def test_entries_that_are_none_are_refused(file: Path, entry: Any) -> None:
    assert "array 'c' is malformed" in refusal(rewrite(file, lambda h: h.update(c=entry)))


def test_name_that_stands_twice_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    assert whole.count(b'"b":{') == 1
    file.write_bytes(whole.replace(b'"b":{', b'"a":{'))
    assert "is not a .fewbits file, or it is damaged" in refusal(file)
    file.write_bytes(whole.replace(b'"version":', b'"format" :'))
    assert "is not a .fewbits file, or it is damaged" in refusal(file)


@pytest.mark.parametrize(
    "shape", [[0, 2**40], [2**20, 0, 2**20], [0] + [600] * 7, [600] * 7 + [0], [2**40], [600] * 7]
)
def test_huge_shapes_take_no_memory(file: Path, shape: list[int]) -> None:
    """A shape with a 0 in it has no bytes, whatever the rest of it claims."""

    def change(header: dict[str, Any]) -> None:
        header["c"] = {"dtype": "F64", "shape": shape, "data_offsets": [23, 23]}

    path = rewrite(file, change)
    tracemalloc.start()
    try:
        assert "array 'c' is malformed" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_many_small_arrays_need_no_mapping_each(tmp_path: Path) -> None:
    count = 2000
    arrays = {f"array.{number}": np.array([number % 256], np.uint8) for number in range(count)}
    path = write(tmp_path / "many.fewbits", "codec", {}, arrays)
    before = len(Path("/proc/self/maps").read_text().splitlines()) if os.name == "posix" else 0
    content = read(path)
    assert content.arrays["array.1999"].tolist() == [1999 % 256]
    if before:
        assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 100
