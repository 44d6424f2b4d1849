"""Wan's text encoder with a tiny UMT5 in each published layout, against transformers' own padded and masked pass."""

import gc
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minwm.cli import main
from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.core.runtime import MissingExtraError
from minwm.core.weights import read_weights
from minwm.experiments.presets.demo import tiny_model
from minwm.families.wan.text import LAYOUTS, Umt5Text, build_encoder, clean, rename
from minwm.nets.prompt_cache import read_states
from minwm.nets.text import TextEncoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<unk>", *["a", "red", "blue", "tower", "dome", "and", "the", "of", "on", "in"]]
CAPTIONS = ["a red tower", "", "the dome of a blue tower and a red tower", "a lighthouse"]
LENGTH = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


def random_encoder(seed: int = 0) -> Any:
    config = transformers.UMT5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)
    encoder = transformers.UMT5EncoderModel(config).eval()
    torch.manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        norm = "layer_norm" in name
        nn.init.normal_(parameter, mean=float(norm), std=0.2 if norm or parameter.shape[1] > 4 else 1.0)
    return encoder


def save_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(3)  # a file may hold such settings: they are not ours
    tokenizer.enable_padding(length=9)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def original_names(encoder: Any) -> dict[str, Tensor]:
    """The state dict as the release of Wan names it, block by block."""
    theirs = encoder.state_dict()
    names = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    for i in range(encoder.config.num_layers):
        ours, attention, ffn = f"blocks.{i}", f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        names |= {f"{ours}.norm1": f"{attention}.layer_norm", f"{ours}.norm2": f"{ffn}.layer_norm"}
        names |= {f"{ours}.attn.{x}": f"{attention}.SelfAttention.{x}" for x in "qkvo"}
        names |= {f"{ours}.pos_embedding.embedding": f"{attention}.SelfAttention.relative_attention_bias"}
        names |= {f"{ours}.ffn.gate.0": f"{ffn}.DenseReluDense.wi_0", f"{ours}.ffn.fc1": f"{ffn}.DenseReluDense.wi_1"}
        names |= {f"{ours}.ffn.fc2": f"{ffn}.DenseReluDense.wo"}
    return {f"{name}.weight": theirs[f"{key}.weight"].clone() for name, key in names.items()}


