"""The pages of docs/: current, true to the code, and without dead links."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fewbits
from fewbits.cli import build_parser
from fewbits.core.catalogue import cache_stage, codecs
from fewbits.core.codec import Codec, from_spec
from fewbits.primitives.lloyd_max import normal_levels

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERY_PAGE = [ROOT / "README.md", *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

named = pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language ("" for none)."""
    return [body for kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language]


# -- generated pages -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_training(codec: Codec) -> Codec:
    """The same codec as it starts: what it learns does not matter here."""
    for stage in codec.stages:
        for option in ("steps", "rounds"):
            if hasattr(stage, option):
                setattr(stage, option, 1)
    return codec


def test_the_generated_pages_are_current(make_docs: ModuleType) -> None:
    missing = [row.name for row in codecs("vectors") if row.missing_packages]
    if missing:
        pytest.skip(f"not installed: what {', '.join(missing)} need")
    assert make_docs.outdated() == [], "run python scripts/make_docs.py"


def test_check_tells_an_old_page(
    make_docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    monkeypatch.setattr(make_docs, "PAGES", {"systems.md": make_docs.systems_page})
    assert make_docs.main(["--check"]) == 1
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0
    (tmp_path / "systems.md").write_text("old")
    assert make_docs.main(["--check"]) == 1


# -- docs/format.md ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the Python of docs/format.md defines, but for its last block, which reads a file."""
    names: dict[str, Any] = {}
    *definitions, _ = blocks(ROOT / "docs" / "format.md", "python")
    exec("import numpy as np\n" + "\n".join(definitions), names)
    return names


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((300, 18)) @ rng.standard_normal((18, 18)) + 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_the_reader_reads_what_encode_writes(
    reader: dict[str, Any],
    vectors: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    encoded = fewbits.encode(vectors, "sign.fewbits", method="sign")
    exec(blocks(ROOT / "docs" / "format.md", "python")[-1], reader)
    np.testing.assert_allclose(reader["vectors"], encoded.decode(), atol=1e-6)
    assert reader["about"]["codec"]["digest"] == encoded.codec.digest
    assert reader["about"]["source"]["rows"] == 300


def test_the_reader_refuses_every_damaged_byte(
    reader: dict[str, Any], vectors: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "x.fewbits"
    fewbits.encode(vectors[:20], file, method="pca-rag:dims=4+turboquant")
    good = file.read_bytes()
    reader["read"](file)
    for place in range(0, len(good), 37):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises((ValueError, KeyError, TypeError)):
            reader["read"](file)
    for content in (good[:-1], good + b"\0"):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            reader["read"](file)


def scaled(y: np.ndarray, length: np.ndarray) -> np.ndarray:
    return np.asarray(y / np.linalg.norm(y, axis=1, keepdims=True) * length)


def by_hand(name: str, codec: Any, code: dict[str, Any], own: dict[str, Any], unpack: Any) -> Any:
    """The table "What the codes mean" of docs/format.md, line by line."""
    d = codec.dims_
    if name == "float16":
        return code["codes"].view("<f2").astype(np.float32)
    if name == "int8":
        return own["range"][0] + (code["codes"] + 0.5) / 255 * own["range"][1]
    if name == "sign":
        return own["mean"] + own["scale"] * (2 * unpack(code["bits"], d, 1) - 1)
    if name in ("itq", "lsh"):
        signs = 2 * unpack(code["bits"], len(own["scale"]), 1) - 1
        return own["mean"] + (own["scale"] * signs) @ np.linalg.pinv(own["projection"])
    if name in ("pq", "opq"):
        groups = range(code["codes"].shape[1])
        x = np.concatenate([own["centroids"][j][code["codes"][:, j]] for j in groups], axis=1)
        return x[:, :d] if name == "pq" else x @ own["rotation"].T
    if name == "turboquant":
        levels = normal_levels(codec.bits)[unpack(code["packed"], d, codec.bits)] / np.sqrt(d)
        return code["norms"][:, None].astype(np.float32) * levels @ own["rotation"].T
    if name == "rabitq":
        return (own["center"] + rabitq_by_hand(code["codes"], d, codec.bits, unpack)) @ own[
            "rotation"
        ].T
    if name == "additive-bits":
        signs = 2 * unpack(code["bits"], 8 * codec.bytes, 1) - 1
        return scaled(own["offset"] + signs @ own["directions"], own["length"])
    if name == "bebr":
        numbers = unpack(code["packed"], len(own["decoder"]), codec.bits)
        value = (2 * numbers - 2**codec.bits + 1) / 2 ** (codec.bits - 1)
        return scaled(value @ own["decoder"] + own["offset"], own["length"])
    assert name == "pca-rag"
    variances = own["variances"][: codec.dims]
    spread = (variances + 1e-9 * variances[0]) ** (codec.whiten / 2)
    return own["mean"] + (code["vectors"] * spread) @ own["components"]


def rabitq_by_hand(codes: np.ndarray, d: int, bits: int, unpack: Any) -> Any:
    high, rest = codes[:, : -(-d // 8)], codes[:, -(-d // 8) :]
    floats = rest[:, -8:].copy().view("<f4")[:, 1:]
    if bits == 1:
        return (2 * unpack(high, d, 1) - 1) * floats / np.sqrt(d)
    low = unpack(rest[:, 12:-8], d, bits - 1)
    number = unpack(high, d, 1) * 2 ** (bits - 1) + low
    return (number - 2 ** (bits - 1) + 0.5) * -floats / 2


SPECS = (
    "float16",
    "int8",
    "sign",
    "itq:bits=9",
    "lsh:bits=20",
    "pq:bytes=5",
    "opq:bytes=3,dims=12",
    "turboquant:bits=3",
    "rabitq",
    "rabitq:bits=3",
    "additive-bits:bytes=3",
    "bebr:bits=3,dims=10",
    "pca-rag:dims=5,whiten=0.5,dtype=float16",
)


@pytest.mark.parametrize("text", SPECS)
def test_codes_are_as_large_and_mean_what_the_pages_say(
    text: str, make_docs: ModuleType, reader: dict[str, Any], vectors: np.ndarray, tmp_path: Path
) -> None:
    if text.startswith("bebr"):
        pytest.importorskip("torch")
    file = tmp_path / "x.fewbits"
    encoded = fewbits.encode(vectors, file, method=without_training(from_spec(text)))
    _, arrays = reader["read"](file)
    code = {n.removeprefix("code."): a for n, a in arrays.items() if n.startswith("code.")}
    own = {n.removeprefix("0."): a for n, a in arrays.items() if n.startswith("0.")}
    name = text.partition(":")[0]
    decoded = by_hand(name, encoded.codec, code, own, reader["unpack"])
    np.testing.assert_allclose(decoded, encoded.decode(), atol=1e-5)
    assert encoded.bytes_per_item == make_docs.code_bytes(text, 18)


@pytest.mark.parametrize(
    "text",
    [
        "muvera:repetitions=2,bits=2,projection_dims=4",
        "muvera:repetitions=2,bits=2,projection=identity,final_dims=30",
        "muvera:repetitions=2,bits=2,projection_dims=4+turboquant:bits=3",
        "pca-rag:dims=7",
        "pca-rag:dims=7+turboquant:bits=3",
        "relative-representations",
        "relative-representations:anchors=11,bits=3",
        "relative-representations:bits=none",
    ],
)
def test_further_codes_are_as_large_as_the_page_says(
    text: str, make_docs: ModuleType, vectors: np.ndarray
) -> None:
    codec = from_spec(text)
    items = list(vectors.reshape(100, 3, 18)) if codec.takes == "sets" else vectors
    assert codec.fit(items).encode(items).bytes_per_item == make_docs.code_bytes(text, 18)


def test_a_chain_is_undone_from_its_end(
    reader: dict[str, Any], vectors: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "x.fewbits"
    encoded = fewbits.encode(vectors, file, method="pca-rag:dims=6+turboquant:bits=4")
    _, arrays = reader["read"](file)
    pca, turbo = encoded.codec.stages
    code = {n.removeprefix("code."): a for n, a in arrays.items() if n.startswith("code.")}
    for stage, prefix in ((turbo, "1."), (pca, "0.")):
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        code = {"vectors": by_hand(stage.name, stage, code, own, reader["unpack"])}
    np.testing.assert_allclose(code["vectors"], encoded.decode(), atol=1e-5)


# -- links, commands, Python ---------------------------------------------------------------


def heading_names(page: Path) -> set[str]:
    """The names that a link can end in after ``#``."""
    text = FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, name = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not name or name in heading_names(target), f"{page.name}: {link}"


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [page.name for page in PAGES if f"({page.name})" not in text]
    assert missing in ([], ["index.md"])


def shown_commands(page: Path) -> Iterator[str]:
    """``fewbits …`` as it stands in blocks, alone or behind a pipe, and in running text."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for _, body in FENCE.findall(text):
        for line in body.splitlines():
            if line.startswith(("$ ", "fewbits ")):
                pieces = map(str.strip, line.removeprefix("$ ").split("|"))
                yield from (piece for piece in pieces if piece.startswith("fewbits "))
    running = " ".join(FENCE.sub("", text).split())
    yield from re.findall(r"`(fewbits [^`]+)`", running)


def parses(parser: argparse.ArgumentParser, command: str) -> bool:
    words = shlex.split(command, comments=True)[1:]
    if len(words) == 1 and words[0] != "systems":  # only the name of a command
        words.append("--help")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            return end.code == 0
    return True


@named
def test_every_command_parses(page: Path) -> None:
    parser = build_parser()
    wrong = [command for command in shown_commands(page) if not parses(parser, command)]
    assert wrong == []


@named
def test_python_compiles_and_finds_what_it_imports(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("fewbits")):
                continue
            with contextlib.suppress(fewbits.FewbitsError):  # an extra is not installed
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {ast.unparse(node)}"


SPEC = re.compile(r"(?:--methods?[ =]|method=\")([a-z0-9][\w:=,+.\-]*)")


@named
def test_every_method_in_a_command_exists(page: Path) -> None:
    from fewbits.core.compare import split_methods

    for line in page.read_text("utf-8").splitlines():
        of_caches = "fewbits kv" in line or "--kind kv" in line
        for spec in (spec for specs in SPEC.findall(line) for spec in split_methods(specs)):
            with contextlib.suppress(fewbits.core.errors.MissingExtraError):
                if of_caches:
                    assert all(cache_stage(one.partition(":")[0]) for one in spec.split("+"))
                else:
                    from_spec(spec)
