"""Attention scopes: what a token may attend to is an argument of the network, not a mode inside it.

Full()                         every token (bidirectional)
Masked(rule, ...)              what a rule about frames allows (teacher forcing)
Cached(arena, chunk)           the cached past and the current chunk, written in place (inference)
ReadOnlyCache(arena, chunk)    the same without a write: gradients stay inside the chunk (self-rollout)

Networks whose text takes part in this attention hand its keys and values to the scope, which lets every query see them.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minwm.nets.chunks import Frames, Geometry, StreamConfig

Heads = Float[Tensor, "b a s e"]
Keys = Float[Tensor, "b a t e"]
"""Keys or values, of as many tokens as there may be, where queries may be of others."""
FrameTokens = Float[Tensor, "b f p d"]


class TextKV(NamedTuple):
    """Text keys and values of one layer, and which rows are text: nobody attends to the others. None: all are."""

    k: Float[Tensor, "b a l e"]
    v: Float[Tensor, "b a l e"]
    valid: Bool[Tensor, "b l"] | None = None


Rule = Callable[[Frames, Frames], Any]
"""rule(query frame, key frame) -> may the query see the key; made of operators alone."""


def chunk_causal(stream: StreamConfig) -> Rule:
    """A frame attends to its own chunk, the earlier ones within the window, and the sinks; to all while they fit."""

    def visible(q: Frames, k: Frames) -> Any:
        q, k = stream.chunk_of(q), stream.chunk_of(k)
        return (k <= q) & ((k < stream.sink) | (k > q - stream.window) | (q < stream.slots))

    return visible


def teacher_forcing(stream: StreamConfig, frames: int) -> Rule:
    """Frames are [clean | noisy]. Noisy frames see their own noisy chunk and strictly earlier clean chunks."""
    causal = chunk_causal(stream)

    def visible(q: Frames, k: Frames) -> Any:
        q_noisy, k_noisy = q >= frames, k >= frames
        same = stream.chunk_of(q % frames) == stream.chunk_of(k % frames)
        past = causal(q % frames, k % frames) & ~(q_noisy & same)
        return (k_noisy & q_noisy & same) | (~k_noisy & past)

    return visible


FAST_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported()
"""Elsewhere bfloat16 products take many times as long as float32's."""
CACHED_SCORES = 2**22
"""Scores (8 MiB) that are computed at once on a CPU: more do not stay in its cache."""


def cast_heads(*heads: Tensor) -> list[Tensor]:
    """Under autocast in its type, as the fused kernel is cast: norms hand on float32."""
    kind = heads[0].device.type
    return [x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x for x in heads]


def softmax_attention(
    q: Heads,
    k: Keys,
    v: Keys,
    visible: Bool[Tensor, "#b 1 1 t"] | None = None,
) -> Heads:
    """softmax(q k^T / sqrt(e)) v over the visible keys, or over all.

    In bfloat16 on a CPU that multiplies it fast, by plain products: with gradients in half the time of torch's fused
    kernel. Tensors without data, which stand for those of a GPU (bench/memory.py), are left to that.
    """
    q, k, v = cast_heads(q, k, v)
    if not FAST_BFLOAT16 or q.device.type != "cpu" or q.dtype != torch.bfloat16 or type(q) is not Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible)
    samples = max(1, CACHED_SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    masks = [None] * len(q) if visible is None else visible.expand(len(q), -1, -1, -1).split(samples)
    parts = zip(q.split(samples), k.split(samples), v.split(samples), masks, strict=False)
    return torch.cat([_products(*part) for part in parts])


def _products(q: Heads, k: Keys, v: Keys, visible: Bool[Tensor, "b 1 1 t"] | None) -> Heads:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if visible is None else scores.masked_fill(~visible, -torch.inf)).softmax(-1) @ v


