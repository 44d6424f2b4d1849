"""Data: what is written is read back, an interruption loses nothing, nothing broken is read silently."""

import contextlib
import json
import multiprocessing
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run

from minwm.cameras.track import intrinsics, latent_cameras
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import UserError
from minwm.core.files import locked
from minwm.core.media import to_pixels
from minwm.core.types import Clip
from minwm.data import clips as clips_module
from minwm.data.clips import ClipFolder, ClipRecord, DataError, check, read_manifest, report, sheet
from minwm.data.dataset import RawDataset, ShardDataset, check_shards
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.quality import QualityConfig, check_quality
from minwm.data.shards import index_path, list_shards, read_index
from minwm.data.source import produce
from minwm.data.trajectories import collect_trajectories
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


def assert_same(one: ClipFolder, two: ClipFolder, clip: str) -> None:
    """Records to the bit; pixels but for the encoder's lookahead, which reads memory that it never wrote."""
    assert one.record(clip).to_json() == two.record(clip).to_json()
    assert np.abs(one.frames(clip).astype(int) - two.frames(clip)).mean() < 1


# ---------------------------------------------------------------------------------------------
# Raw clips


def test_a_clip_is_read_as_it_was_written(made: Path) -> None:
    written, frames = Noise().make(3)
    record = ClipFolder(made / "raw").record(written.id)
    assert np.array_equal(record.track.c2w, written.track.c2w)
    assert record.meta() == written.meta()
    error = ClipFolder(made / "raw").frames(written.id).astype(float) - frames
    assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 40


def test_an_interrupted_run_leaves_whole_clips_and_continues(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video, calls = clips_module.write_video, []

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        calls.append(path)
        write_video(path, *arguments, **options)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(clips_module, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        produce(Noise(), tmp_path / "raw", 4)
    monkeypatch.undo()
    folder = ClipFolder(tmp_path / "raw")
    assert folder.ids() == ["noise-000", "noise-001"] and check(tmp_path / "raw") == []
    before = (folder.clips / "noise-001.mp4").stat().st_mtime_ns
    produce(Noise(), tmp_path / "raw", 4)
    assert (folder.clips / "noise-001.mp4").stat().st_mtime_ns == before
    assert folder.manifest()["clips"] == 4 and check(tmp_path / "raw") == []
    for clip in folder.ids():
        assert_same(folder, ClipFolder(made / "raw"), clip)


def test_ranks_make_the_clips_of_one_process(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        produce(Noise(), tmp_path / "raw", 12)
    folder = ClipFolder(tmp_path / "raw")
    assert folder.manifest()["clips"] == 12
    for clip in folder.ids():
        assert_same(folder, ClipFolder(made / "raw"), clip)


@pytest.mark.slow  # two new processes import torch: many seconds on a busy machine
def test_workers_make_the_clips_of_one_process(tmp_path: Path, made: Path) -> None:
    folder = produce(Noise(), tmp_path / "raw", 4, workers=2)
    for clip in ("noise-000", "noise-001", "noise-002", "noise-003"):
        assert_same(folder, ClipFolder(made / "raw"), clip)


@dataclass(frozen=True)
class Waiting(Noise):
    """A worker that makes one of its clips tells its folder and waits for ever."""

    folder: str = ""

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        with locked(Path(self.folder) / str(index)):
            time.sleep(3600)
        raise AssertionError


@pytest.mark.slow  # three new processes import torch
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    source = Waiting(folder=str(tmp_path / "busy"))
    parent = multiprocessing.get_context("spawn").Process(
        target=produce, args=(source, tmp_path / "raw", 2), kwargs={"workers": 2}
    )
    parent.start()
    busy = [tmp_path / "busy" / name for name in ("0", "1")]
    until(lambda: all((folder / ".lock").exists() for folder in busy))
    parent.kill()
    parent.join()
    for folder in busy:
        until(lambda folder=folder: is_free(folder))


def is_free(folder: Path) -> bool:
    with contextlib.suppress(UserError), locked(folder):
        return True
    return False


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_without_clips_and_clips_that_no_codec_takes_are_problems(tmp_path: Path) -> None:
    ClipFolder.create(tmp_path / "none", "noise", {})
    assert check(tmp_path / "none") == ["no finished clips"]
    odd = ClipFolder.create(tmp_path / "odd", "noise", {})
    record, _ = Noise().make(0)
    odd.write(replace(record, hw=(14, 18)), np.random.default_rng(0).integers(0, 256, (9, 14, 18, 3), np.uint8))
    assert any("18x14 pixels; codecs need multiples of 8" in problem for problem in check(tmp_path / "odd"))


def test_a_folder_of_other_settings_is_refused(raw: Path) -> None:
    with pytest.raises(DataError, match="level: 200 -> 100"):
        produce(Noise(level=100), raw, 12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"caption": "a red box as the camera pans"}, "speaks of motion"),
        ({"fps": 2500.0}, r"units \(toy\) per second: scale the poses to below 30"),
        ({"fps": 500.0}, r"degrees per second: are 500 poses per second true\?"),
        ({"caption": " "}, "empty caption"),
        ({"source_license": ""}, "no licence"),
        ({"split_key": "scene:9"}, "would leak"),
        ({"hw": [32, 32]}, "the record says"),
        ({"K": [[0.7, 0.9, 0.5, 0.5]] * 9}, "not square"),
        ({"c2w": np.diag([1.0, -1.0, 1.0, 1.0])[None].repeat(9, 0).tolist()}, "mirrors the world"),
        ({"schema": 99}, "schema 99"),
        ({"speed": 3}, r"unknown fields \['speed'\]"),
    ],
)
def test_check_names_the_clip_and_the_problem(raw: Path, changes: dict[str, Any], expected: str) -> None:
    assert check(raw) == []
    edit(raw / "clips/noise-005.json", **changes)
    with pytest.raises(AssertionError, match=expected):
        assert [p for p in check(raw) if p.startswith("noise-005: ")] == []


