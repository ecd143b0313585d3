"""Errors shown to the user without a traceback."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake, in one line: what was expected, what came, what to do.

    Its `exit_code` is the command's.
    """

    exit_code = 2


class StopError(UserError):
    """Fatal: stops all pictures, not just one."""


class NoRoomError(StopError):
    """The disk is full or read-only."""


class SomeFailedError(UserError):
    """Some of many pictures failed; the others are done.

    Its `reasons` are one line for each of them, by the picture.
    """

    exit_code = 1

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        super().__init__(
            f"{len(reasons)} of {total} pictures failed; the others are done: fix these and run the same "
            "command to resume"
        )
        self.reasons = dict(reasons)


def near(word: str, known: Collection[str]) -> str:
    """A "did you mean" with the nearest known word, if any; a missing section prefix is no difference."""
    whole = [name for name in known if name.lstrip("-").rpartition(".")[2] == word.lstrip("-")]
    found = whole or get_close_matches(word, list(known), 1, 0.7)
    return f": did you mean {found[0]}" if found else ""
