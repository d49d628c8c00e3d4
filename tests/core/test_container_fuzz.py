"""Thousands of damaged and hostile .fewbits files: the same content, or one clear error."""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewbits
from fewbits.core import container
from fewbits.core.codec import state_digest
from fewbits.core.collection import Encoded
from fewbits.core.errors import FewbitsError

# A warning would be noise on the terminal of whoever opens such a file.
pytestmark = pytest.mark.filterwarnings("error")

ROWS, DIMS = 256, 8
SPECS = (
    "float16",
    "int8",
    "sign",
    "pq:bytes=2",
    "rabitq:bits=2",
    "turboquant:bits=3",
    "lsh:bits=12",
    "additive-bits:bytes=1",
    "pca-rag:dims=3,dtype=float16",
    "pca-rag:dims=5+pca-rag:dims=3+int8",
)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIMS)).astype(np.float32)


@pytest.fixture(scope="module")
def files(x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small genuine file of each codec: it was learned from all rows, but holds nine."""
    folder = tmp_path_factory.mktemp("genuine")
    made = {}
    for spec in SPECS:
        codec = fewbits.from_spec(spec).fit(x)
        made[spec] = folder / f"{spec}.fewbits"
        fewbits.encode(x[:9], made[spec], method=codec)
    return made


def content(encoded: Encoded) -> Any:
    """Everything that a file says, to compare."""
    (code,) = encoded.parts
    arrays = {name: (array.dtype, array.tolist()) for name, array in code.arrays.items()}
    codec = encoded.codec
    return arrays, codec.full_spec, codec.digest, codec.dims_, encoded.metric, encoded.source


def opened(path: Path) -> Encoded | None:
    """The collection in a file; None where it is refused, in one line."""
    try:
        return fewbits.load(path)
    except FewbitsError as error:
        line = str(error)
    assert line
    assert "\n" not in line
    return None


# -- damage --------------------------------------------------------------------------------


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """One to three random changes of a file."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Half of the changes hit the header and what it says of lengths.
        place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 900))
        length = min(rng.choice((1, 1, 2, 8, 60)), len(data) - place)
        span = data[place : place + length]
        other = rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice(b'0123456789-.,:"{}[]\\ eE\0\xff')
        elif kind == 2:
            data[place:place] = rng.randbytes(length)
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            data[other:other] = span
        elif kind == 6:
            data[other : other + length] = span
        else:
            data[place : place + length] = bytes(length)
        data = data or bytearray(b"\0")
    return bytes(data)


def survives(path: Path, data: bytes, genuine: Any) -> bool:
    """Whether damaged bytes load; if they do, then as the genuine content."""
    path.write_bytes(data)
    encoded = opened(path)
    assert encoded is None or content(encoded) == genuine
    return encoded is not None


@pytest.mark.parametrize("spec", ["sign", "pca-rag:dims=5+pca-rag:dims=3+int8"])
def test_random_damage_is_noticed(files: dict[str, Path], tmp_path: Path, spec: str) -> None:
    whole, genuine = files[spec].read_bytes(), content(fewbits.load(files[spec]))
    rng = random.Random(spec)
    path = tmp_path / "damaged.fewbits"
    alive = sum(survives(path, damaged(whole, rng), genuine) for _ in range(1000))
    assert alive < 60  # such as a zero where a zero was


def test_damage_to_any_byte_is_noticed(files: dict[str, Path], tmp_path: Path) -> None:
    whole, genuine = files["int8"].read_bytes(), content(fewbits.load(files["int8"]))
    rng = random.Random(0)
    path = tmp_path / "damaged.fewbits"
    for place in range(len(whole)):
        changed = bytes([whole[place] ^ 1 << rng.randrange(8)])
        assert not survives(path, whole[:place] + changed + whole[place + 1 :], genuine)


def test_header_written_otherwise_is_the_same_file(files: dict[str, Path], tmp_path: Path) -> None:
    whole, genuine = files["int8"].read_bytes(), content(fewbits.load(files["int8"]))
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip() + b"\n\t "
    data = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    assert survives(tmp_path / "spaced.fewbits", data, genuine)


# -- hostile files: every digest is right --------------------------------------------------

Forged = tuple[dict[str, Any], dict[str, np.ndarray]]


