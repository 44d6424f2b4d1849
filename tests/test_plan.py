"""Plans against reality: what is planned without data is what tensors with data take."""

from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import MODEL, RECIPE, REMEMBERING, allocated, item, micro_batch, real_recipe, stage
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minwm.bench.memory import plan_inference, plan_optimisers, plan_training
from minwm.core.memory import MemoryMeter
from minwm.core.types import Condition
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.lora import LoraConfig
from minwm.recipes.diffusion import AutoregressiveConfig
from minwm.store.model import ModelConfig
from minwm.stream.memory import seen_points
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler
from minwm.train.adamw8bit import stored
from minwm.train.config import Init, OptimConfig
from minwm.train.loop import Ema, Trainer
from minwm.train.parallel import Parallel, ParallelConfig, process_group


def bytes_of(net: nn.Module) -> int:
    return sum(x.nbytes for x in (*net.parameters(), *net.buffers()))


# ------------------------------------------------------------------------------------------------ playing


def real_stream(config: ModelConfig, net: Any) -> tuple[Stream, Condition]:
    f = config.stream.chunk
    w2c, K = torch.eye(4).expand(1, f, 4, 4), torch.tensor([0.7, 0.7, 0.5, 0.5]).expand(1, f, 4)
    cond = Condition(**config.text.encode(["a room"]), w2c=w2c, K=K)
    stream = Stream(net, cond, config.geometry, config.sampler.guidance)
    stream.chunk = config.geometry.slots
    return stream, cond


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [FewStepSampler(steps=2), AutoregressiveSampler(steps=3)], ids=lambda s: s.kind)
def test_what_a_stream_holds_is_what_a_real_one_holds(sampler: Any, dtype: torch.dtype) -> None:
    config = replace(MODEL, sampler=sampler)
    plan = plan_inference(config, dtype)
    net, codec = config.network.build().to(dtype), config.codec.build().to(dtype)
    stream, cond = real_stream(config, net)
    assert item(plan, "network weights") == bytes_of(net)
    assert item(plan, "codec weights") == bytes_of(codec)
    assert item(plan, "cache") == stream.arena.kv.nbytes
    assert item(plan, "prompt") == sum(k.nbytes + v.nbytes for k, v, _ in stream.text)
    lost = stream.arena.save_slot(stream.chunk)
    assert item(plan, "undo") == sum(x.nbytes for x in lost) > 0
    _, state = codec.decode_next(torch.zeros(config.latent_shape(1, 3)))
    assert item(plan, "decoder state") == sum(x.nbytes for x in state)
    noise = torch.zeros(sampler.num_noise_samples(MODEL.geometry), *config.latent_shape(1, config.stream.chunk))
    bound = stream.prepare_chunk(cond)
    with MemoryMeter() as first:
        latents = stream.next_chunk(bound, noise, sampler)
        stream.cache_update_pass(bound, latents)
    assert item(plan, "times") == pytest.approx(first.live - latents.nbytes, rel=0.15)  # and a table of places
    with MemoryMeter() as passing:
        latents = stream.next_chunk(bound, noise, sampler)
    assert item(plan, "activations: network") == pytest.approx(passing.peak, rel=0.15)
    with MemoryMeter() as decoding:
        codec.decode_next(latents, state)
    assert item(plan, "activations: decoder") == pytest.approx(decoding.peak, rel=0.02)


def test_guidance_doubles_the_cache_and_bfloat16_halves_it() -> None:
    few = plan_inference(MODEL, torch.float32)
    guided = plan_inference(replace(MODEL, sampler=AutoregressiveSampler()), torch.float32)
    half = plan_inference(MODEL)
    for name in ("cache", "prompt", "undo"):
        assert item(guided, name) == 2 * item(few, name) == 4 * item(half, name)
    for name in ("network weights", "codec weights", "decoder state"):
        assert item(guided, name) == item(few, name) == 2 * item(half, name)


def test_retrieved_chunks_take_what_newest_ones_take() -> None:
    config = replace(MODEL, stream=REMEMBERING)
    assert plan_inference(config) == plan_inference(replace(config, stream=replace(REMEMBERING, window=3, retrieved=0)))


