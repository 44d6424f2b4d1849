"""Numbers of 8 bits (e4m3) with a float32 scale per row: products of a block, and the cache of a stream.

Both are a choice (stream/accelerate.py), for every number is rounded to 3 bits of mantissa.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError
from minwm.nets.attention import Geometry, Heads, KVArena

FP8 = torch.float8_e4m3fn


def scaled(x: Float[Tensor, "*n d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n 1"]]:
    """FP8 numbers and one float32 scale per row; their product is x to within 1/16 of each, or 3e-6 of the largest."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (wide / scale).to(FP8), scale


class Linear(nn.Linear):
    """x W^T + b with bias, one of the large products of a block: by choice in FP8 (W8A8, one scale per row of either).

    What is small or sensitive (embeddings, time, text, head, camera output) is a plain `nn.Linear` and never in FP8.
    """

    numbers: Tensor | None
    scales: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("numbers", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    def use_fp8(self, on: bool = True) -> None:
        """Take products in FP8, with the weights as they are now; these stay, and `on=False` goes back to them."""
        if any(side % 16 for side in self.weight.shape):
            raise ConfigError(
                f"a linear of {self.in_features} to {self.out_features} channels has no FP8 form, which needs "
                "multiples of 16; leave engine.fp8 off"
            )
        self.numbers, self.scales = scaled(self.weight.detach()) if on else (None, None)

    def product(self, x: Float[Tensor, "n i"], bias: Float[Tensor, " o"], out: Tensor | None = None) -> Tensor:
        """x W^T + bias, written into `out` if given."""
        if self.numbers is None or self.scales is None:
            return torch.addmm(bias, x, self.weight.t(), out=out)
        numbers, scales = scaled(x)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] - the public one knows no `out`
            numbers, self.numbers.t(), scales, self.scales.t(), bias, out_dtype=x.dtype, use_fast_accum=True, out=out
        )

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        if self.numbers is None:
            return super().forward(input)
        return self.product(input.flatten(0, -2), self.bias).unflatten(0, input.shape[:-1])


class Fp8Arena(KVArena):
    """The same with the window's rows in FP8, one scale per row and head: (1 + 4/e) bytes a number.

    Text and sinks keep the dtype: sinks are turned again and again (`rolling_sink`), and roundings would add up. One
    layer at a time is unpacked into `wide`. The current chunk is written there too, so that it sees itself unrounded.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: int,
        batch: int,
        heads: int,
        head_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry, shape = geometry, (layers, 2, batch, heads)
        self.kept = geometry.text_rows + geometry.start(geometry.sink) * geometry.tokens
        rows, new = geometry.rows - self.kept, partial(torch.zeros, device=device)
        self.kv = new(*shape, self.kept, head_width, dtype=dtype)
        self.numbers, self.scales = new(*shape, rows, head_width, dtype=FP8), new(*shape, rows, 1)
        self.wide = new(*shape[1:], geometry.rows, head_width, dtype=dtype)

    def current_slot(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        start, stop = self.geometry.slot_rows(self.geometry.slot(chunk))
        return self.wide[..., start:stop, :]

    def past_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        (start, stop), rows = self.geometry.slot_rows(self.geometry.slot(chunk)), self.geometry.valid_rows(chunk)
        self._load(layer, 0, start)
        self._load(layer, stop, rows)
        return self.wide[..., :rows, :]

    def valid_kv(self, layer: int, chunk: int) -> Float[Tensor, "2 b a s e"]:
        self._store(layer, *self.geometry.slot_rows(self.geometry.slot(chunk)))
        return self.past_kv(layer, chunk)

    def transform_kv(self, change: Callable[[Heads], Heads], rows: slice, *, values: bool) -> None:
        start, stop, _ = rows.indices(self.geometry.rows)
        for layer in range(len(self.kv)):
            self._load(layer, start, stop)
            for part in self.wide if values else self.wide[:1]:
                part[:, :, start:stop] = change(part[:, :, start:stop])
            self._store(layer, start, stop)

    def _load(self, layer: int, start: int, stop: int) -> None:
        kept, (numbers, scales) = slice(start, min(stop, self.kept)), self._packed(start, stop)
        self.wide[..., kept, :] = self.kv[layer, ..., kept, :]
        self.wide[..., max(start, self.kept) : stop, :].copy_(numbers[layer]).mul_(scales[layer])

    def _store(self, layer: int, start: int, stop: int) -> None:
        kept, packed = slice(start, min(stop, self.kept)), self._packed(start, stop)
        self.kv[layer, ..., kept, :] = self.wide[..., kept, :]
        for to, x in zip(packed, scaled(self.wide[..., max(start, self.kept) : stop, :]), strict=True):
            to[layer] = x

    def _packed(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(max(start - self.kept, 0), max(stop - self.kept, 0))
        return self.numbers[..., rows, :], self.scales[..., rows, :]

    def _slot_tensors(self, chunk: int) -> tuple[Tensor, ...]:
        return self._packed(*self.geometry.slot_rows(self.geometry.slot(chunk)))
