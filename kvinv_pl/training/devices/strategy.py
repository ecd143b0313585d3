"""Several devices, as Lightning has them: one process each, which tunes its own pictures."""

import os
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import SingleDeviceStrategy

from kvinv_pl.errors import UserError
from kvinv_pl.training.devices.ranks import Ranks
from kvinv_pl.training.devices.world import World


class ImageParallelStrategy(SingleDeviceStrategy):
    """One process for each device, without a process group: nothing is averaged.

    A picture's psi belongs to that picture alone, so there is nothing to reduce. Under torchrun or
    SLURM, the ranks are theirs, and each has a fixed share of the pictures. Otherwise they are started here,
    one for each further device, and a free rank takes the next pictures. When one rank fails, all stop.
    """

    strategy_name = "image_parallel"
    ranks: Ranks

    def __init__(self) -> None:
        super().__init__()
        # set by Lightning's Trainer
        self.parallel_devices: list[torch.device] = []
        self.cluster_environment: ClusterEnvironment | None = None
        self.num_nodes = 1

    def set_world_ranks(self) -> None:
        """Set rank and device from the cluster environment."""
        env, count = self.cluster_environment, len(self.parallel_devices)
        if isinstance(env, LightningEnvironment) and self.num_nodes > 1:
            if not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
                raise UserError(
                    f"num_nodes: got {self.num_nodes}, but this machine's rank is unknown: start the command "
                    "with torchrun or srun, or set NODE_RANK on each machine"
                )
            if env.node_rank() >= self.num_nodes:
                raise UserError(f"NODE_RANK: expected 0 to {self.num_nodes - 1}, got {env.node_rank()}")
        local_rank, node = (env.local_rank(), env.node_rank()) if env else (0, 0)
        if not local_rank < count:
            raise UserError(
                f"devices: this is process {local_rank + 1} on its machine, but there are {count} devices: "
                "ask for as many as there are processes"
            )
        external = env is None or env.creates_processes_externally
        world = World(local_rank, count, node, self.num_nodes, external)
        self.local_rank, self.global_rank, self.world_size = local_rank, world.rank, world.size
        if env is not None:
            env.set_world_size(world.size)
            env.set_global_rank(world.rank)
        self._root_device = self.parallel_devices[local_rank]
        self.ranks = Ranks(world, self._root_device)
        # every rank logs the pictures that it works on
        rank_zero_only.rank = 0  # pyright: ignore[reportFunctionMemberAccess]

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main rank, which reports for all."""
        return self.ranks.is_main

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check signals and the other ranks."""
        self.ranks.check_periodically()

    def teardown(self) -> None:
        """Leave the model on its device: the next pictures need it there."""
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()
