"""The contract of codecs: fit, encode, decode, search, chain, save and load, and spec strings."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core import codec as codec_module
from fewbits.core import container
from fewbits.core.catalogue import codecs
from fewbits.core.code import Code
from fewbits.core.codec import (
    MOST_DIMS,
    SPEC_LIMIT,
    Codec,
    Transform,
    chain,
    describe,
    format_spec,
    from_spec,
    hyper_parameters,
    learned,
    pack_state,
    stage_dims,
    state_digest,
)
from fewbits.core.errors import FewbitsError
from fewbits.primitives.ragged import Ragged
from fewbits.vectors.baselines import PQ, Float16, Int8, Sign
from fewbits.vectors.muvera import MUVERA
from fewbits.vectors.pca_rag import PCARAG

ROWS, DIMS = 300, 16
SPECS = [
    "float16",
    "int8",
    "sign",
    "pq:bytes=2",
    "opq:bytes=2,dims=8,rounds=1",
    "rabitq:bits=2",
    "turboquant:bits=3",
    "lsh:bits=20",
    "itq:bits=12",
    "additive-bits:bytes=2",
    "pca-rag:dims=6",
    "pca-rag:dims=6+int8",
    "muvera:repetitions=2,bits=1,projection_dims=4,partition=kmeans",
]


@dataclass
class Shift(Transform):
    """Adds a number."""

    name: ClassVar[str] = "shift"
    by: float = 1.0

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x + np.float32(self.by)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return y - np.float32(self.by)


@dataclass
class Scale(Transform):
    """Multiplies with a number."""

    name: ClassVar[str] = "scale"
    by: float = 2.0

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x * np.float32(self.by)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return y / np.float32(self.by)


@dataclass
class Picky(Codec):
    """Learns in two steps, and fails between them when it is told to."""

    name: ClassVar[str] = "picky"
    fails: bool = False

    first_: np.ndarray = learned()
    second_: np.ndarray = learned()

    def _fit(self, x: np.ndarray) -> None:
        self.first_ = x[0]
        if self.fails:
            raise FewbitsError("picky does not like these rows")
        self.second_ = x[1]

    def _encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"rows": x}

    def _decode(self, code: Code) -> np.ndarray:
        return code["rows"]


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Rows whose dimensions vary by very different amounts, around a mean that is not 0."""
    spread = np.geomspace(4, 0.1, DIMS)
    return (np.random.default_rng(0).standard_normal((ROWS, DIMS)) * spread + 0.3).astype("f4")


