"""3D Gaussians: their files, what a view of them shows, its gradients, and fitting them."""

import math
import types
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from minwm.cameras.track import CameraTrack, from_quaternion, look_at
from minwm.render import splats
from minwm.render.gaussians import Gaussians, SplatError, harmonics, read_ply, write_ply
from minwm.render.splat_fit import Capture, FitConfig, fit, held_out, psnr, start
from minwm.render.splats import View, draw

W2C = torch.from_numpy(np.linalg.inv(look_at((0.3, -0.4, -3.0), (0.1, 0.0, 0.2))))


def scene(count: int, degree: int = 0, seed: int = 0) -> Gaussians:
    """Random Gaussians around the origin, float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    sizes = 0.4 * normal(count, 3) - 1.2
    return Gaussians(
        0.7 * normal(count, 3), sizes, normal(count, 4), normal(count), normal(count, (degree + 1) ** 2, 3)
    )


def view(height: int, width: int) -> View:
    return View(W2C, torch.tensor([0.9 * width, 1.1 * width, 0.48 * width, 0.53 * height]).double(), height, width)


def rasterization(
    *, means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,  # noqa: N803
    width: int, height: int, near_plane: float, eps2d: float, render_mode: Literal["RGB+ED"], packed: bool,
) -> tuple[Tensor, Tensor, dict[str, object]]:  # fmt: skip
    """The definition, pixel by pixel, with the signature and the results of gsplat's function of this name.

    The covariance on the screen is that of the projection's finite differences at the mean, but at most 0.3 of the half
    picture beyond an edge.
    """
    assert (render_mode, packed) == ("RGB+ED", False)
    w2c, K = viewmats[0].double().numpy(), Ks[0].double().numpy()
    focal, centre, size = K[[0, 1], [0, 1]], K[:2, 2], np.array([width, height])
    margin = 0.3 * 0.5 * size / focal

    def place(x: np.ndarray) -> np.ndarray:
        return x[:2] / x[2] * focal + centre

    order, on_screen = [], {}
    for i, mean in enumerate(means.double().numpy()):
        local = w2c[:3, :3] @ mean + w2c[:3, 3]
        if local[2] <= near_plane:
            continue
        slopes = np.clip(local[:2] / local[2], -centre / focal - margin, (size - centre) / focal + margin)
        at, steps = np.array([*slopes, 1.0]) * local[2], np.eye(3) * 1e-6
        axes = w2c[:3, :3] @ from_quaternion(np.roll(quats[i].double().numpy(), -1)) * scales[i].double().numpy()
        jacobian = np.stack([(place(at + step) - place(at - step)) / 2e-6 for step in steps], 1)
        covariance = jacobian @ axes @ axes.T @ jacobian.T + eps2d * np.eye(2)
        on_screen[i] = (place(local), np.linalg.inv(covariance), local[2])
        order.append((local[2], i))
    out, alphas = torch.zeros(1, height, width, 4), torch.zeros(1, height, width, 1)
    for row in range(height):
        for column in range(width):
            left, total = 1.0, np.zeros(4)
            for _, i in sorted(order):
                middle, precision, depth = on_screen[i]
                off = np.array([column + 0.5, row + 0.5]) - middle
                alpha = min(0.999, float(opacities[i]) * math.exp(-0.5 * off @ precision @ off))
                if alpha >= 1 / 255:
                    total += left * alpha * np.array([*colors[0, i].tolist(), depth])
                    left *= 1 - alpha
            total[3] /= max(1 - left, 1e-10)
            out[0, row, column], alphas[0, row, column] = torch.from_numpy(total), 1 - left
    return out, alphas, {}


def test_one_gaussian_on_the_axis_is_a_bell_of_the_projected_size() -> None:
    one = Gaussians(
        torch.tensor([[0.0, 0, 4]]),
        torch.full((1, 3), math.log(0.2)),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([math.log(0.8 / 0.2)]),
        torch.zeros(1, 1, 3),
    )
    drawn = draw(one, View(torch.eye(4), torch.tensor([40.0, 40.0, 10.0, 10.0]), 20, 20))
    x = torch.arange(20) + 0.5 - 10
    bell = 0.8 * torch.exp(-(x[:, None] ** 2 + x**2) / (2 * (4.0 + 0.3)))  # 40 * 0.2 / 4 pixels, and the low-pass
    bell = bell.where(bell >= 1 / 255, 0.0)
    assert (drawn.alpha - bell).abs().max() < 1e-6
    assert (drawn.colour - 0.5 * bell[..., None]).abs().max() < 1e-6
    assert (drawn.depth[drawn.alpha > 0] - 4).abs().max() < 1e-5


@pytest.mark.parametrize("way", ["torch", "gsplat"])
def test_many_gaussians_are_blended_as_defined(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 x 21 pixels are no whole tiles; some Gaussians are behind the camera or beside the picture."""
    many, seen = scene(25, degree=2), view(21, 37)
    many = replace(many, means=torch.cat([many.means, -5 * seen.w2c[2:3, :3], 9 * seen.w2c[:1, :3]])[2:])
    found = draw(many, seen)
    fx, fy, cx, cy = seen.K.tolist()
    reference, alpha, _ = rasterization(
        means=many.means, quats=many.rotations, scales=many.log_scales.exp(), opacities=many.opacities.sigmoid(),
        colors=many.colours(torch.linalg.inv(W2C)[:3, 3])[None], viewmats=W2C[None],
        Ks=torch.tensor([[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]]), width=37, height=21, near_plane=0.01, eps2d=0.3,
        render_mode="RGB+ED", packed=False,
    )  # fmt: skip
    if way == "gsplat":
        monkeypatch.setitem(splats.__dict__, "require", lambda *_: types.SimpleNamespace(rasterization=rasterization))
        found = splats._draw_gsplat(many, seen)
    assert (found.colour - reference[0, ..., :3]).abs().max() < 1e-5
    assert (found.alpha - alpha[0, ..., 0]).abs().max() < 1e-5
    assert (found.depth - reference[0, ..., 3]).abs().max() < 1e-4
    assert 0.2 < float(found.alpha.mean()) < 0.999


