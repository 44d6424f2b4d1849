"""Motion against the reference's published poses; the grammar; balance and limits of random paths."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.cameras.random_paths import random_track, random_trajectory
from minwm.cameras.track import CameraTrack, intrinsics, se3_inverse
from minwm.cameras.trajectory import (
    ALIASES,
    KEYS,
    Action,
    Motion,
    TrajectoryError,
    integrate_actions,
    parse,
)
from minwm.core.config import ConfigError

K = intrinsics(60.0, 64, 64)
DEMO = Motion(move=0.5, turn=24.0, fps=16.0)
REFERENCE = Motion(move=0.08, turn=3.0, fps=4.0)  # a latent lasts one second: 0.08 units, 3 degrees


def elevation(track: CameraTrack) -> np.ndarray:
    return np.degrees(np.arcsin(-track.c2w[:, 1, 2]))


def heading(track: CameraTrack) -> np.ndarray:
    return np.degrees(np.arctan2(track.c2w[:, 0, 2], track.c2w[:, 2, 2]))


TURNED = [[0.998630, 0, -0.052336], [0, 1, 0], [0.052336, 0, 0.998630]]
LIFTED = [[0.998630, 0, -0.052336], [0.002739, 0.998630, 0.052264], [0.052264, -0.052336, 0.997261]]
GOLDEN = [
    (np.eye(3), (0, 0, 0)),
    (np.eye(3), (0, 0, -0.08)),
    (np.eye(3), (0, 0, -0.16)),
    (TURNED, (0.008374, 0, -0.159781)),
    (TURNED, (0.008374, 0, -0.239781)),
    (LIFTED, (0.008374, -0.012549, -0.239452)),
    (LIFTED, (-0.071626, -0.012549, -0.239452)),
]


def test_poses_equal_the_reference() -> None:
    w2c = parse("w*2,l*1,w*1,i*1,d*1").track(REFERENCE, K, steps_per_latent=1).w2c()
    assert len(w2c) == len(GOLDEN)
    for pose, (R, t) in zip(w2c, GOLDEN, strict=True):
        np.testing.assert_allclose(pose[:3, :3], R, atol=1e-6)
        np.testing.assert_allclose(pose[:3, 3], t, atol=1e-6)


def test_projections_equal_the_reference() -> None:
    view = parse("w*2,l*1,w*1,i*1").track(REFERENCE, K, steps_per_latent=1).w2c()[-1]
    scale = np.diag([0.5050505, 0.89786756, 1, 1])
    forth = [
        [0.504358, 0, -0.026432, 0.004229],
        [0.002459, 0.896637, 0.046926, -0.011267],
        [0.052264, -0.052336, 0.997261, -0.239452],
    ]
    back = [
        [1.977286, 0.003051, 0.052264, 0.004187],
        [0, 1.112224, -0.052336, 0],
        [-0.103625, 0.058209, 0.997261, 0.239890],
    ]
    np.testing.assert_allclose((scale @ view)[:3], forth, atol=1e-6)
    np.testing.assert_allclose((se3_inverse(view) @ np.linalg.inv(scale))[:3], back, atol=1e-6)


def test_long_holds_end_where_the_reference_says() -> None:
    for steps in (1, 4):
        walk = parse("w*19").track(REFERENCE, K, steps_per_latent=steps)
        np.testing.assert_allclose(walk.c2w[-1, :3, 3], [0, 0, 1.52], atol=1e-12)
        assert heading(parse("l*19").track(REFERENCE, K, steps_per_latent=steps))[-1] == pytest.approx(57.0)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("w", (0, 0, 1)),
        ("s", (0, 0, -1)),
        ("a", (-1, 0, 0)),
        ("d", (1, 0, 0)),
        ("u", (0, -1, 0)),
        ("dn", (0, 1, 0)),
    ],
)
def test_moves_go_where_the_key_says(key: str, expected: tuple[float, float, float]) -> None:
    track = parse(f"{key}*8").track(DEMO, K)
    np.testing.assert_allclose(track.c2w[-1, :3, 3], expected, atol=1e-12)  # 2 s at 0.5 units/s
    assert np.array_equal(track.c2w[-1, :3, :3], np.eye(3))


@pytest.mark.parametrize(("key", "column"), [("l", 1), ("j", -1), ("right", 1), ("left", -1)])
def test_positive_yaw_turns_right(key: str, column: int) -> None:
    """A thing straight ahead wanders to the left of the picture when the camera turns right."""
    last = parse(f"{key}*2").track(DEMO, K).w2c()[-1]
    assert np.sign((last @ [0, 0, 5, 1])[0]) == -column
    assert heading(parse(f"{key}*2").track(DEMO, K))[-1] == pytest.approx(12.0 * column)


@pytest.mark.parametrize(("key", "sign"), [("i", 1), ("k", -1), ("up", 1), ("down", -1)])
def test_positive_pitch_looks_up(key: str, sign: int) -> None:
    """A thing straight ahead sinks in the picture (y grows) when the camera looks up."""
    last = parse(f"{key}*2").track(DEMO, K).w2c()[-1]
    assert np.sign((last @ [0, 0, 5, 1])[1]) == sign


def test_roll_is_clockwise() -> None:
    """The world's up leans to the left in the picture of a camera that rolls clockwise."""
    last = se3_inverse(integrate_actions(np.eye(4), [Action(roll=1.0)], DEMO, 1.0)[-1])
    assert (last @ [0, -1, 5, 1])[0] < 0


