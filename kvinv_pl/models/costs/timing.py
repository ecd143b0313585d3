"""Times a network on a device: a forward and an inner step, for which its weights may be anything."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvinv_pl.models.costs.counting import FusedAttention, flops
from kvinv_pl.models.costs.meta_model import MetaModel

LONGEST = 10.0
"""Seconds that one forward and one inner step may be expected to take; at latents for which they do not."""
ENOUGH = 1.0
"""Seconds for which each is repeated."""


@dataclass(frozen=True)
class Timings:
    """What a piece of work took each time, and the floating point operations that it is."""

    seconds: Sequence[float]
    flop: float

    def spread(self, flop: float) -> tuple[float, float, float]:
        """What so many operations take: by the quickest time, by the median and by the slowest."""
        found = min(self.seconds), statistics.median(self.seconds), max(self.seconds)
        low, middle, high = (each / self.flop * flop for each in found)
        return low, middle, high


@dataclass(frozen=True)
class NetworkTimings:
    """What was timed."""

    grid: tuple[int, int]
    """Height and width of its latents."""
    forward: Timings
    """A forward of tuning, with all of its branches."""
    inner_step: Timings
    """A forward and backward, what comes before the first upgraded layer being computed already."""


def time_network(
    model_at: Callable[[tuple[int, int]], MetaModel],
    grid: tuple[int, int],
    multiple: int,
    branches: int,
    device: torch.device,
    speed: float,
) -> NetworkTimings:
    """Time a forward and an inner step, at these latents or, where it would take long, at smaller ones.

    `model_at` makes the network on meta for a grid (height, width), both sides multiples of `multiple`;
    `speed` are the operations a second that are expected.
    """
    while True:
        model = model_at(grid)
        with FusedAttention(), model.tuning(branches) as (forward, inner_step):
            counted = flops(forward), flops(inner_step)
        height, width = (max(multiple, side // 2 // multiple * multiple) for side in grid)
        if sum(counted) <= LONGEST * speed or (height, width) == grid:
            break
        grid = height, width
    model.materialize(device)
    with model.tuning(branches) as (forward, inner_step):
        return NetworkTimings(
            grid, Timings(_seconds(forward), counted[0]), Timings(_seconds(inner_step), counted[1])
        )


def _seconds(work: Callable[[], Tensor]) -> list[float]:
    """Of each time, for a second in all, after a first one, which is slower."""
    float(work().flatten()[0])  # waits for the device
    found, began = list[float](), time.perf_counter()
    while not found or time.perf_counter() - began < ENOUGH:
        begins = time.perf_counter()
        float(work().flatten()[0])
        found.append(time.perf_counter() - begins)
    return found
