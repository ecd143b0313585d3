"""`kvinv ...` in a process that begins as a copy of this one: everything is imported, which takes seconds.

Its ranks begin likewise. That a program starts them by its own command is tested with a real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from commands import command

from kvinv_pl.cli.entry import main

CAN_BE_COPIED = sys.platform == "linux" and not torch.cuda.is_available()
"""Autograd's threads, of which there is one for each GPU, do not survive it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def begun(*args: object) -> Any:
    """The process of a command, as subprocess.Popen has it, with what it says on stderr in a pipe."""
    if CAN_BE_COPIED:
        return Forked(command(*args), dict(os.environ))
    return subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True, preexec_fn=_hear)


class Forked:
    """As much of subprocess.Popen as is used of these processes; stderr is a pipe, or the starter's."""

    def __init__(self, args: list[str], env: Mapping[str, str], start_new_session: bool = False) -> None:
        """Begin; `args` are those of `python -m kvinv_pl`."""
        self.returncode: int | None = None
        self._said, says = os.pipe() if not start_new_session else (-1, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of the threads that a copy lacks: none is needed
            # a signal meets the handlers of the new process, and not those that it has as a copy
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            self.pid = os.fork()
        if self.pid == 0:
            _become(args, env, start_new_session, says)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if says != 2:
            os.close(says)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        if self.poll() is None:
            self.kill()
            self.wait()

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 100) -> int:
        """The exit code, once it has ended."""
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """By SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 100) -> tuple[None, str]:
        """What it has said on stderr, once it and all to which it gave that have ended."""
        with open(self._said, encoding="utf-8") as said:
            text = said.read()
        self.wait(timeout)
        return None, text


def _become(args: list[str], env: Mapping[str, str], start_new_session: bool, says: int) -> None:
    """Be the command from here on; the copy of the tests ends with it."""
    code = 1
    try:
        if start_new_session:
            os.setsid()
        os.dup2(says, 1)
        os.dup2(says, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(env)
        sys.orig_argv = [*args]
        _hear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        warnings.simplefilter("ignore")  # a process of its own does not fail by them
        from kvinv_pl.training.devices import ranks

        ranks.subprocess = SimpleNamespace(Popen=Forked)  # pyright: ignore[reportAttributeAccessIssue]
        ranks.Ranks.calls = 0
        main(args[3:])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _hear() -> None:
    """Whoever runs the tests in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
