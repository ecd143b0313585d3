"""Times of alternatives, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds that the rounds took."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Half of the rounds were quicker."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """From the first quartile to the third; of one round there is none."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low

    def __str__(self) -> str:
        """The median and the spread, in milliseconds."""
        return f"{1e3 * self.median:.1f} ms (spread {1e3 * self.spread:.1f})"


def in_turn(alternatives: Mapping[str, Work], rounds: int) -> dict[str, Times]:
    """Each alternative once a round, in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for n in range(rounds + 1):
        for name, work in alternatives.items():
            began = _now()
            work()
            if n:
                seconds[name].append(_now() - began)
    return {name: Times(taken) for name, taken in seconds.items()}


def ratio(a: Times, b: Times) -> float:
    """The median over the rounds of a's time over b's, which a change of the machine's load leaves alone."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
