"""Walking around: a session makes what generation makes, can go back, and looks the same for worlds and models."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import minwm
from minwm.bench.stream import random_model
from minwm.cameras.track import CameraTrack, latent_cameras
from minwm.cameras.trajectory import Action, Motion, parse
from minwm.control.action import with_action_labels
from minwm.core.config import UserError
from minwm.core.media import to_frames as to_frames
from minwm.core.media import to_pixels, write_image, write_video
from minwm.core.runtime import generator
from minwm.core.types import Condition
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.render.worlds import World
from minwm.session.engines import Engine, ModelEngine, SceneEngine
from minwm.session.generate import generate, sampling_inputs
from minwm.session.session import Session, walk
from minwm.session.start import read_start_video
from minwm.store.folder import save_model
from minwm.store.model import Model, ModelConfig
from minwm.stream.rollout import generate_latents
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler, Sampler

CONFIG = ModelConfig(
    network=WanConfig(
        dim=32,
        heads=2,
        layers=2,
        ffn=48,
        channels=4,
        text_dim=8,
        text_length=24,
        freq_dim=8,
        camera="dual",
        actions=True,
    ),
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=2),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=7,
    height=32,
    width=32,
    stream=StreamConfig(chunk=2, first_chunk=1, window=2),
)
STREAMING = [
    FewStepSampler(steps=2),
    AutoregressiveSampler(steps=2, guidance=2.0),
    AutoregressiveSampler(steps=2, guidance=1.0),
]
ALONG = "w*2,j*2,d+l*2"
ACTIONS = [Action.of(keys) for keys in (["w"], ["j"], ["d", "l"])]
"""The same way: a chunk is two latents."""


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    net, codec = CONFIG.network.build(), CONFIG.codec.build()
    for part in (net, codec):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Model(CONFIG, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (32, 32, 3), np.uint8)


def with_sampler(model: Model, sampler: Sampler) -> Model:
    return replace(model, config=replace(model.config, sampler=sampler))


def different(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference in grey levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("sampler", STREAMING, ids=str)
@pytest.mark.parametrize("context_noise", [0.0, 0.3])
@torch.no_grad()
def test_session_makes_what_generation_makes(
    model: Model, image: np.ndarray, sampler: Sampler, context_noise: float
) -> None:
    """Codec, cache and cameras stream: frame for frame the whole clip decoded at once, from the same noise."""
    model = with_sampler(model, sampler)
    model = replace(model, config=replace(model.config, stream=replace(CONFIG.stream, context_noise=context_noise)))
    session = Session(ModelEngine(model, image, "a red room", seed=3))
    streamed = list(session.play(ACTIONS))
    assert [len(part) for part in streamed] == [1, 8, 8, 8]

    draws = generator(3, "session")  # as the engine draws it: chunk by chunk
    geometry = model.config.geometry
    shape = (sampler.num_noise_samples(geometry), *CONFIG.latent_shape(1, 2))
    noise = torch.cat([torch.randn(shape, generator=draws) for _ in ACTIONS], dim=2)
    noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise], dim=2)
    w2c, K = latent_cameras([parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics)], 4)
    first = model.codec.encode(to_pixels(image)[None, None])
    cond = with_action_labels(Condition(**CONFIG.text.encode(["a red room"]), w2c=w2c, K=K, first_latents=first))
    latents = generate_latents(model.net, sampler, noise, cond, geometry)
    whole = to_frames(model.codec.decode(latents)[0])
    assert different(np.concatenate(streamed), whole) <= 1
    assert different(whole[1:9], whole[9:17]) > 1


@torch.no_grad()
def test_a_session_starts_with_the_chunk_of_its_image(model: Model, image: np.ndarray) -> None:
    """The image is the first of three latents; the camera stands still during the others, which it determines."""
    stream = replace(CONFIG.stream, first_chunk=3, image_start=True, context_noise=0.2)
    model = replace(model, config=replace(CONFIG, stream=stream))
    geometry, samples = model.config.geometry, FewStepSampler(steps=2).num_noise_samples(model.config.geometry)
    session = Session(ModelEngine(model, image, "a red room", seed=3))
    streamed = list(session.play(ACTIONS))
    assert [len(part) for part in streamed] == [9, 8, 8, 8]
    draws = generator(3, "session")
    shapes = [(samples, *CONFIG.latent_shape(1, frames)) for frames in (3, 2, 2, 2)]
    noise = torch.cat([torch.randn(shape, generator=draws) for shape in shapes], dim=2)
    w2c, K = latent_cameras([parse(f"static*2,{ALONG}").track(CONFIG.motion, CONFIG.intrinsics)], 4)
    first = model.codec.encode(to_pixels(image)[None, None])
    cond = with_action_labels(Condition(**CONFIG.text.encode(["a red room"]), w2c=w2c, K=K, first_latents=first))
    latents = generate_latents(model.net, model.config.sampler, noise, cond, geometry)
    assert different(np.concatenate(streamed), to_frames(model.codec.decode(latents)[0])) <= 1
    assert different(streamed[0][:1], to_frames(model.codec.decode(first)[0])) <= 1
    engine = ModelEngine(model, 255 - image, "a red room", seed=3)
    engine.warm_up()
    other = Session(engine).start()
    assert different(other[-1], streamed[0][-1]) > 1
    with pytest.raises(UserError, match="starts from an image"):
        ModelEngine(model, None, "a red room")


@torch.no_grad()
def test_a_session_goes_on_from_a_video(model: Model, image: np.ndarray, tmp_path: Path) -> None:
    """As generation does, with the video's cameras; poses then count from its last one."""
    made = generate(model, image[None], ["a red room"], ["w*2,l*2,d*2"], seed=1)[0]
    cfg, turned = model.config, parse("w*2,l*2,d*2").track(CONFIG.motion, CONFIG.intrinsics)
    write_video(tmp_path / "v.mp4", np.concatenate([made[:1], made[:1], made]), cfg.motion.fps, crf=0)
    still = parse("static*1").track(CONFIG.motion, CONFIG.intrinsics).slice(0, 3)
    video = read_start_video(tmp_path / "v.mp4", still.continued(turned), cfg)
    np.testing.assert_allclose(video.track.c2w, turned.c2w, atol=1e-12)
    assert video.frames.shape == made.shape and different(video.frames, made) <= 3, "the newest whole chunks"
    session, draws = walk(model, "a red room", video, seed=3), generator(3, "session")
    first, *later = session.play(ACTIONS)
    assert first.shape[0] == 1
    np.testing.assert_allclose(session.pose, parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics).c2w[-1], atol=1e-12)

    track = video.track.continued(parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics))
    _, cond = sampling_inputs(model, video.frames[None], ["a red room"], [track], 3)
    assert cond.first_latents is not None and cond.given == 7 and cond.w2c is not None
    shape = (model.config.sampler.num_noise_samples(model.config.geometry), *CONFIG.latent_shape(1, 2))
    noise = torch.cat([torch.randn(shape, generator=draws) for _ in ACTIONS], dim=2)
    noise = torch.cat([torch.zeros_like(noise[:, :, :1]).repeat(1, 1, 7, 1, 1, 1), noise], dim=2)
    latents = generate_latents(model.net, model.config.sampler, noise, cond, model.config.geometry)
    whole = to_frames(model.codec.decode(latents)[0])
    assert different(np.concatenate([first, *later]), whole[24:]) <= 1
    forgetful = replace(video, frames=np.flip(video.frames, 2).copy())
    assert different(next(iter(Session(ModelEngine(model, forgetful, "a red room", 3)).play([]))), first) > 1


