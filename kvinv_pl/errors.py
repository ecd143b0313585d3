"""The one kind of error that is shown to a user without a traceback."""

from collections.abc import Mapping


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
        """Name the pictures, and how many there were in all."""
        super().__init__(
            f"{len(reasons)} of {total} pictures could not be worked on; the others are done, and the same "
            "command goes on with what was put right"
        )
        self.reasons = dict(reasons)
