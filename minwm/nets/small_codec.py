"""The small causal video codec: 4 frames and 8x8 pixels become one latent pixel, streaming or whole clips.

Latent 0 stands for frame 0 alone, latent i for frames 4i-3 .. 4i, so latent i needs no frame after 4i. The encoder is
given the first frame four times, and of the four frames that the decoder makes of latent 0 only the last is kept: one
rule makes all latents. Space and the four frames of a group are folded into channels at once (pixel unshuffle):
convolutions at full resolution would cost thirty times as much.

The encoder is linear: the principal components of such blocks, computed in closed form (`fit`), ordered from coarse to
fine. It stays fixed, so networks trained on its latents remain valid while the decoder is trained further. The decoder
adds a learned correction to the linear reconstruction.

Only the decoder's `CausalResidual` blocks mix latents of different times, each with the one before. Their last inputs,
and the frames of an incomplete group, are the whole state of a stream. The caller holds it, so any number of streams
can share one codec.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError, UserError
from minwm.nets.codec import Latents, Pixels, State, channels_last


@dataclass(frozen=True)
class SmallCodecConfig:
    """Shape of the small codec and of its loss."""

    kind: ClassVar[str] = "small"
    tiny: ClassVar[None] = None
    """It has no published tiny decoder."""
    scale: ClassVar[int] = 8
    """Rows and columns of pixels per row and column of latents."""
    channels: int = 16
    """Channels of a latent."""
    width: int = 96
    """Channels inside at 1/8 of the resolution."""
    fine: int = 64
    """Channels inside at 1/4 of the resolution."""
    finest: int = 32
    """Channels of the decoder at 1/2 of the resolution."""
    decoder_depth: int = 2
    """Residual blocks per resolution of the decoder."""
    noise: float = 0.05
    """Standard deviation of the noise on latents while the decoder learns: neighbours must decode alike."""
    edges: float = 1.0
    """Weight of the error of image gradients: it keeps edges sharp where L1 alone would blur them."""
    energy: float = 0.0
    """Weight of the error of the gradients' size around each pixel: what cannot be known exactly becomes texture as
    strong as the truth's, where the other terms would make it smooth."""

    def __post_init__(self) -> None:
        for name in ("channels", "width", "fine", "finest", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"codec.{name}={getattr(self, name)}: must be at least 1")
        for name in ("noise", "edges", "energy"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"codec.{name}={getattr(self, name)}: must be finite and not negative")

    def build(self) -> "SmallCodec":
        return SmallCodec(self)


class Residual(nn.Module):
    """x + f(x), with f two 3x3 convolutions; zero at the start of training."""

    def __init__(self, width: int, looks: int = 1) -> None:
        super().__init__()
        self.look = conv(looks * width, width)
        self.write = conv(width, width)
        nn.init.zeros_(self.write.weight)

    def forward(self, x: Float[Tensor, "m d h w"]) -> Float[Tensor, "m d h w"]:
        return x + self.write(torch.relu(self.look(torch.relu(x))))


