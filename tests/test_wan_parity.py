"""Our Wan is Wan: the same numbers as diffusers' class, from the same weights, every one of them random."""

import pytest
import torch
from releases import reference
from torch import nn

from minwm.core.types import Condition
from minwm.families.wan.convert import diffusers_names
from minwm.families.wan.transformer import Wan, WanConfig

SMALL = WanConfig(dim=64, heads=2, layers=2, ffn=96, channels=4, text_dim=16, text_length=8, freq_dim=32)
RELEASE = {theirs: ours for ours, theirs in diffusers_names(30).items()}


@pytest.fixture(scope="module")
def pair() -> tuple[Wan, nn.Module]:
    torch.manual_seed(0)
    theirs, ours = reference(SMALL), SMALL.build()
    for name, parameter in theirs.named_parameters():  # norms scale near 1, or attention would be uniform
        nn.init.normal_(parameter, mean=float(name.endswith(("norm_q.weight", "norm_k.weight"))), std=0.2)
    ours.load_state_dict({RELEASE[key]: value for key, value in theirs.state_dict().items()})
    return ours, theirs


def prompt(rows: int) -> torch.Tensor:
    text = torch.randn(2, SMALL.text_length, SMALL.text_dim)
    text[:, rows:] = 0
    return text


@pytest.mark.parametrize("rows", [SMALL.text_length, 3, 0], ids=["full", "padded", "null"])
@pytest.mark.parametrize("size", [(1, 4, 6), (5, 8, 12)], ids=["small", "large"])
@torch.no_grad()
def test_one_time_per_clip(pair: tuple[Wan, nn.Module], size: tuple[int, int, int], rows: int) -> None:
    ours, theirs = pair
    frames, height, width = size
    x, t, text = torch.randn(2, frames, SMALL.channels, height, width), torch.rand(2), prompt(rows)
    want = theirs(x.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
    got = ours(x, t[:, None].expand(2, frames), Condition(text=text))
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(2, 4, 6), (5, 8, 12)], ids=["small", "large"])
@torch.no_grad()
def test_one_time_per_frame(pair: tuple[Wan, nn.Module], size: tuple[int, int, int]) -> None:
    """diffusers takes a time per token then, t-major; a clean first frame has time 0."""
    ours, theirs = pair
    frames, height, width = size
    x, t, text = torch.randn(2, frames, SMALL.channels, height, width), torch.rand(2, frames), prompt(5)
    t[:, 0] = 0
    per_token = 1000 * t.repeat_interleave(ours.tokens_per_frame(height, width), dim=1)
    want = theirs(x.transpose(1, 2), per_token, text).sample.transpose(1, 2)
    got = ours(x, t, Condition(text=text))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_is_attended_to(pair: tuple[Wan, nn.Module]) -> None:
    """So prompts must be padded to the full length, and cropping them is no optimisation."""
    _, theirs = pair
    x, text = torch.randn(2, SMALL.channels, 1, 4, 4), prompt(3)
    whole, cropped = (theirs(x, torch.full((2,), 500.0), y).sample for y in (text, text[:, :3]))
    assert (whole - cropped).abs().max() > 0.01


@torch.no_grad()
def test_parity_would_notice_any_parameter(pair: tuple[Wan, nn.Module]) -> None:
    """Every parameter matters to the output, so agreement says something about each."""
    ours, _ = pair
    x, t, cond = torch.randn(1, 2, 4, 4, 6), torch.full((1, 2), 0.4), Condition(text=prompt(5)[:1])
    before = ours(x, t, cond)
    idle = []
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if (ours(x, t, cond) - before).abs().max() < 1e-3:
            idle.append(name)
        parameter.copy_(kept)
    assert not idle


def test_full_size_has_the_names_and_shapes_of_the_release() -> None:
    """Wan2.1-T2V-1.3B: 27 tensors per block and 15 around them, 825 in all."""
    with torch.device("meta"):
        ours, theirs = WanConfig().build(), reference(WanConfig())
    want = {RELEASE[key]: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == want
    assert len(want) == len(theirs.state_dict()) == 825
    assert sum(p.numel() for p in ours.parameters()) == 1_418_996_800
