"""What a prompt becomes: `l` states of width `d`, padded with zeros.

All zeros is the null prompt of guidance.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.core.config import ConfigError, UserError


class TextEncoder(ABC):
    """Anything that turns captions, and for some networks first frames too, into parts of a `Condition`, by name."""

    dim: int
    """Width of a text state."""
    length: int
    """Text states per caption."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and width of every part."""
        return {"text": (self.length, self.dim)}

    @abstractmethod
    def encode(self, captions: list[str]) -> dict[str, Float[Tensor, "b _ _"]]:
        """What captions become."""

    def encode_images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> dict[str, Float[Tensor, "b _ _"]]:
        """What first frames become, besides latents; by default nothing."""
        return {}


@dataclass(frozen=True)
class WordText(TextEncoder):
    """The text encoder of the small worlds: frozen random vectors, drawn from the hash of each word.

    Nothing is learned, stored or downloaded. A state holds its word in one half and the word before it in
    the other: "a red tower and a blue dome" is not "a blue tower and a red dome". Equal words have equal
    vectors on every machine, different words nearly orthogonal ones; every number has variance 1. Case and
    punctuation do not count.
    """

    kind: ClassVar[str] = "words"
    source: ClassVar[None] = None
    """Where its weights are: it has none."""
    dim: int = 64
    """Width of a state."""
    length: int = 24
    """States per caption, and so the most words that one may have."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"text.dim={self.dim}: must be even, half for a word and half for the one before")
        if self.length < 1:
            raise ConfigError(f"text.length={self.length}: must be at least 1")

    def encode(self, captions: list[str]) -> dict[str, Float[Tensor, "b _ _"]]:
        """States of the captions, one per word; UserError for a caption of more than `length` words."""
        states = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(states, captions, strict=True):
            words = re.findall(r"\w+", caption.lower())
            if len(words) > self.length:
                raise UserError(
                    f"the caption {caption!r} has {len(words)} words, this text encoder takes {self.length}; "
                    "shorten it, or set text.length (which needs a model trained with it)"
                )
            for state, word, before in zip(row, words, ["", *words], strict=False):
                state.copy_(torch.cat([self._vector(word), self._vector(before)]))
        return {"text": states}

    def _vector(self, word: str) -> Float[Tensor, " e"]:
        digest = hashlib.shake_256(word.encode()).digest(self.dim)  # two bytes for each number
        uniform = (np.frombuffer(digest, "<u2").astype(np.float64) + 0.5) / 2**16
        return torch.from_numpy((2 * uniform - 1) * 3**0.5)  # uniform on +-sqrt(3): variance 1
