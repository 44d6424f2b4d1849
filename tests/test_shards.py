"""Latent shards: what the codec gave is read back, and nothing broken is read silently."""
# ruff: noqa: F811  (fixtures are imported, and then arguments)

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_clips import CFG, TEXT, codec, edit, made, raw, shards  # noqa: F401  (fixtures)

from minwm.cameras.track import latent_cameras
from minwm.core.config import UserError
from minwm.core.media import to_pixels
from minwm.core.types import Clip
from minwm.data.clips import ClipFolder, DataError, read_manifest
from minwm.data.dataset import RawDataset, ShardDataset, check_shards
from minwm.data.encode import encode_clips
from minwm.data.shards import index_path, list_shards, read_index
from minwm.data.trajectories import collect_trajectories
from minwm.nets.small_codec import SmallCodec, SmallCodecConfig


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
