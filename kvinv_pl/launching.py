"""How the ranks of one machine begin, by a fork where that is safe, else by the command, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

PATIENCE = 10.0
"""Seconds that a rank has to end after it was asked to."""

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a command that was asked to end, as shells say it."""


class Rank(Protocol):
    """A process that this one has started: what `subprocess.Popen` has of it."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has one; raises subprocess.TimeoutExpired after so many seconds."""
        ...


class Forked:
    """A copy of this process, which does what it is told and ends; nothing of its callers' is run in it."""

    def __init__(self, env: Mapping[str, str], then: Callable[[], None]) -> None:
        """Fork, set variables of the environment, and call `then`."""

        def begin() -> None:
            os.environ.update(env)
            then()

        self._process = multiprocessing.get_context("fork").Process(target=begin)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has one; raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return code


def can_fork() -> bool:
    """Whether a copy of this process would be whole: it has one thread, as far as Linux can tell.

    Other threads do not go with a copy, and what they hold is never given back there: OpenMP, for one, waits
    for its threads for ever. So it must be asked before anything is computed.
    """
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(os.listdir(tasks)) == 1


def stop(ranks: Sequence[Rank]) -> None:
    """End what still runs, first by asking."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.terminate()
    ends = time.monotonic() + PATIENCE
    for rank in running:
        try:
            rank.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


@contextmanager
def ending_when_asked(code: int) -> Iterator[None]:
    """SIGTERM raises SystemExit with this code, unless whoever calls this has a use for it.

    So that it ends at once and leaves nothing behind, as Ctrl-C does, where Lightning waits for the end of
    an inner step, or of all of sampling. Only the main thread can say so.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # nothing is to come between what is cleared up
        raise SystemExit(code)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
