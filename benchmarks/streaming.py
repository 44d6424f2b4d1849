"""Reading of data larger than memory, two experiments of `data.py`: small clips, and clips of Wan's size."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minwm.bench.scaling import Cluster, scale
from minwm.cameras.trajectory import parse
from minwm.data.clips import LATENT_SHARDS, ClipRecord, read_manifest, write_manifest
from minwm.data.dataset import ShardDataset, loader
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.data.shards import ShardRecord, list_shards, read_index, read_record, shard_stats, write_shard
from minwm.experiments.ablate import camera_start
from minwm.experiments.ablations import camera_run, shipped
from minwm.experiments.presets import stage
from minwm.nets.text import WordText
from minwm.store.folder import load_codec
from minwm.store.model import ModelConfig
from minwm.train.build import train

READS = 100
"""Batches that are read with an empty page cache."""
STREAMED = 32768
"""Records: over the gigabyte up to which data stays in memory."""
WAN_STREAMED, WAN_READ, CAPTION = 160, 20, 64
"""Of Wan's size: records, also over a gigabyte, those of them that are read, and tokens of a caption."""


def forget(folder: Path) -> None:
    """Drop the shards of a folder from the page cache, as if other files had taken its place."""
    for shard in list_shards(folder):
        handle = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def enlarged(latents: Path, out: Path, count: int, shard_size: int) -> Path:
    """The training records of a folder again and again under new names."""
    (shard,) = [path for path in list_shards(latents) if path.name.startswith("train")]
    index = read_index(shard)
    records = [read_record(shard, entry) for entry in index.records]
    for number, first in enumerate(range(0, count, shard_size)):
        chosen = ((i, records[i % len(records)]) for i in range(first, first + shard_size))
        part = [ShardRecord(f"x-{i:06d}", {**meta, "id": f"x-{i:06d}"}, tensors) for i, (meta, tensors) in chosen]
        write_shard(out / f"train-0000-{number:06d}.tar", part, index.summary)
    write_manifest(out, {**read_manifest(latents, ""), "counts": {"train": count}})
    return out


def read_cold(folder: Path, batch: int, reads: int) -> dict[str, Any]:
    """Batches one after the other, as fast as they come, from a disk whose cache is emptied before each; wall time."""
    data = ShardDataset(folder, "train")
    assert not data.in_memory
    batches = loader(data, batch)
    begun = time.perf_counter()
    for _ in range(reads):
        forget(folder)
        next(batches)
    rate = batch * reads / (time.perf_counter() - begun)
    megabytes = sum(shard.stat().st_size for shard in list_shards(folder)) / 1e6
    return {
        "megabytes": megabytes,
        "records": len(data),
        "clips_per_s_read": rate,
        "megabytes_per_s_read": rate * megabytes / len(data),
    }


def streaming(root: Path, clips: int) -> dict[str, Any]:
    """Clips per second that come from a disk whose cache is empty, and those that the demo's camera stage trains on
    meanwhile, with the share of its time that it waits for them; wall times."""
    raw = render_worlds(root / "raw", RenderConfig(), clips=clips)
    encode_clips(raw.path, root / "few", load_codec(shipped("codec")), WordText(), cfg=EncodeConfig(val=0))
    folder = enlarged(root / "few", root / "latents", STREAMED, 1024)
    alone = read_cold(folder, 8, READS)
    camera_start(root / "start")
    run = replace(camera_run(root, "run", steps=30), data=str(folder))
    forget(folder)
    train(run, root / "run")
    steps = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()][5:]
    return {
        **alone,
        "clips_per_s_trained": float(np.median([step["clips_per_s"] for step in steps])),
        "longest_wait_s": max(step["data_wait_s"] for step in steps),
        "mean_wait_s": float(np.mean([step["data_wait_s"] for step in steps])),
    }


def wan_shards(out: Path, model: ModelConfig) -> Path:
    """Latent shards of the model's size. Their values are random: files are not compressed, and read as fast."""
    track = parse(f"w*{model.latents - 1}").track(model.motion, model.intrinsics)
    shape, text = (model.latents, model.network.channels, model.height // 8, model.width // 8), model.text
    one = ClipRecord(
        id="noise", source="noise", source_id="noise", source_license="CC0-1.0", split_key="noise", track=track,
        caption="noise", caption_source="noise", hw=(model.height, model.width), pose_kind="commanded",
    )  # fmt: skip
    tensors = {"latent": torch.randn(shape), "text": torch.randn(CAPTION, text.dim)}
    tensors |= {"c2w": torch.from_numpy(track.c2w), "K": torch.from_numpy(track.K)}
    shard = ShardRecord(one.id, one.meta(), tensors)
    write_shard(out / "few" / "train-0000-000000.tar", [shard], shard_stats([shard], psnr=0.0))
    codec = {"stride": model.motion.stride, "scale": 8, "channels": shape[1]}
    manifest = {
        "kind": LATENT_SHARDS,
        "complete": True,
        "codec": {"id": "noise", "hash": "", **codec},
        "text": {"id": "noise", "hash": "", "dim": text.dim, "length": text.length},
        "raw": {"kind": "noise", "config": {}},
        "counts": {"train": 1},
        "codec_psnr": 0.0,
    }
    write_manifest(out / "few", manifest)
    return enlarged(out / "few", out / "latents", WAN_STREAMED, 16)


def streaming_wan(root: Path, _clips: int) -> dict[str, Any]:
    """The same with clips of Wan's size, a clip at a time, for one who takes as long for each as an H200 trains on it
    by `minwm plan` (989 TFLOP/s, of which 40 % are reached)."""
    run = stage("wan2.1-1.3b/camera", root)
    folder = wan_shards(root, run.model)
    planned = scale(run, 1, Cluster()).steps["student"].seconds[1] / (run.batch * run.accumulate)
    alone, waits = read_cold(folder, 1, WAN_READ), list[float]()
    batches = loader(ShardDataset(folder, "train"), 1)
    for _ in range(WAN_READ):
        forget(folder)
        begun = time.perf_counter()
        clip = next(batches)
        waits.append(time.perf_counter() - begun)
        time.sleep(planned)
    return {
        "latents": list(clip.latents.shape[1:]),
        **alone,
        "clips_per_s_trained_by_plan": 1 / planned,
        "first_wait_s": waits[0],
        "longest_wait_s": max(waits[1:]),
        "mean_wait_s": float(np.mean(waits[1:])),
    }
