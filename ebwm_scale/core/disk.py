"""Writing where the disk may be full: a file whole or not at all, rows now or later.

Every write of a run folder goes through the fault injector (EBWM_FAULTS, place `write`), so that a
full disk can be tried without one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_scale.core.faults import Faults


class RowLog:
    """A file of JSON rows. Rows that cannot be written wait in memory, in their order, and are
    written before any later one."""

    def __init__(self, path: Path, faults: Faults):
        self.path, self.faults = path, faults
        self.waiting: deque[bytes] = deque()

    def add(self, row: dict[str, Any]) -> None:
        """Put the row behind those that wait; flush() writes them."""
        self.waiting.append((json.dumps(row) + "\n").encode())

    def flush(self) -> OSError | None:
        """Write what waits; the error that left some of it waiting."""
        try:
            while self.waiting:
                self.faults.through("write", _append, self.path, self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            return error
        return None


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written in the block; at its end it takes the place of `path`.

    Whoever opens `path` sees the old content or the new, which is on disk when the block has ended.
    An error leaves what was there, and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove_quietly(temporary)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """The text as the file's content, on disk when this returns; OSError leaves what was there."""
    with replacement(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_quietly(path: Path) -> None:
    """Without the file, if that can be: for what does no harm where it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def remove_if_empty(folder: Path) -> None:
    """Without the folder, if it holds nothing and can be removed."""
    try:
        folder.rmdir()
    except OSError:
        pass


def _append(path: Path, line: bytes) -> None:
    """All of the line or nothing of it; on a line of its own, also behind a line torn by a kill."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    size = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        try:
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)  # where a network file system says that its disk is full
    except OSError:
        _truncate(path, size)
        raise


def _truncate(path: Path, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError:
        pass  # the part of a line that stays is ended by the next one, and readers pass it over
