"""Rows of a .jsonl file, one at a time: metrics, events, quarantine and attempts of a run folder.

    rows = Rows(path)
    for row in rows: ...
    rows.unreadable         lines that were none

A process that was killed leaves a torn line, a disk that failed leaves zeros or other bytes, and a
resumed process writes on behind them. Such a line is skipped and counted; what is in memory is one
line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import UserError

MAX_LINE = 2**24  # bytes; a longer line is none of ours


class Rows:
    """The objects of a file; one that is missing has none.

    Raises UserError if the file cannot be read.

    unreadable: lines that hold no object, of the reading that was begun last. torn: whether the
    last of them is the file's end without a newline, as a killed process leaves it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.unreadable = 0
        self.torn = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, _, row in self.located())

    def located(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """(where the line starts, the line as it stands, its object)."""
        self.unreadable, self.torn = 0, False
        end = 0
        try:
            with self.path.open("rb") as file:
                while line := file.readline(MAX_LINE):
                    start, end = end, end + len(line)
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        end += _skip_line(file)
                        self.unreadable += 1
                        continue
                    text = line.strip(b"\0 \t\r\n")
                    row = _object(text)
                    if row is not None:
                        yield start, line, row
                    elif text:
                        self.unreadable += 1
                        self.torn = not line.endswith(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read: {error.strerror or error}; check the disk"
            ) from None

    def in_words(self) -> str:
        """How much was skipped, for a warning or a page."""
        lines = "line" if self.unreadable == 1 else "lines"
        return f"{self.path.name}: {self.unreadable:,} unreadable {lines} left out"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return None
    return value if isinstance(value, dict) else None


def _skip_line(file) -> int:
    """Read on to the end of a line; how many bytes that were."""
    skipped = 0
    while rest := file.readline(MAX_LINE):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped
