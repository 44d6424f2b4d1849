"""Our HunyuanVideo-1.5 VAE is theirs: diffusers' numbers from the same weights, in a stream as well, and by chunks."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import planning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from minwm.bench.memory import plan_inference
from minwm.cli import main
from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.core.weights import CheckpointError
from minwm.families.hunyuan.vae import HunyuanVae, HunyuanVaeConfig, describe, diffusers_names, rename
from minwm.families.wan.vae import WanVaeConfig
from minwm.nets.codec import State, VideoCodec
from minwm.store.folder import load_codec, read_codec, save_codec

FULL = HunyuanVaeConfig()
TINY = HunyuanVaeConfig(channels=4, base=8, mult=(1, 2, 4), depth=1, temporal=(True, True))
LIKE_RELEASE = HunyuanVaeConfig(channels=4, base=8, mult=(1, 2, 4, 4, 4), depth=1)
CHUNK = replace(TINY, attention="chunk")
WINDOW = replace(TINY, window=2)
FRAMES, LATENTS = 17, 5


def randomise(vae: HunyuanVae) -> HunyuanVae:
    """Random parameters, every one of which matters; a weak head, so that hardly a pixel is clamped."""
    torch.manual_seed(0)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, mean=1, std=0.2)
        else:
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            nn.init.normal_(parameter, std=fan**-0.5)
    for part in (vae.encoder, vae.decoder):  # attention that chooses, and weighs as much as what it is added to
        part.mid.attn_1.q.weight.data *= 3
        part.mid.attn_1.proj_out.weight.data *= 3
    for parameter in vae.decoder.conv_out.parameters():
        parameter.data *= 0.2
    return vae.eval().requires_grad_(False)


VAES = {name: randomise(cfg.build()) for name, cfg in {"causal": TINY, "window": WINDOW, "chunk": CHUNK}.items()}
each = pytest.mark.parametrize("vae", VAES.values(), ids=VAES)


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


def clip(batch: int = 2, frames: int = FRAMES, height: int = 8, width: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draw(vae: HunyuanVae, latents: int = LATENTS, height: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(2, latents, vae.channels, height, 3, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


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
    agree(vae, reference(cfg), draw(vae)[:1], clip(1, FRAMES, 2 * cfg.scale, 3 * cfg.scale))


def test_chunk_is_attention_within_each_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HY-WorldPlay and minWM run it: everything else is causal as in the release."""
    theirs = reference(CHUNK)

    def within(frames: int, pixels: int, *_: object, **__: object) -> Tensor:
        frame = torch.arange(frames).repeat_interleave(pixels)
        return torch.zeros(frames * pixels, frames * pixels).masked_fill(frame[:, None] != frame, -torch.inf)

    for part in (theirs.encoder, theirs.decoder):
        monkeypatch.setattr(part.mid_block.attentions[0], "prepare_causal_attention_mask", within)
    agree(VAES["chunk"], theirs, draw(VAES["chunk"]), clip())


def test_what_variants_share_with_the_release_and_what_not() -> None:
    """Chunk: the first latent and its frame. A window of 2: the first three."""
    causal, window, chunk = (VAES[name] for name in ("causal", "window", "chunk"))
    for make in (lambda vae: vae.encode(clip()), lambda vae: vae.decode(draw(vae))[:, ::4]):
        want = make(causal)
        for vae, same in ((window, 3), (chunk, 1)):
            close(make(vae)[:, :same], want[:, :same])
            assert (make(vae)[:, same:] - want[:, same:]).abs().amax((0, 2, 3, 4)).min() > 0.01


def test_parity_would_notice_any_parameter() -> None:
    """Every parameter moves what comes out, so agreement says something about each.

    But for the keys' bias, which adds one number to all logits of a query.
    """
    learns = copy.deepcopy(VAES["causal"]).requires_grad_()
    for out in (learns.encode(clip(1, 9)), learns.decode(draw(learns, 3))):
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
    assert rename(TINY, theirs).keys() == rename(TINY, ours).keys() == ours.keys()
    assert all(rename(TINY, theirs)[name] is ours[name] for name in ours)
    assert rename(TINY, {"conv1.weight": ours["encoder.norm_out.gamma"]}).keys() == {"conv1.weight"}


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
    assert torch.equal(load_codec(tmp_path / "codec").encode(clip(1, 5)), VAES["causal"].encode(clip(1, 5)))
    with pytest.raises(CheckpointError, match=r"HunyuanVideo-1.5 VAE.*does not fit WanVae.*conv1.weight"):
        read_codec(file, replace(MODEL, codec=WanVaeConfig()))
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


