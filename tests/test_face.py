"""The Python face: what ``import fewbits`` offers."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fewbits
from fewbits.core import catalogue, errors, lazy
from fewbits.core.catalogue import everything, find
from fewbits.core.errors import FewbitsError, MissingExtraError
from fewbits.core.examples import python_docs


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray]:
    """(120, 64) passages and (20, 64) queries of the built-in example, cut to 64 dimensions."""
    example = python_docs()
    return example.vectors[:120, :64].copy(), example.queries[:20, :64].copy()


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to run every codec of the catalogue."""
    rows = [find(name) for name in ("float16", "int8", "sign", "turboquant")]
    monkeypatch.setattr("fewbits.core.compare.codecs", lambda room: rows)


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.einsum("nd,nd->n", x, y) / lengths


# -- names ---------------------------------------------------------------------------------


def test_everything_it_names_is_there() -> None:
    assert fewbits.__all__ == sorted(fewbits.__all__)
    for name in fewbits.__all__:
        assert callable(getattr(fewbits, name))
    assert set(dir(fewbits)) == {*fewbits.__all__, "__version__", "kv", "vectors"}
    assert {"encode", "decode", "compare", "load", "systems", "reproduce"} <= set(fewbits.__all__)


def test_star_import_brings_the_face() -> None:
    names: dict[str, object] = {}
    exec("from fewbits import *", names)
    assert set(fewbits.__all__) <= set(names)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="fewbits has no 'squeeze'"):
        fewbits.squeeze  # noqa: B018
    assert not hasattr(fewbits, "__path_of_nothing__")
    with pytest.raises(AttributeError, match=r"fewbits\.vectors has no 'Squeeze'"):
        fewbits.vectors.Squeeze  # noqa: B018
    assert not hasattr(fewbits.vectors, "__wrapped__")
    with pytest.raises(ImportError, match="squeeze"):
        exec("from fewbits import squeeze")


