"""The one exception for mistakes that the user can correct."""


class UserError(ValueError):
    """Bad settings, a bad file, or a layout that does not fit.

    The command line prints it as one message without a traceback and ends with status 2 (``status``).

    Args:
        message: what is wrong: the setting or file, its value, and what is allowed.
        remedy: what to do about it, where that is known.
    """

    status = 2

    def __init__(self, message: str, remedy: str | None = None):
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class RunFailure(UserError):
    """A run that cannot go on though its settings and files are well-formed: told as readably, with status 1."""

    status = 1
