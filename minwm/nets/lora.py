"""LoRA: linears of a frozen network with small trained additions, (W + alpha / rank * B A) x (Hu et al. 2021).

Parameters have PEFT's names: `{linear}.lora_A.weight`, `{linear}.lora_B.weight`. Networks of several roles share one
base: a parameter that is frozen is the same object in all of them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError
from minwm.nets.fp8 import Linear

Network = TypeVar("Network", bound=nn.Module)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of A and B."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get additions, and of what size."""

    rank: int = 32
    """Rows of A: the additions have this rank."""
    alpha: float = 32.0
    """Additions are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linears, by their names in the network or by the ends of these, such as self_attn.q; (): the large products of
    the blocks."""
    whole: tuple[str, ...] = ()
    """Modules that are trained whole (PEFT: modules_to_save), by names as above: what starts at zero in the base, such
    as a new camera branch (Wan: prope_o; HunyuanVideo: img_attn_prope_proj)."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"lora.{name}={getattr(self, name)}: must be more than 0")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def add_to(self, net: Network) -> Network:
        """Freeze a network but for additions that change nothing yet, in place.

        Its `state_dict` then holds what is trained alone. ConfigError for a name that nothing in the network has.
        """
        whole = _named(net, self.whole, nn.Module, "whole")
        targets = _named(net, self.targets, nn.Linear, "targets") if self.targets else _large_products(net)
        net.requires_grad_(False)
        for name in whole:
            net.set_submodule(name, copy.deepcopy(net.get_submodule(name)).requires_grad_(True))
        for name, linear in targets.items():
            if not any(name == other or name.startswith(f"{other}.") for other in whole):
                net.set_submodule(name, LoraLinear(linear, self.rank, self.scale))
        trained = frozenset(name for name, p in net.named_parameters() if p.requires_grad)
        net.register_state_dict_post_hook(partial(_keep, trained))
        return net

    def target_names(self, net: nn.Module) -> list[str]:
        """Targets without the part of the name that counts blocks, each once."""
        return [*self.targets] or sorted({_in_block(name) for name in _large_products(net)})


class LoraLinear(Linear):
    """(W + scale B A) x + b, with W and b frozen, those of another linear; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        kind = {"dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        device = None if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, **kind)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, **kind)
        nn.init.zeros_(self.lora_B.weight)

    def product(self, x: Float[Tensor, "n i"], bias: Tensor, out: Tensor | None = None) -> Float[Tensor, "n o"]:
        y = super().product(x, bias, out)
        return torch.addmm(y, self.lora_A(x), self.lora_B.weight.t(), alpha=self.scale, out=out)

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        return torch.add(super().forward(input), self.lora_B(self.lora_A(input)), alpha=self.scale)


def round_frozen(net: nn.Module) -> None:
    """Hold the weights of frozen linears in bfloat16, in place: under autocast their products are the same."""
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def copy_network(net: Network) -> Network:
    """A copy whose frozen parameters are those of `net`: they take no memory again."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters() if not p.requires_grad})


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * net, of the parameters that the two do not share."""
    for mean, value in zip(average.parameters(), net.parameters(), strict=True):
        if mean is not value:
            mean.lerp_(value, 1 - decay)


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of a base with those of an adapter: W + scale B A, in W's type, and modules that it has whole.

    ConfigError for a tensor of the adapter that belongs to nothing in the base.
    """
    merged = dict(base)
    for name, tensor in adapter.items():
        linear = name.removesuffix(DOWN).removesuffix(UP)
        target = name if linear == name else f"{linear}.weight"
        shape = tensor.shape if linear == name else (len(adapter[linear + UP]), adapter[linear + DOWN].shape[1])
        if target not in base or base[target].shape != shape:
            found = f"{tuple(base[target].shape)} there" if target in base else "not there"
            raise ConfigError(f"{name} is of another base: {target} of {tuple(shape)} is {found}")
        if linear == name:
            merged[name] = tensor.to(base[name].dtype)
        elif name.endswith(UP):
            change = scale * tensor.double() @ adapter[linear + DOWN].double()
            merged[target] = (base[target].double() + change).to(base[target].dtype)
    return merged


def _keep(names: frozenset[str], _net: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.removeprefix(prefix) not in names]:
        del state[name]


def _large_products(net: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Linear)}


def _named(net: nn.Module, wanted: Sequence[str], kind: type[Network], field: str) -> dict[str, Network]:
    """Modules whose names are those wanted, or end in them."""
    modules = {name: module for name, module in net.named_modules() if name and isinstance(module, kind)}
    ends = {end: [name for name in modules if f".{name}".endswith(f".{end}")] for end in wanted}
    if missing := [end for end, names in ends.items() if not names]:
        there = ", ".join(
            sorted({_in_block(name) for name, module in modules.items() if isinstance(module, nn.Linear)})
        )
        raise ConfigError(f"lora.{field}={missing[0]}: no such module in {type(net).__name__}; its linears: {there}")
    return {name: modules[name] for names in ends.values() for name in names}


def _in_block(name: str) -> str:
    """The part of a module's name after the number of its block."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name
