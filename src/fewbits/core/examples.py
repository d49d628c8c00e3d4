"""Real examples that need no download.

:func:`python_docs` is a small search collection that ships with the package: passages of Python's
own documentation, questions with known answers, and the embeddings of both.
:func:`stdlib_functions` reads documented functions out of the running Python's standard library.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.core.errors import FewbitsError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# Tests and bundled programs are no part of the library proper; the rest is not Python's own.
_NOT_LIBRARY = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "__phello__",
}

_MIN_DOCSTRING_WORDS = 4
# A shorter body (a stub, a bare delegation) says too little to be found by what it does.
_MIN_BODY_WORDS = 10

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Example:
    """A search collection: documents, queries and their embeddings.

    Attributes
    ----------
    name
        Short name of the collection.
    vectors
        float32 (n, d), unit rows: the embedding of each document.
    ids
        n unique names of the documents.
    texts
        n texts of the documents.
    queries
        float32 (q, d), unit rows: the embedding of each query.
    query_texts
        q texts of the queries.
    answers
        int32 (q,): the row of the document that answers each query, -1 where none is known.
    """

    name: str
    vectors: np.ndarray
    ids: list[str]
    texts: list[str]
    queries: np.ndarray
    query_texts: list[str]
    answers: np.ndarray


def python_docs() -> Example:
    """Passages of Python's documentation and questions about them, with their embeddings.

    About 4,000 passages (paragraphs of the language reference, docstrings of the standard library)
    and 400 held-out queries, each the summary line that was taken out of one docstring, whose rest
    is the answer; a dozen more questions were written by hand and have no known answer (-1).
    The embeddings are all-MiniLM-L6-v2's, stored in half precision: d = 384, rows of unit length
    up to 1e-3.

    Returns
    -------
    Example
        Named "python-docs". Cost: reads 4 MB.
    """
    import pyarrow.parquet as pq

    passages = pq.read_table(python_docs_path())
    questions = pq.read_table(python_docs_queries_path())
    return Example(
        name="python-docs",
        vectors=_matrix(passages["vector"]),
        ids=passages["id"].to_pylist(),
        texts=passages["text"].to_pylist(),
        queries=_matrix(questions["vector"]),
        query_texts=questions["text"].to_pylist(),
        answers=questions["answer"].to_numpy(),
    )


def python_docs_path() -> Path:
    """The parquet file of the passages: columns ``id``, ``text``, ``vector`` (384 half floats)."""
    return _data_file("python_docs.parquet")


def python_docs_queries_path() -> Path:
    """The parquet file of the queries: columns ``text``, ``vector``, ``answer`` (int32 row)."""
    return _data_file("python_docs_queries.parquet")


def stdlib_functions() -> tuple[list[str], list[str]]:
    """Docstrings and bodies of the running Python's standard library, as a search task.

    Every function and method with a docstring of at least 4 words and a body of at least 10.
    The query is the docstring, the document is the body without any docstring; both are lower-case
    words separated by single spaces, with identifiers split at underscores and capitals
    (``getFileName`` becomes ``get file name``). A pair whose query or document came up before is
    left out.

    Returns
    -------
    queries, documents
        Two lists of the same length, in the order of the modules' names and of the source; query i
        belongs to document i. About 3,700 pairs in Python 3.11; other versions differ somewhat.

    Raises
    ------
    FewbitsError
        If this Python comes without the sources of its standard library.

    Cost: parses the whole library, a few seconds.
    """
    queries: dict[str, None] = {}
    documents: dict[str, None] = {}
    for _, tree in standard_library():
        for _, function in definitions(tree):
            docstring = ast.get_docstring(function)
            if docstring is None or isinstance(function, ast.ClassDef):
                continue
            query, document = _words(docstring), _words(_body_source(function))
            if query.count(" ") + 1 < _MIN_DOCSTRING_WORDS:
                continue
            if document.count(" ") + 1 < _MIN_BODY_WORDS:
                continue
            if query not in queries and document not in documents:
                queries[query] = documents[document] = None
    return list(queries), list(documents)


def standard_library() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each module of the standard library, sorted by name.

    Raises
    ------
    FewbitsError
        If this Python comes without the sources of its standard library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _NOT_LIBRARY.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            modules.append((".".join(parts).removesuffix(".__init__"), path))
    if not modules:
        raise FewbitsError(
            f"no standard library sources in {folder}: run with a Python that has them"
        )
    for name, path in sorted(modules):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are not our business
            yield name, ast.parse(path.read_bytes())


def definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.ClassDef | _Function]]:
    """Qualified name and node of every class, function and method, in the order of the source.

    What is defined inside a function is left out.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{inside}.{node.name}" if inside else node.name
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, name)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from definitions(node, inside)


def _data_file(name: str) -> Path:
    path = Path(str(files("fewbits.core") / "data" / name))
    if not path.is_file():
        raise FewbitsError(f"{path} is missing: install fewbits again")
    return path


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """float32 (n, d) of a column of fixed-size lists of half floats."""
    import numpy as np

    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float32).reshape(len(column), -1)


def _body_source(function: _Function) -> str:
    """The code of a function's body without its own docstring and those of inner functions."""
    for node in ast.walk(function):
        if isinstance(node, ast.ClassDef | _Function) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return "\n".join(ast.unparse(statement) for statement in function.body)


def _words(text: str) -> str:
    """Lower-case words and numbers, identifiers split at underscores and capitals."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", text)).lower()
