"""Recorded games: Doom, which nobody here drew, with true cameras; and the recorder over any game."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from commands import run
from wrong_cameras import WRONG

from minwm.cameras.check import check_video
from minwm.cameras.track import CameraTrack, rotation_degrees
from minwm.cameras.trajectory import Action, Motion, integrate_actions, parse
from minwm.core.config import ConfigError, UserError
from minwm.data.clips import ClipFolder, ClipRecord, DataError, check
from minwm.data.doom import DoomConfig
from minwm.data.record import Game, GameSource, RecordConfig, View, record

SIDE = 128
DOOM = DoomConfig(height=SIDE, width=SIDE, motion=Motion(move=1.0, turn=24.0), latents=5)
TURNING = "w+l*2,a*2,w*1,i*1,d+j*2"
Clip = tuple[ClipRecord, np.ndarray]


def grey(frames: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(frame) for frame in frames.mean(-1).astype(np.uint8)]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Two clips of one walk with turns, a step aside and a look up."""
    source = GameSource(replace(DOOM, latents=9, trajectories=(TURNING,), seed=1))
    return [source.make(index) for index in range(2)]


def test_the_cameras_of_the_game_fit_its_pictures(clips: list[Clip]) -> None:
    for record_, frames in clips:
        result = check_video(record_.track, grey(frames), 16.0)
        assert not result.faults and result.fit is not None, result
        assert result.fit.residual < 0.6 and result.fit.in_front > 0.9


@pytest.mark.parametrize("fault", ["w2c", "opengl", "both", "wxyz", "sign", "backwards", "mirrored"])
def test_each_wrong_convention_of_them_is_told(fault: str, clips: list[Clip]) -> None:
    spoil, said = WRONG[fault]
    record_, frames = clips[0]
    found = check_video(CameraTrack(spoil(record_.track.c2w), record_.track.K, 16.0), grey(frames), 16.0).faults
    assert any(re.search(said, str(one)) for one in found), found


def test_keys_move_the_player_as_they_move_a_model(clips: list[Clip]) -> None:
    """But for steps of the floor, and for turns while it looks up: a player's are about the vertical axis."""
    true = parse(TURNING).track(DOOM.motion, DOOM.intrinsics)
    for record_, _ in clips:
        assert record_.trajectory == TURNING and record_.pose_kind == "ground_truth"
        difference = np.linalg.norm((record_.track.c2w - true.c2w)[:, (0, 2), 3], axis=1)
        assert difference.max() < 0.1 * true.path_length()
        looked = 4 * sum(s.latents for s in parse(TURNING).segments[:3])
        rotation = true.c2w[: looked + 1, :3, :3].swapaxes(1, 2) @ record_.track.c2w[: looked + 1, :3, :3]
        assert rotation_degrees(rotation).max() < 0.05


def test_a_clip_is_the_same_whatever_was_recorded_before(clips: list[Clip]) -> None:
    source = GameSource(replace(DOOM, latents=9, trajectories=(TURNING,), seed=1))
    again, frames = source.make(0)
    assert (frames == clips[0][1]).all() and again.to_json() == clips[0][0].to_json()
    assert (frames != clips[1][1]).any()


