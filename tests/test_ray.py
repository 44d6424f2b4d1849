"""Ingest and encoding on a local Ray cluster, one of whose workers is killed: no clip lost, none twice."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_ingest import CFG, footage, walk

from minwm.core.config import UserError
from minwm.core.files import find_files
from minwm.core.media import VIDEO_SUFFIXES
from minwm.data.clips import ClipFolder, check
from minwm.data.dataset import ShardDataset, check_shards
from minwm.data.distribute import each
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.ingest import ingest, ingest_video, notes
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
INGEST = replace(CFG, quality=replace(CFG.quality, epipolar=False))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Three workers."""
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def dying(work: Any, marker: Path, wait_for: Any) -> Any:
    """`work`, but its first call is killed (SIGKILL) as soon as `wait_for` finds something."""

    def once(item: Any) -> Any:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return work(item)

        def kill() -> None:
            while not wait_for(item):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill).start()
        return work(item)

    return once


def test_a_killed_worker_loses_no_clip_and_makes_none_twice(tmp_path: Path) -> None:
    for i, seed in enumerate((2, 5, 7, 8, 3, 6)):
        footage(tmp_path / "in", f"v{i}", walk(seed)[1], walk(seed)[0])
    ingest(tmp_path / "in", tmp_path / "plain", INGEST)
    plain = ClipFolder(tmp_path / "plain")
    manifest = plain.manifest()
    folder = ClipFolder.create(tmp_path / "out", manifest["kind"], manifest["config"])

    def first_picture(path: Path) -> bool:  # it dies in the middle of a video: a clip is there, its note is not
        return any(file.name.startswith(path.stem) for file in folder.clips.glob("*.json"))

    work = partial(ingest_video, tmp_path / "in", folder=folder, cfg=INGEST)
    videos = find_files(tmp_path / "in", VIDEO_SUFFIXES, "videos")
    marker = tmp_path / "killed"
    assert len([*each(dying(work, marker, first_picture), videos, "videos", ray=True)]) == 6
    assert marker.exists()
    made = ingest(tmp_path / "in", tmp_path / "out", INGEST, ray=True)  # nothing is left to do
    assert (made["videos"], made["clips"]) == (6, len(plain.ids())) and folder.ids() == plain.ids()
    listed = [clip for note in notes(tmp_path / "out") for clip in note["clips"]]
    assert sorted(listed) == folder.ids(), "a clip is listed once"
    for file in plain.clips.iterdir():
        assert (folder.clips / file.name).read_bytes() == file.read_bytes()
    assert check(tmp_path / "out") == []


def test_shards_of_a_cluster_are_those_of_one_process(tmp_path: Path) -> None:
    for i, seed in enumerate((2, 5, 7)):
        footage(tmp_path / "in", f"v{i}", walk(seed)[1], walk(seed)[0])
    ingest(tmp_path / "in", tmp_path / "raw", INGEST, ray=True)
    codec, cfg = (
        SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1).build(),
        EncodeConfig(shard_size=1, val=0.0),
    )
    for name in ("plain", "ray"):
        encode_clips(tmp_path / "raw", tmp_path / name, codec, WordText(), cfg=cfg, ray=name == "ray")
    assert check_shards(tmp_path / "ray") == []
    one, two = (ShardDataset(tmp_path / name, "train") for name in ("plain", "ray"))
    assert one.ids == two.ids and len(one) == 3
    assert all((one[i].latents - two[i].latents).abs().max() < 1e-5 for i in range(3))


def test_errors_of_the_work_arrive_and_an_item_that_kills_every_worker_is_named() -> None:
    def fails(item: int) -> int:
        raise UserError(f"{item} is odd")

    with pytest.raises(UserError, match=r"^1 is odd$"):
        list(each(fails, [1], "items", ray=True))

    def kills(item: int) -> int:
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    done = list[int]()
    with pytest.raises(UserError, match=r"workers died 4 times on 2 \(1 in all\); the rest is done"):
        done.extend(each(kills, range(5), "items", ray=True))
    assert sorted(done) == [0, 1, 3, 4]
