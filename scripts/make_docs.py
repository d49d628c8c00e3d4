"""Write the generated pages of docs/: methods.md and systems.md.

    python scripts/make_docs.py          # write them
    python scripts/make_docs.py --check  # exit with 1 where they are out of date

What they say comes from the catalogue, the dataclasses and their docstrings; only the sizes of
codes are written here (`SIZES`), and tests/test_docs.py holds them against real codes. Needs all
extras (``pip install '.[dev]'``), so that every codec can be built.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fewbits.core.catalogue import ROOMS, System, codecs, installed, opponents, own, systems
from fewbits.core.codec import Codec, expected, format_value, from_spec, hyper_parameters
from fewbits.core.reproduction import available

DOCS = Path(__file__).parent.parent / "docs"
NOTE = "<!-- Written by scripts/make_docs.py; run it again instead of editing this page. -->"
DIMS, ROWS = 384, 4000
"""The collection whose settings and sizes the page of methods shows."""

ROOM_TITLES = {
    "vectors": "Embeddings and sets of token vectors",
    "kv": "Key-value caches of language models",
    "weights": "Weights of networks",
    "media": "Images, audio and video",
    "fields": "Fields: functions of place",
    "tables": "Tables and spreadsheets",
    "sequences": "Sequence models and positions",
    "latents": "Latent spaces",
    "memory": "Memories",
    "measures": "Measures of representations",
}


# -- sizes of codes ------------------------------------------------------------------------


class Size(NamedTuple):
    """Bytes per item of a code: as people read it, and from a codec and the width it is given."""

    formula: str
    of: Callable[[Any, int], int]


def packed(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 8)


def rabitq_bytes(codec: Any, d: int) -> int:
    more = packed(d, codec.bits - 1) + 12 if codec.bits > 1 else 0
    return packed(d, 1) + 8 + more


def relative_bytes(codec: Any, d: int) -> int:
    count = codec.anchors or d
    return 4 * count if codec.bits is None else packed(count, codec.bits)


def muvera_width(codec: Any, d: int) -> int:
    width = d if codec.projection == "identity" else codec.projection_dims
    return codec.final_dims or codec.repetitions * 2**codec.bits * width


SIZES = {
    "float16": Size("2·d", lambda codec, d: 2 * d),
    "int8": Size("d", lambda codec, d: d),
    "sign": Size("d/8", lambda codec, d: packed(d, 1)),
    "pq": Size("`bytes`", lambda codec, d: codec.bytes),
    "opq": Size("`bytes`", lambda codec, d: codec.bytes),
    "rabitq": Size("d·`bits`/8 + 8, with more than one bit + 20", rabitq_bytes),
    "turboquant": Size("d·`bits`/8 + 2", lambda codec, d: packed(d, codec.bits) + 2),
    "itq": Size("`bits`/8; without, d/8", lambda codec, d: packed(codec.bits or d, 1)),
    "lsh": Size("`bits`/8; without, d/8", lambda codec, d: packed(codec.bits or d, 1)),
    "additive-bits": Size("`bytes`", lambda codec, d: codec.bytes),
    "bebr": Size("`dims`·`bits`/8", lambda codec, d: packed(codec.dims or d, codec.bits)),
    "muvera": Size(
        "4·`repetitions`·2^`bits`·`projection_dims`, or 4·`final_dims`",
        lambda codec, d: 4 * muvera_width(codec, d),
    ),
    "pca-rag": Size(
        "4·`dims`, with `dtype=float16` 2·`dims`",
        lambda codec, d: codec.dims * (2 if codec.dtype == "float16" else 4),
    ),
    "relative-representations": Size(
        "`anchors`·`bits`/8, with `bits=none` 4·`anchors`", relative_bytes
    ),
}
"""Name of a codec → bytes of its code."""

WIDTHS: dict[str, Callable[[Any, int], int]] = {
    "muvera": muvera_width,
    "pca-rag": lambda codec, d: codec.dims,
    "relative-representations": lambda codec, d: codec.anchors or d,
}
"""Name of a transform → how many numbers it hands to the codec that follows."""


def code_bytes(spec: str, dims: int) -> int:
    """Bytes per item of what a spec makes of `dims` dimensions."""
    *transforms, last = from_spec(spec).stages
    for stage in transforms:
        dims = WIDTHS[stage.name](stage, dims)
    return SIZES[last.name].of(last, dims)


# -- docstrings ----------------------------------------------------------------------------

SECTION = re.compile(r"^([A-Z][a-z]+)\n-+$", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """The parts of a NumPy docstring: what stands in front is "", then ``Parameters``, …"""
    pieces = SECTION.split(text)
    return {"": pieces[0].strip()} | {
        name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def markdown(text: str) -> str:
    """A docstring's text with single backticks only."""
    return text.replace("``", "`").strip()


