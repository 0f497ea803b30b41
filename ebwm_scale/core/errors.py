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


EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = UserError.exit_code
EXIT_RUN_AGAIN = 75  # saved after a signal or time limit; run the same command again
EXIT_NOT_FINITE = 76  # stopped because loss or gradients were not finite
EXIT_RANK_LOST = 77  # a rank hung or died
