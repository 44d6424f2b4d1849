"""Doom as a game to record, through ViZDoom: any map of a WAD file, Freedoom's by default. No GPU is needed.

The map's x is east, y north and z up; here these are x, z and -y. Doom's pixels are 1.2 times as high as wide, and so
are things on a screen of square pixels: z counts 1.2 times. Its renderer shears the picture where a camera would look
up or down. So the game never does: it draws a wide level picture, of which every view from there is a homography.
"""

import contextlib
import math
import struct
import tempfile
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from minwm.cameras.random_paths import MAX_PITCH_DEG
from minwm.cameras.track import rigid, so3_exp
from minwm.cameras.trajectory import Action
from minwm.core.config import ConfigError, lookup
from minwm.core.runtime import require
from minwm.data.clips import DataError
from minwm.data.record import GameEndedError, RecordConfig, View

TALL = 1.2
"""Height over width of Doom's pixels."""
SCREENS = ((640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200))
"""Widths and heights of the pictures that the game can draw."""
FINER = 2.0
"""Pixels of the game's picture per pixel of the clip, where a screen is fine enough."""
WIDEST = 160
"""Degrees of the game's picture."""
THRUST, STRONGEST, FRICTION = 2048 / 65536, 50, 0xE800 / 0x10000
"""Map units per tic that a unit of the movement buttons adds to the speed, the largest unit that counts, and the share
of its speed that a player keeps from tic to tic."""
CLEARANCE, HEADROOM = 24.0, 64.0
"""Map units around and above a player who is put somewhere; a player is 16 wide each way and 56 high."""
DRAWS, PLACES = 100_000, 100
"""Points drawn in a map, and places among them that are tried, before it counts as having none."""
SETTLE = 20
"""Tics after which the player stands, and the field of view is the one wanted."""
VARIABLES: tuple[str, ...] = (
    *(f"CAMERA_{name}" for name in ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "PITCH", "ROLL", "FOV")),
    *(f"VELOCITY_{axis}" for axis in "XYZ"),
)
"""What the game says of the camera and the player at every frame."""