def test_pixel_rate_is_steady_and_meets_the_latent_rate() -> None:
    fine, coarse = (parse("w*3,l*2,a*3").track(DEMO, K, steps_per_latent=s) for s in (4, 1))
    assert len(fine) == 33 and fine.fps == 16.0 and len(coarse) == 9 and coarse.fps == 4.0
    latent = fine.at_latent_rate(4)
    assert latent.fps == coarse.fps
    np.testing.assert_allclose(latent.c2w, coarse.c2w, atol=1e-12)
    steps = parse("w+l*8").track(DEMO, K).relative()
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-12)


def test_driving_on_equals_one_trajectory() -> None:
    """Live play advances piece by piece; the path must be the one that the string describes."""
    trajectory = parse("w+j*2,d*1,k*2")
    whole = trajectory.track(DEMO, K).c2w
    pose, parts = np.eye(4), []
    for action in trajectory.actions():
        poses = integrate_actions(pose, [action] * 4, DEMO)
        parts.append(poses)
        pose = poses[-1]
    np.testing.assert_allclose(np.concatenate(parts), whole[1:], atol=1e-14)
    assert integrate_actions(pose, [], DEMO).shape == (0, 4, 4)


def test_out_and_back_returns() -> None:
    for text in ("w*9,s*9", "l*10,j*10", "i*3,k*3", "u*4,dn*4", "a*5,d*5"):
        poses = parse(text).track(DEMO, K).c2w
        np.testing.assert_allclose(poses[-1], np.eye(4), atol=1e-12)
        assert np.abs(poses[len(poses) // 2] - np.eye(4)).max() > 0.2  # and it did go somewhere


@pytest.mark.parametrize(
    ("canonical", "dialects"),
    [
        (
            "w*8,a*4",
            ["w*8,a*4", "w-8, a-4", "W*8 ,A*4", "w:32,a:16", "W:32, a-4", " w * 8,\n a - 4 ", "w*5,w*3,a*4"],
        ),
        ("w*8,l*3", ["w*8,l*3", "w-8, right-3", "W-8,RIGHT-3", "w:32,right:12", "w*08,l,l,l"]),
        ("w+j*8", ["w+j*8", "j+w*8", "W+J:32", "w + left - 8", "LEFT+w*8"]),
        ("i*2,k*1,j*1,l*1", ["up-2,down-1,left-1,right-1", "i*2,k,j,l", "UP*2,Down,left,l-1"]),
        ("u*2,dn*2", ["u*2,dn*2", "U:8,DN:8"]),
        ("static*3", ["static*3", "none-3", ".*3", ".:12", ".,.,static"]),
        ("w+k*3", ["W+K:12", "k+w-3"]),
        ("w*3,d*4", ["w-3, right-0.5, d-4", "w-3.0,d-4.", "w*3,,d*4,", " ,w:12.0,l*0,d:16", "w*3.9,d*4"]),
        ("w*4", ["w-4,", "w*2,a*0,w*2"]),
    ],
)
def test_every_dialect_has_one_canonical_form(canonical: str, dialects: list[str]) -> None:
    assert parse(canonical).canonical() == canonical
    for text in dialects:
        assert parse(text) == parse(canonical), text


COUNTS = st.one_of(st.integers(0, 40).map(str), st.decimals(0, 40, places=2).map(str))


@given(st.lists(st.tuples(st.sampled_from(["w", "a", "left", "right", "up"]), COUNTS), min_size=1, max_size=6))
def test_counts_are_those_of_worldplay(segments: list[tuple[str, str]]) -> None:
    """HY-WorldPlay's `parse_pose_string` holds a key for `int(float(count))` latents and skips empty commands."""
    expected = [ALIASES.get(key, key) for key, count in segments for _ in range(int(float(count)))]
    text = ", ".join(f"{key}-{count}" for key, count in segments) + ","
    if not expected:
        with pytest.raises(TrajectoryError, match="lasts no latent"):
            parse(text)
    else:
        assert parse(text).actions() == [Action.of([key]) for key in expected]


def test_lengths_are_stated() -> None:
    trajectory = parse("w+j*8,a*4")
    assert (trajectory.latents, trajectory.frames) == (12, 49)
    assert trajectory.describe() == "w+j*8,a*4 (12 latents after the first, 49 frames)"
    assert len(trajectory.track(DEMO, K)) == 49 and len(trajectory.actions()) == 12
    keys = trajectory.keys_per_frame()
    assert len(keys) == 49 and keys[0] == () and keys[1] == keys[32] == ("w", "j") and keys[33] == ("a",)
    assert parse("static").keys_per_frame() == [()] * 5


@pytest.mark.parametrize(
    ("text", "marked", "message"),
    [
        ("w*8,x*4", "x*4", "'x' is not a key"),
        ("w*0", "w*0", "lasts no latent"),
        ("right-0.5", "right-0.5", "lasts no latent"),
        ("w*-3", "w*-3", "'-3' is not"),
        ("w*", "w*", "'' is not"),
        ("w*1e3", "w*1e3", "'1e3' is not"),
        ("w*٣", "w*٣", "is not a number"),
        ("w*1.2.3", "w*1.2.3", "'1.2.3' is not"),
        (",", ",", "lasts no latent"),
        ("", "", "lasts no latent"),
        ("a*2,w+s*3", "w+s*3", "'w' and 's' contradict"),
        ("left+l", "left+l", "'left' and 'l' contradict"),
        ("u+w+dn*2", "u+w+dn*2", "'u' and 'dn' contradict"),
        ("j+left*2", "j+left*2", "'left' repeats 'j'"),
        ("w+static*2", "w+static*2", "'static' cannot be held"),
        ("w+*2", "w+*2", "not keys[*]count"),
        ("8*w", "8*w", "not keys[*]count"),
        ("w j*4", "w j*4", "not keys[*]count"),
        ("w*2,q*1,e*1", "q*1", "'q' is not a key"),
        ("a*1,W:25", "W:25", "write w:24 or w:28"),
        ("w:3", "w:3", "write w:4, or count latents: w[*]1"),
        ("w*999999999", "w*999999999", "more than 100000 latents"),
        ("w*" + "9" * 5000, "w*" + "9" * 5000, "from 0 to 100000 latents"),
    ],
)
def test_mistakes_are_shown_under_a_caret_with_the_way_out(text: str, marked: str, message: str) -> None:
    with pytest.raises(TrajectoryError, match=message) as caught:
        parse(text)
    problem, line, carets = str(caught.value).split("\n")
    assert line == "  " + text
    begin = carets.index("^")
    assert carets[begin:] == "^" * max(1, len(marked)) and line[begin : begin + len(marked)] == marked
    assert ";" in problem  # what is wrong; what to do


def test_a_line_break_does_not_move_the_caret() -> None:
    with pytest.raises(TrajectoryError) as caught:
        parse("w*2,\n\tzz*3")
    _, line, carets = str(caught.value).split("\n")
    assert line[carets.index("^") :] == "zz*3"


def test_actions_add_up_and_opposites_cancel() -> None:
    assert Action.of(["W", "left"]) == Action(move_z=1.0, yaw=-1.0)
    assert Action.of(["w", "s"]) == Action.of([]) == Action.of(["static"]) == Action()
    assert Action.of(["left", "j"]) == KEYS["j"]
    with pytest.raises(TrajectoryError, match="'space' is not a key"):
        Action.of(["space"])
    half = integrate_actions(np.eye(4), [Action(move_z=0.5)] * 16, DEMO)
    np.testing.assert_allclose(half[-1, :3, 3], [0, 0, 0.25])  # half of 0.5 units/s for a second


def test_stride_must_agree() -> None:
    with pytest.raises(TrajectoryError, match="stride=8"):
        parse("w*2").track(Motion(0.5, 24.0, 16.0, stride=8), K)
    assert parse("w:16", stride=8).canonical() == "w*2"
    with pytest.raises(TrajectoryError, match="steps_per_latent = 0"):
        parse("w").track(DEMO, K, steps_per_latent=0)


@pytest.mark.parametrize(
    ("field", "value"), [("move", -1.0), ("turn", np.nan), ("fps", 0.0), ("fps", np.inf), ("stride", 0)]
)
def test_a_motion_checks_itself(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"motion.{field}"):
        replace(DEMO, **{field: value})


def test_random_trajectories_are_reproducible_balanced_and_readable() -> None:
    rng, held, whole = np.random.default_rng(0), Counter(), 0
    count = 3000
    for _ in range(count):
        trajectory = random_trajectory(rng, 8)
        assert trajectory.latents == 8 and parse(trajectory.canonical()) == trajectory
        whole += len(trajectory.segments) == 1
        for segment in trajectory.segments:
            for key in segment.keys:
                held[key] += segment.latents
    assert 0.35 < whole / count < 0.45
    assert set(held) == set(KEYS) - {"u", "dn"}
    assert 0.85 < held["j"] / held["l"] < 1.18 and 0.85 < held["a"] / held["d"] < 1.18
    assert 0.8 < held["i"] / held["k"] < 1.25 and 0.02 * 8 * count < held["i"] < 0.5 * held["j"]
    assert held["w"] == max(held.values())
    one, two = (random_trajectory(np.random.default_rng(5), 20) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("frames", [5, 33, 161])
def test_random_tracks_keep_the_horizon_in_view(frames: int) -> None:
    rng, looked = np.random.default_rng(1), 0.0
    for _ in range(60):
        track, trajectory = random_track(rng, frames, DEMO, K)
        assert len(track) == frames == trajectory.frames
        assert np.array_equal(track.c2w, trajectory.track(DEMO, K).c2w)
        looked = max(looked, np.abs(elevation(track)).max())
    assert 5.0 < looked <= 25.0 + 1e-9
    with pytest.raises(TrajectoryError, match="whole latents"):
        random_track(rng, frames + 1, DEMO, K)


def test_fast_turns_still_give_a_random_track() -> None:
    fast = Motion(move=0.5, turn=300.0, fps=16.0)
    for seed in range(20):
        assert np.abs(elevation(random_track(np.random.default_rng(seed), 33, fast, K)[0])).max() <= 25.0
