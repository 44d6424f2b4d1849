"""The encoders of HunyuanVideo-1.5, run by transformers: Qwen2.5-VL for captions, ByT5 for what they have in quotes and
is to be drawn as letters (glyphs), SigLIP for the first frame.

Sources: HunyuanVideo-1.5 `hyvideo/models/text_encoders`, `hyvideo/models/vision_encoder`, and diffusers' pipelines.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.weights import CheckpointError, check, read_weights
from minwm.nets.prompt_cache import (
    EncoderFiles,
    PromptCache,
    check_length,
    on_fastest_device,
    read_states,
    tokenizer,
    transformers,
)
from minwm.nets.text import TextEncoder

TEXT_LAYOUTS = tuple(
    (f"{words}/tokenizer.json", f"{folder}/config.json", f"{folder}/{weights}")
    for words, folder in (("tokenizer", "text_encoder"), ("text_encoder/llm", "text_encoder/llm"))
    for weights in ("model.safetensors", "model.safetensors.index.json")
)
"""Tokenizer, config and weights of Qwen2.5-VL: of its language model in diffusers' layout, else of all of it."""
GLYPH_LAYOUTS = (
    ("text_encoder_2/config.json", "text_encoder_2/model.safetensors"),
    ("text_encoder/byt5-small/config.json", "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt"),
)
IMAGE_LAYOUTS = tuple(
    (f"{folder}/config.json", f"{folder}/model.safetensors")
    for folder in ("image_encoder", "vision_encoder/siglip/image_encoder")
)
SYSTEM_MESSAGE = (9 * " ").join(
    (
        "You are a helpful assistant. Describe the video by detailing the following aspects:",
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
BEFORE = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n"
"""What stands before a caption in the chat template: 108 tokens, whose states are left out."""
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
LAYER = -3
"""Of the hidden states of Qwen2.5-VL: two layers before the last, without the final norm."""


@dataclass(frozen=True, kw_only=True)
class HunyuanText(TextEncoder):
    """Captions and first frames as HunyuanVideo-1.5 reads them.

    Its unconditional prompt is the encoded "", without glyphs; the states of the first frame stay. Text and glyphs are
    kept on disk. States of frames are not: shards have those of clips, and a session encodes its own once.
    """

    kind: ClassVar[str] = "hunyuan"

    source: str
    """HunyuanVideo-1.5 with its encoders, in the layout of the release or of diffusers: a folder, or hf://USER/NAME on
    the Hugging Face Hub, of which only these files are fetched, when a prompt is new."""
    dim: int = 3584
    length: int = 1000
    """Text states per caption, and so the most tokens that one may have, those after it in the template included."""
    glyph_dim: int = 1472
    glyph_length: int = 256
    """Glyph states per caption, and so the most bytes of `glyph_text`, its end mark included."""
    image_dim: int = 1152
    image_length: int = 729
    images: bool = True
    """First frames have states. Off for the text-to-video models, whose repositories lack the encoder."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("source", "images") and value < 1:
                raise ConfigError(f"text.{name}={value}: must be at least 1")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        shapes = {"text": (self.length, self.dim), "glyphs": (self.glyph_length, self.glyph_dim)}
        return {**shapes, "image_states": (self.image_length, self.image_dim)} if self.images else shapes

    @property
    def _text(self) -> PromptCache:
        return PromptCache(EncoderFiles("text encoder", self.source, TEXT_LAYOUTS), self.length, self.dim)

    @property
    def _glyphs(self) -> PromptCache:
        files = EncoderFiles("glyph encoder", self.source, GLYPH_LAYOUTS)
        return PromptCache(files, self.glyph_length, self.glyph_dim, part="glyphs")

    def encode(self, captions: list[str]) -> dict[str, Float[Tensor, "b _ _"]]:
        """Text and glyphs of the captions, float32 on the CPU; give many at once, as a new one may load the encoders.

        UserError for a caption of too many tokens, and for an encoder that is needed and not there.
        """
        quoted = [glyph_text(caption) for caption in captions]
        glyphs = torch.zeros(len(captions), self.glyph_length, self.glyph_dim)
        if given := [i for i, text in enumerate(quoted) if text]:
            glyphs[given] = self._glyphs.encode([quoted[i] for i in given], self._encode_glyphs)
        return {"text": self._text.encode(captions, self._encode_text), "glyphs": glyphs}

    def import_states(self, path: Path) -> None:
        """Take states that were encoded elsewhere, without padding, from a file (`read_states`).

        They are those of a caption, or by their width those of a `glyph_text`; ConfigError if they are neither.
        """
        prompt, states = read_states(path)
        cache = self._glyphs if states.shape[-1] == self.glyph_dim != self.dim else self._text
        cache.add(prompt, states)

    @torch.no_grad()
    def encode_images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> dict[str, Float[Tensor, "b _ _"]]:
        """States of first frames, as the codec sees them; float32 on the CPU. UserError without the encoder."""
        if not (self.images and images):
            return {}
        files = EncoderFiles("image encoder", self.source, IMAGE_LAYOUTS).require()
        encoder = on_fastest_device(load_siglip(files[0].parent), torch.float16)
        self._check_width("image_dim", self.image_dim, encoder.config.hidden_size)
        states = [
            encoder(pixel_values=siglip_pixels(image, encoder.config.image_size).to(encoder.device, encoder.dtype))
            for image in images
        ]
        return {"image_states": torch.cat([state.last_hidden_state.float().cpu() for state in states])}

    @torch.no_grad()
    def _encode_text(self, captions: list[str], files: tuple[Path, ...]) -> Iterator[Float[Tensor, "t d"]]:
        """States of each caption and of what follows it in the template.

        One at a time, as there is no padding then; that of the release is masked.
        """
        words = tokenizer(files[0])
        texts = {caption: f"{BEFORE}{caption or ' '}{AFTER}" for caption in captions}
        tokens = {caption: words.encode(text, add_special_tokens=False).ids for caption, text in texts.items()}
        crop = len(words.encode(BEFORE, add_special_tokens=False).ids)
        check_length({caption: ids[crop:] for caption, ids in tokens.items()}, self.length)
        encoder = load_qwen(files[1].parent, files[2])
        self._check_width("dim", self.dim, encoder.config.hidden_size)
        on_fastest_device(encoder, torch.float16)
        for ids in tokens.values():
            given = torch.tensor([ids], device=encoder.device)
            yield encoder(input_ids=given, output_hidden_states=True, use_cache=False).hidden_states[LAYER][0, crop:]

    @torch.no_grad()
    def _encode_glyphs(self, texts: list[str], files: tuple[Path, ...]) -> Iterator[Float[Tensor, "t d"]]:
        tokens = {text: [*(byte + 3 for byte in text.encode()), 1] for text in texts}  # after pad, end and unknown
        check_length(tokens, self.glyph_length)
        encoder = load_byt5(files[0].parent, files[1])
        self._check_width("glyph_dim", self.glyph_dim, encoder.config.d_model)
        on_fastest_device(encoder, torch.float32)
        for ids in tokens.values():
            yield encoder(input_ids=torch.tensor([ids], device=encoder.device)).last_hidden_state[0]

    def _check_width(self, name: str, width: int, found: int) -> None:
        if width != found:
            raise ConfigError(f"text.{name}={width}: the encoder in {self.source} has {found}")


def glyph_text(caption: str) -> str:
    """What ByT5 is given of a caption: the texts in straight or curly double quotes, each once; nothing without any."""
    found = re.findall(r'"(.*?)"|“(.*?)”', caption)
    return "".join(f'Text "{text}". ' for text in dict.fromkeys(straight or curly for straight, curly in found))


def siglip_pixels(image: UInt8[np.ndarray, "h w 3"], size: int) -> Float[Tensor, "1 3 size size"]:
    """A picture as SigLIP sees it: resized to a square whatever its shape (bicubic), in [-1, 1]."""
    square = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1


def load_qwen(folder: Path, weights: Path) -> Any:
    """transformers' Qwen2_5_VLTextModel, from its own weights or from those of all of Qwen2.5-VL."""
    library = transformers()
    config = library.AutoConfig.from_pretrained(folder).get_text_config()
    tensors = {
        name.removeprefix("language_model."): x
        for name, x in read_weights(weights).tensors.items()
        if not name.startswith(("visual.", "lm_head."))
    }
    with torch.device("meta"):
        encoder = library.Qwen2_5_VLTextModel(config)
    check(encoder, tensors, weights)
    encoder.load_state_dict(tensors, assign=True)
    encoder.rotary_emb = type(encoder.rotary_emb)(config)  # its buffers are in no file
    return encoder.eval()


def load_byt5(folder: Path, weights: Path) -> Any:
    """transformers' T5EncoderModel, from its own weights or from those of Glyph-SDXL-v2.

    That has more tokens than ByT5 (of colours and fonts, which no prompt here has), and towers beside the encoder.
    """
    library = transformers()
    saved = read_weights(weights).tensors
    tower = {name: x for name, x in saved.items() if name.startswith("text_tower.encoder.")} or saved
    tensors = {f"encoder.{name.removeprefix('text_tower.').removeprefix('encoder.')}": x for name, x in tower.items()}
    embedding = tensors.pop("encoder.shared.weight", None)
    embedding = tensors.pop("encoder.embed_tokens.weight", embedding)
    if embedding is None:
        raise CheckpointError(f"{weights} is no T5 encoder: it has no embedding of tokens")
    config = library.T5Config.from_pretrained(folder)
    config.vocab_size = len(embedding)
    with torch.device("meta"):
        encoder = library.T5EncoderModel(config)
    tensors["shared.weight"] = embedding
    check(encoder, tensors, weights, allow_missing=("embed_tokens.weight",))  # a second name of shared.weight
    encoder.load_state_dict(tensors, strict=False, assign=True)
    encoder.set_input_embeddings(encoder.shared)
    return encoder.eval()


def load_siglip(folder: Path) -> Any:
    """transformers' SiglipVisionModel; CheckpointError unless the folder has all of it."""
    siglip = transformers().SiglipVisionModel
    try:
        encoder, found = siglip.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights are damaged ({error}); download them again") from error
    if lacking := sorted(found["missing_keys"]):
        raise CheckpointError(f"{folder} is no whole SigLIP image encoder: it has no {lacking[0]}")
    return encoder.eval()


def has_text_encoder(folder: Path) -> bool:
    """Whether a folder holds the encoder of captions with its tokenizer."""
    return folder.is_dir() and EncoderFiles("text encoder", str(folder), TEXT_LAYOUTS).find() is not None
