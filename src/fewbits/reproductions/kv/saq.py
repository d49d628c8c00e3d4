"""SAQ's claim: where bits must go, let them go from the oldest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.core.language_model import load_language_model
from fewbits.core.reproduction import Reproduction
from fewbits.kv._forms import Part
from fewbits.kv.baselines import KIVI
from fewbits.kv.saq import SAQ, joined_parts, with_bits
from fewbits.reproductions.kv._measure import Methods, better, costs, table, test_texts

CLAIM = (
    "bits that fall with age (8, 4, then 2) diverge less than the same bits that rise with age, "
    "and less than 2 bits everywhere; 4 bits everywhere, at more bytes than the stairs, less still"
)


@dataclass(frozen=True)
class Size:
    rows: int
    prompt: int
    scored: int


SIZES = {"quick": Size(4, 192, 16), "small": Size(32, 448, 64)}


@dataclass
class Rising(SAQ):
    """The stairs the other way round: the oldest blocks have the most bits."""

    name: ClassVar[str] = "rising"
    kept: str = "8-4"
    """Bits of the oldest block, and of the next ones; all others have the floor."""

    def aged(self, parts: list[Part]) -> list[Part]:
        """The first blocks stay as they are; what comes later goes to the floor at once."""
        steps = [int(step) for step in self.kept.split("-")]
        first = [with_bits(part, bits) for part, bits in zip(parts, steps, strict=False)]
        rest = [with_bits(part, self._steps[-1]) for part in parts[len(first) :]]
        return [*first, *joined_parts(rest)]


def methods() -> Methods:
    made: dict[str, Any] = {"stairs 8-4-2": SAQ("8-4-2"), "rising 2-4-8": Rising("8-4-2")}
    made |= {f"stairs {stairs}": SAQ(stairs) for stairs in ("8-2", "4-2", "8-4", "8-4-2-1")}
    made |= {f"{bits} bits": KIVI(bits, recent=0) for bits in (2, 4, 8)}
    return made


def run(size: str = "small") -> Reproduction:
    """Run the claim on the reference model and a text that it has not seen."""
    plan = SIZES[size]
    model, tokenizer = load_language_model()
    tokens = test_texts(tokenizer, plan.rows, plan.prompt + plan.scored)
    found = costs(model, tokens, plan.prompt, methods())
    stairs = found["stairs 8-4-2"]
    met = {
        "below rising bits": better(stairs, found["rising 2-4-8"], 2),
        "below 2 bits": better(stairs, found["2 bits"], 2),
        "4 bits below the stairs": better(found["4 bits"], stairs, 2),
    }
    failed = [name for name, is_met in met.items() if not is_met]
    shown = {f"KL × 1000, {name}": 1000 * cost.mean for name, cost in found.items()}
    return Reproduction(
        "saq",
        CLAIM,
        {name: value for name, value in shown.items() if "stairs" in name},
        {name: value for name, value in shown.items() if "stairs" not in name},
        not failed,
        f"not met: {'; '.join(failed)}" if failed else "",
        f"reference model; {plan.rows} texts, {plan.prompt} tokens read and {plan.scored} scored",
        0.0,
        table(found),
    )
