"""The one training loop, for every stage: what happens in a step is what you read in `loop`."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minwm.checkpoint import ModelConfig, States, load_codec, load_weights, save_codec, save_model
from minwm.core.config import ConfigError, UserError, dumps, from_dict, loads
from minwm.core.media import atomic
from minwm.core.metrics import metrics_log, read_metrics
from minwm.core.runtime import generator as make_generator
from minwm.core.runtime import git_commit, pick_device, progress, rank, versions, world_size
from minwm.data.clips import read_manifest
from minwm.data.dataset import Loader, RawDataset, ShardDataset, loader
from minwm.data.noise import PoseNoise
from minwm.formats import CAMERA
from minwm.hub import write_card
from minwm.nets.backbone import Backbone, Checkpointing
from minwm.nets.codec import Codec
from minwm.recipes.base import Loss, Recipe
from minwm.recipes.codec import CodecRecipe, CodecTraining
from minwm.recipes.consistency import Consistency, ConsistencyConfig
from minwm.recipes.diffusion import Autoregressive, AutoregressiveConfig, Bidirectional, BidirectionalConfig
from minwm.recipes.dmd import Dmd, DmdConfig
from minwm.recipes.ode import Ode, OdeConfig

RecipeConfig = CodecTraining | BidirectionalConfig | AutoregressiveConfig | OdeConfig | ConsistencyConfig | DmdConfig
RECIPES: dict[type, type[Recipe]] = {
    BidirectionalConfig: Bidirectional,
    AutoregressiveConfig: Autoregressive,
    OdeConfig: Ode,
    ConsistencyConfig: Consistency,
    DmdConfig: Dmd,
}
HELD_OUT = 24
"""Clips of the validation split on which the loss is watched."""
GRAPHS = 32
"""Most compiled forms of a block. Passes of a recipe differ in frames, in clips and in who gets gradients: up to a
dozen forms, where torch gives up after 8."""
NOTED = ("kind", "raw", "counts", "clips", "licences")
"""What a run notes of its data's manifest, for the model card."""


class DivergedError(UserError):
    """Loss or gradient stopped being finite."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on float32 weights."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    warmup: int = 0
    """Steps of linear warm-up."""
    final: float = 1.0
    """Learning rate at the last step, as a share of lr; cosine in between."""

    def build(self, net: nn.Module) -> torch.optim.AdamW:
        trained = [p for p in net.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, self.lr, (self.beta1, self.beta2), weight_decay=self.weight_decay)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step; a function of the step alone, so resuming needs no scheduler state."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1)))
        return self.lr * warm * (self.final + (1 - self.final) * cosine)


@dataclass(frozen=True, kw_only=True)
class Init:
    """Model folders that fill the roles of a recipe; a role left out starts fresh, or is not needed."""

    student: str | None = None
    teacher: str | None = None
    critic: str | None = None
    real: str | None = None
    codec: str | None = None
    """Codec folder: what a codec stage continues from, and what goes with the trained model."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training stage, complete: with the data it says all that the result depends on."""

    name: str
    model: ModelConfig
    recipe: RecipeConfig
    data: str
    """Latent shards; raw clips for a codec."""
    init: Init = Init()
    steps: int = 1000
    batch: int = 16
    """Clips per step and rank, before accumulation."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    optim: OptimConfig = OptimConfig()
    critic: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of the critic (DMD)."""
    ema: float = 0.99
    """Decay of the averaged weights that are saved as the model; 0 saves the raw weights."""
    seed: int = 0
    save_every: int = 100
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and attention (autocast); weights, optimiser and averages are float32 always."""
    checkpointing: Checkpointing = False
    """Compute activations again in the backward pass: those of whole blocks (true), a third more FLOPs in all, or of
    all but `attention`, which in long clips is most of the work and little of the memory."""
    compile: bool = False
    """Compile what is before and after attention in the blocks of all networks (`Backbone.compile_blocks`)."""
    tensorboard: bool = True
    pose_noise: PoseNoise | None = None
    """Errors on the cameras of the training clips (ablations)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"run.ema={self.ema}: a decay lies in [0, 1)")
        if isinstance(self.recipe, CodecTraining) and (self.checkpointing or self.compile):
            raise ConfigError(f"run {self.name}: checkpointing and compile are of transformer blocks; a codec has none")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run reports; also written to its folder."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    parameters: int


@runtime_checkable
class Trainable(Protocol):
    """A recipe, as the loop sees it."""

    trained: ClassVar[tuple[str, ...]]

    @property
    def stateful(self) -> Mapping[str, nn.Module]: ...

    def loss(self, clip: Any, /, step: int, generator: torch.Generator) -> Loss: ...


