"""Attention scopes: what a token may look at is an argument of the network, not a mode inside it.

Full()                 everything (bidirectional)
Masked(rule, ...)      a sentence about frames (teacher forcing)
Cached(arena, chunk)   the streamed past and the current chunk, written in place (inference)
Peek(arena, chunk)     the same past, read only: gradients stay inside the chunk (self-rollout)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minwm.core.config import ConfigError

Heads = Float[Tensor, "b a s e"]
Frames = Any
"""Integers that broadcast: arrays of numpy (on the host, whatever torch is tracing), or tensors."""
Rule = Callable[[Frames, Frames], Any]
"""rule(query frame, key frame) -> may the query see the key; made of operators alone."""


@dataclass(frozen=True)
class Geometry:
    """The constants of a stream: no shape ever depends on a tensor's value."""

    tokens: int
    """Tokens per latent frame."""
    chunk: int = 4
    """Latent frames generated together."""
    first: int = 0
    """Latent frames of the first chunk; 1 for an image start, 0 means the same as `chunk`."""
    sink: int = 1
    """First chunks that are never forgotten."""
    window: int = 8
    """Chunks kept besides the sinks, the current one included."""
    roll: bool = False
    """Sinks follow the window in time as if nothing lay between: for streams much longer than training clips."""
    text: int = 0
    """Rows at the front for text keys, seen by all (joint-attention backbones)."""
    context_noise: float = 0.0
    """Time at which finished chunks are kept: a little noise hides their small errors from later ones."""
    merged_refresh: bool = False
    """Finished chunks get no pass of their own: the keys and values of the last denoising pass stay, and streams have
    no use for `context_noise`. A network should have been trained so."""

    def __post_init__(self) -> None:
        if not 0 <= self.context_noise < 1:
            raise ConfigError(f"geometry: context_noise={self.context_noise} is a time in [0, 1)")
        if min(self.tokens, self.chunk, self.window) < 1 or min(self.first, self.sink, self.text) < 0:
            raise ConfigError(f"geometry {self}: tokens, chunk and window must be >= 1, the others >= 0")
        if self.lead != self.chunk and self.sink < 1:
            raise ConfigError(
                f"geometry: a first chunk of {self.lead} frames among chunks of {self.chunk} needs sink >= 1"
            )

    @property
    def lead(self) -> int:
        return self.first or self.chunk

    @property
    def slots(self) -> int:
        return self.sink + self.window

    @property
    def regimes(self) -> int:
        """Chunks after which every pair of a slot and the rows in use has occurred."""
        return self.slots + self.window - 1

    @property
    def rows(self) -> int:
        return self.span(self.slots - 1)[1]

    def start(self, chunk: int) -> int:
        """First latent frame of a chunk, counted from the start of the stream."""
        return self.lead + (chunk - 1) * self.chunk if chunk else 0

    def chunk_of(self, frame: Frames) -> Frames:
        return (1 + (frame - self.lead) // self.chunk) * (frame >= self.lead)

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """[start, stop) of every chunk of a clip; `frames` must be a whole number of chunks."""
        if frames < self.lead or (frames - self.lead) % self.chunk:
            near = self.lead + max(0, round((frames - self.lead) / self.chunk)) * self.chunk
            raise ConfigError(f"{frames} latent frames are not {self.lead} + k * {self.chunk}; try {near}")
        count = 1 + (frames - self.lead) // self.chunk
        return [(self.start(i), self.start(i + 1)) for i in range(count)]

    def slot(self, chunk: int) -> int:
        """Where a chunk lives: sinks keep their place, the others overwrite the oldest."""
        return chunk if chunk < self.sink else self.sink + (chunk - self.sink) % self.window

    def span(self, slot: int) -> tuple[int, int]:
        """Rows [start, stop) of a slot in the arena."""
        return self.text + self.start(slot) * self.tokens, self.text + self.start(slot + 1) * self.tokens

    def rolled(self, chunk: int) -> int:
        """Latent frames by which the sinks have moved in time when a chunk is generated."""
        return max(0, chunk + 1 - self.slots) * self.chunk if self.roll else 0

    def filled(self, chunk: int) -> int:
        """Rows in use while a chunk is generated; grows until the ring is full, then stays."""
        return self.span(min(chunk, self.slots - 1))[1]


def chunk_causal(geometry: Geometry) -> Rule:
    """A frame sees its own chunk, the earlier ones within the window, and the sinks."""

    def visible(q: Frames, k: Frames) -> Any:
        q, k = geometry.chunk_of(q), geometry.chunk_of(k)
        return (k <= q) & ((k < geometry.sink) | (k > q - geometry.window))

    return visible


def teacher_forcing(geometry: Geometry, frames: int) -> Rule:
    """Frames are [clean | noisy]. Noisy frames see their own noisy chunk and strictly earlier clean chunks."""
    causal = chunk_causal(geometry)

    def visible(q: Frames, k: Frames) -> Any:
        q_noisy, k_noisy = q >= frames, k >= frames
        same = geometry.chunk_of(q % frames) == geometry.chunk_of(k % frames)
        past = causal(q % frames, k % frames) & ~(q_noisy & same)
        return (k_noisy & q_noisy & same) | (~k_noisy & past)

    return visible


FAST_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported()
"""Elsewhere bfloat16 products take many times as long as float32's."""


def softmax_attention(q: Heads, k: Float[Tensor, "b a t e"], v: Float[Tensor, "b a t e"]) -> Heads:
    """softmax(q k^T / sqrt(e)) v.

    In bfloat16 on a CPU that multiplies it fast, by plain products: with gradients in half the time of torch's fused
    kernel. Tensors without data, which stand for those of a GPU (plan.py), are left to that.
    """
    if torch.is_autocast_enabled(kind := q.device.type):  # as the fused kernel is cast: norms hand on float32
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    if not FAST_BFLOAT16 or q.device.type != "cpu" or q.dtype != torch.bfloat16 or type(q) is not Tensor:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


@runtime_checkable
class Scope(Protocol):
    def positions(self, frames: int) -> list[int]:
        """Temporal position (RoPE) of each frame of the sequence; host integers."""
        ...

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads) -> Heads: ...


