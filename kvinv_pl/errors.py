"""The one kind of error that is shown to a user without a traceback."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake, in one line: what was expected, what came, what to do.

    Its `exit_code` is the command's.
    """

    exit_code = 2


class StopError(UserError):
    """No matter of one picture: whatever else there is to do would fail as well."""


class NoRoomError(StopError):
    """The disk takes no more."""


class SomeFailedError(UserError):
    """Some of many pictures could not be worked on; the others are done.

    Its `reasons` are one line for each of them, by the picture.
    """

    exit_code = 1

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        super().__init__(
            f"{len(reasons)} of {total} pictures could not be worked on; the others are done, and the same "
            "command goes on with what was put right"
        )
        self.reasons = dict(reasons)


def near(word: str, known: Collection[str]) -> str:
    """A guess at what was meant, if there is one; a name without its section is near to the one with it."""
    whole = [name for name in known if name.lstrip("-").rpartition(".")[2] == word.lstrip("-")]
    found = whole or get_close_matches(word, list(known), 1, 0.7)
    return f": did you mean {found[0]}" if found else ""
