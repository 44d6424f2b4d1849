"""Metrics of the registry beyond cameras and likeness: networks from files, seams, returns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line, run
from torch import Tensor, nn

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import parse_json
from minwm.core.media import write_video
from minwm.eval.metrics import measure
from minwm.eval.perceptual import frechet_distance
from minwm.eval.revisit import measure_gated, measure_returns
from minwm.eval.source import Video, VideoSource

line = pytest.fixture(error_line)


class Distance(nn.Module):
    """Called as `lpips.LPIPS` and `dreamsim.PerceptualModel` are; random features."""

    def __init__(self, low: float, rows: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.low, self.rows = low, rows

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.min() >= self.low and a.max() <= 1 and a.shape[-2] == self.rows
        return (self.features(a) - self.features(b)).square().mean([1, 2, 3])


class I3D(nn.Module):
    """Called as the file of StyleGAN-V is."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv3d(3, 400, (3, 32, 32), stride=32)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale and not resize and return_features and x.shape[-1] == 224 and x.abs().max() <= 1
        return self.features(x).mean([2, 3, 4])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    files = {name: folder / f"{name}.pt" for name in ("lpips", "dreamsim", "fvd")}
    for file, network in zip(files.values(), (Distance(-1.0, 24), Distance(0.0, 224), I3D()), strict=True):
        torch.jit.script(network).save(str(file))
    return files


def source(noise: float, count: int = 4) -> VideoSource:
    def video(name: str) -> Video:
        rng = np.random.default_rng(int(name))
        truth = rng.integers(30, 220, (17, 24, 24, 3))
        shown = truth + noise * rng.normal(size=truth.shape)
        real = truth.astype(np.uint8)
        return Video(name, shown.clip(0, 255).astype(np.uint8), 8.0, reference=real, truth=real)

    return VideoSource([str(i) for i in range(count)], video)


def test_networks_from_files_read_the_difference(weights: dict[str, Path]) -> None:
    equal, near, far = (measure(source(noise), [*weights], weights=weights).scores for noise in (0.0, 5.0, 60.0))
    for name in weights:
        values = [found[name][name].mean.value for found in (equal, near, far)]
        assert values[0] == pytest.approx(0, abs=1e-9) and values[0] < values[1] < values[2], name
    assert far["lpips"]["lpips"].videos.keys() == {"0", "1", "2", "3"} and far["fvd"]["fvd"].videos == {}
    alone = measure(source(0.0, count=1), ["fvd"], weights=weights)
    assert alone.scores == {} and "nothing to judge" in alone.skipped["fvd"], "one window is no set"


def test_without_a_file_it_is_said_what_is_needed(weights: dict[str, Path]) -> None:
    skipped = measure(source(0.0), ["lpips", "flip"]).skipped
    assert skipped == {"lpips": "skipped: it needs weights, --weights lpips=FILE: lpips.LPIPS"}
    one = Video("one", np.zeros((1, 24, 24, 3), np.uint8), 8.0, reference=np.zeros((1, 24, 24, 3), np.uint8))
    alone = measure(VideoSource(["one"], lambda _: one), ["likeness", "flip"])
    assert alone.scores == {} and alone.skipped.keys() == {"likeness", "flip"}, "the first frame may be given"
    found = measure(source(0.0), weights=weights)
    assert not found.skipped.keys() & weights.keys() and found.weights.keys() == weights.keys()


def test_bad_files_are_refused_before_any_work(tmp_path: Path, line: Callable[[], str]) -> None:
    (tmp_path / "notes.pt").write_text("no network")
    words = ("eval", "--videos", tmp_path, "--weights")
    for weights, message in {
        "lpips": "write METRIC=FILE",
        "lpips=none.pt": "there is no such file",
        f"flip={tmp_path}/notes.pt": "flip takes none",
        f"lpip={tmp_path}/notes.pt": "did you mean 'lpips'",
    }.items():
        assert run(*words, weights) == 2 and message in line()
    write_video(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 4.0)
    assert run(*words, f"lpips={tmp_path}/notes.pt") == 2 and "is no TorchScript file" in line()
    assert run("eval", "--videos", tmp_path, "--estimator", "colmp") == 2 and "did you mean 'colmap'" in line()
    assert run("eval", "--model", tmp_path, "--metrics", "flip") == 2 and "are of --suite" in line()
    assert run(*words[:-1], "--metrics", "texture", "lpips", "--json", tmp_path / "a.json") == 0
    (found,) = parse_json((tmp_path / "a.json").read_text())["videos"].values()
    assert found["skipped"]["lpips"].startswith("skipped: it needs weights")


def test_the_frechet_distance_is_that_of_gaussians(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(60, 3)) * (1, 2, 3), rng.normal(size=(80, 3)) @ rng.normal(size=(3, 3)) + 1
    one, two = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_a_seam_is_a_change_where_chunks_meet() -> None:
    chunks = [(0, 1), (1, 9), (9, 17), (17, 25)], 4
    steady = np.cumsum(np.full((25, 8, 8, 3), 2), 0).astype(np.uint8)
    jumps = steady.copy()
    jumps[9:] += 4
    jumps[17:] += 4
    videos = {
        "steady": Video("steady", steady, 8.0, chunks=chunks),
        "jumps": Video("jumps", jumps, 8.0, chunks=chunks),
        "as true": Video("as true", jumps, 8.0, reference=jumps, chunks=chunks),
    }
    seams = measure(VideoSource([*videos], videos.__getitem__), ["seams"]).scores["seams"]["seam"].videos
    assert seams == pytest.approx({"steady": 1, "jumps": 3, "as true": 1})


def test_returns_compare_what_is_seen_from_one_pose(rng: np.random.Generator) -> None:
    motion, K = Motion(move=0.5, turn=16.0, fps=8.0), intrinsics(70.0, 16, 16)
    track = parse("l*4,j*4").track(motion, K)
    out = rng.integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    remembers = np.concatenate([out, out[:-1][::-1]])
    forgets = np.concatenate([out, rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)])
    kept, lost, still = (
        measure_returns(frames, track) for frames in (remembers, forgets, np.repeat(out[:1], len(track), 0))
    )
    assert min(kept["consistency"]) > 50 and min(kept["gain"]) > 40
    assert (
        max(lost["consistency"]) < 10 and abs(np.mean(lost["gain"])) < 1 and still["gain"] == [0.0] * len(kept["gain"])
    )
    for path in ("l*8", "static*8"):
        other = parse(path).track(motion, K)
        assert measure_returns(remembers, other) == measure_gated(remembers, other) == {}


def test_the_gate_takes_the_marks_of_what_never_changes(rng: np.random.Generator) -> None:
    track = parse("l*4,j*4").track(Motion(move=0.5, turn=16.0, fps=8.0), intrinsics(70.0, 16, 16))
    out = rng.integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    remembers, still = np.concatenate([out, out[:-1][::-1]]), np.repeat(out[:1], 33, 0)
    faint = still + (np.arange(33) % 32 > 0).astype(np.uint8)[:, None, None, None]
    every = [measure_gated(frames.astype(np.uint8), track) for frames in (remembers, faint, still)]
    assert all(values[name][0] > 0.99 for values in every[:1] for name in values)
    psnr, ssim = ([values[name][0] for values in every] for name in ("gated_psnr", "gated_ssim"))
    assert psnr[0] > psnr[1] > psnr[2] and ssim[0] > ssim[1] >= ssim[2] == 0 and psnr[2] < 0.01
