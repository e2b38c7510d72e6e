"""The one exception for a user's mistake: what was read, what was expected, what to do."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake that the user can fix, described in one line.

    `details` are further lines (each tensor that does not fit, say); a command prints them before the line
    itself, so that the line is what stays on the screen.
    """

    def __init__(self, line: str, details: Sequence[str] = ()):
        super().__init__("\n".join([line, *details]))
        self.line = line
        self.details = list(details)
