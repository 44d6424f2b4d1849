"""How a stream is divided into chunks, and the arithmetic of the cache that remembers them: slots, rows, positions."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from minwm.core.config import ConfigError

Frames = Any
"""Integers that broadcast: arrays of numpy (on the host, whatever torch is tracing), or tensors."""

Recompute = Literal["never", "causal", "full"]
"""never: keys and values are cached when a chunk is finished, and stay. causal: once not all of the past fits into the
cache, the chunks that are seen are read again, each of which sees those before it, as if the stream had had no others.
full: from the third chunk on, and they all see each other, as HY-WorldPlay runs (and does not train)."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a video is divided into chunks, and which of them a stream remembers. Counts are latent frames or chunks."""

    chunk: int = 4
    """Latent frames generated together."""
    first_chunk: int | None = None
    """Latent frames of the first chunk; None: as many as in the others."""
    image_start: bool | None = None
    """Whether an image is given as the first latent; the rest of the first chunk is generated with it. None: if the
    first chunk is a single latent."""
    image_time: float = 0.0
    """Timestep at which networks that see chunks are shown the image, which is clean."""
    sink: int = 1
    """First chunks that are never forgotten."""
    window: int = 8
    """Chunks kept besides the sinks, the current one included."""
    retrieved: int = 0
    """Older chunks that are seen besides: those whose cameras saw most of what the current one sees; or as many known
    views (stream/memory.py). They differ from chunk to chunk, so the context is recomputed."""
    recompute: Recompute = "never"
    """Keys and values of the context are computed anew for every chunk, from latents: at positions as if nothing lay
    between, with cameras as they are (HY-WorldPlay's relative RoPE)."""
    rolling_sink: bool = False
    """Sinks follow the window in time as if nothing lay between: for streams much longer than training clips."""
    context_noise: float = 0.0
    """Time at which finished chunks are cached: a little noise hides their small errors from later ones."""
    context_time: float | None = None
    """Timestep at which the network is shown finished chunks, whatever noise they have (HY-WorldPlay: 0.014, and
    none); None: that of their noise."""
    merged_refresh: bool = False
    """Finished chunks get no cache update of their own: the keys and values of the last denoising pass stay, and
    streams have no use for `context_noise`. A network should have been trained so."""

    def __post_init__(self) -> None:
        for name in ("context_noise", "context_time", "image_time"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ConfigError(f"stream.{name}={value} is a time in [0, 1)")
        least = {"chunk": 1, "first_chunk": 1, "window": 1, "sink": 0, "retrieved": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ConfigError(f"stream.{name}={value}: must be at least {bound}")
        if self.first_chunk_frames != self.chunk and self.sink < 1:
            raise ConfigError(
                f"stream.first_chunk={self.first_chunk_frames} among chunks of {self.chunk} frames needs sink >= 1"
            )

        if self.retrieved and self.recompute == "never":
            raise ConfigError(f"stream.retrieved={self.retrieved} needs stream.recompute=causal (or full)")
        if self.recompute != "never" and self.slots < 2:
            raise ConfigError(f"stream.recompute={self.recompute} needs a chunk besides the current one; raise window")
        if self.merged_refresh and self.recompute != "never":
            raise ConfigError(f"stream.recompute={self.recompute} is a cache update; leave stream.merged_refresh off")

    @property
    def first_chunk_frames(self) -> int:
        return self.chunk if self.first_chunk is None else self.first_chunk

    @property
    def takes_image(self) -> bool:
        return self.first_chunk_frames == 1 if self.image_start is None else self.image_start

    @property
    def image_alone(self) -> bool:
        """Whether the first chunk is nothing but the image."""
        return self.takes_image and self.first_chunk_frames == 1

    @property
    def slots(self) -> int:
        """Chunks that the cache holds."""
        return self.sink + self.retrieved + self.window

    @property
    def distinct_graph_shapes(self) -> int:
        """Chunks after which every pair of a slot and a number of valid rows has occurred, and what is read again was
        read in one pass. With known views there are more shapes: chunks differ in how much they read."""
        return self.slots + {"never": self.window - 1, "causal": 1, "full": 0}[self.recompute]

    def start(self, chunk: int) -> int:
        """First latent frame of a chunk, counted from the start of the stream."""
        return self.first_chunk_frames + (chunk - 1) * self.chunk if chunk else 0

    def chunk_of(self, frame: Frames) -> Frames:
        return (1 + (frame - self.first_chunk_frames) // self.chunk) * (frame >= self.first_chunk_frames)

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """[start, stop) of every chunk of a clip; `frames` must be a whole number of chunks."""
        first, chunk = self.first_chunk_frames, self.chunk
        if frames < first or (frames - first) % chunk:
            near = first + max(0, round((frames - first) / chunk)) * chunk
            raise ConfigError(f"{frames} latent frames are not {first} + k * {chunk}; try {near}")
        count = 1 + (frames - first) // chunk
        return [(self.start(i), self.start(i + 1)) for i in range(count)]

    def slot(self, chunk: int) -> int:
        """Where a chunk lives: sinks keep their place, the others overwrite the oldest."""
        oldest = self.slots - self.window
        return chunk if chunk < oldest else oldest + (chunk - oldest) % self.window

    def recomputes(self, chunk: int) -> bool:
        """Whether the context of a chunk is computed for it: from the second chunk on, or once not all of it fits."""
        return chunk >= {"never": chunk + 1, "causal": self.slots, "full": 2}[self.recompute]

    @property
    def context_parts(self) -> list[tuple[int, int]]:
        """The parts of the pass that recomputes the context of a chunk for which not all of the past fits: latent
        frames of each, and those that it sees."""
        ends = [self.start(i) for i in range(self.slots)]
        one_by_one = [(b - a, b) for a, b in pairwise(ends)]
        return {"never": [], "causal": one_by_one, "full": [(ends[-1], ends[-1])]}[self.recompute]

    def overwrites(self, chunks: int) -> bool:
        """Whether the cache loses anything while so many chunks are made."""
        return chunks > self.slots or self.recomputes(chunks - 1)

    def check_one_pass(self, frames: int) -> None:
        """Raise ConfigError if chunks of a clip see what no mask over the clip allows."""
        most = self.start(self.slots)
        if self.recompute != "never" and frames > most:
            raise ConfigError(
                f"stream.recompute={self.recompute}: a clip of {frames} latents is not trained in one pass, as its "
                f"chunks see different {most} of them; train on parts (recipe.latents), or raise stream.window"
            )

    def forgotten(self, chunk: int) -> int:
        """Latent frames that the cache has lost when a chunk is generated."""
        return max(0, chunk + 1 - self.slots) * self.chunk

    def sink_shift(self, chunk: int) -> int:
        """Latent frames by which the sinks have moved in time when a chunk is generated."""
        return self.forgotten(chunk) if self.rolling_sink else 0

    def geometry(self, tokens: int) -> "Geometry":
        """The same for latent frames of so many tokens."""
        return Geometry(tokens=tokens, **vars(self))


@dataclass(frozen=True, kw_only=True)
class Geometry(StreamConfig):
    """The constants of a stream: no shape ever depends on a tensor's value."""

    tokens: int
    """Tokens per latent frame."""
    text_rows: int = 0
    """Rows at the front for text keys, seen by all (`Backbone.text_rows`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.text_rows < 0:
            raise ConfigError(f"geometry: tokens={self.tokens} must be >= 1 and text_rows={self.text_rows} >= 0")

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.slot_rows(self.slots - 1)[1]

    def time_origin(self, chunk: int) -> int:
        """The latent frame that has position 0 in time when a chunk is generated.

        Text keys are not rotated, so that queries see their own position in time against them: it may not grow for
        ever. Once the ring is full, chunks stay at its last positions, and the cached keys move towards the past.
        """
        return self.forgotten(chunk) if self.text_rows else 0

    def slot_rows(self, slot: int) -> tuple[int, int]:
        """Rows [start, stop) of a slot in the cache."""
        return self.text_rows + self.start(slot) * self.tokens, self.text_rows + self.start(slot + 1) * self.tokens

    def valid_rows(self, chunk: int) -> int:
        """Rows in use while a chunk is generated; grows until the ring is full, then stays."""
        return self.slot_rows(min(chunk, self.slots - 1))[1]
