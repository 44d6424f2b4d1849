"""Useful FLOPs of training steps, for throughput and MFU.

They are those of the forward passes that a recipe makes, each by the closed form `Backbone.flops`: three times for a
pass under gradient, as the backward pass takes twice the forward one, and once for all others: teachers, scores,
rollouts. Recomputation for the backward pass, by checkpointing or inside a kernel of attention, is not useful (MFU, not
HFU). Text in an attention of its own, modulation and the optimiser are left out: little, and on the safe side.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from minwm.core.config import ConfigError
from minwm.nets.attention import FULL, AttentionScope, Cached, Full, Masked, ReadOnlyCache
from minwm.nets.backbone import Backbone


@contextmanager
def count_flops(networks: Iterable[nn.Module]) -> Iterator[list[int]]:
    """Yield a list that gets the useful FLOPs of every forward pass of the networks.

    Networks without a closed form of their FLOPs are not counted.
    """
    flops = list[int]()

    def count(net: Any, args: Any) -> None:
        scope = args[3] if len(args) > 3 else FULL
        flops.append((3 if torch.is_grad_enabled() else 1) * pass_flops(net, args[0].shape, scope))

    hooks = [net.register_forward_pre_hook(count) for net in networks if _has_closed_form(net)]
    try:
        yield flops
    finally:
        for hook in hooks:
            hook.remove()


def _has_closed_form(net: nn.Module) -> bool:
    return isinstance(net, Backbone) and type(net).flops is not Backbone.flops


def pass_flops(net: Backbone, shape: Sequence[int], scope: AttentionScope) -> int:
    """FLOPs of a forward pass over latents of `shape`, b f c h w."""
    batch, frames, _, height, width = shape
    tokens = net.tokens_per_frame(height, width)
    text = 0
    match scope:
        case Full():
            visible = [(frames, frames * tokens)]
            text = net.text_flops(frames * tokens)
        case Masked():
            text = net.text_flops(0)
            groups = zip(scope.query_groups, scope.visible_groups, strict=True)
            visible = [(size, tokens * sum(scope.key_groups[i] for i in keys)) for size, keys in groups]
        case Cached() | ReadOnlyCache():
            geometry = scope.arena.geometry
            rows = geometry.valid_rows(scope.chunk) - geometry.text_rows
            parts = (scope.parts if isinstance(scope, Cached) else ()) or (frames,)
            later = [tokens * (frames - end) for end in accumulate(parts)]
            visible = [(part, rows - unseen) for part, unseen in zip(parts, later, strict=True)]
        case _:
            raise ConfigError(f"how many tokens a pass under {type(scope).__name__} attends to is not known here")
    return batch * (text + sum(net.flops(size, tokens, rows) for size, rows in visible))
