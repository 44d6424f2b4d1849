"""What a stream remembers beyond its window: which chunks, and that it then is the stream that had only those."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import CAMERA, condition, latents, sized, small
from compiling import traced

from minwm.cameras.track import se3_exp
from minwm.core.config import ConfigError
from minwm.core.flow import with_first
from minwm.core.types import Condition, Views
from minwm.nets.attention import Masked, Rule, chunk_causal
from minwm.nets.backbone import Context, teacher_forced
from minwm.nets.chunks import Frames, Geometry, Recompute, StreamConfig
from minwm.nets.fp8 import Fp8Arena
from minwm.stream import memory
from minwm.stream.accelerate import GraphedStream, warm_up
from minwm.stream.memory import DISTANCE, RememberedChunk, choose_context, seen_points, view_distances, view_overlap
from minwm.stream.rollout import Stream, sample_noise
from minwm.stream.solvers import FewStepSampler

MEMORY = Geometry(tokens=6, chunk=2, sink=1, window=2, retrieved=1, recompute="causal")
"""Of five chunks the last one sees the first, one of the second and third, the fourth and itself."""
FRAMES = 10
every_way = pytest.mark.parametrize("recompute", ["causal", "full"])
X, T = latents(FRAMES), torch.full((2, FRAMES), 0.5, dtype=torch.float64)


def seen_by_hand(w2c: np.ndarray, others: np.ndarray) -> list[float]:
    """The share of points, found one by one in the coordinates of the world."""
    shares = []
    for other in others:
        points = [np.linalg.inv(w2c) @ [*point, 1] for point in seen_points().numpy().astype(float)]
        count = 0
        for point in points:
            x, y, z = (other @ point)[:3]
            across, down = np.degrees(np.arctan2(x, z)), np.degrees(np.arctan2(y, np.hypot(x, z)))
            count += abs(across) < 30 and abs(down) < 17.5 and np.sqrt(x * x + y * y + z * z) < DISTANCE
        shares.append(count / len(points))
    return shares


def test_overlap_is_a_count_of_points() -> None:
    twists = np.array([[0, 0, 0, 0, 0.2, 0], [1, 0, 2, 0.1, -0.3, 0], [0, 0, 9, 0, 0, 0], [0, 0, 0, 0, np.pi, 0]])
    others, w2c = se3_exp(twists), se3_exp(np.array([0.3, -1, 2, 0.4, 0.9, -0.2]))
    got = view_overlap(torch.from_numpy(w2c)[None], torch.from_numpy(np.stack([w2c, *(others @ w2c)])))
    assert got[0, 0] == 1 and got[0, -1] == 0
    assert got[0, 1:].tolist() == pytest.approx(seen_by_hand(w2c, others @ w2c), abs=1e-3)
    share = len(seen_points()) / 50_000
    assert share == pytest.approx(60 / 360 * np.sin(np.radians(17.5)), rel=0.05), "of the ball"


def looking(*degrees: float) -> RememberedChunk:
    """A chunk of four frames that look so many degrees to the right, one for each clip."""
    w2c = torch.from_numpy(se3_exp(np.array([[0, 0, 0, 0, -np.radians(x), 0] for x in degrees])))
    return RememberedChunk(torch.zeros(len(degrees), 4, 1, 1, 1), 0.0, {"w2c": w2c[:, None].expand(-1, 4, -1, -1)})


def test_worldplay_sees_the_start_the_newest_and_what_looked_the_same_way() -> None:
    """The first 4 latents, the last 12, and one block of 4 between; all 20 while there are no more. Clip by clip."""
    stream = StreamConfig(chunk=4, sink=1, window=4, retrieved=1, recompute="full")
    past = [looking(30.0 * i, 180.0 - 30.0 * i) for i in range(9)]
    now = looking(85.0, 85.0).frames["w2c"]
    for index in range(10):
        chosen = choose_context(past[:index], now, stream, 2)
        every = [*range(index)]
        best = [min(3, index - 4), min(3, index - 4)]
        want = [every] * 2 if index <= 5 else [[0, k, *range(index - 3, index)] for k in best]
        assert chosen == want, index
    # HY-WorldPlay on Wan: any block, the first too
    wan = replace(stream, sink=0)
    assert choose_context(past, looking(10.0, 170.0).frames["w2c"], wan, 2) == [[0, 6, 7, 8]] * 2
    two = replace(stream, retrieved=2)
    assert choose_context(past, now, two, 2)[0] == [0, 2, 3, 6, 7, 8]
    with pytest.raises(ConfigError, match="this stream has no cameras"):
        choose_context(past, None, stream, 2)


def stream_of(
    name: str, geometry: Geometry, cond: Condition, frames: int = FRAMES - 2, guidance: float = 1.0
) -> Stream:
    """One that has made all frames but the last chunk."""
    net = small(name)
    stream = Stream(net, cond, sized(net, geometry), guidance)
    for a, b in geometry.chunks(frames):
        stream.update_cache(stream.prepare_chunk(cond.frames(a, b)), X[:, a:b])
    return stream


def only(cond: Condition, kept: list[list[int]]) -> Condition:
    """The condition of some frames, other ones for each clip."""
    index = torch.tensor(kept)
    parts = {name: x[torch.arange(2)[:, None], index] for name, x in cond.per_frame().items()}
    return replace(cond, **parts)


def full_context(geometry: Geometry, frames: int) -> Rule:
    """The last chunk sees all, and the others each other."""
    return lambda q, k: (k < frames - geometry.chunk) | (q >= frames - geometry.chunk)


@every_way
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", CAMERA)
@torch.no_grad()
def test_a_chunk_sees_what_it_chose_as_a_clip_of_nothing_else(name: str, image: bool, recompute: Recompute) -> None:
    """Exact for all networks, those too whose text sees the position of a chunk in time."""
    cond = condition(FRAMES, seed=4, image=image)
    geometry = replace(MEMORY, recompute=recompute, image_start=image, image_time=0.1, context_time=0.2)
    stream, net = stream_of(name, geometry, cond), small(name)
    chosen = choose_context(stream.past, cond.frames(8, 10).cameras[0].double(), geometry, 2)
    assert [len(c) for c in chosen] == [3, 3] and chosen[0] != chosen[1], "these clips differ"
    kept = [[2 * c + i for c in (*clip, 4) for i in (0, 1)] for clip in chosen]
    v = stream.velocity(stream.prepare_chunk(cond.frames(8, 10)), X[:, 8:], 0.5)
    x = with_first(X[torch.arange(2)[:, None], torch.tensor(kept)], cond.first_latent)
    t = torch.tensor([0.1 if image else 0.2, *[0.2] * 5, 0.5, 0.5], dtype=torch.float64).expand(2, -1)
    rule = chunk_causal(geometry) if recompute == "causal" else full_context(geometry, 8)
    masked = net(x, t, only(cond, kept), Masked(rule, 8))
    torch.testing.assert_close(v, masked[:, -2:], atol=1e-5, rtol=1e-5)


def known_views(cond: Condition, frames: int) -> tuple[Views, ...]:
    """The first frames of each clip, as views of its world."""
    w2c, K = cond.cameras
    return tuple(
        Views.of(dict(enumerate(X[i, :frames])), w2c[i, :frames].double(), K[i, :frames]) for i in range(len(w2c))
    )


@every_way
@pytest.mark.parametrize(
    ("ahead", "spare"), [(None, 0.3), (0, 0.4), (1, 0.4), (1, 9)], ids=["", "ahead", "ahead of another", "and enough"]
)
@pytest.mark.parametrize("name", CAMERA)
@torch.no_grad()
def test_a_chunk_sees_the_nearest_views_before_its_window(
    name: str, recompute: Recompute, ahead: int | None, spare: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if they had been the start of its clip. Those before the first that is far are not read again, and nothing is
    that was read ahead, for the right camera or another."""
    cond, net = condition(FRAMES, seed=4), small(name)
    geometry = Geometry(tokens=6, chunk=1, sink=0, window=3, retrieved=2, recompute=recompute)
    monkeypatch.setattr(memory, "SPARE", 0.3)
    monkeypatch.setattr(memory, "SPARE_AHEAD", spare)
    stream, read = Stream(net, cond, sized(net, geometry), views=known_views(cond, 4)), list[int]()
    read_chunks = stream._read_chunks

    def reading(cond: Condition, chunks: list[RememberedChunk], place: int) -> None:
        read.extend(range(place, place + len(chunks)))
        read_chunks(cond, chunks, place)

    monkeypatch.setattr(stream, "_read_chunks", reading)
    for chunk, frame in enumerate(range(4, 9)):
        if ahead is not None:
            stream.read_ahead(cond.frames(frame + ahead, frame + ahead + 1))
        before = stream.cached_views if recompute == "causal" else []
        past = stream.cached_past
        read.clear()
        prepared = stream.prepare_chunk(cond.frames(frame, frame + 1))
        views, held = stream.cached_views, 0
        for i, pose in enumerate(cond.cameras[0]):
            far = view_distances(pose[frame].double(), stream.known[i]).tolist()
            near = [k for k in sorted(range(4), key=far.__getitem__) if far[k] <= sorted(far)[1] + spare]
            assert (near[0] in views[i] or ahead is not None) and {*views[i]} <= {*near}
            if before and before[i][0] in near:
                assert views[i][0] == before[i][0], "it stays, though two others may be nearer"
        while held < 2 and before and all(a[held] == b[held] for a, b in zip(views, before, strict=True)):
            held += 1
        while held in (2, 3) and past[held - 2 : held - 1] == stream.cached_past[held - 2 : held - 1] != []:
            held += 1
        assert recompute == "full" or read == [*range(held, 2 + min(chunk, 2))]
        assert recompute == "full" or (ahead != 0 and spare != 9) or not read
        window = [*range(frame - min(chunk, 2), frame)]
        kept = [[*nearest, *window, frame] for nearest in views]
        last = len(kept[0]) - 1
        t = torch.tensor([0.0] * last + [0.5], dtype=torch.float64).expand(2, -1)
        rule = chunk_causal(geometry) if recompute == "causal" else full_context(geometry, last + 1)
        x = X[torch.arange(2)[:, None], torch.tensor(kept)]
        seen = only(cond, kept)
        assert seen.actions is not None
        seen.actions[:, :2] = 0  # no action has led to a view
        masked = net(x, t, seen, Masked(rule, last + 1))
        v = stream.velocity(prepared, X[:, frame : frame + 1], 0.5)
        torch.testing.assert_close(v, masked[:, -1:], atol=1e-5, rtol=1e-5)
        stream.update_cache(prepared, X[:, frame : frame + 1])


