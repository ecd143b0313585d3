"""Several devices: one process each, which tunes its own pictures; nothing is averaged."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kvinv_pl.data.failures import reason
from kvinv_pl.errors import StopError, UserError
from kvinv_pl.training.launcher import (
    TERMINATED,
    StopRequest,
    exiting_on_sigterm,
    stop,
)
from kvinv_pl.training.work_queue import Shares, WorkQueue

STARTER = "KVINV_STARTED_BY"
"""Environment variable of a rank that this program started: the process id of its starter."""
QUEUE = "KVINV_WORK_QUEUE"
"""Environment variable: the folder of the work queue."""
CALL = "KVINV_CALL"
"""Environment variable: which call of a trainer in the program the rank was started for."""
PAUSE = 0.05
"""Seconds between two checks of the other ranks."""


class RankFailedError(StopError):
    """Another rank of the same command has failed."""


class ImageParallelStrategy(SingleDeviceStrategy):
    """One process for each device, without a process group: ranks share nothing but the run folders.

    A picture's psi belongs to that picture alone, so there is nothing to reduce. Under torchrun or
    SLURM, the ranks are theirs, and each has a fixed share of the pictures. Otherwise they are started here,
    one for each further device, and a free rank takes the next pictures. When one rank fails, all stop.
    """

    strategy_name = "image_parallel"
    calls: ClassVar[int] = 0
    """How often a trainer of this process has been called."""

    def __init__(self) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] = []
        self.cluster_environment: ClusterEnvironment | None = None
        self.num_nodes = 1
        self.command = [sys.executable, *sys.orig_argv[1:]]
        self.reported: dict[str, str] = {}
        self._queue = WorkQueue(os.environ[QUEUE]) if QUEUE in os.environ else None
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._last_check = 0.0
        self._stop_request = StopRequest()

    def set_world_ranks(self) -> None:
        """Set rank and device from the cluster environment."""
        env = self.cluster_environment
        if isinstance(env, LightningEnvironment) and self.num_nodes > 1:
            if not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
                raise UserError(
                    f"num_nodes: got {self.num_nodes}, but nothing says which of them this is: start the "
                    "command by torchrun or srun, or set NODE_RANK on each machine"
                )
            if env.node_rank() >= self.num_nodes:
                raise UserError(f"NODE_RANK: expected 0 to {self.num_nodes - 1}, got {env.node_rank()}")
        if env is not None:
            self.local_rank, here = env.local_rank(), len(self.parallel_devices)
            self.world_size = here * self.num_nodes
            self.global_rank = env.node_rank() * here + self.local_rank
            env.set_world_size(self.world_size)
            env.set_global_rank(self.global_rank)
        if not self.local_rank < len(self.parallel_devices):
            raise UserError(
                f"devices: this is process {self.local_rank + 1} on its machine, but there are "
                f"{len(self.parallel_devices)} devices: ask for as many as there are processes"
            )
        self._root_device = self.parallel_devices[self.local_rank]
        # every rank logs the pictures that it works on
        rank_zero_only.rank = 0  # pyright: ignore[reportFunctionMemberAccess]

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main rank, which reports for all."""
        return self.global_rank == 0

    def teardown(self) -> None:
        """Leave the model on its device: the next pictures need it there."""
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ---- the ranks of this machine

    @property
    def was_started(self) -> bool:
        """Whether another rank started this one and gets its report."""
        return STARTER in os.environ

    @property
    def is_one_of_many(self) -> bool:
        """Whether torchrun, SLURM or the user has started the ranks, none of which reports for all."""
        env = self.cluster_environment
        external = env is not None and env.creates_processes_externally and not self.was_started
        return self.world_size > 1 and (external or self.num_nodes > 1)

    @contextmanager
    def ranks(self) -> Iterator[None]:
        """Start further ranks of this machine; at the end wait for them, or stop them all."""
        if self.was_started:
            with exiting_on_sigterm(), self._reporting_errors():
                self._share_cores()
                yield
            return
        env, here = self.cluster_environment, len(self.parallel_devices)
        launched_externally = env is None or env.creates_processes_externally
        starts = here > 1 and not launched_externally
        temporary = tempfile.TemporaryDirectory(prefix="kvinv-ranks-") if starts else nullcontext("")
        self._stop_request = StopRequest()
        with self._stop_request.handling(), temporary as folder:
            try:
                if starts:
                    self._queue = WorkQueue(folder)
                    self._start(folder)
                self._share_cores()
                yield
                self._wait(lambda: all(rank.poll() is not None for rank in self._ranks))
                if self._ranks and self._queue is not None:
                    self.reported = self._queue.failures()
            finally:
                stop(self._ranks)
                self._ranks, self._queue = [], None

    @contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        """Report errors to the rank that started this one, which shows them."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError, MemoryError) as error:
            assert self._queue is not None
            try:
                self._queue.report_error(self.local_rank, reason(error), traceback.format_exc())
            except OSError:  # the work queue is gone, or the disk is full
                sys.stderr.write(f"kvinv: error: {reason(error)}\n")
            raise SystemExit(UserError.exit_code) from None

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of an inner step: a log cut short hangs when it is closed."""
        self._stop_request.deferred = True
        try:
            yield
        except SIGTERMException:  # Lightning's own handler
            raise SystemExit(TERMINATED) from None
        finally:
            self._stop_request.deferred = False
        self._stop_request.check()

    def is_called(self) -> bool:
        """Count a call of the trainer; whether this rank was started for it."""
        ImageParallelStrategy.calls += 1
        return not self.was_started or int(os.environ.get(CALL, self.calls)) == self.calls

    def wait_for_shares(self) -> Shares:
        """Wait for the shares of the work, from the rank that started this one."""
        assert self._queue is not None
        self._wait(lambda: self._published_shares() is not None)
        return self._published_shares() or []

    def publish_shares(self, shares: Shares) -> None:
        """Send the shares to the ranks that this one has started; stop those without a share."""
        if self._queue is not None:
            self._queue.publish(shares)
            needed = max(0, len(self._of_node(len(shares))) - 1)
            stop(self._ranks[needed:])
            self._ranks = self._ranks[:needed]

    def mine(self, shares: int) -> Iterator[int]:
        """Claim shares of the work, one after the other."""
        here, queue = len(self.parallel_devices), self._queue
        of_rank = self._of_node(shares) if queue else range(self.global_rank, shares, self.world_size)
        for n, share in enumerate(of_rank):
            self.check_ranks()
            if queue is not None:
                # the first share of every rank is its own: it may still be starting
                claimed = n == self.local_rank if n < here else queue.claim(share)
                if not claimed:
                    continue
            yield share

    def report(self, reasons: Mapping[str, str]) -> None:
        """Report failed pictures to the rank that started this one."""
        if self._queue is not None:
            self._queue.report(self.local_rank, reasons)

    def _of_node(self, shares: int) -> range:
        """The shares of this machine."""
        return range(self.global_rank // len(self.parallel_devices), shares, self.num_nodes)

    def _published_shares(self) -> Shares | None:
        return self._queue.shares() if self._queue else None

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; raise if another rank fails."""
        while not condition():
            self.check_ranks()
            time.sleep(PAUSE)
        self.check_ranks()

    def check_ranks(self) -> None:
        """Raise if another rank has failed, the starter is gone, or a signal came."""
        self._stop_request.check()
        for n, rank in enumerate(self._ranks, 1):
            if self._has_failed(n, rank):
                message, trace = (self._queue.error(n) if self._queue else None) or ("", "")
                code = rank.poll() or 0
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                raise RankFailedError(
                    f"{message}; all ranks have been stopped"
                    if message
                    else f"another rank has failed: process {n + 1} of {len(self.parallel_devices)} "
                    f"ended {how}, and all have been stopped; run the same command to resume"
                ) from (RuntimeError(f"in that rank:\n{trace}") if trace else None)
        starter = os.environ.get(STARTER)
        if starter is not None and os.getppid() != int(starter):
            if self._queue is not None:
                self._queue.remove()  # nothing else will
            raise RankFailedError("the process that started this rank is gone")

    def _has_failed(self, local_rank: int, rank: subprocess.Popen[bytes]) -> bool:
        """Whether a rank has exited without reporting that it has finished, be it with exit code 0."""
        return rank.poll() is not None and not (
            rank.poll() == 0 and self._queue is not None and self._queue.has_reported(local_rank)
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check signals, and the other ranks a few times a second."""
        self._stop_request.check()
        if self._last_check + 0.2 < (now := time.monotonic()):
            self._last_check = now
            self.check_ranks()

    def _start(self, queue: str) -> None:
        """Start the other ranks of this machine, by the same command."""
        node = self.cluster_environment.node_rank() if self.cluster_environment else 0
        variables = {"NODE_RANK": str(node), STARTER: str(os.getpid()), QUEUE: queue, CALL: str(self.calls)}
        if threads := self._threads():
            variables["OMP_NUM_THREADS"] = str(threads)
        # a rank that is still starting is not in the list, and would not be stopped
        with self.between_steps():
            for local_rank in range(1, len(self.parallel_devices)):
                env = {**variables, "LOCAL_RANK": str(local_rank)}
                # in its own session: Ctrl-C reaches this process, which stops the others
                rank = subprocess.Popen(self.command, env={**os.environ, **env}, start_new_session=True)
                self._ranks.append(rank)

    def _share_cores(self) -> None:
        """Limit torch to this rank's share of the cores."""
        if threads := self._threads():
            torch.set_num_threads(threads)

    def _threads(self) -> int | None:
        """Cores for each rank; None: set by the user, or a single rank or a GPU."""
        here = len(self.parallel_devices)
        if here == 1 or self.root_device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // here)
