"""KV caches of language models: what a model remembers of a text, in fewer bytes.

>>> import fewbits
>>> cache = fewbits.kv.cache(model, "think:ratio=0.6")
>>> model.generate(**inputs, past_key_values=cache)
>>> cache.nbytes()
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from fewbits.core.lazy import exported

if TYPE_CHECKING:
    from fewbits.kv._cache import CompressedCache
    from fewbits.kv.cachegen import save
    from fewbits.kv.choosing import choose
    from fewbits.kv.comparison import compare
    from fewbits.kv.streaming import bench_link, load, read_tokens

__all__ = [
    "bench_link",
    "cache",
    "choose",
    "compare",
    "load",
    "read_tokens",
    "save",
    "stages",
]

_HOMES = {
    "bench_link": "fewbits.kv.streaming",
    "choose": "fewbits.kv.choosing",
    "compare": "fewbits.kv.comparison",
    "load": "fewbits.kv.streaming",
    "read_tokens": "fewbits.kv.streaming",
    "save": "fewbits.kv.cachegen",
}
_exported, _names = exported("kv")


def cache(model: Any, method: Any = "full", **options: Any) -> CompressedCache:
    """A compressed cache for a model of transformers.

    Parameters
    ----------
    model : a causal language model. It is told to use the attention function ``fewbits``, which
        changes nothing where another cache is used.
    method : name of a method, or a spec string of several after each other:
        ``snapkv:keep=0.5+think:ratio=0.4+kivi:bits=4``; or a method, or several in a list, that
        are made (and fitted) already.
    options : of the method, where it is one name.

    Returns
    -------
    Give it to ``model.generate(…, past_key_values=…)`` or to the model itself. A cache is for one
    conversation (of one batch); ``cache.reset()`` makes it empty again.

    Raises
    ------
    FewbitsError
        Unknown methods or options, or a model whose attention cannot be replaced.
    """
    from fewbits.core.errors import require

    require("torch", "kv")
    require("transformers", "kv")
    from fewbits.kv._cache import CompressedCache
    from fewbits.kv._transformers import use_attention

    if isinstance(method, str):
        made = stages(method, **options)
    else:
        made = list(method) if isinstance(method, (list, tuple)) else [method]
        check_order(made)
    use_attention(model)
    for stage in made:
        stage.check_model(model)
    return CompressedCache(model.config, made)


def stages(method: str, **options: Any) -> list[Any]:
    """The stages that a spec string names, in order.

    Raises
    ------
    FewbitsError
        Unknown methods or options, or an order that does not work.
    """
    from fewbits.core.catalogue import cache_stage
    from fewbits.core.codec import with_options
    from fewbits.core.errors import FewbitsError

    parts = [part.strip() for part in method.split("+")]
    if not all(parts):
        raise FewbitsError("a method of the chain is empty; `fewbits systems` lists the names")
    if options and (len(parts) > 1 or ":" in method):
        raise FewbitsError("give options either in the spec string or by name, not both")
    if options:
        kind = cache_stage(parts[0])
        try:
            return [kind(**options)]
        except TypeError as error:
            raise FewbitsError(f"{parts[0]}: {error}") from None
    made = []
    for part in parts:
        name, _, text = part.partition(":")
        made.append(with_options(cache_stage(name.strip()), name, text))
    check_order(made)
    return made


def check_order(made: list[Any]) -> None:
    """Refuse chains whose stages would not see what they need."""
    from fewbits.core.errors import FewbitsError
    from fewbits.kv._cache import Stage

    seen_encoder = ""
    for stage in made:
        if not isinstance(stage, Stage):
            name = getattr(stage, "name", type(stage).__name__)
            raise FewbitsError(f"{name} is no form of a cache; see docs/kv.md for what it is for")
        if not stage.encodes and seen_encoder:
            raise FewbitsError(f"{stage.name} chooses tokens; put it before {seen_encoder}")
        if stage.first and seen_encoder:
            raise FewbitsError(f"{stage.name} cannot follow {seen_encoder}; use kivi there")
        if stage.encodes:
            seen_encoder = seen_encoder or stage.name
    for before, stage in itertools.pairwise(made):
        if before.followers is not None and stage.name not in before.followers:
            names = ", ".join(before.followers)
            raise FewbitsError(f"{stage.name} cannot follow {before.name}; what can is {names}")
    if seen_encoder:
        for stage in made:
            if stage.drops_later:
                raise FewbitsError(
                    f"{stage.name} goes on dropping tokens behind the prompt, which it cannot do "
                    f"where {seen_encoder} has compressed them; use another choice of tokens"
                )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _exported(name)
    import importlib

    from fewbits.core.errors import require

    require("torch", "kv")
    require("transformers", "kv")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*_names(), *__all__]
