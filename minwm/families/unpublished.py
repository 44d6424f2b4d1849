"""The family of a network of one's own: no weights of it are published, and model folders are its only layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from minwm.core.weights import CheckpointError, Weights
from minwm.families.base import Layout, Release


@dataclass
class Unpublished:
    """A `families.base.Family` that recognises no file and writes none."""

    kind: str
    """Of its network config."""
    CAMERA_PARAMETERS: tuple[str, ...] = ()
    ACTION_PARAMETERS: tuple[str, ...] = ()
    VAE_FILES: tuple[str, ...] = ()
    RELEASES: Mapping[str, Release] = field(default_factory=dict)

    def describe(self, names: Collection[str]) -> None:
        return None

    def detect_layout(self, names: Collection[str]) -> None:
        return None

    def read_transformer(self, weights: Weights, heads: int | None, drop_action: bool) -> NoReturn:
        raise CheckpointError(f"{weights.path}: no weights of {self.kind} are published; name a model folder")

    def export(
        self, tensors: Mapping[str, Tensor], config: Any, target: Path, layout: Layout, dtype: torch.dtype | None = None
    ) -> NoReturn:
        raise CheckpointError(f"{target}: {self.kind} has no {layout} layout, only that of model folders")

    def has_text_encoder(self, folder: Path) -> bool:
        return False
