"""PRoPE in the form of its authors (Li et al. 2025), by numbers that their published code gives."""

import math
from typing import cast

import pytest
import torch

from minwm.control.prope import Projection
from minwm.core.types import Condition
from minwm.families.wan.transformer import Block, Wan, WanConfig
from minwm.nets.attention import FULL, attend_branches

SINGLE = WanConfig(
    dim=16, heads=1, layers=1, ffn=16, channels=1, text_dim=2, text_length=1, freq_dim=2, camera="single"
)
FIRST = [0.5931177, 0.7230566, 0.7111716, 0.6798325, 0.4812961, 0.2925280, -0.0051068, -0.2624530,
         -0.6604217, -0.7393026, -0.0143922, -0.6573849, -0.6039543, -0.4099891, 0.3177018, 0.1660463]  # fmt: skip
LAST = [-0.3601268, -0.4114752, -0.3547252, -0.1860290, -0.0996417, 0.1326008, 0.1787871, 0.3586815,
        0.2276985, 0.4098290, 0.4579920, 0.2666785, 0.1412281, -0.0486441, -0.2734801, -0.3175439]  # fmt: skip
"""Attention output of the first and of the last token, from `prope/torch.py` of the authors' repository."""


def two_cameras() -> Condition:
    """The identity, and one that has moved and turned by 0.3; the principal point is off the middle."""
    turned = torch.eye(4)
    turned[0, 0] = turned[2, 2] = math.cos(0.3)
    turned[0, 2], turned[2, 0] = math.sin(0.3), -math.sin(0.3)
    turned[:3, 3] = torch.tensor([0.2, -0.1, 0.4])
    K = torch.tensor([0.9, 1.3, 0.4, 0.62]).expand(1, 2, 4)
    return Condition(text=torch.zeros(1, 1, 2), w2c=torch.stack([torch.eye(4), turned])[None], K=K)


def test_the_single_branch_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames of 2 x 3 tokens; queries, keys and values are sines."""
    net = Wan(SINGLE).double()
    attention = cast(Block, net.blocks[0]).self_attn
    phase = 0.37 * torch.arange(192, dtype=torch.float64).view(1, 12, 1, 16)
    q, k, v = (torch.sin(phase + shift) for shift in (0.0, 1.0, 2.0))
    monkeypatch.setattr(attention, "normalised_qkv", lambda _: (torch.stack([q, k]), v))
    monkeypatch.setattr(attention, "o", torch.nn.Identity())
    rope, camera = net.rope_table(torch.zeros(1, 2, 1, 4, 6), FULL), net.camera_matrices(two_cameras())
    assert isinstance(camera, Projection)
    out = attend_branches(FULL, 0, *attention.project_qkv(q, rope, camera), dim=attention.stack_dim)
    out = attention.project_output(out, rope, camera)
    torch.testing.assert_close(out[[0, -1]], torch.tensor([FIRST, LAST]).double(), atol=2e-6, rtol=1e-5)


def test_the_principal_point_can_be_left_out() -> None:
    """As minWM's released weights need it; and in the middle it changes nothing."""
    cond = two_cameras()
    assert cond.w2c is not None and cond.K is not None
    middle = torch.cat([cond.K[..., :2], torch.full_like(cond.K[..., :2], 0.5)], -1)
    given, ignored, centred = (
        Projection.from_cameras(cond.w2c, K, point).matrices
        for K, point in ((cond.K, True), (cond.K, False), (middle, True))
    )
    assert torch.equal(ignored, centred) and not torch.allclose(given, ignored)
    torch.testing.assert_close(given[2].mT @ given[1].mT, torch.eye(4).expand(1, 2, 4, 4))  # P P^-1
