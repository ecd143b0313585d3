"""What could not be written beside the run folders' own files, which report that themselves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvinv_pl.errors import NoRoomError, UserError


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Report in one line what Lightning, TensorBoard and a thread of theirs could not write into a folder.

    Raises:
        NoRoomError: Of the thread that runs this.
        UserError: Of another thread, once this one has come to its end: what is lost are the logs.
    """
    before, lost = threading.excepthook, list[OSError]()

    def hear(told: threading.ExceptHookArgs) -> None:
        if isinstance(told.exc_value, OSError):
            lost.append(told.exc_value)
        else:
            before(told)

    threading.excepthook = hear
    try:
        yield
    except OSError as error:
        raise NoRoomError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "make room and give the same command again"
        ) from error
    finally:
        threading.excepthook = before
    if lost:
        raise UserError(f"cannot write the logs: {lost[0].strerror or lost[0]}; make room for the next ones")
