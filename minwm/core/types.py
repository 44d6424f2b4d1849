"""What flows through the system. Shape letters, used in every signature of the package:

b batch · f latent frames · n pixel frames · c h w latent channels, rows, columns · p tokens per frame
s tokens · d width · a heads · e head width · l text tokens
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import FirstLatent, FirstLatents


@dataclass(frozen=True)
class Condition:
    """All that a network may consume besides the noisy latents and their times."""

    text: Float[Tensor, "b l d"]
    """Text states, zero-padded to a fixed length: a row of zeros is no token, and all zeros is the null prompt. Whether
    padding is attended to is the network's affair."""
    w2c: Float[Tensor, "b f 4 4"] | None = None
    """World-to-camera per latent frame, float32, OpenCV axes; None for a model without camera control."""
    K: Float[Tensor, "b f 4"] | None = None
    """fx/W, fy/H, cx/W, cy/H per latent frame."""
    actions: Int[Tensor, "b f"] | None = None
    """How the camera moved to each latent frame (control/action.py)."""
    first_latents: FirstLatents | None = None
    """Clean latents that the clip starts with: the one of an image, or whole chunks of a video. None generates the
    first frame too."""
    null: Float[Tensor, "b l d"] | None = None
    """Text states of the unconditional branch of guidance (a negative prompt); None: the null prompt."""
    glyphs: Float[Tensor, "b g glyph_dim"] | None = None
    """States of what the prompt has in quotes, to be drawn as letters (ByT5); zero-padded like text."""
    image_states: Float[Tensor, "b v image_dim"] | None = None
    """States of the picture that the first latent is, from an image encoder (SigLIP); zeros for no picture."""

    @property
    def first_latent(self) -> FirstLatent | None:
        """The clean first latent, if it is given: the image."""
        return None if self.first_latents is None else self.first_latents[:, :1]

    @property
    def given(self) -> int:
        """How many latents are given."""
        return 0 if self.first_latents is None else self.first_latents.shape[1]

    @property
    def cameras(self) -> tuple[Float[Tensor, "b f 4 4"], Float[Tensor, "b f 4"]]:
        """w2c and K, for a network with camera control; ConfigError if they are missing."""
        if self.w2c is None or self.K is None:
            raise ConfigError("a network with camera control needs a camera for every latent frame; this clip has none")
        return self.w2c, self.K

    def to(self, device: torch.device | str) -> "Condition":
        moved = {name: x.to(device) for name, x in self.parts().items()}
        return replace(self, **moved)

    def parts(self) -> dict[str, Tensor]:
        """The parts that this condition has."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def per_frame(self) -> dict[str, Tensor]:
        """The parts with a value for every latent frame."""
        return {name: x for name, x in self.parts().items() if name in ("w2c", "K", "actions")}

    def clips(self, index: list[int]) -> "Condition":
        """The condition of some clips of the batch."""
        return Condition(**{name: x[index] for name, x in self.parts().items()})

    def frames(self, start: int, stop: int) -> "Condition":
        """The condition of latent frames [start, stop); the prompt is that of the whole clip."""
        first = self.first_latents[:, start:stop] if self.first_latents is not None and self.given > start else None
        return replace(self, first_latents=first, **{name: x[:, start:stop] for name, x in self.per_frame().items()})

    def at(self, index: Int[Tensor, " n"]) -> "Condition":
        """The condition of a sequence of these latent frames; what is given of the clip stays."""
        return replace(self, **{name: x[:, index] for name, x in self.per_frame().items()})

    def repeat_frames(self, times: int) -> "Condition":
        """The condition of a sequence that holds the same frames so many times, one after the other."""
        return replace(self, **{name: torch.cat([x] * times, dim=1) for name, x in self.per_frame().items()})

    def without_image(self) -> "Condition":
        """The condition of a clip whose first frame is generated too."""
        return replace(self, first_latents=None, image_states=None)

    def unconditional(self) -> "Condition":
        """The unconditional branch of guidance: no prompt, or a negative one, with camera and image kept."""
        text = torch.zeros_like(self.text) if self.null is None else self.null
        return replace(self, text=text, glyphs=None if self.glyphs is None else torch.zeros_like(self.glyphs))

    @staticmethod
    def stack(*conditions: "Condition") -> "Condition":
        """Concatenate along the batch axis; all must have the same parts."""
        names = conditions[0].parts()
        parts = {name: torch.cat([condition.parts()[name] for condition in conditions]) for name in names}
        return Condition(**parts)


Camera = tuple[Float[Tensor, "4 4"], Float[Tensor, " 4"]]
"""w2c in float64, and K."""


@dataclass(frozen=True)
class Views:
    """Posed pictures of a world, known beforehand, which streams remember; all that is large is shared between them."""

    latents: Mapping[int, Float[Tensor, "c h w"]]
    """Of views 0 to n - 1, each encoded as the first latent of a clip is; some mappings make them when asked."""
    w2c: Float[Tensor, "n 4 4"]
    """From the world, float64."""
    K: Float[Tensor, "n 4"]
    positions: Float[Tensor, "n 3"]
    """Of the cameras in the world, float32."""
    directions: Float[Tensor, "n 3"]
    """In which they look there, float32."""
    origin: Float[Tensor, "4 4"]
    """The pose in the world (c2w, float64) of the frame of a clip."""
    image: Camera | None = None
    """In that frame, of one more view, the last."""

    @classmethod
    def of(
        cls, latents: Mapping[int, Float[Tensor, "c h w"]], w2c: Float[Tensor, "n 4 4"], K: Float[Tensor, "n 4"]
    ) -> "Views":
        """In the frame of the world."""
        w2c = w2c.double()
        positions = -torch.einsum("nji,nj->ni", w2c[:, :3, :3], w2c[:, :3, 3])
        directions = w2c[:, 2, :3].float().contiguous()
        return cls(latents, w2c, K, positions.float(), directions, torch.eye(4, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.w2c) + (self.image is not None)

    def camera(self, i: int) -> Camera:
        """Of a view, in the frame of the clip."""
        return self.image if self.image and i == len(self.w2c) else (self.w2c[i] @ self.origin, self.K[i])

    def transformed(self, pose: Float[Tensor, "4 4"]) -> "Views":
        """In the frame of a camera at `pose` (c2w)."""
        image = self.image and (self.image[0] @ pose.to(self.w2c), self.image[1])
        return replace(self, origin=self.origin @ pose.to(self.w2c), image=image)

    def with_view(self, latent: Float[Tensor, "c h w"], w2c: Float[Tensor, "4 4"], K: Float[Tensor, " 4"]) -> "Views":
        """And one more, the last."""
        latents = ChainMap({len(self.w2c): latent.to(self.K.device)}, self.latents)  # pyright: ignore[reportArgumentType]
        return replace(self, latents=latents, image=(w2c.to(self.w2c), K.to(self.K)))


@dataclass(frozen=True)
class Clip:
    """A training sample: clean latents and what they are conditioned on."""

    latents: Float[Tensor, "b f c h w"]
    cond: Condition
    trajectory: Float[Tensor, "k b f c h w"] | None = None
    """States along the teacher's ODE at the student's times, then its end point (stage 2a)."""
    views: tuple[Views, ...] = ()
    """Of the world of each clip of the batch, in the frame of the clip; none: nothing is known of it."""

    def to(self, device: torch.device | str) -> "Clip":
        trajectory = self.trajectory if self.trajectory is None else self.trajectory.to(device)
        return replace(self, latents=self.latents.to(device), cond=self.cond.to(device), trajectory=trajectory)
