"""A small model that says what it sees in short videos of a moving digit.

The claims of PrefixKV and VidKV are about hundreds of visual tokens that repeat each other; text
has none. Here a digit of scikit-learn's collection moves over a canvas; each frame is cut into
patches, each patch is one token; a short description follows. The model is a Llama that gets the
patches through a linear map, trained from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.devices import seeded
from fewbits.core.schedules import warmup_cosine
from fewbits.core.training import train
from fewbits.reproductions.kv._measure import Cost

CANVAS, PATCH, DIGIT = 16, 4, 12
"""Pixels: of a frame, of a patch, and of the digit on it."""
PATCHES = (CANVAS // PATCH) ** 2
DIRECTIONS = ("left", "right", "up", "down")
STEPS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *("<ask>", "describe", "the", "digit", "and", "its", "motion", "a", "moving", "."),
    *("thin", "medium", "thick", "leaning", "straight", "slanted"),
    *DIRECTIONS,
    *DIGITS,
)
NUMBER = {word: number for number, word in enumerate(WORDS)}
QUESTION = ("<ask>", "describe", "the", "digit", "and", "its", "motion")


@dataclass(frozen=True)
class Videos:
    """Some videos and what is said of them.

    Attributes
    ----------
    patches : (n, frames·16, 16) float32 from 0 to 1.
    captions : (n, 7) int64: "a", thickness, slant, digit, "moving", direction, ".".
    """

    patches: Tensor
    captions: Tensor


def videos(count: int, frames: int, seed: int, *, test: bool) -> Videos:
    """Draw videos of digits; those to test with show other digits than those to learn from."""
    from sklearn.datasets import load_digits

    chance = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels))
    rows = chance.choice(rows[rows % 5 == 0] if test else rows[rows % 5 != 0], count)
    small = torch.from_numpy(images[rows].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    digits = functional.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear").numpy()[:, 0]
    directions = chance.integers(0, 4, count)
    room = CANVAS - DIGIT
    start = chance.integers(0, room + 1, (count, 2))
    frame = np.zeros((count, frames, CANVAS, CANVAS), dtype=np.float32)
    pixels = np.arange(DIGIT)
    for number in range(frames):
        # At the edge it comes back in from the other side, so that it goes on moving.
        top = (start + number * STEPS[directions]) % CANVAS
        ys, xs = ((top[:, axis, None] + pixels) % CANVAS for axis in (0, 1))
        frame[np.arange(count)[:, None, None], number, ys[:, :, None], xs[:, None, :]] = digits
    side = CANVAS // PATCH
    cut = frame.reshape(count, frames, side, PATCH, side, PATCH).transpose(0, 1, 2, 4, 3, 5)
    patches = torch.from_numpy(cut.reshape(count, frames * PATCHES, PATCH * PATCH).copy())
    return Videos(patches, described(images[rows], labels[rows], directions))


def described(images: np.ndarray, labels: np.ndarray, directions: np.ndarray) -> Tensor:
    """(n, 7) int64 captions of flat 8 × 8 images."""
    square = images.reshape(-1, 8, 8)
    weight = square.mean(axis=(1, 2))
    thickness = np.digitize(weight, (4.6, 5.1)) + NUMBER["thin"]
    y, x = np.mgrid[:8, :8]
    total = square.sum(axis=(1, 2))
    middle_y, middle_x = ((square * axis).sum(axis=(1, 2)) / total for axis in (y, x))
    dy, dx = y - middle_y[:, None, None], x - middle_x[:, None, None]
    lean = (square * dy * dx).sum(axis=(1, 2)) / (square * dy**2).sum(axis=(1, 2))
    slant = np.digitize(lean, (-0.01, 0.09)) + NUMBER["leaning"]
    fixed = {word: np.full(len(labels), NUMBER[word]) for word in ("a", "moving", ".")}
    words = (
        fixed["a"],
        thickness,
        slant,
        labels + NUMBER["zero"],
        fixed["moving"],
        directions + NUMBER["left"],
        fixed["."],
    )
    return torch.from_numpy(np.stack(words, axis=1)).long()


# -- the model -----------------------------------------------------------------------------


class VideoModel(nn.Module):
    """Patches through a linear map and a place in their frame, then a language model."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.language_model = LlamaForCausalLM(config)
        self.look = nn.Linear(PATCH * PATCH, width)
        self.place = nn.Parameter(0.02 * torch.randn(PATCHES, width))

    def words(self, numbers: Tensor) -> Tensor:
        found: Tensor = self.language_model.get_input_embeddings()(numbers)
        return found

    def seen(self, patches: Tensor) -> Tensor:
        """(n, v, d): what the language model gets of (n, v, 16) patches."""
        frames = patches.shape[1] // PATCHES
        looked: Tensor = self.look(patches) + self.place.repeat(frames, 1)
        return looked

    def prompt(self, patches: Tensor) -> Tensor:
        """(n, v + 7, d): a video and the question."""
        asked = torch.tensor([NUMBER[word] for word in QUESTION])
        return torch.cat([self.seen(patches), self.words(asked.expand(len(patches), -1))], dim=1)

    def loss(self, patches: Tensor, captions: Tensor) -> Tensor:
        inputs = torch.cat([self.prompt(patches), self.words(captions[:, :-1])], dim=1)
        logits = self.language_model(
            inputs_embeds=inputs, use_cache=False, logits_to_keep=captions.shape[1]
        ).logits
        return functional.cross_entropy(logits.flatten(0, 1), captions.flatten())


