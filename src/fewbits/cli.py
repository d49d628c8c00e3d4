"""The command line: parses, calls core, prints. Imports are inside the commands, to start fast."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewbits import __version__
from fewbits.cli_kv import add_kv
from fewbits.core.errors import FewbitsError
from fewbits.core.report_text import printable

INPUT_HELP = (
    ".npy, .npz, .parquet, .arrow, .feather, .fvecs, .bvecs or .safetensors, a directory of those, "
    "a pattern or a URL of them, - for an .npy on standard input, or example:python-docs"
)
TEXTS = (".txt", ".jsonl", ".csv")
VECTORS_ONLY = {
    "queries": None,
    "qrels": None,
    "metric": "cosine",
    "column": None,
    "model": None,
    "rows": 100_000,
    "seed": 0,
    "engine": "local",
    "search_chains": None,
}
"""Options of ``compare`` that caches do not have, and their defaults."""
CACHES_ONLY = dict.fromkeys(("text", "calibrate", "pieces", "prompt", "scored"))
"""Options that only caches have."""
STORES = ("faiss", "lancedb", "qdrant", "parquet", "npy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 for bad input, or 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is shown with question marks.
        sys.stdout.reconfigure(errors="replace")
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
        print(end="", flush=True)
    except FewbitsError as error:
        print(f"fewbits: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has left; nothing more to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"fewbits: {one_line(f'{what}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except MemoryError:
        print("fewbits: out of memory; try a smaller --rows or fewer queries", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; finished parts of a directory are kept, run it again to go on"
        print(f"fewbits: interrupted{kept if options.run is run_encode else ''}", file=sys.stderr)
        return 130
    return 0


# -- the commands --------------------------------------------------------------------------


def run_compare(options: argparse.Namespace) -> None:
    from fewbits.core.report import print_table, write_report

    compared = {"vectors": compare_vectors, "kv": compare_caches}[options.kind]
    comparison = compared(options).to_json()
    try:
        if options.report:
            page, picture = write_report(comparison, Path(options.report))
            print(f"wrote {printable(page)} and {printable(picture)}", file=sys.stderr)
    finally:  # minutes of work are shown even where the report cannot be written
        if options.json:
            print_json(comparison)
        else:
            print_table(comparison)


def compare_vectors(options: argparse.Namespace) -> Any:
    refuse_others(options, CACHES_ONLY, "--kind kv")
    return compared_as_asked(options)(
        items_of(options),
        queries_of(options),
        qrels=options.qrels,
        metric=options.metric,
        column=options.column,
        rows=options.rows,
        seed=options.seed,
        show_progress=True,
    )


def compare_caches(options: argparse.Namespace) -> Any:
    refuse_others(options, VECTORS_ONLY, "--kind vectors")
    if options.text is None:
        raise FewbitsError("--kind kv needs --text, a file of words for the model to read")
    from fewbits.kv import compare

    sizes = {name: getattr(options, name) for name in ("pieces", "prompt", "scored")}
    return compare(
        options.file,
        Path(options.text),
        methods=options.methods,
        calibrate=None if options.calibrate is None else Path(options.calibrate),
        show_progress=True,
        **{name: value for name, value in sizes.items() if value is not None},
    )


def refuse_others(options: argparse.Namespace, names: dict[str, Any], kind: str) -> None:
    """Refuse options that another kind of comparison has."""
    for name, default in names.items():
        if getattr(options, name) != default:
            raise FewbitsError(f"--{name.replace('_', '-')} is only for {kind}; leave it out")


def compared_as_asked(options: argparse.Namespace) -> Callable[..., Any]:
    """The comparison of methods, or the search for chains."""
    from functools import partial

    if options.search_chains is None:
        from fewbits.core.compare import compare

        return partial(compare, methods=options.methods, engine=options.engine)
    if options.methods:
        raise FewbitsError("--search-chains tries all methods; leave out --methods")
    if options.engine != "local":
        raise FewbitsError("--search-chains works on this machine alone; leave out --engine")
    from fewbits.core.chains import search_chains

    return partial(search_chains, at_most=options.search_chains)


def run_encode(options: argparse.Namespace) -> None:
    from fewbits.core.encode import encode

    output = options.output or default_output(options.file)
    encoded = encode(
        items_of(options),
        output,
        method=options.method,
        keep=options.keep,
        at_most=options.at_most,
        ratio=options.ratio,
        queries=queries_of(options),
        metric=options.metric,
        column=options.column,
        seed=options.seed,
        overwrite=options.overwrite,
        engine=options.engine,
        workers=options.workers,
        show_progress=True,
    )
    if options.json:
        print_json({"output": str(output), **describe(encoded)})
        return
    print(
        f"{printable(output)}: {len(encoded):,} items by {encoded.codec.spec}, "
        f"{encoded.bytes_per_item:g} bytes each ({encoded.ratio:.1f} times smaller), "
        f"codec {encoded.codec_bytes:,} bytes"
    )


def run_decode(options: argparse.Namespace) -> None:
    from fewbits.core.collection import load

    encoded = load(options.codes)
    path = encoded.decode_to(options.output, overwrite=options.overwrite)
    print(
        f"{printable(path)}: {len(encoded):,} vectors of {encoded.codec.dims_} dimensions, float32"
    )


def run_export(options: argparse.Namespace) -> None:
    from fewbits.core.export import export, export_queries

    if options.queries:
        path = export_queries(
            options.codes,
            queries_of(options),
            options.to,
            options.output,
            column=options.column,
            overwrite=options.overwrite,
        )
        print(f"{printable(path)}: queries for {options.to}")
        return
    exported = export(
        options.codes,
        options.to,
        options.output,
        overwrite=options.overwrite,
        show_progress=True,
    )
    print(
        f"{printable(exported.path)}: {len(exported):,} items for {options.to}, {exported.holds}; "
        f"{exported.nbytes:,} bytes on disk"
    )
    if not exported.raw_queries:
        print(
            f"queries: fewbits export {printable(options.codes)} --to {options.to} --queries FILE "
            "-o FILE.npy"
        )


def run_search(options: argparse.Namespace) -> None:
    from fewbits.core.collection import load

    encoded = load(options.codes)
    rescored = {None: False, "": True}.get(options.rescore, options.rescore)
    scores, rows = encoded.search(
        queries_of(options), options.k, rescored=rescored, column=options.column
    )
    if options.json:
        for one_scores, one_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            print(json.dumps({"rows": one_rows, "scores": one_scores}))
        return
    for number, (one_scores, one_rows) in enumerate(zip(scores, rows, strict=True)):
        found = "  ".join(f"{r}:{s:.4f}" for r, s in zip(one_rows, one_scores, strict=True))
        print(f"query {number}: {found}")


def run_info(options: argparse.Namespace) -> None:
    from fewbits.core.collection import load

    about = describe(load(options.codes))
    if options.json:
        print_json(about)
        return
    for name, value in about.items():
        text = f"{value:,}" if isinstance(value, int) else printable(value)
        print(f"{name.replace('_', ' '):>16}  {text}")


def run_systems(options: argparse.Namespace) -> None:
    from fewbits.core.catalogue import opponents, own, systems

    groups = {"paper": systems(), "own": own(), "opponent": opponents()}
    rows = [
        vars(row) | {"status": row.status, "group": group}
        for group, members in groups.items()
        for row in members
    ]
    if options.json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("room", "name", "status", "what it does"):
        table.add_column(heading, no_wrap=heading != "what it does")
    for row in rows:
        # As plain text, because the [torch] of fewbits[torch] would be taken for markup.
        table.add_row(*(Text(row[name]) for name in ("room", "name", "status", "summary")))
    Console().print(table)
    here = sum(row["group"] == "paper" and row["status"] != "planned" for row in rows)
    print(
        f"{here} of {len(groups['paper'])} papers are here, {len(groups['own'])} codec of our own, "
        f"and {len(groups['opponent'])} established ones to compare with."
    )


def run_reproduce(options: argparse.Namespace) -> None:
    from fewbits.core.reproduction import available, reproduce, reproducible

    if bool(options.names) == options.all:
        raise FewbitsError(f"name the systems, or pass --all; there are: {', '.join(available())}")
    names = options.names or available()
    for name in names:  # all of them before the first, which may take minutes
        reproducible(name)
    results = []
    for name in names:
        result = reproduce(name, options.size)
        results.append(result.to_json())
        if not options.json:
            print_reproduction(vars(result))
    if options.json:
        print_json(results)


def run_demo(options: argparse.Namespace) -> None:
    from fewbits.demo import demo

    demo(Path(options.output))


# -- texts ---------------------------------------------------------------------------------


def items_of(options: argparse.Namespace) -> Any:
    """The input: vectors as they are, texts embedded where there is a model."""
    if options.model is None:
        refuse_texts(options.file)
        return options.file
    from fewbits.core.texts import open_texts

    model = options.model or None
    return open_texts(options.file, model, column=options.column, show_progress=True)


def queries_of(options: argparse.Namespace) -> Any:
    """The queries, embedded where they are texts and there is a model."""
    if options.queries is None:
        return None
    if options.model is None:
        refuse_texts(options.queries)
        return options.queries
    from fewbits.core.texts import READERS, open_text_queries

    if Path(options.queries).suffix.lower() not in READERS:
        return options.queries
    return open_text_queries(options.queries, options.model or None, options.column, True)


def refuse_texts(file: str) -> None:
    if Path(file).suffix.lower() in TEXTS:
        from fewbits.core.locations import SUFFIXES

        raise FewbitsError(
            f"{file} is not a kind of file fewbits reads; it reads {', '.join(SUFFIXES)}; "
            "if it holds texts, pass --model to embed them"
        )


# -- printing ------------------------------------------------------------------------------


def one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def describe(encoded: Any) -> dict[str, Any]:
    """What `info` and `encode --json` say of an encoded collection."""
    return {
        "method": encoded.codec.spec,
        "items": len(encoded),
        "dims": encoded.codec.dims_,
        "metric": encoded.metric,
        "bytes_per_item": encoded.bytes_per_item,
        "payload_bytes": encoded.nbytes,
        "codec_bytes": encoded.codec_bytes,
        "ratio": round(encoded.ratio, 3),
        "parts": len(encoded.parts),
        "made_from": encoded.source["name"],
        "digest": encoded.codec.digest,
    }


def print_reproduction(result: dict[str, Any]) -> None:
    verdict = "holds" if result["holds"] else "does not hold here"
    print(f"{result['system']}: {verdict} ({result['seconds']} s)")
    print(f"  claim: {result['claim']}")
    if result["data"]:
        print(f"  data: {result['data']}")
    for title in ("figures", "baselines"):
        for name, value in result[title].items():
            print(f"  {title[:-1]:>9}  {name}: {value:.4g}")
    if result["reason"]:
        print(f"  {result['reason']}")


# -- the parser ----------------------------------------------------------------------------


def default_output(file: str) -> Path:
    if file == "-":
        return Path("stdin.fewbits")
    if file.startswith("example:"):
        return Path(file.removeprefix("example:") + ".fewbits")
    from fewbits.core.locations import fixed_folder, is_pattern, is_url, local_path, url_name

    # A remote collection is encoded into the current folder.
    path = local_path(file) if not is_url(file) else Path(url_name(file))
    if not is_url(file) and is_pattern(path):
        path = fixed_folder(path)
    if path.name in ("", ".."):
        raise FewbitsError(f"{file} has no name to call the output by; pass --output")
    return path.with_name((path.name if path.is_dir() else path.stem) + ".fewbits")


def parse_keep(text: str) -> dict[str, float]:
    name, _, value = text.partition("=")
    try:
        return {name.strip(): float(value.rstrip("%")) / (100 if value.endswith("%") else 1)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write it like recall@10=0.95") from None


def parse_amount(text: str, unit: str) -> float:
    """A positive number, with or without its unit: 48, 48B, 16x."""
    match = re.fullmatch(rf"([0-9.]+(?:e[+-]?[0-9]+)?)\s*{unit}?", text.strip(), re.IGNORECASE)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write it like {48 if unit == 'B' else 16}{unit}"
        )
    return value


def whole_number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


class Parser(argparse.ArgumentParser):
    """Errors take one line, and exit with 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"fewbits: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fewbits",
        description="Encode vectors into few bits, and say honestly what that cost.",
    )
    parser.add_argument("--version", action="version", version=f"fewbits {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        return made

    add_compare(command("compare", run_compare, "what does each method cost at each size?"))
    add_encode(command("encode", run_encode, "make a collection small"))

    made = command("decode", run_decode, "get vectors back")
    made.add_argument("codes", help=".fewbits file or directory")
    made.add_argument("-o", "--output", required=True, help=".npy file to write")
    made.add_argument("--overwrite", action="store_true", help="replace an existing output")

    made = command("export", run_export, "put a collection into a vector store")
    made.add_argument("codes", help=".fewbits file or directory")
    made.add_argument("--to", required=True, choices=STORES, help="kind of store")
    made.add_argument("-o", "--output", required=True, help="file or folder to write")
    made.add_argument("--queries", help="write these, as the store takes them, to an .npy instead")
    made.add_argument("--column", help="column or array of queries, where there are several")
    add_model(made)
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    made = command("search", run_search, "find the best items for each query")
    made.add_argument("codes", help=".fewbits file or directory")
    made.add_argument("--queries", required=True, help=INPUT_HELP)
    made.add_argument("-k", type=whole_number, default=10, help="items per query (10)")
    made.add_argument(
        "--rescore",
        nargs="?",
        const="",
        metavar="ORIGINALS",
        help="order the best 10·k again, by decoded items or by the original vectors if given",
    )
    made.add_argument("--column", help="column or array of queries, where there are several")
    add_model(made)
    made.add_argument("--json", action="store_true", help="one JSON object per query")

    made = commands.add_parser("kv", help="KV caches of language models: choose, fit, save, load")
    add_kv(made)

    made = command("info", run_info, "what is in a .fewbits file or directory?")
    made.add_argument("codes", help=".fewbits file or directory")
    made.add_argument("--json", action="store_true", help="print JSON")

    made = command("systems", run_systems, "list the catalogue")
    made.add_argument("--json", action="store_true", help="print JSON")

    made = command("reproduce", run_reproduce, "run the headline claims of papers")
    made.add_argument("names", nargs="*", metavar="NAME", help="systems, as `systems` lists them")
    made.add_argument("--all", action="store_true", help="all that there are")
    made.add_argument("--size", choices=("small", "quick"), default="small", help="small (minutes)")
    made.add_argument("--json", action="store_true", help="print JSON")

    made = command("demo", run_demo, "the main job on the built-in real example")
    made.add_argument("-o", "--output", default="demo", help="folder to write (demo)")
    return parser


def add_model(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="NAME_OR_FOLDER",
        help="embed texts (.txt, .jsonl, .csv, .parquet) with this sentence-transformers model; "
        "without a name, with all-MiniLM-L6-v2",
    )


def add_input(made: argparse.ArgumentParser) -> None:
    made.add_argument("file", help=INPUT_HELP)
    add_model(made)
    made.add_argument("--queries", help="real queries; held-out rows are used without")
    made.add_argument(
        "--metric",
        choices=("cosine", "ip", "l2"),
        default="cosine",
        help="cosine (scales rows to unit length; the default), inner product, or distance",
    )
    made.add_argument("--column", help="column or array to read, where there are several")
    made.add_argument(
        "--seed", type=int, default=0, help="of samples; a method has its own, as an option (0)"
    )
    made.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to work: this machine (the default), or a Ray cluster",
    )
    made.add_argument("--json", action="store_true", help="print JSON")