def test_what_is_no_start_video_is_refused(model: Model, tmp_path: Path) -> None:
    frames, fps = np.zeros((13, 32, 32, 3), np.uint8), CONFIG.motion.fps
    track = parse("w*3").track(CONFIG.motion, CONFIG.intrinsics)
    write_video(tmp_path / "v.mp4", frames, fps)
    with pytest.raises(UserError, match="13 frames, and 12 cameras"):
        read_start_video(tmp_path / "v.mp4", track.slice(0, 12), CONFIG)
    write_video(tmp_path / "slow.mp4", frames, fps / 2)
    with pytest.raises(UserError, match=f"{fps / 2:g} frames per second, and this model makes {fps:g}"):
        read_start_video(tmp_path / "slow.mp4", track, CONFIG)
    with pytest.raises(UserError, match="frames are no first chunk; give 17 or more"):
        read_start_video(tmp_path / "v.mp4", track, replace(CONFIG, stream=replace(CONFIG.stream, first_chunk=5)))
    with pytest.raises(UserError, match=r"13 frames is no whole number of chunks; give 1 \+ k \* 8"):
        generate(model, frames[None], ["a room"], ["w*4"])
    with pytest.raises(UserError, match="the start of 9 frames is all of the video"):
        generate(model, frames[None, :9], ["a room"], ["w*2"])


def test_the_camera_is_where_the_actions_lead(model: Model, image: np.ndarray) -> None:
    session = Session(ModelEngine(model, image, "a room"))
    for _ in session.play(ACTIONS):
        pass
    track = parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics)
    np.testing.assert_allclose(session.pose, track.c2w[-1], atol=1e-12)


