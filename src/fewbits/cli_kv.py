"""The commands of ``fewbits kv``: choose, fit, save, load and bench-link."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbits.core.errors import FewbitsError

MODEL_HELP = "name or folder of a language model, or reference for one that ships with fewbits"
PIECES, LENGTH = 32, 512
"""Of the text that a method is fitted to: at most so many pieces, of so many tokens."""


def add_kv(made: argparse.ArgumentParser) -> None:
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("model", help=MODEL_HELP)
        added.set_defaults(run=run)
        return added

    added = command("choose", run_choose, "pick the best cache within a budget")
    added.add_argument("--text", required=True, help="file of words to try caches on")
    added.add_argument("--at-most", help="share of the whole cache (25%%), or bytes per token")
    added.add_argument(
        "--keep", metavar="NAME=VALUE", help="perplexity=+1%%, agreement=-2%%, KL=0.01"
    )
    added.add_argument("--calibrate", metavar="FILE", help="words for methods that learn first")
    added.add_argument("-o", "--output", help="file for the method, where it was fitted")
    added.add_argument("--overwrite", action="store_true", help="replace an existing output")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("fit", run_fit, "fit a method to a model, once")
    added.add_argument(
        "--method", required=True, help="cskv, matryoshkakv, pca, prefixkv, cachegen"
    )
    added.add_argument("--text", required=True, help="file of words to learn from")
    added.add_argument("-o", "--output", required=True, help="file to write")
    added.add_argument("--overwrite", action="store_true", help="replace an existing output")

    added = command("save", run_save, "have a model read a text, and save what it remembers")
    added.add_argument("--text", required=True, help="file of words")
    added.add_argument("-o", "--output", required=True, help="folder or URL to write")
    added.add_argument("--profile", help="file that `kv fit --method cachegen` wrote")
    added.add_argument("--overwrite", action="store_true", help="replace an earlier cache")

    added = command("load", run_load, "load a saved cache, and have the model go on from it")
    added.add_argument("place", help="folder or URL of a saved cache")
    added.add_argument("--ask", required=True, metavar="TEXT", help="what comes behind the text")
    added.add_argument("--deadline", type=float, metavar="SECONDS", help="when it should be there")
    added.add_argument("--level", help="quality of all chunks; 0 is the finest")
    added.add_argument("--new-tokens", type=int, default=64, help="to write (64)")

    added = command("bench-link", run_bench_link, "is loading a saved cache worth it here?")
    added.add_argument("place", help="folder or URL of a saved cache")


def run_choose(options: argparse.Namespace) -> None:
    from fewbits.kv import choose

    if options.at_most is None and options.keep is None:
        raise FewbitsError("say what is wanted: --at-most 25% or --keep perplexity=+1%")
    choice = choose(
        options.model,
        Path(options.text),
        at_most=options.at_most,
        keep=kept(options.keep),
        calibrate=None if options.calibrate is None else Path(options.calibrate),
        show_progress=True,
    )
    if options.output:
        if isinstance(choice.method, str):
            print(f"{choice.spec} needs no fitting; nothing to write", file=sys.stderr)
        else:
            choice.method.save(Path(options.output), overwrite=options.overwrite)
    if options.json:
        about = {"spec": choice.spec, "fitted_bytes": choice.fitted_bytes}
        print(json.dumps(about | vars(choice.cost), indent=1))
    else:
        print(choice)


def kept(text: str | None) -> dict[str, str]:
    """``perplexity=+1%,KL=0.01`` by name."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if any(not equals or not value.strip() for _, equals, value in pairs):
        raise FewbitsError(f"--keep {text}: write NAME=VALUE, for example perplexity=+1%")
    return {name.strip(): value.strip() for name, _, value in pairs}


def run_fit(options: argparse.Namespace) -> None:
    from fewbits.core.catalogue import cache_stage
    from fewbits.core.codec import with_options
    from fewbits.core.language_model import load_language_model

    name, _, text = options.method.partition(":")
    method = with_options(cache_stage(name.strip()), name, text)
    if not hasattr(method, "fit"):
        raise FewbitsError(f"{name} learns nothing; use it as it is")
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise FewbitsError(f"{output} exists; choose another name, or --overwrite")
    words = words_of(options.text)
    model, tokenizer = load_language_model(options.model)
    fitted = method.fit(model, learned_from(tokenizer, words))
    fitted.save(output, overwrite=options.overwrite)
    print(f"{output}: {options.method}, {output.stat().st_size:,} bytes")


def learned_from(tokenizer: Any, words: str) -> Any:
    """(n, t) int64: as many pieces as the text has, but not more than it takes to learn."""
    from fewbits.core.language_model import token_rows

    tokens = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    length = min(LENGTH, tokens)
    return token_rows(tokenizer, words, min(PIECES, tokens // max(1, length)), length)


def words_of(file: str) -> str:
    from fewbits.kv._subject import read_text

    words = read_text(Path(file))
    assert isinstance(words, str)
    return words


def run_save(options: argparse.Namespace) -> None:
    from fewbits.core.language_model import load_language_model
    from fewbits.kv.cachegen import CacheGen
    from fewbits.kv.store import save_text, saved_lines

    words = words_of(options.text)
    profile = CacheGen.load(options.profile) if options.profile else None
    model, tokenizer = load_language_model(options.model)
    manifest = save_text(
        model, tokenizer, words, options.output, profile=profile, overwrite=options.overwrite
    )
    for line in (f"{options.output}:", *saved_lines(manifest)):
        print(line)


def run_load(options: argparse.Namespace) -> None:
    from fewbits.core.language_model import load_language_model
    from fewbits.kv.store import go_on

    model, tokenizer = load_language_model(options.model)
    found = go_on(
        model,
        tokenizer,
        options.place,
        options.ask,
        new_tokens=options.new_tokens,
        deadline=options.deadline,
        level=options.level,
    )
    print(found.text)
    for line in found.lines():
        print(line, file=sys.stderr)


def run_bench_link(options: argparse.Namespace) -> None:
    from fewbits.core.language_model import load_language_model
    from fewbits.kv.streaming import bench_link

    model, _ = load_language_model(options.model)
    for line in bench_link(model, options.place).lines():
        print(line)
