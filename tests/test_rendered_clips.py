"""Rendered clips: they pass their checks, and can be rendered again from their records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minwm.cameras.trajectory import parse
from minwm.core.config import ConfigError
from minwm.data.clips import ClipFolder, check
from minwm.data.dataset import ShardDataset
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.rerender import RenderConfig, WorldSource, check_renders, render_worlds, reproduce
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText

SMALL = RenderConfig(latents=3, height=32, width=32, clips_per_world=2)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> ClipFolder:
    return render_worlds(tmp_path_factory.mktemp("town") / "raw", SMALL, clips=3)


def test_rendered_worlds_pass_their_checks(town: ClipFolder) -> None:
    assert check(town.path) == [] and check_renders(town, share=1.0) == []
    records = [town.record(clip) for clip in town.ids()]
    assert [r.seed for r in records] == [0, 0, 1] and all(len(r.track) == 9 for r in records)
    assert all(parse(r.trajectory).latents == 2 for r in records)


def test_a_wrong_pose_is_seen_by_rendering_again(town: ClipFolder, tmp_path: Path) -> None:
    copy = ClipFolder(Path(shutil.copytree(town.path, tmp_path / "raw")))
    record = copy.record(copy.ids()[0])
    assert record.origin is not None
    turned = record.origin @ np.diag([-1.0, 1.0, -1.0, 1.0])
    path = copy.clips / f"{record.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "origin": turned.tolist()}))
    assert [p.split(":")[0] for p in check_renders(copy, share=1.0)] == [record.id]


def test_a_clip_is_reproduced_from_its_record_alone(town: ClipFolder) -> None:
    record, frames = WorldSource(SMALL).make(2)
    assert np.array_equal(reproduce(town.record(record.id)).frames, frames)


def test_an_encoded_clip_can_still_be_rendered(town: ClipFolder, tmp_path: Path) -> None:
    codec = SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1).build()
    encode_clips(town.path, tmp_path, codec, WordText(dim=8), cfg=EncodeConfig(batch=3, val=0.0))
    example = ShardDataset(tmp_path, "train")[2]
    _, frames = WorldSource(SMALL).make(2)
    assert np.array_equal(reproduce(example.record).frames, frames)


def test_prescribed_trajectories_are_followed(tmp_path: Path) -> None:
    cfg = replace(SMALL, trajectories=("w*2", "j*2"), height=16, width=16)
    folder = render_worlds(tmp_path, cfg, clips=2)
    assert [folder.record(clip).trajectory for clip in folder.ids()] == ["w*2", "j*2"]
    with pytest.raises(ConfigError, match="fills 4 latents"):
        replace(cfg, trajectories=("w*3",))
