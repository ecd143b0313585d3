"""Stopping ranks, and handling Ctrl-C and SIGTERM."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from kvinv_pl.errors import UserError

PATIENCE = 10.0
"""Seconds that a rank has to exit after SIGTERM, before it is killed."""
TERMINATED = 128 + signal.SIGTERM
"""The exit code after SIGTERM, by the convention of shells."""
STOPPING = "stopping after this step; again to stop at once"
"""What is said to a first signal that waits."""


def stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the ranks that still run: by SIGTERM, then SIGKILL."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.terminate()
    deadline = time.monotonic() + PATIENCE
    for rank in running:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


class StopRequest:
    """Ctrl-C or SIGTERM, handled at once or at the next `check`.

    Left to itself, Lightning waits for the end of all of sampling.
    """

    def __init__(self) -> None:
        self.deferred = False
        """Whether the first signal waits for `check`; a second one does not."""
        self._signal: int | None = None

    def check(self) -> None:
        """Raise KeyboardInterrupt or SystemExit after a signal; again, if a finaliser swallowed it."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal == signal.SIGTERM:
            raise SystemExit(TERMINATED)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        first, self._signal = self._signal is None, signum
        if self.deferred and first:
            cleared = "\r\x1b[2K" if os.isatty(2) else ""  # the line of progress
            # sys.stderr may be in the middle of a write, which it would refuse to have interrupted by its own
            with suppress(OSError):
                os.write(2, f"{cleared}{STOPPING}\n".encode())
        else:
            self.check()

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Install the handler where the default ones are set; only the main thread can."""
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        main = threading.current_thread() is threading.main_thread()
        ours = {number: old for number, old in defaults.items() if main and signal.getsignal(number) is old}
        for number in ours:
            signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, old in ours.items():
                signal.signal(number, old)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Exit on SIGTERM without clean-up, as on SIGKILL: files are written atomically."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def slurm_in_one_line() -> Iterator[None]:
    """Lightning's refusal of SLURM's --ntasks, as a user's mistake."""
    try:
        yield
    except RuntimeError as error:
        if "--ntasks" not in str(error):
            raise
        tasks = os.environ.get("SLURM_NTASKS")
        raise UserError(
            f"SLURM: expected --ntasks-per-node, got --ntasks={tasks}, which does not say how many run on "
            "each node: give --ntasks-per-node=N, and --trainer.devices N"
        ) from error
