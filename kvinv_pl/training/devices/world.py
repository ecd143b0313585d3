"""Which rank this process is, of how many, and its share of the cores."""

import os
from dataclasses import dataclass

import torch

from kvinv_pl.models.costs.limits import cores


@dataclass(frozen=True)
class World:
    """Which rank this is, of how many."""

    local_rank: int
    """On this machine."""
    local_size: int
    """How many there are on each machine."""
    node: int
    nodes: int
    external: bool
    """Whether torchrun or SLURM starts all ranks."""

    @property
    def size(self) -> int:
        """How many ranks there are on all machines."""
        return self.local_size * self.nodes

    @property
    def rank(self) -> int:
        """The number of this one among them; 0 is the main rank, which reports for all."""
        return self.node * self.local_size + self.local_rank


def share_cores(world: World, device: torch.device) -> None:
    """Limit torch to this rank's share of the cores."""
    if threads := threads_of(world, device):
        torch.set_num_threads(threads)


def threads_of(world: World, device: torch.device) -> int | None:
    """Cores for each rank; None: set by the user, or a GPU, or a single rank that torch gives no more."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return None
    allowed = cores()
    if world.local_size == 1:  # torch does not see how much of their time a container has
        return allowed if allowed < torch.get_num_threads() else None
    return max(1, allowed // world.local_size)
