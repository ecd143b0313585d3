"""The ranks of this machine: how they are started, waited for and stopped, and what each works on."""

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kvinv_pl.data.failures import is_out_of_memory, reason
from kvinv_pl.errors import StopError, UserError
from kvinv_pl.training.devices.launcher import TERMINATED, StopRequest, exiting_on_sigterm, stop
from kvinv_pl.training.devices.work_queue import Shares, WorkQueue
from kvinv_pl.training.devices.world import World, share_cores, threads_of

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


class Ranks:
    """This rank, and the others of its machine, which share nothing but the run folders and a work queue."""

    calls: ClassVar[int] = 0
    """How often a trainer of this process has been called."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.command = [sys.executable, *sys.orig_argv[1:]]
        self.reported: dict[str, str] = {}
        self._queue = WorkQueue(os.environ[QUEUE]) if QUEUE in os.environ else None
        self._started: list[subprocess.Popen[bytes]] = []
        self._last_check = 0.0
        self._stop_request = StopRequest()

    @property
    def was_started(self) -> bool:
        """Whether another rank started this one and gets its report."""
        return STARTER in os.environ

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that reports for all."""
        return self.world.rank == 0

    @property
    def is_one_of_many(self) -> bool:
        """Whether torchrun, SLURM or the user has started the ranks, none of which reports for all."""
        external = self.world.external and not self.was_started
        return self.world.size > 1 and (external or self.world.nodes > 1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start further ranks of this machine; at the end wait for them, or stop them all."""
        if self.was_started:
            with exiting_on_sigterm(), self._reporting_errors():
                share_cores(self.world, self.device)
                yield
            return
        starts = self.world.local_size > 1 and not self.world.external
        temporary = tempfile.TemporaryDirectory(prefix="kvinv-ranks-") if starts else nullcontext("")
        self._stop_request = StopRequest()
        with self._stop_request.handling(), temporary as folder:
            try:
                if starts:
                    self._queue = WorkQueue(folder)
                    self._start(folder)
                share_cores(self.world, self.device)
                yield
                self._wait(lambda: all(rank.poll() is not None for rank in self._started))
                if self._started and self._queue is not None:
                    self.reported = self._queue.failures()
            finally:
                stop(self._started)
                self._started, self._queue = [], None

    @contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        """Report errors to the rank that started this one, which shows them."""
        try:
            yield
        except (UserError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, UserError) or is_out_of_memory(error)):
                raise
            assert self._queue is not None
            try:
                self._queue.report_error(self.world.local_rank, reason(error), traceback.format_exc())
            except UserError:  # the work queue is gone, or the disk is full
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
        Ranks.calls += 1
        return not self.was_started or int(os.environ.get(CALL, self.calls)) == self.calls

    def wait_for_shares(self) -> Shares:
        """Wait for the shares of the work, from the rank that started this one."""
        queue = self._queue
        assert queue is not None
        self._wait(lambda: queue.shares() is not None)
        return queue.shares() or []

    def publish_shares(self, shares: Shares) -> None:
        """Send the shares to the ranks that this one has started; stop those without a share."""
        if self._queue is not None:
            self._queue.publish(shares)
            needed = max(0, len(self._of_node(len(shares))) - 1)
            stop(self._started[needed:])
            self._started = self._started[:needed]

    def claim_shares(self, shares: int) -> Iterator[int]:
        """Claim shares of the work, one after the other."""
        world, queue = self.world, self._queue
        of_rank = self._of_node(shares) if queue else range(world.rank, shares, world.size)
        for n, share in enumerate(of_rank):
            self.check_ranks()
            if queue is not None:
                # the first share of every rank is its own: it may still be starting
                claimed = n == world.local_rank if n < world.local_size else queue.claim(share)
                if not claimed:
                    continue
            yield share

    def report(self, reasons: Mapping[str, str]) -> None:
        """Report failed pictures to the rank that started this one."""
        if self._queue is not None:
            self._queue.report(self.world.local_rank, reasons)

    def _of_node(self, shares: int) -> range:
        return range(self.world.node, shares, self.world.nodes)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; raise if another rank fails."""
        while not condition():
            self.check_ranks()
            time.sleep(PAUSE)
        self.check_ranks()

    def check_ranks(self) -> None:
        """Raise if another rank has failed, the starter is gone, or a signal came."""
        self._stop_request.check()
        for n, rank in enumerate(self._started, 1):
            if self._has_failed(n, rank):
                message, trace = (self._queue.error(n) if self._queue else None) or ("", "")
                code = rank.poll() or 0
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                raise RankFailedError(
                    f"{message}; all ranks have been stopped"
                    if message
                    else f"another rank has failed: process {n + 1} of {self.world.local_size} "
                    f"ended {how}, and all have been stopped; run the same command to resume"
                ) from (RuntimeError(f"in that rank:\n{trace}") if trace else None)
        # of a virtual environment on Windows, the parent is the launcher that python.exe is there
        starter = None if sys.platform == "win32" else os.environ.get(STARTER)
        if starter is not None and os.getppid() != int(starter):
            if self._queue is not None:
                self._queue.remove()  # nothing else will
            raise RankFailedError("the process that started this rank is gone")

    def _has_failed(self, local_rank: int, rank: subprocess.Popen[bytes]) -> bool:
        """Whether a rank has exited without reporting that it has finished, be it with exit code 0."""
        return rank.poll() is not None and not (
            rank.poll() == 0 and self._queue is not None and self._queue.has_reported(local_rank)
        )

    def check_periodically(self) -> None:
        """Check signals, and the other ranks a few times a second."""
        self._stop_request.check()
        if self._last_check + 0.2 < (now := time.monotonic()):
            self._last_check = now
            self.check_ranks()

    def _start(self, queue: str) -> None:
        """Start the other ranks of this machine, by the same command."""
        variables = {STARTER: str(os.getpid()), QUEUE: queue, CALL: str(self.calls)}
        variables |= {"NODE_RANK": str(self.world.node)}
        if threads := threads_of(self.world, self.device):
            variables["OMP_NUM_THREADS"] = str(threads)
        # a rank that is still starting is not in the list, and would not be stopped
        with self.between_steps():
            for local_rank in range(1, self.world.local_size):
                env = {**variables, "LOCAL_RANK": str(local_rank)}
                # in its own session: Ctrl-C reaches this process, which stops the others
                rank = subprocess.Popen(self.command, env={**os.environ, **env}, start_new_session=True)
                self._started.append(rank)
