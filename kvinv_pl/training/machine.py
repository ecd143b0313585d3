"""The device of a command, and about how fast it is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

REACHED = 0.5
"""The share of a matrix product's speed that a whole network reaches, about."""


@dataclass(frozen=True)
class Machine:
    """Where the pictures will be tuned."""

    device: torch.device
    dtype: torch.dtype
    """In which the U-Net will be held."""
    devices: int
    speed: float
    """Floating point operations a second."""

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, devices: int) -> Machine:
        """Guess the speed from products of matrices, for a fifth of a second."""
        side, done = 4096 if device.type == "cuda" else 1024, 0
        a = torch.ones(side, side, device=device, dtype=dtype)
        float((a @ a)[0, 0])  # waits for the device; the first product is slower
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < 0.2:
            float((a @ a)[0, 0])
            done += 1
        return cls(device, dtype, devices, REACHED * done * 2 * side**3 / took)
