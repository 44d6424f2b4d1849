"""What ails a training run: verdicts with evidence and cure, from its log, its config, and the newest weights.

A healthy run is far from every threshold. `tests/test_doctor.py` has, for each verdict, a run that is made ill, and a
healthy one beside it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minwm.control.action import with_action_labels
from minwm.core.config import UserError, from_dict
from minwm.core.files import read_json
from minwm.core.flow import interpolate
from minwm.core.metrics import read_metrics
from minwm.core.runtime import generator
from minwm.core.types import Clip
from minwm.data.remote import data_folder
from minwm.data.spec import FOCAL_TOLERANCE
from minwm.nets.lora import copy_network
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import DiffusionConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.recipes.ops import noise_like
from minwm.store.folder import load_config
from minwm.store.layouts import FAMILIES
from minwm.store.model import ModelConfig
from minwm.train.config import Run
from minwm.train.roles import first_student
from minwm.train.state import States

SPIKE = 4.0
"""Times the median of the 20 steps before it."""
STARVED = 0.3
"""Part of the time of a step that is spent waiting for clips."""
UNMOVED = 0.9
"""Part of the weights that are bit for bit what they were."""
STALE = 0.7
"""Distance of the average from the student, in distances that the student has moved."""
BLIND = 1e-3
"""Relative change of the velocity when all cameras are put where the first one is."""
APART = 2.0
"""Times that shift or guidance of sampling may be that of training; HunyuanVideo's shifts are 5 and 3."""
LOOKS = {
    "static video": ("motion", 0.0, 0.2, "train on; look whether the clips move, and their captions; raise optim.lr"),
    "flicker": ("flicker", 3.0, math.inf, "train on; raise ema, or in DMD critic_updates"),
    "seams at chunk borders": ("seam", 2.0, math.inf, "train the autoregressive stage longer, or with longer clips"),
    "oversaturation": ("saturation", 1.3, math.inf, "lower guidance: of the teacher, the real score, or the sampler"),
}
"""Verdicts on sample videos: a score relative to the truth, where 1 is alike, the interval of an ill one, a cure."""
FEW_CRITIC_UPDATES = 2
"""Per student update, below which the critic does not follow the student; 4 or 5 are published."""
CAMERA_ONSET = {"small": 2000, "large": 5000}
"""Steps until cameras are followed, at most: 1.3B and 8B parameters (1-2K, and about 5K steps, are reported)."""
LARGE = 4e9


@dataclass(frozen=True)
class Verdict:
    """One illness of a run. Red: it will not become what it should. Yellow: look."""

    name: str
    level: Literal["red", "yellow"]
    evidence: str
    cure: str


def examine(folder: Path) -> list[Verdict]:
    """The verdicts on a run, going on or finished; none for a healthy one. UserError if `folder` holds no run."""
    if not (folder / "run.json").exists():
        raise UserError(f"{folder} holds no training run (no run.json); name the folder of a stage")
    run = from_dict(Run, read_json(folder / "run.json", {"run": dict})["run"])
    found = [*from_log(run, read_metrics(folder)), *from_config(run)]
    states = States(folder, address=run.states)
    if (step := states.latest()) and run.recipe.trains_backbone:
        start = first_student(run)
        student, ema = copy_network(start), copy_network(start)
        states.load(step, {"student": student, "ema": ema}, [], alone=True)
        found += from_weights(run, step, start, student, ema)
        clip: Any = run.recipe.dataset(data_folder(run.data), "train", run.model).batch([0])
        found += from_camera_change(step, student, camera_change(run, student.eval(), clip))
    return found