def prepend_text(text: TextKV | None, k: Heads, v: Heads) -> tuple[Keys, Keys, Bool[Tensor, "b 1 1 t"] | None]:
    """Keys and values after those of the text, and which of them are visible, as `softmax_attention` takes them."""
    if text is None:
        return k, v, None
    visible = None if text.valid is None else F.pad(text.valid, (0, k.shape[2]), value=True)[:, None, None]
    return torch.cat([text.k, k], dim=2), torch.cat([text.v, v], dim=2), visible


@runtime_checkable
class AttentionScope(Protocol):
    @property
    def bidirectional(self) -> bool:
        """Whether text may attend to video, and so depend on it; where it may not, it depends on the prompt alone."""
        ...

    def positions(self, frames: int) -> list[int]:
        """Temporal position (RoPE) of each frame of the sequence; host integers."""
        ...

    def __call__(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV | None = None) -> Heads:
        """Attention of the video's queries of a layer to the keys and values in scope, and to the text."""
        ...

    def attend_from_text(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV) -> Heads:
        """Attention of the text's queries, where `bidirectional`, to the video's keys and values and to the text."""
        ...

    def scatter(self, tokens: FrameTokens) -> FrameTokens:
        """This process's tokens of every frame."""
        ...

    def gather(self, tokens: FrameTokens) -> FrameTokens:
        """All tokens of every frame."""
        ...


class WholeFrames:
    """What scopes share whose process has all tokens of a frame; `nets/ulysses.py` has the other kind."""

    bidirectional = False

    def attend_from_text(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV) -> Heads:
        return softmax_attention(q, *prepend_text(text, k, v))

    def scatter(self, tokens: FrameTokens) -> FrameTokens:
        return tokens

    def gather(self, tokens: FrameTokens) -> FrameTokens:
        return tokens


@dataclass(frozen=True)
class Full(WholeFrames):
    """Every token sees every token."""

    bidirectional = True

    def positions(self, frames: int) -> list[int]:
        return list(range(frames))

    def __call__(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV | None = None) -> Heads:
        return softmax_attention(q, *prepend_text(text, k, v))


FULL = Full()


def scatter_rope(scope: AttentionScope, rope: Float[Tensor, "s half 2"], frames: int) -> Float[Tensor, "t half 2"]:
    """Rotary angles of this process's tokens, of those of all."""
    rows = rope.flatten(1).unflatten(0, (frames, -1))[None]
    return scope.scatter(rows).flatten(0, 2).unflatten(1, rope.shape[1:])


class Masked(WholeFrames):
    """Attention that a rule about frames allows; `period` restarts positions: the halves of [clean | noisy] share them.

    Neighbouring frames with equal rows of the mask form a group, and each group attends, without a mask, to the keys
    that it sees: nothing is computed to be masked out, and kernels without support for masks can be used.
    """

    def __init__(self, rule: Rule, frames: int, period: int | None = None) -> None:
        self.frames, self.period = frames, period or frames
        index = np.arange(frames)
        visible = rule(index[:, None], index[None, :])
        self.query_groups, self.key_groups = _runs(visible), _runs(visible.T)
        """Frames in each run of equal rows of the mask, and of equal columns."""
        self.visible_groups = [
            row.nonzero()[0].tolist() for row in visible[_starts(self.query_groups)][:, _starts(self.key_groups)]
        ]
        """Of each query group, the indices of the key groups that it attends to."""

    def positions(self, frames: int) -> list[int]:
        return [i % self.period for i in range(frames)]

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads, text: TextKV | None = None) -> Heads:
        tokens = q.shape[2] // self.frames
        queries, keys, values = (
            x.split([tokens * n for n in runs], dim=2)
            for x, runs in ((q, self.query_groups), (k, self.key_groups), (v, self.key_groups))
        )
        out = []
        for query, visible in zip(queries, self.visible_groups, strict=True):
            seen = (torch.cat([groups[i] for i in visible], dim=2) for groups in (keys, values))
            out.append(softmax_attention(query, *prepend_text(text, *seen)))
        return torch.cat(out, dim=2)


def _runs(rows: Bool[np.ndarray, "n m"]) -> list[int]:
    """Lengths of the runs of equal rows."""
    starts = [0, *(i for i in range(1, len(rows)) if (rows[i] != rows[i - 1]).any())]
    return [b - a for a, b in pairwise([*starts, len(rows)])]


