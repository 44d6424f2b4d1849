"""Raw clips of noise, which need no renderer, and latent shards of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.data.clips import ClipRecord
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.source import produce
from minwm.nets.small_codec import SmallCodec, SmallCodecConfig
from minwm.nets.text import WordText

MOTION = Motion(move=0.5, turn=24.0, fps=16.0)
CFG = EncodeConfig(batch=3, shard_size=4, val=0.4)
TEXT = WordText(dim=8, length=12)


@dataclass(frozen=True)
class Noise:
    """A source that needs no renderer; clip i is scene i // 2."""

    level: int = 200
    kind: str = "noise"

    @property
    def config(self) -> dict[str, Any]:
        return {"level": self.level}

    def clip_id(self, index: int) -> str:
        return f"noise-{index:03d}"

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        track = parse("w+j*1,d*1").track(MOTION, intrinsics(70.0, 16, 16))
        record = ClipRecord(
            id=self.clip_id(index),
            source="noise",
            source_id=f"scene {index // 2}",
            source_license="CC0-1.0",
            split_key=f"scene:{index // 2}",
            track=track,
            caption=f"noise number {index}",
            caption_source="test",
            hw=(16, 16),
            pose_kind="ground_truth",
            origin=np.eye(4),
            quality={"sharpness": 0.1 + index},
        )
        blocks = np.random.default_rng(index).integers(0, self.level, (len(track), 2, 2, 3), np.uint8)
        return record, blocks.repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def codec() -> SmallCodec:
    torch.manual_seed(0)
    return SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1).build()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec: SmallCodec) -> Path:
    """raw/ and shards/ with 12 clips; tests that change anything work on a copy."""
    base = tmp_path_factory.mktemp("data")
    produce(Noise(), base / "raw", 12)
    encode_clips(base / "raw", base / "shards", codec, TEXT, cfg=CFG)
    return base


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


@pytest.fixture
def raw(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "raw", tmp_path / "raw"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