def save(folder: Path, layout: str, encoder: Any) -> str:
    if layout == "release":
        save_tokenizer(folder / "google/umt5-xxl")
        torch.save(original_names(encoder), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    else:
        save_tokenizer(folder / "tokenizer")
        encoder.save_pretrained(folder / "text_encoder", max_shard_size="10KB" if layout == "shards" else "1GB")
        assert (len(list((folder / "text_encoder").glob("*.safetensors"))) > 1) == (layout == "shards")
    return str(folder)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return save(tmp_path / "wan", "release", random_encoder())


@torch.no_grad()
def expected(encoder: Any, folder: Path, captions: list[str]) -> Tensor:
    """What Wan's pipeline does: pad to the full length, encode with the mask, then zero what is past the text."""
    file = next(folder.rglob("tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    batch = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    states = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states * batch.attention_mask[..., None]


@pytest.mark.parametrize("layout", ["release", "file", "shards"])
def test_states_are_those_of_the_padded_and_masked_pass(tmp_path: Path, layout: str) -> None:
    encoder = random_encoder()
    text: TextEncoder = Umt5Text(source=save(tmp_path / "wan", layout, encoder), dim=32, length=LENGTH)
    want, got = expected(encoder, tmp_path / "wan", CAPTIONS), text.encode(CAPTIONS)["text"]
    assert got.shape == (4, LENGTH, 32) and got.dtype == torch.float32 and want.abs().max() > 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert [int(row.any(-1).sum()) for row in got] == [4, 1, 11, 3], "words and the end mark; the rest is zero"
    assert torch.equal(text.encode(CAPTIONS[::-1])["text"].flip(0), got)
    assert text.encode([])["text"].shape == (0, LENGTH, 32)


def test_white_space_and_entities_do_not_count(source: str, cache: Path) -> None:
    text = Umt5Text(source=source, dim=32, length=LENGTH)
    a, b = text.encode(["a red\n  tower", " a red tower "])["text"]
    assert torch.equal(a, b) and len(list(cache.rglob("*.safetensors"))) == 1


def test_what_is_kept_needs_no_encoder(source: str, cache: Path) -> None:
    text = Umt5Text(source=source, dim=32, length=LENGTH)
    want = text.encode(CAPTIONS)["text"]
    for file in Path(source).rglob("*.*"):
        file.unlink()
    assert torch.equal(text.encode(CAPTIONS)["text"], want)
    with pytest.raises(UserError, match=r"'a new tower'.*tokenizer/tokenizer.json"):
        text.encode(["a red tower", "a new tower"])
    file = next(cache.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file.name} is damaged.*delete it"):
        text.encode(CAPTIONS)


def test_states_from_elsewhere_need_no_encoder(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are moved from one machine to another that never had the encoder, by the command line."""
    caption, text = "a red  tower", Umt5Text(source="nowhere", dim=32, length=LENGTH)
    elsewhere = Umt5Text(source=source, dim=32, length=LENGTH)
    expected = elsewhere.encode([caption])["text"]
    file = next(path for path in tmp_path.rglob("prompts/*/*.safetensors"))
    assert read_states(file)[0] == "a red tower"
    network = replace(tiny_model().network, text_dim=32, text_length=LENGTH)
    model = replace(tiny_model(), text=text, network=network)
    (tmp_path / "model.json").write_text(dumps(model))
    with pytest.raises(UserError, match="no text encoder in nowhere"):
        text.encode([caption])
    assert main(["data", "prompts", str(file), "--model", str(tmp_path)]) == 0
    assert torch.equal(text.encode([caption, "a red tower"])["text"], expected.expand(2, -1, -1))
    with pytest.raises(UserError, match=r"no text encoder in nowhere to encode 'a dome', which is new"):
        text.encode([caption, "a dome"])
    with pytest.raises(ConfigError, match=r"shape \(3, 8\); this model reads \(1 to 12, 32\)"):
        save_file({"states": torch.zeros(3, 8)}, tmp_path / "narrow.safetensors", {"caption": "x"})
        text.import_states(tmp_path / "narrow.safetensors")
    save_file({"states": torch.zeros(2, 32)}, tmp_path / "bare.safetensors")
    (tmp_path / "prompts.txt").write_text("a dome\n\nthe dome\n")
    for given, told in (("bare.safetensors", "a `caption` in the metadata"), ("prompts.txt", "to encode 'a dome'")):
        assert main(["data", "prompts", str(tmp_path / given), "--model", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "model.json").write_text(dumps(replace(model, text=elsewhere)))
    assert main(["data", "prompts", str(tmp_path / "prompts.txt"), "--model", str(tmp_path)]) == 0
    assert "2 prompts encoded, 0 taken" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["release", "file", "shards"])
def test_a_source_on_the_hub_is_fetched_when_a_prompt_is_new(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, calls, there = pytest.importorskip("huggingface_hub"), [], [False]
    source = save(tmp_path / "encoder", layout, random_encoder())

    def snapshot(repo: str, allow_patterns: list[str], local_files_only: bool, **_: None) -> str:
        calls.append((repo, local_files_only))
        if local_files_only and not there[0]:
            raise hub.errors.LocalEntryNotFoundError("not fetched yet")
        names = [str(path.relative_to(source)) for path in Path(source).rglob("*") if path.is_file()]
        wanted = list(hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        weights = {name for name in names if name.endswith((".safetensors", "index.json", ".pth", "tokenizer.json"))}
        assert set(wanted) == weights - {"other/large.safetensors"}
        there[0] = True
        return source

    (Path(source) / "other").mkdir()
    (Path(source) / "other" / "large.safetensors").write_bytes(b"")
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    text = Umt5Text(source="hf://Wan-AI/Wan", dim=32, length=LENGTH)
    expected = Umt5Text(source=source, dim=32, length=LENGTH).encode(CAPTIONS)["text"]
    assert torch.equal(text.encode(CAPTIONS)["text"], expected)
    assert calls[0] == ("Wan-AI/Wan", False) and there[0]
    there[0] = False
    calls.clear()
    assert torch.equal(text.encode(CAPTIONS)["text"], expected)
    assert calls == [("Wan-AI/Wan", True)], "what is kept needs no download"


def test_the_encoder_is_loaded_once_and_let_go(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, built = Umt5Text(source=source, dim=32, length=LENGTH), []

    def watched(weights: dict[str, Tensor], source: Path) -> nn.Module:
        encoder = build_encoder(weights, source)
        built.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr("minwm.families.wan.text.build_encoder", watched)
    gc.disable()
    try:
        text.encode(CAPTIONS)
        assert len(built) == 1 and built[0]() is None, "freed at once, not by the garbage collector"
    finally:
        gc.enable()
    text.encode(CAPTIONS)
    assert len(built) == 1
    text.encode([*CAPTIONS, "a dome"])
    assert len(built) == 2


def test_another_encoder_or_length_has_states_of_its_own(source: str, cache: Path) -> None:
    text = Umt5Text(source=source, dim=32, length=LENGTH)
    before = text.encode(CAPTIONS)["text"]
    save(Path(source), "release", random_encoder(seed=1))  # the same names, sizes and shapes
    after = text.encode(CAPTIONS)["text"]
    assert (after - before).abs().max() > 0.1
    Umt5Text(source=source, dim=32, length=LENGTH + 1).encode(CAPTIONS[:1])
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


def test_a_long_caption_is_refused_and_nothing_is_encoded(source: str, cache: Path) -> None:
    text = Umt5Text(source=source, dim=32, length=5)
    with pytest.raises(UserError, match=r"6 tokens.* takes 5.*'a red tower and the'"):
        text.encode(["a dome", "a red tower and the"])
    assert not list(cache.rglob("*.safetensors"))
    assert text.encode(["a red tower and"])["text"][0].any(-1).all(), "the end mark is the last of five"


def test_damaged_weights_give_one_line(tmp_path: Path) -> None:
    for layout, name in (("release", "models_t5_umt5-xxl-enc-bf16.pth"), ("file", "text_encoder/model.safetensors")):
        folder = tmp_path / layout
        file = Path(save(folder, layout, random_encoder())) / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(UserError, match=rf"{file.name} is damaged.*download it again") as caught:
            Umt5Text(source=str(folder), dim=32).encode(["a"])
        assert "\n" not in str(caught.value)
    folder = tmp_path / "shards"
    save(folder, "shards", random_encoder())
    next((folder / "text_encoder").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"lists model-.*download it too"):
        Umt5Text(source=str(folder), dim=32).encode(["a"])


def test_errors_say_what_is_expected(source: str) -> None:
    with pytest.raises(UserError, match="no text encoder in nowhere") as caught:
        Umt5Text(source="nowhere").encode(["a"])
    assert all(file in str(caught.value) for layout in LAYOUTS for file in layout)
    with pytest.raises(ConfigError, match=r"text.dim=4096.*has 32"):
        Umt5Text(source=source).encode(["a"])
    with pytest.raises(ConfigError, match=r"text.length=0"):
        Umt5Text(source=source, length=0)
    file = Path(source) / LAYOUTS[-1][1]
    weights, key = rename(read_weights(file).tensors), "encoder.block.1.layer.0.SelfAttention.o.weight"
    with pytest.raises(UserError, match=rf"1 unexpected: more; 1 missing: {key}"):
        build_encoder({k: v for k, v in weights.items() if k != key} | {"more": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"no UMT5 encoder.*shared.weight"):
        build_encoder({}, file)
    cfg = Umt5Text(source=source)
    assert loads(Umt5Text, dumps(cfg)) == cfg


def test_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clean("  a\t'red'\r\n {tower} #1 ~ 100% ") == "a 'red' {tower} #1 ~ 100%"
    fake = types.ModuleType("ftfy")
    monkeypatch.setattr(fake, "fix_text", lambda text: text.replace("Ã©", "é"), raising=False)
    monkeypatch.setitem(sys.modules, "ftfy", fake)
    assert clean("cafÃ© &amp;lt; &amp; bar") == "café < & bar"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("plain ASCII needs no ftfy") == "plain ASCII needs no ftfy"
    with pytest.raises(MissingExtraError, match=r"ftfy.*minwm\[pretrained\]"):
        clean("café")


def test_ftfy_leaves_plain_ascii_alone() -> None:
    ftfy = pytest.importorskip("ftfy")
    plain = "".join(map(chr, range(32, 127))).replace("&", "") + "\t\n\r"
    assert " ".join(ftfy.fix_text(plain).split()) == clean(plain)


def test_full_size_is_umt5_xxl() -> None:
    """242 tensors of the release, 11.4 GB in bfloat16."""
    shapes = {"token_embedding": (256384, 4096), "norm": (4096,)}
    for i in range(24):
        shapes |= {f"blocks.{i}.norm{k}": (4096,) for k in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{x}": (4096, 4096) for x in "qkvo"}
        shapes |= {f"blocks.{i}.pos_embedding.embedding": (32, 64), f"blocks.{i}.ffn.fc2": (4096, 10240)}
        shapes |= {f"blocks.{i}.ffn.{x}": (10240, 4096) for x in ("gate.0", "fc1")}
    original = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoder = build_encoder(rename(original), Path("release"))
    assert len(original) == 242 and sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
    config = encoder.config
    assert (config.d_model, config.d_kv, config.num_heads, config.d_ff) == (4096, 64, 64, 10240)
    assert (config.num_layers, config.vocab_size, config.dense_act_fn) == (24, 256384, "gelu_new")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_bfloat16(source: str) -> None:
    got = Umt5Text(source=source, dim=32, length=LENGTH).encode(CAPTIONS)["text"]
    want = expected(random_encoder(), Path(source), CAPTIONS)
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()