def test_a_bidirectional_model_has_no_cache_and_makes_the_clip_at_once() -> None:
    config = replace(MODEL, sampler=BidirectionalSampler())
    plan, longer = plan_inference(config), plan_inference(replace(config, latents=9))
    assert [one.name for one in plan.held] == ["network weights", "codec weights"]
    for name in ("activations: network", "activations: decoder"):
        assert 1.4 * item(plan, name) < item(longer, name) < 9 / 5 * item(plan, name)


# ------------------------------------------------------------------------------------------------ training


VARIANTS = {
    "plain": {},
    "bfloat16": {"precision": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "attention": {"checkpointing": "attention"},
    "accumulate": {"accumulate": 2, "batch": 1},
    "lora": {"lora": LoraConfig(rank=2), "precision": "bfloat16", "init": Init(student="nowhere", codec="nowhere")},
    "memory": {
        "model": replace(MODEL, latents=9, stream=REMEMBERING),
        "recipe": AutoregressiveConfig(memory=1.0),
    },
    "views": {
        "model": replace(MODEL, stream=StreamConfig(chunk=1, sink=0, window=3, retrieved=2, recompute="causal")),
        "recipe": AutoregressiveConfig(latents=3, views=Path("nowhere")),
    },
}
CASES = [*((name, "plain") for name in RECIPE), *(("autoregressive", variant) for variant in [*VARIANTS][1:])]
CASES += [("dmd", "checkpointing"), ("dmd", "attention")]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_activations_are_what_the_allocator_gives_out(name: str, variant: str) -> None:
    run = stage(name, **VARIANTS[variant])
    plan, recipe = plan_training(run), real_recipe(run)
    seen_points()  # made once
    for step, role in enumerate(run.recipe.trained):
        real = allocated(lambda step=step: [micro_batch(run, recipe, step).backward() for _ in range(run.accumulate)])
        assert item(plan, f"activations: {role}") == pytest.approx(real, rel=0.05)
        recipe.stateful[role].zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", RECIPE)
def test_what_training_holds_is_what_its_objects_hold(name: str) -> None:
    run = stage(name, batch=2)
    plan, recipe = plan_training(run), real_recipe(run)
    nets = recipe.networks
    total = bytes_of(Ema(nets["student"], run.ema).net)
    assert item(plan, "averaged student weights") == total
    for role, net in nets.items():
        assert item(plan, f"{role} weights") == bytes_of(net)
        total += bytes_of(net)
    for step, role in enumerate(run.recipe.trained):
        optimizer = run.optim.build(nets[role])["adamw"]
        optimizer.param_groups[0]["foreach"] = True  # as on a GPU
        micro_batch(run, recipe, step).backward()
        gradients = [p.grad for p in nets[role].parameters() if p.grad is not None]
        optimizer.step()
        moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.ndim)
        assert item(plan, f"{role} optimiser") == moments
        total += moments
        with MemoryMeter() as update:
            optimizer.step()
        real = sum(x.nbytes for x in gradients) + update.peak
        assert item(plan, f"update: {role}") == pytest.approx(real, rel=0.02)
        nets[role].zero_grad(set_to_none=True)
    assert sum(one.bytes for one in plan.held) == total


HUNYUAN = HunyuanConfig(
    dim=96, heads=2, layers=3, ffn=192, channels=4, text_dim=8, text_length=24, glyph_dim=8, glyph_length=2,
    glyph_hidden=16, image_dim=8, image_length=2, freq_dim=16, rope=(16, 16, 16), camera="dual",
)  # fmt: skip
FAMILIES = {"wan": replace(MODEL.network, dim=96, ffn=192, layers=3), "hunyuan": HUNYUAN}


