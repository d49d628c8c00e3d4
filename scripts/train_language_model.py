"""Train a small language model for experiments with caches, from text that comes with Python.

    python scripts/train_language_model.py [--text FOLDER] [--work FOLDER] [--output FOLDER]

Text: the modules of the standard library (their tests left out), the language reference of
`pydoc`, and lines of made-up facts that are asked for again further on, so that the model learns
to look back. `--text` takes any folder of ``.py``, ``.txt``, ``.md`` and ``.rst`` files instead of
the first two. Checkpoints and the learning curve go to `--work`; run it again after an
interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from language_model_card import learned, perplexity, write_card
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.devices import seeded
from fewbits.core.schedules import warmup_cosine
from fewbits.core.training import History, train

OUTPUT = Path(__file__).parent.parent / "src" / "fewbits" / "core" / "data" / "language_model"
VOCABULARY = 4096
END = "<|end|>"
HELD_OUT = ("argparse.py", "heapq.py", "statistics.py", "textwrap.py", "zipfile.py", "calendar.py")
"""Modules that the model never sees."""
CALIBRATION = ("ast.py", "configparser.py", "csv.py", "difflib.py", "inspect.py", "shutil.py")
"""Modules among those it learns from that are kept as a text to calibrate methods with."""
EPOCHS = 20
"""Parts of a stage's schedule; after each, the learning curve gets a point."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes
    ----------
    context : tokens of a sequence.
    batch : sequences of a step.
    sequences : of the whole schedule.
    epochs : so many of the schedule's `EPOCHS` parts are run; the next stage goes on from there.
    rate : highest learning rate.
    copies : pieces that come again further on, in half of the sequences.
    facts : put into each sequence, and asked for again; such sequences begin with the token that
        ends a text, as a place for attention to rest on.
    """

    context: int
    batch: int
    sequences: int
    epochs: int
    rate: float
    copies: int = 0
    facts: int = 0

    @property
    def tokens(self) -> int:
        return self.context * self.sequences * self.epochs // EPOCHS


STAGES = (
    Stage(context=256, batch=16, sequences=38_400, epochs=8, rate=3e-3),
    Stage(context=1024, batch=4, sequences=3_520, epochs=8, rate=2e-3, copies=3),
    Stage(context=1024, batch=4, sequences=2_400, epochs=EPOCHS, rate=2e-3, copies=10),
    Stage(context=1024, batch=4, sequences=3_600, epochs=EPOCHS, rate=2e-3, copies=6, facts=8),
)
LONGEST_COPY = 96
"""Tokens of a piece that comes again."""
SHUFFLED, IGNORED = 0.5, -100
"""Share of those pieces whose tokens are in another order, and the target of such tokens."""
FACT_SHARE = 0.4
"""Share of documents that get facts."""
SEED = 0


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    documents, held_out, calibration = read_documents(options.text)
    tokenizer = train_tokenizer([*documents], options.work / "tokenizer.json")
    tokens = token_stream(tokenizer, documents)
    print(f"{len(documents):,} documents, {len(tokens):,} tokens")
    model = build(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    test = np.array(tokenizer.encode(held_out).ids, dtype=np.int64)
    for number in range(len(STAGES)):
        run_stage(model, tokenizer, tokens, test, number, options.work)
    model.eval()
    figures = learned(model, tokenizer, test)
    save(model, tokenizer, held_out, calibration, options.work, options.output)
    write_card(
        figures,
        options.output,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        vocabulary=VOCABULARY,
        tokens=len(tokens),
        share=FACT_SHARE,
        stages=", then ".join(
            f"{stage.tokens / 1e6:.1f} M tokens in pieces of {stage.context:,}" for stage in STAGES
        ),
        held_out=", ".join(HELD_OUT),
    )
    print(f"{options.output}: {json.dumps(figures, indent=1)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, help="folder of texts to learn from")
    parser.add_argument("--work", type=Path, default=Path("language-model-training"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


# -- text ----------------------------------------------------------------------------------


def read_documents(folder: Path | None) -> tuple[list[str], str, str]:
    """Texts to learn from, facts in some; a text kept back; and one to calibrate with."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in (folder or library).rglob("*") if is_text(p)]
    files = sorted(p for p in files if folder is not None or is_module(p))
    texts = {p: p.read_text("utf-8", errors="ignore") for p in files}
    held_out = [text for p, text in texts.items() if p.parent == library and p.name in HELD_OUT]
    held_out = held_out or [texts.pop(files[-1])]
    kept = [text for p, text in texts.items() if not (p.parent == library and p.name in HELD_OUT)]
    named = [text for p, text in texts.items() if p.parent == library and p.name in CALIBRATION]
    calibration = "\n".join(named or kept[:6])
    if folder is None:
        from pydoc_data.topics import topics

        kept += topics.values()
    shuffler = random.Random(SEED)
    shuffler.shuffle(kept)
    return [with_facts(text, shuffler) for text in kept], "\n".join(held_out), calibration