def trained_model(
    frames: int, steps: int, layers: int = 4, width: int = 128, seed: int = 0, batch: int = 32
) -> VideoModel:
    """A model that describes videos of so many frames. O(steps·batch·frames) model passes."""
    some = videos(steps * batch // 4, frames, seed, test=False)
    with seeded(seed):
        model = VideoModel(layers, width)
    train(
        model,
        lambda rows: model.loss(some.patches[rows], some.captions[rows]),
        len(some.captions),
        epochs=4,
        batch_size=batch,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        scheduler=warmup_cosine(0.1, 0.05),
        seed=seed,
        gradient_clip=1.0,
    )
    return model.eval()


@torch.no_grad()
def described_right(model: VideoModel, shown: Videos) -> dict[str, float]:
    """Share of the right words, by what they say, with the right words before them."""
    inputs = torch.cat([model.prompt(shown.patches), model.words(shown.captions[:, :-1])], dim=1)
    logits = model.language_model(inputs_embeds=inputs, logits_to_keep=7).logits
    right = (logits.argmax(dim=2) == shown.captions).float().mean(dim=0)
    return {"digit": float(right[3]), "direction": float(right[5]), "slant": float(right[2])}


def caption_costs(
    model: VideoModel, shown: Videos, methods: Mapping[str, Any], **about: Tensor
) -> dict[str, Cost]:
    """What each cache costs, by the words of the captions behind their first."""
    whole, full_bytes = caption_log_probabilities(model, shown, "full")
    answers = shown.captions[:, 1:, None]
    found = {}
    for name, method in methods.items():
        seen, held = caption_log_probabilities(model, shown, method, **about)
        lost = (whole.exp() * (whole - seen)).sum(dim=2).mean(dim=1)
        perplexity = float((-seen.gather(2, answers).mean()).exp())
        found[name] = Cost(lost.double().numpy(), perplexity, held / full_bytes)
    return found


@torch.no_grad()
def caption_log_probabilities(
    model: VideoModel, shown: Videos, method: Any, **about: Tensor
) -> tuple[Tensor, int]:
    """(n, 6, words): of the caption's words behind its first, and the bytes held of the prompt.

    The video and the question are read, compressed, and the caption is read through that.
    """
    from fewbits.kv import cache

    held = cache(model.language_model, method)
    if about:
        held.tell(**about)
    model.language_model(inputs_embeds=model.prompt(shown.patches), past_key_values=held)
    nbytes = held.nbytes()
    words = model.words(shown.captions[:, :-1])
    logits = model.language_model(inputs_embeds=words, past_key_values=held).logits
    return logits.float().log_softmax(dim=2), nbytes
