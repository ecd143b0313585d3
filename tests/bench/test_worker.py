"""The processes of a bench."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from kvinv_pl.bench.worker import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
    pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    print("at work", flush=True)
    time.sleep(600)
"""


def test_a_killed_program_leaves_no_process_at_work(tmp_path: Path) -> None:
    """What a process says ends when all that can write to it have ended."""
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stdout.readline() == "at work\n"
    program.kill()
    rest, _ = program.communicate(timeout=60)
    assert rest == ""
