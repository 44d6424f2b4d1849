"""The config of a training run, and its summary."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from minwm.core.config import ConfigError
from minwm.core.metrics import Tracker
from minwm.data.noise import PoseNoise
from minwm.nets.backbone import Checkpointing
from minwm.nets.lora import LoraConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.train.adamw8bit import adamw_8bit, fits_8bit
from minwm.train.parallel import ParallelConfig

AnyRecipeConfig = CodecTraining | BidirectionalConfig | AutoregressiveConfig | OdeConfig | ConsistencyConfig | DmdConfig
"""The recipes that a config can name by their `kind`; a new one is added here."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser of a network's float32 weights."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW for all weights, as Wan was trained; the same with the moments of large matrices in 8 bits (torchao), a
    quarter of the memory; or Muon for matrices, as HunyuanVideo 1.5 was, and AdamW for the rest: biases, norms,
    modulation, convolutions. Muon's updates are scaled to the size of AdamW's, for the same lr."""
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    skip_above: float | None = None
    """Gradient norm from which on a step is left out (minWM for HunyuanVideo: 10); None: never, for clipping bounds
    it."""
    warmup: int = 0
    """Steps of linear warm-up."""
    final: float = 1.0
    """Learning rate at the last step as a fraction of lr; cosine decay in between."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip", "warmup", "final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: must be finite and at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: a decay lies in [0, 1)")
        if self.skip_above is not None and not self.skip_above > 0:
            raise ConfigError(f"optim.skip_above={self.skip_above}: must be more than 0, or none")

    def build(self, net: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of a network, by name."""
        betas, decay = (self.beta1, self.beta2), self.weight_decay
        make = {
            "adamw": lambda weights: torch.optim.AdamW(weights, self.lr, betas, weight_decay=decay),
            "adamw8bit": lambda weights: adamw_8bit(weights, self.lr, betas, decay),
            "muon": lambda weights: torch.optim.Muon(weights, self.lr, decay, adjust_lr_fn="match_rms_adamw"),
        }
        return {name: make[name](weights) for name, weights in self.split(net).items()}

    def split(self, net: nn.Module) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of each optimiser: AdamW has those that another one cannot have."""
        takes = {"adamw": lambda _: True, "adamw8bit": fits_8bit, "muon": lambda p: p.ndim == 2}[self.optimizer]
        split: dict[str, list[nn.Parameter]] = {}
        for p in net.parameters():
            if p.requires_grad:
                split.setdefault(self.optimizer if takes(p) else "adamw", []).append(p)
        if self.optimizer not in {"adamw", *split}:
            raise ConfigError(
                f"optim.optimizer={self.optimizer}: {type(net).__name__} has no weight for it; give adamw"
            )
        return split

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step; a function of the step alone, so resuming needs no scheduler state."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1)))
        return self.lr * warm * (self.final + (1 - self.final) * cosine)


@dataclass(frozen=True, kw_only=True)
class Init:
    """Folders from which the roles of a recipe are loaded; only a student may be left out, and then starts fresh."""

    student: str | None = None
    """Model folder; for a codec stage a codec folder."""
    teacher: str | None = None
    critic: str | None = None
    real: str | None = None
    codec: str | None = None
    """Folder of the codec that made the latents; it is saved with the trained model."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training stage: with the data, all that its result depends on."""

    name: str
    model: ModelConfig
    recipe: AnyRecipeConfig
    data: str
    """Folder of latent shards, or their address in a store (s3://..., hf://datasets/...); raw clips for a codec."""
    init: Init = Init()
    steps: int = 1000
    batch: int = 16
    """Clips of a micro-batch: what passes through the networks at once."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged into one step, whatever the number of processes that share them."""
    optim: OptimConfig = OptimConfig()
    critic: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of the critic (DMD)."""
    ema: float = 0.99
    """Decay of the averaged weights that are saved as the model; 0 saves the raw weights."""
    seed: int = 0
    save_every: int = 100
    keep: int = 1
    """States that stay; older ones are removed."""
    states: str | None = None
    """Address in a store where they are kept, such as s3://bucket/run; None: in `state/` of the run's folder."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and attention (autocast); weights, optimiser and averages are float32 always."""
    checkpointing: Checkpointing = False
    """Recompute activations in the backward pass: those of whole blocks (true), a third more FLOPs in all, or of all
    but `attention`, which in long clips is most of the work and little of the memory."""
    compile: bool = False
    """Compile the blocks of all networks, but for attention (`Backbone.compile_blocks`)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes share the work."""
    lora: LoraConfig | None = None
    """Train additions to frozen weights that all roles share; None: train all weights. Where folders in `init` have
    additions of their own, these go on; a frozen role without is the base."""
    tensorboard: bool = True
    tracker: Tracker = "none"
    """Where the log goes, besides."""
    sample_every: int = 0
    """Steps between videos of the averaged student, with their scores (0: none): in `samples/{step}`."""
    samples: int = 4
    """Videos at a time."""
    price: float | None = None
    """Of an hour of one GPU: the progress line then says what is still to be paid."""
    peak_tflops: float | None = None
    """TFLOP/s of one GPU by its data sheet, such as 989 of an H100 in bfloat16: the log then has the MFU."""
    pose_noise: PoseNoise | None = None
    """Errors on the cameras of the training clips (ablations)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}={getattr(self, name)}: must be at least 1")
        if self.sample_every < 0 or self.samples < 1:
            raise ConfigError(
                f"run.sample_every={self.sample_every}, run.samples={self.samples}: give 0 or more steps, and 1 video "
                "or more"
            )
        for name in ("price", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"run.{name}={value}: must be more than 0, or none")
        if self.states is not None and "://" not in self.states:
            raise ConfigError(f"run.states={self.states}: give the address of a store, such as s3://bucket/run")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"run.ema={self.ema}: a decay lies in [0, 1)")
        self.recipe.check(self.model)
        if not self.recipe.trains_backbone and (self.checkpointing or self.compile):
            raise ConfigError(f"run {self.name}: checkpointing and compile are of transformer blocks; a codec has none")
        if self.parallel.cpu_offload and "adamw8bit" in (self.optim.optimizer, self.critic.optimizer):
            raise ConfigError(
                f"run {self.name}: parallel.cpu_offload has the moments in the memory of the CPU, where torchao's "
                "8-bit update is slow; give adamw as optim.optimizer and critic.optimizer, or no offload"
            )
        if self.lora and not (self.recipe.trains_backbone and self.init.student):
            raise ConfigError(f"run {self.name}: lora needs a network, and init.student, the folder of its base")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a finished run, `summary.json` in its folder."""

    steps: int
    seconds: float
    """Of training, over all resumed parts."""
    gpu_hours: float | None = None
    """The same for all processes together, each of which has a GPU (or a CPU); None in older folders."""
    first_loss: float
    """Mean of the student's loss over the first tenth of its steps."""
    last_loss: float
    """The same over the last tenth."""
    parameters: int
    """Of the student."""
