"""What the loggers are told of a picture's tuning: figures of every phase, predicted x_0, memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def log_phase(loggers: Sequence[Any], name: str, i: int, figures: Mapping[str, float], device: Any) -> None:
    """Write the figures of phase i (from noise), and the memory taken so far, under the picture's name."""
    if loggers:
        told = {f"{name}/{key}": value for key, value in figures.items()}
        told |= {f"{name}/peak_memory_gib": peak_memory(torch.device(device)) / 2**30}
        for logger in loggers:
            logger.log_metrics(told, step=i)


def log_result(loggers: Sequence[Any], name: str, record: Mapping[str, Any]) -> None:
    """Write what the reconstruction is worth, in dB, attempt by attempt."""
    told = {f"{name}/{key}": value for key, value in record.items() if key.startswith("psnr_")}
    for logger in loggers:
        logger.log_metrics(told, step=len(record["attempts"]) - 1)


def log_picture(loggers: Sequence[Any], name: str, i: int, pixels: Float[Tensor, "3 h w"]) -> None:
    """Write a picture (pixels in -1 .. 1) with those loggers that take pictures."""
    for logger in loggers:
        if callable(show := getattr(getattr(logger, "experiment", None), "add_image", None)):
            show(name, ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), i)


def peak_memory(device: torch.device) -> int:
    """The most that was taken so far, in bytes: of the GPU's memory, or elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