class Ema:
    """Moving average of the student in float32; its decay grows from 0.1 so that early steps do not linger."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = copy.deepcopy(net).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.net.parameters(), net.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


class Trainer:
    """What steps change: networks, optimisers, the average, the random draws. A step is gradients, then an update."""

    def __init__(self, run: Run, recipe: Trainable, device: torch.device) -> None:
        self.run, self.recipe, self.device = run, recipe, device
        self.networks = {role: net.to(device) for role, net in recipe.stateful.items()}
        self.settings = {"student": run.optim, "critic": run.critic}
        self.optimizers = {role: self.settings[role].build(self.networks[role]) for role in recipe.trained}
        self.ema = Ema(self.networks["student"], run.ema)
        self.generator = make_generator(run.seed, "train", rank(), device=device)

    def gradients(self, step: int, clips: Iterator[Any]) -> tuple[list[Loss], float]:
        """Losses of the step's micro-batches; and the norm of their averaged gradient, before it was clipped."""
        parts = []
        for _ in range(self.run.accumulate):
            with autocast(self.run, self.device):
                loss = self.recipe.loss(next(clips).to(self.device), step, self.generator)
            (loss.total / self.run.accumulate).backward()
            parts.append(loss)
        role = parts[-1].trains
        return parts, float(clip_grad_norm_(self.networks[role].parameters(), self.settings[role].clip))

    def update(self, step: int, role: str) -> float:
        """Move a role along its gradients, and the average after the student. Returns the learning rate."""
        optimizer, rate = self.optimizers[role], self.settings[role].rate(step, self.run.steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role == "student":
            self.ema.update(self.networks[role], step)
        return rate


def loop(
    run: Run, out: Path, recipe: Trainable, clips: Loader[Any], device: torch.device, held_out: Sequence[Any] = ()
) -> nn.Module:
    """Train until `run.steps`, from the newest state in `out` if there is one. Returns the averaged student.

    The loss on the batches `held_out`, if there are any, is logged whenever a state is saved.
    """
    trainer, states = Trainer(run, recipe, device), States(out)
    saved: dict[str, nn.Module] = {**trainer.networks, "ema": trainer.ema.net}
    start, spent = states.latest() or 0, 0.0
    if start:
        extra = states.load(start, saved, trainer.optimizers, trainer.generator)
        clips.load(extra["data"])
        spent = extra["seconds"]
    began = time.monotonic() - spent
    with metrics_log(out, start, run.tensorboard) as log, progress(run.steps - start, run.name) as bar:
        for step in range(start, run.steps):
            parts, norm = trainer.gradients(step, clips)
            last = parts[-1]
            if not math.isfinite(norm):
                lr = trainer.settings[last.trains].lr
                raise DivergedError(
                    f"{run.name}: step {step}: gradient norm {norm}, losses {[p.logs for p in parts]}; "
                    f"the state after {states.latest() or 0} steps is untouched: lower optim.lr (now {lr})"
                )
            rate = trainer.update(step, last.trains)
            save = (step + 1) % run.save_every == 0 or step + 1 == run.steps
            val = {"val": validate(run, recipe, held_out, step, device)} if save and held_out else {}
            mean = {name: sum(part.logs[name] for part in parts) / len(parts) for name in last.logs}
            log(step, last.trains, mean | val | {"grad_norm": norm, "lr": rate})
            bar.advance(1, " ".join(f"{name} {value:.4f}" for name, value in (last.logs | val).items()))
            if save:
                place = {"data": clips.state(), "seconds": time.monotonic() - began}
                states.save(step + 1, saved, trainer.optimizers, trainer.generator, place)
    return trainer.ema.net if run.ema else trainer.networks["student"]


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """The precision in which a run passes through its networks.

    With checkpointing no weight that was cast is kept for a later pass: computing again must meet the same operators.
    """
    half = run.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=not run.checkpointing)


@torch.no_grad()
def validate(run: Run, recipe: Trainable, batches: Sequence[Any], step: int, device: torch.device) -> float:
    """Mean loss on clips that are never trained on, always with the same noise: what falls here was learned."""
    losses = []
    for i, batch in enumerate(batches):
        draws = make_generator(run.seed, "validate", i, device=device)
        with autocast(run, device):
            losses.append(float(recipe.loss(batch.to(device), step, draws).total))
    return sum(losses) / len(losses)


