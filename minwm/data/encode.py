"""Raw clips to latent shards: clips through the codec, captions and first frames through the text encoder.

Resumable and distributed: a clip is done when a shard index lists it, and an interruption loses at most the shards
being filled. Shards are the same whoever writes them: clips that are not done go, in order, into the numbers that are
missing, and shard n belongs to rank `n % world`. Other ranks may finish theirs meanwhile: that moves no other clip.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from minwm.core.config import ConfigError, to_dict
from minwm.core.media import to_pixels
from minwm.core.runtime import rank, world_size
from minwm.data.clips import LATENT_SHARDS, ClipFolder, ClipRecord, DataError, read_manifest, split_of, write_manifest
from minwm.data.distribute import each
from minwm.data.shards import ShardRecord, list_shards, read_index, shard_stats, write_shard
from minwm.nets.codec import VideoCodec
from minwm.nets.text import TextEncoder


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How clips become shards."""

    batch: int = 8
    """Clips per pass through the codec."""
    shard_size: int = 256
    """Clips per shard."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number type of latents and of states of captions and first frames on disk; poses and K are float64."""
    val: float = 0.1
    """Share of scenes for validation, chosen by a hash of `ClipRecord.split_key`."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.shard_size < 1:
            raise ConfigError(f"encode: batch={self.batch}, shard_size={self.shard_size}; give at least 1")
        if not 0 <= self.val < 1:
            raise ConfigError(f"encode.val={self.val}: a share from 0 up to but not including 1")


def encode_clips(
    raw: Path,
    out: Path,
    codec: VideoCodec,
    text: TextEncoder,
    device: torch.device | str = "cpu",
    cfg: EncodeConfig = EncodeConfig(),
    ray: bool = False,
) -> dict[str, Any]:
    """Encode the clips of `raw` that `out` lacks; returns the manifest of `out`, complete if no other rank is at work.

    Under torchrun every rank takes its part of the shards; with `ray` the workers of a cluster do, a shard each at a
    time, with a GPU if `device` is one.

    Raises DataError if `out` was encoded with another codec, text encoder or config.
    """
    folder = ClipFolder(raw)
    out.mkdir(parents=True, exist_ok=True)
    shape = {"stride": codec.stride, "scale": codec.scale, "channels": codec.channels}
    others = {name: [*rows_and_width] for name, rows_and_width in text.shapes.items() if name != "text"}
    settings = {
        "codec": {**identity(codec), **shape},
        "text": {**identity(text), "dim": text.dim, "length": text.length, **others},
        "config": to_dict(cfg),
        "raw": {"kind": folder.manifest()["kind"], "config": folder.manifest()["config"]},
    }
    _check_settings(out, settings)
    clips = folder.ids()
    parts = _missing_shards(folder, clips, out, cfg)
    if captions := {record.caption for _, records in parts for record in records}:
        text.encode(sorted(captions))  # all at once: a large encoder is loaded once for those that are not in its cache
    encoder = _Encoder(folder, codec, text, torch.device(device), cfg)
    for _ in each(encoder.write, parts, "shards", ray, gpus=int(encoder.device.type == "cuda")):
        pass
    _finish(out, settings, set(clips))
    return read_manifest(out, "minwm data encode")


def _missing_shards(
    folder: ClipFolder, clips: Sequence[str], out: Path, cfg: EncodeConfig
) -> list[tuple[Path, list[ClipRecord]]]:
    """The shards that this rank is to write, with their records."""
    shards = list_shards(out)
    taken = {shard.name for shard in shards}
    done = {entry.id for shard in shards for entry in read_index(shard).records}
    records = [folder.record(clip) for clip in clips if clip not in done]
    parts = list[tuple[Path, list[ClipRecord]]]()
    for split in ("train", "val"):
        group = [r for r in records if split_of(r.split_key, cfg.val) == split]
        names = ((number, f"{split}-0000-{number:06d}.tar") for number in count())
        missing = (one for one in names if one[1] not in taken)
        for start, (number, name) in zip(range(0, len(group), cfg.shard_size), missing, strict=False):
            if number % world_size() == rank():
                parts.append((out / name, group[start : start + cfg.shard_size]))
    return parts


@dataclass(frozen=True)
class _Encoder:
    folder: ClipFolder
    codec: VideoCodec
    text: TextEncoder
    device: torch.device
    cfg: EncodeConfig

    def write(self, part: tuple[Path, Sequence[ClipRecord]]) -> None:
        """Write a shard of these records. A second call writes the same again."""
        path, records = part
        if isinstance(self.codec, nn.Module):
            self.codec.to(self.device)
        encoded, first_frames = list[ShardRecord](), list[np.ndarray]()
        for batch in _batches(records, self.cfg.batch):
            frames = np.stack([self.folder.frames(r.id) for r in batch])
            encoded += self.encode(batch, frames)
            first_frames += [frame.copy() for frame in frames[:, 0]]
        for name, states in self.text.encode_images(first_frames).items():
            for record, state in zip(encoded, states, strict=True):
                record.tensors[name] = self.stored(state)
        write_shard(path, encoded, shard_stats(encoded, self.psnr(records[0])))

    @torch.inference_mode()
    def encode(self, records: Sequence[ClipRecord], frames: UInt8[np.ndarray, "b n h w 3"]) -> Iterator[ShardRecord]:
        """Encode clips of one size in one batch, all but what their first frames are besides latents."""
        latents = self.codec.encode(to_pixels(torch.from_numpy(frames)).to(self.device)).cpu()
        states = self.text.encode([r.caption for r in records])
        for i, (record, latent) in enumerate(zip(records, latents, strict=True)):
            if not latent.isfinite().all():
                raise DataError(f"clip {record.id}: its latents are not finite; check the codec's weights")
            tensors = {
                "latent": self.stored(latent),
                **{name: self.stored(_trimmed(x[i])) for name, x in states.items()},
                "c2w": torch.from_numpy(record.track.c2w),
                "K": torch.from_numpy(record.track.K),
            }
            yield ShardRecord(record.id, record.meta(), tensors)

    def stored(self, x: Tensor) -> Tensor:
        """x as it is written to disk."""
        return x.to({"float32": torch.float32, "float16": torch.float16}[self.cfg.dtype]).contiguous()

    @torch.inference_mode()
    def psnr(self, record: ClipRecord) -> float:
        """PSNR in dB of a clip after encoding and decoding: the upper bound for models of these latents."""
        clip = to_pixels(torch.from_numpy(self.folder.frames(record.id)))[None].to(self.device)
        error = (self.codec.decode(self.codec.encode(clip)) - clip) / 2
        return float(-10 * error.square().mean().clamp_min(1e-12).log10())


def _batches(records: Sequence[ClipRecord], size: int) -> Iterator[list[ClipRecord]]:
    for _, group in groupby(records, lambda r: (len(r.track), r.hw)):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _trimmed(state: Float[Tensor, "l d"]) -> Float[Tensor, "m d"]:
    """States without the zero rows at their end."""
    used = state.abs().sum(1).nonzero()
    return state[: int(used.max()) + 1 if len(used) else 0]


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the manifest of a new folder; DataError if an existing one has other settings."""
    if not (out / "manifest.json").exists():
        write_manifest(out, {"kind": LATENT_SHARDS, "complete": False, **settings})
        return
    before = read_manifest(out, "minwm data encode")
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise DataError(
            f"{out} was encoded with another {name}: {before.get(name)}, now {settings[name]}; "
            "choose another folder or delete it"
        )


