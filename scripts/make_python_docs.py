"""Make the search collection that ships with fewbits out of Python's own documentation.

    python scripts/make_python_docs.py

Passages are paragraphs of the language reference (``pydoc_data.topics``) and docstrings of the
standard library. For a few hundred functions and classes the summary line of the docstring becomes
a query, and the passage keeps only the rest, so that the query's words are not simply looked up.
The same Python gives the same texts; all are embedded with all-MiniLM-L6-v2.
"""

from __future__ import annotations

import ast
import platform
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fewbits.core.examples import definitions, standard_library
from fewbits.core.text_encoder import TextEncoder

QUERIES = 400
SEED = 0
MIN_LENGTH, MAX_LENGTH = 60, 1200
MIN_REST_LENGTH = 80  # what must be left of a docstring without its summary line
GOOD_LENGTH = 300  # a passage this long is not extended by the next paragraph
FOLDER = Path(__file__).parent.parent / "src" / "fewbits" / "core" / "data"

# Pure-Python sources of public modules that are named otherwise.
PUBLIC_NAME = {
    "_pyio": "io",
    "_pydecimal": "decimal",
    "_collections_abc": "collections.abc",
}

# Generated character tables, the reference text itself, and what later Pythons no longer have.
LEFT_OUT_PACKAGES = {"encodings", "pydoc_data", "distutils"}

USELESS = re.compile(
    r"copyright|licen[sc]ed? (to|under)|permission to use|all rights reserved|-\[ footnotes \]-",
    re.IGNORECASE,
)
RULE_LINE = re.compile(r"^[*=\-~^\"#. ]*[*=\-~^\"#.]{3}\s*$")
BOX = re.compile(r"^\s*(\+[-=+]+\+|\|.*\|)\s*$", re.MULTILINE)

QUESTIONS = [
    "how do I open a file for appending without overwriting it?",
    "read a zip archive without unpacking it to disk",
    "what is the difference between is and ==?",
    "run several coroutines at the same time and collect their results",
    "how can I count how often each word occurs?",
    "why must default arguments not be mutable?",
    "send an email with an attachment",
    "round money amounts exactly, without floating point errors",
    "start another program and read what it prints",
    "which exception do I get when a key is missing from a dictionary?",
    "make my own object work in a with statement",
    "parse command line options with a help message",
]

NOTES = {
    "python": platform.python_version(),
    "model": "sentence-transformers/all-MiniLM-L6-v2, mean pooling, unit norm, float16",
    "licence of the texts": "Python Software Foundation License Version 2 (documentation and "
    "docstrings of CPython, copyright Python Software Foundation; excerpts, whitespace changed)",
    "licence of the model": "Apache License 2.0",
}


@dataclass(frozen=True)
class Passage:
    """One passage; ``heading`` (a title or a signature) is written before its ``body``.

    Where the docstring starts with a usable summary line, ``summary`` holds it, and ``rest`` the
    body without it.
    """

    id: str
    heading: str
    body: str
    summary: str = ""
    rest: str = ""

    @property
    def text(self) -> str:
        return f"{self.heading} {self.body}"


def flat(text: str) -> str:
    """Every run of whitespace becomes one space."""
    return " ".join(text.split())


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """``(kind, text)`` of each paragraph: "heading", "text", or "indented" for code and notes.

    Boxed tables, grammar rules, legal notices and bare markers are left out.
    """
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        if len(lines) == 2 and RULE_LINE.match(lines[1]):
            yield "heading", flat(lines[0])
            continue
        if BOX.search(block) or "::=" in block or USELESS.search(block):
            continue
        body = flat("\n".join(line for line in lines if not RULE_LINE.match(line)))
        if body:
            yield ("indented" if lines[0].startswith((" ", ">>>")) else "text"), body


def pieces(text: str, room: int) -> Iterator[tuple[str, str]]:
    """``(heading above it, passage)`` of consecutive paragraphs, each at most ``room`` characters.

    Code and notes stay with the paragraph before them, and so does what follows a colon.
    """
    heading = current = ""
    for kind, block in blocks(text):
        belongs = kind == "indented" or current.endswith(":") or len(current) < GOOD_LENGTH
        if kind == "heading" or not belongs or len(current) + 1 + len(block) > room:
            if current:
                yield heading, current
            current = ""
        if kind == "heading":
            heading = block
        elif len(block) <= room:
            current = f"{current} {block}".strip()
        else:
            *whole, current = sentences(block, room)
            yield from ((heading, part) for part in whole)
    if current:
        yield heading, current


def sentences(block: str, room: int) -> list[str]:
    """A long paragraph in parts of whole sentences; a sentence longer than ``room`` is dropped."""
    parts = [""]
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", block):
        if len(sentence) > room:
            continue
        if len(parts[-1]) + 1 + len(sentence) > room:
            parts.append("")
        parts[-1] = f"{parts[-1]} {sentence}".strip()
    return parts


def is_prose(text: str) -> bool:
    """Whether this is mostly words, and enough of them."""
    return is_words(text) and len(re.findall(r"[A-Za-z]{2,}", text)) >= 8


def is_words(text: str) -> bool:
    """Whether at least three quarters of the characters are letters and spaces."""
    return sum(character.isalpha() or character == " " for character in text) >= 0.75 * len(text)


