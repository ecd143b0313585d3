"""Many devices: a process for each, which tunes pictures of its own, and nothing is averaged."""

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
    Request,
    ending_at_once_when_asked,
    stop,
)
from kvinv_pl.training.work_queue import Shares, WorkQueue

STARTER = "KVINV_STARTED_BY"
"""Set in a rank that this program started: the process that did."""
BOARD = "KVINV_BOARD"
"""Set beside it: the folder where the ranks of one machine say what they have taken, and what failed."""
CALL = "KVINV_CALL"
"""And which call of a trainer, of those that the process has made, the rank was started for."""
PAUSE = 0.05
"""Seconds between two looks at what other ranks do."""


class RankFailedError(StopError):
    """Another rank of the same command has ended with an error."""


class ImageParallelStrategy(SingleDeviceStrategy):
    """One process for each device, without a process group: ranks share nothing but the run folders.

    A picture's psi belongs to that picture alone, so there is nothing to reduce. Ranks are those of torchrun
    or SLURM where one of these is at work, and then every rank has its share of the pictures from the start.
    Otherwise they are started here, one for each further device, and a rank that is free takes the next
    pictures. When one rank fails, all stop.
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
        self._board = WorkQueue(os.environ[BOARD]) if BOARD in os.environ else None
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._looked = 0.0
        self._request = Request()

    def set_world_ranks(self) -> None:
        """Take rank and device from the environment, as Lightning reads it."""
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
        """Whether this is the rank that speaks for all."""
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
        """Whether this is a rank that another one started, and reports to."""
        return STARTER in os.environ

    @property
    def is_one_of_many(self) -> bool:
        """Whether torchrun, SLURM or the person has started the ranks, none of which speaks for all."""
        env = self.cluster_environment
        external = env is not None and env.creates_processes_externally and not self.was_started
        return self.world_size > 1 and (external or self.num_nodes > 1)

    @contextmanager
    def ranks(self) -> Iterator[None]:
        """Start further ranks of this machine; at the end wait for them, or stop them all."""
        if self.was_started:
            with ending_at_once_when_asked(), self._telling():
                self._share_cores()
                yield
            return
        env, here = self.cluster_environment, len(self.parallel_devices)
        external = env is None or env.creates_processes_externally
        starts = here > 1 and not external
        temporary = tempfile.TemporaryDirectory(prefix="kvinv-ranks-") if starts else nullcontext("")
        self._request = Request()
        with self._request.heard(), temporary as folder:
            try:
                if starts:
                    self._board = WorkQueue(folder)
                    self._start(folder)
                self._share_cores()
                yield
                self._wait(lambda: all(rank.poll() is not None for rank in self._ranks))
                if self._ranks and self._board is not None:
                    self.reported = self._board.reported()
            finally:
                stop(self._ranks)
                self._ranks, self._board = [], None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What is wrong is said by the rank that started this one."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError, MemoryError) as error:
            assert self._board is not None
            try:
                self._board.fail(self.local_rank, reason(error), traceback.format_exc())
            except OSError:  # there is no board any more, or no room
                sys.stderr.write(f"kvinv: error: {reason(error)}\n")
            raise SystemExit(UserError.exit_code) from None

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of an inner step: a log cut short hangs when it is closed."""
        self._request.waits = True
        try:
            yield
        except SIGTERMException:  # Lightning has it in mind, too
            raise SystemExit(TERMINATED) from None
        finally:
            self._request.waits = False
        self._request.heed()

    def is_called(self) -> bool:
        """Count a call of the trainer; whether it is for this rank, which may be there for a later one."""
        ImageParallelStrategy.calls += 1
        return not self.was_started or int(os.environ.get(CALL, self.calls)) == self.calls

    def given_shares(self) -> Shares:
        """The shares of the work, as the rank that started this one makes them."""
        assert self._board is not None
        self._wait(lambda: self._shares_given() is not None)
        return self._shares_given() or []

    def give(self, shares: Shares) -> None:
        """Tell the ranks that this one has started what there is to do; stop those that have no share."""
        if self._board is not None:
            self._board.give(shares)
            needed = max(0, len(self._of_node(len(shares))) - 1)
            stop(self._ranks[needed:])
            self._ranks = self._ranks[:needed]

    def mine(self, shares: int) -> Iterator[int]:
        """The shares of the work that are this rank's, one after the other; each is one rank's alone."""
        here, board = len(self.parallel_devices), self._board
        of_rank = self._of_node(shares) if board else range(self.global_rank, shares, self.world_size)
        for n, share in enumerate(of_rank):
            self.look()
            if board is not None:
                # the first ones are kept for ranks that are still starting
                own = n == self.local_rank if n < here else board.take(share)
                if not own:
                    continue
            yield share

    def report(self, reasons: Mapping[str, str]) -> None:
        """Tell the rank that started this one which pictures have failed."""
        if self._board is not None:
            self._board.report(self.local_rank, reasons)

    def _of_node(self, shares: int) -> range:
        """The shares of this machine."""
        return range(self.global_rank // len(self.parallel_devices), shares, self.num_nodes)

    def _shares_given(self) -> Shares | None:
        return self._board.shares() if self._board else None

    def _wait(self, over: Callable[[], bool]) -> None:
        """Wait until this is so, or another rank has failed."""
        while not over():
            self.look()
            time.sleep(PAUSE)
        self.look()

    def look(self) -> None:
        """Raise where another rank has failed, its starter is gone, or this one was asked to end."""
        self._request.heed()
        for n, rank in enumerate(self._ranks, 1):
            if self._has_failed(n, rank):
                why, where = (self._board.failed(n) if self._board else None) or ("", "")
                code = rank.poll() or 0
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                raise RankFailedError(
                    f"{why}; with that all ranks have stopped"
                    if why
                    else f"another rank has failed: process {n + 1} of {len(self.parallel_devices)} has "
                    f"ended {how}, and all have stopped; the same command goes on"
                ) from (RuntimeError(f"in that rank:\n{where}") if where else None)
        starter = os.environ.get(STARTER)
        if starter is not None and os.getppid() != int(starter):
            if self._board is not None:
                self._board.remove()  # nobody else will
            raise RankFailedError("the process that started this rank is gone")

    def _has_failed(self, local_rank: int, rank: subprocess.Popen[bytes]) -> bool:
        """Whether a rank has ended otherwise than by having nothing more to do, for which 0 is not enough."""
        return rank.poll() is not None and not (
            rank.poll() == 0 and self._board is not None and self._board.has_reported(local_rank)
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look around, a few times in a second at most."""
        self._request.heed()
        if self._looked + 0.2 < (now := time.monotonic()):
            self._looked = now
            self.look()

    def _start(self, board: str) -> None:
        """Start the other ranks of this machine, by the same command."""
        node = self.cluster_environment.node_rank() if self.cluster_environment else 0
        told = {"NODE_RANK": str(node), STARTER: str(os.getpid()), BOARD: board, CALL: str(self.calls)}
        if threads := self._threads():
            told["OMP_NUM_THREADS"] = str(threads)
        with self.between_steps():  # a rank that is being started is not known yet, and nobody would stop it
            for local_rank in range(1, len(self.parallel_devices)):
                env = {**told, "LOCAL_RANK": str(local_rank)}
                # in a session of its own: Ctrl-C is for this process, which stops the others
                rank = subprocess.Popen(self.command, env={**os.environ, **env}, start_new_session=True)
                self._ranks.append(rank)

    def _share_cores(self) -> None:
        """Take this rank's part of the cores."""
        if threads := self._threads():
            torch.set_num_threads(threads)

    def _threads(self) -> int | None:
        """How many cores there are for each rank; None: somebody has said how many, or it does not matter."""
        here = len(self.parallel_devices)
        if here == 1 or self.root_device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // here)