def test_check_sees_jumps_and_lost_clips(raw: Path) -> None:
    record, frames = Noise().make(0)
    c2w = record.track.c2w.copy()
    c2w[6:, 0, 3] += 1.0
    ClipFolder(raw).write(replace(record, track=replace(record.track, c2w=c2w)), frames)
    (raw / "clips/noise-011.json").unlink()
    first, second = check(raw)
    assert first.startswith("noise-000: frame 6: a step") and second.startswith("manifest: 12 clips")


def test_any_raw_clips_are_judged_by_the_rules_for_footage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ClipFolder(Path(shutil.copytree(made / "raw", tmp_path / "raw")))
    assert run("data", "check", folder.path, "--quality") == 0
    record = replace(folder.record("noise-003"), caption="")
    folder.write(record, folder.frames("noise-003") // 20)
    found = check_quality(folder, QualityConfig())
    assert [line.split(": ")[:2] for line in (found[0], found[-1])] == [
        ["noise-003", r] for r in ("exposure", "caption")
    ]
    assert len({line.split(": ")[0] for line in found}) == 1
    folder.write(replace(record, caption="noise"), folder.frames("noise-003"))
    capsys.readouterr()
    assert run("data", "check", folder.path) == 0 and run("data", "check", folder.path, "--quality") == 2
    assert "noise-003: exposure" in capsys.readouterr().out


def test_report_counts_and_shows(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(made / "raw")
    assert (found["clips"], found["frames"], found["scenes"]) == (12, 108, 6)
    assert found["actions"] == {"forward+turn left": 12, "right": 12}
    assert found["licences"] == {"CC0-1.0": 12} and found["path_length"]["median"] == pytest.approx(0.25)
    json.dumps(found)
    whole = sheet(made / "raw", rows=3)
    assert whole.shape[0] >= 3 * 16
    monkeypatch.setattr(clips_module, "SHEET_PIXELS", 8)
    assert whole.shape[1] - sheet(made / "raw", rows=3).shape[1] == 3 * 8, "three frames of 16 pixels"


# ---------------------------------------------------------------------------------------------
# Shards


def test_a_batch_is_what_the_codec_and_the_text_encoder_gave(made: Path, codec: SmallCodec) -> None:
    data, folder = ShardDataset(made / "shards", "train"), ClipFolder(made / "raw")
    clip, chosen = data.batch([4, 0]), [data.ids[4], data.ids[0]]
    records = [folder.record(c) for c in chosen]
    frames = torch.from_numpy(np.stack([folder.frames(c) for c in chosen]))
    with torch.no_grad():
        torch.testing.assert_close(clip.latents, codec.encode(to_pixels(frames)))
    assert torch.equal(clip.cond.text, TEXT.encode([r.caption for r in records])["text"])
    w2c, K = latent_cameras([r.track for r in records], 4)
    assert clip.cond.w2c is not None and clip.cond.K is not None and clip.cond.first_latent is not None
    assert torch.equal(clip.cond.w2c, w2c) and torch.equal(clip.cond.K, K)
    assert torch.equal(clip.cond.first_latent, clip.latents[:, :1])
    assert ShardDataset(made / "shards", "train", image_start=False).batch([0]).cond.first_latent is None


def test_every_clip_is_in_one_split_and_scenes_stay_together(made: Path) -> None:
    train, val = (ShardDataset(made / "shards", split) for split in ("train", "val"))
    assert sorted(train.ids + val.ids) == ClipFolder(made / "raw").ids()
    scenes = [{data[i].record.split_key for i in range(len(data))} for data in (train, val)]
    assert scenes[0] and scenes[1] and not scenes[0] & scenes[1]
    assert train.manifest["counts"] == {"train": len(train), "val": len(val)}
    raw = RawDataset(made / "raw", "val", val=CFG.val)
    assert raw.ids == val.ids and raw.batch([1, 0]).shape == (2, 9, 3, 16, 16)


def test_shards_are_plain_tars_and_the_manifest_measures_them(made: Path) -> None:
    shard = list_shards(made / "shards")[0]
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert tar.getmember(names[1]).offset_data == read_index(shard).records[0].tensors.offset
    first = read_index(shard).records[0].id
    assert names[:2] == [f"{first}.json", f"{first}.safetensors"]
    splits = [ShardDataset(made / "shards", split) for split in ("train", "val")]
    latents = torch.cat([d.batch(range(len(d))).latents for d in splits]).double()
    mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4), correction=0)
    assert splits[0].manifest["latent"]["mean"] == pytest.approx(mean.tolist(), abs=1e-6)
    assert splits[0].manifest["latent"]["std"] == pytest.approx(std.tolist(), abs=1e-6)


