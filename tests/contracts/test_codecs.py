"""What must hold for every codec: streams equal whole clips, however they are cut, and states are values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_codecs import CODECS, LATENTS, VAES, clip, close, draw, randomise
from torch import Tensor

from minwm.core.config import UserError, dumps, loads
from minwm.nets.causal_vae import CausalVae
from minwm.nets.codec import State, VideoCodec
from minwm.store.layouts import AnyCodec

BUILT = {name: randomise(cfg.build()) for name, cfg in CODECS.items()}
each = pytest.mark.parametrize("codec", BUILT.values(), ids=BUILT)
each_vae = pytest.mark.parametrize("vae", [BUILT[name] for name in VAES], ids=VAES)


def cut(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to hand over `total` frames or latents, some of them none at a time."""
    return st.lists(st.integers(0, total), max_size=5).map(
        lambda at: [b - a for a, b in zip([0, *sorted(at)], [*sorted(at), total], strict=True)]
    )


@each
def test_a_codec_keeps_the_contract(codec: AnyCodec) -> None:
    assert isinstance(codec, VideoCodec)
    assert loads(type(codec.cfg), dumps(codec.cfg)) == codec.cfg
    assert {name.partition(".")[0] for name in codec.state_dict()} > set(codec.decoding)
    pixels = clip(codec)
    assert codec.encode(pixels).shape == (2, LATENTS, codec.channels, 2, 3)
    assert codec.decode(draw(codec)).shape == pixels.shape and codec.decode(draw(codec)).abs().max() <= 1


@each
@settings(max_examples=6, deadline=None)
@given(sizes=cut(13))
def test_streamed_encode_equals_whole(codec: AnyCodec, sizes: list[int]) -> None:
    pixels, state, parts = clip(codec, 1, 13), None, []
    for part in pixels.split(sizes, dim=1):
        latents, state = codec.encode_next(part, state)
        parts.append(latents)
    close(torch.cat(parts, dim=1), codec.encode(pixels))


@each
@settings(max_examples=6, deadline=None)
@given(sizes=cut(LATENTS))
def test_streamed_decode_equals_whole(codec: AnyCodec, sizes: list[int]) -> None:
    latents, state, parts = draw(codec), None, []
    for part in latents.split([size for size in sizes if size], dim=1):
        begins = state is None
        pixels, state = codec.decode_next(part, state)
        assert pixels.shape[1] == 4 * part.shape[1] - 3 * begins
        parts.append(pixels)
    close(torch.cat(parts, dim=1), codec.decode(latents))


@each
def test_sessions_interleave_and_rewind(codec: AnyCodec) -> None:
    clips = [draw(codec, seed=1), draw(codec, rows=4, seed=2)]
    drawn: list[list[Tensor]] = [[], []]
    states: list[State | None] = [None, None]
    for i in range(LATENTS):
        for k in (0, 1):
            codec.decode_next(clips[k][:, i : i + 1] + 1, states[k])  # a step that is taken back
            pixels, states[k] = codec.decode_next(clips[k][:, i : i + 1], states[k])
            drawn[k].append(pixels)
    for k in (0, 1):
        close(torch.cat(drawn[k], dim=1), codec.decode(clips[k]))


@each
def test_sessions_share_a_batch(codec: AnyCodec) -> None:
    """Two streams in turn, then in one batch by joining their states: each as if it were alone."""
    clips = [clip(codec, 1, seed=1), clip(codec, 1, seed=2)]
    starts = [codec.encode_next(pixels[:, :7]) for pixels in clips]
    state = tuple(torch.cat(parts) for parts in zip(*(state for _, state in starts), strict=True))
    rest, _ = codec.encode_next(torch.cat([pixels[:, 7:] for pixels in clips]), state)
    for k in (0, 1):
        close(torch.cat([starts[k][0], rest[k : k + 1]], dim=1), codec.encode(clips[k]))


@each
def test_causal_in_time(codec: AnyCodec) -> None:
    pixels, latents = clip(codec, 1, 9), draw(codec, 3)
    later, drawn = pixels.clone(), latents.clone()
    later[:, 5:], drawn[:, 2:] = 0, 0
    close(codec.encode(later)[:, :2], codec.encode(pixels)[:, :2])
    close(codec.decode(drawn)[:, :5], codec.decode(latents)[:, :5])


@each
def test_a_state_is_small_and_of_one_shape_unless_it_grows(codec: AnyCodec) -> None:
    """From the first latent on: what a compiled graph needs, and no more memory than what is looked at again."""
    _, first = codec.decode_next(draw(codec, 1))
    _, later = codec.decode_next(draw(codec, 3), first)
    assert codec.grows == ([x.shape for x in first] != [x.shape for x in later])
    assert all(x.shape[0] == 2 for x in later)
    if isinstance(codec, CausalVae):
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in later)


@each_vae
def test_half_precision(vae: AnyCodec) -> None:
    half = vae.cfg.build().to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    with torch.inference_mode():
        pixels, latents = half.decode(draw(vae)), half.encode(clip(vae))
    assert pixels.dtype == latents.dtype == torch.float32, "that of what was given"
    for got, want in ((pixels, vae.decode(draw(vae))), (latents, vae.encode(clip(vae)))):
        assert (got - want).square().mean().sqrt() < 0.05 * want.std()


@each_vae
def test_errors_say_what_would_do(vae: AnyCodec) -> None:
    with pytest.raises(UserError, match=r"clip of 16 frames.*17"):
        vae.encode(clip(vae, frames=16))
    with pytest.raises(UserError, match=rf"frames of 34x34.*multiples of {vae.scale} pixels"):
        vae.encode(torch.zeros(1, 1, 3, 34, 34))
    with pytest.raises(UserError, match=rf"20 channels.*{vae.channels}"):
        vae.decode(torch.zeros(1, 1, 20, 2, 2))
