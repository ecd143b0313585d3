"""The one kind of error that is shown to a user without a traceback."""


class UserError(ValueError):
    """A user's mistake, in one line: what was expected, what came, what to do."""
