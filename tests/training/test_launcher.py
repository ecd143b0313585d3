"""Ranks as copies of a process, in a process that has one thread, which that of the tests need not."""

import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("processes are copied under Linux alone", allow_module_level=True)

BEGIN = """
import atexit, os, signal, sys, threading, time
from kvinv_pl.training import launcher
from kvinv_pl.training.launcher import Forked, can_fork, stop, undisturbed

def said(*words):
    print(*words, flush=True)

def until(what):
    ends = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.01)
"""


def said_by(program: str) -> list[str]:
    """The lines that a program of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_copy_does_what_it_is_told_and_nothing_of_what_its_maker_had_still_to_do() -> None:
    assert said_by("""
maker = os.getpid()
atexit.register(lambda: said("the end of the maker:", os.getpid() == maker))
try:
    rank = Forked({"LOCAL_RANK": "1"}, lambda: said("rank", os.environ["LOCAL_RANK"]))
    said(rank.wait(60), rank.poll(), "LOCAL_RANK" in os.environ)
finally:
    said("finally")
""") == ["rank 1", "0 0 False", "finally", "the end of the maker: True"]


def test_a_copys_exit_code_is_what_it_ended_with() -> None:
    assert said_by("""
def fail():
    raise SystemExit(2)
def err():
    sys.stderr = open(os.devnull, "w")
    raise RuntimeError("a bug")
print([Forked({}, then).wait(60) for then in (fail, err)])
""") == ["[2, 1]"]


def test_a_copy_ends_when_asked_to_and_one_that_does_not_hear_is_ended() -> None:
    assert said_by("""
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(out, b"x")
    time.sleep(100)
launcher.PATIENCE = 0.3
into, out = os.pipe()
ranks = [Forked({}, lambda: time.sleep(100)), Forked({}, deaf)]
os.read(into, 1)
try:
    ranks[0].wait(0.01)
except Exception as error:
    said(type(error).__name__, ranks[0].poll())
stop(ranks)
said([rank.poll() for rank in ranks])
""") == ["TimeoutExpired None", "[143, -9]"]


def test_a_copy_is_known_to_have_ended_where_the_system_does_not_tell() -> None:
    assert said_by("""
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
rank = Forked({}, lambda: None)
until(lambda: rank.poll() is not None)
other = Forked({}, lambda: time.sleep(100))
said(rank.poll(), other.poll())
stop([rank, other])
said(other.poll())
""") == ["0 None", "0"]


def test_a_copy_ends_when_asked_to_whatever_its_maker_does_then() -> None:
    assert said_by("""
signal.signal(signal.SIGTERM, lambda *_: said("the maker's own"))
def begin():
    os.write(out, b"x")
    time.sleep(100)
into, out = os.pipe()
rank = Forked({}, begin)
os.read(into, 1)
began = time.monotonic()
stop([rank])
said(rank.poll(), time.monotonic() - began < 5)
os.kill(os.getpid(), signal.SIGTERM)
""") == ["143 True", "the maker's own"]


def test_sigterm_is_raised_and_remembered_where_it_was_raised_in_vain() -> None:
    assert said_by("""
class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
sys.unraisablehook = lambda told: None
request = launcher.Request()
with request.heard():
    closed = Closed()
    del closed
    for ask in (request.heed, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        try:
            ask()
        except SystemExit as stop:
            said(stop.code)
said(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
""") == ["143", "143", "True"]


def test_a_first_signal_can_wait_and_a_second_one_does_not() -> None:
    assert said_by("""
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGINT, signal.SIGTERM):
    for second in (False, True):
        request = launcher.Request()
        with request.heard():
            request.waits = True
            os.kill(os.getpid(), number)
            try:
                os.kill(os.getpid(), number) if second else request.heed()
            except BaseException as stop:
                said(type(stop).__name__)
said(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""") == ["KeyboardInterrupt"] * 2 + ["SystemExit"] * 2 + ["True"]


def test_a_process_with_another_thread_is_not_copied() -> None:
    assert said_by("""
said(can_fork())
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
said(can_fork())
done.set()
other.join()
until(can_fork)
""") == ["True", "False"]
