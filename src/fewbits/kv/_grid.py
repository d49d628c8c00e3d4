"""Methods and settings that are worth comparing, landing at given shares of the whole cache.

The tables `ROWS` and `FITTED` are all there is to extend: one line for a method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewbits.core.catalogue import find
from fewbits.core.errors import FewbitsError
from fewbits.kv import cache
from fewbits.kv._cache import CompressedCache, CompressedLayer

BUDGETS = (0.75, 0.5, 0.25, 0.125)
"""Shares of the whole cache that settings aim at."""
CSKV_DENSITIES_AT_FOUR_BITS = (0.5, 0.25)
PLACES = 1000
"""The share of tokens to keep is searched among so many parts of one."""


@dataclass(frozen=True)
class Row:
    """A method that needs no fitting.

    Attributes
    ----------
    name : of the method, or methods joined by ``+``.
    specs : its settings; where one has ``{keep}`` in it, that is searched for each budget.
    """

    name: str
    specs: tuple[str, ...]


@dataclass(frozen=True)
class FittedRow:
    """A method that learns from a text first.

    Attributes
    ----------
    name : of the method.
    fit : model, (n, t) calibration tokens, shares to aim at → spec string and stage of each.
    trains : by gradient descent, for minutes or hours; so only where it is named.
    """

    name: str
    fit: Callable[[Any, Tensor, Sequence[float]], dict[str, Any]]
    trains: bool = False


@dataclass(frozen=True)
class Candidate:
    """Something to try: what `kv.cache` takes, and how it is called.

    Attributes
    ----------
    name : names of its stages, joined by ``+``.
    spec : what the report shows.
    method : spec string, or stages that were fitted.
    fit_seconds : how long that took.
    """

    name: str
    spec: str
    method: Any
    fit_seconds: float = 0.0

    @property
    def simplicity(self) -> tuple[int, int]:
        """Lower is simpler: fewer stages, then what needs no fitting."""
        return len(self.name.split("+")), int(not isinstance(self.method, str))

    @property
    def fitted_bytes(self) -> int:
        stages = self.method if isinstance(self.method, (list, tuple)) else [self.method]
        return sum(int(getattr(stage, "artefact_bytes", 0)) for stage in stages)


ROWS = (
    Row("full", ("full",)),
    Row("window", ("window:keep={keep}",)),
    Row("snapkv", ("snapkv:keep={keep}",)),
    Row("h2o", ("h2o:keep={keep}",)),
    Row("prefixkv", ("prefixkv:keep={keep}",)),
    Row("think", ("think:ratio=0.25", "think:ratio=0.5", "think:ratio=0.75")),
    Row("kivi", ("kivi:bits=8", "kivi:bits=4", "kivi:bits=2", "kivi:bits=1")),
    Row("saq", ("saq:stairs=8-4", "saq:stairs=8-4-2", "saq:stairs=4-2-1")),
    Row("vidkv", ("vidkv",)),
    Row("think+kivi", ("think:ratio=0.4+kivi:bits=4", "think:ratio=0.4+kivi:bits=2")),
    Row("snapkv+kivi", ("snapkv:keep={keep}+kivi:bits=8", "snapkv:keep={keep}+kivi:bits=4")),
    Row("snapkv+think", ("snapkv:keep={keep}+think:ratio=0.4",)),
    Row("snapkv+think+kivi", ("snapkv:keep={keep}+think:ratio=0.4+kivi:bits=4",)),
)


def fit_prefixkv(model: Any, tokens: Tensor, budgets: Sequence[float]) -> dict[str, Any]:
    from fewbits.kv.prefixkv import PrefixKV

    prompts = list(tokens.split(1))
    return {
        f"prefixkv:keep={budget:g},fitted=FILE": PrefixKV(keep=budget).fit(model, prompts)
        for budget in budgets
    }


def fit_pca(model: Any, tokens: Tensor, budgets: Sequence[float]) -> dict[str, Any]:
    from fewbits.kv.matryoshkakv import PCA

    return at_budgets(PCA().fit(model, tokens), budgets)


def fit_matryoshkakv(model: Any, tokens: Tensor, budgets: Sequence[float]) -> dict[str, Any]:
    from fewbits.kv.matryoshkakv import MatryoshkaKV

    return at_budgets(MatryoshkaKV().fit(model, tokens), budgets)


def at_budgets(fitted: Any, budgets: Sequence[float]) -> dict[str, Any]:
    """The same bases cut to several ranks."""
    return {
        f"{fitted.name}:keep={budget:g},fitted=FILE": fitted.with_keep(budget) for budget in budgets
    }


def fit_cskv(model: Any, tokens: Tensor, budgets: Sequence[float]) -> dict[str, Any]:
    from fewbits.kv.cskv import CSKV

    found = {}
    for density in budgets:
        both = f"density_keys={density:g},density_values={density:g}"
        stage = CSKV(density_keys=density, density_values=density).fit(model, tokens)
        found[f"cskv:{both},fitted=FILE"] = stage
    for density in CSKV_DENSITIES_AT_FOUR_BITS:
        both = f"density_keys={density:g},density_values={density:g}"
        stage = CSKV(density_keys=density, density_values=density, bits=4).fit(model, tokens)
        found[f"cskv:{both},bits=4,fitted=FILE"] = stage
    return found


FITTED = (
    FittedRow("prefixkv", fit_prefixkv),
    FittedRow("pca", fit_pca),
    FittedRow("matryoshkakv", fit_matryoshkakv, trains=True),
    FittedRow("cskv", fit_cskv),
)


# -- what to try ---------------------------------------------------------------------------


def known(name: str) -> bool:
    """Whether all methods of a chain are part of this version."""
    try:
        return all(find(one).status == "available" for one in name.split("+"))
    except FewbitsError:
        return False


def candidates(rows: Sequence[Row], probe: Probe, budgets: Sequence[float]) -> list[Candidate]:
    """The settings of some rows, each once; those with a share to keep landing at the budgets."""
    found = []
    for row in rows:
        specs: list[str] = []
        for template in row.specs:
            if "{keep}" in template:
                specs += filter(None, (probe.landing(template, budget) for budget in budgets))
            else:
                specs.append(template)
        found += [Candidate(row.name, spec, spec) for spec in dict.fromkeys(specs)]
    return found


def fitted_candidates(
    row: FittedRow, model: Any, tokens: Tensor, budgets: Sequence[float]
) -> list[Candidate]:
    start = time.perf_counter()
    made = row.fit(model, tokens, budgets)
    seconds = (time.perf_counter() - start) / max(1, len(made))
    return [Candidate(row.name, spec, stage, seconds) for spec, stage in made.items()]


# -- where a setting lands -----------------------------------------------------------------


class Probe:
    """What share of the whole cache a method holds after a prompt, without the model.

    The bytes of a method depend on the shape of the cache, not on its numbers, so that one layer
    of random ones tells. It is found once, by reading one prompt with the model.

    Parameters
    ----------
    prompt : (1, t) int64.

    Raises
    ------
    FewbitsError
        The model's attention cannot be replaced, or it does not take such a prompt.
    """

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = model
        held: CompressedCache = cache(model, "full")
        try:
            with torch.no_grad():
                model(prompt.to(model.device), past_key_values=held, logits_to_keep=1)
        except FewbitsError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FewbitsError(
                f"{type(model).__name__} cannot read a prompt through a compressed cache "
                f"({reason}); use a model whose attention transformers lets others replace"
            ) from None
        recent = held.compressed[0].recent
        if recent is None:
            raise FewbitsError(
                f"{type(model).__name__} does not ask its cache for keys and values; caches of "
                "this family cannot be compressed"
            )
        self.keys = recent.keys.read()
        self.bytes_of_layer = bytes_of(held.compressed[0])
        whole = held.nbytes()
        self.bytes_per_token = whole / prompt.shape[1]
        self.compressible = self.bytes_of_layer * len(held.compressed) / whole
        config = model.config.get_text_config(decoder=True)
        self.layers = len(held.layers)
        self.heads = config.num_attention_heads

    @torch.no_grad()
    def share(self, method: Any) -> float:
        """Bytes held over those of the whole cache."""
        layer: CompressedLayer = cache(self.model, method).compressed[0]
        generator = torch.Generator().manual_seed(0)
        _, key_heads, tokens, width = self.keys.shape

        def drawn(heads: int) -> Tensor:
            numbers = torch.randn(1, heads, tokens, width, generator=generator)
            return numbers.to(self.keys)

        layer.update(drawn(key_heads), drawn(key_heads))
        module = SimpleNamespace(num_key_value_groups=self.heads // key_heads, layer_idx=0)
        layer.attend(module, drawn(self.heads), None, width**-0.5, None, None)
        return 1 - self.compressible * (1 - bytes_of(layer) / self.bytes_of_layer)

    def landing(self, template: str, budget: float) -> str | None:
        """The spec string that keeps most tokens within a budget.

        None where none is near it (three quarters of it, at least), where all tokens fit, or where
        what comes after the choice of tokens saves nothing.
        """

        def share(keep: float) -> float:
            return self.share(template.format(keep=keep))

        low, high = 0, PLACES  # the greatest that fits is in low..high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if share(middle / PLACES) <= budget else (low, middle - 1)
        if low in (0, PLACES):
            return None
        landed = share(low / PLACES)
        keep = budget if share(budget) == landed else low / PLACES  # the rounder of equals
        alone, _, later = template.format(keep=keep).partition("+")
        if landed < 0.75 * budget or (later and self.share(alone) == landed):
            return None
        return template.format(keep=keep)


def bytes_of(layer: CompressedLayer) -> int:
    """Bytes of all storages that a layer holds."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in layer.tensors()
    }
    return sum(storages.values())
