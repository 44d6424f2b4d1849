"""Our HunyuanVideo-1.5 VAE is theirs: diffusers' numbers from the same weights; windows, chunks, files, plans."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import planning
import pytest
import torch
from safetensors.torch import save_file
from tiny_codecs import HUNYUAN as TINY
from tiny_codecs import clip, close, draw, randomise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.bench.memory import plan_inference
from minwm.cli import main
from minwm.core.config import ConfigError, dumps, loads
from minwm.core.weights import CheckpointError
from minwm.families.hunyuan.vae import HunyuanVae, HunyuanVaeConfig, describe, diffusers_names
from minwm.families.wan.vae import WanVaeConfig
from minwm.store.folder import load_codec, read_codec, save_codec
from minwm.store.layouts import rename_codec

FULL = HunyuanVaeConfig()
LIKE_RELEASE = HunyuanVaeConfig(channels=4, base=8, mult=(1, 2, 4, 4, 4), depth=1)
CHUNK = replace(TINY, attention="chunk")
WINDOW = replace(TINY, window=2)
VAES = {name: randomise(cfg.build()) for name, cfg in {"causal": TINY, "window": WINDOW, "chunk": CHUNK}.items()}


def reference(cfg: HunyuanVaeConfig) -> Any:
    """diffusers' class of the same size."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=cfg.channels,
        block_out_channels=list(cfg.widths),
        layers_per_block=cfg.depth,
        spatial_compression_ratio=cfg.scale,
        temporal_compression_ratio=cfg.stride,
        scaling_factor=cfg.scaling,
    )


def agree(vae: HunyuanVae, theirs: Any, latents: Tensor, pixels: Tensor) -> None:
    names = diffusers_names(vae.cfg)
    theirs.load_state_dict({names[name]: value for name, value in vae.state_dict().items()})
    means = theirs.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    assert means.std() > 0.1
    close(vae.encode(pixels), means * theirs.config.scaling_factor)
    drawn = theirs.decode((latents / theirs.config.scaling_factor).transpose(1, 2)).sample.transpose(1, 2)
    assert drawn.std() > 0.1 and (drawn.abs() > 1).float().mean() < 0.02, "clamping would hide errors"
    close(vae.decode(latents), drawn.clamp(-1, 1))


@pytest.mark.parametrize("cfg", [TINY, replace(TINY, window=4), LIKE_RELEASE], ids=["tiny", "window", "like release"])
def test_same_as_diffusers(cfg: HunyuanVaeConfig) -> None:
    """A window makes no difference to clips that fit in it. One clip: diffusers' mask fits no larger batch."""
    vae = randomise(cfg.build())
    agree(vae, reference(cfg), draw(vae, batch=1), clip(vae, batch=1))


def test_chunk_is_attention_within_each_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HY-WorldPlay and minWM run it: everything else is causal as in the release."""
    theirs = reference(CHUNK)

    def within(frames: int, pixels: int, *_: object, **__: object) -> Tensor:
        frame = torch.arange(frames).repeat_interleave(pixels)
        return torch.zeros(frames * pixels, frames * pixels).masked_fill(frame[:, None] != frame, -torch.inf)

    for part in (theirs.encoder, theirs.decoder):
        monkeypatch.setattr(part.mid_block.attentions[0], "prepare_causal_attention_mask", within)
    agree(VAES["chunk"], theirs, draw(VAES["chunk"]), clip(VAES["chunk"]))


def test_what_variants_share_with_the_release_and_what_not() -> None:
    """Chunk: the first latent and its frame. A window of 2: the first three."""
    causal, window, chunk = (VAES[name] for name in ("causal", "window", "chunk"))
    for make in (lambda vae: vae.encode(clip(vae)), lambda vae: vae.decode(draw(vae))[:, ::4]):
        want = make(causal)
        for vae, same in ((window, 3), (chunk, 1)):
            close(make(vae)[:, :same], want[:, :same])
            assert (make(vae)[:, same:] - want[:, same:]).abs().amax((0, 2, 3, 4)).min() > 0.01


def test_parity_would_notice_any_parameter() -> None:
    """Every parameter moves what comes out, so agreement says something about each.

    But for the keys' bias, which adds one number to all logits of a query.
    """
    learns = copy.deepcopy(VAES["causal"]).requires_grad_()
    for out in (learns.encode(clip(learns, 1, 9)), learns.decode(draw(learns, 3))):
        (out * torch.randn_like(out)).sum().backward()
    weak = [name for name, p in learns.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-2]
    assert weak == ["encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"]


def test_full_size_has_the_names_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        ours, theirs = FULL.build(), reference(FULL)
    names = diffusers_names(FULL)
    assert len(names) == len(set(names.values())) == 218
    shapes = {names[name]: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 1_260_634_115


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("encoder.down.2.block.1.conv2.conv.bias", "encoder.down_blocks.2.resnets.1.conv2.conv.bias"),
        ("encoder.down.3.downsample.conv.conv.weight", "encoder.down_blocks.3.downsamplers.0.conv.conv.weight"),
        ("decoder.up.0.upsample.conv.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.conv.bias"),
        ("decoder.mid.block_2.norm1.gamma", "decoder.mid_block.resnets.1.norm1.gamma"),
        ("decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.proj_out.bias"),
        ("encoder.conv_in.conv.weight", "encoder.conv_in.conv.weight"),
    ],
)
def test_names_of_the_release(name: str, theirs: str) -> None:
    assert diffusers_names(FULL)[name] == theirs


def test_both_layouts_are_known_and_read() -> None:
    ours, names = VAES["causal"].state_dict(), diffusers_names(TINY)
    theirs = {names[name]: value for name, value in ours.items()}
    assert describe(ours) == "a HunyuanVideo-1.5 VAE (original names)"
    assert describe(theirs) == "a HunyuanVideo-1.5 VAE (diffusers names)"
    for published in (ours, theirs):
        read = rename_codec(TINY, published)
        assert read.keys() == ours.keys() and all(read[name] is ours[name] for name in ours)
    assert rename_codec(TINY, {"conv1.weight": ours["encoder.norm_out.gamma"]}).keys() == {"conv1.weight"}


def test_flops_are_counted() -> None:
    """What attention to the past adds to a latent by itself: two products of pixels x past pixels x width."""
    flops = {}
    for name, vae in VAES.items():
        latents = draw(vae, 4, batch=1)
        _, state = vae.decode_next(latents[:, :3])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            vae.decode_next(latents[:, 3:], state)
        flops[name] = counter.get_total_flops()
    each = 2 * 2 * 6 * 6 * TINY.widths[-1]
    assert flops["causal"] - flops["chunk"] == 3 * each and flops["window"] - flops["chunk"] == 2 * each


MODEL = replace(
    planning.MODEL, codec=TINY, stream=replace(planning.MODEL.stream, window=1), height=32, width=48, latents=5
)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_published_files_are_told_and_read_strictly(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder `vae`, in either naming; then as a codec folder of ours."""
    names = diffusers_names(TINY) if layout == "diffusers" else {name: name for name in diffusers_names(TINY)}
    tensors = {names[name]: value for name, value in VAES["causal"].state_dict().items()}
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    save_file(tensors, file)
    assert main(["inspect", str(file)]) == 0
    assert f"holds: a HunyuanVideo-1.5 VAE ({layout} names)" in capsys.readouterr().out
    cfg, read = read_codec(file.parent, MODEL)
    assert cfg == TINY and all(torch.equal(read[name], x) for name, x in VAES["causal"].state_dict().items())
    save_codec(tmp_path / "codec", VAES["causal"])
    pixels = clip(VAES["causal"], 1, 5)
    assert torch.equal(load_codec(tmp_path / "codec").encode(pixels), VAES["causal"].encode(pixels))
    with pytest.raises(CheckpointError, match=r"HunyuanVideo-1.5 VAE.*does not fit WanVae.*conv1.weight"):
        read_codec(file, replace(MODEL, codec=WanVaeConfig(), network=replace(MODEL.network, channels=16)))
    lost = names["decoder.mid.attn_1.q.bias"]
    save_file({name: value for name, value in tensors.items() if name != lost}, file)
    with pytest.raises(CheckpointError, match=r"does not fit HunyuanVae.*decoder\.mid\.attn_1\.q\.bias"):
        read_codec(file, MODEL)