def topic_passages() -> Iterator[Passage]:
    """Passages of the language reference, each under the title of its section."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for topic, text in sorted(topics.items()):
        number = 0
        fresh = []
        # Topics share whole sections: a paragraph is used only where it comes up first.
        for block in re.split(r"\n\s*\n", text):
            if flat(block) not in seen or RULE_LINE.match(block.split("\n")[-1]):
                fresh.append(block)
            seen.add(flat(block))
        for heading, body in pieces("\n\n".join(fresh), MAX_LENGTH - 100):
            if len(body) >= MIN_LENGTH and is_prose(body):
                number += 1
                yield Passage(f"topic:{topic}#{number}", f"{heading}:" if heading else "", body)


def library_passages() -> Iterator[Passage]:
    """Passages of the docstrings of public modules, classes, functions and methods."""
    for module, tree in standard_library():
        shown = PUBLIC_NAME.get(module, module)
        if shown.split(".")[0] in LEFT_OUT_PACKAGES or re.search(r"(^|\.)_", shown):
            continue
        if shown == module:
            yield from docstring_passages(module, f"module {module}:", tree)
        exported = exported_names(tree)
        for name, node in definitions(tree):
            if re.search(r"(^|\.)_", name) or (exported and name.split(".")[0] not in exported):
                continue
            full = f"{shown}.{name}"
            yield from docstring_passages(full, signature(full, node), node)


def exported_names(tree: ast.Module) -> set[str]:
    """The names listed in a module's ``__all__``, empty when it lists none."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            names.update(
                item.value
                for item in ast.walk(node.value)
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )
    return names


def signature(name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """How a function is called, or "class" and its name."""
    if isinstance(node, ast.ClassDef):
        return f"class {name}:"
    arguments = re.sub(r"^(self|cls)(, |$)", "", flat(ast.unparse(node.args)))
    return f"{name}({arguments if len(arguments) <= 200 else '...'})"


def docstring_passages(
    name: str,
    heading: str,
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[Passage]:
    """The passages of one docstring; only a docstring of one passage may hold a query."""
    docstring = ast.get_docstring(node) or ""
    found = [body for _, body in pieces(docstring, MAX_LENGTH - len(heading) - 1)]
    summary = docstring.partition("\n\n")[0]
    for number, body in enumerate(found, start=1):
        if len(body) < MIN_LENGTH or not is_prose(body):
            continue
        if number > 1:
            yield Passage(f"{name}#{number}", f"{name}:", body)
            continue
        rest = body.removeprefix(summary).strip()
        asks = not isinstance(node, ast.Module) and len(found) == 1 and is_query(summary, name)
        if asks and len(rest) >= MIN_REST_LENGTH and is_prose(rest):
            yield Passage(name, heading, body, summary, rest)
        else:
            yield Passage(name, heading, body)


def is_query(summary: str, name: str) -> bool:
    """Whether a summary line reads as a question to ``name`` without giving the name away."""
    own_name = name.rsplit(".", 1)[-1]
    return (
        "\n" not in summary
        and summary.endswith(".")
        and 6 <= len(summary.split()) <= 25
        and is_words(summary)
        and not re.search(rf"\b{re.escape(own_name)}\b", summary, re.IGNORECASE)
    )


def without_duplicates(passages: list[Passage]) -> list[Passage]:
    """The first passage of each id and of each body."""
    ids: set[str] = set()
    bodies: set[str] = set()
    kept = []
    for passage in passages:
        if passage.id not in ids and passage.body.lower() not in bodies:
            kept.append(passage)
            ids.add(passage.id)
            bodies.add(passage.body.lower())
    return kept


def with_fair_queries(passages: list[Passage]) -> list[int]:
    """Rows whose summary is found in no other passage nor in the rest of their own."""
    everything = "\n".join(passage.text.lower() for passage in passages)
    rests = Counter(passage.rest.lower() for passage in passages)
    fair = []
    for row, passage in enumerate(passages):
        summary = passage.summary.lower().rstrip(".")
        # Its own passage holds it once, as the summary itself.
        if summary and everything.count(summary) == 1 and rests[passage.rest.lower()] == 1:
            fair.append(row)
    return fair


def select(passages: list[Passage]) -> tuple[list[str], list[str], list[int]]:
    """Texts of the passages, texts of the queries, and the row that answers each query."""
    fair = with_fair_queries(passages)
    answers = sorted(random.Random(SEED).sample(fair, min(QUERIES, len(fair))))
    texts = [passage.text.strip() for passage in passages]
    for row in answers:
        texts[row] = f"{passages[row].heading} {passages[row].rest}"
    queries = [passages[row].summary for row in answers]
    return texts, queries + QUESTIONS, answers + [-1] * len(QUESTIONS)


def write(path: Path, columns: dict[str, pa.Array]) -> None:
    table = pa.table(columns).replace_schema_metadata(NOTES)
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)


def half_precision(vectors: np.ndarray) -> pa.Array:
    flat_values = pa.array(vectors.astype(np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat_values, vectors.shape[1])


def main() -> None:
    passages = without_duplicates([*topic_passages(), *library_passages()])
    ids = [passage.id for passage in passages]
    texts, queries, answers = select(passages)
    print(f"{len(texts)} passages, {len(queries)} queries")
    encoder = TextEncoder()
    vectors = encoder.sentences(texts, progress=True)
    query_vectors = encoder.sentences(queries)
    write(
        FOLDER / "python_docs.parquet",
        {
            "id": pa.array(ids),
            "text": pa.array(texts),
            "vector": half_precision(vectors),
        },
    )
    write(
        FOLDER / "python_docs_queries.parquet",
        {
            "text": pa.array(queries),
            "vector": half_precision(query_vectors),
            "answer": pa.array(answers, pa.int32()),
        },
    )
    known = np.array(answers) >= 0
    scores = query_vectors[known] @ vectors.T
    right = scores[np.arange(len(scores)), np.array(answers)[known]]
    rank = (scores > right[:, None]).sum(1)
    print(f"recall@1 {(rank < 1).mean():.3f}, recall@10 {(rank < 10).mean():.3f}")


if __name__ == "__main__":
    main()
