"""Latent shards with the teacher's ODE trajectory of every clip: the data of stage 2a."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from minwm.core.runtime import progress, rank, world_size
from minwm.core.types import Clip
from minwm.data.clips import DataError, read_manifest, write_manifest
from minwm.data.dataset import ShardDataset
from minwm.data.shards import ShardRecord, list_shards, read_record, shard_stats, write_shard

MAKER = "minwm data trajectories"
Collect = Callable[[Clip, int], Float[Tensor, "k b f c h w"]]
"""(clips, batch number) -> k states along the teacher's ODE per clip; the number seeds the random draws."""


def collect_trajectories(
    source: ShardDataset, out: Path, clips: int, collect: Collect, about: Mapping[str, Any], *, batch: int = 16
) -> None:
    """Write the first `clips` records of `source` with their trajectories, one shard per batch.

    Resumable batch by batch; the processes of torchrun share them. `about`, JSON values, says what else trajectories
    depend on. Raises DataError if `source` has fewer clips, if a state is not finite, or if `out` holds anything else.
    """
    if clips > len(source):
        raise DataError(f"{source.path} has {len(source)} training clips, not {clips}: give fewer, or render more")
    about = {**about, "clips": clips, "batch": batch, "data": source.fingerprint}
    kept = {name: value for name, value in source.manifest.items() if name not in ("command", "commit", "versions")}
    manifest = {**kept, "trajectories": about, "counts": {"train": clips}}
    if not (out / "manifest.json").exists():
        write_manifest(out, {**manifest, "complete": False})
    _check_about(out, about)
    done = {path.name for path in list_shards(out)}
    shards = {f"train-0000-{number:06d}.tar": number for number in range(len(range(0, clips, batch)))}
    mine = [shard for shard in [*shards.items()][rank() :: world_size()] if shard[0] not in done]
    with progress(len(mine), "batches of trajectories") as bar:
        for name, number in mine:
            indices = range(number * batch, min((number + 1) * batch, clips))
            states = collect(source.batch(indices), number)
            if not states.isfinite().all():
                names = f"{source.ids[indices[0]]} to {source.ids[indices[-1]]}"
                raise DataError(f"clips {names}: their trajectories are not finite; check the teacher's weights")
            records = [_record(source, i, states[:, j]) for j, i in enumerate(indices)]
            stats = shard_stats(records, psnr=source.manifest["codec_psnr"])
            write_shard(out / name, records, stats)
            bar.advance()
    if len(list_shards(out)) == len(shards) and not read_manifest(out, MAKER)["complete"]:
        write_manifest(out, manifest)


def _check_about(out: Path, about: Mapping[str, Any]) -> None:
    """Raise DataError, with what differs, unless the folder holds such trajectories."""
    before = read_manifest(out, MAKER).get("trajectories")
    if before is None:
        raise DataError(f"{out} holds clips, and no trajectories; give another folder")
    for name, value in about.items():
        if before.get(name) != value:
            raise DataError(
                f"{out} holds trajectories with another {name}: {before.get(name)}, now {value}; give another folder, "
                "or delete it"
            )


def _record(source: ShardDataset, index: int, states: Float[Tensor, "k f c h w"]) -> ShardRecord:
    shard, entry = source.entries[index]
    meta, tensors = read_record(shard, entry)
    return ShardRecord(entry.id, meta, {**tensors, "trajectory": states.cpu().contiguous()})
