"""Plücker rays, the usual other way to tell a network its cameras: where the ray of every pixel is, added to tokens.

A ray through o along the unit vector d is (d, o x d), six numbers (Sitzmann et al. 2021). The moment o x d depends on
where the world's origin is. So, unlike PRoPE, moving the world's frame changes the result; cameras must always be given
in the frame of the first one, as `core.camera.views` does, and a stream may never move the frame of its cache.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import se3_inverse

NUMBERS = 6
"""Per ray."""


@dataclass(frozen=True)
class Rays:
    """Cameras of latent frames, from which rays are made at any resolution."""

    w2c: Float[Tensor, "b f 4 4"]
    K: Float[Tensor, "b f 4"]

    @classmethod
    def from_cameras(cls, w2c: Float[Tensor, "b f 4 4"], K: Float[Tensor, "b f 4"]) -> "Rays":
        return cls(w2c.float(), K.float())

    def plucker(self, height: int, width: int) -> Float[Tensor, "b f 6 {height} {width}"]:
        """(d, o x d) of the rays through the pixel centres of a picture of that size, float32."""
        place = {"device": self.w2c.device, "dtype": torch.float32}
        y, x = ((torch.arange(n, **place) + 0.5) / n for n in (height, width))
        fx, fy, cx, cy = (k[..., None, None] for k in self.K.unbind(-1))
        across, down = torch.broadcast_tensors((x - cx) / fx, (y[:, None] - cy) / fy)
        c2w = se3_inverse(self.w2c)
        ray = torch.stack([across, down, torch.ones_like(across)], 2).flatten(3)  # b f 3 (h w)
        d = torch.nn.functional.normalize(c2w[..., :3, :3] @ ray, dim=2)
        moment = torch.linalg.cross(c2w[..., :3, 3:].expand_as(d), d, dim=2)
        return torch.cat([d, moment], 2).unflatten(3, (height, width))

    def patches(self, rows: int, columns: int, patch: int) -> Float[Tensor, "b f p k"]:
        """The rays of all latent pixels of every token, for rows x columns tokens."""
        with torch.autocast(self.w2c.device.type, enabled=False):  # a camera in bfloat16 is another camera
            rays = self.plucker(rows * patch, columns * patch)
        return rearrange(rays, "b f c (h i) (w j) -> b f (h w) (c i j)", i=patch, j=patch)
