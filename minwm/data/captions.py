"""Captions of clips by vision-language models, on this machine or behind an OpenAI-compatible endpoint.

A caption says what is there, never how the camera moves: motion in the text would leak the control.
"""

import base64
import functools
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from minwm.cameras.estimate.base import chosen
from minwm.core.config import ConfigError, UserError
from minwm.core.media import jpeg_bytes
from minwm.core.runtime import pick_device
from minwm.data.clips import MOTION_WORDS
from minwm.nets.prompt_cache import transformers

PROMPT = (
    "Describe in one or two sentences what these pictures of one place show: the place, its objects, materials, light "
    "and style. Do not write of the camera, the viewer, the pictures or of anything that changes between them."
)
MODEL = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
"""A small one, Apache-2.0."""
ASKED = 3
"""How often a model is asked that speaks of motion."""


class CaptionError(UserError):
    """A captioner cannot work at all: no clip would get a caption."""


@runtime_checkable
class Captioner(Protocol):
    """A model that is shown pictures and asked."""

    @property
    def pictures(self) -> int:
        """How many of a clip it is shown, evenly spread."""
        ...

    @property
    def name(self) -> str:
        """`ClipRecord.caption_source` of what it writes."""
        ...

    def ask(self, pictures: list[UInt8[np.ndarray, "h w 3"]], prompt: str) -> str:
        """Its answer; CaptionError if there is none to be had."""
        ...


def caption(captioner: Captioner, frames: UInt8[np.ndarray, "n h w 3"]) -> str:
    """What a clip shows. An answer that speaks of motion is asked for again, `ASKED` times in all; it may still do."""
    pictures, prompt, answer = [frames[i] for i in chosen(len(frames), captioner.pictures)], PROMPT, ""
    for _ in range(ASKED):
        answer = " ".join(captioner.ask(pictures, prompt).split())
        if not (word := MOTION_WORDS.search(answer)):
            break
        prompt = f"{PROMPT} Your last answer had the word {word[0]!r}, which speaks of motion: leave it out."
    return answer


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """Any image-text-to-text model that transformers loads."""

    kind: ClassVar[str] = "transformers"
    model: str = MODEL
    """A folder, or a name on the Hub."""
    pictures: int = 3
    tokens: int = 96
    """Most tokens of an answer."""

    @property
    def name(self) -> str:
        """See `Captioner`."""
        return self.model

    def ask(self, pictures: list[UInt8[np.ndarray, "h w 3"]], prompt: str) -> str:
        """See `Captioner`."""
        model, processor = _loaded(self.model)
        shown: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
        form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chat, **form).to(model.device, dtype=model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@functools.cache
def _loaded(name: str) -> tuple[Any, Any]:
    """A model and its processor, once per process."""
    library = transformers()
    try:
        processor = library.AutoProcessor.from_pretrained(name)
        model = library.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise CaptionError(f"captioner {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(pick_device()).eval(), processor


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that answers `POST URL/chat/completions` as OpenAI's does: vLLM, SGLang, llama.cpp, Ollama."""

    kind: ClassVar[str] = "endpoint"
    url: str = "http://127.0.0.1:8000/v1"
    """Where the server answers."""
    model: str = MODEL
    """Name of the model, as the server knows it."""
    pictures: int = 3
    tokens: int = 96
    """Most tokens of an answer."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent if it is not set."""
    seconds: float = 60.0
    """How long an answer may take."""
    tries: int = 4
    """How often a request is sent if none, or status 429 or from 500 on, is the answer; with pauses of 1, 2, 4 s."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.url={self.url!r}: an address that begins with http:// or https://")

    @property
    def name(self) -> str:
        """See `Captioner`."""
        return self.model

    def ask(self, pictures: list[UInt8[np.ndarray, "h w 3"]], prompt: str) -> str:
        """See `Captioner`."""
        shown = [base64.b64encode(jpeg_bytes(picture, 90)).decode() for picture in pictures]
        images = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}} for data in shown]
        chat = [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
        answer = self._post({"model": self.model, "messages": chat, "max_tokens": self.tokens, "temperature": 0})
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise CaptionError(f"{self.url}: no chat completion, but {answer[:200]!r}") from error

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        problem = ""
        for number in range(self.tries):
            time.sleep(2 ** (number - 1) if number else 0)
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, HTTPException) as error:
                problem = str(error)
        raise CaptionError(f"{self.url} does not caption ({problem}); start it, or name another captioner")
