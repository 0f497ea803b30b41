"""Lines for a person, on a console that may be a file on a full disk, or a pipe that nobody reads
any more: no reason to end a run.
"""

from __future__ import annotations

import os
import sys


def say(text: str, *, error: bool = False) -> None:
    """One flushed line on stdout, or on stderr; dropped where it cannot be written."""
    try:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
    except OSError:
        pass  # there is no other place to say it: what must not be lost is in the run folder


def leave_quietly() -> None:
    """Before the interpreter's end: it flushes both streams, and would replace the exit code where
    that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
