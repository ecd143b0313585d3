"""What an edit costs beside plain sampling: seconds, and memory at its peak."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kvinv_pl.algorithm.editing import branches_at, guided
from kvinv_pl.bench.running import Encoded


@dataclass
class Cost:
    """Of what ran inside `measure_cost`."""

    seconds: float = 0.0
    peak: float | None = None
    """Bytes: of the GPU, or elsewhere of the process; None where the system does not tell."""

    def relative_to(self, plain: Cost) -> dict[str, float]:
        """The figures of a bench: how many times the seconds, and how many MiB more."""
        metrics = {"time x": self.seconds / max(plain.seconds, 1e-9)}
        if self.peak is not None and plain.peak is not None:
            metrics["memory +MiB"] = (self.peak - plain.peak) / 2**20
        return metrics


@contextmanager
def measure_cost(device: torch.device) -> Iterator[Cost]:
    """Seconds and peak memory of what runs inside; they are there when it is over."""
    cost = Cost()
    resets = _reset_peak(device)
    began = time.perf_counter()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - began
        cost.peak = _peak(device) if resets else None


def _reset_peak(device: torch.device) -> bool:
    """Let the peak begin anew, if it can be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return float(found[0]) * 1024 if found else None


@torch.no_grad()
def plain_sampling(encoded: Encoded, target: str, guidance: float) -> Cost:
    """The cost of a picture of this size, sampled from noise by its prompt alone."""
    scene = encoded.scene("", target, guidance)
    contexts = scene.contexts[[0, 2], None][-branches_at(guidance) :]
    z = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(0)).to(scene.z_0)
    scene.model.predict(z, scene.table.timesteps[:1].to(z.device), contexts)  # the first one is slow
    with measure_cost(z.device) as cost:
        for i in range(len(scene.table)):
            out = scene.model.predict(z, scene.table.timesteps[i : i + 1].to(z.device), contexts)
            z = scene.table.forward(z, guided(out, (guidance,)), i)
        encoded.decode(z)
    return cost
