"""What does each cache cost at each size? The verb ``compare`` for language models.

Every method reads the first tokens of some pieces of a text and is compressed; the tokens behind
them are scored through it, against the whole cache. Where the whole cache finds a fact that was
put into the text, so is how often each method does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits.core import frontier
from fewbits.core.compare import Comparison, split_methods
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.progress import Steps, progress
from fewbits.kv import stages
from fewbits.kv._files import head_width
from fewbits.kv._grid import (
    BUDGETS,
    FITTED,
    ROWS,
    Candidate,
    FittedRow,
    Probe,
    Row,
    candidates,
    fitted_candidates,
    known,
)
from fewbits.kv._subject import Subject, check_length, open_subject, read_text
from fewbits.kv.evaluation import Cost, Scores, batch_of
from fewbits.kv.retrieval import SOLVED, Questions, make_questions, retrieve

TARGET = "KL"
PIECES, PROMPT, SCORED = 8, 512, 64
FITTING_PIECES = 8
FITTING_SHARE = 0.4
"""Of the text, where methods are fitted from its beginning and no other text is given."""
NEEDLES = 10
"""Facts that are asked for, of each way to ask."""


@dataclass(frozen=True)
class Texts:
    """What is read: `pieces` to score, `fitting` pieces to learn from, and where needles go."""

    pieces: Tensor
    fitting: Tensor | None
    haystack: str | None
    no_fitting: str = ""
    """Why there is nothing to learn from."""


def compare(
    model: Any,
    text: str | Path | Tensor,
    *,
    methods: str | Sequence[str] | None = None,
    calibrate: str | Path | Tensor | None = None,
    tokenizer: Any = None,
    pieces: int = PIECES,
    prompt: int = PROMPT,
    scored: int = SCORED,
    show_progress: bool = False,
) -> Comparison:
    """Run every applicable cache over a grid of sizes, and measure bytes, quality and speed.

    Parameters
    ----------
    model : name or folder of a causal language model (``reference`` is one that ships with
        fewbits), or one that is loaded already.
    text : words, the `Path` of a file with some, or (pieces, tokens) int64.
    methods : names or spec strings, as a list or joined by commas; a name alone stands for its
        whole grid of settings. None runs all.
    calibrate : the same kind of text for methods that are fitted first; without, they learn from
        the first two fifths of `text`, which are then not scored.
    tokenizer : of a model that is loaded already, where `text` is words.
    pieces, prompt, scored : so many pieces of the text, tokens of each that are read before the
        cache is compressed, and tokens that are scored behind those.

    Returns
    -------
    `Comparison` whose items are tokens. Qualities are ``KL`` (whole cache ‖ this one, nats per
    token), ``perplexity``, ``agreement`` of the most probable token; and, if the whole cache finds
    at least half of them, of facts put into the text ``needle`` (asked for after compression) and
    ``needle-aware`` (asked for before).

    Raises
    ------
    FewbitsError
        Unusable model or text, unknown methods, or none that works.
    """
    start = time.perf_counter()
    check_sizes(pieces, prompt, scored)
    rows, fitted, specs = asked_for(methods)
    words, learn_from = read_text(text), read_calibration(calibrate)
    subject = open_subject(model, tokenizer)
    texts = cut_texts(subject, words, learn_from, bool(fitted), pieces, prompt + scored)
    probe = Probe(subject.model, texts.pieces[:1, :prompt])
    tried = [*candidates(rows, probe, BUDGETS), *specs]
    with progress("comparing caches", 0, show=show_progress) as bar:
        learned, left_out = fit_all(fitted, subject, texts, BUDGETS, bar)
        points, failed = measure(subject, texts, [*tried, *learned], prompt, bar)
    left_out += failed + (not_trained() if methods is None else [])
    if not points:
        raise FewbitsError(f"nothing could be compared: {left_out[0]['why']}")
    seconds = round(time.perf_counter() - start, 1)
    about = described(subject, probe, text, texts, prompt) | {"seconds": seconds}
    return Comparison(about, frontier.mark_frontier(points, TARGET), left_out)


def check_sizes(pieces: int, prompt: int, scored: int) -> None:
    for name, value, least in (
        ("pieces", pieces, 1),
        ("prompt", prompt, 16),
        ("scored", scored, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise FewbitsError(f"{name} must be a whole number of at least {least}, not {value!r}")


def described(
    subject: Subject, probe: Probe, text: Any, texts: Texts, prompt: int
) -> dict[str, Any]:
    """What a report says of the input."""
    config = subject.model.config.get_text_config(decoder=True)
    pieces, tokens = texts.pieces.shape
    name = f" on {text.name}" if isinstance(text, Path) else ""
    return {
        "kind": "kv",
        "name": f"{subject.name}{name}",
        "rows": pieces * prompt,
        "layers": probe.layers,
        "heads": probe.keys.shape[1],
        "dims": head_width(config),
        "dtype": str(probe.keys.dtype).removeprefix("torch."),
        "bytes_per_item": round(probe.bytes_per_token, 3),
        "pieces": pieces,
        "prompt": prompt,
        "scored": tokens - prompt,
    }


# -- what to run ---------------------------------------------------------------------------


def asked_for(
    methods: str | Sequence[str] | None,
) -> tuple[list[Row], list[FittedRow], list[Candidate]]:
    """Rows of the grid, rows that are fitted first, and settings that were named.

    The whole cache is always among them, as all others are measured against it.

    Raises
    ------
    FewbitsError
        Unknown methods or options.
    """
    if methods is None:
        return (
            [row for row in ROWS if known(row.name)],
            [row for row in FITTED if known(row.name) and not row.trains],
            [],
        )
    names = split_methods(methods) if isinstance(methods, str) else list(methods)
    if not names:
        raise FewbitsError("no methods are named; `fewbits systems` lists the names")
    rows = [row for row in ROWS if row.name in ("full", *names) and known(row.name)]
    fitted = [row for row in FITTED if row.name in names and known(row.name)]
    gridded = {row.name for row in rows} | {row.name for row in fitted}
    specs = []
    for name in dict.fromkeys(names):
        if name not in gridded:
            chain = "+".join(stage.name for stage in stages(name))
            specs.append(Candidate(chain, name, name))
    return rows, fitted, specs


def read_calibration(calibrate: str | Path | Tensor | None) -> str | Tensor | None:
    return None if calibrate is None else read_text(calibrate, "calibration text")


def cut_texts(
    subject: Subject,
    words: str | Tensor,
    learn_from: str | Tensor | None,
    fitting: bool,
    pieces: int,
    length: int,
) -> Texts:
    """The pieces to score, and those to learn from where something is to be fitted."""
    check_length(subject.model, length)
    own = fitting and learn_from is None and isinstance(words, str)
    if own:
        assert isinstance(words, str)
        cut = int(len(words) * FITTING_SHARE)
        learn_from, words = words[:cut], words[cut:]
    found = subject.pieces(words, pieces, length)
    haystack = words if isinstance(words, str) and subject.tokenizer is not None else None
    if not fitting:
        return Texts(found, None, haystack)
    if learn_from is None:
        why = "it is fitted first: give a calibration text (calibrate, --calibrate)"
        return Texts(found, None, haystack, why)
    try:
        return Texts(found, subject.pieces(learn_from, FITTING_PIECES, length), haystack)
    except FewbitsError as error:
        if not own:
            raise FewbitsError(f"the calibration text cannot be used: {error}") from None
        why = f"it is fitted first, and the beginning of the text is too short for it: {error}"
        return Texts(found, None, haystack, why)


def not_trained() -> list[dict[str, str]]:
    """Methods that only run where they are named, and why."""
    why = "it is trained, for minutes or longer; it runs where methods (--methods) names it"
    return [{"method": row.name, "why": why} for row in FITTED if row.trains and known(row.name)]


def fit_all(
    rows: Sequence[FittedRow],
    subject: Subject,
    texts: Texts,
    budgets: Sequence[float],
    bar: Steps,
) -> tuple[list[Candidate], list[dict[str, str]]]:
    """What the rows learn, and which could not and why."""
    found: list[Candidate] = []
    left_out = []
    bar.extend(len(rows))
    for row in rows:
        bar.step(f"fitting {row.name}", 0)
        try:
            if texts.fitting is None:
                raise FewbitsError(texts.no_fitting)
            found += fitted_candidates(row, subject.model, texts.fitting, budgets)
        except (FewbitsError, RuntimeError) as error:
            left_out.append({"method": row.name, "why": " ".join(str(error).split())})
        bar.step()
    return found, left_out


# -- measuring -----------------------------------------------------------------------------


def measure(
    subject: Subject, texts: Texts, tried: Sequence[Candidate], prompt: int, bar: Steps
) -> tuple[list[Point], list[dict[str, str]]]:
    """The points of all candidates, and what was left out and why."""
    model, scored = subject.model, texts.pieces.shape[1] - prompt
    scores = Scores(model, prompt, {one.spec: one.method for one in tried}, forgiving=True)
    batches = texts.pieces.split(batch_of(model, scored, 8))
    bar.extend(len(batches) * (len(scores.methods) + 1))
    for rows in batches:
        scores.add(rows, step=bar.step)
    named = {one.spec: one for one in tried if one.spec not in scores.failed}
    points = {
        spec: point_of(one, scores.cost(spec), texts.pieces.shape[0] * prompt)
        for spec, one in named.items()
    }
    left_out = [{"method": spec, "why": why} for spec, why in scores.failed.items()]
    if points and texts.haystack is not None:
        found, unsolved = needles(subject, texts.haystack, prompt, named, bar)
        left_out += unsolved
        for spec, quality in found.items():
            points[spec] = replace(points[spec], quality=points[spec].quality | quality)
    return list(points.values()), left_out


def point_of(candidate: Candidate, cost: Cost, tokens_read: int) -> Point:
    """The figures of one method, as every kind of comparison has them."""
    return Point(
        method=candidate.name,
        spec=candidate.spec,
        bytes_per_item=round(cost.bytes_per_token, 3),
        codec_bytes=candidate.fitted_bytes,
        ratio=round(1 / cost.share, 4),
        quality={
            "KL": float(f"{cost.divergence:.5g}"),
            "perplexity": round(cost.perplexity, 4),
            "agreement": round(cost.agreement, 5),
        },
        fit_seconds=round(candidate.fit_seconds, 3),
        encode_per_second=round(tokens_read / cost.prompt_seconds, 1),
        search_per_second=round(cost.tokens_per_second, 1),
    )


def needles(
    subject: Subject, text: str, prompt: int, named: dict[str, Candidate], bar: Steps
) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """For each spec how often it finds a fact; nothing where the whole cache does not, and why."""
    found: dict[str, dict[str, float]] = {spec: {} for spec in named}
    try:
        questions = make_questions(subject.needed_tokenizer(), text, prompt, rows=NEEDLES)
    except FewbitsError as error:
        return found, [{"method": "needle", "why": str(error)}]
    left_out = []
    for name, aware in (("needle", False), ("needle-aware", True)):
        whole = retrieve(subject.model, questions, ["full"], aware=aware)[0].accuracy
        if whole < SOLVED:
            why = (
                f"the whole cache finds {whole:.0%} of the facts in the text, so that what others "
                "find says nothing of them; a larger model may find more"
            )
            left_out.append({"method": name, "why": why})
            continue
        bar.extend(len(named))
        for spec, accuracy in asked(subject, questions, named, aware, bar):
            found[spec][name] = accuracy
    return found, left_out


def asked(
    subject: Subject, questions: Questions, named: dict[str, Candidate], aware: bool, bar: Steps
) -> list[tuple[str, float]]:
    """Spec and accuracy of each method that can answer at all."""
    found = []
    for spec, one in named.items():
        bar.step(spec)
        try:
            (result,) = retrieve(subject.model, questions, {spec: one.method}, aware=aware)
        except (FewbitsError, RuntimeError):  # it has its other figures
            continue
        found.append((spec, result.accuracy))
    return found
