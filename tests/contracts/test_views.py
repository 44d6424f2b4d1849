"""Views that are known of a world: clips go on from the nearest of them, in training as in streams."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import latents
from recipes import FRAMES, MODEL, clip, every_turn, make, seeded

from minwm.cameras.track import CameraTrack, se3_exp, se3_inverse
from minwm.core.config import ConfigError
from minwm.core.types import Clip, Views
from minwm.data import views as views_module
from minwm.data.clips import DataError
from minwm.data.dataset import ShardDataset
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.data.views import DrawnLatents, read_views
from minwm.nets.chunks import StreamConfig
from minwm.nets.text import WordText
from minwm.play.scenario import StartState, model_scenario
from minwm.recipes import dmd
from minwm.recipes.dmd import Dmd, DmdConfig, back_and_forth
from minwm.recipes.ops import random_part, with_views
from minwm.render.place import HOURS, Place
from minwm.session.session import walk
from minwm.session.views import Viewpoint, known_views
from minwm.store.folder import save_codec
from minwm.store.model import Model
from minwm.stream.memory import view_distances
from minwm.stream.rollout import Stream, generate_latents, sample_noise
from minwm.stream.solvers import BidirectionalSampler, Noise

REMEMBERS = StreamConfig(chunk=1, sink=0, window=3, retrieved=2, recompute="causal")


def scattered(whole: Clip, count: int, seed: int = 0) -> tuple[Views, ...]:
    """So many views of each clip's world around its cameras, in its frame."""
    generator, found = seeded(seed), list[Views]()
    for i, w2c in enumerate(whole.cond.cameras[0]):
        twists = 0.5 * torch.randn(count, 6, generator=generator, dtype=torch.float64)
        poses = torch.from_numpy(se3_exp(twists.numpy())) @ w2c[torch.arange(count) % FRAMES].double()
        K = whole.cond.cameras[1][i, :1].expand(count, 4)
        found.append(Views.of(dict(enumerate(latents(count, 1, seed=50 + i)[0])), poses, K))
    return tuple(found)


def test_views_come_before_a_part_of_a_clip_where_they_stand_in_its_world() -> None:
    whole = clip()
    whole = replace(whole, views=scattered(whole, 6))
    for seed in range(9):
        part = random_part(whole, 3, seeded(seed))
        seen = with_views(part, 2, seeded(seed))
        assert seen.cond.given == 2 and torch.equal(seen.latents[:, 2:], part.latents)
        assert seen.trajectory is not None and part.trajectory is not None
        assert torch.equal(seen.trajectory[:, :, 2:], part.trajectory)
        assert torch.equal(seen.trajectory[:, :, :2], seen.latents[None, :, :2].expand(3, -1, -1, -1, -1, -1))
        for i, known in enumerate(whole.views):
            chosen = [next(k for k in range(6) if torch.equal(known.latents[k], x)) for x in seen.latents[i, :2]]
            newest = next(k for k in range(FRAMES) if torch.equal(whole.latents[i, k], part.latents[i, 2]))
            own, got = whole.cond.cameras[0][i, newest].double(), seen.cond.cameras[0][i].double()
            there = known.w2c[chosen] @ se3_inverse(own)
            torch.testing.assert_close(got[:2] @ se3_inverse(got[4]), there, atol=1e-5, rtol=1e-5)


def test_near_is_what_is_close_and_looks_the_same_way() -> None:
    def camera(x: float, degrees: float) -> torch.Tensor:
        c2w = se3_exp(np.array([0, 0, 0, 0, np.radians(degrees), 0]))
        c2w[:3, 3] = x, 0, 0
        return torch.from_numpy(se3_inverse(c2w))

    views = torch.stack([camera(0, 40), camera(1, 0), camera(0.5, 12), camera(0, -180), camera(-3, 0)])
    known = Views.of({}, views, torch.ones(5, 4))
    expected = torch.tensor([40 / 30, 1, 0.5 + 12 / 30, 6, 3])
    torch.testing.assert_close(view_distances(camera(0, 0), known), expected, atol=2e-2, rtol=0)
    assert view_distances(camera(-3, 170), known).argmin() == 3


@every_turn
def test_every_recipe_learns_what_comes_after_views(name: str, step: int) -> None:
    recipe, losses = make(name, replace(MODEL, stream=REMEMBERS), latents=3), []
    for seed in (0, 0, 1):
        whole = clip()
        losses.append(
            float(recipe.loss(replace(whole, views=scattered(whole, 6, seed)), step, seeded()).total.detach())
        )
    assert losses[0] == losses[1] != losses[2], "other views are another clip"
    whole = clip()
    with pytest.raises(ConfigError, match=r"stream.retrieved=2, and only 1 views are known"):
        recipe.loss(replace(whole, views=scattered(whole, 1)), step, seeded())


