"""A thread that writes files while the next ones are computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.runs.files import Into, at_once
from kvinv_pl.data.source_image import SourceImage


class Writer:
    """Writes files in a thread, in their order; a file that cannot be written fails its picture.

    Outside `running` a file is written at once. Whoever hands files on calls `flush` first: then no more
    than those of one phase are not on the disk.
    """

    def __init__(self, failures: Failures) -> None:
        self.failures = failures
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[tuple[SourceImage, Future[None]]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write in a thread; in the end everything is written, or its error is raised.

        After another error what has been handed on is still written.
        """
        with ThreadPoolExecutor(1, "kvinv-writer") as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None
            self.flush()

    def submitter(self, image: SourceImage) -> Into:
        """What takes the writing of an image's files, as `into` of `RunStore.save_step`."""

        def take(write: Callable[[], None]) -> None:
            if self._pool is None:
                at_once(write)
            else:
                self._pending.append((image, self._pool.submit(write)))

        return take

    def flush(self) -> None:
        """Wait until everything is written; mark pictures as failed, or raise, as `Failures.catching`."""
        pending, self._pending = self._pending, []
        for image, written in pending:
            with self.failures.catching([image]):
                written.result()
