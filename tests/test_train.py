"""Training runs: what is resumed is bit-exact, and what cannot be trained is refused by name."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from minwm.bench.memory import plan_training
from minwm.bench.training import measure_steps
from minwm.cameras.trajectory import Motion
from minwm.core.config import ConfigError, UserError, dumps, loads, override
from minwm.core.flow import interpolate, x0_from_velocity
from minwm.core.metrics import read_metrics
from minwm.core.types import Clip
from minwm.data.dataset import Loader, ShardDataset
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.data.trajectories import collect_trajectories
from minwm.experiments.samples import sample_videos
from minwm.families.wan.transformer import WanConfig
from minwm.nets.backbone import Backbone
from minwm.nets.chunks import StreamConfig
from minwm.nets.lora import LoraConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.recipes.base import Loss, Recipe, RecipeConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.recipes.ops import frame_mse, loss_mask, noise_like
from minwm.store.folder import load_codec, load_model, save_codec, save_model
from minwm.store.model import ModelConfig
from minwm.stream.solvers import BidirectionalSampler, FewStepSampler
from minwm.train.build import train
from minwm.train.config import AnyRecipeConfig, Init, OptimConfig, Run
from minwm.train.state import States

MOTION = Motion(move=0.5, turn=24.0, fps=16.0)
MODEL = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=1, ffn=32, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=MOTION,
    stream=StreamConfig(chunk=2, first_chunk=1),
    text=WordText(dim=8),
    latents=5,
    height=32,
    width=32,
)
RECIPES = {
    "bidirectional": BidirectionalConfig(),
    "autoregressive": AutoregressiveConfig(),
    "ode": OdeConfig(ode_steps=4),
    "consistency": ConsistencyConfig(grid=4),
    "dmd": DmdConfig(critic_updates=2),
    "codec": CodecTraining(),
}
STEPS = 7
COSTS = ("clips_per_s", "tokens_per_s", "data_wait_s", "peak_memory_gb", "tflops")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, codec/, latents/, trajectories/ and two models with random weights."""
    out = tmp_path_factory.mktemp("project")
    cfg = RenderConfig(seed=5, motion=MOTION, latents=MODEL.latents, height=32, width=32)
    render_worlds(out / "raw", cfg, clips=8, workers=1)
    torch.manual_seed(0)
    codec = MODEL.codec.build().eval()
    save_codec(out / "codec", codec)
    encode_clips(out / "raw", out / "latents", codec, MODEL.text, cfg=EncodeConfig(val=0.3))
    for name in ("one", "two"):
        net = MODEL.network.build()
        nn.init.normal_(net.get_parameter("head.head.weight"), std=0.1)
        save_model(out / name, MODEL, net, codec)
    data, teacher = ShardDataset(out / "latents", "train"), load_model(out / "one")

    def states(clip: Any, number: int) -> Tensor:
        return RECIPES["ode"].collect_states(teacher.net, clip, MODEL, torch.Generator().manual_seed(number))

    collect_trajectories(data, out / "trajectories", 4, states, {"teacher": "one"}, batch=2)
    return out


def stage(name: str, project: Path, **changes: Any) -> Run:
    one = str(project / "one")
    two = one if "lora" in changes else str(project / "two")
    roles = {
        "consistency": {"teacher": two},
        "dmd": {"critic": two, "real": two},
        "codec": {"student": None, "codec": None},
    }.get(name, {})
    data = {"codec": "raw", "ode": "trajectories"}.get(name, "latents")
    run = Run(
        name=name,
        model=MODEL,
        recipe=RECIPES[name],
        data=str(project / data),
        init=Init(**{"student": one, "codec": str(project / "codec"), **roles}),
        steps=STEPS,
        batch=2,
        optim=OptimConfig(lr=1e-2, warmup=3, final=0.1),
        save_every=3,
        ema=0.5,
        tensorboard=False,
    )
    return replace(run, **changes)