def test_gradients_reach_every_part_of_a_gaussian() -> None:
    large = scene(4, degree=1)
    large = replace(large, log_scales=large.log_scales + 2)  # alphas stay above the least one
    parts = [getattr(large, field.name).requires_grad_() for field in fields(large)]

    def shown(*values: Tensor) -> Tensor:
        drawn = draw(Gaussians(*values), view(3, 4))
        return torch.cat([drawn.colour.flatten(), drawn.alpha.flatten(), drawn.depth.flatten()])

    assert draw(large, view(3, 4)).alpha.detach().min() > 0.1
    assert torch.autograd.gradcheck(shown, parts, atol=1e-5)


def test_harmonics_are_orthonormal_and_have_the_signs_of_the_published_files() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(8)
    turns = 2 * np.pi * np.arange(16) / 16
    z, turn = (x.ravel() for x in np.meshgrid(nodes, turns, indexing="ij"))
    flat = np.sqrt(1 - z * z)
    points = torch.from_numpy(np.stack([flat * np.cos(turn), flat * np.sin(turn), z], 1))
    basis = harmonics(points, 16)
    products = torch.einsum("n,ni,nj->ij", torch.from_numpy(np.repeat(weights, 16) * 2 * np.pi / 16), basis, basis)
    assert (products - torch.eye(16)).abs().max() < 1e-12
    (along,) = harmonics(torch.tensor([[2.0, 3.0, 6.0]]) / 7, 4)
    assert [math.copysign(1, x) for x in along.tolist()] == [1, -1, 1, -1]
    assert along[1:].abs().tolist() == pytest.approx([0.4886025 * x / 7 for x in (3, 6, 2)])


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_files_keep_every_number(degree: int, tmp_path: Path) -> None:
    given = Gaussians(*(getattr(scene(5, degree), field.name).float() for field in fields(Gaussians)))
    write_ply(tmp_path / "a.ply", given)
    back = read_ply(tmp_path / "a.ply")
    for field in fields(given):
        assert torch.equal(getattr(back, field.name), getattr(given, field.name)), field.name


PUBLISHED = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
    *(f"f_rest_{i}" for i in range(9)),
    *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def ply(names: tuple[str, ...], values: np.ndarray, kind: str = "float", count: int | None = None) -> bytes:
    head = "".join(f"property {kind} {name}\n" for name in names)
    lines = (
        f"ply\nformat binary_little_endian 1.0\ncomment x\nelement vertex {count or len(values)}\n{head}end_header\n"
    )
    return lines.encode() + values.astype("<f4" if kind == "float" else "<f8").tobytes()


