"""HunyuanVideo-1.5's encoders, tiny and in both published layouts, against the functions of diffusers' pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.families.hunyuan.text import (
    AFTER,
    BEFORE,
    HunyuanText,
    glyph_text,
    has_text_encoder,
    siglip_pixels,
)
from minwm.nets.prompt_cache import read_states, tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
diffusers = pytest.importorskip("diffusers")

CAPTIONS = [
    'a red tower with the sign "Café 9" and “Open” over "Café 9"',
    "",
    "a dome",
    '\n the letters "a" on a wall, and a very long street of the old town',
]
LENGTH, GLYPHS = 40, 56
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Into which Qwen2.5's tokenizer cuts texts before all else."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5's for messages of text."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


def randomised(encoder: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return encoder.eval()


def random_encoders() -> tuple[Any, Any, Any]:
    """Qwen2.5-VL with its vision tower, ByT5 with more tokens than bytes, SigLIP."""
    text = dict(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=1e6, rope_scaling={"type": "default", "mrope_section": [1, 1, 2]},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32)
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    shape = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    byt5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=400, **shape))
    picture = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**picture, image_size=28, patch_size=14))
    return randomised(qwen), randomised(byt5), randomised(siglip)


def save_tokenizer(folder: Path) -> Path:
    """Qwen's pieces as words."""
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PIECES), "isolated")
    texts = [BEFORE.replace("<|im_start|>", "").replace("<|im_end|>", ""), "assistant", "\n", " ", *CAPTIONS[:3]]
    pieces = dict.fromkeys(piece for text in texts for piece, _ in cut.pre_tokenize_str(text))
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<pad>", *pieces])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = cut
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save(folder: Path, layout: str, encoders: tuple[Any, Any, Any]) -> str:
    qwen, byt5, siglip = encoders
    if layout == "diffusers":
        save_tokenizer(folder / "tokenizer")
        qwen.model.language_model.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
        byt5.save_pretrained(folder / "text_encoder_2")
        siglip.save_pretrained(folder / "image_encoder")
        return str(folder)
    save_tokenizer(folder / "text_encoder/llm")
    qwen.save_pretrained(folder / "text_encoder/llm")
    small = json.loads(byt5.config.to_json_string()) | {"vocab_size": 384}
    (folder / "text_encoder/byt5-small").mkdir()
    (folder / "text_encoder/byt5-small/config.json").write_text(json.dumps(small))
    glyph = folder / "text_encoder/Glyph-SDXL-v2/checkpoints"
    glyph.mkdir(parents=True)
    tower = {f"module.text_tower.encoder.{name}": x for name, x in byt5.encoder.state_dict().items()}
    torch.save({"state_dict": {**tower, "module.visual_tower.x": torch.zeros(1)}, "epoch": 3}, glyph / "byt5_model.pt")
    siglip.save_pretrained(folder / "vision_encoder/siglip/image_encoder")
    return str(folder)


def tiny(source: str) -> HunyuanText:
    return HunyuanText(
        source=source, dim=32, length=LENGTH, glyph_dim=16, glyph_length=GLYPHS, image_dim=16, image_length=4
    )


@torch.no_grad()
def expected(encoders: tuple[Any, Any, Any], words: Path, captions: list[str]) -> dict[str, Tensor]:
    """Padded and masked, as diffusers' pipeline gives them to its transformer."""
    pipeline = diffusers.HunyuanVideo15ImageToVideoPipeline
    qwen = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(words), pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE, padding_side="right"
    )
    text, text_mask = pipeline._get_mllm_prompt_embeds(
        encoders[0].model.language_model, qwen, captions, torch.device("cpu"), tokenizer_max_length=LENGTH
    )
    glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(
        transformers.ByT5Tokenizer(), encoders[1], captions, torch.device("cpu"), tokenizer_max_length=GLYPHS
    )
    return {"text": text * text_mask[..., None], "glyphs": glyphs * glyph_mask[..., None]}


@pytest.mark.parametrize("layout", ["release", "diffusers"])
def test_states_are_those_of_the_pipeline(tmp_path: Path, layout: str) -> None:
    """With its template, crop and layer; ragged prompts, quotes or none. What is kept needs no encoder."""
    encoders = random_encoders()
    source = save(tmp_path / "hunyuan", layout, encoders)
    text, words = tiny(source), next(Path(source).rglob("tokenizer.json"))
    assert len(tokenizer(words).encode(BEFORE, add_special_tokens=False).ids) == 108
    want, got = expected(encoders, words, CAPTIONS), text.encode(CAPTIONS)
    assert {name: x.shape[1:] for name, x in got.items()} == {"text": (LENGTH, 32), "glyphs": (GLYPHS, 16)}
    for name, states in want.items():
        assert states.std() > 0.1
        torch.testing.assert_close(got[name], states, atol=1e-5, rtol=1e-5)
    assert [int(row.any(-1).sum()) for row in got["glyphs"]] == [30, 0, 0, 11], "bytes, not letters"
    assert all(int(row.any(-1).sum()) > 5 for row in got["text"]) and has_text_encoder(Path(source))
    for file in Path(source).rglob("*.*"):
        file.unlink()
    again = text.encode(CAPTIONS[::-1])
    assert all(torch.equal(again[name].flip(0), x) for name, x in got.items())
    with pytest.raises(UserError, match=r"no text encoder in .*'a new one', which is new"):
        text.encode(["a new one"])


