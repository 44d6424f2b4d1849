"""LoRA adapters on disk, in PEFT's layout: `adapter_config.json`, `adapter_model.safetensors`.

Source: PEFT `utils/save_and_load.py` for names, `tuners/lora/config.py` for what a config may ask for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minwm.core.files import read_json, write_json
from minwm.core.weights import CheckpointError, load_safetensors, write_safetensors
from minwm.nets.lora import DOWN, UP, LoraConfig, merge

PREFIX = "base_model.model."
"""Of all names in PEFT's files."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}
"""Fields of PEFT's config that ask for another sum than W + alpha / rank * B A, and what they hold if they do not."""


@dataclass(frozen=True)
class Adapter:
    """What a network was trained to add to a base."""

    config: LoraConfig
    """Its `targets` are never empty."""
    base: str
    """The base: a model folder of ours, or what whoever trained it says."""
    tensors: Mapping[str, Tensor]
    """By canonical name of the network's linears: A and B, and parameters that were trained whole."""

    def merge_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the base with the adapter added; ConfigError if it is of another one."""
        return merge(weights, self.tensors, self.config.scale)


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Write a folder that `load_adapter` and PEFT's `PeftModel.from_pretrained` read, in place of an older one."""
    cfg = adapter.config
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "target_modules": [*cfg.targets],
        "modules_to_save": [*cfg.whole] or None,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
    }
    write_safetensors(folder / TENSORS, {PREFIX + name: tensor for name, tensor in adapter.tensors.items()})
    write_json(folder / CONFIG, content)


def adapter_base(folder: Path) -> str:
    """The base that an adapter names; its tensors are not read."""
    return read_json(folder / CONFIG, {"base_model_name_or_path": str})["base_model_name_or_path"]


def load_adapter(folder: Path) -> Adapter:
    """CheckpointError for a folder without an adapter, a damaged one, and what is no plain LoRA."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} holds no adapter (no {CONFIG}); name the folder that PEFT or a run made")
    content = read_json(folder / CONFIG, {"r": int, "target_modules": list})
    for field, plain in PLAIN.items():
        if (value := content.get(field, plain[0])) not in plain:
            raise CheckpointError(f"{folder}: {field}={value} is no plain LoRA; merge it with PEFT")
    tensors = {}
    for name, tensor in load_safetensors(folder / TENSORS).items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{folder / TENSORS}: {name} is no name of PEFT's, which begin with {PREFIX}")
        tensors[name.removeprefix(PREFIX)] = tensor
    for name in tensors:
        other = name.removesuffix(DOWN) + UP if name.endswith(DOWN) else name.removesuffix(UP) + DOWN
        if name.endswith((DOWN, UP)) and other not in tensors:
            raise CheckpointError(f"{folder / TENSORS} has {name} without {other}; it is damaged")
    cfg = LoraConfig(
        rank=content["r"],
        alpha=content.get("lora_alpha", 8),
        targets=tuple(content["target_modules"]),
        whole=tuple(content.get("modules_to_save") or ()),
    )
    return Adapter(cfg, str(content.get("base_model_name_or_path") or ""), tensors)