def _starts(runs: list[int]) -> list[int]:
    return list(accumulate(runs, initial=0))[:-1]


ArenaSize = tuple[int, int, int, int]
"""Layers, batch, heads and head width."""


class KVArena:
    """Keys and values of a stream, `[layer, 2, b, a, rows, e]`: one allocation, stable pointers, slot = chunk.

    Which rows are valid follows from the chunk's index (a host integer), so nothing is ever moved or cleared.
    """

    def __init__(
        self, geometry: Geometry, size: ArenaSize, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        layers, batch, heads, width = size
        self.kv = torch.zeros(layers, 2, batch, heads, geometry.rows, width, dtype=dtype, device=device)
        self.visible = all_visible(geometry, batch, device)
        """Which rows may be attended to, if there is text: its padding may not."""

    @torch.no_grad()
    def write_text_kv(self, text: Sequence[TextKV]) -> None:
        """Write the text of all layers in front, once per prompt; nothing for networks that keep no text here.

        It must fill `geometry.text_rows`, stacked on heads as the network's own keys are.
        """
        if self.visible is None:
            return
        rows = self.geometry.text_rows
        for layer, (k, v, valid) in zip(self.kv, text, strict=True):
            layer[0, :, :, :rows], layer[1, :, :, :rows] = k, v
            self.visible[..., :rows] = True if valid is None else valid[:, None, None]

    def visible_rows(self, chunk: int) -> Bool[Tensor, "b 1 1 s"] | None:
        """Which of `valid_kv` may be attended to; None: all."""
        return None if self.visible is None else self.visible[..., : self.geometry.valid_rows(chunk)]

    def current_slot(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """The chunk's own rows, to be written before `valid_kv` is read."""
        start, stop = self.geometry.slot_rows(self.geometry.slot(chunk))
        return self.kv[layer, ..., start:stop, :]

    def past_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """All rows in use; the chunk's own may still hold an older chunk."""
        return self.kv[layer, ..., : self.geometry.valid_rows(chunk), :]

    def valid_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """All rows in use, once `current_slot` has been written."""
        return self.past_kv(layer, chunk)

    def transform_kv(self, change: Callable[[Heads], Heads], rows: slice, *, values: bool) -> None:
        """Apply a change to cached keys, and to values too if asked, layer by layer and in place."""
        for layer in self.kv:
            for part in layer if values else layer[:1]:
                part[:, :, rows] = change(part[:, :, rows])

    def with_geometry(self, geometry: Geometry) -> "KVArena":
        """The same memory, divided otherwise."""
        view = copy(self)
        view.geometry = geometry
        return view

    def save_slot(self, chunk: int) -> tuple[Tensor, ...]:
        """A copy of what `chunk` will overwrite, for undoing it; empty while the ring is not full."""
        return tuple(part.clone() for part in self._slot_tensors(chunk)) if chunk >= self.geometry.slots else ()

    def restore_slot(self, chunk: int, saved: tuple[Tensor, ...]) -> None:
        for part, before in zip(self._slot_tensors(chunk), saved, strict=False):
            part.copy_(before)

    def _slot_tensors(self, chunk: int) -> tuple[Tensor, ...]:
        start, stop = self.geometry.slot_rows(self.geometry.slot(chunk))
        return (self.kv[..., start:stop, :],)


def all_visible(geometry: Geometry, batch: int, device: torch.device | str) -> Bool[Tensor, "b 1 1 rows"] | None:
    """A mask of the rows of a cache that hides none; None for a cache without text, which never hides any."""
    return torch.ones(batch, 1, 1, geometry.rows, dtype=torch.bool, device=device) if geometry.text_rows else None


@dataclass(frozen=True)
class Cached(WholeFrames):
    """Write keys and values of the current chunk into its slot, then attend to all valid rows. Inference only.

    Every pass overwrites the slot: the noisy ones while denoising, at last the clean one at t = 0 (the cache update).
    The order of slots does not matter, for positions are encoded in the keys. Text was written before any pass.
    """

    arena: KVArena
    chunk: int
    parts: tuple[int, ...] = ()
    """Latent frames of each part of the chunk, if a part is to see none that is later; (): it sees itself whole. With
    parts its slot is the last one in use."""

    def positions(self, frames: int) -> list[int]:
        geometry = self.arena.geometry
        start = geometry.start(self.chunk) - geometry.time_origin(self.chunk)
        return list(range(start, start + frames))

    def current_slot(self, layer: int) -> Float[Tensor, "2 b a s e"]:
        """The chunk's own rows: keys and values are written there before `attend`."""
        return self.arena.current_slot(layer, self.chunk)

    def attend(self, layer: int, q: Heads) -> Heads:
        keys, values = self.arena.valid_kv(layer, self.chunk)
        visible, past, out = self.arena.visible_rows(self.chunk), keys.shape[2] - q.shape[2], list[Heads]()
        for queries in q.split(self.query_rows(q.shape[2]), dim=2):
            past += queries.shape[2]
            seen = None if visible is None else visible[..., :past]
            out.append(softmax_attention(queries, keys[:, :, :past], values[:, :, :past], seen))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def query_rows(self, rows: int) -> list[int]:
        """The queries of each part, of so many in all."""
        return [rows // sum(self.parts) * part for part in self.parts] or [rows]

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads, text: TextKV | None = None) -> Heads:
        keys, values = self.current_slot(layer)
        keys.copy_(k)
        values.copy_(v)
        return self.attend(layer, q)


@dataclass(frozen=True)
class ReadOnlyCache(WholeFrames):
    """The same attention with the arena read only: the current chunk is concatenated to a copy of the past.

    Used where gradients flow: keys with gradient, written in place, would tie later chunks to this graph. Text is the
    one that is handed over, with its gradient, and not the copy in the arena.
    """

    arena: KVArena
    chunk: int

    def positions(self, frames: int) -> list[int]:
        return Cached(self.arena, self.chunk).positions(frames)

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads, text: TextKV | None = None) -> Heads:
        geometry = self.arena.geometry
        rows, (start, stop) = geometry.text_rows, geometry.slot_rows(geometry.slot(self.chunk))
        past = self.arena.past_kv(layer, self.chunk).detach()
        front = past[:, :, :, :rows] if text is None else (text.k, text.v)
        k, v = (
            torch.cat([words, old[:, :, rows:start], new, old[:, :, stop:]], dim=2)
            for words, old, new in zip(front, past, (k, v), strict=False)
        )
        return softmax_attention(q, k, v, self.arena.visible_rows(self.chunk))


Branches = tuple[Float[Tensor, "b s a e"], ...]
"""Queries, keys or values of each camera branch, to be stacked on heads or on channels."""
QKVBranches = tuple[Branches, Branches, Branches]


def attend_branches(
    scope: AttentionScope, layer: int, q: Branches, k: Branches, v: Branches, dim: int = 2, text: TextKV | None = None
) -> Float[Tensor, "b s heads width"]:
    """One attention over branches stacked along `dim`; in a stream they are copied straight into the cache.

    Text, if it takes part, is stacked already.
    """
    if isinstance(scope, Cached) and not torch.is_grad_enabled():
        slot = scope.current_slot(layer).transpose(2, 3)  # 2 b s a e
        queries = q[0].new_empty(slot.shape[1:])
        for branches, target in zip((q, k, v), (queries, *slot), strict=True):
            for branch, part in zip(branches, target.chunk(len(branches), dim), strict=True):
                part.copy_(branch)
        return scope.attend(layer, queries.transpose(1, 2)).transpose(1, 2)
    stacked = (branches[0] if len(branches) == 1 else torch.cat(branches, dim) for branches in (q, k, v))
    q_stacked, k_stacked, v_stacked = (x.transpose(1, 2) for x in stacked)
    return scope(layer, q_stacked, k_stacked, v_stacked, text).transpose(1, 2)