def from_log(run: Run, lines: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Loss spikes of each role, looks of sample videos, and waiting for clips."""
    for role in run.recipe.trained:
        steps = [line for line in lines if line["trains"] == role]
        losses = [next(value for name, value in line.items() if name not in ("step", "trains")) for line in steps]
        for i in range(20, len(steps)):
            usual = median(losses[i - 20 : i])
            if losses[i] > SPIKE * usual > 0:
                evidence = f"{role}: loss {losses[i]:.3g} at step {steps[i]['step']}, {usual:.3g} before"
                cure = "look at the clips of that step; set optim.skip_above, lower optim.lr, or raise warmup"
                yield Verdict("loss spike", "yellow", evidence, cure)
                break
    yield from from_samples(lines)
    late = lines[len(lines) // 2 :]  # the first ones read what then stays in memory
    if len(late) >= 10:
        clips = run.batch * run.accumulate
        waits = median(line["data_wait_s"] * line["clips_per_s"] / clips for line in late)
        if waits > STARVED:
            evidence = f"{100 * waits:.0f} % of the time of a step is waiting for clips"
            yield Verdict("starved of data", "yellow", evidence, "put the shards on a local disk, or make them smaller")


def from_samples(lines: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Videos of the averaged student that do not look like the truth beside them; the newest count."""
    sampled = [line for line in lines if "sample/motion" in line]
    for name, (score, low, high, cure) in LOOKS.items() if sampled else ():
        value = sampled[-1].get(f"sample/{score}")
        if value is not None and low <= value < high:
            evidence = f"{score} of the videos after {sampled[-1]['step'] + 1} steps is {value:.2f} of the truth's"
            yield Verdict(name, "yellow", evidence, cure)


def from_config(run: Run) -> Iterator[Verdict]:
    """Starting points that do not fit, few updates of the critic, and sampling that is not what was trained."""
    if not run.recipe.trains_backbone:
        return
    for role in (*run.recipe.trained, *run.recipe.frozen):
        folder = vars(run.init)[role]
        if folder and (Path(folder) / "model.json").exists():  # weights alone say nothing of how they were trained
            yield from from_start(run, role, load_config(Path(folder)))
    if isinstance(run.recipe, DmdConfig) and run.recipe.critic_updates < FEW_CRITIC_UPDATES:
        evidence = f"{run.recipe.critic_updates} update of the critic per update of the student"
        yield Verdict("critic falls behind", "yellow", evidence, "set recipe.critic_updates to 4 or 5")
    yield from from_sampling(run)


def from_start(run: Run, role: str, start: ModelConfig) -> Iterator[Verdict]:
    """The model that a role starts from: of another stage or lens, or guided otherwise than where it is sampled."""
    recipe, where = run.recipe, f"init.{role}={vars(run.init)[role]}"
    wanted = {"teacher": True, "critic": False, "real": False}
    if recipe.needs_trajectories or recipe.self_rollout or "teacher" in recipe.frozen:
        wanted["student"] = True
    if start.sampler.causal != wanted.get(role, start.sampler.causal):
        kinds = {True: "an autoregressive", False: "a bidirectional"}
        evidence = f"{where} is {kinds[start.sampler.causal]} model; this stage needs {kinds[wanted[role]]} one"
        yield Verdict("checkpoint of another stage", "red", evidence, f"name the right folder in init.{role}")
        return
    if start.network.camera != "none" and not np.allclose(start.focal, run.model.focal, rtol=FOCAL_TOLERANCE):
        evidence = (
            f"{where} was trained with model.focal={start.focal}, this stage and its videos have {run.model.focal}"
        )
        cure = "train all stages on clips of one lens, unless it is meant"
        yield Verdict("intrinsics of another model", "yellow", evidence, cure)
    if isinstance(recipe, OdeConfig | ConsistencyConfig | DmdConfig):
        teaches = role in recipe.frozen or recipe.needs_trajectories
        if teaches and _apart(recipe.guidance, start.sampler.guidance):
            evidence = f"{where} teaches under guidance {recipe.guidance}, is sampled under {start.sampler.guidance}"
            yield Verdict("guidance of training and sampling differ", "yellow", evidence, "set recipe.guidance")


def from_sampling(run: Run) -> Iterator[Verdict]:
    """Times, and an unconditional branch of guidance, that training does not have."""
    recipe, sampler = run.recipe, run.model.sampler
    trained = sampler.shift
    if isinstance(recipe, DiffusionConfig):
        trained = recipe.time.shift
        seen = recipe.text_dropout > 0 and recipe.dropped_prompt is None
        if sampler.guidance != 1 and run.model.negative is None and not seen:
            evidence = (
                f"guidance {sampler.guidance} is away from zeros in place of a prompt, which training does not show: "
                f"text_dropout={recipe.text_dropout}, dropped_prompt={recipe.dropped_prompt!r}"
            )
            cure = (
                "set recipe.text_dropout to 0.1, model.negative to the dropped prompt, or model.sampler.guidance to 1"
            )
            yield Verdict("guidance that was not trained", "yellow", evidence, cure)
    elif isinstance(recipe, ConsistencyConfig):
        trained = recipe.shift
    if _apart(trained, sampler.shift):
        evidence = f"trained with timestep shift {trained}, sampled with {sampler.shift}"
        cure = "set the shift of recipe or model.sampler, unless it is meant"
        yield Verdict("shift of training and sampling differ", "yellow", evidence, cure)


def _apart(one: float, other: float) -> bool:
    return max(one, other) > APART * min(one, other)


def from_weights(run: Run, step: int, start: nn.Module, student: nn.Module, ema: nn.Module) -> Iterator[Verdict]:
    """Weights that do not move, and an average that does not follow; of runs that start from a model."""
    if not run.init.student:
        return
    new = FAMILIES[run.model.network.kind].CAMERA_PARAMETERS
    trained = start.state_dict().keys() & dict(start.named_parameters()).keys()
    names = [name for name in sorted(trained) if not name.endswith(new)]
    before, now, mean = (_flat(net, names) for net in (start, student, ema))
    same = float((before == now).float().mean())
    if same > UNMOVED:
        yield from from_unmoved(run, step, same)
    elif run.ema and (lag := float((mean - now).norm() / (now - before).norm())) > STALE:
        evidence = f"the average is {lag:.2f} of the way that the student has moved behind it, and it is what is saved"
        yield Verdict("average is stale", "red", evidence, "lower ema, or train longer; ema=0 saves the student itself")


def from_unmoved(run: Run, step: int, same: float) -> Iterator[Verdict]:
    """Weights that do not move; `same` is the part of them that is what it was."""
    if same > UNMOVED:
        updates = sum(run.recipe.turn[i % len(run.recipe.turn)] == "student" for i in range(step))
        evidence = f"after {updates} updates {100 * same:.1f} % of the student's weights are bit for bit the first ones"
        if updates <= run.optim.warmup:
            normal = f"{evidence}: normal so far, the learning rate rises for {run.optim.warmup} updates"
            yield Verdict("weights not moving", "yellow", normal, "train on")
        else:
            cure = "raise optim.lr; look whether gradients reach the network (grad_norm in metrics.jsonl)"
            yield Verdict("weights not moving", "red", evidence, cure)


def _flat(net: nn.Module, names: Sequence[str]) -> Tensor:
    return torch.cat([net.get_parameter(name).detach().flatten() for name in names])


def from_camera_change(step: int, student: nn.Module, change: float | None) -> Iterator[Verdict]:
    """A network whose velocity does not depend on cameras, by `camera_change`."""
    if change is None or change >= BLIND:
        return
    onset = CAMERA_ONSET["large" if sum(p.numel() for p in student.parameters()) > LARGE else "small"]
    evidence = f"with cameras that stand still the velocity changes by {100 * change:.2g} % after {step} steps"
    if step < onset:
        yield Verdict("camera ignored", "yellow", f"{evidence}: normal so far, up to {onset}", "train on")
    else:
        cure = "look at poses and K with `minwm camera check`; clips must move; raise optim.lr"
        yield Verdict("camera ignored", "red", evidence, cure)


@torch.no_grad()
def camera_change(run: Run, student: nn.Module, clip: Clip) -> float | None:
    """Relative change of the velocity when all cameras are put where the first one is; None where they are.

    Passes through the network in any case: several processes with clips of their own make the same passes."""
    if run.model.network.camera == "none":
        return None
    w2c, _ = clip.cond.cameras
    t = clip.latents.new_full(w2c.shape[:2], 0.7)
    x = interpolate(clip.latents, noise_like(clip.latents, generator(0, "doctor", device=t.device)), t)
    still = with_action_labels(replace(clip.cond, w2c=w2c[:, :1].expand_as(w2c)))
    v, v_still = (student(x, t, cond) for cond in (clip.cond, still))
    if torch.equal(w2c, w2c[:, :1].expand_as(w2c)):
        return None
    return float((v - v_still).norm() / v.norm().clamp_min(1e-9))
