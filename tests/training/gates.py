"""A run that waits at a place until the test lets it go, so nothing depends on a clock."""

from __future__ import annotations

import time
from pathlib import Path


class Gate:
    """In a run with the fault `gate.fault`: `wait_until_reached`, do something to it, `open`."""

    def __init__(self, file: Path, place: str):
        self.file, self.reached = file, file.with_name(f"{file.name}.reached")
        self.fault = f"hang@{place},until={file}"

    def wait_until_reached(self, process, seconds: float = 120) -> None:
        """Or until the process has ended, or for so many seconds: its output says why."""
        deadline = time.monotonic() + seconds
        while not self.reached.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def open(self) -> None:
        self.file.touch()
