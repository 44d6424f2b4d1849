"""The text encoder of Wan, UMT5-XXL, run by transformers."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.runtime import require
from minwm.core.weights import CheckpointError, check, read_weights
from minwm.nets.prompt_cache import (
    EncoderFiles,
    PromptCache,
    States,
    check_length,
    on_fastest_device,
    read_states,
    tokenizer,
    transformers,
)
from minwm.nets.text import TextEncoder

LAYOUTS = (
    ("tokenizer/tokenizer.json", "text_encoder/model.safetensors"),
    ("tokenizer/tokenizer.json", "text_encoder/model.safetensors.index.json"),
    ("google/umt5-xxl/tokenizer.json", "models_t5_umt5-xxl-enc-bf16.pth"),
)
"""Where tokenizer and weights are: Hugging Face in one file, in several, and the original release."""

RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
"""Parameter names of the original release to those of transformers, which none of these match."""


@dataclass(frozen=True, kw_only=True)
class Umt5Text(TextEncoder):
    """Prompts as Wan reads them: cleaned, tokenised, encoded, and padded with zeros.

    The unconditional prompt of Wan is an encoded one, "" or a negative prompt, and not zeros.
    """

    kind: ClassVar[str] = "umt5"

    source: str
    """Wan weights with the encoder and its tokenizer, in the layout of Hugging Face or of the release: a folder, or
    hf://USER/NAME on the Hugging Face Hub, of which only these files are fetched, when a prompt is new."""
    dim: int = 4096
    """Width of a state."""
    length: int = 512
    """States per prompt, and so the most tokens that one may have, its end mark included."""

    def __post_init__(self) -> None:
        for name in ("dim", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text.{name}={getattr(self, name)}: must be at least 1")

    @property
    def _cache(self) -> PromptCache:
        return PromptCache(EncoderFiles("text encoder", self.source, LAYOUTS), self.length, self.dim)

    def encode(self, captions: list[str]) -> dict[str, Float[Tensor, "b _ _"]]:
        """States of the captions, float32 on the CPU; give many at once, as each new one may load the encoder.

        UserError for a caption of more than `length` tokens, and for an encoder that is needed and not there.
        """
        return {"text": self._cache.encode([clean(caption) for caption in captions], self._encode)}

    def import_states(self, path: Path) -> None:
        """Take the states of a caption that were encoded elsewhere, without their padding, from a file (`read_states`).

        ConfigError for states of another shape.
        """
        caption, states = read_states(path)
        self._cache.add(clean(caption), states)

    @torch.no_grad()
    def _encode(self, captions: list[str], files: tuple[Path, ...]) -> Iterator[States]:
        """States of each caption, in the precision in which they were computed.

        One at a time: there is no padding, whose masked keys change nothing but the rounding, and so no state
        depends on what else was encoded with it.
        """
        words = tokenizer(files[0])
        tokens = {caption: words.encode(caption).ids for caption in captions}
        check_length(tokens, self.length)
        encoder = build_encoder(rename(read_weights(files[1]).tensors), files[1])
        if encoder.config.d_model != self.dim:
            raise ConfigError(f"text.dim={self.dim}: the encoder in {self.source} has {encoder.config.d_model}")
        on_fastest_device(encoder, torch.bfloat16)
        for ids in tokens.values():
            yield encoder(input_ids=torch.tensor([ids], device=encoder.device)).last_hidden_state[0]


def clean(caption: str) -> str:
    """Repair broken unicode (ftfy), resolve HTML entities, twice, and make all white space single blanks."""
    if not re.fullmatch(r"[ -%'-~\t\n\r]*", caption):  # ftfy leaves printable ASCII without & as it is
        caption = require("ftfy", "pretrained").fix_text(caption)
    return " ".join(html.unescape(html.unescape(caption)).split())


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's names to those of transformers; names that are so already stay."""
    for pattern, name in RENAMES:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights


def build_encoder(weights: dict[str, Tensor], source: Path) -> Any:
    """transformers' UMT5EncoderModel with exactly these tensors; its sizes are theirs.

    UMT5-XXL: width 4096, 64 heads of 64, feed-forward 10240 (gated GELU), 24 layers with 32 buckets of relative
    positions up to 128 each, vocabulary 256384.
    """
    block = "encoder.block.0.layer."
    try:
        vocabulary, dim = weights["shared.weight"].shape
        buckets, heads = weights[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape
        inner = len(weights[f"{block}0.SelfAttention.q.weight"])
        ffn = len(weights[f"{block}1.DenseReluDense.wi_0.weight"])
    except KeyError as error:
        raise CheckpointError(f"{source} is no UMT5 encoder, or not all of one: it has no {error}") from error
    library = transformers()
    config = library.UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // heads,
        num_heads=heads,
        d_ff=ffn,
        num_layers=sum(key.endswith("SelfAttention.q.weight") for key in weights),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )
    with torch.device("meta"):
        encoder = library.UMT5EncoderModel(config)
    check(encoder, weights, source, allow_missing=("embed_tokens.weight",))  # a second name of shared.weight
    encoder.load_state_dict(weights, strict=False, assign=True)
    encoder.set_input_embeddings(encoder.shared)
    return encoder.eval()


def has_text_encoder(folder: Path) -> bool:
    """Whether a folder holds a text encoder with its tokenizer."""
    return folder.is_dir() and EncoderFiles("text encoder", str(folder), LAYOUTS).find() is not None