@pytest.fixture(scope="module")
def queries(x: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal((7, DIMS))
    return (x[:7] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(x: np.ndarray) -> Callable[[str], Codec]:
    """Gives the fitted codec of a spec string; each is fitted once."""
    made: dict[str, Codec] = {}

    def fit(spec: str) -> Codec:
        if spec not in made:
            codec = from_spec(spec)
            made[spec] = codec.fit(items(codec, x))
        return made[spec]

    return fit


def items(codec: Codec, x: np.ndarray) -> Any:
    """`x` as the codec takes it: every two rows make a set where it takes sets."""
    return Ragged(x, np.arange(0, len(x) + 1, 2)) if codec.takes == "sets" else x


# -- fit, encode, decode -------------------------------------------------------------------


def test_fit_returns_the_codec_and_decode_gives_the_vectors_back(x: np.ndarray) -> None:
    codec = Int8()
    assert codec.fit(x) is codec
    code = codec.encode(x)
    assert (len(code), code.spec, code.codec_digest) == (ROWS, "int8", codec.digest)
    decoded = codec.decode(code)
    assert (decoded.shape, decoded.dtype) == (x.shape, np.float32)
    # Half of one of 255 steps over the range of each dimension.
    assert (np.abs(decoded - x) <= 0.51 / 255 * np.ptp(x, axis=0)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8"])
def test_every_kind_of_number_is_taken(x: np.ndarray, dtype: str) -> None:
    numbers = (10 * np.abs(x)).astype(dtype)
    assert Float16().fit(numbers).decode(Float16().fit(numbers).encode(numbers)).dtype == "f4"
    again = Float16().fit(numbers).encode(np.asfortranarray(numbers))
    assert np.array_equal(again["codes"], Float16().fit(numbers).encode(numbers)["codes"])


@pytest.mark.parametrize("spec", SPECS)
def test_code_of_a_row_does_not_depend_on_its_batch(
    fitted: Callable[[str], Codec], x: np.ndarray, spec: str
) -> None:
    codec = fitted(spec)
    together = codec.encode(items(codec, x[:40]))
    alone = [codec.encode(items(codec, x[start : start + 2])) for start in (0, 10, 38)]
    for start, code in zip((0, 10, 38), alone, strict=True):
        first = start // 2 if codec.takes == "sets" else start
        for name, array in together.take(slice(first, first + len(code))).arrays.items():
            assert array.dtype == code[name].dtype
            # Floats may differ in their last bit, because sums are added up in another order.
            close = 1e-5 if array.dtype.kind == "f" else 0
            np.testing.assert_allclose(code[name], array, rtol=close, atol=close)


@pytest.mark.parametrize("spec", SPECS)
def test_fitting_again_gives_the_same_codec(
    fitted: Callable[[str], Codec], x: np.ndarray, spec: str
) -> None:
    again = from_spec(spec)
    assert again.fit(items(again, x)).digest == fitted(spec).digest


@pytest.mark.parametrize("spec", SPECS)
def test_layout_is_that_of_the_code(
    fitted: Callable[[str], Codec], x: np.ndarray, spec: str
) -> None:
    codec = fitted(spec)
    code = codec.encode(items(codec, x))
    layout = {name: (array.dtype.name, array.shape[1:]) for name, array in code.arrays.items()}
    assert codec.code_layout() == layout


def test_codec_can_be_fitted_again_on_another_width(x: np.ndarray) -> None:
    for codec in (Int8(), chain(PCARAG(dims=3), Int8())):
        codec.fit(x).fit(x[:, :5])
        assert codec.dims_ == 5
        assert codec.decode(codec.encode(x[:, :5])).shape == (ROWS, 5)


def test_fit_that_fails_leaves_no_half_fitted_codec(x: np.ndarray) -> None:
    codec = Picky().fit(x)
    codec.fails = True
    with pytest.raises(FewbitsError, match="does not like"):
        codec.fit(x)
    with pytest.raises(FewbitsError, match=r"picky:fails=yes is not fitted yet; call fit\(x\)"):
        codec.encode(x)
    quantizer = PQ(bytes=4)
    with pytest.raises(FewbitsError, match="at least 256 rows"):
        quantizer.fit(x[:100])
    with pytest.raises(FewbitsError, match="not fitted yet"):
        quantizer.encode(x)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int8", "pca-rag+int8"])
def test_unfitted_codec_says_so(x: np.ndarray, tmp_path: Path, spec: str) -> None:
    codec, code = from_spec(spec), Int8().fit(x).encode(x)
    uses: list[Callable[[], Any]] = [
        lambda: codec.encode(x),
        lambda: codec.decode(code),
        lambda: codec.search(code, x[:2], 3),
        lambda: codec.save(tmp_path / "codec.fewbits"),
        lambda: codec.state(),
        lambda: codec.digest,
        lambda: codec.codec_bytes,
    ]
    for use in uses:
        with pytest.raises(FewbitsError, match=r"not fitted yet; call fit\(x\) first"):
            use()
    assert list(tmp_path.iterdir()) == []


def spoiled(x: np.ndarray, value: float) -> np.ndarray:
    copy = x.copy()
    copy[7, 3] = value
    return copy


BAD_INPUT: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "width": (lambda x: x[:, :5], "int8 was fitted on 16 dimensions, but this has 5"),
    "nan": (lambda x: spoiled(x, np.nan), "row 7 of the input has NaN"),
    "infinity": (lambda x: spoiled(x, -np.inf), "row 7 of the input has NaN, infinity"),
    "empty": (lambda x: x[:0], "the input is empty: 0 rows of 16 dimensions"),
    "no width": (lambda x: x[:, :0], "the input is empty: 300 rows of 0 dimensions"),
    "cube": (lambda x: x.reshape(30, 10, DIMS), "2 axes .items, dimensions., not 3"),
    "row": (lambda x: x[0], "2 axes .items, dimensions., not 1"),
    "whole": (lambda x: x.astype(np.int64), "dtype int64; convert it to one of float16"),
    "complex": (lambda x: x.astype(np.complex64), "dtype complex64"),
    "sets": (lambda x: Ragged(x, np.array([0, ROWS])), "takes vectors, but these are sets"),
    "nothing": (lambda x: None, "2 axes"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(
    fitted: Callable[[str], Codec], x: np.ndarray, name: str
) -> None:
    spoil, says = BAD_INPUT[name]
    codec, code = fitted("int8"), fitted("int8").encode(x)
    uses: list[Callable[[Any], Any]] = [
        codec.encode,
        lambda bad: codec.search(code, bad, 3),
    ]
    # Another width is only bad for a codec that is fitted.
    uses += [Int8().fit, chain(PCARAG(), Int8()).fit] if name != "width" else []
    for use in uses:
        with pytest.raises(FewbitsError, match=says) as caught:
            use(spoil(x))
        assert "\n" not in str(caught.value)


def test_vectors_are_no_sets(x: np.ndarray) -> None:
    with pytest.raises(FewbitsError, match="must be sets of vectors"):
        MUVERA().fit(x)


def test_rows_wider_than_a_block_are_refused(x: np.ndarray) -> None:
    with pytest.raises(FewbitsError, match="at most 4,194,304 dimensions, not 4,194,305"):
        Float16().fit(np.zeros((1, MOST_DIMS + 1), dtype=np.int8))


@pytest.mark.parametrize("k", [0, -1, 1.5, True, ROWS + 1])
def test_impossible_numbers_of_matches_are_refused(
    fitted: Callable[[str], Codec], x: np.ndarray, k: Any
) -> None:
    codec = fitted("int8")
    with pytest.raises(FewbitsError, match="k"):
        codec.search(codec.encode(x), x[:2], k)


def test_unknown_metric_is_refused(fitted: Callable[[str], Codec], x: np.ndarray) -> None:
    codec = fitted("int8")
    for use in (codec.searcher, lambda code, metric: codec.search(code, x[:2], 3, metric)):
        with pytest.raises(FewbitsError, match="unknown metric 'dot'; choose one of cosine, ip"):
            use(codec.encode(x), "dot")


# -- digest --------------------------------------------------------------------------------


def test_digest_changes_with_all_that_decoding_needs(x: np.ndarray) -> None:
    digests = [
        PQ(bytes=4).fit(x).digest,
        PQ(bytes=4, seed=1).fit(x).digest,
        PQ(bytes=2).fit(x).digest,
        PQ(bytes=4).fit(x[:280]).digest,
        Float16().fit(x).digest,  # learns nothing but the width
        Float16().fit(x[:, :8]).digest,
        Int8().fit(x).digest,
        chain(PCARAG(dims=16), Int8()).fit(x).digest,
        chain(PCARAG(dims=16, center=False), Int8()).fit(x).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_digest_sees_every_bit_of_a_learned_array(x: np.ndarray) -> None:
    codec = Int8().fit(x)
    before = codec.digest
    assert before == Int8().fit(x).digest
    codec.range_ = codec.range_.copy()
    codec.range_[1, 3] = np.nextafter(codec.range_[1, 3], np.float32(9))
    assert codec.digest != before


def test_codec_refuses_the_code_of_another(x: np.ndarray) -> None:
    code = Float16().fit(x[:, :8]).encode(x[:, :8])
    for other in (Float16().fit(x), Float16().fit(x[:, :4]), Int8().fit(x[:, :8])):
        for use in (other.decode, other.searcher):
            with pytest.raises(FewbitsError, match=r"made by another codec \(float16\); decode it"):
                use(code)


# -- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_loaded_codec_makes_the_same_codes_bit_for_bit(
    fitted: Callable[[str], Codec], x: np.ndarray, tmp_path: Path, spec: str
) -> None:
    codec = fitted(spec)
    assert codec.save(tmp_path / "codec.fewbits") == tmp_path / "codec.fewbits"
    loaded = Codec.load(tmp_path / "codec.fewbits")
    assert type(loaded) is type(codec)
    assert (loaded.digest, loaded.full_spec) == (codec.digest, codec.full_spec)
    assert (loaded.codec_bytes, stage_dims(loaded)) == (codec.codec_bytes, stage_dims(codec))
    code, again = (one.encode(items(codec, x)) for one in (codec, loaded))
    assert code.arrays.keys() == again.arrays.keys()
    assert all(np.array_equal(code[name], again[name]) for name in code.arrays)
    if codec.takes == "vectors":
        assert np.array_equal(codec.decode(code), loaded.decode(code))


def test_load_asks_for_the_right_class(x: np.ndarray, tmp_path: Path) -> None:
    path = Int8().fit(x).save(tmp_path / "codec.fewbits")
    assert isinstance(Int8.load(path), Int8)
    with pytest.raises(FewbitsError, match="holds int8, not a PQ"):
        PQ.load(path)
    with pytest.raises(FewbitsError, match="exists already"):
        Int8().fit(x).save(path)
    Sign().fit(x).save(path, overwrite=True)
    assert isinstance(Codec.load(path), Sign)


def test_loaded_codec_that_is_changed_is_another(x: np.ndarray, tmp_path: Path) -> None:
    loaded = PCARAG.load(PCARAG(dims=6).fit(x).save(tmp_path / "codec.fewbits"))
    code, before = loaded.encode(x), loaded.digest
    loaded.scoring = "reduced"
    assert loaded.digest != before
    with pytest.raises(FewbitsError, match="made by another codec"):
        loaded.decode(code)
    again = PCARAG.load(loaded.save(tmp_path / "changed.fewbits"))
    assert (again.scoring, again.digest) == ("reduced", loaded.digest)


def forge(path: Path, codec: Codec, arrays: dict[str, np.ndarray], **about: Any) -> Path:
    """A codec file whose digests are right, whatever it says."""
    about = {"spec": codec.full_spec, "dims": stage_dims(codec)} | about
    try:
        digest = state_digest(codec.full_spec, about["dims"], arrays)
    except TypeError:  # what JSON cannot hold
        digest = ""
    return container.write(path, "codec", {"codec": {"digest": digest} | about}, arrays)


def misfits(array: np.ndarray) -> dict[str, np.ndarray]:
    """What might stand in a file in place of `array`, and does not fit."""
    found = {
        "longer": np.concatenate([array, array, array[:1]]),
        "axis": array[None],
        "scalar": array.reshape(-1)[0] if array.size else np.zeros((), array.dtype),
        "none": array[:0],
    }
    found = {name: other for name, other in found.items() if other.shape != array.shape}
    if array.dtype.kind == "f" and array.size:
        found["nan"] = array.copy()
        found["nan"].reshape(-1)[-1] = np.nan
    return found


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "float16"])
def test_learned_arrays_that_do_not_fit_are_refused(
    fitted: Callable[[str], Codec], tmp_path: Path, spec: str
) -> None:
    codec = fitted(spec)
    arrays = pack_state(codec)
    assert Codec.load(forge(tmp_path / "whole.fewbits", codec, arrays)).digest == codec.digest
    for name, array in arrays.items():
        rest = {other: arrays[other] for other in arrays if other != name}
        forged = {"left-out": rest}
        forged |= {kind: rest | {name: other} for kind, other in misfits(array).items()}
        for kind, state in forged.items():
            path = forge(tmp_path / f"{name}-{kind}.fewbits", codec, state)
            with pytest.raises(FewbitsError, match="does not hold a usable codec"):
                Codec.load(path)


@pytest.mark.parametrize(
    "dims", [[8], [16, 16], [], [0], [-16], [16.0], [True], ["16"], [10**12], None, "16", 16]
)
def test_widths_that_do_not_fit_are_refused(x: np.ndarray, tmp_path: Path, dims: Any) -> None:
    codec = Int8().fit(x)
    path = forge(tmp_path / "codec.fewbits", codec, pack_state(codec), dims=dims)
    with pytest.raises(FewbitsError, match="does not hold a usable codec"):
        Codec.load(path)


def test_endless_width_is_refused(x: np.ndarray, tmp_path: Path) -> None:
    path = forge(tmp_path / "codec.fewbits", Float16().fit(x), {}, dims=[float("inf")])
    with pytest.raises(FewbitsError, match="widths are not valid"):
        Codec.load(path)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"spec": "sign"}, "does not hold a usable codec"),
        ({"spec": "int8+int8"}, "int8 cannot be followed"),
        ({"spec": "int9"}, "unknown method 'int9'"),
        ({"spec": "think"}, "think"),
        ({"spec": ""}, "the method is empty"),
        ({"spec": "+".join(["pca-rag"] * 100_000)}, "longer than 4096 characters"),
        ({"spec": ["int8"]}, "does not hold a usable codec"),
        ({"spec": None}, "does not hold a usable codec"),
        ({"digest": "0" * 64}, "does not match its digest"),
        ({"digest": None}, "does not match its digest"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    x: np.ndarray, tmp_path: Path, about: dict[str, Any], says: str
) -> None:
    codec = Int8().fit(x)
    path = forge(tmp_path / "codec.fewbits", codec, pack_state(codec), **about)
    with pytest.raises(FewbitsError, match=says) as caught:
        Codec.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("about", [{}, {"codec": None}, {"codec": "int8"}, {"codec": []}])
