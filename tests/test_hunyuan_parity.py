"""Our HunyuanVideo-1.5 is HunyuanVideo-1.5: the same numbers as diffusers' class, from the same random weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minwm.core.types import Condition
from minwm.families.hunyuan import transformer_layers
from minwm.families.hunyuan.convert import canonical_name, from_diffusers, original_name, to_diffusers
from minwm.families.hunyuan.transformer import Hunyuan, HunyuanConfig

diffusers = pytest.importorskip("diffusers")
SMALL = HunyuanConfig(
    dim=32, heads=2, layers=2, ffn=128, channels=4, text_dim=12, text_length=6, glyph_dim=8, glyph_length=5,
    image_dim=10, image_length=4, rope=(4, 6, 6), meanflow=True,
)  # fmt: skip


def reference(cfg: HunyuanConfig) -> nn.Module:
    """diffusers' class of the same size."""
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * cfg.channels + 1,
        out_channels=cfg.channels,
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads,
        num_layers=cfg.layers,
        num_refiner_layers=cfg.refiner_layers,
        mlp_ratio=cfg.ffn / cfg.dim,
        text_embed_dim=cfg.text_dim,
        text_embed_2_dim=cfg.glyph_dim,
        image_embed_dim=cfg.image_dim,
        rope_axes_dim=cfg.rope,
        use_meanflow=cfg.meanflow,
    )


@pytest.fixture(scope="module")
def pair() -> tuple[Hunyuan, nn.Module]:
    """Every parameter random; those of norms are near 1, or attention would be uniform."""
    torch.manual_seed(0)
    theirs, ours = reference(SMALL), SMALL.build()
    for name, parameter in theirs.named_parameters():
        scales = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(scales), std=0.15)
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    return ours, theirs


@pytest.fixture(autouse=True)
def angles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers computes them; ours are float64, and 1000 t is large: the outputs then differ by 5e-5."""

    def sinusoid(t: Tensor, width: int) -> Tensor:
        frequency = torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        angle = t[..., None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    monkeypatch.setattr(transformer_layers, "sinusoid", sinusoid)


def prompt(image: bool, glyphs: tuple[int, int], words: tuple[int, int]) -> Condition:
    """Two prompts of different length."""
    text, letters = torch.randn(2, 6, SMALL.text_dim), torch.randn(2, 5, SMALL.glyph_dim)
    for i in range(2):
        text[i, words[i] :], letters[i, glyphs[i] :] = 0, 0
    return Condition(
        text=text,
        glyphs=letters,
        image_states=torch.randn(2, 4, SMALL.image_dim) * image,
        first_latents=torch.randn(2, 1, SMALL.channels, 4, 6) if image else None,
    )


def theirs_at(theirs: nn.Module, x: Tensor, t: Tensor, cond: Condition, t_end: Tensor | None = None) -> Tensor:
    """diffusers' class takes the image and its place as channels, and masks of text."""
    image = x.new_zeros(*x.shape[:2], SMALL.channels + 1, *x.shape[3:])
    if cond.first_latent is not None:
        image[:, :1, :-1], image[:, 0, -1] = cond.first_latent, 1
    assert cond.glyphs is not None
    return theirs(
        torch.cat([x, image], 2).transpose(1, 2),
        1000 * t,
        cond.text,
        cond.text.any(-1),
        None if t_end is None else 1000 * t_end,
        cond.glyphs,
        cond.glyphs.any(-1),
        cond.image_states,
    ).sample.transpose(1, 2)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("glyphs", [(0, 0), (3, 0), (5, 2)])
