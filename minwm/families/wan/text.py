"""The text encoder of Wan, UMT5-XXL, run by transformers; what it says about a prompt is kept on disk.

The encoder has 11 GB in bfloat16, the states of a prompt some hundred kB. So it is loaded when a prompt is new,
encodes all the new ones, and is let go; training and play read small files.
"""

import hashlib
import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minwm.core.config import ConfigError, UserError
from minwm.core.files import atomic, write_text
from minwm.core.hub import SCHEME, HubError
from minwm.core.hub import fetch as fetch_files
from minwm.core.runtime import pick_device, progress, require
from minwm.core.weights import CheckpointError, check, read_weights
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

    def encode(self, captions: list[str]) -> dict[str, Float[Tensor, "b l d"]]:
        """States of the captions, float32 on the CPU; give many at once, as each new one may load the encoder.

        UserError for a caption of more than `length` tokens, and for an encoder that is needed and not there.
        """
        cleaned = [clean(caption) for caption in captions]
        folder = self._folder()
        kept = {caption: folder / f"{_digest(caption)}.safetensors" for caption in cleaned}
        new = {caption: path for caption, path in kept.items() if not path.exists()}
        if new:
            self._encode(new)
            torch.cuda.empty_cache()  # does nothing where CUDA was not used
        states = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(states, cleaned, strict=True):
            known = _read(kept[caption])
            row[: len(known)] = known
        return {"text": states}

    def import_states(self, path: Path) -> None:
        """Take the states of a caption that were encoded elsewhere, without their padding, from a file (`read_states`).

        Without the encoder at hand there is nothing to check them against but their shape (ConfigError).
        """
        caption, states = read_states(path)
        if states.ndim != 2 or not 1 <= len(states) <= self.length or states.shape[1] != self.dim:
            raise ConfigError(
                f"states of {caption[:60]!r} have shape {tuple(states.shape)}; "
                f"this model reads (1 to {self.length}, {self.dim})"
            )
        _write(self._folder(given=True) / f"{_digest(clean(caption))}.safetensors", caption, states)

    def _folder(self, given: bool = False) -> Path:
        """Where the states of this encoder are kept, by a sample of its files.

        It is remembered under the path of the source: once all prompts are encoded, the weights may go. `given`:
        they may never have been here.
        """
        root = Path(os.environ.get("MINWM_CACHE") or "~/.cache/minwm").expanduser() / "prompts"
        name = self.source if self.source.startswith(SCHEME) else str(Path(self.source).expanduser().absolute())
        note = root / f"{_digest(name)}-{self.length}.txt"
        known = note.read_text() if note.exists() else None
        if found := _find(self.source, fetch=not (known or given)):
            identity = fingerprint(*found, self.length)
        elif known or given:
            identity = known or f"given-{_digest(name)[:16]}-{self.length}"
        else:
            raise _absent(self.source)
        if identity != known:
            write_text(note, identity)
        return root / identity

    @torch.no_grad()
    def _encode(self, new: dict[str, Path]) -> None:
        """Write the states of each caption to its file, in the precision in which they were computed.

        One at a time: there is no padding, whose masked keys change nothing but the rounding, and so no state
        depends on what else was encoded with it.
        """
        if not (found := _find(self.source, fetch=True)):
            raise _absent(self.source, f" to encode {next(iter(new))[:60]!r}, which is new")
        tokens = self._tokens(found[0], new)
        weights = rename(read_weights(found[1]).tensors)
        encoder = build_encoder(weights, found[1])
        if encoder.config.d_model != self.dim:
            raise ConfigError(f"text.dim={self.dim}: the encoder in {self.source} has {encoder.config.d_model}")
        device = pick_device()
        size = 2 * sum(x.numel() for x in weights.values())
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.2 * size:
            encoder.to(device, torch.bfloat16)
        with progress(len(new), f"prompts encoded ({encoder.device.type})") as bar:
            for caption, path in new.items():
                ids = torch.tensor([tokens[caption]], device=encoder.device)
                states = encoder(input_ids=ids).last_hidden_state[0]
                _write(path, caption, states.cpu())
                bar.advance()

    def _tokens(self, file: Path, captions: Iterable[str]) -> dict[str, list[int]]:
        """Numbers of the tokens of each caption and of the end mark; UserError if they are too many."""
        tokenizer = require("tokenizers", "pretrained").Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokens = {caption: tokenizer.encode(caption).ids for caption in captions}
        for caption, ids in tokens.items():
            if len(ids) > self.length:
                raise UserError(
                    f"a caption has {len(ids)} tokens, this text encoder takes {self.length}; shorten the one that "
                    f"begins with {caption[:60]!r}"
                )
        return tokens