@dataclass(frozen=True)
class Full:
    """Every token sees every token."""

    def positions(self, frames: int) -> list[int]:
        return list(range(frames))

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads) -> Heads:
        return softmax_attention(q, k, v)


class Masked:
    """A rule about frames; `period` restarts positions, so that the halves of [clean | noisy] share them.

    Neighbouring frames that see the same form a group, and each group attends, without a mask, to what it sees:
    nothing is computed to be thrown away, and the fast kernels, which know no masks, can be used.
    """

    def __init__(self, rule: Rule, frames: int, period: int | None = None) -> None:
        self.frames, self.period = frames, period or frames
        index = np.arange(frames)
        visible = rule(index[:, None], index[None, :])
        self.groups, self.pieces = _runs(visible), _runs(visible.T)
        """Frames in each run that sees the same, and in each run that is seen by the same."""
        self.seen = [row.nonzero()[0].tolist() for row in visible[_starts(self.groups)][:, _starts(self.pieces)]]
        """Of each group, the pieces that it sees."""

    def positions(self, frames: int) -> list[int]:
        return [i % self.period for i in range(frames)]

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads) -> Heads:
        tokens = q.shape[2] // self.frames
        queries, keys, values = (
            x.split([tokens * n for n in runs], dim=2)
            for x, runs in ((q, self.groups), (k, self.pieces), (v, self.pieces))
        )
        out = [
            softmax_attention(
                query, torch.cat([keys[i] for i in seen], dim=2), torch.cat([values[i] for i in seen], dim=2)
            )
            for query, seen in zip(queries, self.seen, strict=True)
        ]
        return torch.cat(out, dim=2)


def _runs(rows: Bool[np.ndarray, "n m"]) -> list[int]:
    """Lengths of the runs of equal rows."""
    starts = [0, *(i for i in range(1, len(rows)) if (rows[i] != rows[i - 1]).any())]
    return [b - a for a, b in pairwise([*starts, len(rows)])]


def _starts(runs: list[int]) -> list[int]:
    return list(accumulate(runs, initial=0))[:-1]


