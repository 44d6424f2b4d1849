"""Small networks with random weights, in the forms in which others publish theirs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minwm.core.types import Condition
from minwm.core.weights import load_tensors
from minwm.families.base import Published
from minwm.families.wan.convert import CAMERA_PARAMETERS, diffusers_names
from minwm.families.wan.transformer import Wan, WanConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PLAIN = WanConfig(dim=64, heads=2, layers=2, ffn=96, channels=4, text_dim=16, freq_dim=32)
SEEING = replace(PLAIN, camera="dual")
ACTIONS = {f"action_embedding.{i}.weight": torch.ones(64, width) for i, width in ((0, 32), (2, 64))}
ACTIONS |= {f"action_embedding.{i}.bias": torch.ones(64) for i in (0, 2)}
State = dict[str, Tensor]


def network(cfg: WanConfig) -> Wan:
    """With every parameter random."""
    net = cfg.build()
    for name, parameter in net.named_parameters():  # norms scale near 1, or attention would be uniform
        nn.init.normal_(parameter, mean=float(name.endswith(("norm_q.weight", "norm_k.weight"))), std=0.2)
    return net


def reference(cfg: WanConfig) -> nn.Module:
    """diffusers' class of the same size."""
    return diffusers.WanTransformer3DModel(
        patch_size=(1, cfg.patch, cfg.patch),
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn,
        num_layers=cfg.layers,
        rope_max_seq_len=64,
    )


@torch.no_grad()
def assert_same_function(ours: Wan, theirs: nn.Module) -> None:
    x, t, text = torch.randn(1, 3, 4, 4, 6), torch.rand(1), torch.randn(1, 512, 16)
    want = theirs(x.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
    assert want.abs().max() > 0.5
    torch.testing.assert_close(ours(x, t[:, None].expand(1, 3), Condition(text=text)), want, atol=1e-4, rtol=1e-4)


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def load_into(opened: Published, net: nn.Module) -> list[str]:
    """Load strictly, but for cameras if there are none in the file; returns the parameters that it lacks."""
    new = CAMERA_PARAMETERS if opened.config.camera == "none" else ()
    return load_tensors(net, opened.tensors, opened.weights.path, new)


def plain_state() -> State:
    torch.manual_seed(0)
    return network(PLAIN).state_dict()


def seeing_state() -> State:
    torch.manual_seed(1)
    return network(SEEING).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def sharded_everywhere(state: State) -> State:
    """FSDP around the network and every block, checkpointing around every attention."""
    new = {}
    for key, value in state.items():
        inner = key.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module.")
        inner = re.sub(r"^blocks\.\d+\.", r"\g<0>_fsdp_wrapped_module.", inner)
        new[f"model._fsdp_wrapped_module.{inner}"] = value
    return new


def halves(state: State) -> State:
    return {key: value / 2 for key, value in state.items()}


def write_original(folder: Path, state: State, **changes: object) -> Path:
    """As Wan-AI publishes, with a VAE and a text encoder beside it."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 64, "eps": 1e-06, "ffn_dim": 96}
    config |= {"freq_dim": 32, "in_dim": 4, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 4}
    (folder / "config.json").write_text(json.dumps({**config, "text_len": 512, **changes}))
    for other in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        torch.save({"x": torch.ones(1)}, folder / other)
    return folder


def worldplay(state: State) -> State:
    names = diffusers_names(2)
    return {f"model._fsdp_wrapped_module.{names[key]}": value for key, value in state.items()}


def spoilt(state: State, change: str) -> State:
    key = "blocks.1.cross_attn.o.bias"
    match change:
        case "missing":
            return {name: value for name, value in state.items() if name != key}
        case "unexpected":
            return state | {"blocks.1.cross_attn.extra.bias": torch.ones(3)}
        case _:
            return state | {key: torch.ones(63)}


def save_text_encoder(folder: Path) -> None:
    """A UMT5 of width 32 that knows six words, in the layout of transformers."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "tower", "the", "dome"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = transformers.UMT5Config(vocab_size=16, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=1)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
