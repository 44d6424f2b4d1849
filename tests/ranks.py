"""Tests on several processes: `python ranks.py FOLDER` forks worlds of 1, 2 and 4 that train the same.

One process imports everything, so that a world starts at once; TorchDynamo too, which FSDP and optimisers import late.
What each world finds is compared with what one process finds without torch.distributed. Here is every mechanism once;
every recipe of every family is in tests/every_rank.py.
"""

import copy
import math
import os
import shutil
import signal
import socket
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from backbones import SMALL
from recipes import CASES, MODEL, clip
from test_adamw8bit import Matrix
from test_batch import CONFIG
from test_train_loop import run_loop
from tiny_presets import tiny_preset
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.utils._python_dispatch import TorchDispatchMode

from minwm.bench.scaling import Cluster, count_uses, plan_step
from minwm.cli import main as command
from minwm.core.config import parse_json
from minwm.core.metrics import read_metrics
from minwm.core.runtime import rank, world_size
from minwm.core.types import Clip
from minwm.core.weights import load_safetensors
from minwm.data.clips import read_manifest
from minwm.data.dataset import Loader
from minwm.data.encode import encode_clips
from minwm.data.shards import list_shards
from minwm.eval.cases import BASELINES
from minwm.eval.run import EvalConfig
from minwm.experiments.pipeline import evaluation, run_pipeline
from minwm.families.wan.transformer import Wan
from minwm.nets.lora import LoraConfig, copy_network
from minwm.recipes.base import Recipe
from minwm.recipes.codec import CodecTraining
from minwm.session import batch
from minwm.store.folder import load_codec, save_model
from minwm.stream.solvers import FewStepSampler
from minwm.train.config import Init, OptimConfig, Run
from minwm.train.loop import StoppedError, Trainer, loop
from minwm.train.parallel import Parallel, ParallelConfig, process_group, whole
from minwm.train.roles import adapt_role, build_recipe, load_role, saved_weights
from minwm.train.state import States, state_tensors

torch.set_num_threads(1)
MODELS = {"wan": MODEL, "hunyuan": replace(MODEL, network=SMALL["hunyuan-dual"])}
RUNS = {f"{family}-{name}": (model, cfg) for family, model in MODELS.items() for name, cfg in CASES.items()}
RUNS |= {f"{family}-lora-dmd": (model, CASES["dmd"]) for family, model in MODELS.items()}
RUNS |= {"wan-lora-consistency": (MODEL, CASES["consistency"]), "codec": (MODEL, CodecTraining())}
PAIRS = ParallelConfig(sequence=2, shard=2)
BASE = replace(MODEL, network=replace(MODEL.network, dim=512, ffn=2048, layers=4))
SHARDED = "wan-autoregressive", "wan-dmd", "wan-lora-dmd", "codec"
OFFLOADED = "wan-bidirectional"
PAIRED = "hunyuan-bidirectional", "hunyuan-dmd"


