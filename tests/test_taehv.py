"""The tiny codecs against their layout, written out here, and against 3D convolutions over whole clips."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.families.hunyuan.vae import HunyuanVaeConfig
from minwm.nets.codec import State, TinyDecoder
from minwm.nets.taehv import TAEHV, Taehv, TaehvConfig

FRAMES, LATENTS = 13, 4
MEMORY = ["mem"] * 3
ENCODER = ["conv", "relu", "pool 2", "half", *MEMORY, "pool 2", "half", *MEMORY, "pool 1", "half", *MEMORY, "conv"]
DECODER = ["clamp", "conv", "relu", *MEMORY, "up", "grow 1", "thin", *MEMORY, "up", "grow 2", "thin", *MEMORY]
DECODER += ["up", "grow 2", "thin", "relu", "conv"]
"""The layers of the published files; the place in the list is the number in a parameter's name."""


def published_shapes(channels: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of a published file."""
    rgb, shapes = 3 * patch**2, {}
    encoder = [(rgb, 64), *[(64, 64)] * 16, (64, channels)]
    decoder = [(0, 0), (channels, 256), *[(256, 256)] * 6, (256, 128), *[(128, 128)] * 5, (128, 64), *[(64, 64)] * 7]
    for side, layers, widths in (("encoder", ENCODER, encoder), ("decoder", DECODER, [*decoder, (64, rgb)])):
        for i, (layer, (n_in, n_out)) in enumerate(zip(layers, widths, strict=True)):
            name, (kind, *stride) = f"{side}.{i}", layer.split()
            steps = int(stride[0]) if stride else 1
            match kind:
                case "conv":
                    shapes |= {f"{name}.weight": (n_out, n_in, 3, 3), f"{name}.bias": (n_out,)}
                case "half" | "thin":
                    shapes |= {f"{name}.weight": (n_out, n_in, 3, 3)}
                case "pool":
                    shapes |= {f"{name}.conv.weight": (n_out, steps * n_in, 1, 1)}
                case "grow":
                    shapes |= {f"{name}.conv.weight": (steps * n_out, n_in, 1, 1)}
                case "mem":
                    shapes |= {f"{name}.conv.{k}.bias": (n_out,) for k in (0, 2, 4)}
                    shapes |= {f"{name}.conv.{k}.weight": (n_out, (1 + (k == 0)) * n_in, 3, 3) for k in (0, 2, 4)}
    return shapes


def in_one_go(codec: Taehv, side: str, layers: list[str], x: Tensor) -> Tensor:
    """The published network over whole clips as 3D convolutions, from the state dict alone."""
    state, x = codec.state_dict(), x.transpose(1, 2)

    def flat(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return F.conv3d(x, weight[:, :, None], bias, stride=(1, stride, stride), padding=(0, 1, 1))

    for i, layer in enumerate(layers):
        name = f"{side}.{i}"
        match layer:
            case "relu":
                x = x.relu()
            case "clamp":
                x = (x / 3).tanh() * 3
            case "conv" | "thin":
                x = flat(x, name)
            case "half":
                x = flat(x, name, stride=2)
            case "up":
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            case "mem":
                now, before = state[f"{name}.conv.0.weight"].chunk(2, dim=1)
                y = F.pad(x, (1, 1, 1, 1, 1, 0))
                y = F.conv3d(y, torch.stack([before, now], dim=2), state[f"{name}.conv.0.bias"]).relu()
                x = (flat(flat(y, f"{name}.conv.2").relu(), f"{name}.conv.4") + x).relu()
            case "pool 1" | "pool 2":
                steps = int(layer[-1])
                weight = state[f"{name}.conv.weight"].unflatten(1, (steps, -1)).transpose(1, 2)
                x = F.conv3d(x, weight, stride=(steps, 1, 1))
            case "grow 1" | "grow 2":
                steps = int(layer[-1])
                weight = state[f"{name}.conv.weight"].unflatten(0, (steps, -1)).permute(2, 1, 0, 3, 4)
                x = F.conv_transpose3d(x, weight, stride=(steps, 1, 1))
            case _:
                raise ValueError(layer)
    return x.transpose(1, 2)


def published_encode(codec: Taehv, pixels: Tensor) -> Tensor:
    """As the authors do it: the last frame is repeated until the clip is whole groups of four."""
    rgb = torch.cat([pixels, pixels[:, -1:].expand(-1, -pixels.shape[1] % 4, -1, -1, -1)], dim=1) / 2 + 0.5
    return in_one_go(codec, "encoder", ENCODER, F.pixel_unshuffle(rgb, codec.cfg.patch))


def published_decode(codec: Taehv, latents: Tensor) -> Tensor:
    drawn = in_one_go(codec, "decoder", DECODER, latents)
    return (F.pixel_shuffle(drawn, codec.cfg.patch).clamp(0, 1) * 2 - 1)[:, 3:]


def small(patch: int = 1) -> Taehv:
    codec = TaehvConfig(channels=4, patch=patch, width=8).build().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in codec.parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 100
        torch.nn.init.normal_(parameter, std=0.95 / fan_in**0.5, generator=generator)
    return codec.eval()


def clip(batch: int = 2, frames: int = FRAMES, height: int = 16, width: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def latent(batch: int = 2, frames: int = LATENTS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, frames, 4, 2, 3, generator=generator, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", TAEHV)
def test_names_and_shapes_of_the_published_files(name: str) -> None:
    with torch.device("meta"):
        codec = TAEHV[name].build()
    want = published_shapes(TAEHV[name].channels, TAEHV[name].patch)
    assert {key: tuple(value.shape) for key, value in codec.state_dict().items()} == want and len(want) == 128
    assert (codec.channels, codec.scale, codec.stride) == {
        "taew2_1": (16, 8, 4),
        "taew2_2": (48, 16, 4),
        "taehv1_5": (32, 16, 4),
    }[name]


def test_a_published_file_loads_strictly(tmp_path: Path) -> None:
    tensors = {key: torch.randn(shape).half() for key, shape in published_shapes(16, 1).items()}
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    codec = TAEHV["taew2_1"].build()
    codec.load_state_dict(load_file(tmp_path / "taew2_1.safetensors"), strict=True)
    assert sum(p.numel() for p in codec.parameters()) == 11_315_539
    assert torch.equal(codec.state_dict()["decoder.13.conv.weight"].half(), tensors["decoder.13.conv.weight"])


def test_the_decoder_for_hunyuanvideo_fits_its_latents() -> None:
    with torch.device("meta"):
        both = TinyDecoder(HunyuanVaeConfig().build(), TAEHV["taehv1_5"].build())
    assert (both.channels, both.scale, both.stride) == (32, 16, 4)


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_decoder_is_the_published_network(patch: int) -> None:
    codec, latents = small(patch), latent()
    got = codec.decode(latents)
    assert got.shape == (2, 4 * (LATENTS - 1) + 1, 3, 16 * patch, 24 * patch)
    assert got.std() > 0.1 and (got.abs() == 1).float().mean() < 0.5, "or clamping hides the numbers"
    close(got, published_decode(codec, latents))


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_each_latent_is_the_published_one_of_the_clip_that_ends_there(patch: int) -> None:
    codec, pixels = small(patch), clip()
    latents = codec.encode(pixels)
    assert latents.shape == (2, LATENTS, 4, 16 // codec.scale, 32 // codec.scale) and latents.std() > 0.1
    for i in range(LATENTS):
        close(latents[:, i], published_encode(codec, pixels[:, : 4 * i + 1])[:, i])
    close(latents[:, :1], codec.encode(pixels[:, :1]))


@pytest.mark.parametrize("sizes", [[1] * 4, [4], [1, 2, 1], [3, 1]])
@torch.no_grad()
def test_streamed_decode_equals_whole(sizes: list[int]) -> None:
    codec, latents, state, parts = small(2), latent(), None, []
    for i, part in enumerate(latents.split(sizes, dim=1)):
        pixels, state = codec.decode_next(part, state)
        assert pixels.shape[1] == 4 * part.shape[1] - 3 * (i == 0)
        parts.append(pixels)
    close(torch.cat(parts, dim=1), published_decode(codec, latents))


@torch.no_grad()
def test_sessions_interleave_and_rewind() -> None:
    codec = small()
    clips, videos = [latent(seed=1), latent(batch=1, seed=2)], [clip(seed=3), clip(batch=1, width=16, seed=4)]
    drawn: list[list[Tensor]] = [[], []]
    seen: list[list[Tensor]] = [[], []]
    decoding: list[State | None] = [None, None]
    encoding: list[State | None] = [None, None]
    for i in range(LATENTS):
        for k in (0, 1):
            codec.decode_next(clips[k][:, i : i + 1] + 1, decoding[k])  # a step that is taken back
            pixels, decoding[k] = codec.decode_next(clips[k][:, i : i + 1], decoding[k])
            drawn[k].append(pixels)
            new = videos[k][:, max(4 * i - 3, 0) : 4 * i + 1]
            codec.encode_next(-new, encoding[k])
            latents, encoding[k] = codec.encode_next(new, encoding[k])
            seen[k].append(latents)
    for k in (0, 1):
        close(torch.cat(drawn[k], dim=1), codec.decode(clips[k]))
        close(torch.cat(seen[k], dim=1), codec.encode(videos[k]))
        assert all(len(part) == len(clips[k]) for state in (decoding[k], encoding[k]) if state for part in state)


@torch.no_grad()
def test_causal_in_time_but_not_without_memory() -> None:
    codec, pixels = small(), clip()
    latents = codec.encode(pixels)
    for i in range(LATENTS - 1):
        changed = pixels.clone()
        changed[:, 4 * i + 1 :] = 0
        close(codec.encode(changed)[:, : i + 1], latents[:, : i + 1])
        assert (codec.encode(changed)[:, i + 1] - latents[:, i + 1]).abs().max() > 1e-3
    changed = pixels.clone()
    changed[:, 4 * LATENTS - 6] = 0  # in no group that is its own, only remembered by the last latent
    assert (codec.encode(changed)[:, -1] - latents[:, -1]).abs().max() > 1e-3
    alone = codec.decode(latents[:, 1:])
    assert (alone[:, 1:] - codec.decode(latents)[:, 5:]).abs().max() > 1e-3, "the first latent is remembered"


def test_errors_say_what_would_do() -> None:
    codec = small()
    with pytest.raises(UserError, match=r"clip of 16 frames.*4k \+ 1"):
        codec.encode(clip(frames=16))
    with pytest.raises(UserError, match=r"20x32.*multiples of 8"):
        codec.encode(clip(height=20))
    with pytest.raises(UserError, match=r"16 channels.*4"):
        codec.decode(torch.zeros(1, 1, 16, 2, 2))
    with pytest.raises(ConfigError, match=r"codec.patch=0"):
        TaehvConfig(patch=0)
    assert loads(TaehvConfig, dumps(TAEHV["taew2_2"])) == TAEHV["taew2_2"]
