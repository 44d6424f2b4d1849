"""The table of families: whose published files are read and written. Other wings ask it and name no family."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from minwm.core.weights import CheckpointError, Weights, read_weights
from minwm.families.base import WORLDPLAY, Family, Origin, Published, PublishedCodec
from minwm.families.hunyuan import convert as hunyuan
from minwm.families.hunyuan import vae as hunyuan_vae
from minwm.families.hunyuan.text import HunyuanText
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.families.hunyuan.vae import HunyuanVae, HunyuanVaeConfig
from minwm.families.wan import convert as wan
from minwm.families.wan import vae as wan_vae
from minwm.families.wan.text import Umt5Text
from minwm.families.wan.transformer import WanConfig
from minwm.families.wan.vae import WanVae, WanVaeConfig
from minwm.nets.small_codec import SmallCodec, SmallCodecConfig
from minwm.nets.taehv import Taehv, TaehvConfig
from minwm.nets.text import WordText

FAMILIES: dict[str, Family] = {WanConfig.kind: wan, HunyuanConfig.kind: hunyuan}
"""By the kind of their network config."""
CODECS: dict[str, PublishedCodec] = {WanVaeConfig.kind: wan_vae, HunyuanVaeConfig.kind: hunyuan_vae}
"""By the kind of their config; those that are not here have one naming."""
NetworkConfig = WanConfig | HunyuanConfig
AnyCodecConfig = SmallCodecConfig | WanVaeConfig | HunyuanVaeConfig | TaehvConfig
AnyCodec = SmallCodec | WanVae | HunyuanVae | Taehv
TextConfig = WordText | Umt5Text | HunyuanText

OTHERS = {
    r"(en|de)coder\.\d+\.": "a TAEHV tiny autoencoder",
    r".*[._](lora_(A|B|down|up)|diff|diff_b)(\.|$)": "a LoRA, of use only once it is merged into its base model",
}
"""What no family above describes, by how a parameter's name begins."""


def describe(names: Collection[str]) -> str:
    """What has such parameter names, in words."""
    for published in (*FAMILIES.values(), *CODECS.values()):
        if found := published.describe(names):
            return found
    known = (what for start, what in OTHERS.items() if any(re.match(start, name) for name in names))
    return next(known, f"something unknown ({', '.join(sorted(names)[:3])})")


def rename_codec(config: AnyCodecConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published codec under the names of `config.build()`."""
    published = CODECS.get(config.kind)
    if published is None or published.detect_layout(tensors) != "diffusers":
        return tensors
    names = {theirs: ours for ours, theirs in published.diffusers_names(config).items()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def detect_family(names: Collection[str]) -> Family | None:
    """The family of a transformer with such parameter names; None for anything else."""
    return next((family for family in FAMILIES.values() if family.detect_layout(names)), None)


def open_published(
    path: Path, role: str | None = None, heads: int | None = None, drop_action: bool = False
) -> Published:
    """The published transformer in a file or folder; `role` chooses among the networks in a file.

    Its tensors are not read yet, unless they are quantised. The other arguments are those of `read_published`. Raises
    CheckpointError.
    """
    return read_published(read_weights(path, role), heads, drop_action)


def read_published(weights: Weights, heads: int | None = None, drop_action: bool = False) -> Published:
    """The published transformer in `weights`, under canonical names.

    `heads`: attention heads, where the file does not say. `drop_action` leaves out parameters of discrete actions.
    Raises CheckpointError if it is no transformer of a family here, or a variant that is not supported.
    """
    family = detect_family(weights.tensors)
    if family is None:
        raise CheckpointError(
            f"{weights.path} is no transformer of a known family ({', '.join(FAMILIES)}) but "
            f"{describe(weights.tensors)}"
        )
    published = family.read_transformer(weights, heads, drop_action)
    if published.unsupported:
        raise CheckpointError(f"{weights.path} is a variant that is not supported: {'; '.join(published.unsupported)}")
    return published


def origin(config: NetworkConfig) -> Origin | None:
    """Where networks of these sizes were published, with or without cameras; None if nowhere."""
    name = release_name(config)
    if name is None:
        return None
    return WORLDPLAY if config.actions else FAMILIES[config.kind].RELEASES[name].origin


def published_origin(published: Published) -> Origin | None:
    """`origin` of a file as it was saved, also where its embedding of actions was left out in reading."""
    names = FAMILIES[published.config.kind].ACTION_PARAMETERS
    actions = published.config.actions or any(name in published.ignored for name in names)
    return origin(replace(published.config, actions=actions))


def release_name(config: NetworkConfig) -> str | None:
    """The name of the release with these sizes, however it is run, with or without cameras and actions."""
    for name, release in FAMILIES[config.kind].RELEASES.items():
        run_as = {field: vars(release.config)[field] for field in config.unpublished}
        if release.config == replace(config, camera="none", actions=False, **run_as):
            return name
    return None