@dataclass(frozen=True, kw_only=True)
class DoomConfig(RecordConfig):
    """Which clips of a map of Doom to record. There are no monsters, and nobody is hurt."""

    map: str = "map01"
    """Name of the map in the WAD file."""
    wad: str | None = None
    """A WAD file; None: freedoom2.wad, which comes with ViZDoom."""
    license: str | None = None
    """Of the pictures in the WAD file; None: Freedoom's, BSD-3-Clause, of the file that comes with ViZDoom."""
    caption: str = "halls and courtyards of a military base in a science-fiction game"
    """What is seen in this map."""
    tics: int = 2
    """Of the game per frame. The game runs at tics * fps per second; Doom's own rate is 35."""
    units: float = 64.0
    """Map units per world unit, as which `motion.move` counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(tics=1)
        if not (math.isfinite(self.units) and self.units > 0):
            raise ConfigError(f"units={self.units}: a positive number of map units")
        if self.field_of_view > WIDEST:
            raise ConfigError(
                f"a view of {self.fov:g} degrees that looks {MAX_PITCH_DEG:g} degrees up and down needs a picture of "
                f"{self.field_of_view} degrees, the game draws {WIDEST:g}: give a narrower one"
            )

    @property
    def game(self) -> str:
        return "vizdoom"

    @property
    def field_of_view(self) -> int:
        """Whole degrees, as the game wants, of its picture, in which the view is found whatever its pitch."""
        fx, fy = self.intrinsics[:2]
        corner, pitch = np.array([0.5 / fx, 0.5 / fy, 1.0]), math.radians(MAX_PITCH_DEG)
        right, down, ahead = so3_exp(np.array([-pitch, 0.0, 0.0])) @ corner
        width, height = SCREENS[0]
        wide = max(right, down * width / height) / ahead if ahead > 0 else math.inf
        return math.ceil(math.degrees(2 * math.atan(wide)))

    def open(self) -> "Doom":
        return Doom(self)


class Doom:
    """The game, without anything between the eye and the map."""

    def __init__(self, cfg: DoomConfig) -> None:
        vizdoom = require("vizdoom", "games")
        self.cfg, self.license, self.caption = cfg, cfg.license or "BSD-3-Clause", cfg.caption
        wad = Path(cfg.wad) if cfg.wad else Path(str(vizdoom.__file__)).with_name("freedoom2.wad")
        lookup(dict.fromkeys(map_names(wad)), cfg.map, f"map of {wad.name}")  # without it the game waits for ever
        if cfg.wad and not cfg.license:
            raise ConfigError(f"license: name that of the pictures in {wad.name}")
        self.world = f"{cfg.map} of {wad.name}"
        self.generator = f"vizdoom {vizdoom.__version__}"
        self.wide = math.tan(math.radians(cfg.field_of_view) / 2)
        width, height = self._screen()
        self.game = vizdoom.DoomGame()
        self.game.set_doom_scenario_path(str(wad.absolute()))
        self.game.set_doom_map(cfg.map)
        self.game.set_screen_resolution(vizdoom.ScreenResolution.__members__[f"RES_{width}X{height}"])
        self.game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self.game.set_window_visible(False)
        self.game.set_sectors_info_enabled(True)
        self.game.set_episode_timeout(0)
        for part in ("hud", "weapon", "crosshair", "decals", "particles", "messages", "effects_sprites"):
            getattr(self.game, f"set_render_{part}")(False)
        buttons = ("MOVE_FORWARD_BACKWARD_DELTA", "MOVE_LEFT_RIGHT_DELTA", "TURN_LEFT_RIGHT_DELTA")
        self.game.set_available_buttons([vizdoom.Button.__members__[name] for name in buttons])
        self.game.set_available_game_variables([vizdoom.GameVariable.__members__[name] for name in VARIABLES])
        self.game.add_game_args("-nomonsters +sv_cheats 1 +movebob 0 +stillbob 0 +pickup_fade_scalar 0 +telezoom 0")
        self.folder = tempfile.TemporaryDirectory(prefix="minwm-vizdoom-")  # for its settings and messages
        weakref.finalize(self, self.game.close)  # or its process outlives ours
        try:
            with contextlib.chdir(self.folder.name):
                self.game.init()
        except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
            raise DataError(f"{self.world}: ViZDoom does not start: {error}") from error
        self.floor = FloorPlan(self.game.get_state().sectors)

    def _screen(self) -> tuple[int, int]:
        """The smallest that is fine enough in the middle, or the largest."""
        rows, columns = self.cfg.height * self.cfg.intrinsics[1], self.cfg.width * self.cfg.intrinsics[0]
        fine = FINER * max(rows, columns) * 2 * self.wide
        return next((screen for screen in SCREENS if screen[0] >= fine), SCREENS[-1])

    def start(self, rng: np.random.Generator) -> View:
        self.game.set_seed(int(rng.integers(2**31)))
        self.game.new_episode()
        self.game.send_game_command("god")
        self.game.send_game_command(f"fov {self.cfg.field_of_view}")
        for x, y in self.floor.places(rng):
            self.game.send_game_command(f"warp {x} {y}")
            self._press(0, 0, 0, SETTLE)
            if math.hypot(self.state["CAMERA_POSITION_X"] - x, self.state["CAMERA_POSITION_Y"] - y) < 1:
                break
        else:
            raise DataError(f"{self.world}: the player stands at none of up to {PLACES} places; give another map")
        self.angle, self.pitch = float(rng.uniform(0, 360)), 0.0
        self._press(0, 0, _wrapped(self.state["CAMERA_ANGLE"] - self.angle))
        return self._view()

    def step(self, action: Action) -> View:
        if action.move_y or action.roll:
            raise ConfigError("a player of Doom cannot rise, sink or roll: leave out the keys u and dn")
        cfg = self.cfg
        distance, turn = cfg.motion.move * cfg.units / cfg.motion.fps, cfg.motion.turn / cfg.motion.fps
        self.angle -= turn * action.yaw
        self.pitch = float(np.clip(self.pitch + turn * action.pitch, -MAX_PITCH_DEG, MAX_PITCH_DEG))
        c, s = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y = self.state["VELOCITY_X"], self.state["VELOCITY_Y"]
        forward = self._thrust(distance * action.move_z, x * c + y * s)
        side = self._thrust(distance * action.move_x, x * s - y * c)
        self._press(forward, side, _wrapped(self.state["CAMERA_ANGLE"] - self.angle) / cfg.tics, cfg.tics)
        return self._view()

    def _thrust(self, distance: float, speed: float) -> int:
        """Units of a button that carry a player of this speed so far in a frame."""
        kept = FRICTION ** np.arange(self.cfg.tics)
        thrust = (distance - kept.sum() * speed) / (kept.cumsum().sum() * THRUST)
        return round(float(np.clip(thrust, -STRONGEST, STRONGEST)))

    def _press(self, forward: int, side: int, turn: float, tics: int = 1) -> None:
        """Hold the buttons; to the right counts positive, and `turn` is degrees per tic."""
        self.game.make_action([forward, side, turn], tics)
        if self.game.is_episode_finished():
            raise GameEndedError(f"{self.world}: the level ended")
        state = self.game.get_state()
        self.state, self.picture = dict(zip(VARIABLES, state.game_variables.tolist(), strict=True)), state.screen_buffer

    def _view(self) -> View:
        state, cfg = self.state, self.cfg
        if state["CAMERA_FOV"] != cfg.field_of_view or state["CAMERA_PITCH"] or state["CAMERA_ROLL"]:
            raise DataError(f"{self.world}: the camera is {state}, not level with {cfg.field_of_view} degrees")
        pitch = so3_exp(np.array([math.radians(self.pitch), 0.0, 0.0]))
        heading = so3_exp(np.array([0.0, math.radians(90 - state["CAMERA_ANGLE"]), 0.0]))
        x, y, z = (state[f"CAMERA_POSITION_{axis}"] / cfg.units for axis in "XYZ")
        frame = seen(self.picture, self.wide, pitch, cfg.intrinsics, (cfg.height, cfg.width))
        return View(frame, rigid(heading @ pitch, np.array([x, -TALL * z, y])), cfg.intrinsics)


def _wrapped(degrees: float) -> float:
    return (degrees + 180) % 360 - 180


def seen(
    picture: UInt8[np.ndarray, "H W 3"],
    wide: float,
    R: Float[np.ndarray, "3 3"],
    K: Float[np.ndarray, "4"],
    size: tuple[int, int],
) -> UInt8[np.ndarray, "h w 3"]:
    """What a camera sees of a picture that another one took at the same place, area-averaged.

    `wide`: tangent of half the picture's field of view; R: from the axes of the camera to those of the picture's; K,
    normalised, and size (h, w) are the camera's.
    """
    height, width = size
    fx, fy, cx, cy = K
    rows, columns = picture.shape[:2]
    finer = max(1, math.ceil(columns / (2 * wide * fx * width)))  # samples per pixel and axis
    u, v = ((np.arange(n * finer) + 0.5) / (n * finer) for n in (width, height))
    x, y = np.meshgrid((u - cx) / fx, (v - cy) / fy)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ R.T
    column, row = (rays[..., :2] / rays[..., 2:] / wide * columns + [columns, rows]).transpose(2, 0, 1) / 2
    sampled = picture[row.clip(0, rows - 1).astype(int), column.clip(0, columns - 1).astype(int)]
    return sampled.reshape(height, finer, width, finer, 3).mean((1, 3)).round().astype(np.uint8)


def map_names(wad: Path) -> list[str]:
    """Names of the maps in a WAD file: a lump before its THINGS or TEXTMAP. ConfigError for other files."""
    try:
        content = wad.read_bytes()
        count, start = struct.unpack_from("<4xii", content)
        names = [struct.unpack_from("<8x8s", content, start + 16 * i)[0].rstrip(b"\0") for i in range(count)]
    except (OSError, struct.error) as error:
        raise ConfigError(f"wad={wad}: no WAD file can be read there: {error}") from error
    return [
        name.decode("ascii", "replace").lower() for name, after in pairwise(names) if after in (b"THINGS", b"TEXTMAP")
    ]


class FloorPlan:
    """Where a player may stand in a map."""

    def __init__(self, sectors: Any) -> None:
        """`sectors` are those of a state of ViZDoom."""
        lines = [(i, line) for i, sector in enumerate(sectors) for line in sector.lines]
        self.ends = np.array([[line.x1, line.y1, line.x2, line.y2] for _, line in lines], np.float64)
        self.sector = np.array([i for i, _ in lines])
        self.blocking = np.array([line.is_blocking for _, line in lines])
        self.high = np.array([sector.ceiling_height - sector.floor_height for sector in sectors]) >= HEADROOM

    def places(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Some of the places, each as likely: x and y in map units; none if `rng` met none."""
        low, top = self.ends.reshape(-1, 2).min(0), self.ends.reshape(-1, 2).max(0)
        found = list[tuple[int, int]]()
        for _ in range(DRAWS):
            x, y = (int(value) for value in rng.uniform(low, top))
            if self.free(x, y):
                found.append((x, y))
            if len(found) == PLACES:
                break
        return found

    def free(self, x: float, y: float) -> bool:
        """Whether a point is inside a high enough sector, and clear of every blocking line."""
        x1, y1, x2, y2 = self.ends.T
        crossed = ((y1 > y) != (y2 > y)) & (x < x1 + (x2 - x1) * (y - y1) / np.where(y1 == y2, 1, y2 - y1))
        inside = np.bincount(self.sector[crossed], minlength=len(self.high)) % 2 == 1
        return bool((inside & self.high).any() and self._clear(x, y).all())

    def _clear(self, x: float, y: float) -> Bool[np.ndarray, " n"]:
        a, b = self.ends[self.blocking, :2], self.ends[self.blocking, 2:]
        along, to = b - a, np.array([x, y]) - a
        part = ((to * along).sum(1) / np.maximum((along**2).sum(1), 1e-9)).clip(0, 1)[:, None]
        return np.linalg.norm(to - part * along, axis=1) >= CLEARANCE
