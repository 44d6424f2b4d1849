"""Glyphs and states of the first frame, beside text, from captions and frames to the network: in shards and streams."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Action, parse
from minwm.core.config import ConfigError
from minwm.core.types import Condition
from minwm.data.clips import ClipFolder, ClipRecord, DataError
from minwm.data.dataset import ShardDataset
from minwm.data.encode import encode_clips
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import TextEncoder, WordText
from minwm.recipes.base import random_clip
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.recipes.ops import drop_text, sample_start
from minwm.session.engines import ModelEngine
from minwm.session.generate import sampling_inputs
from minwm.session.session import Session
from minwm.store.model import Model, ModelConfig
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler

PROMPTS = ['a "red" tower', "a dome", 'the signs "blue hall" and "red" on a tower of stone']


@dataclass(frozen=True)
class QuotedWords(TextEncoder):
    """Words as text, those in quotes as glyphs, and the colours of the rows of a picture."""

    dim: int = 8
    length: int = 12

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"text": (12, 8), "glyphs": (4, 6), "image_states": (16, 3)}

    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        quoted = [" ".join(re.findall(r'"(.*?)"', caption)) for caption in captions]
        return {**WordText(8, 12).encode(captions), "glyphs": WordText(6, 4).encode(quoted)["text"]}

    def encode_images(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> dict[str, Tensor]:
        return {"image_states": torch.stack([torch.from_numpy(x.mean(1)).float()[:16] / 255 for x in images])}


CONFIG = ModelConfig(
    network=HunyuanConfig(
        dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=8, text_length=12, glyph_dim=6, glyph_length=4,
        glyph_hidden=8, image_dim=3, image_length=16, freq_dim=16, rope=(4, 6, 6), camera="dual",
    ),
    sampler=AutoregressiveSampler(steps=2, guidance=2.0),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    text=cast(WordText, QuotedWords()),
    negative="",
    latents=5,
    height=16,
    width=16,
    stream=StreamConfig(chunk=2, first_chunk=1, window=2),
)  # fmt: skip
TRACK = parse("w*4").track(CONFIG.motion, intrinsics(70.0, 16, 16))
AHEAD = Action.of(["w"])


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net, codec = CONFIG.network.build(), CONFIG.codec.build()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Model(CONFIG, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


def picture(seed: int) -> UInt8[np.ndarray, "h w 3"]:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def shards(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    folder = ClipFolder.create(out / "raw", "noise", {})
    for i, caption in enumerate(PROMPTS):
        record = ClipRecord(
            id=f"clip-{i}", source="noise", source_id=str(i), source_license="CC0-1.0", split_key=str(i), track=TRACK,
            caption=caption, caption_source="test", hw=(16, 16), pose_kind="ground_truth",
        )  # fmt: skip
        folder.write(record, np.stack([picture(i)] * len(TRACK)))
    folder.finish()
    encode_clips(out / "raw", out / "latents", model.codec, QuotedWords())
    return out / "latents"


def test_training_and_generation_see_the_same(model: Model, shards: Path) -> None:
    """All parts of the condition of a ragged batch, from shards and from the prompts and pictures themselves."""
    data, raw = ShardDataset(shards, "train", null=CONFIG.negative_text()), ClipFolder(shards.parent / "raw")
    clip, prompts = data.batch(range(len(data))), [raw.record(name).caption for name in data.ids]
    images = np.stack([raw.frames(name)[0] for name in data.ids])
    _, cond = sampling_inputs(model, images, prompts, [TRACK] * len(data), seed=0)
    assert len(data) > 1 and set(clip.cond.parts()) == set(cond.parts()) >= {"glyphs", "image_states", "null"}
    for name, part in cond.parts().items():
        torch.testing.assert_close(clip.cond.parts()[name], part, atol=1e-5, rtol=1e-5)
    text_only = ShardDataset(shards, "train", image_start=False).batch([0]).cond
    assert text_only.image_states is None and text_only.glyphs is not None
    assert set(random_clip(CONFIG, 1, 5).cond.parts()) == set(cond.parts()) - {"null"}


def test_shards_without_what_a_network_is_given_are_refused(shards: Path) -> None:
    words = replace(CONFIG, text=cast(WordText, replace(QuotedWords(), length=13)))
    with pytest.raises(DataError, match=r"text\.length is 12, the model's 13"):
        words.clip_spec.check_shards(ShardDataset(shards, "train").manifest, "x")
    manifest = ShardDataset(shards, "train").manifest
    lacking = {**manifest, "text": {name: x for name, x in manifest["text"].items() if name != "glyphs"}}
    with pytest.raises(DataError, match=r"text\.glyphs is None, the model's \[4, 6\]"):
        CONFIG.clip_spec.check_shards(lacking, "x")


def test_dropped_prompts_keep_the_picture_and_dropped_pictures_their_states_not(shards: Path) -> None:
    clip, seeded = ShardDataset(shards, "train").batch([0, 1]), torch.Generator().manual_seed(0)
    dropped = drop_text(clip.cond, 1.0, seeded)
    assert dropped.glyphs is not None and not dropped.glyphs.any() and not dropped.text.any()
    assert dropped.image_states is clip.cond.image_states
    assert sample_start(clip, 0.0, 0.0, CONFIG.geometry, seeded).cond.image_states is None
    with pytest.raises(ConfigError, match=r"latents=3: a part of a clip starts with another frame"):
        BidirectionalConfig(latents=3).check(CONFIG)


def test_another_prompt_in_mid_stream_is_a_fresh_one_from_there_on(model: Model) -> None:
    """Its text, its glyphs, and the states of the picture, which stay; the past has read the old prompt."""

    def walk(prompt: str, image: int) -> Session:
        session = Session(ModelEngine(model, picture(image), prompt, seed=1))
        session.start()
        session.step(AHEAD)
        return session

    changed, fresh, glyphless, other = (
        walk(*start) for start in ((PROMPTS[1], 0), (PROMPTS[0], 0), (PROMPTS[0].replace('"', ""), 0), (PROMPTS[0], 2))
    )
    for session in (changed, fresh, glyphless, other):
        session.engine.update_cache()
    cast(ModelEngine, changed.engine).set_prompt(PROMPTS[0])
    streams = [cast(ModelEngine, session.engine).stream for session in (changed, fresh, glyphless, other)]
    rows = streams[0].geometry.text_rows
    frames = []
    for session, stream in zip((changed, fresh, glyphless, other), streams, strict=True):
        stream.arena.kv[..., rows:, :] = streams[0].arena.kv[..., rows:, :]
        cast(ModelEngine, session.engine).decoder_state = cast(ModelEngine, changed.engine).decoder_state
        frames.append(session.step(AHEAD))
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[0], frames[3])


@torch.no_grad()
def test_ragged_prompts_are_each_as_alone(model: Model) -> None:
    images, tracks = np.stack([picture(i) for i in range(3)]), [TRACK] * 3
    noise, cond = sampling_inputs(model, images, PROMPTS, tracks, seed=0)

    def velocity(cond: Condition, x: Tensor) -> Tensor:
        stream, chunks = Stream(model.net, cond, CONFIG.geometry, guidance=2.0), CONFIG.geometry.chunks(5)
        for a, b in chunks[:-1]:
            stream.update_cache(stream.prepare_chunk(cond.frames(a, b)), x[:, a:b])
        a, b = chunks[-1]
        return stream.velocity(stream.prepare_chunk(cond.frames(a, b)), x[:, a:b], 0.5)

    together = velocity(cond, noise[0])
    for i in range(3):
        alone = velocity(cond.clips([i]), noise[0, [i]])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_a_model_is_of_parts_that_fit() -> None:
    for wrong, problem in (
        ({"codec": SmallCodecConfig(channels=5)}, r"codec\.channels=5 of small, network\.channels=4 of hunyuan"),
        (
            {"text": WordText(dim=6, length=12)},
            "WordText gives 12 states of width 6 as text, network=hunyuan takes 12 of",
        ),
        (
            {"network": WanConfig(text_dim=8, text_length=12, channels=4)},
            "QuotedWords gives 4 states of width 6 as glyphs, network=wan takes none",
        ),
    ):
        with pytest.raises(ConfigError, match=problem):
            replace(CONFIG, **wrong)
    assert replace(CONFIG, text=WordText(dim=8, length=12)).text.shapes.keys() == {"text"}, "the rest is padding"
