"""Weights & Biases: one run that keeps its id over all starts.

The x axis is the metric `step`. W&B's own counter only rises, and rows that are logged below it are
dropped: so rows are logged without a number of W&B's own.

At a start, W&B is brought to the rows of metrics.jsonl:

                rows too few                        rows too many
    offline     are logged from metrics.jsonl       are cut out of the files of earlier starts
    online      are logged from metrics.jsonl       stay: the run makes the same steps again, and
                                                    does not send them twice

A file that `wandb sync` has uploaded counts as online. Which rows a server holds it says itself, by
the number of the last one (`row`, counted as in metrics.jsonl).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ebwm_scale.training.tracking import wandb_files
from ebwm_scale.training.tracking.trackers import Row, Rows, flat_row, prefix_of

Key = tuple[int, str]  # (step, train/ or validation/)


class WeightsAndBiases:
    """run: what wandb.init returned. folder: wandb/ of the run folder. identity: the run's id."""

    name = "W&B"

    def __init__(self, run: Any, folder: Path, identity: str, *, is_offline: bool):
        self._run = run
        self._folder = folder
        self._identity = identity
        self._is_offline = is_offline
        self._num_uploaded = 0  # rows that the server holds: the first so many of metrics.jsonl
        self._there: set[Key] = set()  # rows in files of earlier starts
        run.define_metric("step", hidden=True)
        run.define_metric("row", hidden=True)
        run.define_metric("*", step_metric="step")

    def catch_up(self, rows: Rows, step: int) -> list[str]:
        said = self._read_earlier_parts(step) if self._is_offline else self._ask_server()
        index = -1
        for index, row in enumerate(rows()):
            self.log(index, row)
        num_more = self._num_uploaded - (index + 1)
        if num_more > 0:
            said.append(
                f"the server holds {num_more} rows beyond step {step}; they are made again, and "
                "not sent twice: where settings have changed since, metrics.jsonl has the new ones"
            )
        return said

    def log(self, index: int, row: Row) -> None:
        key = (row["step"], prefix_of(row))
        if index < self._num_uploaded or key in self._there:
            return
        self._run.log({"step": row["step"], "row": index, **flat_row(row)})

    def finish(self) -> str | None:
        self._run.finish()
        if not self._is_offline:
            return None
        return (
            "to upload what W&B has of this run, all of its parts in their order: "
            f"wandb sync {shlex.quote(str(self._folder))}"
        )

    def _ask_server(self) -> list[str]:
        """Of a resumed run the summary holds the last value of everything that was logged."""
        last = self._run.summary.get("row")
        self._num_uploaded = 0 if last is None else int(last) + 1
        if last is None and self._run.summary.get("step") is not None:
            line = (
                "its rows are of an earlier release and not numbered: those of the steps that "
                "metrics.jsonl holds are sent again"
            )
            return [line]
        return []

    def _read_earlier_parts(self, step: int) -> list[str]:
        said = []
        this_start = Path(self._run.dir).resolve().parent
        for part in wandb_files.parts_of(self._folder, self._identity):
            if part.resolve().parent == this_start:
                continue
            if wandb_files.is_uploaded(part):
                said.append(f"{part.parent.name} is uploaded: its rows are not sent again")
            else:
                wandb_files.cut(part, step)
            for _, values in wandb_files.history(part):
                is_validation = any(name.startswith("validation/") for name in values)
                self._there.add((values["step"], "validation/" if is_validation else "train/"))
        return said
