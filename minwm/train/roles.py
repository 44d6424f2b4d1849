"""The networks of a run by role: fresh, from model folders, or additions to one base that all roles share (LoRA)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.core.config import ConfigError
from minwm.core.weights import check, describe_mismatches, map_safetensors, mismatches
from minwm.nets.backbone import Backbone
from minwm.nets.lora import copy_network, round_frozen
from minwm.recipes.base import Recipe
from minwm.store.adapter import adapter_base, load_adapter
from minwm.store.folder import load_weights
from minwm.store.layouts import FAMILIES
from minwm.train.config import Run
from minwm.train.parallel import set_parameter

COMPILED_FORMS = 32
"""Most compiled forms of a block. Passes of a recipe differ in frames, in clips and in who gets gradients: up to a
dozen forms, where torch gives up after 8."""
ADAPTER = "adapter"
"""Folder in that of a run with LoRA: what was trained, beside the whole model that it makes."""


def build_recipe(
    run: Run, load: Callable[[str], nn.Module], adapt: Callable[[str, nn.Module], nn.Module] | None = None
) -> Recipe[Any]:
    """The recipe of a run; `load` makes the network of a role, or with LoRA of the role "base", `adapt` adds to it."""
    roles = (*run.recipe.trained, *run.recipe.frozen)
    networks: dict[str, Any]
    if run.lora is None:
        networks = {role: load(role) for role in roles}
    else:
        base, add = load("base").requires_grad_(False), run.lora.add_to
        networks = {role: (adapt or (lambda _, net: add(net)))(role, copy_network(base)) for role in roles}
    if run.checkpointing:
        for role in run.recipe.trained:
            networks[role].checkpointing = run.checkpointing
    recipe = run.recipe.build(run.model, networks)
    recipe.seed = run.seed
    if run.precision == "bfloat16":
        for net in networks.values():
            round_frozen(net)
    if run.compile:
        compile_networks(recipe)
    return recipe


def compile_networks(recipe: Recipe[Any]) -> None:
    """Compile the blocks of all networks, frozen ones too, in place."""
    torch._dynamo.config.recompile_limit = COMPILED_FORMS
    for net in recipe.networks.values():
        net.compile_blocks()


def load_role(run: Run, device: torch.device, role: str) -> nn.Module:
    """The network of a role, from the folder that `init` names; fresh if it names none (student only).

    On the meta device a loaded network has no values, but of what its file lacks: `saved_weights` has the others.
    """
    source = _folder(run, role)
    if source is None and role != "student":
        raise ConfigError(f"{run.name}: init.{role} names no model folder, and a {role} cannot start fresh")
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    if source is None or not run.recipe.trains_backbone:
        net = run.recipe.network(run.model)
        if source is not None:
            load_weights(net, source / run.recipe.weights_file)
        return net if device.type == "meta" else net.to(device)
    with torch.device("meta"):
        net = run.recipe.network(run.model)
    family, path = FAMILIES[run.model.network.kind], source / run.recipe.weights_file
    new = (*family.CAMERA_PARAMETERS, *family.ACTION_PARAMETERS) if role in ("student", "base") else ()
    saved = map_safetensors(path)
    _initialise(net, check(net, saved, path, new))
    if device.type != "meta":
        like = net.state_dict()
        values = {name: x.to(device, like[name].dtype, copy=True) for name, x in saved.items()}
        net.load_state_dict(values, strict=False, assign=True)
        net.to(device)
    return net


def first_student(run: Run) -> nn.Module:
    """The student as a run starts with it, on the CPU."""
    net = load_role(run, torch.device("cpu"), "base" if run.lora else "student")
    return adapt_role(run, "student", net.requires_grad_(False)) if run.lora else net


def _initialise(net: nn.Module, names: Sequence[str]) -> None:
    """Give first values to those parameters of a network on the meta device."""
    assert isinstance(net, Backbone)
    for name in names:
        set_parameter(net, name, torch.full_like(net.get_parameter(name), math.nan, device="cpu"))
    if names:
        net.init_weights()
    if empty := [name for name in names if net.get_parameter(name).isnan().any()]:
        raise ConfigError(f"{type(net).__name__}.init_weights gives no values to {', '.join(empty)}")


def saved_weights(run: Run, role: str) -> Mapping[str, Tensor]:
    """The tensors in the folder of a role, or of the base, mapped; those of the student for copies of it."""
    folder = _folder(run, "base" if run.lora else role if role in vars(run.init) else "student")
    return map_safetensors(folder / run.recipe.weights_file) if folder else {}


def _folder(run: Run, role: str) -> Path | None:
    if role == "base":
        return base_folder(run)
    source = vars(run.init)[role]
    return source and Path(source)


def base_folder(run: Run) -> Path:
    """The one model folder that all roles of a run with LoRA were adapted from; ConfigError if there is none."""
    bases, on = dict[Path, Path](), list[str]()
    for role in (*run.recipe.trained, *run.recipe.frozen):
        if (source := vars(run.init)[role]) is None:
            raise ConfigError(f"{run.name}: init.{role} names no model folder, which LoRA needs of every role")
        adapter = Path(source) / ADAPTER
        base = Path(adapter_base(adapter) if adapter.exists() else source)
        bases.setdefault(base.resolve(), base)
        on.append(f"init.{role}={source} is on {base}")
    if len(bases) > 1:
        raise ConfigError(f"{run.name}: with LoRA all roles share one base, but {', '.join(on)}")
    return next(iter(bases.values()))


def adapt_role(run: Run, role: str, net: nn.Module) -> nn.Module:
    """Add to the base what a role has learned, or, if it is trained and has learned nothing yet, what it may learn."""
    assert run.lora is not None
    folder, frozen = Path(vars(run.init)[role]), role in run.recipe.frozen
    found = load_adapter(folder / ADAPTER) if (folder / ADAPTER).exists() else None
    new = {name for name, _ in net.named_parameters()} - saved_weights(run, "base").keys()
    cfg = found.config if found and frozen else run.lora
    if found or not frozen:
        new -= cfg.add_to(net).state_dict().keys()
    if new:
        raise ConfigError(
            f"{run.name}: the base has no {', '.join(sorted(new)[:3])}, and {role} would leave them at their first "
            "values; name their modules in lora.whole, or add them to the base by a stage without lora"
        )
    if found is not None:
        if (problems := mismatches(net, found.tensors)) or found.config.scale != cfg.scale:
            raise ConfigError(
                f"{folder / ADAPTER} was trained with {found.config}; go on with the same, not {cfg} "
                f"({describe_mismatches(problems)})"
            )
        net.load_state_dict(found.tensors, strict=False)
    return net