@torch.no_grad()
def test_an_image_at_the_start_is_one_more_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is near it is seen, also when it has left the window, and again after a new start."""
    monkeypatch.setattr(memory, "SPARE", 0)  # a view is where the image is
    cond, net = condition(FRAMES, seed=4, image=True), small("wan-dual")
    geometry = Geometry(tokens=6, chunk=1, sink=0, window=2, retrieved=2, recompute="causal")
    stream, frames = Stream(net, cond, sized(net, geometry), views=known_views(cond, 4)), (0, 6, 7, 0)
    for undone in (True, False):
        seen = list[list[list[int]]]()
        for frame in frames:  # the last one is back where the first was
            at = replace(cond.frames(0, 1), **cond.frames(frame, frame + 1).per_frame())
            prepared = stream.prepare_chunk(at if stream.past == [] else replace(at, first_latents=None))
            seen.append(stream.cached_views)
            stream.update_cache(prepared, X[:, frame : frame + 1])
        assert all(4 in clip for clip in seen[-1]) and not any(4 in clip for clip in seen[0])
        torch.testing.assert_close(stream.views[0].latents[4], X[0, 0])
        stream.restore((0,)) if undone else stream.restart(cond)


@pytest.mark.parametrize("name", ["wan-dual", "hunyuan-actions"])
@torch.no_grad()
def test_masked_passes_with_the_chosen_chunks_are_other_streams(name: str) -> None:
    """What is not exact, on purpose: in a mask over the whole clip the chosen chunks have seen those left out."""
    cond = condition(FRAMES, seed=4)
    stream, net = stream_of(name, MEMORY, cond), small(name)
    chosen = torch.zeros(2, 5, dtype=torch.bool)
    for row, clip in zip(
        chosen, choose_context(stream.past, cond.frames(8, 10).cameras[0].double(), MEMORY, 2), strict=True
    ):
        row[[*clip, 4]] = True

    def rule(q: Frames, k: Frames) -> Frames:
        return chunk_causal(replace(MEMORY, window=9))(q, k) & ((q < 8) | chosen[0].numpy()[k // 2])

    t = torch.tensor([0.0] * 8 + [0.5] * 2, dtype=torch.float64).expand(2, -1)
    masked = net(X, t, cond, Masked(rule, FRAMES))[:1, 8:]
    v = stream.velocity(stream.prepare_chunk(cond.frames(8, 10)), X[:, 8:], 0.5)[:1]
    assert (v - masked).abs().max() > 1e-3


@every_way
@torch.no_grad()
def test_undone_chunks_leave_no_trace(recompute: Recompute) -> None:
    cond, geometry = condition(FRAMES, seed=4), replace(MEMORY, recompute=recompute)
    stream = stream_of("hunyuan-dual", geometry, cond, guidance=2.0)

    def velocity() -> torch.Tensor:
        return stream.velocity(stream.prepare_chunk(cond.frames(8, 10)), X[:, 8:], 0.5)

    want, snapshots = velocity(), []
    for undone in (3, 2, 1):
        for a, b in geometry.chunks(8)[-undone:]:
            snapshots.append(stream.snapshot())
            stream.update_cache(stream.prepare_chunk(cond.frames(a, b)), X[:, a:b])
        for snapshot in snapshots[: -undone - 1 : -1]:
            stream.restore(snapshot)
        torch.testing.assert_close(velocity(), want, atol=1e-9, rtol=1e-9)
    stream.restore((2,))
    early = stream_of("hunyuan-dual", geometry, cond, frames=4, guidance=2.0)
    v = [one.velocity(one.prepare_chunk(cond.frames(4, 6)), X[:, 4:6], 0.5) for one in (stream, early)]
    torch.testing.assert_close(*v, atol=1e-9, rtol=1e-9)


@every_way
@torch.no_grad()
def test_recorded_and_quantised_streams_remember_too(recompute: Recompute) -> None:
    cond, geometry = condition(FRAMES, seed=4, image=True), replace(MEMORY, recompute=recompute, image_start=True)
    net, sampler = small("hunyuan-actions"), FewStepSampler(steps=1)
    noise = sample_noise((2, FRAMES, 4, 4, 6), 1, X, torch.Generator().manual_seed(0))

    def made(stream: Stream) -> torch.Tensor:
        clip = []
        for a, b in geometry.chunks(FRAMES):
            prepared = stream.prepare_chunk(cond.frames(a, b))
            clip.append(stream.next_chunk(prepared, noise[:, :, a:b], sampler))
            stream.update_cache(prepared, clip[-1])
        return torch.cat(clip, 1)

    plain = made(Stream(net, cond, sized(net, geometry)))
    graphed = GraphedStream(net, cond, sized(net, geometry), capture=traced)
    warm_up(graphed, cond.frames(0, 2), noise[:, :, :2], sampler)
    shapes = len(graphed.recorded)
    torch.testing.assert_close(made(graphed), plain, atol=1e-6, rtol=1e-6)
    assert len(graphed.recorded) == shapes, "all were recorded before"
    net.arena_type = Fp8Arena
    error = (made(Stream(net, cond, sized(net, geometry))) - plain).norm() / plain.norm()
    assert 0 < error < 0.1


def test_one_pass_cannot_train_what_is_chosen_anew() -> None:
    net, cond, t = small("wan-dual"), condition(FRAMES), T
    with pytest.raises(ConfigError, match="a clip of 10 latents is not trained in one pass, as its chunks see"):
        teacher_forced(net, Context(X, t), X, t, cond, MEMORY)
    teacher_forced(net, Context(X[:, :8], t[:, :8]), X[:, :8], t[:, :8], cond.frames(0, 8), MEMORY)
    for wrong, problem in (
        ({"recompute": "never"}, "stream.retrieved=1 needs stream.recompute=causal"),
        ({"merged_refresh": True}, "leave stream.merged_refresh off"),
        ({"retrieved": 0, "sink": 0, "window": 1}, "needs a chunk besides the current one"),
    ):
        with pytest.raises(ConfigError, match=problem):
            replace(MEMORY, **wrong)
