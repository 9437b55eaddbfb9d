"""The exception for mistakes that the user can correct, and the one for runs that cannot continue."""


class UserError(ValueError):
    """Wrong settings, a wrong file, or a layout that does not fit.

    The command line prints it as one message without a traceback and exits with status 2 (``status``).

    Args:
        message: what is wrong: the setting or file, its value, and what is allowed.
        remedy: what the user can do about it, if that is known.
    """

    status = 2

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class RunFailure(UserError):
    """A run cannot continue although its settings and files are valid. Printed in the same way, with status 1."""

    status = 1