def test_a_plan_counts_what_a_state_holds() -> None:
    """Of a clip's latents where it grows, and that it does; a window's is of one size; chunks keep no keys at all."""
    sizes = {}
    for name, vae in VAES.items():
        plan = plan_inference(replace(MODEL, codec=vae.cfg), torch.float32)
        (found,) = (one for one in plan.held if one.name == "decoder state")
        _, state = vae.decode_next(torch.zeros(MODEL.latent_shape(1, MODEL.latents)))
        assert found.bytes == sum(x.nbytes for x in state)
        assert ("it grows, and this is after 5 latents" in found.why) == vae.grows
        sizes[name] = found.bytes
    pixels = MODEL.height // TINY.scale * MODEL.width // TINY.scale
    assert sizes["causal"] - sizes["chunk"] == 2 * 5 * pixels * TINY.widths[-1] * 4
    assert sizes["window"] - sizes["chunk"] == 2 * pixels * (2 * TINY.widths[-1] * 4 + 1)


def test_streams_of_a_window_share_a_batch_at_any_time() -> None:
    """Their states are of one shape, and each knows which of its past latents have been there."""
    vae, latents = VAES["window"], draw(VAES["window"])
    early, late = vae.decode_next(latents[:1, :1])[1], vae.decode_next(latents[1:, :4])[1]
    state = tuple(torch.cat(pair) for pair in zip(early, late, strict=True))
    both, _ = vae.decode_next(torch.cat([latents[:1, 1:2], latents[1:, 4:]]), state)
    close(both[:1], vae.decode(latents[:1, :2])[:, 1:])
    close(both[1:], vae.decode(latents[1:])[:, -4:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": 0}, r"hunyuan_vae\.base=0.*at least 1"),
        ({"mult": ()}, r"hunyuan_vae\.mult=\(\)"),
        ({"temporal": (True, True)}, r"hunyuan_vae\.temporal.*5 resolutions have 4 steps"),
        ({"channels": 24}, r"hunyuan_vae\.channels=24.*1024 channels"),
        ({"mult": (1, 8, 8, 8, 8)}, r"hunyuan_vae\.base=128.*from 128 to 1024"),
        ({"scaling": 0.0}, r"hunyuan_vae\.scaling=0.*positive"),
        ({"window": 0}, r"hunyuan_vae\.window=0.*at least 1"),
        ({"window": 4, "attention": "chunk"}, r"hunyuan_vae\.window=4, attention=chunk"),
    ],
)
def test_config_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(FULL, **fields)  # pyright: ignore[reportArgumentType]


def test_config_of_the_release() -> None:
    assert loads(HunyuanVaeConfig, dumps(FULL)) == FULL
    assert (FULL.stride, FULL.scale, FULL.channels, FULL.tiny) == (4, 16, 32, "taehv1_5")