@pytest.mark.parametrize("words", [(6, 6), (2, 5)])
@pytest.mark.parametrize("size", [(1, 4, 6), (3, 4, 6)])
@torch.no_grad()
def test_the_same_numbers(
    pair: tuple[Hunyuan, nn.Module],
    image: bool,
    glyphs: tuple[int, int],
    words: tuple[int, int],
    size: tuple[int, int, int],
) -> None:
    ours, theirs = pair
    frames, height, width = size
    x, t, cond = torch.randn(2, frames, SMALL.channels, height, width), torch.rand(2), prompt(image, glyphs, words)
    t_end = t * torch.rand(2)
    want = theirs_at(theirs, x, t, cond, t_end)
    per_frame, end = (y[:, None].expand(2, frames) for y in (t, t_end))
    assert want.abs().max() > 0.5
    torch.testing.assert_close(ours(x, ours.adaln_modulation(per_frame, end), cond), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_mean_velocities(pair: tuple[Hunyuan, nn.Module]) -> None:
    """The plain network, which is not told when its step ends."""
    cfg = replace(SMALL, meanflow=False)
    ours, theirs = cfg.build(), reference(cfg)
    state = {name: x for name, x in pair[1].state_dict().items() if "_r." not in name}
    theirs.load_state_dict(state)
    ours.load_state_dict(from_diffusers(state))
    x, t, cond = torch.randn(2, 3, SMALL.channels, 4, 6), torch.rand(2), prompt(True, (3, 0), (2, 5))
    want = theirs_at(theirs, x, t, cond)
    torch.testing.assert_close(ours(x, t[:, None].expand(2, 3), cond), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_text_changes_nothing(pair: tuple[Hunyuan, nn.Module]) -> None:
    """A clip alone, its prompt cut to its length, is what it is in a batch of ragged prompts."""
    ours, _ = pair
    x, t, cond = torch.randn(2, 3, SMALL.channels, 4, 6), torch.rand(2, 3), prompt(False, (0, 0), (2, 5))
    cut = replace(SMALL, text_length=2, glyph_length=1, image_length=1).build()
    cut.load_state_dict(ours.state_dict())
    alone = cut(x[:1], t[:1], Condition(text=cond.text[:1, :2]))
    torch.testing.assert_close(alone, ours(x, t, cond)[:1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_text_at_all_is_a_number(pair: tuple[Hunyuan, nn.Module]) -> None:
    ours, _ = pair
    out = ours(torch.randn(2, 1, SMALL.channels, 4, 6), torch.rand(2, 1), prompt(False, (0, 0), (0, 0)))
    assert out.isfinite().all()


@torch.no_grad()
def test_parity_would_notice_any_parameter(pair: tuple[Hunyuan, nn.Module]) -> None:
    """Every parameter matters to the output, except what the last block makes of text that nobody reads."""
    ours, _ = pair
    x, t, cond = torch.randn(2, 2, SMALL.channels, 4, 6), torch.full((2, 2), 0.4), prompt(True, (3, 1), (5, 6))
    before, idle = ours(x, t, cond), []
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
        if (ours(x, t, cond) - before).abs().max() < 1e-4:
            idle.append(name)
        parameter.copy_(kept)
    last = "double_blocks.1.txt."
    unread = ("attn_q", "attn_q_norm", "attn_proj", "mlp.fc1", "mlp.fc2")
    assert {name.rpartition(".")[0] for name in idle} <= {last + part for part in unread}


@pytest.mark.parametrize(("meanflow", "count"), [(False, 1793), (True, 1797)])
def test_full_size_has_the_names_and_shapes_of_the_release(meanflow: bool, count: int) -> None:
    """32 tensors per block and 65 around them; diffusers has the refiner's queries, keys and values apart."""
    cfg = HunyuanConfig(meanflow=meanflow)
    with torch.device("meta"):
        ours, theirs = cfg.build(), reference(cfg)
    state, want = ours.state_dict(), theirs.state_dict()
    assert {name: x.shape for name, x in to_diffusers(state).items()} == {name: x.shape for name, x in want.items()}
    assert {name: x.shape for name, x in from_diffusers(want).items()} == {name: x.shape for name, x in state.items()}
    assert len({original_name(name) for name in state}) == len(state) == len(want) - 8 == count
    assert [canonical_name(original_name(name)) for name in state] == list(state)
    assert meanflow or sum(p.numel() for p in ours.parameters()) == 8_326_608_160


def test_names_of_cameras_and_values_come_back() -> None:
    net = replace(SMALL, camera="dual").build()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    state, back = net.state_dict(), from_diffusers(to_diffusers(net.state_dict()))
    assert state.keys() == back.keys() and all(torch.equal(state[name], back[name]) for name in state)
    assert "double_blocks.0.img_attn_prope_proj.weight" in {original_name(name) for name in state}
    assert [canonical_name(original_name(name)) for name in state] == list(state)
    with torch.device("meta"):
        assert len(HunyuanConfig(camera="dual").build().state_dict()) == 1901