def world(size: int, work: Callable[[], None]) -> None:
    """Run `work` in so many new processes, which find each other as torchrun's do; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for number in range(size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ.update(place, RANK=str(number))
        try:
            with process_group(60):
                work()
        except BaseException:  # noqa: BLE001 - reported, and the parent notices
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size


class Clips:
    """Four clips. Told to, one process gets SIGTERM while it loads them."""

    fingerprint = 0

    def __init__(self, codec: bool = False, terminated: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.rand(4, 17, 3, 32, 48, generator=generator) if codec else None
        self.clip, self.terminated = clip(batch=4), terminated

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int]) -> Clip | Tensor:
        if self.terminated:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.pixels is not None:
            return self.pixels[list(indices)]
        assert self.clip.trajectory is not None
        return Clip(self.clip.latents[indices], self.clip.cond.clips([*indices]), self.clip.trajectory[:, indices])


def configured(name: str, parallel: ParallelConfig, **changes: Any) -> tuple[Run, Recipe]:
    """A run with two micro-batches in a step, and its recipe with random networks."""
    model, cfg = RUNS[name]
    run = Run(name=name, model=model, recipe=cfg, data="", batch=1, accumulate=2, parallel=parallel, ema=0.5)
    networks = {}
    for seed, role in enumerate((*cfg.trained, *cfg.frozen)):
        torch.manual_seed(seed)
        networks[role] = cfg.network(model)
        for parameter in networks[role].parameters():
            nn.init.normal_(parameter, std=0.2)
        networks[role] = networks[role].double() if cfg.trains_backbone else networks[role]
    if "-lora-" in name:  # the last role, whose weights never change, is the base
        base = networks[cfg.frozen[-1]].requires_grad_(False)
        networks |= {role: with_additions(base) for role in cfg.trained}
    return replace(run, **{"tensorboard": False, **changes}), cfg.build(model, networks)


def with_additions(base: nn.Module) -> nn.Module:
    """What a role has learned beside a base: by LoRA, but its head, whole."""
    net = LoraConfig(rank=2, alpha=1.0, whole=("head" if isinstance(base, Wan) else "final_layer",)).add_to(
        copy_network(base)
    )
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return net


def clips_of(run: Run, here: Parallel, data: Clips) -> Loader[Any]:
    return Loader(data, run.batch, rank=here.data_rank, world=here.data_ranks)


def steps(name: str, parallel: ParallelConfig) -> Iterator[dict[str, Any]]:
    """Losses, norm, gradients and averaged weights of a step for each trained network."""
    run, recipe = configured(name, parallel)
    here = Parallel(parallel, torch.device("cpu"))
    trainer = Trainer(run, recipe, here)
    clips = clips_of(run, here, Clips(codec=name == "codec"))
    for step in range(len(run.recipe.trained)):
        made = trainer.gradients(step, clips)
        net = trainer.networks[made.trains]
        found = {f"gradient {key}": whole(p.grad) for key, p in net.named_parameters() if p.grad is not None}
        trainer.update(step, made)
        found |= {f"average {key}": whole(p.detach()) for key, p in trainer.ema.net.named_parameters()}
        numbers = {"norm": made.norm, **made.losses}
        yield copy.deepcopy(found) | {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}


def same_steps(folder: Path, name: str, parallel: ParallelConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What one process and several find in a step, which is the same to rounding: gradients are summed over processes
    in float32."""
    for one, many in zip(torch.load(folder / f"{name}.pt"), steps(name, parallel), strict=True):
        assert one.keys() == many.keys(), name
        for key, value in one.items():
            torch.testing.assert_close(many[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
        yield one, many


def train_the_same(folder: Path, names: Sequence[str], parallel: ParallelConfig) -> None:
    for name in names:
        for _ in same_steps(folder, name, parallel):
            pass


MUON = OptimConfig(optimizer="muon", lr=1e-3)
EIGHT_BIT = OptimConfig(optimizer="adamw8bit", lr=1e-3)


def train_to(
    step: int, out: Path, parallel: ParallelConfig, name: str = "wan-dmd", terminated: bool = False, **changes: Any
) -> None:
    """DMD, its student by Muon, to a step, or until it is told to end."""
    run, recipe = configured(name, parallel, **{"steps": step, "optim": MUON, "save_every": 2, **changes})
    here = Parallel(parallel, torch.device("cpu"))
    told = terminated and here.data_rank == here.data_ranks - 1
    loop(run, out, recipe, clips_of(run, here, Clips(terminated=told)), here)


def stopped(out: Path, parallel: ParallelConfig) -> None:
    """SIGTERM to one process ends all of them after the step, with a state."""
    try:
        train_to(4, out, parallel, "wan-bidirectional", terminated=True, optim=OptimConfig())
    except StoppedError as error:
        assert "goes on after step 1" in str(error) and error.exit_code == 143
    else:
        raise AssertionError("not stopped")
    assert States(out).latest() == 1


def resumed(out: Path, parallel: ParallelConfig, name: str = "wan-dmd", optim: OptimConfig = MUON) -> None:
    """A state of another number of processes is read bit for bit, and training goes on as in one process."""
    run, recipe = configured(name, parallel, optim=optim)
    trainer = Trainer(run, recipe, Parallel(parallel, torch.device("cpu")))
    networks = {**trainer.networks, "ema": trainer.ema.net}
    States(out).load(2, networks, trainer.all_optimizers)
    found = {key: whole(x) for key, x in state_tensors(networks, trainer.all_optimizers).items()}
    saved = read_state(out / "state" / "000002")
    assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
    train_to(3, out, parallel, name, optim=optim)


def log_deviation(whole_run: Path, parts: Path) -> float:
    """The largest difference between the losses and norms of two runs, relative to those of the first."""
    largest = 0.0
    for one, many in zip(read_metrics(whole_run), read_metrics(parts), strict=True):
        for name in takewhile(lambda name: name != "lr", one):  # what follows are times
            if name not in ("step", "trains"):
                largest = max(largest, abs(many[name] / one[name] - 1))
    return largest


def eight_bit(step: int, out: Path) -> nn.Module:
    """A matrix whose moments are 8-bit numbers, trained to a step."""
    return run_loop(Matrix(), out, steps=step, accumulate=4, save_every=2, optim=EIGHT_BIT, ema=0.0)


def eight_bit_resumed(whole_run: Mapping[str, Tensor], out: Path) -> None:
    """Codes and scales of two processes are read bit for bit, and training goes on as in one process."""
    recipe, here = Matrix(), Parallel(ParallelConfig(), torch.device("cpu"))
    here.place(recipe, {})
    networks, optimizers = recipe.networks, [*EIGHT_BIT.build(recipe.networks["student"]).values()]
    States(out).load(2, networks, optimizers)
    found = {name: whole(x) for name, x in state_tensors(networks, optimizers).items()}
    saved = read_state(out / "state" / "000002")
    assert any(name.endswith("exp_avg.codes") for name in found)
    assert all(torch.equal(x, saved[name]) for name, x in found.items())
    for name, x in eight_bit(4, out).state_dict().items():
        torch.testing.assert_close(whole(x), whole_run[name], rtol=1e-4, atol=1e-5, msg=name)


def read_state(folder: Path) -> dict[str, Any]:
    """All tensors of a state, in one process."""
    reader = FileSystemReader(folder)
    about = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in about.items()
        if isinstance(x, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class Sent(TorchDispatchMode):
    """Bytes that one of `PAIRS` sends in collectives of more than a few numbers, by kind of group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match str(func).removesuffix(".default"):
            case "c10d._allgather_base_" | "c10d._reduce_scatter_base_":
                self.bytes["shard"] += abs(args[0].nbytes - args[1].nbytes)
            case "c10d.alltoall_base_":
                self.bytes["sequence"] += args[1].nbytes // 2
            case "c10d.allreduce_" if args[0][0].numel() > 64:  # between two copies
                self.bytes["copy"] += sum(x.nbytes for x in args[0])
        return func(*args, **(kwargs or {}))


def sending(family: str) -> Run:
    model = replace(MODELS[family], latents=3, sampler=FewStepSampler(steps=1))
    return Run(name="sent", model=model, recipe=CASES["dmd"], data="", batch=1, accumulate=2, parallel=PAIRS)


def count_sent(family: str) -> None:
    """Once, for all processes."""
    run = sending(family)
    for role in run.recipe.trained:
        count_uses(run, role, PAIRS.sequence)


def sent_as_planned(family: str) -> None:
    """What `minwm plan --gpus` counts for a step of each role, without any process, is what is sent.

    HunyuanVideo sends a little less: text after the last block, and image states of which these clips have none, get no
    gradient. In a network of two blocks that is 6 % of all gradients.
    """
    run = sending(family)
    recipe = build_recipe(run, lambda _: run.recipe.network(run.model))
    trainer = Trainer(run, recipe, Parallel(PAIRS, torch.device("cpu")))
    for step, role in enumerate(run.recipe.trained):
        with Sent() as sent:
            trainer.gradients(step, repeat(run.recipe.example_batch(run.model, 1)))
        planned = plan_step(run, role, Cluster(), shard=2, copies=2, sequence=2)
        assert sent.bytes.keys() == {"shard", "copy", "sequence"}
        for kind, found in sent.bytes.items():
            assert math.isclose(found, vars(planned)[kind], rel_tol=0.0 if family == "wan" else 0.06), (role, kind)


def shared_parts(out: Path) -> None:
    """Two processes hold half of a base each, once for all roles of DMD, and never the whole of it."""
    init = Init(**dict.fromkeys(("student", "critic", "real"), str(out / "base")))
    run = Run(name="parts", model=BASE, recipe=CASES["dmd"], data="", init=init, lora=LoraConfig(rank=2))
    here, before = Parallel(run.parallel, torch.device("cpu")), anonymous_memory()
    recipe = build_recipe(run, partial(load_role, run, here.build_device), partial(adapt_role, run))
    trainer = Trainer(replace(run, accumulate=2), recipe, here, partial(saved_weights, run))
    saved = load_safetensors(out / "base" / "model.safetensors")
    grown, size = anonymous_memory() - before, sum(x.nbytes for x in saved.values())
    assert grown < 0.7 * size, f"{grown / 2**20:.0f} of {size / 2**20:.0f} MiB"
    for role, net in {**recipe.networks, "ema": trainer.ema.net}.items():
        found = dict(net.named_parameters())
        assert all(torch.equal(whole(found[name]), x) for name, x in saved.items()), role


def anonymous_memory() -> int:
    """Bytes that this process holds, but for mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def two(out: Path) -> None:
    shared_parts(out)
    train_the_same(out, SHARDED, ParallelConfig())
    train_the_same(out, [OFFLOADED], ParallelConfig(cpu_offload=True))
    train_to(2, out / "parts", ParallelConfig())
    eight_bit(2, out / "eight")
    stopped(out / "stopped", ParallelConfig())
    evaluated(out, "shared")
    piped(out / "pipeline")  # the last: its rank 0 then works alone


def four(eight: Mapping[str, Tensor], out: Path) -> None:
    """Copies of the weights in pairs of ranks, which share the clips."""
    eight_bit_resumed(eight, out / "eight")
    sent_as_planned("wan")
    train_the_same(out, PAIRED, PAIRS)
    train_to(3, out / "parts4", PAIRS)


def piped(out: Path) -> None:
    """Stages of a pipeline with data, ODE trajectories, verdicts and an evaluation; again, nothing is left to do."""
    plan = tiny_preset("smoke", out, out)
    shared = {"batch": 1, "accumulate": 2}
    assert plan.codec is not None
    stages = tuple(replace(run, **shared) for run in plan.stages if run.name not in ("consistency", "dmd"))
    encode = replace(plan.encode, shard_size=2)
    plan = replace(plan, codec=replace(plan.codec, **shared), stages=stages, collect=3, encode=encode)
    few = EvalConfig(clips=3, counterfactual=(), revisits=0, walks=0, seeds=0, bench_repeats=0)
    plan = replace(plan, evaluated=("ode",), evaluation=few)
    first, again = list[str](), list[str]()
    for said in (first, again):
        run_pipeline(plan, out, said.append)
    assert bool(first) == (rank() == 0) and not any("done before" in line for line in first)
    assert all("done before" in line or "steps in" in line for line in again)
    assert read_manifest(out / "trajectories", "")["complete"] and len(list_shards(out / "trajectories")) == 3
    if rank() == 0:
        assert [*evaluation(plan, out).rows] == ["ode", *BASELINES] and "evaluate: done before" in again
        assert sum(line.startswith("evaluated ") for line in first) == 3, "of five rows"
        os.environ["WORLD_SIZE"] = "1"
        codec = load_codec(Path(str(stages[0].init.codec)))
        encode_clips(out / "raw", out / "alone", codec, stages[0].model.text, cfg=encode)
        alone, latents = ({p.name: p.read_bytes() for p in (out / x).glob("*.tar*")} for x in ("alone", "latents"))
        assert alone == latents and len(alone) >= 4


def evaluated(out: Path, name: str) -> None:
    """A model is scored along three paths; the processes share its videos."""
    made, write_video = list[Path](), batch.write_video
    batch.write_video = lambda path, *args: (made.append(path), write_video(path, *args))
    words = f"eval --model {out}/scored --trajectories {out}/paths.txt --metrics texture --out {out}/{name}"
    assert command([*words.split(), "--json", f"{out}/{name}.json"]) == 0
    assert len(made) == len(range(rank(), 3, world_size()))


def same_scores(out: Path) -> None:
    """Of two processes and of one."""
    evaluated(out, "alone")
    one, many = (parse_json((out / f"{x}.json").read_text())["videos"]["scored"] for x in ("alone", "shared"))
    assert one["tasks"] == many["tasks"] and len(one["tasks"]) == 3
    sharp, found = (list(x["scores"]["texture"]["sharpness"]["videos"].values()) for x in (one, many))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(sharp), rtol=0.01, atol=0.0)


def main(out: Path) -> None:
    count_sent("wan")
    save_model(out / "base", BASE, BASE.network.build(), BASE.codec.build())
    for name in (*SHARDED, OFFLOADED, *PAIRED):
        torch.save(list(steps(name, ParallelConfig())), out / f"{name}.pt")
    train_to(3, out / "whole", ParallelConfig())
    eight = eight_bit(4, out / "eight-whole").state_dict()
    save_model(out / "scored", CONFIG, CONFIG.network.build(), CONFIG.codec.build())
    (out / "paths.txt").write_text("w*4\ns*4\nl*4\n")
    world(2, partial(two, out))
    for size in (1, 4):
        shutil.copytree(out / "parts", out / f"parts{size}")
    world(1, partial(resumed, out / "parts1", ParallelConfig()))
    world(4, partial(four, eight, out))
    same_scores(out)
    for size in (1, 4):
        assert log_deviation(out / "whole", out / f"parts{size}") < 1e-4


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
