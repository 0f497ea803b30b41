"""What a person sees: lines through one `logging` configuration, and the progress of long work.

Lines: below WARNING on stdout, from WARNING on on stderr, as they are, each flushed. Of several
processes rank 0 speaks; what only another one can know is said with every_rank. The console may be
a file on a full disk, or a pipe that nobody reads any more: no reason to end a run.

Progress: bars (rich) on a terminal, elsewhere a line every 30 seconds, so that work of seconds
leaves no line in a log.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ebwm_scale.core.processes import is_first
from ebwm_scale.core.progress import Progress, no_progress

if TYPE_CHECKING:
    from rich.progress import TaskID

LOGGER = "ebwm_scale"
INTERVAL_S = 30.0  # between two lines of progress


def say(text: str, *, error: bool = False, every_rank: bool = False) -> None:
    """One flushed line on stdout, or on stderr; dropped where it cannot be written.

    every_rank: also from a process that does not speak for all.
    """
    level = logging.WARNING if error else logging.INFO
    _logger().log(level, text, extra={"every_rank": every_rank})


def say_on_stderr(text: str) -> None:
    """One line of a command whose stdout is its result."""
    say(text, error=True)


@functools.cache
def _logger() -> logging.Logger:
    """The project's logger, with our two handlers unless the program has put its own there."""
    logger = logging.getLogger(LOGGER)
    if not logger.handlers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(_ConsoleHandler(is_error=False))
        logger.addHandler(_ConsoleHandler(is_error=True))
    return logger


class _ConsoleHandler(logging.Handler):
    """Writes to the stream that sys.stdout or sys.stderr is at that moment.

    One handler, so one lock, per stream: the watchdog must be able to speak on stderr while the
    main thread hangs in a write to stdout.
    """

    def __init__(self, *, is_error: bool):
        super().__init__()
        self.is_error = is_error
        self.addFilter(self._is_ours)
        self.addFilter(of_first_rank)

    def _is_ours(self, record: logging.LogRecord) -> bool:
        return (record.levelno >= logging.WARNING) == self.is_error

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if self.is_error else sys.stdout
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except OSError:
            pass  # there is no other place to say it: what must not be lost is in the run folder


def of_first_rank(record: logging.LogRecord) -> bool:
    """The rank filter: rank 0 speaks, others only with every_rank."""
    return is_first() or getattr(record, "every_rank", False)


@contextmanager
def progress_on_console() -> Iterator[Progress]:
    """A callback for library code that takes a while; what it draws ends with the block."""
    if not is_first():
        yield no_progress
    elif sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield ProgressLines(say_on_stderr)


class ProgressLines:
    """A line when INTERVAL_S have passed since the last one, and a last one for what had one.

    write: takes a line; clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.write, self.clock = write, clock
        self.what: str | None = None
        self.start = self.last = 0.0
        self.has_spoken = False

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = self.clock()
        if what != self.what:
            self.what = what
            self.start = now
            self.last = now
            self.has_spoken = False
        is_last = total is not None and done >= total
        if now - self.last < INTERVAL_S and not (is_last and self.has_spoken):
            return
        self.last, self.has_spoken = now, True
        share = f" of {total:,} ({done / total:.0%})" if total else ""
        self.write(f"{what}: {done:,}{share}, {now - self.start:.0f} s")


class _Bars:
    """One rich bar per kind of work, on stderr; drawn from the first call on."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # Lines above the bars are rich's to place. Where stdout is a file they must go there.
            redirect_stdout=sys.stdout.isatty(),
        )
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if not self.tasks:
            self.rich.start()
        if what not in self.tasks:
            self.tasks[what] = self.rich.add_task(what, total=total)
        self.rich.update(self.tasks[what], completed=done, total=total)

    def close(self) -> None:
        self.rich.stop()


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