def state_tensors(folder: Path) -> dict[str, Tensor]:
    reader = FileSystemReader(folder)
    found = reader.read_metadata().state_dict_metadata.items()
    tensors: dict[str, Any] = {name: torch.empty(x.size) for name, x in found if isinstance(x, TensorStorageMetadata)}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a later batch is loaded."""
    following, seen = Loader.__next__, []

    def next_batch(self: Loader) -> Any:
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)
        return following(self)

    monkeypatch.setattr(Loader, "__next__", next_batch)


def final_state(out: Path) -> dict[str, Any]:
    """Everything that the last state and the results hold, except clocks."""
    folder = out / "state" / f"{STEPS:06d}"
    files = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    saved = json.loads((folder / "state.json").read_text())
    del saved["seconds"], saved["files"], saved["gpu_hours"]
    metrics = [{name: value for name, value in line.items() if name not in COSTS} for line in read_metrics(out)]
    tensors = {name: x.tolist() for name, x in state_tensors(folder).items()}
    return files | tensors | {"state": saved, "metrics": metrics}


MUON = OptimConfig(optimizer="muon", lr=1e-2)
EXIT = DmdConfig(critic_updates=2, exit_step="step", context="exit", critic_data="exit")
LORA = {"lora": LoraConfig(rank=2, whole=("prope_o",)), "precision": "bfloat16", "checkpointing": True}
CHANGED = [("dmd", {"optim": MUON, "critic": MUON, "recipe": EXIT}), ("consistency", LORA), ("dmd", LORA)]


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in RECIPES), *CHANGED])
def test_resuming_is_bit_exact(
    name: str, changes: dict[str, Any], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks, averages, targets, optimisers, random draws, place in the data, and the log."""
    run = stage(name, project, **changes)
    train(run, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(5, patch)
        train(run, tmp_path / "parts")
    assert States(tmp_path / "parts").latest() == 3
    assert len(read_metrics(tmp_path / "parts")) == 5
    torch.manual_seed(99)
    torch.rand(7)
    train(run, tmp_path / "parts")
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    roles = {"student", "ema"} | {"dmd": {"critic"}, "consistency": {"target"}}.get(name, set())
    optimizers = {f"optimizer.{role}" for role in roles & {"student", "critic"}}
    assert all(any(key.startswith(part) for key in whole) for part in roles | optimizers)
    moments = {key.rpartition(".")[2] for key in whole if key.startswith("optimizer")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if "optim" in changes else set())
    assert whole.keys() == parts.keys()
    for key in whole:
        assert whole[key] == parts[key], key
    assert [line["step"] for line in whole["metrics"]] == list(range(STEPS))


def test_an_interrupted_save_leaves_the_former_state(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = stage("dmd", project), torch.save

    def disk_full(*args: Any, **options: Any) -> None:
        if States(tmp_path / "parts").latest():  # this is the second state
            raise OSError(28, "No space left on device")
        save(*args, **options)

    message = r"000006 is not written; the state after 3 steps is untouched \(process 0: .*No space left"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(torch, "save", disk_full)
        train(run, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts" / "state").iterdir()] == ["000003"]
    (tmp_path / "parts" / "state" / ".000006.tmp").mkdir()  # what a power cut would leave
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "los')
    train(run, tmp_path / "parts")
    train(run, tmp_path / "whole")
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "parts" / "state").iterdir()] == ["000007"]


def test_a_finished_run_returns_at_once(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stage("bidirectional", project, tensorboard=True)
    summary = train(run, tmp_path)
    assert summary.steps == STEPS and summary.seconds > 0 and math.isfinite(summary.last_loss)
    assert list((tmp_path / "tensorboard").glob("events*"))
    interrupt_after(0, monkeypatch)
    assert train(run, tmp_path) == summary
    model = load_model(tmp_path)
    assert model.config == MODEL and not any(p.requires_grad for p in model.net.parameters())


def test_sample_videos_change_nothing(project: Path, tmp_path: Path) -> None:
    """What is trained is bit for bit the same with videos, without, and where they fail."""

    def broken(*_: Any) -> Mapping[str, float]:
        torch.rand(3)
        raise RuntimeError("no space left")

    codec = load_codec(project / "codec")
    encode_clips(project / "raw", tmp_path / "held", codec, MODEL.text, cfg=EncodeConfig(val=0.5))
    run = stage("bidirectional", project, model=replace(MODEL, sampler=BidirectionalSampler(steps=1)))
    run = replace(run, data=str(tmp_path / "held"))
    train(run, tmp_path / "without")
    watched = replace(run, sample_every=3, samples=1, price=2.0)
    summary = train(watched, tmp_path / "with", sample_videos)
    assert summary.gpu_hours == pytest.approx(summary.seconds / 3600, rel=0.1)
    with pytest.warns(UserWarning, match="no sample videos after step 3: no space left"):
        train(watched, tmp_path / "failing", broken)
    lines = [{name for name in line if name.startswith("sample/")} for line in read_metrics(tmp_path / "with")]
    assert [bool(line) for line in lines] == [step in (2, 5) for step in range(STEPS)]
    assert lines[2] >= {"sample/psnr", "sample/rot_err_deg"}
    for step in (3, 6):
        names = {path.suffix for path in (tmp_path / "with" / "samples" / f"{step:06d}").glob("[!.]*.*")}
        assert names == {".mp4", ".json", ".png"}
    same, *others = (final_state(tmp_path / name) for name in ("without", "with", "failing"))
    for other in others:
        metrics = [{n: v for n, v in line.items() if not n.startswith("sample/")} for line in other["metrics"]]
        state = {**other["state"], "run": same["state"]["run"]}  # it says that videos were asked for
        assert {**other, "metrics": metrics, "state": state} == same
    elsewhere, model = replace(run, data=str(project / "latents")), load_model(tmp_path / "with")
    assert "psnr" not in sample_videos(elsewhere, model, tmp_path / "suite"), "without held-out clips: no truth"


def test_a_tracker_gets_the_log(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[str, Any]]()
    service = ModuleType("wandb")
    vars(service).update({n: lambda *a, n=n, **k: calls.append((n, a or k)) for n in ("init", "log", "finish")})
    monkeypatch.setitem(sys.modules, "wandb", service)
    out = tmp_path / "demo" / "camera"
    train(stage("bidirectional", project, tracker="wandb", steps=2), out)
    assert calls[0] == (
        "init",
        {"project": "demo", "name": "camera", "id": "camera", "dir": str(out), "resume": "allow"},
    )
    assert [name for name, _ in calls[1:]] == ["log", "log", "finish"]
    values = calls[1][1][0]
    assert values["student/loss"] == read_metrics(out)[0]["loss"]
    with pytest.raises(UserError, match=r"pip install 'minwm\[trackio\]'"):
        train(stage("bidirectional", project, tracker="trackio", steps=2), tmp_path / "other")


def test_another_config_in_the_same_folder_is_refused(project: Path, tmp_path: Path) -> None:
    run = stage("bidirectional", project, steps=1)
    train(run, tmp_path)
    with pytest.raises(ConfigError, match="another optim, seed; give another --out, or delete it"):
        train(replace(run, seed=1, optim=OptimConfig(lr=1.0)), tmp_path)


def test_roles_that_cannot_be_filled_are_named(project: Path, tmp_path: Path) -> None:
    run = stage("consistency", project)
    with pytest.raises(ConfigError, match=r"init\.teacher names no model folder"):
        train(replace(run, init=replace(run.init, teacher=None)), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"init\.codec names the codec"):
        train(replace(run, init=replace(run.init, codec=None)), tmp_path / "b")


def test_costs_are_logged_beside_the_loss(project: Path, tmp_path: Path) -> None:
    for name, rates in {"ode": {"tokens_per_s", "tflops"}, "codec": set()}.items():
        train(stage(name, project, steps=2, accumulate=2, peak_tflops=0.5), tmp_path / name)
        for line in read_metrics(tmp_path / name):
            assert line.get("mfu", 0) == pytest.approx(200 * line.get("tflops", 0))
            costs = {key: line[key] for key in line.keys() & set(COSTS)}
            assert costs.keys() == {"clips_per_s", "data_wait_s", "peak_memory_gb", *rates}
            assert min(costs.values()) > 0 and line["data_wait_s"] < 4 / line["clips_per_s"]
            assert name != "ode" or line["tokens_per_s"] == pytest.approx(5 * 4 * line["clips_per_s"])


# ---------------------------------------------------------------------------------------------
# A recipe of one file


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(RecipeConfig):
    """Predicts the clip from one noise level."""

    kind: ClassVar[str] = "denoiser"
    noise: float = 0.5

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Denoiser":
        return Denoiser(self, model, networks)


class Denoiser(Recipe[Backbone]):
    cfg: DenoiserConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        t = clip.latents.new_full(clip.latents.shape[:2], self.cfg.noise)
        x_t = interpolate(clip.latents, noise_like(clip.latents, generator), t)
        x0 = x0_from_velocity(x_t, self.networks["student"](x_t, t, clip.cond), t)
        total = frame_mse(x0, clip.latents, loss_mask(clip))
        return Loss(total, "student", {"loss": total.detach()})


def test_a_new_recipe_is_one_file(project: Path, tmp_path: Path) -> None:
    """It trains, validates, resumes from its states, saves a model, is planned and measured; and its config is read
    once it is in the union."""
    run: Any = stage("bidirectional", project)
    run = replace(run, recipe=DenoiserConfig(noise=0.4), steps=2)
    train(run, tmp_path)
    assert load_model(tmp_path).config == MODEL
    before = dict(load_model(project / "one").net.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in load_model(tmp_path).net.named_parameters())
    assert plan_training(run).total > 0
    assert measure_steps(run, steps=1, warmup=1).tflops > 0
    assert loads(AnyRecipeConfig | DenoiserConfig, dumps(run.recipe)) == run.recipe


def test_validation_has_clips_of_its_own_split(project: Path, tmp_path: Path) -> None:
    encode_clips(
        project / "raw", tmp_path / "latents", load_codec(project / "codec"), MODEL.text, cfg=EncodeConfig(val=0.6)
    )
    train(stage("bidirectional", project, data=str(tmp_path / "latents")), tmp_path / "a")
    values = [line["val"] for line in read_metrics(tmp_path / "a") if "val" in line]
    assert len(values) == 3 and all(math.isfinite(value) for value in values)
    train(stage("ode", project), tmp_path / "b")  # its folder has no validation split
    assert not any("val" in line for line in read_metrics(tmp_path / "b"))


def test_muon_turns_matrices_and_adamw_the_rest() -> None:
    """The first update of a matrix is a multiple of a rotation, up to the error of its iteration, of AdamW's size."""
    torch.manual_seed(0)
    net, optim = MODEL.network.build(), replace(MUON, weight_decay=0.0)
    split = optim.split(net)
    assert sum(len(weights) for weights in split.values()) == len(list(net.parameters()))
    assert {p.ndim for p in split["muon"]} == {2} and 2 not in {p.ndim for p in split["adamw"]}
    assert any(p.ndim == 5 for p in split["adamw"]), "the convolution over patches"
    before = {p: p.detach().clone() for p in net.parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optim.build(net).values():
        optimizer.step()
    for p in split["muon"]:
        sizes = torch.linalg.svdvals(p - before[p])
        assert sizes.max() < 1.7 * sizes.median(), "2.5 for the gradient"
        assert 0.1 * optim.lr < (p - before[p]).square().mean().sqrt() < 0.3 * optim.lr
    for p in split["adamw"]:
        torch.testing.assert_close((p - before[p]).abs(), torch.full_like(p, optim.lr), atol=1e-4, rtol=0)


def test_a_step_with_too_large_a_gradient_is_left_out(project: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, skip_above=1e-9)
    train(stage("bidirectional", project, steps=2, optim=optim, ema=0.0), tmp_path)
    left, start = (dict(load_model(folder).net.named_parameters()) for folder in (tmp_path, project / "one"))
    assert all(torch.equal(p, start[name]) for name, p in left.items())
    assert [line["lr"] for line in read_metrics(tmp_path)] == [0.0, 0.0]
    with pytest.raises(ConfigError, match=r"skip_above=0: must be more than 0, or none"):
        OptimConfig(skip_above=0)


@pytest.mark.parametrize("before", ["ode", "consistency"])
def test_stage_3_starts_from_either_stage_2(before: str, project: Path, tmp_path: Path) -> None:
    train(stage(before, project, steps=1), tmp_path / before)
    run = stage("dmd", project, steps=1, ema=0.0)
    run = override(run, {"init.student": str(tmp_path / before), "optim.lr": 0.0})
    train(run, tmp_path / "dmd")
    made, start, base = (dict(load_model(folder).net.named_parameters()) for folder in (
        tmp_path / "dmd", tmp_path / before, project / "one"
    ))  # fmt: skip
    assert all(torch.equal(p, start[name]) for name, p in made.items())
    assert any(not torch.equal(p, base[name]) for name, p in made.items())


def test_nonsense_is_refused() -> None:
    run = Run(name="dot", model=MODEL, recipe=BidirectionalConfig(), data="")
    for change, message in {"steps": "at least 1", "accumulate": "at least 1", "ema": "a decay"}.items():
        with pytest.raises(ConfigError, match=message):
            replace(run, **{change: 1 if change == "ema" else 0})
    with pytest.raises(ConfigError, match="critic_updates=0: must be at least 1"):
        DmdConfig(critic_updates=0)
    with pytest.raises(ConfigError, match=r"dmd.regression=-0.1: a weight must be at least 0"):
        DmdConfig(regression=-0.1)


@pytest.mark.parametrize("name", ["ode", "dmd"])
def test_the_times_of_a_student_are_those_of_its_sampler(name: str) -> None:
    run: Any = Run(name=name, model=MODEL, recipe=RECIPES[name], data="")
    with pytest.raises(ConfigError, match=r"needs model\.sampler\.kind=few_step, not bidirectional"):
        replace(run, model=replace(MODEL, sampler=BidirectionalSampler()))
