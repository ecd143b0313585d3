"""Progress on the terminal, and who else watches a run."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeAlias

from torch import Tensor

from kvinv_pl.data.failures import Failures

REDRAW_SECONDS = 0.1  # on a terminal
LOG_SECONDS = 30.0  # elsewhere


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line now and then and one at the end."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, counted: str = "step") -> None:
        """Write to `stream` (None: standard error), or nothing if `quiet`; what is counted is a noun."""
        self._counted = counted
        self.stream = stream
        self.quiet = quiet
        self._task = ""
        self._total = self._done = 0
        self._began = self._drawn = 0.0

    def begin(self, stage: str, picture: str, total: int) -> None:
        """A stage of one picture (or several) with `total` steps begins."""
        self._task, self._total, self._done = f"{stage} {picture}", total, 0
        self._began = self._drawn = time.monotonic()

    def line(self, detail: str) -> str:
        """What is under way, how far it is and how long the rest will take."""
        elapsed = time.monotonic() - self._began
        rest = f", {format_seconds(elapsed * (self._total / self._done - 1))} left" if self._done else ""
        return f"{self._task}: {self._done}/{self._total} {detail}{rest}"

    @property
    def share(self) -> float:
        """How much of the stage is done, 0 to 1."""
        return self._done / max(1, self._total)

    def show(self, detail: str) -> None:
        """Show the progress of the stage, rate-limited."""
        now = time.monotonic()
        if self.quiet or now - self._drawn < (REDRAW_SECONDS if self._interactive else LOG_SECONDS):
            return
        self._drawn, line = now, self.line(detail)
        if self._interactive:  # a line that wraps could not be rewritten
            self._write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
        else:
            self._write(f"{line}\n")

    def advance(self, detail: str, steps: int = 1) -> None:
        """Count finished steps."""
        self._done += steps
        self.show(detail)

    def finish(self, detail: str = "") -> None:
        """The stage is over: leave a line that stays."""
        elapsed = format_seconds(time.monotonic() - self._began)
        counted = f"{self._done} {self._counted}{'' if self._done == 1 else 's'}"
        self.note(f"{self._task}: {counted} in {elapsed}{', ' if detail else ''}{detail}")

    def note(self, text: str) -> None:
        """Print a line for the user."""
        self._write(f"\r\x1b[2K{text}\n" if self._interactive else f"{text}\n")

    @property
    def _interactive(self) -> bool:
        return (self.stream or sys.stderr).isatty()

    def _write(self, text: str) -> None:
        if not self.quiet:
            stream = self.stream or sys.stderr
            stream.write(text)
            stream.flush()


def format_seconds(seconds: float) -> str:
    """Seconds for display: 4.2 s, 3:07 min, 2:15 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


AfterStep: TypeAlias = Callable[[int, int, Tensor], Tensor | None]


@dataclass
class Observers:
    """The observers of a run: progress display, list of failures, loggers."""

    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    failures: Failures = field(default_factory=Failures)
    loggers: Sequence[Any] = ()
    x_0_every: int = 0
    """Every so many timesteps the predicted x_0 is logged; 0: never."""
    after_step: AfterStep | None = None
    """After each step of edits: takes its index, its timestep and the latents, and may return others."""
