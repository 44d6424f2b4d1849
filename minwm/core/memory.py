"""Counting the bytes of live tensors, and tensors without data."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShapeOnlyMode(FakeTensorMode):
    """Under this mode tensors have no data, and operators compute shapes only.

    The tensors report the CPU as their device. Every number read from one is 0.5, which is valid as a loss, a timestep
    or a probability.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        if func is torch.ops.prim.device.default:  # two thirds of all calls
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo: Any) -> "ShapeOnlyMode":
        """Deep copies of tensors stay under this mode."""
        return self


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors made under this mode, with or without data: `live` now, `peak` at most.

    Views and tensors from before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage() not in self._seen:
                given = (y.untyped_storage() for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor))
                if not any(storage is x.untyped_storage() for storage in given):  # else a view of something older
                    self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage)
        self._add(storage.nbytes())
        weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)
