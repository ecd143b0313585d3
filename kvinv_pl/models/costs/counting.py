"""What a piece of code takes, counted and not timed: floating point operations, and live memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable[[], Any]) -> float:
    """Floating point operations of matrix products, convolutions and attention, a product's two counted."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most that there were; on meta tensors, too."""

    def __init__(self, *held: Any) -> None:
        """Begin with the tensors in `held`, which are there already."""
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in tree_leaves(held):
            self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and see what has come of it."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            self._track(tensor)
        return results

    def _track(self, tensor: Any) -> None:
        storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
        if storage is None or storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._untrack, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _untrack(self, size: int) -> None:
        self.bytes -= size


class FusedAttention(TorchFunctionMode):
    """Attention in one kernel, as on a GPU; tensors on meta would otherwise see every score in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention without a mask, and nothing else."""
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and len(args) == 3 and given.get("attn_mask") is None:
            attend = torch.ops.aten._scaled_dot_product_flash_attention
            return attend(*args, scale=given.get("scale"))[0]
        return func(*args, **given)
