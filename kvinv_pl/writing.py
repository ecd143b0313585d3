"""What could not be written beside the run folders' own files, which report that themselves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from kvinv_pl.errors import NoRoomError

WRITERS = ("tensorboard", "tensorboardX")
"""Packages that write logs in threads of their own."""


@contextmanager
def reported(folder: Path) -> Iterator[list[OSError]]:
    """Report in one line what Lightning and TensorBoard could not write into a folder.

    Yields:
        What TensorBoard's threads could not write, as it comes: no more is lost than logs.

    Raises:
        NoRoomError: Of what the thread that runs this could not write.
    """
    before, lost = threading.excepthook, list[OSError]()

    def hear(told: threading.ExceptHookArgs) -> None:
        frames = (frame for frame, _ in walk_tb(told.exc_traceback))
        names = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames}
        if isinstance(told.exc_value, OSError) and not names.isdisjoint(WRITERS):
            lost.append(told.exc_value)
        else:
            before(told)

    threading.excepthook = hear
    try:
        yield lost
    except OSError as error:
        raise NoRoomError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "make room and give the same command again"
        ) from error
    finally:
        threading.excepthook = before
