"""Latent shards with the teacher's ODE trajectory of every clip: the data of stage 2a."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from minwm.core.runtime import progress
from minwm.core.types import Clip
from minwm.data.clips import DataError, read_manifest, write_manifest
from minwm.data.dataset import ShardDataset
from minwm.data.shards import ShardRecord, list_shards, read_record, shard_stats, write_shard

Collect = Callable[[Clip, int], Float[Tensor, "k b f c h w"]]
"""(clips, batch number) -> k states along the teacher's ODE per clip; the number seeds the random draws."""


def collect_trajectories(
    source: ShardDataset, out: Path, clips: int, collect: Collect, about: dict[str, Any], *, batch: int = 16
) -> None:
    """Write the first `clips` records of `source` with their trajectories, one shard per batch.

    Resumable batch by batch. `about` describes teacher and recipe. Raises DataError if `source` has fewer clips, or if
    `out` was made with another `about`.
    """
    if clips > len(source):
        raise DataError(f"{source.path} has {len(source)} clips, {clips} trajectories were asked for; render more")
    manifest = {**source.manifest, "trajectories": about, "counts": {"train": clips}}
    if (out / "manifest.json").exists():
        if read_manifest(out, "minwm pipeline")["trajectories"] != about:
            raise DataError(
                f"{out} holds trajectories of another teacher or recipe; delete it, or choose another folder"
            )
    else:
        write_manifest(out, manifest)
    done = len(list_shards(out))
    starts = range(0, clips, batch)
    with progress(len(starts) - done, "trajectories") as bar:
        for number, start in list(enumerate(starts))[done:]:
            indices = range(start, min(start + batch, clips))
            states = collect(source.batch(indices), number)
            records = [_record(source, i, states[:, j]) for j, i in enumerate(indices)]
            stats = shard_stats(records, psnr=source.manifest["codec_psnr"])
            write_shard(out / f"train-0000-{number:06d}.tar", records, stats)
            bar.advance()


def _record(source: ShardDataset, index: int, states: Float[Tensor, "k f c h w"]) -> ShardRecord:
    shard, entry = source.entries[index]
    meta, tensors = read_record(shard, entry)
    return ShardRecord(entry.id, meta, {**tensors, "trajectory": states.cpu().contiguous()})