def described(parameters: str) -> dict[str, str]:
    """Name → description, from the section ``Parameters``."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", parameters):
        names, _, text = entry.partition(" : ")
        for name in names.split(", "):
            found[name] = markdown(" ".join(text.split()))
    return found


def attribute_texts(cls: type) -> dict[str, str]:
    """Name → the text below an attribute in the body of the class, base classes first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Codec) or base is Codec:
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for above, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found[ast.unparse(above.target)] = " ".join(inspect.cleandoc(text).split())
    return found


# -- docs/methods.md -----------------------------------------------------------------------

METHODS_HEAD = f"""\
# Methods

{NOTE}

A method is named by a *spec*: its name, and the options that differ from their defaults.

```
pq:bytes=96                        one method
pca-rag:dims=192+turboquant        a chain: the second method encodes what the first one gives
```

`pca-rag`, `relative-representations` and `muvera` give shorter vectors and can stand in front of
others. The same names and options are the classes and arguments of `fewbits.vectors`
([Python](python.md)). How to choose one: [choosing](choosing.md). What `fewbits compare` tries
where you give a name without options is listed below for {DIMS} dimensions.

In the formulas, d is the width of the vectors; bits are rounded up to whole bytes per vector. The
learned arrays lie in a file as `0.NAME`; those of the second method of a chain as `1.NAME`
([format](format.md)).
"""

UNDOCUMENTED = {"bits": "bits per dimension, 1 to 8.", "seed": "of the random rotation."}
"""Options whose docstring has no words for them."""

GUIDES = {
    "bebr": "[pairs, and a new model](python.md#learn-from-pairs-bebr)",
    "muvera": "[sets of vectors](python.md#sets-of-vectors-muvera)",
    "pca-rag": "[use it elsewhere](python.md#use-the-components-elsewhere-pca-rag)",
    "relative-representations": "[make two encoders understand each other](relative.md)",
}
"""Name of a method → where the pages written by hand show it."""

GROUPS = {
    "Established": opponents,
    "Ours": own,
    "Papers": systems,
}


def methods_page() -> str:
    here = codecs("vectors")
    unknown = [row.name for row in here if row.name not in SIZES]
    if unknown:
        sys.exit(f"scripts/make_docs.py: say in SIZES how large a code is: {', '.join(unknown)}")
    page = [METHODS_HEAD, *overview(here)]
    for title, group in GROUPS.items():
        page += [f"\n## {title}\n"]
        for row in group():
            if row in here:
                page += method_section(row, title)
    return "\n".join(page).rstrip() + "\n"


def overview(rows: list[System]) -> list[str]:
    table = ["| method | what it does | bytes per vector |", "|---|---|---|"]
    for row in rows:
        link = f"[{row.name}](#{row.name})"
        table.append(f"| {link} | {row.summary} | {SIZES[row.name].formula} |")
    return table


def method_section(row: System, group: str) -> Iterator[str]:
    """The section of one codec, line by line."""
    cls: type[Codec] = row.load()
    doc = sections(inspect.getdoc(cls) or "")
    yield f"### {row.name}\n"
    yield f"{title_line(row)}\n"
    if group != "Established":
        yield f"{markdown(inspect.getdoc(importlib.import_module(row.module)) or '')}\n"
    yield f"{markdown(doc[''])}\n"
    if "Notes" in doc:
        yield f"{markdown(doc['Notes'])}\n"
    yield from option_table(cls, described(doc.get("Parameters", "")))
    item = "set" if cls.takes == "sets" else "vector"
    yield f"Bytes per {item}: {SIZES[row.name].formula}.\n"
    yield from tried(cls)
    yield from stored(cls)
    if row.name in GUIDES:
        yield f"How to use it: {GUIDES[row.name]}.\n"
    if row.name in available():
        yield f"Run its claim: `fewbits reproduce {row.name}`.\n"


