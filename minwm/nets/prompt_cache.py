"""Published encoders of prompts, in files that are found in any layout, and their states, which are kept on disk.

An encoder has up to 15 GB, the states of a prompt some MB. So it is loaded when a prompt is new, encodes all the new
ones, and is let go; training and play read small files.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minwm.core.config import ConfigError, UserError
from minwm.core.files import atomic, write_text
from minwm.core.hub import SCHEME, HubError
from minwm.core.hub import fetch as fetch_files
from minwm.core.runtime import cache_folder, pick_device, progress, require

States = Float[Tensor, "t d"]
"""Of one prompt, without padding."""


@dataclass(frozen=True)
class EncoderFiles:
    """The files of a published encoder."""

    what: str
    """Its name in errors."""
    source: str
    """A folder, or hf://USER/NAME on the Hugging Face Hub, of which only these files are fetched."""
    layouts: tuple[tuple[str, ...], ...]
    """What has to be there, for every published layout; the last are the weights, of shards their index."""

    def find(self, fetch: bool = False) -> tuple[Path, ...] | None:
        """The files, if all of a layout are there; `fetch` lets them come from the Hub, else only what came before
        counts."""
        folder, repo = Path(self.source).expanduser(), self.source.removeprefix(SCHEME)
        if repo != self.source:
            shards = {f"{Path(layout[-1]).parent}/*.safetensors*" for layout in self.layouts if "/" in layout[-1]}
            files = {file for layout in self.layouts for file in layout} | shards
            try:
                folder = fetch_files(repo, sorted(files), local=not fetch)
            except HubError:
                if fetch:
                    raise
                return None
        layouts = (tuple(folder / file for file in layout) for layout in self.layouts)
        return next((layout for layout in layouts if all(file.exists() for file in layout)), None)

    def require(self, purpose: str = "") -> tuple[Path, ...]:
        """The files, fetched if need be; UserError if they are not there."""
        if found := self.find(fetch=True):
            return found
        layouts = "; or ".join(" and ".join(layout) for layout in self.layouts)
        raise UserError(f"no {self.what} in {self.source}{purpose}: expected {layouts}")


Encode = Callable[[list[str], tuple[Path, ...]], Iterator[States]]
"""States of prompts, one after the other, by the encoder in these files."""


@dataclass(frozen=True)
class PromptCache:
    """What an encoder makes of prompts: read from disk, and written there when a prompt is new."""

    files: EncoderFiles
    length: int
    """Most states of a prompt."""
    dim: int
    """Width of a state."""
    part: str = ""
    """Which of several encoders of one source it is."""

    def encode(self, prompts: list[str], encode: Encode) -> Float[Tensor, "b l d"]:
        """States of prompts, float32 on the CPU, padded with zeros; `encode` makes those that are new, all at once.

        UserError for an encoder that is needed and not there.
        """
        folder = self._folder()
        kept = {prompt: folder / f"{_digest(prompt)}.safetensors" for prompt in prompts}
        if new := [prompt for prompt, path in kept.items() if not path.exists()]:
            files = self.files.require(f" to encode {new[0][:60]!r}, which is new")
            with progress(len(new), "prompts encoded") as bar:
                for prompt, states in zip(new, encode(new, files), strict=True):
                    _write(kept[prompt], prompt, states.cpu())
                    bar.advance()
            torch.cuda.empty_cache()  # does nothing where CUDA was not used
        padded = torch.zeros(len(prompts), self.length, self.dim)
        for row, prompt in zip(padded, prompts, strict=True):
            known = _read(kept[prompt])
            row[: len(known)] = known
        return padded

    def add(self, prompt: str, states: States) -> None:
        """Keep states that were made elsewhere.

        Without the encoder at hand there is nothing to check them against but their shape (ConfigError).
        """
        if states.ndim != 2 or not 1 <= len(states) <= self.length or states.shape[1] != self.dim:
            raise ConfigError(
                f"states of {prompt[:60]!r} have shape {tuple(states.shape)}; "
                f"this model reads (1 to {self.length}, {self.dim})"
            )
        _write(self._folder(given=True) / f"{_digest(prompt)}.safetensors", prompt, states)

    def _folder(self, given: bool = False) -> Path:
        """Where the states of this encoder are kept, by a sample of its files.

        It is remembered under the path of the source: once all prompts are encoded, the weights may go. `given`:
        they may never have been here.
        """
        root, source = cache_folder(), self.files.source
        place = source if source.startswith(SCHEME) else str(Path(source).expanduser().absolute())
        name = f"{_digest(place + self.part)}-{self.length}"
        known = note.read_text() if (note := root / "prompts" / f"{name}.txt").exists() else None
        if found := self.files.find() if known or given else self.files.require():
            identity = fingerprint(found, self.length)
        else:
            identity = known or f"given-{name[:16]}-{self.length}"
        if identity != known:
            write_text(note, identity)
        return root / "prompts" / identity


def fingerprint(files: tuple[Path, ...], length: int) -> str:
    """A name for an encoder: a hash of its files' names, sizes and 16 blocks spread over each, and of the length."""
    *others, weights = files
    digest = hashlib.sha256(str(length).encode())
    shards = weights.parent.glob(f"{weights.name.partition('.')[0]}*")
    for file in (*others, *sorted(shards)):
        size, block = file.stat().st_size, 2**16
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(16):
                stream.seek(max(size - block, 0) * part // 15)
                digest.update(stream.read(block))
    return digest.hexdigest()[:16]


def transformers() -> Any:
    """The library that runs the encoders."""
    return require("transformers", "pretrained")


def tokenizer(file: Path) -> Any:
    """The tokenizer in a file, which neither cuts nor pads, whatever the file says."""
    loaded = require("tokenizers", "pretrained").Tokenizer.from_file(str(file))
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def check_length(tokens: Mapping[str, list[int]], length: int) -> None:
    """Raise UserError for a prompt of too many tokens."""
    for prompt, ids in tokens.items():
        if len(ids) > length:
            raise UserError(
                f"a caption has {len(ids)} tokens, this text encoder takes {length}; shorten the one that "
                f"begins with {prompt[:60]!r}"
            )


def on_fastest_device(encoder: Any, dtype: torch.dtype) -> Any:
    """The encoder, moved to the GPU, in `dtype`, if there is one that holds it."""
    device, size = pick_device(), dtype.itemsize * sum(p.numel() for p in encoder.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.2 * size:
        encoder.to(device, dtype)
    return encoder


def read_states(path: Path) -> tuple[str, States]:
    """A prompt and its states from a file as they are kept: the tensor `states`, and `caption` in the metadata."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["caption"], file.get_tensor("states")
    except (SafetensorError, KeyError, TypeError) as error:  # TypeError: no metadata
        raise UserError(
            f"{path} holds no encoded prompt ({error}): a tensor `states` and a `caption` in the metadata are needed"
        ) from error


def _read(path: Path) -> States:
    try:
        return load_file(path)["states"]
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the prompt is encoded again") from error


def _write(path: Path, prompt: str, states: States) -> None:
    with atomic(path) as temporary:
        save_file({"states": states.contiguous()}, temporary, {"caption": prompt})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
