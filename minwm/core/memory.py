"""Memory that tensors take: counting what is alive, and tensors that take none."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShapeOnlyMode(FakeTensorMode):
    """Tensors made under this mode take no memory, and what computes on them only works out shapes.

    Python takes them for CPU tensors. Any number that is read from one is a half: a fine loss, time or chance,
    and true.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        if func is torch.ops.prim.device.default:  # two thirds of all calls
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo: Any) -> "ShapeOnlyMode":
        """A copy of a tensor stays one of this mode."""
        return self


class MemoryMeter(TorchDispatchMode):
    """Watches the tensors that are made under it, whether they have data or not.

    `live` bytes are alive now, `peak` is the most that were. Views take nothing; nor does what was there before.
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
