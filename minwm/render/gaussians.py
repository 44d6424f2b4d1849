"""3D Gaussians (Kerbl et al. 2023), and the .ply files in which they are published.

A vertex of such a file has x y z, nx ny nz (unused), f_dc_0..2, f_rest_0.. (all coefficients of red, then green, blue),
opacity (before the sigmoid), scale_0..2 (logarithms) and rot_0..3 (a quaternion w x y z of any length), all float32.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import UserError
from minwm.core.files import atomic

MAX_DEGREE = 3
MAX_HEADER = 65536
TYPES = {"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "float": "<f4",
         "double": "<f8", "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4",
         "float32": "<f4", "float64": "<f8"}  # fmt: skip
"""Types of properties, in both spellings, as those of numpy."""
Y0 = 0.5 / math.sqrt(math.pi)
"""The spherical harmonic of degree 0."""


class SplatError(UserError):
    """A file of Gaussians cannot be used; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A scene of n Gaussians, each field as it is optimised and stored."""

    means: Float[Tensor, "n 3"]
    """World coordinates."""
    log_scales: Float[Tensor, "n 3"]
    """Logarithms of the standard deviations along the own axes."""
    rotations: Float[Tensor, "n 4"]
    """Quaternions w x y z of any length."""
    opacities: Float[Tensor, " n"]
    """Before the sigmoid."""
    sh: Float[Tensor, "n k 3"]
    """Coefficients of the colour in spherical harmonics; k is 1, 4, 9 or 16 for the degrees 0 to 3."""

    def __len__(self) -> int:
        return len(self.means)

    def to(self, device: torch.device | str) -> "Gaussians":
        return Gaussians(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def scaled(self, factor: float) -> "Gaussians":
        """The same scene in other units: lengths times `factor`."""
        return replace(self, means=self.means * factor, log_scales=self.log_scales + math.log(factor))

    def covariances(self) -> Float[Tensor, "n 3 3"]:
        w, x, y, z = torch.nn.functional.normalize(self.rotations, dim=-1).unbind(-1)
        rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
        rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
        rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        half = torch.stack(rows, -1).unflatten(-1, (3, 3)) * self.log_scales.exp()[:, None]
        return half @ half.mT

    def colours(self, eye: Float[Tensor, "3"]) -> Float[Tensor, "n 3"]:
        """As seen from a point: 0 is black, 1 full."""
        basis = harmonics(torch.nn.functional.normalize(self.means - eye, dim=-1), self.sh.shape[1])
        return ((basis[..., None] * self.sh).sum(1) + 0.5).clamp(min=0)


def harmonics(d: Float[Tensor, "n 3"], count: int) -> Float[Tensor, "n k"]:
    """The first `count` real spherical harmonics of unit vectors, with the signs and order of the published files."""
    x, y, z = d.unbind(-1)
    one, xx, yy, zz = torch.ones_like(x), x * x, y * y, z * z
    c1, c2, c3 = math.sqrt(3 / math.pi) / 2, math.sqrt(15 / math.pi) / 2, math.sqrt(35 / (2 * math.pi)) / 4
    every = [Y0 * one, -c1 * y, c1 * z, -c1 * x]
    every += [c2 * x * y, -c2 * y * z, math.sqrt(5 / math.pi) / 4 * (3 * zz - 1), -c2 * x * z, c2 / 2 * (xx - yy)]
    c4, c5 = math.sqrt(105 / math.pi) / 4, math.sqrt(21 / (2 * math.pi)) / 4
    every += [-c3 * y * (3 * xx - yy), 2 * c4 * x * y * z, -c5 * y * (5 * zz - 1)]
    every += [math.sqrt(7 / math.pi) / 4 * z * (5 * zz - 3), -c5 * x * (5 * zz - 1), c4 * z * (xx - yy)]
    every += [-c3 * x * (xx - 3 * yy)]
    return torch.stack(every[:count], -1)


# ---------------------------------------------------------------------------------------------
# Files


def _names(rest: int) -> list[str]:
    """Properties of a vertex with so many coefficients per channel beyond degree 0, in the published order."""
    return [
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *(f"f_rest_{i}" for i in range(3 * rest)),
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    ]


def write_ply(path: Path, scene: Gaussians) -> None:
    rest = scene.sh.shape[1] - 1
    parts = [scene.means, torch.zeros_like(scene.means), scene.sh[:, 0], scene.sh[:, 1:].mT.flatten(1)]
    parts += [scene.opacities[:, None], scene.log_scales, scene.rotations]
    table = torch.cat(parts, 1).detach().cpu().numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in _names(rest))
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(scene)}\n{properties}end_header\n"
    with atomic(path) as partial:
        partial.write_bytes(head.encode() + table.tobytes())


def read_ply(path: Path) -> Gaussians:
    """Gaussians of degree 0 to 3; the order of properties is free, others are left out. SplatError for other files."""
    try:
        with path.open("rb") as file:
            head = b""
            while not head.endswith(b"end_header\n"):
                line = file.readline(MAX_HEADER)
                head += line
                if not line or len(head) > MAX_HEADER or not head.startswith(b"ply"):
                    raise SplatError(f"{path}: no .ply file (it lacks a header)")
            count, row = _layout(head.decode("ascii", "replace"), path)
            left = path.stat().st_size - file.tell()
            if left < count * row.itemsize:
                raise SplatError(f"{path}: cut off: {left} bytes for {count} vertices of {row.itemsize}; copy it again")
            table = np.frombuffer(file.read(count * row.itemsize), row)
    except OSError as error:
        raise SplatError(f"{path}: cannot be read: {error.strerror}") from error
    return _from_table(table, path)


def _layout(head: str, path: Path) -> tuple[int, np.dtype]:
    """Number of vertices and their numpy type."""
    lines = [line.split() for line in head.replace("\r", "").splitlines()]
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise SplatError(f"{path}: its format is not binary_little_endian 1.0; save it so")
    elements = [i for i, words in enumerate(lines) if words[:1] == ["element"]]
    try:
        name, count = lines[elements[0]][1], int(lines[elements[0]][2])
        end = elements[1] if len(elements) > 1 else len(lines)
        properties = [words for words in lines[elements[0] : end] if words[:1] == ["property"]]
        row = np.dtype([(words[2], TYPES[words[1]]) for words in properties])
    except (IndexError, ValueError, KeyError) as error:
        raise SplatError(f"{path}: its header is damaged, or has lists in its first element ({error})") from error
    if name != "vertex" or count < 1:
        raise SplatError(f"{path}: it begins with {count} of {name!r}; Gaussians are the vertices")
    return count, row


def _from_table(table: np.ndarray, path: Path) -> Gaussians:
    held = set(table.dtype.names or ())
    rest = sum(name.startswith("f_rest_") for name in held) // 3
    if rest + 1 not in [(degree + 1) ** 2 for degree in range(MAX_DEGREE + 1)]:
        raise SplatError(f"{path}: {3 * rest} f_rest properties; the degrees 0 to 3 have 0, 9, 24 and 45")
    if missing := [name for name in _names(rest) if name not in held and name not in ("nx", "ny", "nz")]:
        raise SplatError(f"{path}: no Gaussians (it lacks {', '.join(missing[:4])})")

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([table[name].astype(np.float32) for name in names], 1))

    coefficients = [columns(*(f"f_dc_{i}" for i in range(3)))[:, None]]
    if rest:
        coefficients.append(columns(*(f"f_rest_{i}" for i in range(3 * rest))).unflatten(1, (3, rest)).mT)
    scene = Gaussians(
        columns("x", "y", "z"),
        columns("scale_0", "scale_1", "scale_2"),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("opacity")[:, 0],
        torch.cat(coefficients, 1),
    )
    for field in fields(scene):
        if not (finite := getattr(scene, field.name).isfinite().flatten(1 if field.name != "opacities" else 0)).all():
            raise SplatError(f"{path}: {field.name} has {int((~finite).sum())} values that are not finite; clean it")
    return scene
