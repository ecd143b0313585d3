"""One number a row, on a device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers from the host, (rows,), on a device; not to be changed.

    A copy from the host waits for the device, and the inner steps of a phase have the same numbers: they are
    copied once.
    """
    return _copied(tuple(values.tolist()), dtype, device)


@lru_cache(maxsize=64)
def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