def test_the_command_goes_on_and_its_clips_have_nothing_wrong(tmp_path: Path) -> None:
    words = ("data", "record", "--game", "vizdoom", "--map", "map01", "--out", tmp_path / "raw", "--latents", 3)
    assert run(*words, "--clips", 1) == 0
    (first,) = (tmp_path / "raw" / "clips").glob("*.mp4")
    time = first.stat().st_mtime_ns
    assert run(*words, "--clips", 2) == 0
    assert first.stat().st_mtime_ns == time and check(tmp_path / "raw") == []
    folder = ClipFolder(tmp_path / "raw")
    record_ = folder.record(folder.ids()[1])
    assert (record_.source, record_.source_license) == ("vizdoom", "BSD-3-Clause")
    assert record_.source_id.startswith("map01 of freedoom2.wad")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"map": "map99"}, "there is no map of freedoom2.wad 'map99'"),
        ({"wad": "none.wad"}, "wad=none.wad: no WAD file can be read there"),
        ({"wad": __file__}, "no WAD file can be read there"),
        ({"fov": 120.0}, "looks 25 degrees up and down needs a picture of 1[67][0-9] degrees"),
        ({"tics": 0}, "tics=0: give at least 1"),
        ({"units": 0.0}, "units=0.0: a positive number"),
        ({"trajectories": ("u*4",)}, "cannot rise, sink or roll: leave out the keys u and dn"),
    ],
)
def test_what_the_game_cannot_do_is_refused(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        record(tmp_path / "raw", replace(DOOM, **fields), clips=1)


def test_pictures_of_another_file_have_no_known_licence(tmp_path: Path) -> None:
    wad = Path(str(pytest.importorskip("vizdoom").__file__)).with_name("freedoom2.wad")
    with pytest.raises(UserError, match=r"license: name that of the pictures in freedoom2\.wad"):
        record(tmp_path / "raw", replace(DOOM, wad=str(wad)), clips=1)


# ---------------------------------------------------------------------------------------------
# The recorder, with a game of a few lines


@dataclass(frozen=True, kw_only=True)
class CorridorConfig(RecordConfig):
    length: float = 4.0

    @property
    def game(self) -> str:
        return "corridor"

    def open(self) -> "Corridor":
        return Corridor(self)


class Corridor:
    """Nothing to see, and a wall in front."""

    world, license, caption, generator = "a corridor", "CC0-1.0", "a corridor", "test 1"

    def __init__(self, cfg: CorridorConfig) -> None:
        self.cfg = cfg

    def start(self, rng: np.random.Generator) -> View:
        self.pose = np.eye(4)
        self.pose[2, 3] = rng.uniform(0, self.cfg.length)
        return self.view()

    def step(self, action: Action) -> View:
        self.pose = integrate_actions(self.pose, [action], self.cfg.motion)[0]
        self.pose[2, 3] = min(self.pose[2, 3], self.cfg.length)
        return self.view()

    def view(self) -> View:
        frame = np.full((self.cfg.height, self.cfg.width, 3), int(50 * self.pose[2, 3]), np.uint8)
        return View(frame, self.pose.copy(), self.cfg.intrinsics)


def test_a_blocked_clip_is_tried_elsewhere(tmp_path: Path) -> None:
    cfg = CorridorConfig(motion=Motion(move=1.0), latents=9, trajectories=("w*8",))
    assert isinstance(cfg.open(), Game)
    folder = record(tmp_path / "raw", cfg, clips=8)
    for clip in folder.ids():
        record_ = folder.record(clip)
        assert record_.origin is not None and record_.origin[2, 3] < 2.25, "two units ahead are free, or nearly"
        assert record_.track.c2w[-1, 2, 3] > 0.85 * 2
    with pytest.raises(DataError, match="a corridor: the camera is blocked in each of 100 tries of clip 0"):
        record(tmp_path / "short", replace(cfg, length=0.5), clips=1)
    with pytest.raises(ConfigError, match=r"moved=1\.5: a share from 0 to 1"):
        replace(cfg, moved=1.5)


def test_a_camera_may_rise(tmp_path: Path) -> None:
    cfg = CorridorConfig(motion=Motion(move=1.0), latents=9, trajectories=("u*8",))
    folder = record(tmp_path / "raw", cfg, clips=1)
    assert folder.record(folder.ids()[0]).track.c2w[-1, 1, 3] < -1, "y is down"


def test_the_game_of_the_page_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "own-game.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MyGame" in block)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "page"})
    assert len(ClipFolder(tmp_path / "runs" / "mygame" / "raw").ids()) == 2