@pytest.mark.parametrize("sampler", STREAMING, ids=str)
@pytest.mark.parametrize("back", [1, 2, 5])
def test_rewinding_and_acting_again_gives_the_same_frames(
    model: Model, image: np.ndarray, sampler: Sampler, back: int
) -> None:
    """Also when the ring of the cache has overwritten what the past had written: it holds three chunks here."""
    session = Session(ModelEngine(with_sampler(model, sampler), image, "a room", seed=1))
    session.start()
    actions = [Action.of([key]) for key in "wjdslwa"]
    before = [session.step(action) for action in actions]
    session.rewind(back)
    again = [session.step(action) for action in actions[-back:]]
    assert np.array_equal(np.concatenate(before[-back:]), np.concatenate(again))
    session.rewind(back)
    other = session.step(Action.of(["i"]))
    assert not np.array_equal(other, again[0]), "another way leads elsewhere"


def test_rewinding_too_far_is_refused(model: Model, image: np.ndarray) -> None:
    session = Session(ModelEngine(model, image, "a room"))
    session.start()
    session.step(ACTIONS[0])
    with pytest.raises(UserError, match="cannot rewind 2 steps: 1 were made"):
        session.rewind(2)


def test_a_bounded_history_forgets_the_oldest_steps(model: Model, image: np.ndarray) -> None:
    session = Session(ModelEngine(model, image, "a room"), history=2)
    session.start()
    steps = [session.step(action) for action in (*ACTIONS, *ACTIONS)]
    with pytest.raises(UserError, match=r"cannot rewind 3 steps: 2 are kept \(history=2\)"):
        session.rewind(3)
    session.rewind(2)
    assert np.array_equal(session.step(ACTIONS[1]), steps[-2])


@pytest.mark.parametrize("sampler", STREAMING, ids=str)
def test_settling_early_or_late_changes_nothing(model: Model, image: np.ndarray, sampler: Sampler) -> None:
    lazy, eager = (Session(ModelEngine(with_sampler(model, sampler), image, "a room")) for _ in range(2))
    for one, two in zip(lazy.play(ACTIONS), eager.play(ACTIONS), strict=True):
        eager.engine.update_cache()
        assert np.array_equal(one, two)
        assert {"decode", "copy", "cache_update"} <= set(eager.engine.timer.seconds)


@pytest.mark.parametrize("sampler", STREAMING, ids=str)
def test_another_prompt_acts_from_the_next_chunk_on(model: Model, image: np.ndarray, sampler: Sampler) -> None:
    def walk(first: str, then: str) -> list[np.ndarray]:
        engine = ModelEngine(with_sampler(model, sampler), image, first)
        session = Session(engine)
        frames = [session.start(), session.step(ACTIONS[0])]
        engine.set_prompt(then)
        return [*frames, session.step(ACTIONS[1])]

    same, edited = walk("a room", "a room"), walk("a room", "a blue sphere")
    plain = list(Session(ModelEngine(with_sampler(model, sampler), image, "a room")).play(ACTIONS[:2]))
    assert all(np.array_equal(a, b) for a, b in zip(same, plain, strict=True))
    assert np.array_equal(edited[1], same[1]) and not np.array_equal(edited[2], same[2])