def cut(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to hand over `total` frames or latents, some of them none at a time."""
    return st.lists(st.integers(0, total), max_size=5).map(
        lambda at: [b - a for a, b in zip([0, *sorted(at)], [*sorted(at), total], strict=True)]
    )


@each
@settings(max_examples=6, deadline=None)
@given(sizes=cut(13))
def test_streamed_encode_equals_whole(vae: HunyuanVae, sizes: list[int]) -> None:
    pixels, state, parts = clip(1, 13), None, []
    for part in pixels.split(sizes, dim=1):
        latents, state = vae.encode_next(part, state)
        parts.append(latents)
    close(torch.cat(parts, dim=1), vae.encode(pixels))


@each
@settings(max_examples=6, deadline=None)
@given(sizes=cut(LATENTS))
def test_streamed_decode_equals_whole(vae: HunyuanVae, sizes: list[int]) -> None:
    latents, state, parts = draw(vae), None, []
    for part in latents.split(sizes, dim=1):
        begins = not state
        pixels, state = vae.decode_next(part, state)
        assert pixels.shape[1] == 4 * part.shape[1] - 3 * (begins and part.shape[1] > 0)
        parts.append(pixels)
    close(torch.cat(parts, dim=1), vae.decode(latents))


@each
def test_sessions_interleave_and_rewind(vae: HunyuanVae) -> None:
    clips = [draw(vae, seed=1), draw(vae, height=4, seed=2)]
    drawn: list[list[Tensor]] = [[], []]
    states: list[State | None] = [None, None]
    for i in range(LATENTS):
        for k in (0, 1):
            vae.decode_next(clips[k][:, i : i + 1] + 1, states[k])  # a step that is taken back
            pixels, states[k] = vae.decode_next(clips[k][:, i : i + 1], states[k])
            drawn[k].append(pixels)
    for k in (0, 1):
        close(torch.cat(drawn[k], dim=1), vae.decode(clips[k]))


@each
def test_sessions_share_a_batch(vae: HunyuanVae) -> None:
    """Two streams in turn, then in one batch by joining their states: each as if it were alone."""
    clips = [clip(1, seed=1), clip(1, seed=2)]
    starts = [vae.encode_next(pixels[:, :7]) for pixels in clips]
    state = tuple(torch.cat(parts) for parts in zip(*(state for _, state in starts), strict=True))
    rest, _ = vae.encode_next(torch.cat([pixels[:, 7:] for pixels in clips]), state)
    for k in (0, 1):
        close(torch.cat([starts[k][0], rest[k : k + 1]], dim=1), vae.encode(clips[k]))


def test_streams_of_a_window_share_a_batch_at_any_time() -> None:
    """Their states are of one shape, and each knows which of its past latents have been there."""
    vae, latents = VAES["window"], draw(VAES["window"])
    early, late = vae.decode_next(latents[:1, :1])[1], vae.decode_next(latents[1:, :4])[1]
    state = tuple(torch.cat(pair) for pair in zip(early, late, strict=True))
    both, _ = vae.decode_next(torch.cat([latents[:1, 1:2], latents[1:, 4:]]), state)
    close(both[:1], vae.decode(latents[:1, :2])[:, 1:])
    close(both[1:], vae.decode(latents[1:])[:, -4:])


@each
def test_causal_in_time(vae: HunyuanVae) -> None:
    pixels, latents = clip(1, 9), draw(vae, 3)
    later, drawn = pixels.clone(), latents.clone()
    later[:, 5:], drawn[:, 2:] = 0, 0
    close(vae.encode(later)[:, :2], vae.encode(pixels)[:, :2])
    close(vae.decode(drawn)[:, :5], vae.decode(latents)[:, :5])


@each
def test_what_a_state_holds(vae: HunyuanVae) -> None:
    """Of one shape from the first latent on, but for keys and values of all latents: two tensors that grow."""
    _, first = vae.decode_next(draw(vae, 1))
    _, later = vae.decode_next(draw(vae, 3), first)
    assert all(x.shape[0] == 2 and x.untyped_storage().nbytes() == x.nbytes for x in later)
    grown = [(a.shape[2], b.shape[2]) for a, b in zip(first, later, strict=True) if a.shape != b.shape]
    assert grown == ([(6, 24)] * 2 if vae.grows else []) and vae.grows == (vae.cfg == TINY)


@each
def test_half_precision(vae: HunyuanVae) -> None:
    half = vae.cfg.build().to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    with torch.inference_mode():
        pixels, latents = half.decode(draw(vae)), half.encode(clip())
    assert pixels.dtype == latents.dtype == torch.float32, "that of what was given"
    for got, want in ((pixels, vae.decode(draw(vae))), (latents, vae.encode(clip()))):
        assert (got - want).square().mean().sqrt() < 0.05 * want.std()


def test_errors_say_what_would_do() -> None:
    vae = VAES["causal"]
    with pytest.raises(UserError, match=r"clip of 16 frames.*17"):
        vae.encode(clip(frames=16))
    with pytest.raises(UserError, match=r"10x12.*multiples of 4"):
        vae.encode(clip(height=10))
    with pytest.raises(UserError, match=r"20 channels.*4"):
        vae.decode(torch.zeros(1, 1, 20, 2, 2))


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


def test_config_round_trip_and_contract() -> None:
    for cfg in (FULL, TINY, WINDOW, CHUNK):
        assert loads(HunyuanVaeConfig, dumps(cfg)) == cfg
    assert (FULL.stride, FULL.scale, FULL.channels, FULL.tiny) == (4, 16, 32, "taehv1_5")
    assert all(isinstance(vae, VideoCodec) for vae in VAES.values())
