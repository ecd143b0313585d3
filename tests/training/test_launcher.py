"""How ranks end and signals are handled, in processes of their own."""

import subprocess
import sys

from kvinv_pl.training.devices.launcher import STOPPING

BEGIN = """
import os, signal, subprocess, sys
from kvinv_pl.training.devices import launcher

def said(*words):
    print(*words, flush=True)
"""


def said_by(program: str) -> list[str]:
    """The lines that a program of its own prints, on either stream."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_ranks_end_when_asked_to_and_one_that_ignores_it_is_killed() -> None:
    assert said_by("""
def begin(program):
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    rank.stdout.readline()
    return rank
sleeps = "import signal, time; print(flush=True); time.sleep(100)"
ignoring = sleeps.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")
ranks = [begin(sleeps), begin(ignoring), begin("print()")]
ranks[2].wait()
launcher.PATIENCE = 0.3
launcher.stop(ranks)
said([rank.poll() for rank in ranks])
""") == ["[-15, -9, 0]"]


def test_sigterm_is_raised_and_remembered_where_it_was_raised_in_vain() -> None:
    assert said_by("""
class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
sys.unraisablehook = lambda told: None
request = launcher.StopRequest()
with request.handling():
    closed = Closed()
    del closed
    for ask in (request.check, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        try:
            ask()
        except SystemExit as stop:
            said(stop.code)
said(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
""") == ["143", "143", "True"]


def test_a_first_signal_can_wait_which_is_said_and_a_second_one_does_not() -> None:
    assert said_by("""
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGINT, signal.SIGTERM):
    for second in (False, True):
        request = launcher.StopRequest()
        with request.handling():
            request.deferred = True
            os.kill(os.getpid(), number)
            try:
                os.kill(os.getpid(), number) if second else request.check()
            except BaseException as stop:
                said(type(stop).__name__)
said(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""") == [STOPPING, "KeyboardInterrupt"] * 2 + [STOPPING, "SystemExit"] * 2 + ["True"]


def test_a_signal_that_is_heeded_at_once_needs_no_words() -> None:
    assert said_by("""
request = launcher.StopRequest()
with request.handling():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as stop:
        said(stop.code)
""") == ["143"]


def test_where_standard_error_is_closed_a_first_signal_waits_without_words() -> None:
    assert said_by("""
request = launcher.StopRequest()
with request.handling():
    request.deferred = True
    os.close(2)
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        request.check()
    except SystemExit as stop:
        said(stop.code)
""") == ["143"]