def title_line(row: System) -> str:
    """Title and number of the paper, the class, and what must be installed."""
    facts = [f"*{row.title}*" if row.arxiv else row.title]
    facts += [f"[arXiv {row.arxiv}](https://arxiv.org/abs/{row.arxiv})"] if row.arxiv else []
    facts.append(f"class `fewbits.vectors.{row.path.partition(':')[2]}`")
    facts += [f"needs `fewbits[{row.extra}]`"] if row.extra else []
    return ", ".join(facts) + "."


def cell_text(text: str) -> str:
    return text.replace("|", "\\|")


def option_table(cls: type[Codec], texts: dict[str, str]) -> Iterator[str]:
    fields = hyper_parameters(cls)
    if not fields:
        yield "No options.\n"
        return
    kinds = typing.get_type_hints(cls)
    yield "| option | is | default | what it does |"
    yield "|---|---|---|---|"
    for field in fields:
        default = f"`{format_value(field.default)}`" if field.default != "" else "nothing"
        text = texts.get(field.name) or UNDOCUMENTED.get(field.name, "")
        cells = [f"`{field.name}`", expected(kinds[field.name]), default, text]
        yield f"| {' | '.join(map(cell_text, cells))} |"
    yield ""


def tried(cls: type[Codec]) -> Iterator[str]:
    """What `compare` tries, with sizes."""
    yield f"Tried by `compare` for {DIMS} dimensions, with the bytes of each:\n"
    specs = [from_spec(spec).spec for spec in cls.grid(DIMS, ROWS)]
    yield ", ".join(f"`{spec}` ({code_bytes(spec, DIMS):,})" for spec in specs) + "\n"


def stored(cls: type[Codec]) -> Iterator[str]:
    """The learned arrays, as files hold them."""
    texts = attribute_texts(cls)
    fields = dataclasses.fields(typing.cast(Any, cls))
    names = [field.name for field in fields if not field.init]
    if names:
        yield "Learned arrays, stored once per collection:\n"
        yield from (f"- `{name.rstrip('_')}`: {markdown(texts[name])}" for name in names)
        yield ""


# -- docs/systems.md -----------------------------------------------------------------------


def systems_page() -> str:
    rows = systems()
    here = [row for row in rows if installed(row.module)]
    page = [
        f"# Systems\n\n{NOTE}\n",
        f"The catalogue has {len(rows)} papers; {len(here)} are here, the others are planned.\n"
        "`fewbits systems` prints this list for your installation, and the established codecs.\n",
        "| room | what it is about | papers | here |",
        "|---|---|---|---|",
    ]
    for room in ROOMS:
        own_rows = [row for row in rows if row.room == room]
        count = sum(row in here for row in own_rows)
        page.append(f"| [{room}](#{room}) | {ROOM_TITLES[room]} | {len(own_rows)} | {count} |")
    for room in ROOMS:
        page += [f"\n## {room}\n", f"{ROOM_TITLES[room]}.\n"]
        page += ["| name | what it does | paper | status |", "|---|---|---|---|"]
        page += [system_line(row, row in here) for row in rows if row.room == room]
    return "\n".join(page) + "\n"


def system_line(row: System, here: bool) -> str:
    paper = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})"
    status = "planned"
    if here:
        status = "available" + (f" with `fewbits[{row.extra}]`" if row.extra else "")
    name = f"[{row.name}](methods.md#{row.name})" if here and row.kind == "codec" else row.name
    cells = [name, row.summary, paper, status]
    return f"| {' | '.join(map(cell_text, cells))} |"


# -- writing -------------------------------------------------------------------------------

PAGES = {"methods.md": methods_page, "systems.md": systems_page}


def outdated() -> list[str]:
    """Names of the pages that are not what they would be now."""
    found = []
    for name, page in PAGES.items():
        file = DOCS / name
        if not file.exists() or file.read_text(encoding="utf-8") != page():
            found.append(name)
    return found


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit("usage: python scripts/make_docs.py [--check]")
    if arguments:
        pages = outdated()
        if pages:
            print(f"out of date: {', '.join(pages)}; run python scripts/make_docs.py")
        return 1 if pages else 0
    DOCS.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
