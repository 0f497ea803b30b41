"""The rows that metrics.jsonl, W&B's offline files and TensorBoard's event files hold, in one form:
a list of (step, {name: value}), in the order they are shown in.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ebwm_scale.training.tracking import flat_row, wandb_files

Row = tuple[int, dict[str, float]]


def of_metrics(run: Path) -> list[Row]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], flat_row(row)) for row in rows]


def of_wandb(run: Path) -> list[Row]:
    """Of all parts, as `wandb sync` sends them; without what W&B adds."""
    identity = (run / "wandb_id").read_text().strip()
    found = []
    for part in wandb_files.parts_of(run / "wandb", identity):
        for _, values in wandb_files.history(part):
            ours = {name: value for name, value in values.items() if "/" in name}
            found.append((values["step"], ours))
    return found


def of_tensorboard(run: Path) -> list[Row]:
    """Of all event files in the order of their names, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[tuple[int, str], dict[str, float]] = {}
    for file in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                row = found.setdefault((event.step, value.tag.partition("/")[0]), {})
                assert value.tag not in row, f"{value.tag} is doubled at step {event.step}"
                row[value.tag] = value.simple_value
    return [(step, row) for (step, _), row in found.items()]


def as_float32(rows: list[Row]) -> list[Row]:
    """Event files hold single precision."""
    return [
        (step, {name: float(np.float32(value)) for name, value in row.items()})
        for step, row in rows
    ]