@pytest.mark.parametrize("layout", ["release", "diffusers"])
@torch.no_grad()
def test_image_states_are_those_of_the_pipeline(tmp_path: Path, layout: str) -> None:
    encoders = random_encoders()
    text = tiny(save(tmp_path / "hunyuan", layout, encoders))
    processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    pictures = [np.random.default_rng(i).integers(0, 256, (32, 48 + 16 * i, 3), np.uint8) for i in range(2)]
    got = text.encode_images(pictures)["image_states"]
    assert got.shape == (2, 4, 16) == (2, *text.shapes["image_states"])
    for picture, states in zip(pictures, got, strict=True):
        pixels = processor.preprocess(images=Image.fromarray(picture), return_tensors="pt").pixel_values
        torch.testing.assert_close(siglip_pixels(picture, 28), pixels, atol=1e-6, rtol=0)
        want = diffusers.HunyuanVideo15ImageToVideoPipeline._get_image_embeds(
            encoders[2], processor, Image.fromarray(picture), torch.device("cpu")
        )
        torch.testing.assert_close(states, want[0], atol=1e-5, rtol=1e-5)
    text_only = replace(text, images=False)
    assert text_only.encode_images(pictures) == {} and "image_states" not in text_only.shapes


@pytest.mark.parametrize("caption", [*CAPTIONS, 'an empty ""', '"a" “b" c”', 'over\n"two\nlines"', 'a "b" “b” "c"'])
def test_glyph_text_is_that_of_the_pipeline(caption: str) -> None:
    theirs = diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5.extract_glyph_texts
    assert glyph_text(caption) == (theirs(caption) or "")
    if text := glyph_text(caption):
        assert transformers.ByT5Tokenizer()(text).input_ids == [*(byte + 3 for byte in text.encode()), 1]


def test_the_system_message_is_that_of_the_pipeline() -> None:
    pipeline = diffusers.HunyuanVideo15Pipeline._get_mllm_prompt_embeds
    message = next(x for x in pipeline.__defaults__ if isinstance(x, str))
    assert f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n" == BEFORE and AFTER.count("<|im_") == 2


def test_states_from_elsewhere_are_known_by_their_width(tmp_path: Path, cache: Path) -> None:
    there, here = tiny(save(tmp_path / "hunyuan", "diffusers", random_encoders())), tiny("nowhere")
    want = there.encode(CAPTIONS[:1])
    for file in list(cache.rglob("*.safetensors")):
        assert read_states(file)[0] in (CAPTIONS[0], glyph_text(CAPTIONS[0]))
        here.import_states(file)
    assert all(torch.equal(states, want[name]) for name, states in here.encode(CAPTIONS[:1]).items())
    with pytest.raises(ConfigError, match=r"shape .*; this model reads \(1 to 40, 33\)"):
        replace(here, dim=33).import_states(next(file for file in cache.rglob("*") if "32)" in shape_of(file)))


def shape_of(file: Path) -> str:
    return str(tuple(read_states(file)[1].shape)) if file.suffix == ".safetensors" else ""


def test_errors_name_the_thing(tmp_path: Path) -> None:
    source = save(tmp_path / "hunyuan", "release", random_encoders())
    text = tiny(source)
    with pytest.raises(UserError, match=r"a caption has 7 tokens.* takes 5.*'a dome'"):
        replace(text, length=5).encode(["a dome"])
    with pytest.raises(UserError, match=r"a caption has 59 tokens.* takes 56"):
        text.encode([f'"{49 * "x"}"'])
    for field in ("dim", "glyph_dim"):
        with pytest.raises(ConfigError, match=rf"text.{field}=8: the encoder in {source} has"):
            replace(text, **{field: 8}).encode([f'"{field}"'])
    with pytest.raises(ConfigError, match=r"text.image_dim=8"):
        replace(text, image_dim=8).encode_images([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(ConfigError, match=r"text.glyph_length=0"):
        replace(text, glyph_length=0)
    with pytest.raises(UserError, match=r"no image encoder in nowhere: expected image_encoder/config.json"):
        tiny("nowhere").encode_images([np.zeros((8, 8, 3), np.uint8)])
    assert loads(HunyuanText, dumps(text)) == text
    glyphs = Path(source) / "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt"
    glyphs.write_bytes(glyphs.read_bytes()[:900])
    with pytest.raises(UserError, match=r"byt5_model.pt is damaged"):
        text.encode(['"b"'])
    image = next(Path(source).rglob("image_encoder/*.safetensors"))
    image.write_bytes(image.read_bytes()[:900])
    with pytest.raises(UserError, match=r"image_encoder: its weights are damaged"):
        text.encode_images([np.zeros((8, 8, 3), np.uint8)])
