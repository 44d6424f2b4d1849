"""FP8 (e4m3) with one float32 scale per row: matrix products of the blocks, and the KV cache of a stream.

Both are a choice (stream/accelerate.py), for every number is rounded to 3 bits of mantissa.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.nets.attention import ArenaSize, Heads, KVArena, all_visible
from minwm.nets.chunks import Geometry
from minwm.nets.layers import ProductLinear

FP8 = torch.float8_e4m3fn


def quantize(x: Float[Tensor, "*n d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n 1"]]:
    """FP8 values and one float32 scale per row; their product is x to within 1/16 of each, or 3e-6 of the largest."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (wide / scale).to(FP8), scale


class Linear(ProductLinear):
    """x W^T + b, one of the large products of a block, optionally in FP8 (W8A8, one scale per row of either).

    What is small or sensitive (embeddings, time, text, head, camera output) is another linear, never in FP8.
    """

    quantized: Tensor | None
    scales: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("quantized", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    def use_fp8(self, on: bool = True) -> None:
        """Take products in FP8, with the weights as they are now; these stay, and `on=False` goes back to them."""
        if any(side % 16 for side in self.weight.shape):
            raise ConfigError(
                f"a linear of {self.in_features} to {self.out_features} channels has no FP8 form, which needs "
                "multiples of 16; leave engine.fp8 off"
            )
        self.quantized, self.scales = quantize(self.weight.detach()) if on else (None, None)

    def product(self, x: Float[Tensor, "n i"], bias: Tensor, out: Tensor | None = None) -> Float[Tensor, "n o"]:
        if self.quantized is None or self.scales is None:
            return super().product(x, bias, out)
        quantized, scales = quantize(x)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] - the public one knows no `out`
            quantized,
            self.quantized.t(),
            scales,
            self.scales.t(),
            bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
            out=out,
        )

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        if self.quantized is None:
            return super().forward(input)
        return self.product(input.flatten(0, -2), self.bias).unflatten(0, input.shape[:-1])


class Fp8Arena(KVArena):
    """The same with the window's rows in FP8, one scale per row and head: (1 + 4/e) bytes a value.

    Text and sinks keep the dtype: sinks are rotated again and again (`rolling_sink`), and roundings would add up.
    `unpacked` holds one layer at a time, and the current chunk, so that it attends to itself unrounded.
    """

    def __init__(
        self, geometry: Geometry, size: ArenaSize, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        layers, batch, heads, width = size
        self.geometry, shape = geometry, (layers, 2, batch, heads)
        self.plain_rows = geometry.slot_rows(geometry.sink)[0]
        rows, zeros = geometry.rows - self.plain_rows, partial(torch.zeros, device=device)
        self.kv = zeros(*shape, self.plain_rows, width, dtype=dtype)
        self.quantized, self.scales = zeros(*shape, rows, width, dtype=FP8), zeros(*shape, rows, 1)
        self.unpacked = zeros(*shape[1:], geometry.rows, width, dtype=dtype)
        self.visible = all_visible(geometry, batch, device)

    def current_slot(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        start, stop = self.geometry.slot_rows(self.geometry.slot(chunk))
        return self.unpacked[..., start:stop, :]

    def past_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        (start, stop), rows = self.geometry.slot_rows(self.geometry.slot(chunk)), self.geometry.valid_rows(chunk)
        self._load(layer, 0, start)
        self._load(layer, stop, rows)
        return self.unpacked[..., :rows, :]

    def valid_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        self._store(layer, *self.geometry.slot_rows(self.geometry.slot(chunk)))
        return self.past_kv(layer, chunk)

    def transform_kv(self, change: Callable[[Heads], Heads], rows: slice, *, values: bool) -> None:
        start, stop, _ = rows.indices(self.geometry.rows)
        for layer in range(len(self.kv)):
            self._load(layer, start, stop)
            for part in self.unpacked if values else self.unpacked[:1]:
                part[:, :, start:stop] = change(part[:, :, start:stop])
            self._store(layer, start, stop)

    def _load(self, layer: int, start: int, stop: int) -> None:
        plain, (quantized, scales) = slice(start, min(stop, self.plain_rows)), self._packed(start, stop)
        self.unpacked[..., plain, :] = self.kv[layer, ..., plain, :]
        self.unpacked[..., max(start, self.plain_rows) : stop, :].copy_(quantized[layer]).mul_(scales[layer])

    def _store(self, layer: int, start: int, stop: int) -> None:
        plain, packed = slice(start, min(stop, self.plain_rows)), self._packed(start, stop)
        self.kv[layer, ..., plain, :] = self.unpacked[..., plain, :]
        for to, x in zip(packed, quantize(self.unpacked[..., max(start, self.plain_rows) : stop, :]), strict=True):
            to[layer] = x

    def _packed(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(max(start - self.plain_rows, 0), max(stop - self.plain_rows, 0))
        return self.quantized[..., rows, :], self.scales[..., rows, :]

    def _slot_tensors(self, chunk: int) -> tuple[Tensor, ...]:
        return self._packed(*self.geometry.slot_rows(self.geometry.slot(chunk)))