def add_compare(made: argparse.ArgumentParser) -> None:
    add_input(made)
    made.add_argument(
        "--kind",
        choices=("vectors", "kv"),
        default="vectors",
        help="kv compares KV caches: FILE is then the name or folder of a language model, or "
        "reference for one that ships with fewbits",
    )
    made.add_argument("--methods", help="names or spec strings, joined by commas; all by default")
    made.add_argument(
        "--search-chains",
        type=lambda text: parse_amount(text, "B"),
        metavar="SIZE",
        help="instead, look for the best chain of up to three methods within 48B per item",
    )
    made.add_argument("--qrels", help="relevance judgements; adds nDCG@10")
    made.add_argument("--rows", type=whole_number, default=100_000, help="sample size (100000)")
    made.add_argument("--text", metavar="FILE", help="kv: words for the model to read")
    made.add_argument("--calibrate", metavar="FILE", help="kv: words for methods that learn first")
    made.add_argument("--pieces", type=whole_number, help="kv: pieces of the text (8)")
    made.add_argument("--prompt", type=whole_number, help="kv: tokens of a prompt (512)")
    made.add_argument("--scored", type=whole_number, help="kv: tokens scored behind each (64)")
    made.add_argument("--report", metavar="DIR", help="write an HTML report and a picture there")


def add_encode(made: argparse.ArgumentParser) -> None:
    add_input(made)
    made.add_argument("-o", "--output", help="file (or directory, for sharded input) to write")
    wish = made.add_mutually_exclusive_group()
    wish.add_argument("--method", help="spec string, such as pca-rag:dims=96+int8")
    wish.add_argument("--keep", type=parse_keep, help="cheapest that keeps it: recall@10=0.95")
    wish.add_argument(
        "--at-most", type=lambda text: parse_amount(text, "B"), help="best within 48B per item"
    )
    wish.add_argument(
        "--ratio", type=lambda text: parse_amount(text, "x"), help="best that is 16x smaller"
    )
    made.add_argument("--workers", type=whole_number, help="cores to encode on (all there are)")
    made.add_argument("--overwrite", action="store_true", help="replace an existing output")
