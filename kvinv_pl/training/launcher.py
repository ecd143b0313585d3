"""How the ranks of one machine begin, by a fork where that is safe, else by the command, and how they end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
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
UNTIMELY = frozenset({signal.SIGINT, signal.SIGTERM})
"""Signals that wait while this process is copied."""


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
    """A copy of this process, which does what it is told and ends; nothing of its callers' is run in it.

    It does not hear Ctrl-C, and ends at once when it is asked to. To be made while `undisturbed`.
    """

    def __init__(self, env: Mapping[str, str], then: Callable[[], None]) -> None:
        """Fork, set variables of the environment, and call `then`."""

        def begin() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _end_at_once)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, UNTIMELY)
            os.environ.update(env)
            then()

        self._process = multiprocessing.get_context("fork").Process(target=begin)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs."""
        code = self._process.exitcode
        if code is None and multiprocessing.connection.wait([self._process.sentinel], 0):
            self._process.join()
            code = self._process.exitcode
            return 0 if code is None else code  # where SIGCHLD is ignored, nobody is told how it ended
        return code

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
    """Whether a copy of this process would be whole: it has one thread, which Linux alone can tell.

    Other threads do not go with a copy, and what they hold is never given back there: OpenMP, for one, waits
    for its threads for ever. So it must be asked before anything is computed.
    """
    tasks = Path("/proc/self/task")
    alone = tasks.is_dir() and len(os.listdir(tasks)) == 1
    return alone and not multiprocessing.current_process().daemon  # which may not have children


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


class Request:
    """What Ctrl-C or SIGTERM has asked of this process, which heeds it at once, or where it is told to.

    So that it leaves nothing behind; left to itself, Lightning waits for the end of all of sampling.
    """

    def __init__(self) -> None:
        """Nothing was asked."""
        self.waits = False
        """Whether a first signal waits for `heed`; a second one does not."""
        self._signal: int | None = None

    def heed(self) -> None:
        """Raise KeyboardInterrupt or SystemExit, if that was asked; what a finaliser had swallowed, again."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal == signal.SIGTERM:
            raise SystemExit(TERMINATED)

    def hear(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal."""
        first, self._signal = self._signal is None, signum
        if not (self.waits and first):
            self.heed()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear the signals, unless somebody else does; only the main thread can say so."""
        own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        main = threading.current_thread() is threading.main_thread()
        free = {number: old for number, old in own.items() if main and signal.getsignal(number) is old}
        for number in free:
            signal.signal(number, self.hear)
        try:
            yield
        finally:
            for number, old in free.items():
                signal.signal(number, old)


@contextmanager
def ending_at_once_when_asked() -> Iterator[None]:
    """SIGTERM ends this process as SIGKILL does, whatever it is at: what it writes is made for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    os._exit(TERMINATED)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what they raise amid a fork is lost, or the copy is, of which nobody knows."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, UNTIMELY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