def test_file_without_a_codec_is_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    path = container.write(tmp_path / "codec.fewbits", "codec", about, {})
    with pytest.raises(FewbitsError, match="does not hold a usable codec"):
        Codec.load(path)


def test_stages_in_a_file_must_fit_together(x: np.ndarray, tmp_path: Path) -> None:
    front, last = PCARAG(dims=6).fit(x), Int8().fit(x)
    arrays = pack_state(front) | {"1.range": last.range_}
    joined = chain(front, last)
    with pytest.raises(FewbitsError, match="int8 was fitted on 16 dimensions, but pca-rag:dims=6"):
        Codec.load(forge(tmp_path / "codec.fewbits", joined, arrays))


@pytest.mark.parametrize(
    "codec",
    [
        PCARAG(dims=typing.cast(Any, np.int64(3)), whiten=typing.cast(Any, 1)),
        PCARAG(dims=3, center=typing.cast(Any, np.bool_(True)), variance=np.float64(0.3)),
    ],
)
def test_numpy_numbers_are_numbers(x: np.ndarray, tmp_path: Path, codec: Codec) -> None:
    path = codec.fit(x).save(tmp_path / "codec.fewbits")
    assert Codec.load(path).digest == codec.digest


def test_only_what_can_be_read_again_is_written(x: np.ndarray, tmp_path: Path) -> None:
    codec = PCARAG(dims=3, center=typing.cast(Any, 1)).fit(x)
    with pytest.raises(FewbitsError, match="center=1 cannot be written to a file; center is"):
        codec.save(tmp_path / "codec.fewbits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["a+b", "a,b", "none", "x" * SPEC_LIMIT])
def test_words_that_would_break_a_spec_are_not_written(x: np.ndarray, word: str) -> None:
    @dataclass
    class Named(Int8):
        device: str | None = None

    with pytest.raises(FewbitsError, match=r"for a file|written to a file"):
        describe(Named(device=word).fit(x))
    assert describe(Named(device="cuda:0").fit(x))["spec"] == "int8:device=cuda:0"


# -- chains --------------------------------------------------------------------------------


def test_chain_goes_through_its_stages_in_order(x: np.ndarray) -> None:
    codec = chain(Shift(1.0), Scale(2.0), Picky()).fit(x)
    assert np.array_equal(codec.encode(x)["rows"], 2 * (x + 1))
    np.testing.assert_allclose(codec.decode(codec.encode(x)), x, atol=1e-5)
    other = chain(Scale(2.0), Shift(1.0), Picky()).fit(x)
    assert np.array_equal(other.encode(x)["rows"], 2 * x + 1)


def test_stages_of_a_chain_are_fitted_on_what_comes_before(x: np.ndarray) -> None:
    front, last = PCARAG(dims=6), Int8()
    codec = chain(front, last).fit(x)
    assert stage_dims(codec) == [DIMS, 6]
    assert list(pack_state(codec)) == [
        "0.mean",
        "0.components",
        "0.variances",
        "0.rows",
        "1.range",
    ]
    alone = Int8().fit(PCARAG(dims=6).fit(x).transform(x))
    assert np.array_equal(last.range_, alone.range_)
    assert codec.codec_bytes == front.codec_bytes + last.codec_bytes
    assert repr(codec).startswith("chain(PCARAG(dims=6")


def test_chain_is_flat_and_one_stage_is_no_chain(x: np.ndarray) -> None:
    nested = chain(Shift(), chain(Scale(), chain(PCARAG(dims=3), Int8())))
    assert [stage.name for stage in nested.stages] == ["shift", "scale", "pca-rag", "int8"]
    assert nested.spec == "shift+scale+pca-rag:dims=3+int8"
    alone = Int8()
    assert chain(alone) is alone
    assert chain(chain(alone)) is alone


def test_transform_may_come_last(x: np.ndarray) -> None:
    codec = chain(Shift(), PCARAG(dims=16)).fit(x)
    np.testing.assert_allclose(codec.decode(codec.encode(x)), x, atol=1e-4)


def test_what_cannot_be_chained_is_refused() -> None:
    with pytest.raises(FewbitsError, match="a chain needs at least one codec"):
        chain()
    with pytest.raises(FewbitsError, match="int8 cannot be followed by another codec"):
        chain(Int8(), Sign())
    with pytest.raises(FewbitsError, match="int8 cannot be followed by another codec"):
        chain(PCARAG(), Int8(), Sign())
    with pytest.raises(FewbitsError, match="muvera takes sets; it can only come first"):
        chain(PCARAG(), MUVERA())
    with pytest.raises(FewbitsError, match="int8 cannot be followed by another codec"):
        from_spec("int8+sign")
    assert chain(MUVERA(), PCARAG(), Int8()).takes == "sets"


def test_stage_that_was_fitted_apart_is_noticed(x: np.ndarray) -> None:
    last = Int8()
    codec = chain(PCARAG(dims=6), last).fit(x)
    last.fit(x)
    with pytest.raises(FewbitsError, match="gives 6; fit the chain again"):
        codec.encode(x)


# -- searching -----------------------------------------------------------------------------

CHAINS = [
    "pca-rag:dims=6+int8",
    "pca-rag:dims=6,center=no+pq:bytes=3",
    "pca-rag:dims=9+pca-rag:dims=5",
    "pca-rag:dims=9,dtype=float16",
    "pca-rag:dims=9,whiten=0.5,scoring=reconstruction+float16",
    "pca-rag:dims=9+pca-rag:dims=5+sign",
]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("spec", CHAINS)
def test_search_through_a_chain_is_exact_among_decoded_vectors(
    fitted: Callable[[str], Codec], x: np.ndarray, queries: np.ndarray, spec: str, metric: str
) -> None:
    codec = fitted(spec)
    code = codec.encode(x)
    if "whiten" in spec and metric == "l2":
        with pytest.raises(FewbitsError, match="cannot be searched by l2"):
            codec.search(code, queries, 5, metric)
        return
    scores, rows = codec.search(code, queries, 5, metric)
    assert (rows.shape, rows.dtype, scores.dtype) == ((7, 5), np.int64, np.float32)
    assert (np.diff(scores) <= 0).all()
    assert all(len(set(row)) == 5 for row in rows)
    true = brute_force(queries, codec.decode(code), metric)
    best = -np.sort(-true, axis=1)[:, :5]
    # Equal scores may come in any order, so the scores are compared.
    np.testing.assert_allclose(np.take_along_axis(true, rows, axis=1), best, rtol=1e-4, atol=1e-4)


def brute_force(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """(q, n) scores; vectors are taken to be of unit length for the cosine."""
    if metric == "l2":
        return -np.square(queries[:, None] - vectors[None]).sum(axis=2)
    return queries @ vectors.T


def test_search_decodes_block_by_block(
    x: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Picky().fit(x)
    code = codec.encode(x)
    whole = codec.search(code, queries, ROWS, "l2")
    sizes: list[int] = []
    decode = Picky._decode
    monkeypatch.setattr(
        Picky, "_decode", lambda self, part: sizes.append(len(part)) or decode(self, part)
    )
    monkeypatch.setattr(codec_module, "BLOCK_BYTES", 4 * DIMS * 64)
    scores, rows = codec.search(code, queries, ROWS, "l2")
    assert sizes == [64, 64, 64, 64, 44]
    assert np.array_equal(rows, whole[1])
    np.testing.assert_allclose(scores, whole[0], rtol=1e-5, atol=1e-4)


def test_scores_of_a_plain_transform_are_those_of_its_vectors(
    x: np.ndarray, queries: np.ndarray
) -> None:
    for codec in (Shift().fit(x), chain(Shift(), Scale()).fit(x)):
        scores, rows = codec.search(codec.encode(x), queries, 3, "l2")
        factor = 4 if len(codec.stages) == 2 else 1
        true = factor * brute_force(queries, x, "l2")
        np.testing.assert_allclose(scores, np.take_along_axis(true, rows, 1), rtol=1e-3, atol=1e-3)


# -- spec strings --------------------------------------------------------------------------


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated hyper-parameter."""
    if isinstance(kind, types.UnionType):
        return st.one_of([values_of(option) for option in typing.get_args(kind)])
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    letters = st.characters(codec="ascii", exclude_characters="+,", categories=("L", "N", "P"))
    known = {
        int: st.integers(-(10**30), 10**30),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(letters).filter(lambda word: word != "none"),
        type(None): st.none(),
    }
    return known[kind]


@pytest.mark.parametrize(
    "cls", [row.load() for row in codecs("vectors") if row.status == "available"]
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_spec_strings_name_every_codec_completely(cls: type[Codec], data: st.DataObject) -> None:
    kinds = typing.get_type_hints(cls)
    names = [field.name for field in hyper_parameters(cls)]
    chosen = data.draw(st.fixed_dictionaries({}, optional={n: values_of(kinds[n]) for n in names}))
    codec = cls(**chosen)
    assert from_spec(codec.spec) == codec
    assert from_spec(codec.full_spec) == codec
    assert from_spec(codec.full_spec).full_spec == codec.full_spec
    assert set(codec.parameters()) == set(names)
    both = chain(PCARAG(), codec) if codec.takes == "vectors" else chain(codec, PCARAG())
    assert from_spec(both.spec).spec == both.spec
    assert from_spec(both.full_spec).stages == both.stages


def test_spec_has_what_differs_from_the_defaults() -> None:
    assert PCARAG().spec == "pca-rag"
    assert PCARAG(dims=12, center=False).spec == "pca-rag:dims=12,center=no"
    assert PQ().full_spec == "pq:bytes=48,seed=0"
    assert chain(PCARAG(dims=12), PQ(bytes=3)).spec == "pca-rag:dims=12+pq:bytes=3"
    assert (
        from_spec(" pca-rag: dims=12, center=no + int8 ").spec == "pca-rag:dims=12,center=no+int8"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "yes"),
        (np.False_, "no"),
        (3, "3"),
        (0.5, "0.5"),
        (1e-7, "1e-07"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e30, "1e30"),  # a plus would begin the next stage
        (1.2345678901e30, "1.2345678901e30"),
        ("float16", "float16"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert format_spec("name", {"key": value}) == f"name:key={text}"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "the method is empty; `fewbits systems` lists the names"),
        ("  ", "the method is empty"),
        ("int8+", "unknown method ''"),
        ("turboqant", "unknown method 'turboqant'; did you mean 'turboquant'?"),
        ("pca-rag+tubroquant", "did you mean 'turboquant'?"),
        ("xyzzy", "unknown method 'xyzzy'; `fewbits systems` lists the names"),
        ("pq:size=4", "pq has no option 'size'; its options are: bytes, seed"),
        ("int8:bits=4", "int8 has no option 'bits'; its options are: none"),
        ("pq:bytes=4,seed=1,bytes=8", "pq has option 'bytes' twice; give it once"),
        ("pq:bytes=four", "pq: bytes='four' is not valid; bytes is a whole number"),
        ("pq:bytes=4.5", "bytes='4.5' is not valid"),
        ("pq:bytes", "bytes='' is not valid"),
        ("opq:dims=few", "dims='few' is not valid; dims is a whole number or none"),
        ("pca-rag:center=true", "center='true' is not valid; center is yes or no"),
        ("pca-rag:variance=most", "variance='most' is not valid; variance is a number"),
        ("pca-rag:dtype=int8", "dtype='int8' is not valid; dtype is float32 or float16"),
        ("pq:bytes=none", "bytes='none' is not valid"),
        ("int8" * 2000, "longer than 4096 characters"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(FewbitsError) as caught:
        from_spec(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_option_that_may_be_none_is_written_as_none() -> None:
    codec = from_spec("opq:dims=none,bytes=2")
    assert codec.parameters()["dims"] is None
    assert "dims=none" in codec.full_spec


def test_file_of_a_version_with_fewer_options_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    codec = from_spec("lsh:bits=8").fit(x)
    with monkeypatch.context() as older:
        older.setattr(type(codec), "full_spec", property(lambda self: "lsh:bits=8"))
        code = codec.encode(x)
        expected = codec.decode(code)
        codec.save(tmp_path / "older.fewbits")
    loaded = Codec.load(tmp_path / "older.fewbits")
    np.testing.assert_array_equal(loaded.decode(code), expected)
    loaded.save(tmp_path / "again.fewbits")
    assert Codec.load(tmp_path / "again.fewbits").digest == loaded.digest
    assert loaded.fit(x).digest == from_spec("lsh:bits=8").fit(x).digest
