"""The block of HunyuanVideo-1.5: one attention over video and text, each with weights of its own (MMDiT)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.prope import Projection
from minwm.families.hunyuan.transformer_layers import AdaLN, Mlp, Valid, visible_keys
from minwm.nets.attention import AttentionScope, Heads, QKVBranches, TextKV, attend_branches, softmax_attention
from minwm.nets.backbone import ShiftScaleGate
from minwm.nets.fp8 import Linear
from minwm.nets.layers import RMSNorm, contiguous_copy, gated_residual, modulate, rotate


class Words(NamedTuple):
    """Text tokens on their way through the blocks."""

    x: Float[Tensor, "b 1 l d"]
    """As one frame of video would be."""
    time: Float[Tensor, "b 1 d"]
    """Embedding of their timestep."""
    valid: Valid


class Modality(nn.Module):
    """A block's weights for one kind of tokens, video or text: modulation, projections, norms, feed-forward."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.mod = AdaLN(dim, 6)
        self.attn_q, self.attn_k, self.attn_v, self.attn_proj = (Linear(dim, dim) for _ in range(4))
        self.attn_q_norm, self.attn_k_norm = (RMSNorm(dim // heads) for _ in range(2))
        self.mlp = Mlp(dim, ffn, nn.GELU("tanh"))

    def project_qkv(
        self, x: Float[Tensor, "b f p d"], modulation: ShiftScaleGate
    ) -> tuple[Float[Tensor, "b s a e"], Float[Tensor, "b s a e"], Float[Tensor, "b s a e"]]:
        """Queries and keys, normalised per head, and values."""
        shift, scale, *_ = modulation
        y = modulate(x, shift, scale).flatten(1, 2)
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)) for linear in (self.attn_q, self.attn_k, self.attn_v))
        return self.attn_q_norm(q), self.attn_k_norm(k), v

    def after_attention(
        self, x: Float[Tensor, "b f p d"], projected: Float[Tensor, "b s d"], modulation: ShiftScaleGate
    ) -> Float[Tensor, "b f p d"]:
        """Residual of attention, then the feed-forward part."""
        _, _, attention_gate, shift, scale, gate = modulation
        x = gated_residual(x, projected.view_as(x), attention_gate)
        return gated_residual(x, self.mlp(modulate(x, shift, scale)), gate)


class Block(nn.Module):
    """One attention over video and text, each with weights of its own; the video's is the scope's.

    Text attends to video too under a bidirectional scope, and to itself alone under others: then its keys and values
    depend on the prompt alone, and may be given in its place. With `dual` a PRoPE branch of the video is stacked on
    heads, and text keys and values a second time with it: as they are, or zeros without `prope_text`.
    """

    def __init__(self, layer: int, dim: int, heads: int, ffn: int, *, dual: bool, prope_text: bool) -> None:
        super().__init__()
        self.layer, self.heads, self.dual, self.prope_text = layer, heads, dual, prope_text
        self.img, self.txt = Modality(dim, heads, ffn), Modality(dim, heads, ffn)
        if dual:
            self.img_attn_prope_proj = nn.Linear(dim, dim)

    def adaln_modulation(self, time: Float[Tensor, "b f d"]) -> ShiftScaleGate:
        """Shift, scale and gate of the video's attention, then of its feed-forward part."""
        return self.img.mod(time)

    def project_text_kv(self, words: Words) -> tuple[TextKV, Words]:
        """Text keys and values, stacked as the video's are, and the tokens after a block in which they are alone."""
        modulation, q, text = self._project_text(words)
        return self._stack_text(text), self._text_after_attention(words, self._attend_alone(q, text), modulation)

    def _project_text(self, words: Words) -> tuple[ShiftScaleGate, Heads, TextKV]:
        modulation = self.txt.mod(words.time)
        q, k, v = (x.transpose(1, 2) for x in self.txt.project_qkv(words.x, modulation))
        return modulation, q, TextKV(k, v, words.valid)

    def _attend_alone(self, q: Heads, text: TextKV) -> Heads:
        assert text.valid is not None
        return softmax_attention(q, text.k, text.v, visible_keys(text.valid))

    def _stack_text(self, text: TextKV) -> TextKV:
        if not self.dual:
            return text
        again = (x if self.prope_text else torch.zeros_like(x) for x in (text.k, text.v))
        k, v = (torch.cat(pair, dim=1) for pair in zip((text.k, text.v), again, strict=True))
        return TextKV(k, v, text.valid)

    def _text_after_attention(self, words: Words, out: Heads, modulation: ShiftScaleGate) -> Words:
        projected = self.txt.attn_proj(out.transpose(1, 2).flatten(2))
        return words._replace(x=self.txt.after_attention(words.x, projected, modulation))

    def project_qkv(
        self, x: Float[Tensor, "b f p d"], modulation: ShiftScaleGate, rope: Tensor, camera: Projection | None
    ) -> QKVBranches:
        """Branches of the video's queries, keys and values."""
        q, k, v = self.img.project_qkv(x, modulation)
        qk = torch.stack([q, k])
        q, k = rotate(qk, rope)
        if camera is None:
            return (q,), (k,), (v,)
        q_prope, k_prope = camera.queries_and_keys(qk)
        return (q, q_prope), (k, k_prope), (v, camera.keys(v))

    def after_attention(
        self,
        x: Float[Tensor, "b f p d"],
        out: Float[Tensor, "b s a e"],
        modulation: ShiftScaleGate,
        camera: Projection | None,
    ) -> Float[Tensor, "b f p d"]:
        """Output projection and residual of the video, then its feed-forward part."""
        return self.img.after_attention(x, self.project_output(out, camera), modulation)

    def project_output(self, out: Float[Tensor, "b s a e"], camera: Projection | None) -> Float[Tensor, "b s d"]:
        """attn_proj(RoPE branch) + img_attn_prope_proj(PRoPE branch)."""
        if camera is None:
            return self.img.attn_proj(out.flatten(2))
        main, prope = out.split(self.heads, dim=2)
        prope = camera.outputs(contiguous_copy(prope))
        return self.img.attn_proj(main.flatten(2)) + self.img_attn_prope_proj(prope.flatten(2))

    def forward(
        self,
        x: Float[Tensor, "b f p d"],
        time: Float[Tensor, "b f d"] | ShiftScaleGate,
        rope: Tensor,
        text: Words | TextKV,
        camera: Projection | None,
        scope: AttentionScope,
    ) -> tuple[Float[Tensor, "b f p d"], Words | TextKV]:
        modulation = self.img.mod(time) if isinstance(time, Tensor) else time
        q, k, v = self.project_qkv(x, modulation, rope, camera)
        if isinstance(text, Words):
            text_modulation, q_text, text_kv = self._project_text(text)
            if scope.bidirectional:
                text_out = scope.attend_from_text(
                    self.layer, q_text, k[0].transpose(1, 2), v[0].transpose(1, 2), text_kv
                )
            else:
                text_out = self._attend_alone(q_text, text_kv)
            text, stacked = self._text_after_attention(text, text_out, text_modulation), self._stack_text(text_kv)
        else:
            stacked = text
        out = attend_branches(scope, self.layer, q, k, v, text=stacked)
        return self.after_attention(x, out, modulation, camera), text
