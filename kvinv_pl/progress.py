"""What a run tells the person who waits for it."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """One line that is rewritten on a terminal; elsewhere one line for each finished stage of a picture."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Write to `stream` (None: standard error), or nothing at all if `quiet`."""
        self.stream = stream
        self.quiet = quiet
        self._task = ""
        self._total = self._done = 0
        self._began = self._drawn = 0.0

    def begin(self, stage: str, picture: str, total: int) -> None:
        """A stage of one picture (or several) with `total` steps begins."""
        self._task, self._total, self._done = f"{stage} {picture}", total, 0
        self._began, self._drawn = time.monotonic(), 0.0

    def show(self, detail: str) -> None:
        """Say where the stage is, at most ten times a second."""
        now = time.monotonic()
        if self._interactive and now - self._drawn > 0.1:
            self._drawn = now
            share = self._done / self._total if self._total else 0.0
            left = f", {_clock((now - self._began) * (1 / share - 1))} left" if share > 0.02 else ""
            self._write(f"\r\x1b[2K{self._task}: {self._done}/{self._total} {detail}{left}")

    def advance(self, detail: str) -> None:
        """One step is done."""
        self._done += 1
        self.show(detail)

    def finish(self, detail: str = "") -> None:
        """The stage is over: leave a line that stays."""
        took = _clock(time.monotonic() - self._began)
        line = f"{self._task}: {self._done} steps in {took}{', ' if detail else ''}{detail}\n"
        self._write(f"\r\x1b[2K{line}" if self._interactive else line)

    def note(self, text: str) -> None:
        """Something the person should know."""
        self._write(f"{chr(13)}\x1b[2K{text}\n" if self._interactive else f"{text}\n")

    @property
    def _interactive(self) -> bool:
        return not self.quiet and (self.stream or sys.stderr).isatty()

    def _write(self, text: str) -> None:
        if not self.quiet:
            stream = self.stream or sys.stderr
            stream.write(text)
            stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
