"""How the ranks of one machine end: by themselves, by Ctrl-C, by SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

PATIENCE = 10.0
"""Seconds that a rank has to end after it was asked to."""
TERMINATED = 128 + signal.SIGTERM
"""The exit code of a command that was asked to end, as shells say it."""


def stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
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