def forge(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a file whose digests are all right, whatever it says."""
    learned = {name: array for name, array in arrays.items() if not name.startswith("code.")}
    about["codec"]["digest"] = state_digest(about["codec"]["spec"], about["codec"]["dims"], learned)
    container.write(path, "encoded", about, arrays, overwrite=True)


def check_hostile(path: Path, queries: np.ndarray) -> bool:
    """Whether a forged file loads; if it does, then as a collection that fits together."""
    encoded = opened(path)
    if encoded is None:
        return False
    asked = np.resize(queries, (2, encoded.codec.dims_))
    with np.errstate(all="ignore"):  # codes may hold any number
        decoded, (scores, rows) = encoded.decode(), encoded.search(asked, 1)
    assert (decoded.shape, decoded.dtype) == ((len(encoded), encoded.codec.dims_), np.float32)
    assert scores.shape == rows.shape == (2, 1)
    assert ((0 <= rows) & (rows < len(encoded))).all()
    assert encoded.nbytes == sum(array.nbytes for array in encoded.parts[0].arrays.values())
    return True


def other_shape(array: np.ndarray, rng: random.Random) -> np.ndarray:
    changes: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a[:0],
        lambda a: a[:1],
        lambda a: a[:-1],
        lambda a: np.concatenate([a, a]),
        lambda a: np.resize(a, (1000, *a.shape[1:])),
        lambda a: a[..., :1],
        lambda a: np.concatenate([a, a], axis=-1),
        lambda a: a[..., None],
        lambda a: a[None],
        lambda a: a.reshape(-1),
        lambda a: a.T,
        lambda a: np.resize(a, ()),
    ]
    return rng.choice(changes)(array) if array.ndim else array[None]


def other_values(array: np.ndarray, rng: random.Random) -> np.ndarray:
    changed = array.copy().reshape(-1)
    if changed.size:
        values = [0, 1, 99] if array.dtype.kind in "bui" else [0, -1, 6e4, np.nan, np.inf]
        changed[rng.randrange(changed.size)] = rng.choice(values)
    return changed.reshape(array.shape)


def other_type(array: np.ndarray, rng: random.Random) -> np.ndarray:
    kinds = ("u1", "i1", "i8", "f2", "f4", "f8", "?")
    with np.errstate(all="ignore"):  # not every number fits into every type
        return np.asarray(array.astype(rng.choice(kinds)))


def change_array(arrays: dict[str, np.ndarray], rng: random.Random) -> None:
    name = rng.choice(list(arrays))
    how = rng.randrange(6)
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[rng.choice(("code.more", "0.more", "9.mean", "more"))] = arrays[name]
    elif how == 2:
        arrays[name] = arrays[rng.choice(list(arrays))]
    else:
        arrays[name] = (other_shape, other_values, other_type)[how - 3](arrays[name], rng)


def change_words(about: dict[str, Any], rng: random.Random) -> None:
    codec, source = about["codec"], about["source"]
    number = rng.choice((0, 1, 2, 3, 4, 7, 8, 9, 255, -1, 2**40, 10**30))
    value: Any = rng.choice((number, float("inf"), float("nan"), None, "word", [], {}, True))
    how = rng.randrange(6)
    if how == 0:
        codec["dims"] = rng.choice(([number], [*codec["dims"], number], codec["dims"][1:]))
    elif how == 1:
        codec["dims"] = [*codec["dims"][:-1], number]
    elif how == 2:
        head, equals, tail = codec["spec"].rpartition("=")
        codec["spec"] = f"{head}{equals}{value}" if head else f"{tail}:seed={value}"
    elif how == 3:
        codec["spec"] = rng.choice(SPECS) if rng.random() < 0.5 else codec["spec"] + "+int8"
    elif how == 4 and isinstance(source, dict) and source:
        source[rng.choice(list(source))] = value
    else:
        about[rng.choice(("metric", "source"))] = value


@pytest.mark.parametrize("spec", SPECS)
def test_hostile_files_are_refused_or_fit_together(
    files: dict[str, Path], x: np.ndarray, tmp_path: Path, spec: str
) -> None:
    genuine = container.read(files[spec])
    rng = random.Random(spec)
    path = tmp_path / "hostile.fewbits"
    forge(path, copy.deepcopy(genuine.about), dict(genuine.arrays))
    assert check_hostile(path, x)
    refused = 0
    for _ in range(80):
        about, arrays = copy.deepcopy(genuine.about), dict(genuine.arrays)
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.6 and arrays:
                change_array(arrays, rng)
            else:
                change_words(about, rng)
        forge(path, about, arrays)
        refused += not check_hostile(path, x)
    assert 20 <= refused < 80


def codes(rows: int, width: int) -> dict[str, np.ndarray]:
    return {"code.codes": np.zeros((rows, width), np.uint8)}


@pytest.mark.parametrize(
    ("spec", "dims", "arrays"),
    [
        ("float16", [2**22], codes(9, 16)),
        ("float16", [2**22 + 1], codes(9, 16)),
        ("float16", [2**62], codes(9, 16)),
        ("float16", [10**30], codes(9, 16)),
        ("pca-rag+float16", [8, 2**40], codes(9, 16)),
        ("pq:bytes=1000000000000,seed=0", [8], codes(9, 16)),
        ("pq:bytes=0,seed=0", [8], codes(9, 0) | {"0.centroids": np.zeros((0, 256, 1), "f4")}),
        ("lsh:bits=1000000000000,seed=0", [8], codes(9, 16)),
        ("muvera:repetitions=1000000000", [8], codes(9, 16)),
        ("muvera:bits=60", [8], codes(9, 16) | {"0.centres": np.zeros((0, 32, 8), "f4")}),
        ("muvera:final_dims=10000000000", [8], {"0.centres": np.zeros((0, 32, 8), "f4")}),
    ],
)
def test_huge_claims_take_little_memory(
    tmp_path: Path, spec: str, dims: list[int], arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "huge.fewbits"
    source = {"name": "x", "rows": 9, "dims": dims[0], "dtype": "float32", "bytes_per_item": 4.0}
    codec = {"spec": spec, "dims": dims}
    forge(path, {"codec": codec, "metric": "ip", "source": source}, arrays)
    tracemalloc.start()
    try:
        with pytest.raises(FewbitsError):
            fewbits.load(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        {"bytes_per_item": 10**400},
        {"bytes_per_item": "many"},
        {"bytes_per_item": float("nan")},
        {"bytes_per_item": 0},
        {"name": 3},
        {"rows": 10},
        {"rows": None},
        {"dims": 9},
    ],
)
def test_source_that_does_not_fit_is_refused(
    files: dict[str, Path], tmp_path: Path, source: dict[str, Any]
) -> None:
    genuine = container.read(files["int8"])
    about = copy.deepcopy(genuine.about)
    about["source"].update(source)
    forge(tmp_path / "forged.fewbits", about, dict(genuine.arrays))
    with pytest.raises(FewbitsError, match="is damaged: it does not"):
        fewbits.load(tmp_path / "forged.fewbits")
