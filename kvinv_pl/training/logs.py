"""Silences Lightning's training advice, and reports logs that could not be written."""

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
def reporting_write_errors(folder: Path) -> Iterator[list[OSError]]:
    """Report write errors of Lightning and TensorBoard in one line.

    Yields:
        The write errors of TensorBoard's threads, as they occur: only logs are lost.

    Raises:
        NoRoomError: On a write error in this thread.
    """
    previous_hook, errors = threading.excepthook, list[OSError]()

    def hook(args: threading.ExceptHookArgs) -> None:
        frames = (frame for frame, _ in walk_tb(args.exc_traceback))
        names = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames}
        if isinstance(args.exc_value, OSError) and not names.isdisjoint(WRITERS):
            errors.append(args.exc_value)
        else:
            previous_hook(args)

    threading.excepthook = hook
    try:
        yield errors
    except OSError as error:
        raise NoRoomError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "make room and run the same command to resume"
        ) from error
    finally:
        threading.excepthook = previous_hook


LIGHTNING_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)
ADVICE = (
    r"The '\w+' does not have many workers",  # there are no data to load
    "predict returned None",  # its results are in the run folder
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own
    r"`LightningModule.configure_optimizers` returned `None`",  # a variant may learn nothing
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen model
    r"You have overridden `transfer_batch_to_device`",  # on purpose
    r"\w+ available but not used",  # the user may want the CPU
)


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence Lightning's advice on training networks; other warnings pass."""
    levels = dict[logging.Logger, int]()
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in map(logging.getLogger, LIGHTNING_LOGGERS):
                if logger.getEffectiveLevel() < logging.WARNING:  # to set one asks every logger there is
                    levels[logger] = logger.level
                    logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
