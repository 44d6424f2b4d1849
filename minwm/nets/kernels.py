"""Triton kernels, each beside its plain form in another file; import this one only where triton is.

`place` is one pass over queries, keys and values instead of about fifteen: it reads 3 d numbers per token and writes
6 d, those of keys and values where attention will read them. Its plain form is `SelfAttention.project` and `before`
in wan.py with `attend` in attention.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.control.prope import Projection
from minwm.core.runtime import require

triton, tl = require("triton", "fast"), require("triton.language", "fast")


@triton.jit
def _normalised(x0, x1, x2, x3, weight, i, mask, d, eps):
    rms = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3) / d + eps)
    w = weight + 4 * i
    return (
        x0 * rms * tl.load(w, mask=mask, other=0.0).to(tl.float32),
        x1 * rms * tl.load(w + 1, mask=mask, other=0.0).to(tl.float32),
        x2 * rms * tl.load(w + 2, mask=mask, other=0.0).to(tl.float32),
        x3 * rms * tl.load(w + 3, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _load(x, i, mask):
    p = x + 4 * i
    return (
        tl.load(p, mask=mask, other=0.0).to(tl.float32),
        tl.load(p + 1, mask=mask, other=0.0).to(tl.float32),
        tl.load(p + 2, mask=mask, other=0.0).to(tl.float32),
        tl.load(p + 3, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _store(to, y0, y1, y2, y3, mask):
    kind = to.dtype.element_ty
    tl.store(to, y0.to(kind), mask=mask)
    tl.store(to + 1, y1.to(kind), mask=mask)
    tl.store(to + 2, y2.to(kind), mask=mask)
    tl.store(to + 3, y3.to(kind), mask=mask)


@triton.jit
def _rotated(to, x0, x1, x2, x3, angles, mask):
    """Two pairs, by (cos, sin) of two angles that lie one after the other."""
    c0, s0 = tl.load(angles, mask=mask, other=0.0), tl.load(angles + 1, mask=mask, other=0.0)
    c1, s1 = tl.load(angles + 2, mask=mask, other=0.0), tl.load(angles + 3, mask=mask, other=0.0)
    _store(to, x0 * c0 - x1 * s0, x0 * s0 + x1 * c0, x2 * c1 - x3 * s1, x2 * s1 + x3 * c1, mask)


@triton.jit
def _seen(to, x0, x1, x2, x3, m, mask):
    """A row of four times the 4 x 4 matrix at m."""
    y0 = x0 * tl.load(m) + x1 * tl.load(m + 4) + x2 * tl.load(m + 8) + x3 * tl.load(m + 12)
    y1 = x0 * tl.load(m + 1) + x1 * tl.load(m + 5) + x2 * tl.load(m + 9) + x3 * tl.load(m + 13)
    y2 = x0 * tl.load(m + 2) + x1 * tl.load(m + 6) + x2 * tl.load(m + 10) + x3 * tl.load(m + 14)
    y3 = x0 * tl.load(m + 3) + x1 * tl.load(m + 7) + x2 * tl.load(m + 11) + x3 * tl.load(m + 15)
    _store(to, y0, y1, y2, y3, mask)


@triton.jit
def _place(
    qkv, norm_q, norm_k, table, matrices, queries, keys, values, n, s, frames, d, heads, rows, eps,
    e: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One token: program r is row r of b x s. Channels are taken in groups of four, i counts groups."""
    r = tl.program_id(0).to(tl.int64)
    batch, token = r // s, r % s
    i = tl.arange(0, block)
    mask = i < d // 4
    head, inside = 4 * i // e, 4 * i % e
    angles = table + token * e + inside  # e / 2 angles of (cos, sin) per token
    camera = (batch * frames + token // (s // frames)) * 16
    per_kind = (n // s) * frames * 16  # P of all frames, then P^-T of all
    q_to = queries + (r * 2 * heads + head) * e + inside
    k_to = keys + ((batch * 2 * heads + head) * rows + token) * e + inside
    v_to = values + ((batch * 2 * heads + head) * rows + token) * e + inside
    q_branch, kv_branch = heads * e, heads * rows * e

    x0, x1, x2, x3 = _load(qkv + r * d, i, mask)
    x0, x1, x2, x3 = _normalised(x0, x1, x2, x3, norm_q, i, mask, d, eps)
    _rotated(q_to, x0, x1, x2, x3, angles, mask)
    _seen(q_to + q_branch, x0, x1, x2, x3, matrices + camera, mask)

    x0, x1, x2, x3 = _load(qkv + (n + r) * d, i, mask)
    x0, x1, x2, x3 = _normalised(x0, x1, x2, x3, norm_k, i, mask, d, eps)
    _rotated(k_to, x0, x1, x2, x3, angles, mask)
    _seen(k_to + kv_branch, x0, x1, x2, x3, matrices + per_kind + camera, mask)

    x0, x1, x2, x3 = _load(qkv + (2 * n + r) * d, i, mask)
    _store(v_to, x0, x1, x2, x3, mask)
    _seen(v_to + kv_branch, x0, x1, x2, x3, matrices + per_kind + camera, mask)


def fused_qkv(
    qkv: Float[Tensor, "3 n d"],
    norms: tuple[Tensor, Tensor],
    rope: Float[Tensor, "s half 2"],
    camera: Projection,
    room: Float[Tensor, "2 b stacked s e"],
    eps: float,
) -> Float[Tensor, "b s stacked e"]:
    """Queries of both branches; their keys and values are written to `room`, rows of an arena.

    Norm over the full width, RoPE and PRoPE in float32, rounded once.
    """
    _, b, stacked, s, e = room.shape
    _, n, d = qkv.shape
    queries = qkv.new_empty(b, s, stacked, e)
    rows = room.stride(2) // e  # of the whole arena
    matrices, frames = camera.matrices.contiguous(), camera.matrices.shape[2]
    if room.stride()[3:] != (e, 1) or room.stride(1) != stacked * room.stride(2) or not qkv.is_contiguous():
        raise ValueError(f"rows of an arena and contiguous inputs are needed, not strides {room.stride()}")
    _place[(n,)](
        qkv, *norms, rope, matrices, queries, room[0], room[1], n, s, frames, d, stacked // 2, rows, eps,
        e=e, block=triton.next_power_of_2(d // 4), num_warps=4 if torch.version.cuda else 1,
    )  # fmt: skip
    return queries