def test_import_is_light() -> None:
    program = (
        "import sys, fewbits, fewbits.vectors\n"
        "dir(fewbits), dir(fewbits.vectors), fewbits.systems()\n"
        "print({'numpy', 'faiss', 'torch', 'pyarrow', 'matplotlib', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_error_is_one_kind_of_value_error() -> None:
    assert fewbits.FewbitsError is FewbitsError
    assert issubclass(MissingExtraError, FewbitsError)
    assert issubclass(FewbitsError, ValueError)


# -- rooms ---------------------------------------------------------------------------------


def test_room_lists_and_loads_what_is_written() -> None:
    rows = [row for row in everything() if row.room == "vectors" and row.status != "planned"]
    assert dir(fewbits.vectors) == sorted(row.path.partition(":")[2] for row in rows)
    assert {"BEBR", "MUVERA", "PCARAG", "PQ"} <= set(dir(fewbits.vectors))
    for row in rows:
        assert getattr(fewbits.vectors, row.path.partition(":")[2]) is row.load()
    assert fewbits.vectors.BEBR.name == "bebr"


def test_room_has_nothing_of_another_room() -> None:
    get, names = lazy.exported("kv")
    assert not set(names()) & set(dir(fewbits.vectors))
    with pytest.raises(AttributeError, match=r"fewbits\.kv has no 'PQ'"):
        get("PQ")


def test_modules_of_a_room_are_imported_as_usual() -> None:
    from fewbits.vectors import BEBR, bebr

    assert isinstance(bebr, ModuleType)
    assert bebr.BEBR is BEBR is fewbits.vectors.BEBR


def test_planned_systems_are_not_among_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    get, names = lazy.exported("vectors")
    written = {"fewbits.vectors.baselines"}
    monkeypatch.setattr(catalogue, "installed", written.__contains__)
    assert "PQ" in names()
    assert "BEBR" not in names()
    with pytest.raises(AttributeError, match=r"fewbits\.vectors has no 'BEBR'"):
        get("BEBR")


def test_what_needs_an_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = catalogue.installed
    monkeypatch.setattr(catalogue, "installed", lambda name: name != "torch" and installed(name))
    assert "BEBR" in dir(fewbits.vectors)
    with pytest.raises(MissingExtraError, match=r"bebr needs torch; .*'fewbits\[torch\]'"):
        fewbits.vectors.BEBR  # noqa: B018


def test_require_imports_or_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert errors.require("json.decoder", "torch") is importlib.import_module("json.decoder")
    with pytest.raises(MissingExtraError) as caught:
        errors.require("no_such_package.part", "torch")
    assert str(caught.value) == (
        "this needs no_such_package; install it with: pip install 'fewbits[torch]'"
    )
    # A package that is there, but lacks what it needs itself, is another matter.
    (tmp_path / "half_installed.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        errors.require("half_installed", "torch")


# -- verbs ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_methods")
def test_example_of_the_docstring_runs(
    vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("docs.npy", vectors[0])
    np.save("queries.npy", vectors[1])
    (test,) = [test for test in doctest.DocTestFinder().find(fewbits) if test.examples]
    assert len(test.examples) == 5
    results = doctest.DocTestRunner().run(test, clear_globs=False)
    assert results.failed == 0
    assert test.globs["rows"].shape == test.globs["scores"].shape == (20, 10)
    assert len(test.globs["codes"]) == 120


@pytest.mark.usefixtures("few_methods")
def test_compare_chooses_by_quality_and_by_size(vectors: tuple[np.ndarray, np.ndarray]) -> None:
    x, queries = vectors
    compared = fewbits.compare(x, queries=queries)
    assert isinstance(compared, fewbits.Comparison)
    assert compared.input["queries"] == 20
    chosen = compared.cheapest(recall_at_10=0.9)
    assert chosen.quality["recall@10"] >= 0.9
    smaller = [p for p in compared.points if p.bytes_per_item < chosen.bytes_per_item]
    assert smaller
    assert all(point.quality["recall@10"] < 0.9 for point in smaller)
    best = compared.best(bytes=20)
    assert best.bytes_per_item <= 20
    assert best.quality["recall@10"] == max(
        point.quality["recall@10"] for point in compared.points if point.bytes_per_item <= 20
    )
    assert best.spec in str(compared)
    with pytest.raises(FewbitsError, match="say what to keep"):
        compared.cheapest()


def test_encode_search_save_and_load(
    vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, queries = vectors
    encoded = fewbits.encode(x, method="pca-rag:dims=32+int8")
    assert isinstance(encoded, fewbits.Encoded)
    assert (len(encoded), encoded.bytes_per_item, encoded.ratio) == (120, 32, 8)
    encoded.save(tmp_path / "codes.fewbits")
    loaded = fewbits.load(tmp_path / "codes.fewbits")
    for before, after in zip(encoded.search(queries, 5), loaded.search(queries, 5), strict=True):
        np.testing.assert_array_equal(before, after)


def test_codecs_by_class_by_chain_and_by_spec_are_the_same(
    vectors: tuple[np.ndarray, np.ndarray],
) -> None:
    spec = "pca-rag:dims=16+rabitq:bits=2"
    room = fewbits.vectors
    chained = fewbits.chain(room.PCARAG(dims=16), room.RaBitQ(bits=2))
    assert chained.spec == fewbits.from_spec(spec).spec == spec
    by_codec, by_spec = (fewbits.encode(vectors[0], method=m) for m in (chained, spec))
    assert by_codec.codec.digest == by_spec.codec.digest
    assert not hasattr(chained, "dims_")  # the codec that was given stays as it was


def test_decode_takes_codes_or_a_file_and_gives_vectors_or_a_file(
    vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, _ = vectors
    file, output = tmp_path / "codes.fewbits", tmp_path / "back.npy"
    encoded = fewbits.encode(x, file, method="int8")
    decoded = fewbits.decode(encoded)
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == (x.shape, np.float32)
    assert cosine(decoded, x).min() > 0.999
    np.testing.assert_array_equal(fewbits.decode(str(file)), decoded)
    assert fewbits.decode(file, output) == output
    np.testing.assert_array_equal(np.load(output), decoded)
    with pytest.raises(FewbitsError, match="exists already"):
        fewbits.decode(file, output)
    assert fewbits.decode(encoded, output, overwrite=True) == output
    with pytest.raises(FewbitsError, match="there is no file"):
        fewbits.decode(tmp_path / "missing.fewbits")


def test_reproduce_and_systems_are_the_catalogues() -> None:
    assert len(fewbits.systems()) == 78
    with pytest.raises(FewbitsError, match="snapkv has no reproduction"):
        fewbits.reproduce("snapkv")
