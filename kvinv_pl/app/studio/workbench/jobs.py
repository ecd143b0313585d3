"""What the studio works on, one job after the other, whether a page is open or not."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvinv_pl.data.failures import is_out_of_memory, reason
from kvinv_pl.errors import StopError, UserError
from kvinv_pl.stages.progress import Progress

State = Literal["waiting", "running", "done", "stopped", "failed"]
log = logging.getLogger(__name__)


class StoppedError(StopError):
    """The user has stopped the job."""


@dataclass(eq=False)
class Job:
    """One piece of work of a run, and how far it is."""

    run: str
    kind: Literal["tune", "edit"]
    work: Callable[[Job], Any]
    state: State = "waiting"
    line: str = ""
    share: float = 0.0
    result: Any = None
    over: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)


class JobProgress(Progress):
    """Progress that is told to a job, and at which a job stops: between steps, where nothing is lost."""

    def __init__(self, job: Job) -> None:
        super().__init__(quiet=True)
        self.job = job

    def show(self, detail: str) -> None:
        """Tell the job, or stop."""
        if self.job.stopping.is_set():
            raise StoppedError("stopped; what is done is kept, and the same button goes on with it")
        self.job.line, self.job.share = self.line(detail), self.share

    def begin(self, stage: str, picture: str, total: int) -> None:
        """A stage begins."""
        super().begin(stage, picture, total)
        self.show("")

    def finish(self, detail: str = "") -> None:
        """Keep what was said last."""
        self.job.line = detail or self.job.line

    def note(self, text: str) -> None:
        """Log what a terminal would be told."""
        log.info("%s", text)


class Jobs:
    """A queue of jobs and the thread that takes them: there is one model, and one user of it at a time."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._all: list[Job] = []
        self._thread = threading.Thread(target=self._run, name="kvinv-studio", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Put a job at the end of the queue."""
        self._all = [known for known in self._all if not known.over.is_set() or known.run != job.run] + [job]
        self._queue.put(job)
        return job

    def of(self, run: str) -> Job | None:
        """The job of a run that was added last."""
        return next((job for job in reversed(self._all) if job.run == run), None)

    def before(self, job: Job) -> int:
        """How many come before it."""
        waiting = [other for other in self._all if not other.over.is_set()]
        return waiting.index(job) if job in waiting else 0

    def stop(self, run: str) -> None:
        """Stop the jobs of a run after the step that they are in."""
        for job in self._all:
            if job.run == run:
                job.stopping.set()

    def close(self) -> None:
        """Stop everything."""
        for job in self._all:
            job.stopping.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if job.stopping.is_set():
                    raise StoppedError("stopped before it began")
                job.state = "running"
                job.result, job.state = job.work(job), "done"
            except StoppedError as error:
                job.state, job.line = "stopped", str(error)
            except Exception as error:
                job.state, job.line = "failed", f"{type(error).__name__}: {error}"
                if isinstance(error, UserError) or is_out_of_memory(error):
                    job.line = " ".join(reason(error).split())
                else:
                    log.exception("a job of %s failed", job.run)
            finally:
                job.over.set()