def is_text(path: Path) -> bool:
    return path.suffix in (".py", ".txt", ".md", ".rst") and path.is_file()


def is_module(path: Path) -> bool:
    """A module of the standard library that is no test, no table and no third party's."""
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
    return path.suffix == ".py" and not skipped & set(path.parts)


def with_facts(text: str, chance: random.Random) -> str:
    """Put facts between some lines, and ask for them again within the next thousand characters."""
    if chance.random() > FACT_SHARE:
        return text
    lines, made, waiting = text.splitlines(), [], []
    for number, line in enumerate(lines):
        made.append(line)
        if chance.random() < 0.04:
            fact = f"# k{chance.randrange(100)} = v{chance.randrange(10_000)}"
            made.append(fact)
            waiting.append((number + chance.randrange(1, 40), fact))
        due = [fact for when, fact in waiting if when <= number]
        waiting = [(when, fact) for when, fact in waiting if when > number]
        made += due
    return "\n".join(made)


def train_tokenizer(texts: list[str], file: Path):
    """A byte-level BPE tokenizer of the texts; kept in `file` for a later run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if file.exists():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))
    return tokenizer


def token_stream(tokenizer, texts: list[str]) -> np.ndarray:
    """(t,) int64: all texts, each followed by the token that ends one."""
    end = tokenizer.token_to_id(END)
    pieces = [[*encoded.ids, end] for encoded in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])


# -- model and training --------------------------------------------------------------------


def build(tokenizer):
    """A Llama of 4.7 million parameters, whose eight query heads share two of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with seeded(SEED):
        return LlamaForCausalLM(config)