class CausalResidual(Residual):
    """A residual block of two steps in time: its first convolution takes the latent before as well."""

    def __init__(self, width: int) -> None:
        super().__init__(width, looks=2)

    def step(self, x: Float[Tensor, "m d h w"], past: Float[Tensor, "b d h w"]) -> tuple[Tensor, Tensor]:
        """The block's output and the last latent, which is the past of the next step; x holds the next m / b latents of
        each of b streams."""
        batch = len(past)
        steps = torch.cat([past[:, None], x.unflatten(0, (batch, len(x) // batch))], dim=1)
        seen = torch.cat([steps[:, :-1].flatten(0, 1), x], dim=1)
        return x + self.write(torch.relu(self.look(torch.relu(seen)))), steps[:, -1]


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class StreamingSequential(nn.Sequential):
    """Layers applied to every latent by itself, but for `CausalResidual`, which takes its past from the state."""

    def step(self, x: Float[Tensor, "m d h w"], state: State | None, batch: int) -> tuple[Tensor, State]:
        """Advance b = `batch` streams by m / b latents each; without a state, the first is its own past."""
        pasts = iter(state) if state is not None else None
        kept: list[Tensor] = []
        for layer in self:
            if isinstance(layer, CausalResidual):
                past = x.unflatten(0, (batch, -1))[:, 0] if pasts is None else next(pasts)
                x, past = layer.step(x, past)
                kept.append(past)
            else:
                x = layer(x)
        return x, tuple(kept)


class SmallCodec(nn.Module):
    """Pixels in [-1, 1] to latents of about unit variance and back; see the module's docstring."""

    stride = 4
    scale = SmallCodecConfig.scale
    decoding: tuple[str, ...] = ("synthesis", "decoder")
    encoding: str = ""
    grows: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: SmallCodecConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.channels = cfg.channels
        block = 3 * self.stride * self.scale**2
        if cfg.channels > block:
            raise ConfigError(f"codec.channels={cfg.channels}: a block of frames has only {block} numbers")
        self.analysis = nn.Conv2d(block, cfg.channels, 1, bias=False)
        self.synthesis = nn.Conv2d(cfg.channels, block, 1)
        self.decoder = StreamingSequential(
            nn.Conv2d(cfg.channels, cfg.width, 1),
            *residual_blocks(cfg.width, cfg.decoder_depth),
            nn.Conv2d(cfg.width, 4 * cfg.fine, 1),
            nn.PixelShuffle(2),
            *residual_blocks(cfg.fine, cfg.decoder_depth),
            conv(cfg.fine, 4 * cfg.finest),
            nn.PixelShuffle(2),
            Residual(cfg.finest),
            conv(cfg.finest, 4 * 3 * self.stride),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(cfg.channels))
        self.register_buffer("std", torch.ones(cfg.channels))
        self.analysis.requires_grad_(False)
        channels_last(self)  # twice the speed on a CPU

    @torch.no_grad()
    def fit(self, clips: Iterable[Pixels]) -> None:
        """Set the encoder to the principal components of the clips' blocks, and the decoder to their inverse.

        Component i has standard deviation sigma_i and is divided by a multiple of sqrt(sigma_i): half-way between
        one scale for all, where fine channels would drown in noise, and unit variance for each, where they would
        weigh as much as the coarse ones. The mean variance of latents is 1.
        """
        total, square, count = 0.0, 0.0, 0
        for pixels in clips:
            waiting = pixels[:, :1].expand(-1, self.stride - 1, -1, -1, -1)
            rows = self._blocks(torch.cat([waiting, pixels], dim=1)).movedim(1, -1).flatten(0, -2).double()
            total, square, count = total + rows.sum(0), square + rows.mT @ rows, count + len(rows)
        if not isinstance(total, Tensor) or not isinstance(square, Tensor):
            raise UserError("the codec was given no clips to fit")
        mean = total / count
        variance, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        sigma = variance.flip(0)[: self.channels].clamp_min(1e-12).sqrt()
        basis = vectors.flip(1)[:, : self.channels]
        self.analysis.weight.copy_(basis.mT[:, :, None, None])
        self.synthesis.weight.copy_(basis[:, :, None, None])
        self.synthesis.bias.copy_(mean - basis @ (basis.mT @ mean))  # pyright: ignore[reportOptionalMemberAccess]
        self.mean.copy_(basis.mT @ mean)
        self.std.copy_((sigma * sigma.mean()).sqrt())
        last = self.decoder[-2]
        nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]

    def _blocks(self, pixels: Pixels) -> Float[Tensor, "m block h w"]:
        """Whole groups of frames with time and 8x8 pixels folded into channels; pixels holds 4 m / b frames."""
        groups = pixels.unflatten(1, (-1, self.stride)).flatten(0, 1).flatten(1, 2)
        return F.pixel_unshuffle(groups, self.scale)

    def encode(self, pixels: Pixels) -> Latents:
        """Latents of whole clips of 4k + 1 frames."""
        frames = pixels.shape[1]
        if frames % self.stride != 1:
            near = self.stride * round((frames - 1) / self.stride) + 1
            raise UserError(f"a clip of {frames} frames: the codec takes {self.stride}k + 1 of them; {near} would do")
        return self.encode_next(pixels)[0]

    def decode(self, latents: Latents) -> Pixels:
        """All 4 (f - 1) + 1 frames of whole clips, clamped to [-1, 1]."""
        return self.decode_next(latents)[0]

    def encode_next(self, pixels: Pixels, state: State | None = None) -> tuple[Latents, State]:
        """The latents that the next frames of streams complete, if any; no state starts anew."""
        height, width = pixels.shape[-2:]
        if height % self.scale or width % self.scale:
            raise UserError(f"frames of {height}x{width}: the codec takes multiples of {self.scale} pixels")
        waiting = state[0] if state else pixels[:, :1].repeat_interleave(self.stride - 1, dim=1)
        pixels = torch.cat([waiting, pixels], dim=1).to(self.mean)
        batch, ready = len(pixels), pixels.shape[1] // self.stride
        if not ready:  # torch's pixel unshuffle cannot handle an empty batch
            shape = (batch, 0, self.channels, height // self.scale, width // self.scale)
            return pixels.new_zeros(shape), (pixels,) if state or pixels.shape[1] else ()
        groups, waiting = pixels.tensor_split([self.stride * ready], dim=1)
        raw = self.analysis(self._blocks(groups)).unflatten(0, (batch, ready))
        return (raw - per_channel(self.mean)) / per_channel(self.std), (waiting,)

    def decode_next(self, latents: Latents, state: State | None = None) -> tuple[Pixels, State]:
        """The frames of the next latents of streams: four each, but one for the first latent of a stream."""
        pixels, state = self._reconstruct(latents.to(self.mean), state)
        return pixels.clamp(-1, 1), state

    def _reconstruct(self, latents: Latents, state: State | None) -> tuple[Pixels, State]:
        batch, f, channels = latents.shape[:3]
        if channels != self.channels:
            raise UserError(
                f"latents of {channels} channels: this codec has {self.channels}, so they come from another"
            )
        raw = (latents * per_channel(self.std) + per_channel(self.mean)).flatten(0, 1)
        added, pasts = self.decoder.step(latents.flatten(0, 1), state, batch)
        x = F.pixel_shuffle(self.synthesis(raw), self.scale) + added
        pixels = x.unflatten(1, (self.stride, 3)).unflatten(0, (batch, f)).flatten(1, 2)
        return pixels if state is not None else pixels[:, self.stride - 1 :], pasts

    def forward(self, pixels: Pixels, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in training, and its parts: reconstruction from slightly noisy latents, L1 + MSE + L1 of image
        gradients and their local size."""
        latents = self.encode(pixels)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        output, _ = self._reconstruct(latents + self.cfg.noise * noise, None)
        error = output - pixels
        l1, mse = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        psnr = 10 * torch.log10(4 / mse)  # pixels span 2
        logs = {"l1": l1, "mse": mse, "edges": edges, "psnr": psnr}
        total = l1 + mse + self.cfg.edges * edges
        if self.cfg.energy:
            logs["energy"] = (gradient_size(output) - gradient_size(pixels)).abs().mean()
            total = total + self.cfg.energy * logs["energy"]
        return total, {name: value.detach() for name, value in logs.items()}


def gradient_size(pixels: Pixels, window: int = 8) -> Float[Tensor, "m 3 h w"]:
    """Root mean square of image gradients in each window."""
    x = pixels.flatten(0, 1)
    square = x[..., :-1, :].diff(dim=-1).square() + x[..., :-1].diff(dim=-2).square()
    return (F.avg_pool2d(square, window, window // 2) + 1e-6).sqrt()


def residual_blocks(width: int, depth: int) -> Sequence[nn.Module]:
    """One causal block, then `depth - 1` of a single step in time."""
    return [CausalResidual(width), *(Residual(width) for _ in range(depth - 1))]


def per_channel(x: Float[Tensor, " c"]) -> Float[Tensor, "c 1 1"]:
    return x[:, None, None]