def _finish(out: Path, settings: dict[str, Any], clips: set[str]) -> None:
    """Write the totals of all shard indices into the manifest, if they list all clips: whichever rank is last does."""
    shards = list_shards(out)
    indices = [read_index(shard) for shard in shards]
    if not (indices or clips):
        raise DataError(f"{out}: nothing to encode; render clips first with `minwm data render`")
    if not clips <= {entry.id for index in indices for entry in index.records}:
        return
    counts: Counter[str] = Counter()
    for shard, index in zip(shards, indices, strict=True):
        counts[shard.name.split("-")[0]] += len(index.records)
    values = sum(i.summary.values for i in indices)
    mean = np.sum([i.summary.total for i in indices], axis=0) / values
    variance = np.sum([i.summary.square for i in indices], axis=0) / values - mean**2
    sums = {
        "complete": True,
        "counts": dict(counts),
        "latent": {"mean": mean.tolist(), "std": np.sqrt(variance.clip(0)).tolist()},
        "codec_psnr": float(np.mean([i.summary.psnr for i in indices])),
        "licences": sorted({name for i in indices for name in i.summary.licences}),
    }
    write_manifest(out, {"kind": LATENT_SHARDS, **settings, **sums})


def identity(part: object) -> dict[str, str]:
    """Class name and hash of config and weights of a codec or text encoder; equal hashes encode alike.

    Of a codec's config, `encoding` alone counts.

    What only decodes has no part in it: a decoder may be trained, or exchanged, when there are latents already.
    """
    name = type(part).__name__
    decoding, encoding = (part.decoding, part.encoding) if isinstance(part, VideoCodec) else ((), "")
    digest = hashlib.sha256(f"{name}{encoding}".encode())
    if is_dataclass(part):
        digest.update(repr(sorted(to_dict(part).items())).encode())
    if isinstance(part, nn.Module):
        weights = {key: w for key, w in part.state_dict().items() if key.partition(".")[0] not in decoding}
        for key, value in sorted(weights.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"id": name, "hash": digest.hexdigest()[:16]}
