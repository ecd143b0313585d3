"""How many pictures fit into memory side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvinv_pl.models.denoiser import Denoiser

MOST = 8
"""Side by side at most: pictures that have converged are computed along until the last one has."""
SHARE = 0.7
"""Of what is free; the rest is for what a forward needs for a moment and for other programs."""
COPIES = 6
"""Of psi for each slot: itself, its gradient, Adam's two moments, what stopped, and K-bar, V-bar."""


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if (table := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        # the system does not tell how much is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30


def bytes_per_slot(denoiser: Denoiser, grid: tuple[int, int], w: float) -> int:
    """Memory for tuning one picture of this latent size: saved activations, and psi with its copies."""
    denoiser.place(grid, 1)
    backbone, device = denoiser.backbone, denoiser.device
    z = torch.zeros(1, backbone.latent_channels, *grid, device=device)
    t = denoiser.table.timesteps[:1].to(device)
    contexts = backbone.embed(["", ""])[:, None]
    with denoiser.attached().blend():
        saved = _saved_bytes(
            lambda: denoiser.guided_prediction(contexts, w)(z, t),
            {p.data_ptr() for p in denoiser.parameters()},
        )
    return saved + COPIES * sum(p.numel() * p.element_size() for p in denoiser.psi.parameters())


def _saved_bytes(run: Callable[[], Tensor], known: set[int]) -> int:
    """The bytes that autograd saves in a forward, each storage counted once; those in `known` are not."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()  # kept alive, so that no storage is reused
    return sum(found.values()) + out.nbytes


def side_by_side(denoiser: Denoiser, grid: tuple[int, int], w: float, pictures: int) -> tuple[int, str]:
    """How many of so many pictures to tune side by side, and the reason."""
    if pictures == 1:
        return 1, "one picture"
    each, free = bytes_per_slot(denoiser, grid, w), free_bytes(denoiser.device)
    fitting = int(free * SHARE // max(1, each))
    chosen = max(1, min(pictures, fitting, MOST))
    return chosen, f"each takes about {_size(each)}, {_size(free)} are free"


def _size(count: float) -> str:
    """Bytes for display."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
