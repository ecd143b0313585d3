"""The lock of a run folder, which one process holds at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kvinv_pl.data.runs.files import explaining_os_errors
from kvinv_pl.errors import UserError


class InUseError(UserError):
    """Another process has locked the run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold its lock; raises InUseError, which names the holder."""
    owner = folder / ".lock.pid"
    with explaining_os_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:  # flock, or its like on Windows: released when the process dies
            acquired = FileLock(folder / ".lock").acquire(timeout=0)
        except Timeout:
            process = owner.read_text() if owner.exists() else "unknown"
            raise InUseError(f"{folder} is in use by process {process}: wait for it or stop it") from None
    with acquired:
        with explaining_os_errors("write", folder):
            owner.write_text(str(os.getpid()))
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
