"""The exceptions users see, and the exit codes of train.py.

Each message says what is wrong, the value, what is allowed and what to do.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; entry points print it in one line (no traceback) and exit with
    `exit_code`.
    """

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot be used; nothing was started.

    The message has one line per problem.
    """


class DataError(UserError):
    """Missing, truncated, corrupt or mismatched data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


def cut(text: object, length: int = 80) -> str:
    """A text from outside for one line of a message: unprintable characters escaped, and cut to
    about `length`.
    """
    whole = str(text)
    part = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in whole[: length + 1])
    return part if len(part) <= length else f"{part[: length - 3]}..."


def shown(value: object, length: int = 80) -> str:
    """A value for one line of a message, as Python writes it; cut to about `length`."""
    return cut(repr(value), length)


EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = UserError.exit_code
EXIT_RUN_AGAIN = 75  # saved after a signal or time limit; run the same command again
EXIT_NOT_FINITE = 76  # stopped because loss or gradients were not finite
EXIT_RANK_LOST = 77  # a rank hung or died