def clean(caption: str) -> str:
    """Repair broken unicode (ftfy), resolve HTML entities, twice, and make all white space single blanks."""
    if not re.fullmatch(r"[ -%'-~\t\n\r]*", caption):  # ftfy leaves printable ASCII without & as it is
        caption = require("ftfy", "pretrained").fix_text(caption)
    return " ".join(html.unescape(html.unescape(caption)).split())


def fingerprint(tokenizer: Path, weights: Path, length: int) -> str:
    """A name for an encoder: a hash of its files' names, sizes and 16 blocks spread over each, and of the length."""
    digest = hashlib.sha256(str(length).encode())
    shards = weights.parent.glob(f"{weights.name.partition('.')[0]}*")
    for file in (tokenizer, *sorted(shards)):
        size, block = file.stat().st_size, 2**16
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(16):
                stream.seek(max(size - block, 0) * part // 15)
                digest.update(stream.read(block))
    return digest.hexdigest()[:16]


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
    transformers = require("transformers", "pretrained")
    block = "encoder.block.0.layer."
    try:
        vocabulary, dim = weights["shared.weight"].shape
        buckets, heads = weights[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape
        inner = len(weights[f"{block}0.SelfAttention.q.weight"])
        ffn = len(weights[f"{block}1.DenseReluDense.wi_0.weight"])
    except KeyError as error:
        raise CheckpointError(f"{source} is no UMT5 encoder, or not all of one: it has no {error}") from error
    config = transformers.UMT5Config(
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
        encoder = transformers.UMT5EncoderModel(config)
    check(encoder, weights, source, allow_missing=("embed_tokens.weight",))  # a second name of shared.weight
    encoder.load_state_dict(weights, strict=False, assign=True)
    encoder.set_input_embeddings(encoder.shared)
    return encoder.eval()


def has_text_encoder(folder: Path) -> bool:
    """Whether a folder holds a text encoder with its tokenizer."""
    return folder.is_dir() and _find(str(folder)) is not None


def read_states(path: Path) -> tuple[str, Float[Tensor, "t d"]]:
    """A prompt and its states from a file as they are kept: the tensor `states`, and `caption` in the metadata."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["caption"], file.get_tensor("states")
    except (SafetensorError, KeyError, TypeError) as error:  # TypeError: no metadata
        raise UserError(
            f"{path} holds no encoded prompt ({error}): a tensor `states` and a `caption` in the metadata are needed"
        ) from error


def _find(source: str, fetch: bool = False) -> tuple[Path, Path] | None:
    """The files of the tokenizer and of the weights (of shards, their index), if the source has both; `fetch` lets
    them come from the Hub, else only what came before counts."""
    folder, repo = Path(source).expanduser(), source.removeprefix(SCHEME)
    if repo != source:
        files = [*dict(LAYOUTS), "text_encoder/*.safetensors*", LAYOUTS[-1][1]]
        try:
            folder = fetch_files(repo, files, local=not fetch)
        except HubError:
            if fetch:
                raise
            return None
    layouts = [(folder / tokenizer, folder / weights) for tokenizer, weights in LAYOUTS]
    return next((layout for layout in layouts if all(file.exists() for file in layout)), None)


def _absent(source: str, purpose: str = "") -> UserError:
    layouts = "; or ".join(" and ".join(layout) for layout in LAYOUTS)
    return UserError(f"no text encoder in {source}{purpose}: expected {layouts}")


def _read(path: Path) -> Float[Tensor, "t d"]:
    try:
        return load_file(path)["states"]
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the prompt is encoded again") from error


def _write(path: Path, caption: str, states: Float[Tensor, "t d"]) -> None:
    with atomic(path) as temporary:
        save_file({"states": states.contiguous()}, temporary, {"caption": caption})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
