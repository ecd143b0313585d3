"""How many pictures fit into memory side by side."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from kvinv_pl.algorithm.editing import branches_at
from kvinv_pl.attention.sites import Site
from kvinv_pl.models.costs.limits import memory_left
from kvinv_pl.models.denoiser import Denoiser

MEMINFO = Path("/proc/meminfo")
MOST = 8
"""Side by side at most: pictures that have converged are computed along until the last one has."""
SHARE = 0.7
"""Of what is free; the rest is for what a forward needs for a moment and for other programs."""
COPIES = 5
"""Of psi for each slot: itself, its gradient, Adam's two moments, and what stopped."""


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device; on a CPU, within the limits of a container or job."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    left = memory_left()
    return _free_in_machine() if left is None else min(left, _free_in_machine())


def _free_in_machine() -> int:
    table = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    if available := dict(line.split(":", 1) for line in table).get("MemAvailable"):  # not of every kernel
        return int(available.split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        # the system does not tell how much is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30


def bytes_per_slot(
    denoiser: Denoiser, grid: tuple[int, int], w: float, keeps_bars: bool = True, prompts: Iterable[str] = ()
) -> int:
    """Memory for tuning one picture of this latent size: saved activations, psi with its copies, and bars.

    `w` is the guidance of tuning; `keeps_bars`, whether a phase ends with K-bar and V-bar of every site; the
    prompts are of all pictures side by side, which read as many chunks as the longest.
    """
    denoiser.place(grid, 1)
    backbone, device = denoiser.backbone, denoiser.device
    z = torch.zeros(1, backbone.latent_channels, *grid, device=device)
    t = denoiser.table.timesteps[:1].to(device)
    chunks = backbone.prompts.length_of(["", *prompts]) // backbone.prompts.length
    contexts = backbone.embed(["", ""])[:, None].repeat(1, 1, chunks, 1)
    with denoiser.attached().blend():
        saved = saved_bytes(lambda: denoiser.guided_prediction(contexts, w)(z, t), denoiser.parameters())
    bars = bytes_of_bars([cp.site for cp in denoiser.cps], branches_at(w), backbone.unet.dtype)
    return saved + COPIES * sum(p.nbytes for p in denoiser.psi.parameters()) + (bars if keeps_bars else 0)


def bytes_of_bars(sites: Iterable[Site], branches: int, dtype: torch.dtype) -> int:
    """K-bar and V-bar of one slot, as the network has them."""
    return sum(2 * branches * site.tokens * site.dim for site in sites) * dtype.itemsize


def saved_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """The bytes that autograd saves in a forward, each storage counted once; those of `known` are not.

    Storages are told apart by themselves and not by where they lie, so that tensors on meta can be counted.
    """
    ours, found = {tensor.untyped_storage()._cdata for tensor in known}, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()  # kept alive, so that no storage is reused
    return sum(found.values()) + out.nbytes


def side_by_side(
    denoiser: Denoiser,
    grid: tuple[int, int],
    w: float,
    pictures: int,
    keeps_bars: bool = True,
    prompts: Iterable[str] = (),
) -> tuple[int, str]:
    """How many of so many pictures to tune side by side, and the reason; see `bytes_per_slot`."""
    if pictures == 1:
        return 1, "one picture"
    each, free = bytes_per_slot(denoiser, grid, w, keeps_bars, prompts), free_bytes(denoiser.device)
    return fitting(each, free, pictures), f"each takes about {in_units(each)}, {in_units(free)} are free"


def fitting(each: int, free: int, pictures: int) -> int:
    """How many of so many pictures fit into free memory, of which each takes so much."""
    return max(1, min(pictures, int(free * SHARE // max(1, each)), MOST))


def in_units(count: float) -> str:
    """Bytes for display."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