def test_encoding_continues_and_refuses_another_codec(
    raw: Path, tmp_path: Path, codec: SmallCodec, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    for name in [p.name for p in (raw / "clips").iterdir() if p.stem > "noise-006"]:
        shutil.move(raw / "clips" / name, tmp_path / name)
    encode_clips(raw, out, codec, TEXT, cfg=CFG)
    before = {p: p.read_bytes() for p in list_shards(out)}
    (out / "train-0000-000002.tar").write_bytes(b"cut off before its index was written")
    for path in tmp_path.glob("noise-*"):
        shutil.move(path, raw / "clips" / path.name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        encode_clips(raw, out, codec, TEXT, cfg=CFG)
    assert {p: p.read_bytes() for p in before} == before and check_shards(out) == []
    for split in ("train", "val"):
        now, then = ShardDataset(out, split), ShardDataset(made / "shards", split)
        assert now.ids == then.ids
        torch.testing.assert_close(now.batch([0, 1]).latents, then.batch([0, 1]).latents)
    torch.manual_seed(5)
    with pytest.raises(DataError, match="another codec"):
        encode_clips(raw, out, SmallCodecConfig(channels=4, width=8, fine=8, finest=8).build(), TEXT, cfg=CFG)
    with pytest.raises(DataError, match="another text"):
        encode_clips(raw, out, codec, replace(TEXT, length=20), cfg=CFG)


def test_ranks_write_the_shards_of_one_process(
    made: Path, tmp_path: Path, codec: SmallCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is first, and after an interruption, too; the manifest is complete when all shards are."""
    for world, ranks in (("2", "1"), ("3", "102")):  # of two the first is killed, and three go on
        monkeypatch.setenv("WORLD_SIZE", world)
        for rank in ranks:
            monkeypatch.setenv("RANK", rank)
            manifest = encode_clips(made / "raw", tmp_path, codec, TEXT, cfg=CFG)
            files = {p.name: p.read_bytes() for p in tmp_path.glob("*.tar*")}
            assert manifest["complete"] == (len(files) == len([*(made / "shards").glob("*.tar*")]))
    assert files == {p.name: p.read_bytes() for p in (made / "shards").glob("*.tar*")} and len(files) > 6
    assert {**manifest, "command": ""} == {**read_manifest(made / "shards", ""), "command": ""}


def test_half_precision_is_read_as_float32(made: Path, tmp_path: Path, codec: SmallCodec) -> None:
    encode_clips(made / "raw", tmp_path, codec, TEXT, cfg=replace(CFG, dtype="float16"))
    half, full = (ShardDataset(p, "val").batch([0]) for p in (tmp_path, made / "shards"))
    assert half.latents.dtype == torch.float32 and half.cond.w2c is not None and full.cond.w2c is not None
    torch.testing.assert_close(half.latents, full.latents, atol=1e-3, rtol=1e-3)
    assert torch.equal(half.cond.w2c, full.cond.w2c)


def test_trajectories_stand_beside_the_latents_they_lead_to(made: Path, tmp_path: Path) -> None:
    source = ShardDataset(made / "shards", "train")
    numbers = []

    def collect(clip: Clip, number: int) -> torch.Tensor:
        numbers.append(number)
        return torch.stack([clip.latents * k for k in (3, 2, 1)])

    for _ in range(2):
        collect_trajectories(source, tmp_path, 5, collect, {"teacher": "a"}, batch=2)
    clip = ShardDataset(tmp_path, "train").batch([3, 0])
    assert numbers == [0, 1, 2] and clip.trajectory is not None
    torch.testing.assert_close(clip.trajectory, torch.stack([clip.latents * k for k in (3, 2, 1)]))
    assert torch.equal(clip.latents, source.batch([3, 0]).latents) and check_shards(tmp_path) == []
    with pytest.raises(DataError, match="trajectories with another teacher: a, now b"):
        collect_trajectories(source, tmp_path, 5, collect, {"teacher": "b"}, batch=2)
    with pytest.raises(DataError, match="with another clips: 5, now 4"):
        collect_trajectories(source, tmp_path, 4, collect, {"teacher": "a"}, batch=2)
    with pytest.raises(DataError, match="holds clips, and no trajectories"):
        collect_trajectories(source, source.path, 5, collect, {"teacher": "a"}, batch=2)
    with pytest.raises(DataError, match=rf"has {len(source)} training clips, not 99: give fewer"):
        collect_trajectories(source, tmp_path, 99, collect, {"teacher": "a"}, batch=2)


def test_unfinished_trajectories_are_not_trained_on(made: Path, tmp_path: Path) -> None:
    """What is there stays; the next call makes the rest, of which nothing differs."""
    source, numbers = ShardDataset(made / "shards", "train"), []

    def collect(clip: Clip, number: int) -> torch.Tensor:
        numbers.append(number)
        if numbers == [0, 1]:
            raise KeyboardInterrupt
        return clip.latents[None] * (float("nan") if numbers == [0, 1, 1] else 1.0)

    with pytest.raises(KeyboardInterrupt):
        collect_trajectories(source, tmp_path, 3, collect, {}, batch=2)
    with pytest.raises(DataError, match="is unfinished; to go on, run again what makes it"):
        ShardDataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"trajectories are not finite; check the teacher"):
        collect_trajectories(source, tmp_path, 3, collect, {}, batch=2)
    collect_trajectories(source, tmp_path, 3, collect, {}, batch=2)
    assert numbers == [0, 1, 1, 1] and len(ShardDataset(tmp_path, "train")) == 3


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-600])


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[read_index(shard).records[1].tensors.offset + 900] ^= 1
    shard.write_bytes(data)


def future(shard: Path) -> None:
    edit(index_path(shard), schema=2)


def garble(shard: Path) -> None:
    index_path(shard).write_text("{")


def no_member(shard: Path) -> None:
    records = json.loads(index_path(shard).read_text())["records"]
    del records[0]["tensors"]
    edit(index_path(shard), records=records)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (truncate, "cut off"),
        (flip, "record noise-00[0-9]: wrong checksum of its safetensors"),
        (future, "schema 2, this version reads 1"),
        (garble, "not readable"),
        (no_member, "'tensors'"),
        (Path.unlink, "missing though its index is there"),
    ],
)
def test_a_broken_shard_is_never_read_silently(shards: Path, harm: Callable[[Path], None], expected: str) -> None:
    shard = list_shards(shards)[0]
    harm(shard)
    with pytest.raises(DataError, match=expected) as caught:
        data = ShardDataset(shards, "train")
        data.batch(range(len(data)))
    assert shard.name in str(caught.value) and "minwm data encode` again" in str(caught.value)
    (problem,) = check_shards(shards)
    assert shard.name in problem


def test_a_wrong_or_unfinished_folder_is_named(tmp_path: Path, made: Path, shards: Path) -> None:
    edit(shards / "manifest.json", complete=False, command="minwm data encode it")
    with pytest.raises(DataError, match="what makes it: minwm data encode it"):
        ShardDataset(shards, "train")
    for path in (tmp_path, made / "raw"):
        with pytest.raises(UserError, match="minwm data encode"):
            ShardDataset(path, "train")
    with pytest.raises(UserError, match="minwm data render"):
        ClipFolder(tmp_path)
