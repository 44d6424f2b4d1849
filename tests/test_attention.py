"""The arena and its rules, below any network: text prefix, ring order, the slot arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from minwm.core.config import ConfigError
from minwm.nets import attention
from minwm.nets.attention import (
    FULL,
    Cached,
    KVArena,
    Masked,
    ReadOnlyCache,
    TextKV,
    chunk_causal,
    softmax_attention,
    teacher_forcing,
)
from minwm.nets.chunks import Geometry


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_ring_with_text_prefix_equals_attention_over_the_visible_rows(window: int) -> None:
    geometry = Geometry(tokens=2, chunk=2, first_chunk=1, sink=1, window=window, text_rows=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 2 * 13, 4, generator=generator, dtype=torch.float64)
    text_k, text_v = torch.randn(2, 1, 2, 3, 4, generator=generator, dtype=torch.float64)
    arena = KVArena(geometry, (1, 1, 2, 4), torch.float64)
    valid = torch.tensor([[True, False, True]])
    arena.write_text_kv([TextKV(text_k, text_v, valid)])
    rule, frame = chunk_causal(geometry), torch.arange(13)
    visible = rule(frame[:, None], frame[None]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    visible = torch.cat([valid.expand(26, 3), visible], 1)
    whole = F.scaled_dot_product_attention(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), attn_mask=visible)
    text = TextKV(text_k, text_v, valid)
    torch.testing.assert_close(Masked(rule, 13)(0, q, k, v, text), whole)
    for i, (a, b) in enumerate(geometry.chunks(13)):
        rows = slice(2 * a, 2 * b)
        out = ReadOnlyCache(arena, i)(0, q[:, :, rows], k[:, :, rows], v[:, :, rows], text)
        torch.testing.assert_close(out, whole[:, :, rows])
        out = Cached(arena, i)(0, q[:, :, rows], k[:, :, rows], v[:, :, rows])
        torch.testing.assert_close(out, whole[:, :, rows])


def test_text_has_its_gradient_under_every_scope_but_the_written_one() -> None:
    geometry = Geometry(tokens=2, chunk=1, text_rows=3)
    q, k, v = torch.randn(3, 1, 2, 2, 4).unbind()
    text_k, text_v = torch.randn(2, 1, 2, 3, 4).unbind()
    text = TextKV(text_k.requires_grad_(), text_v.requires_grad_(), torch.tensor([[True, True, False]]))
    arena = KVArena(geometry, (1, 1, 2, 4), torch.float32)
    arena.write_text_kv([text])
    assert not arena.kv.requires_grad
    outs, grads = [], []
    for scope in (FULL, Masked(chunk_causal(geometry), 1), ReadOnlyCache(arena, 0)):
        outs.append(scope(0, q, k, v, text))
        grads.append(torch.cat(torch.autograd.grad(outs[-1].square().sum(), [text_k, text_v])))
        torch.testing.assert_close((outs[-1], grads[-1]), (outs[0], grads[0]))
    assert grads[0][:, :, :2].abs().min() > 0 and not grads[0][:, :, 2].any()
    torch.testing.assert_close(Cached(arena, 0)(0, q, k, v), outs[0])


def test_rules_by_hand() -> None:
    geometry = Geometry(tokens=1, chunk=2, first_chunk=1, sink=1, window=1)
    causal = chunk_causal(geometry)(torch.arange(5)[:, None], torch.arange(5)[None]).int().tolist()
    assert causal == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 1, 1]]
    geometry = Geometry(tokens=1, chunk=1, window=9)
    forced = teacher_forcing(geometry, 3)(torch.arange(6)[:, None], torch.arange(6)[None]).int().tolist()
    assert forced == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("window", [1, 9])
def test_groups_of_frames_attend_as_under_a_dense_mask(window: int) -> None:
    """Values and gradients, of teacher forcing on 3 chunks and of a rule that is no prefix."""
    geometry, tokens = Geometry(tokens=2, chunk=2, first_chunk=1, sink=1, window=window), 2
    generator = torch.Generator().manual_seed(0)
    for rule, frames in ((teacher_forcing(geometry, 5), 10), (lambda q, k: (q - k) % 3 == 0, 7)):
        q, k, v = torch.randn(3, 2, 3, tokens * frames, 4, generator=generator, dtype=torch.float64)
        index = torch.arange(frames)
        dense = rule(index[:, None], index[None]).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        results = []
        for attend in (Masked(rule, frames), None):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = (
                attend(0, leaves[0], leaves[1], leaves[2])
                if attend
                else F.scaled_dot_product_attention(*leaves, attn_mask=dense)
            )
            results.append([out, *torch.autograd.grad(out.pow(3).sum(), leaves)])
        for ours, oracle in zip(*results, strict=True):
            torch.testing.assert_close(ours, oracle)


def test_a_short_first_chunk_must_be_a_sink() -> None:
    with pytest.raises(ConfigError, match="sink >= 1"):
        Geometry(tokens=1, chunk=2, first_chunk=1, sink=0)


def test_groups_are_as_few_as_can_be() -> None:
    """Every chunk of 2: clean ones see 1, 3, 5 frames of [clean], noisy ones the past and themselves."""
    geometry = Geometry(tokens=1, chunk=2, first_chunk=1, sink=1, window=9)
    masked = Masked(teacher_forcing(geometry, 5), 10)
    assert masked.query_groups == [1, 2, 2, 1, 2, 2] and masked.key_groups == [1, 2, 2, 1, 2, 2]
    assert masked.visible_groups == [[0], [0, 1], [0, 1, 2], [3], [0, 4], [0, 1, 5]]


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_plain_products_of_bfloat16_are_attention(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    monkeypatch.setattr(attention, "CACHED_SCORES", samples * 3 * 10 * 10)
    q, k, v, weight = torch.randn(4, 3, 3, 10, 8, dtype=torch.bfloat16)
    found: list[torch.Tensor] = []
    for fast in (False, True):
        monkeypatch.setattr(attention, "FAST_BFLOAT16", fast)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        visible = (torch.arange(10) < torch.tensor([7, 3, 9])[:, None]).view(3, 1, 1, 10)
        out = softmax_attention(leaves[0], leaves[1], leaves[2], visible)
        found.append(torch.stack([out, *torch.autograd.grad((out * weight).sum(), leaves)]).detach())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    assert not torch.equal(*found), "two ways"