@pytest.mark.parametrize("frames", [2, FRAMES])
@pytest.mark.parametrize("long", [0.0, 1.0])
def test_a_student_with_views_is_scored_on_what_its_stream_makes(
    long: float, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that has gone on along its clip: after views near to what is scored, with cameras where they stand
    in the world."""
    whole, drawn = clip(), list[Noise]()
    whole = replace(whole, cond=whole.cond.without_image(), views=scattered(whole, 6))
    recipe = make("dmd", replace(MODEL, stream=REMEMBERS), latents=frames, long_rollouts=long, max_prefix_chunks=4)
    assert isinstance(recipe, Dmd)
    monkeypatch.setattr(dmd, "sample_noise", lambda *given: drawn.append(sample_noise(*given)) or drawn[0])
    own, x0, truth, known = recipe._rollout(whole, [None] * len(whole.latents), seeded(1))
    start = drawn[0].shape[2] - frames
    path = back_and_forth(FRAMES, start + frames)
    assert (start > 0) == bool(long)
    net, sampler, cond = recipe.networks["student"], recipe.sampler, whole.cond.at(path)
    video = generate_latents(net, sampler, drawn[0], cond, recipe.geometry, whole.views)[:, start:]
    assert own.cond.given == 2
    assert torch.equal(truth, torch.cat([own.latents[:, :2], whole.latents[:, path[start:]]], dim=1))
    assert known.tolist() == [False] * 2 + (path.diff(prepend=torch.tensor([-1])) > 0)[start:].tolist()
    torch.testing.assert_close((own.latents[:, 2:], x0[:, 2:]), (video, video), atol=1e-5, rtol=1e-4)
    for i, known in enumerate(whole.views):
        chosen = [next(k for k in range(6) if torch.equal(known.latents[k], x)) for x in own.latents[i, :2]]
        poses = torch.cat([known.w2c[chosen], cond.cameras[0][i, start:].double()])
        there = poses @ se3_inverse(poses[:1])
        torch.testing.assert_close(own.cond.cameras[0][i].double(), there, atol=1e-5, rtol=1e-5)


def test_views_need_streams_that_see_some() -> None:
    whole = clip()
    with pytest.raises(ConfigError, match="a bidirectional model makes whole clips without them"):
        sampler = BidirectionalSampler(steps=1)
        generate_latents(
            make("dmd").networks["student"],
            sampler,
            whole.latents[None],
            whole.cond,
            MODEL.geometry,
            scattered(whole, 6),
        )
    with pytest.raises(ConfigError, match=r"dmd.views=pictures: set model.stream.retrieved"):
        DmdConfig(views=Path("pictures")).check(MODEL)
    with pytest.raises(ConfigError, match="known views are for streams of single latents"):
        Stream(make("dmd").networks["student"], clip().cond, MODEL.geometry, views=scattered(clip(), 6))


@torch.no_grad()
def test_models_are_given_the_pictures_that_they_were_trained_with(tmp_path: Path) -> None:
    """Rendered and encoded as data, or known of the scene at the start: the same views of the same worlds."""
    network, text = replace(MODEL.network, text_dim=8, text_length=24), WordText(dim=8, length=24)
    model = replace(MODEL, network=network, text=text, stream=REMEMBERS, scenes="place", height=32, width=32)
    torch.manual_seed(0)
    codec = model.codec.build()
    whole = Model(model, model.network.build(), codec)
    size = {"height": 32, "width": 32, "focal": model.focal, "motion": model.motion, "scenes": "place"}
    for name, count, length in (("pictures", 8, 1), ("walks", 4, FRAMES)):
        raw = tmp_path / f"{name}-raw"
        render_worlds(raw, RenderConfig(latents=length, **size), clips=count)
        encode_clips(raw, tmp_path / name, whole.codec, model.text, cfg=EncodeConfig(val=0))
    views = read_views(tmp_path / "pictures", model.clip_spec)
    save_codec(tmp_path / "codec", codec)
    drawn = DmdConfig(views=tmp_path / "codec").known_views(model)
    assert drawn and sorted(views) == sorted(drawn) == [f"place {hour}" for hour in range(len(HOURS))]
    assert DmdConfig(views=tmp_path / "pictures").known_views(model) is views
    walks = ShardDataset(tmp_path / "walks", "train", image_start=True, spec=model.clip_spec, views=drawn)
    for i in range(len(walks)):
        record, given = walks[i].record, walks.batch([i]).views[0]
        assert record.seed is not None and record.origin is not None
        (known,) = known_views(whole, [Viewpoint(Place(record.seed), record.origin)])
        assert torch.equal(given.origin, known.origin) and torch.equal(given.latents[7], known.latents[7])
        filmed = views[record.world]
        track = CameraTrack(se3_inverse(filmed.w2c.numpy()), model.intrinsics, model.motion.fps)
        again = DrawnLatents(Place(record.seed), track, (32, 32), whole.codec)
        for k in (0, 1):  # one was a video file
            torch.testing.assert_close(filmed.latents[k], again[k], atol=0.05, rtol=0.05)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(filmed.latents[k], again[1 - k], atol=0.05, rtol=0.05)
    views = {world: known for world, known in drawn.items() if world != "place 2"}
    with pytest.raises(DataError, match="no views of 'place 2'"):
        ShardDataset(tmp_path / "walks", "train", spec=model.clip_spec, views=views).batch(range(4))
    elsewhere = Model(replace(model, scenes="worlds"), whole.net, whole.codec)
    image = np.zeros((32, 32, 3), np.uint8)
    for start in (
        lambda model: known_views(model, [Viewpoint(Place(0), np.eye(4)), None]),
        lambda model: model_scenario(model, "own image", StartState(prompt="a room", image=image)),
        lambda model: walk(model, "a room", image),
    ):
        with pytest.warns(UserWarning, match="trained with views of the place; started elsewhere"):
            start(whole)
        with warnings.catch_warnings(action="error"):
            start(elsewhere)


def test_drawn_views_are_held_while_they_are_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "HELD", 2)
    place = Place(0)
    track = CameraTrack(place.viewpoints[:3], MODEL.intrinsics, 16.0)
    drawn = DrawnLatents(place, track, (32, 32), MODEL.codec.build())
    first = drawn[0]
    assert drawn[0] is first and drawn[1] is not first and [*drawn] == [0, 1]
    assert drawn[2] is not first and [*drawn] == [1, 2]
    assert drawn[0] is not first and torch.equal(drawn[0], first)
