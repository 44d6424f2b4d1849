"""What every family provides in its `convert.py`, and what reading its published weights gives.

`store/layouts.py` lists the families; other wings go through it and name none.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from minwm.core.weights import Weights, mismatches

Layout = Literal["original", "diffusers"]
"""Whose parameter names: those of the release, or those of diffusers."""


@dataclass(frozen=True)
class License:
    """Under which weights are published."""

    id: str
    """The Hub's identifier, or a name where it has none."""
    url: str | None = None
    """Its text, where the Hub has no identifier."""
    limits: str = ""
    """What it forbids, in words."""

    def __str__(self) -> str:
        """All of it, in one line."""
        return self.id + f": {self.limits}" * bool(self.limits) + f" ({self.url})" * bool(self.url)


APACHE = License("apache-2.0")
TENCENT_LIMITS = (
    "not for the European Union, the United Kingdom and South Korea; its outputs may improve no other model"
)


@dataclass(frozen=True)
class Origin:
    """Where weights were published."""

    repo: str
    """Repository on the Hugging Face Hub."""
    license: License


WORLDPLAY = Origin(
    "tencent/HY-WorldPlay",
    License(
        "tencent-hy-worldplay-community",
        "https://github.com/Tencent-Hunyuan/HY-WorldPlay/blob/main/License.txt",
        TENCENT_LIMITS,
    ),
)
"""Of networks of every family: published ones with an embedding of actions are HY-WorldPlay's."""


@dataclass(frozen=True)
class Release:
    """A published transformer."""

    repo: str
    """Its repository on the Hugging Face Hub."""
    config: Any
    """Its architecture, without cameras: a `nets.backbone.BackboneConfig`, of the family's own type."""
    license: License = APACHE

    @property
    def origin(self) -> Origin:
        return Origin(self.repo, self.license)


@dataclass(frozen=True)
class Published:
    """A published transformer as read from a file."""

    weights: Weights
    """As saved."""
    layout: Layout
    config: Any
    """The network config: architecture, and how cameras enter."""
    tensors: dict[str, Tensor]
    """By canonical name, memory-mapped; those that the network does not have keep their own names."""
    ignored: tuple[str, ...]
    """Entries of the file that are left out."""
    notes: tuple[str, ...]
    """Sentences about what was chosen, assumed or left out."""
    unsupported: tuple[str, ...]
    """What the file has that networks here do not, in words; empty for a network that can be built."""

    def mismatches(self) -> dict[str, list[str]]:
        """Parameters that are missing, unexpected or of another shape, by kind; empty for a whole network."""
        with torch.device("meta"):
            network = self.config.build()
        return mismatches(network, self.tensors)


@runtime_checkable
class PublishedCodec(Protocol):
    """The module `vae` of a family. `cfg` is always its codec config."""

    def describe(self, names: Collection[str]) -> str | None:
        """What of this codec has such parameter names, in words; None if nothing."""
        ...

    def detect_layout(self, names: Collection[str]) -> Layout | None:
        """The layout of such a codec with such parameter names; None if it is none."""
        ...

    def diffusers_names(self, cfg: Any) -> dict[str, str]:
        """Every name in `cfg.build().state_dict()`, which is the release's, with diffusers' name of the same tensor."""
        ...


@runtime_checkable
class Family(Protocol):
    """The module `convert` of a family. `config` is always its network config."""

    RELEASES: Mapping[str, Release]
    """Published transformers by the names that presets and the command line use."""
    CAMERA_PARAMETERS: tuple[str, ...]
    """Ends of the names of camera parameters, which published transformers lack."""
    ACTION_PARAMETERS: tuple[str, ...]
    """Names of the parameters of the embedding of actions."""
    VAE_FILES: tuple[str, ...]
    """Where the releases keep their VAE: names of files and folders."""

    def describe(self, names: Collection[str]) -> str | None:
        """What of this family has such parameter names, in words; None if nothing."""
        ...

    def detect_layout(self, names: Collection[str]) -> Layout | None:
        """The layout of a transformer of this family with such parameter names; None if it is none."""
        ...

    def read_transformer(self, weights: Weights, heads: int | None, drop_action: bool) -> Published:
        """The transformer in `weights`, under canonical names; variants that are not supported are described, too.

        See `store.layouts.read_published`.
        """
        ...

    def export(
        self, tensors: Mapping[str, Tensor], config: Any, target: Path, layout: Layout, dtype: torch.dtype | None = None
    ) -> list[str]:
        """Write a transformer in a published layout; returns sentences about what its other readers will miss."""
        ...

    def has_text_encoder(self, folder: Path) -> bool:
        """Whether a folder holds the family's text encoder with its tokenizer."""
        ...
