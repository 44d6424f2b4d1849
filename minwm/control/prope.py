"""PRoPE, projective positional encoding: attention sees cameras only through P_f P_g^-1 (paper Sec. 2.1).

With P_f = lift(K_f) V_f, V_f world-to-camera, and ^ the GTA form, queries, keys, values and outputs become
q' = P_f^T q,  k' = P_g^-1 k,  v' = P_g^-1 v,  o = P_f Attn(q', k', v'), so that q'.k' = q^T P_f P_g^-1 k.
A common rigid motion of the world cancels. Matrices are one per frame, float32, never per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import se3_inverse

Mode = Literal["none", "dual", "single", "plucker"]
"""none: no camera · dual: a zero-initialised second attention branch, every channel projective (the released
weights) · single: one branch, half of the channels projective, the rest RoPE over x and y (the PRoPE paper's form) ·
plucker: no PRoPE, ray maps added to tokens (control/plucker.py)."""

Tokens = Float[Tensor, "b s a e"]


@dataclass(frozen=True)
class Projection:
    """Matrices of every latent frame, computed once per forward (or per streamed chunk)."""

    matrices: Float[Tensor, "3 b f 4 4"]
    """P, P^-T and P^T: what rows of queries, of keys and values, and of outputs are multiplied by."""

    @classmethod
    def from_cameras(
        cls, w2c: Float[Tensor, "b f 4 4"], K: Float[Tensor, "b f 4"], principal_point: bool = True
    ) -> "Projection":
        """P = lift(K) V with image coordinates from -1/2 to 1/2: K = [[fx, 0, cx - 1/2], [0, fy, cy - 1/2], [0, 0, 1]].

        Without `principal_point` it is taken to be the middle of the picture, whatever K says.
        """
        w2c, K = w2c.float(), K.float()
        focal = torch.cat([K[..., :2], torch.ones_like(K[..., :2])], dim=-1)  # diag(fx, fy, 1, 1)
        with torch.autocast(w2c.device.type, enabled=False):  # a camera in bfloat16 is another camera
            forward, inverse = focal[..., :, None] * w2c, se3_inverse(w2c) / focal[..., None, :]
        if principal_point:
            offset = K[..., 2:] - 0.5
            forward[..., :2, :] += offset[..., None] * w2c[..., 2:3, :]
            inverse[..., 2] -= (inverse[..., :2] * offset[..., None, :]).sum(-1)
        return cls(torch.stack([forward, inverse.mT, forward.mT]))

    def queries(self, q: Tokens) -> Tokens:
        return _per_frame(q, self.matrices[0])  # rows: (P^T q)^T = q^T P

    def keys(self, k: Tokens) -> Tokens:
        """Also for values."""
        return _per_frame(k, self.matrices[1])

    def queries_and_keys(self, qk: Float[Tensor, "2 b s a e"]) -> Float[Tensor, "2 b s a e"]:
        """Both in one product."""
        return _per_frame(qk, self.matrices[:2])

    def outputs(self, o: Tokens) -> Tokens:
        return _per_frame(o, self.matrices[2])


def _per_frame(x: Float[Tensor, "*n s a e"], matrix: Float[Tensor, "*n f 4 4"]) -> Float[Tensor, "*n s a e"]:
    """Row vectors x, in groups of four consecutive channels, times their frame's matrix: one batched matmul."""
    matrix = matrix.reshape(-1, 4, 4)
    return _times(x.reshape(len(matrix), -1, 4), matrix).view(x.shape)


def _times(rows: Float[Tensor, "n r 4"], matrix: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n r 4"]:
    """rows @ matrix in float32 at least, whatever the dtype of rows: a camera in bfloat16 is another camera."""
    if torch.is_autocast_enabled(kind := rows.device.type):
        with torch.autocast(kind, enabled=False):
            return _times(rows, matrix)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    rows, matrix, dtype = rows.to(wide), matrix.to(rows.device, wide), rows.dtype
    if torch.compiler.is_compiling():  # a sum of four products fuses with what is around it, a matrix product never
        return (rows[..., None] * matrix[:, None]).sum(-2).to(dtype)
    return (rows @ matrix).to(dtype)


def change_world_frame(kv: Float[Tensor, "b a s e"], frame: Float[Tensor, "b 4 4"]) -> Float[Tensor, "b a s e"]:
    """Projective keys or values after the world's frame has moved to the pose `frame` (given in the old frame).

    V_g becomes V_g F, so P_g^-1 k becomes F^-1 P_g^-1 k: one rigid motion for all of them.
    """
    return _times(kv.reshape(len(kv), -1, 4), se3_inverse(frame).mT).view(kv.shape)