def test_a_published_file_is_read_by_the_names_of_its_properties(tmp_path: Path) -> None:
    values = np.arange(2.0 * len(PUBLISHED)).reshape(2, -1)
    column = {name: values[1, i] for i, name in enumerate(PUBLISHED)}
    (tmp_path / "a.ply").write_bytes(ply(PUBLISHED, values))
    (tmp_path / "b.ply").write_bytes(ply(("extra", *PUBLISHED[::-1]), np.c_[[9, 9], values[:, ::-1]], "double"))
    for name in ("a.ply", "b.ply"):
        found = read_ply(tmp_path / name)
        assert found.means[1].tolist() == [column[name] for name in "xyz"]
        assert found.rotations[1].tolist() == [column[f"rot_{i}"] for i in range(4)]
        assert found.sh[1, 0].tolist() == [column[f"f_dc_{i}"] for i in range(3)]
        assert found.sh[1, 1].tolist() == [column[f"f_rest_{i}"] for i in (0, 3, 6)]  # red, green, blue
        assert float(found.opacities[1]) == column["opacity"]
    write_ply(tmp_path / "c.ply", found)
    head = (tmp_path / "c.ply").read_bytes().split(b"end_header\n")[0].decode()
    assert [line.split()[-1] for line in head.splitlines() if line.startswith("property float")] == [*PUBLISHED]


ROW = np.ones((1, len(PUBLISHED)))
BAD: dict[str, tuple[bytes, str]] = {
    "no ply": (b"hello", "no .ply file"),
    "empty": (b"", "no .ply file"),
    "endless header": (b"ply\n" + b"comment\n" * 20_000, "no .ply file"),
    "text": (ply(PUBLISHED, ROW).replace(b"binary_little_endian", b"ascii"), "not binary_little_endian"),
    "cut off": (ply(PUBLISHED, ROW)[:-4], "cut off"),
    "more than there are": (ply(PUBLISHED, ROW, count=10**12), "cut off"),
    "a mesh": (ply(PUBLISHED[:6], ROW[:, :6]), "no Gaussians .it lacks f_dc_0"),
    "degree": (ply(PUBLISHED[:12] + PUBLISHED[15:], ROW[:, 3:]), "6 f_rest properties"),
    "twice": (ply(("x", *PUBLISHED), np.ones((1, 1 + len(PUBLISHED)))), "header is damaged"),
    "list": (ply(PUBLISHED, ROW).replace(b"float nx", b"list uchar int nx"), "header is damaged"),
    "NaN": (ply(PUBLISHED, ROW * np.nan), "means has 3 values that are not finite"),
}


@pytest.mark.parametrize("fault", BAD)
def test_other_files_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    content, reason = BAD[fault]
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(SplatError, match=f"a.ply: .*{reason}"):
        read_ply(tmp_path / "a.ply")


def captured(pictures: int = 16, size: int = 24) -> Capture:
    """Pictures of some Gaussians before a large one, from an arc."""
    few = scene(60, seed=3)
    truth = Gaussians(
        torch.cat([few.means, torch.tensor([[0.0, 0, 6]])]).float(),
        torch.cat([few.log_scales - 0.5, torch.full((1, 3), 1.5)]).float(),
        torch.cat([few.rotations, torch.tensor([[1.0, 0, 0, 0]])]).float(),
        torch.cat([few.opacities + 2, torch.tensor([9.0])]).float(),
        torch.cat([few.sh, torch.zeros(1, 1, 3)]).float(),
    )
    turns = np.linspace(-0.5, 0.5, pictures)
    c2w = np.stack([look_at((3 * np.sin(a), -0.3, -3 * np.cos(a)), (0, 0, 0)) for a in turns])
    track = CameraTrack(c2w, np.array([1.0, 1.0, 0.5, 0.5]), 8.0)
    empty = Capture(np.zeros((pictures, size, size, 3), np.uint8), track, few.means.numpy())
    return replace(empty, frames=np.stack([draw(truth, empty.view(i, "cpu")).frame() for i in range(pictures)]))


def test_fitting_brings_pictures_that_it_did_not_see_nearer() -> None:
    capture, cfg = captured(), FitConfig(gaussians=400, steps=80)
    unseen = held_out(capture, cfg)
    assert unseen == [4, 12]
    before = psnr(start(capture, [i for i in range(16) if i not in unseen], cfg), capture, unseen)
    fitted = fit(capture, cfg)
    assert len(fitted) == 400
    assert psnr(fitted, capture, unseen) > before + 4
    again = fit(capture, cfg)
    assert torch.equal(again.means, fitted.means)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: replace(captured(), points=np.zeros((3, 3))), "3 points are known"),
        (lambda: held_out(captured(4), FitConfig()), "4 pictures, of which each 8th"),
    ],
)
def test_too_little_to_fit_is_refused(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(SplatError, match=reason):
        make()
