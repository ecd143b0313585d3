"""What Lightning tells those who train networks, and those who tune psi need not hear."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
