"""TensorBoard: event files in tensorboard/ of the run folder.

Event files only grow, and a killed process leaves rows out that waited in memory. So a start that
finds any writes one new file with exactly the rows of metrics.jsonl, each with the time at which it
was shown first, puts it in place of the old ones, and goes on in a file behind it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebwm_scale.training.tracking.trackers import Row, Rows, flat_row, prefix_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
EVENTS = "events.out.tfevents.*"
STAGING = ".tensorboard-"


class TensorBoard:
    """A writer of torch's; needs the package tensorboard."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path):
        self.folder = run_dir / FOLDER
        self._writer: SummaryWriter | None = None

    def catch_up(self, rows: Rows, step: int) -> list[str]:
        old = sorted(self.folder.glob(EVENTS))
        shown = _times(old)
        for left_over in self.folder.parent.glob(f"{STAGING}*"):
            shutil.rmtree(left_over, ignore_errors=True)  # of a start that was killed here
        staging = self.folder.parent / f"{STAGING}{time.time_ns()}"
        writer = _writer(staging)
        for row in rows():
            _write(writer, row, shown.get((row["step"], prefix_of(row)), time.time()))
        writer.close()
        self.folder.mkdir(exist_ok=True)
        for file in sorted(staging.glob(EVENTS)):
            file.rename(self.folder / file.name)
        staging.rmdir()
        for file in old:
            file.unlink()
        return []

    def log(self, index: int, row: Row) -> None:
        if self._writer is None:
            self._writer = _writer(self.folder)
        _write(self._writer, row, time.time())
        self._writer.flush()

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _write(writer: SummaryWriter, row: Row, when: float) -> None:
    for name, value in flat_row(row).items():
        if isinstance(value, str):
            writer.add_text(name, value, row["step"], walltime=when)
        else:
            writer.add_scalar(name, value, row["step"], walltime=when)


def _times(files: list[Path]) -> dict[tuple[int, str], float]:
    """(step, train/ or validation/) -> when it was shown; as far as the files can be read."""
    found = {}
    for file in files:
        for step, tag, when in _events(file):
            found.setdefault((step, f"{tag.partition('/')[0]}/"), when)
    return found


def _events(file: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, time) of an event file, up to the first damaged record."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2

    protocol: Any = event_pb2  # made when it is imported: type checkers do not see it
    for record in RawEventFileLoader(str(file)).Load():
        event = protocol.Event.FromString(record)
        for value in event.summary.value:
            yield event.step, value.tag, event.wall_time
