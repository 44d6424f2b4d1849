"""Captions from text files, from a model that transformers runs, and from a server; never of motion."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ingest import CFG, footage, walk

from minwm.core.config import ConfigError
from minwm.data import captions
from minwm.data.captions import CaptionError, Endpoint, LocalModel, caption
from minwm.data.clips import ClipFolder
from minwm.data.ingest import ingest, notes

PICTURES = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
Answer = tuple[int, str]


def said(text: str) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat endpoint that gives these answers in turn, the last one for ever; its address, and what it was asked."""
    asked = list[dict[str, Any]]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            status, text = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (http.server's name)
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


def test_a_server_is_shown_pictures_and_asked_for_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with server(said("  Red\nblocks. ")) as (url, asked):
        assert caption(Endpoint(url=url, model="m", key="MY_KEY"), PICTURES) == "Red blocks."
    (request,) = asked
    assert (request["path"], request["key"], request["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    *images, text = request["messages"][0]["content"]
    assert [image["image_url"]["url"][:23] for image in images] == ["data:image/jpeg;base64,"] * 3
    assert len({image["image_url"]["url"] for image in images}) == 3
    assert "Do not write of the camera" in text["text"]


def test_an_answer_that_speaks_of_motion_is_asked_for_again() -> None:
    with server(said("The camera pans."), said("A town.")) as (url, asked):
        assert caption(Endpoint(url=url), PICTURES) == "A town."
        assert "'camera', which speaks of motion" in asked[1]["messages"][0]["content"][-1]["text"]
    with server(said("It turns left.")) as (url, asked):
        assert caption(Endpoint(url=url), PICTURES) == "It turns left."  # the rule drops the clip
        assert len(asked) == captions.ASKED


def test_a_server_in_trouble_is_asked_again_and_a_refusal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr(captions.time, "sleep", pauses.append)
    with server((503, "busy"), (429, "slow down"), said("A town.")) as (url, _):
        assert caption(Endpoint(url=url), PICTURES) == "A town."
        assert pauses == [0, 1, 2]
    with server((401, "who are you?")) as (url, asked):
        with pytest.raises(CaptionError, match=r"does not caption \(status 401: who are you\?\)"):
            caption(Endpoint(url=url), PICTURES)
        assert len(asked) == 1
    with pytest.raises(CaptionError, match="does not caption"):
        caption(Endpoint(url=url, tries=2), PICTURES)  # it is closed
    with server((200, "<html>")) as (url, _), pytest.raises(CaptionError, match="no chat completion, but"):
        caption(Endpoint(url=url), PICTURES)
    with pytest.raises(ConfigError, match="begins with http"):
        Endpoint(url="file:///etc")


def test_captions_in_ingest(tmp_path: Path) -> None:
    """A text file is taken before a captioner; a captioner that fails ends the run, and the next one goes on."""
    footage(tmp_path / "in", "a")
    footage(tmp_path / "in", "b").with_suffix(".txt").unlink()
    footage(tmp_path / "in", "c", np.zeros_like(walk()[1])).with_suffix(".txt").unlink()
    with server((400, "no")) as (url, _), pytest.raises(CaptionError):
        ingest(tmp_path / "in", tmp_path / "out", replace(CFG, captioner=Endpoint(url=url, model="vlm")))
    assert [note["clips"] != [] for note in notes(tmp_path / "out")] == [True]
    with server(said("Many blocks.")) as (free, asked):
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        manifest["config"]["captioner"]["url"] = free  # the same endpoint at another port
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
        made = ingest(tmp_path / "in", tmp_path / "out", replace(CFG, captioner=Endpoint(url=free, model="vlm")))
    assert made["clips"] == 2 and len(asked) == 1, "a clip that is dropped for its pictures is not captioned"
    folder = ClipFolder(tmp_path / "out")
    records = [folder.record(clip) for clip in folder.ids()]
    assert [(r.caption, r.caption_source) for r in records] == [
        ("a town of coloured blocks", "sidecar"),
        ("Many blocks.", "vlm"),
    ]


def tiny_model(folder: Path) -> None:
    """A LLaVA of a few thousand random weights with a vocabulary of two words."""
    library = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "a", "town"]
    table = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(table)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = library.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ ' <image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    size = {"height": 16, "width": 16}
    images = library.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    library.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision = library.CLIPVisionConfig(**small, num_attention_heads=2, image_size=16, patch_size=8)
    text = library.LlamaConfig(**small, num_attention_heads=2, vocab_size=len(words), eos_token_id=2, pad_token_id=0)
    cfg = library.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_token_id=3)
    model = library.LlavaForConditionalGeneration(cfg)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 4]  # it says words only
    model.save_pretrained(folder)


def test_a_local_model_is_loaded_once_and_says_something_of_every_clip(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    captioner = LocalModel(model=str(tmp_path), tokens=5)
    answer = caption(captioner, PICTURES)
    assert len(answer.split()) == 5 and set(answer.split()) <= {"a", "town"} and answer == caption(captioner, PICTURES)
    with pytest.raises(CaptionError, match="cannot be loaded"):
        caption(LocalModel(model=str(tmp_path / "none")), PICTURES)