class KVArena:
    """Keys and values of a stream, `[layer, 2, b, a, rows, e]`: one allocation, stable pointers, slot = chunk.

    Which rows are valid follows from the chunk's index (a host integer), so nothing is ever moved or cleared.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: int,
        batch: int,
        heads: int,
        head_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.kv = torch.zeros(layers, 2, batch, heads, geometry.rows, head_width, dtype=dtype, device=device)

    def keep_text(self, layer: int, k: Heads, v: Heads) -> None:
        """Write the text prefix, once per prompt; it must fill `geometry.text` rows."""
        self.kv[layer, 0, :, :, : self.geometry.text] = k
        self.kv[layer, 1, :, :, : self.geometry.text] = v

    def room(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """The chunk's own rows, to be written before they are `seen`."""
        start, stop = self.geometry.span(self.geometry.slot(chunk))
        return self.kv[layer, ..., start:stop, :]

    def past(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """All rows in use; the chunk's own may not have been written yet."""
        return self.kv[layer, ..., : self.geometry.filled(chunk), :]

    def seen(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        """All rows in use, once `room` has been written."""
        return self.past(layer, chunk)

    def rewrite(self, change: Callable[[Heads], Heads], rows: slice, *, values: bool) -> None:
        """Apply a change to cached keys, and to values too if asked, layer by layer and in place."""
        for layer in self.kv:
            for part in layer if values else layer[:1]:
                part[:, :, rows] = change(part[:, :, rows])

    def about_to_lose(self, chunk: int) -> tuple[Tensor, ...]:
        """A copy of what `chunk` will overwrite; nothing while the ring still has room. For undoing a step."""
        return tuple(part.clone() for part in self._slot(chunk)) if chunk >= self.geometry.slots else ()

    def put_back(self, chunk: int, lost: tuple[Tensor, ...]) -> None:
        for part, was in zip(self._slot(chunk), lost, strict=False):
            part.copy_(was)

    def _slot(self, chunk: int) -> tuple[Tensor, ...]:
        start, stop = self.geometry.span(self.geometry.slot(chunk))
        return (self.kv[..., start:stop, :],)


@dataclass(frozen=True)
class Cached:
    """Write the current chunk into its slot, then attend to the filled rows.

    Every pass overwrites the slot: the noisy ones while denoising, at last the clean one at t = 0, which is the
    commit. The order of slots does not matter to attention, for positions are inside the keys. Inference only.
    """

    arena: KVArena
    chunk: int

    def positions(self, frames: int) -> list[int]:
        start = self.arena.geometry.start(self.chunk)
        return list(range(start, start + frames))

    def room(self, layer: int) -> Float[Tensor, "2 b a s e"]:
        """The chunk's own rows: keys and values are written there before `read`."""
        return self.arena.room(layer, self.chunk)

    def read(self, layer: int, q: Heads) -> Heads:
        keys, values = self.arena.seen(layer, self.chunk)
        return softmax_attention(q, keys, values)

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads) -> Heads:
        keys, values = self.room(layer)
        keys.copy_(k)
        values.copy_(v)
        return self.read(layer, q)


@dataclass(frozen=True)
class Peek:
    """The same attention with the arena read only: the current chunk is joined to a copy of the past.

    Used where gradients flow. Writing graded keys in place would tie later chunks to this graph.
    """

    arena: KVArena
    chunk: int

    def positions(self, frames: int) -> list[int]:
        return Cached(self.arena, self.chunk).positions(frames)

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads) -> Heads:
        geometry = self.arena.geometry
        start, stop = geometry.span(geometry.slot(self.chunk))
        keys, values = self.arena.past(layer, self.chunk).detach()
        k = torch.cat([keys[:, :, :start], k, keys[:, :, stop:]], dim=2)
        v = torch.cat([values[:, :, :start], v, values[:, :, stop:]], dim=2)
        return softmax_attention(q, k, v)


Parts = tuple[Float[Tensor, "b s a e"], ...]
"""Branches of attention, to be stacked on heads or on channels."""
Branches = tuple[Parts, Parts, Parts]
"""Of queries, keys and values."""


def attend(scope: Scope, layer: int, q: Parts, k: Parts, v: Parts, dim: int = 2) -> Float[Tensor, "b s heads width"]:
    """One attention over branches stacked along `dim`. A stream joins nothing: each part goes to its place."""
    if isinstance(scope, Cached) and not torch.is_grad_enabled():
        room = scope.room(layer).transpose(2, 3)  # 2 b s a e
        queries = q[0].new_empty(room.shape[1:])
        for parts, place in zip((q, k, v), (queries, *room), strict=True):
            for part, to in zip(parts, place.chunk(len(parts), dim), strict=True):
                to.copy_(part)
        return scope.read(layer, queries.transpose(1, 2)).transpose(1, 2)
    stacked = (parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts in (q, k, v))
    return scope(layer, *(x.transpose(1, 2) for x in stacked)).transpose(1, 2)
