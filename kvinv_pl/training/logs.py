"""What Lightning and the loggers say that nobody need hear, and what of the logs could not be written."""

import logging
import threading
import warnings
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


CHATTY = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)
ADVICE = (
    r"The '\w+' does not have many workers",  # there is nothing to load
    "predict returned None",  # its results are in the run folder
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # of Lightning's own
    r"`LightningModule.configure_optimizers` returned `None`",  # a variant may learn nothing
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen model
    r"You have overridden `transfer_batch_to_device`",  # on purpose
    r"\w+ available but not used",  # a CPU may be asked for
)


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep back what Lightning tells those who train networks; any other warning is let through."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