@pytest.mark.parametrize("page", ["README.md", "docs/play.md"])
def test_six_lines_walk(page: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines as the pages print them."""
    (lines,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / page).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_model(Path("runs/demo/dmd"), model.config, model.net, model.codec)
    write_image("first.png", np.full((48, 64, 3), 90, np.uint8))
    said: dict[str, Any] = {}
    exec(lines, said)
    assert len([line for line in lines.splitlines() if line]) == 6
    assert said["first"].shape == (1, 32, 32, 3) and said["frames"].shape[1:] == (32, 32, 3)
    assert np.array_equal(said["session"].step(minwm.Action.of("wl")), said["frames"]), "it was undone"


def test_seed_prompt_and_camera_matter(model: Model, image: np.ndarray) -> None:
    def walk(prompt: str = "a room", seed: int = 0, key: str = "w") -> np.ndarray:
        session = Session(ModelEngine(model, image, prompt, seed))
        session.start()
        return session.step(Action.of([key]))

    assert np.array_equal(walk(), walk())
    for other in (walk(prompt="a blue sphere"), walk(seed=1), walk(key="j")):
        assert not np.array_equal(walk(), other)


def test_starting_again_starts_again(model: Model, image: np.ndarray) -> None:
    engine = ModelEngine(model, image, "a room")
    one, two = (np.concatenate(list(Session(engine).play(ACTIONS))) for _ in range(2))
    assert np.array_equal(one, two)


def test_two_sessions_of_one_model_do_not_disturb_each_other(model: Model, image: np.ndarray) -> None:
    alone = list(Session(ModelEngine(model, image, "a room", 1)).play(ACTIONS))
    one, two = (Session(ModelEngine(model, image, "a room", seed)) for seed in (1, 2))
    woven = [part for part, _ in zip(one.play(ACTIONS), two.play(ACTIONS), strict=True)]
    assert np.array_equal(np.concatenate(alone), np.concatenate(woven))


def test_a_bidirectional_model_cannot_be_steered(model: Model, image: np.ndarray) -> None:
    with pytest.raises(UserError, match="bidirectional model makes whole clips"):
        ModelEngine(with_sampler(model, BidirectionalSampler()), image, "a room")


def test_an_image_of_another_size_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match=r"uint8 of shape \(48, 64, 3\), this model sees uint8 of \(32, 32, 3\)"):
        ModelEngine(model, np.zeros((48, 64, 3), np.uint8), "a room")


@pytest.mark.parametrize("sampler", [BidirectionalSampler(steps=2), *STREAMING], ids=str)
def test_generated_clips_start_with_their_image(model: Model, image: np.ndarray, sampler: Sampler) -> None:
    model = with_sampler(model, sampler)
    trajectories = [ALONG, parse("l*6").track(CONFIG.motion, CONFIG.intrinsics)]
    videos = generate(model, np.stack([image, 255 - image]), ["a room", "a hall"], trajectories)
    assert videos.shape == (2, 25, 32, 32, 3)
    seen = to_frames(model.codec.decode(model.codec.encode(to_pixels(image)[None, None]))[0])
    assert different(videos[0, :1], seen) <= 1
    with pytest.raises(UserError, match="latents"):
        generate(model, image[None], ["a room"], ["w*5"])


# ---------------------------------------------------------------------------------------------
# Worlds


@pytest.fixture(scope="module")
def place() -> tuple[World, np.ndarray, CameraTrack]:
    track = parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics)
    world = World(4)
    origin = world.spawn(np.random.default_rng(0), track)
    assert origin is not None
    return world, origin, track


def test_a_renderer_is_an_engine(place: tuple[World, np.ndarray, CameraTrack]) -> None:
    """Frame for frame the world itself, seen along the whole track at once."""
    world, origin, track = place
    engine: Engine = SceneEngine(world, origin, CONFIG.intrinsics, CONFIG.motion, 2, (16, 24))
    session = Session(engine)
    walked = np.concatenate(list(session.play(ACTIONS)))
    assert different(walked, world.render(track.transformed(origin), 16, 24).frames) <= 1
    session.rewind(2)
    assert np.array_equal(np.concatenate([session.step(a) for a in ACTIONS[1:]]), walked[9:])


def test_a_world_starts_as_long_as_the_model_beside_it() -> None:
    still = replace(CONFIG, stream=replace(CONFIG.stream, first_chunk=3, image_start=True))
    track = parse(ALONG).track(CONFIG.motion, CONFIG.intrinsics)
    frames, one = SceneEngine.spawn(4, track, still).start(), SceneEngine.spawn(4, track, CONFIG).start()
    assert len(one) == 1 and len(frames) == 9 and (frames == one).all()


def test_a_world_finds_a_free_place(place: tuple[World, np.ndarray, CameraTrack]) -> None:
    _, _, track = place
    engine = SceneEngine.spawn(4, track, CONFIG)
    assert engine.start().shape == (1, 32, 32, 3)
    with pytest.raises(UserError, match="numbered from 0"):
        SceneEngine.spawn(-1, track, CONFIG)


def test_large_frames_are_made_in_bfloat16_where_a_cpu_multiplies_it_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = CONFIG.geometry.tokens
    for fast, larger, dtype in ((True, 1, torch.float32), (True, 8, torch.bfloat16), (False, 8, torch.float32)):
        monkeypatch.setattr("minwm.store.model.FAST_BFLOAT16", fast)
        config = replace(CONFIG, width=larger * CONFIG.width, height=larger * CONFIG.height)
        assert config.geometry.tokens == larger**2 * tokens
        model = random_model(config).ready("cpu")
        assert {x.dtype for part in (model.net, model.codec) for x in part.parameters()} == {dtype}
        assert {x.dtype for x in random_model(config).ready("cpu", torch.float32).net.parameters()} == {torch.float32}