def train(run: Run, out: Path) -> Summary:
    """Run a stage to its end in `out`, resuming whatever is there; a finished run returns at once.

    Raises ConfigError if `out` holds a run with another config.
    """
    done = out / "summary.json"
    _claim(run, out)
    if done.exists():
        return loads(Summary, done.read_text())
    device = pick_device()
    if isinstance(run.recipe, CodecTraining):
        result = _train_codec(run, run.recipe, out, device)
    else:
        result = _train_network(run, out, device)
    losses = [line for line in read_metrics(out) if line["trains"] == "student"]
    name = next(name for name in losses[0] if name not in ("step", "trains"))
    tenth = max(1, len(losses) // 10)
    ends = [sum(line[name] for line in part) / tenth for part in (losses[:tenth], losses[-tenth:])]
    parameters = sum(p.numel() for p in result.parameters())
    summary = Summary(
        steps=run.steps, seconds=_seconds(out), first_loss=ends[0], last_loss=ends[1], parameters=parameters
    )
    with atomic(done) as temporary:
        temporary.write_text(dumps(summary))
    return summary


def _claim(run: Run, out: Path) -> None:
    """Write the run's config and what it starts from, or check that it is the one that `out` was started with."""
    path = out / "run.json"
    if path.exists() and (old := from_dict(Run, json.loads(path.read_text())["run"])) != run:
        changed = [key for key, value in vars(run).items() if vars(old)[key] != value]
        raise ConfigError(f"{out} holds a run with another {', '.join(changed)}; give another --out, or delete it")
    if not path.exists():
        maker = "minwm data render" if isinstance(run.recipe, CodecTraining) else "minwm data encode"
        manifest = read_manifest(Path(run.data), maker)
        about = {
            "commit": git_commit(),
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": {name: manifest[name] for name in NOTED if name in manifest},
        }
        with atomic(path) as temporary:
            temporary.write_text(json.dumps({"run": json.loads(dumps(run)), **about}, indent=2))


def _train_codec(run: Run, cfg: CodecTraining, out: Path, device: torch.device) -> nn.Module:
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    codec, data = run.model.codec.build(), RawDataset(Path(run.data), "train")
    if not isinstance(codec, Codec):
        raise ConfigError(f"{run.name}: model.codec is {type(codec).__name__}; only the small codec is trained here")
    if run.init.codec:
        codec.load_state_dict(load_codec(Path(run.init.codec)).state_dict())
    elif not States(out).latest():
        codec.fit(data.batch([i]) for i in range(min(cfg.fit_clips, len(data))))
    clips = loader(data, run.batch, run.seed, rank(), world_size())
    trained = loop(run, out, CodecRecipe(codec, cfg), clips, device)
    assert isinstance(trained, Codec)
    save_codec(out, trained.cpu())
    return trained


def _train_network(run: Run, out: Path, device: torch.device) -> nn.Module:
    if not run.init.codec:
        raise ConfigError(f"{run.name}: init.codec names the codec that made the latents; it goes with the model")
    codec = load_codec(Path(run.init.codec))
    recipe = build_recipe(run, partial(load_role, run, device))
    begins_with_image, null = run.model.geometry.lead == 1, run.model.null()
    data = ShardDataset(Path(run.data), "train", image_start=begins_with_image, null=null, noise=run.pose_noise)
    clips = loader(data, run.batch, run.seed, rank(), world_size())
    batches = []
    if data.manifest["counts"].get("val") and not isinstance(run.recipe, DmdConfig):  # whose loss is no distance
        held_out = ShardDataset(Path(run.data), "val", image_start=begins_with_image, null=null)
        some = range(min(HELD_OUT, len(held_out)))
        batches = [held_out.batch(some[i : i + run.batch]) for i in some[:: run.batch]]
    trained = loop(run, out, recipe, clips, device, batches)
    save_model(out, replace(run.model, codec=codec.cfg), trained.cpu(), codec)
    write_card(out)
    return trained


def build_recipe(run: Run, fill: Callable[[str], Backbone]) -> Recipe:
    """The recipe of a run, with its roles filled by `fill`."""
    kind = RECIPES[type(run.recipe)]
    networks = {role: fill(role) for role in (*kind.trained, *kind.frozen)}
    for role in kind.trained:
        networks[role].checkpointing = run.checkpointing
    recipe = kind(run.recipe, networks, run.model.geometry)
    if run.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
        for net in recipe.networks.values():
            net.compile_blocks()
    return recipe


def load_role(run: Run, device: torch.device, role: str) -> Backbone:
    """A network for a role: from its folder, or fresh (student only)."""
    source = {
        "student": run.init.student,
        "teacher": run.init.teacher,
        "critic": run.init.critic,
        "real": run.init.real,
    }[role]
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    net = run.model.network.build()
    if source is None:
        if role != "student":
            raise ConfigError(f"{run.name}: init.{role} names no model folder, and a {role} cannot start fresh")
        return net.to(device)
    load_weights(net, Path(source) / "model.safetensors", may_be_new=CAMERA if role == "student" else ())
    return net.to(device)


def _seconds(out: Path) -> float:
    """Seconds of training that the last state has seen, over all resumed parts."""
    states = States(out)
    return json.loads((states.folder / f"{states.latest():06d}" / "state.json").read_text())["seconds"]
