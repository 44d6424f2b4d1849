"""Networks that predict clean latents, errors weighted so, and codecs that learn from parts of clips."""

from dataclasses import replace

import torch
from contracts.backbones import SMALL, condition, latents
from planning import MODEL

from minwm.core.flow import interpolate, velocity, x0_from_velocity
from minwm.nets.small_codec import SmallCodecConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.diffusion import TimeLaw


def test_a_fresh_network_predicts_that_clean_latents_are_zero() -> None:
    """Its head is silent at first: velocity then is x / t, and a given frame at t = 0 stays finite."""
    net = replace(SMALL["wan-clean"]).build().double()
    x, t = latents(3), torch.tensor([[0.0, 0.5, 1.0]]).expand(2, 3).double()
    v = net(x, t, condition(3))
    assert v.isfinite().all()
    torch.testing.assert_close(v[:, 1:], x[:, 1:] / t[:, 1:, None, None, None])


def test_clean_weights_make_the_error_that_of_clean_latents() -> None:
    x0, eps, guess = (latents(2, seed=i).float() for i in (1, 2, 3))
    t = torch.tensor([[0.3, 0.9], [0.5, 1.0]])
    x = interpolate(x0, eps, t)
    error = (guess - velocity(x0, eps)).square().mean((2, 3, 4)) * TimeLaw(weight="clean").weigh(t)
    torch.testing.assert_close(error, (x0_from_velocity(x, guess, t) - x0).square().mean((2, 3, 4)))


def test_a_codec_learns_from_parts_of_clips(generator: torch.Generator) -> None:
    codec = SmallCodecConfig(width=8, fine=8, finest=8, decoder_depth=1).build()
    pixels = torch.rand(2, 17, 3, 16, 16) * 2 - 1
    codec.fit([pixels])
    still = pixels[:, :1].expand_as(pixels)
    of_part, of_all = (
        CodecTraining(latents=n).build(MODEL, {"student": codec}).loss(still, 0, generator).total for n in (2, 0)
    )
    of_part.backward()
    assert of_part.isfinite() and abs(float(of_part.detach() / of_all.detach()) - 1) < 0.2
