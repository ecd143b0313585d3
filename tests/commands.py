"""Commands as a person gives them: in this process, or in one of their own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.cli.entry import main

QUICK = ("--steps", 2, "--model.inner_steps", 2, "--model.retries", 0)
"""Enough to go through everything."""


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def kvinv(*args: object) -> Answer:
    """`kvinv ...` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


def command(*args: object) -> list[str]:
    """`python -m kvinv_pl ...`, as subprocess takes it."""
    return [sys.executable, "-m", "kvinv_pl", *(str(arg) for arg in args)]


def process(*args: object) -> Answer:
    """`python -m kvinv_pl ...` as a process of its own."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=200, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


@contextmanager
def signals_as_at_a_terminal() -> Iterator[None]:
    """Whoever runs the tests in the background has SIGINT ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(answer: Answer, *words: str) -> None:
    """One line of what was expected and came, exit code 2, no traceback."""
    lines = [line for line in answer.err.splitlines() if "error" in line]
    assert answer.code == 2, answer
    assert len(lines) == 1 and lines[0].startswith("kvinv: error: "), answer.err
    assert answer.err.splitlines()[-1] == lines[0], answer.err
    assert "Traceback" not in answer.err and not answer.out
    for word in words:
        assert word in lines[0]


def photograph(file: Path, size: tuple[int, int] = (16, 16), seed: int = 0, **options: Any) -> Path:
    """A picture that is like no other of another seed."""
    noise = Image.frombytes("RGB", (4, 4), bytes((seed * 37 + n * 11) % 256 for n in range(48)))
    file.parent.mkdir(parents=True, exist_ok=True)
    noise.resize(size, Image.Resampling.BICUBIC).save(file, **options)
    return file


def size(file: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(file) as picture:
        return picture.size


def tree(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(Path(root, name).relative_to(folder)) for root, _, names in os.walk(folder) for name in names}


def times(folder: Path, patterns: Sequence[str] = ("trajectory.safetensors", "steps/*")) -> dict[str, int]:
    """When the files of the first two stages were written."""
    return {str(file): file.stat().st_mtime_ns for pattern in patterns for file in folder.glob(pattern)}