class Counted(nn.Module):
    """A model that knows how many steps it has been trained for, also after an interruption."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def run_stage(
    model, tokenizer, tokens: np.ndarray, test: np.ndarray, number: int, work: Path
) -> None:
    """Train one of `STAGES`, or load what an earlier run came to."""
    stage = STAGES[number]
    done = work / f"stage-{number}.safetensors"
    if done.exists():
        load_model(model, done)
        return
    per_epoch = stage.sequences // EPOCHS
    starts = np.random.default_rng(SEED + number).integers(
        0, len(tokens) - stage.context - 1, stage.sequences
    )
    counted = Counted(model)

    def loss(rows: Tensor) -> Tensor:
        step = int(counted.steps)
        epoch = step // (per_epoch // stage.batch)
        counted.steps += 1
        places = starts[epoch * per_epoch + rows.numpy()][:, None] + np.arange(stage.context + 1)
        chance = np.random.default_rng(step)
        found, targets = with_copies(tokens[places], stage.copies, chance)
        if stage.facts:
            found, targets = with_asked_facts(found, targets, stage.facts, tokenizer, chance)
        logits = model(torch.from_numpy(found[:, :-1]), use_cache=False).logits
        targets = torch.from_numpy(targets[:, 1:])
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def note(epoch: int, history: History) -> None:
        model.eval()
        part = stage.context * per_epoch * epoch
        seen = (part + sum(earlier.tokens for earlier in STAGES[:number])) / 1e6
        point = {"million_tokens": round(seen, 2), "training_loss": round(history.loss[-1], 4)}
        point["perplexity"] = round(perplexity(model, test), 3)
        print(point, flush=True)
        with open(work / "curve.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        if epoch & (epoch - 1) == 0:  # 1, 2, 4, 8, 16
            save_model(model, work / f"checkpoint-{number}-{epoch:02d}.safetensors")
        model.train()
        if epoch == stage.epochs:
            raise StageIsOver

    with contextlib.suppress(StageIsOver):
        train(
            counted,
            loss,
            per_epoch,
            epochs=EPOCHS,
            batch_size=stage.batch,
            optimizer=partial(
                torch.optim.AdamW, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.1
            ),
            scheduler=warmup_cosine(0.05, 0.1),
            seed=SEED + number,
            gradient_clip=1.0,
            checkpoint=work / f"stage-{number}.checkpoint",
            checkpoint_seconds=120,
            identity=f"{stage} {len(tokens)}",
            progress=True,
            callback=note,
        )
    save_model(model, done)


class StageIsOver(Exception):
    """Ends a stage before its schedule does."""


def with_copies(
    rows: np.ndarray, copies: int, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(b, t) tokens and targets; in half of the rows pieces come again further on.

    Some of those have their tokens in another order, so that nothing but looking back can tell
    what follows; where such a piece is new, nothing can, and it is no target.
    """
    found, targets = rows.copy(), rows.copy()
    for number in np.flatnonzero(chance.random(len(rows)) < (0.5 if copies else 0.0)):
        for _ in range(copies):
            size = int(chance.integers(16, LONGEST_COPY))
            start, later = sorted(chance.choice(rows.shape[1] // size, 2, replace=False) * size)
            piece = found[number, start : start + size].copy()
            if chance.random() < SHUFFLED:
                chance.shuffle(piece)
                targets[number, start : start + size] = IGNORED
                found[number, start : start + size] = piece
            found[number, later : later + size] = piece
            targets[number, later : later + size] = piece
    return found, targets


def with_asked_facts(
    rows: np.ndarray, targets: np.ndarray, facts: int, tokenizer, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same (b, t) with facts put in twice each, and `END` in front; ends are cut off."""
    made = []
    for pair in zip(rows, targets, strict=True):
        pieces: list[tuple[int, list[int]]] = [(0, [tokenizer.token_to_id(END)])]
        for _ in range(facts):
            line = f"\n# k{chance.integers(100)} = v{chance.integers(10_000)}\n"
            ids = tokenizer.encode(line).ids
            pieces += [(int(place), ids) for place in chance.integers(1, rows.shape[1], 2)]
        pieces.sort(key=lambda piece: piece[0])
        places = np.repeat([place for place, _ in pieces], [len(ids) for _, ids in pieces])
        ids = [one for _, ids in pieces for one in ids]
        made.append([np.insert(row, places, ids)[: rows.shape[1]] for row in pair])
    found = np.array(made)
    return found[:, 0], found[:, 1]


def save(model, tokenizer, held_out: str, calibration: str, work: Path, output: Path) -> None:
    """Half precision weights, tokenizer, the two texts, and the learning curve."""
    from transformers import PreTrainedTokenizerFast

    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    ).save_pretrained(output)
    (output / "held_out.txt").write_text(held_out, encoding="utf-8")
    (output / "calibration.txt").write_text(calibration, encoding="utf-8")
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    (output / "learning_curve.json").write_text(json.dumps(curve, indent=1) + "\n")


if __name__ == "__main__":
    main()