@pytest.mark.parametrize("variant", ["plain", "lora", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_total_is_what_a_run_allocates(family: str, variant: str) -> None:
    """All of it at once, from the first network to the last update; within a tenth."""
    run = stage("dmd", **VARIANTS[variant] | {"model": replace(MODEL, network=FAMILIES[family])}, batch=1)
    run = replace(run, recipe=replace(run.recipe, critic_updates=1))
    seen_points()

    def work() -> None:
        trainer = Trainer(run, real_recipe(run), Parallel(run.parallel, torch.device("cpu")))
        for optimizer in trainer.all_optimizers:
            optimizer.param_groups[0]["foreach"] = True  # as on a GPU
        clips = repeat(run.recipe.example_batch(run.model, run.batch))
        for step in range(2):
            trainer.update(step, trainer.gradients(step, clips))

    assert plan_training(run).total == pytest.approx(allocated(work), rel=0.1)


@pytest.mark.parametrize(("dim", "layers", "latents"), [(32, 1, 3), (48, 3, 5), (64, 4, 9)])
def test_activations_are_what_autograd_saves_and_some(dim: int, layers: int, latents: int) -> None:
    """At least what is saved for the backward pass; not half as much again."""
    network = replace(MODEL.network, dim=dim, ffn=2 * dim, layers=layers)
    run = stage("bidirectional", model=replace(MODEL, network=network, latents=latents))
    recipe, saved = real_recipe(run), {}
    parameters = {p.untyped_storage().data_ptr() for p in recipe.networks["student"].parameters()}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = micro_batch(run, recipe, 0)
    kept = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in parameters)
    assert loss.requires_grad
    assert kept <= item(plan_training(run), "activations: student") <= 1.5 * kept


def test_planning_leaves_nothing_behind() -> None:
    before = torch.get_rng_state()
    net = MODEL.network.build()
    torch.set_rng_state(before)
    first = torch.rand(())
    torch.set_rng_state(before)
    plan_training(stage("dmd"))
    plan_inference(MODEL)
    assert torch.equal(torch.rand(()), first)
    stream, cond = real_stream(MODEL, net)
    stream.update_cache(
        stream.prepare_chunk(cond), torch.zeros(MODEL.latent_shape(1, MODEL.stream.chunk))
    )  # no table without data is used
    assert type(stream.arena.kv) is Tensor and bool(stream.arena.kv.isfinite().all())


# ------------------------------------------------------------------------------------------------ 8 bits, and the CPU


def test_8_bit_moments_take_what_is_planned() -> None:
    """On a CPU, where the update is not compiled."""
    net = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 256), nn.Linear(256, 64))
    optim = OptimConfig(optimizer="adamw8bit")
    held, update = plan_optimisers("student", optim.split(net))
    optimizers = optim.build(net)
    optimizers["adamw"].param_groups[0]["foreach"] = True  # as on a GPU

    def step() -> None:
        for optimizer in optimizers.values():
            optimizer.step()

    for p in net.parameters():
        p.grad = torch.randn_like(p)
    step()
    states = [moment for optimizer in optimizers.values() for x in optimizer.state.values() for moment in x.values()]
    moments = sum(x.nbytes for moment in states for x in stored(moment).values() if x.ndim)
    tables = 2 * 2 * 4 * 256
    assert held.bytes == moments + tables < 0.7 * 8 * sum(p.numel() for p in net.parameters())
    gradients = sum(p.nbytes for p in net.parameters())
    assert update.bytes == pytest.approx(gradients + allocated(step), rel=0.1)


def test_what_stays_on_the_gpu_while_the_rest_waits_on_the_cpu() -> None:
    """FSDP as on a GPU, and gradients of a micro-batch before, so that all that comes is what the GPU would have."""
    model = replace(MODEL, network=FAMILIES["wan"], height=64, width=64)
    run = stage("autoregressive", model=model, batch=1, accumulate=2, parallel=ParallelConfig(cpu_offload=True))
    plan = plan_training(run)
    assert [one.name for one in plan.host] == [
        "student weights", "averaged student weights", "student optimiser", "update: student",
    ]  # fmt: skip
    seen_points()
    with process_group(60, alone=True):
        trainer = Trainer(run, real_recipe(run), Parallel(run.parallel, torch.device("cpu")))
        trainer.micro_batches = range(1)
        clips = repeat(run.recipe.example_batch(run.model, run.batch))
        trainer.gradients(0, clips)
        assert plan.total == pytest.approx(allocated(lambda: trainer.gradients(1, clips)), rel=0.1)
