"""A run folder as an object: metrics, events, configuration; damaged and partial folders are read
as far as they go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ebwm_scale.reporting.curves import Training, Validation, number
from ebwm_scale.reporting.plain import page_text

SPIKE = "spike"  # the trainer's event for a loss far above those before it
SKIPPED = "skipped"  # the trainer's event for a step that updated nothing


@dataclass
class Events:
    """events.jsonl: how many of each name, and the newest ones."""

    counts: dict[str, int] = field(default_factory=dict)
    newest: list[dict] = field(default_factory=list)
    total: int = 0


@dataclass(frozen=True)
class Run:
    """What a run folder holds (reporting/read_run.py); `notes` says what is missing or could not be
    read.
    """

    folder: Path
    config: dict
    training: Training
    validated: Validation
    events: Events = field(default_factory=Events)
    samples: dict | None = None
    summary: dict | None = None
    notes: tuple[str, ...] = ()

    def setting(self, section: str, key: str) -> str | int | float | bool | None:
        """A value of the configuration; a list or mapping as text."""
        values = self.config.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, (list, dict, str)):
            return page_text(str(value), 120)
        return value

    @property
    def validation(self) -> list[dict]:
        """Validation rows, steps rising; of very many the chosen ones."""
        return self.validated.rows

    @property
    def name(self) -> str:
        return page_text(
            str(self.setting("logging", "run_name") or self.folder.resolve().name), 120
        )

    @property
    def refines(self) -> bool:
        """Whether this is an energy model; without a configuration, the rows tell."""
        kind = self.setting("model", "kind")
        if kind:
            return kind != "baseline"
        has_energies = bool(self.training.of_list("energy_per_step"))
        return has_energies or any(len(row["loss_per_step"]) > 1 for row in self.validation)

    @property
    def label(self) -> str:
        if self.refines:
            return f"energy model ({self.name})"
        return "looped Transformer++" if self.is_looped else "Transformer++"

    @property
    def is_looped(self) -> bool:
        """Whether this is a baseline that passes its blocks several times."""
        loops = self.setting("model", "loops")
        return not self.refines and isinstance(loops, int) and loops > 1

    def curve_label(self, index: int, count: int) -> str:
        """Of the loss after the refinement step, or loop, of this index; count: of such curves."""
        if self.refines:
            return f"after step {index + 1}"
        return f"after loop {index + 1}" if count > 1 else self.label

    @property
    def is_text(self) -> bool:
        kind = self.setting("state", "kind")
        if kind:
            return kind != "embedding"
        # an old run folder without a configuration: only rows of video have this baseline
        return all(row.get("persistence_loss") is None for row in self.validation)

    @property
    def loss_unit(self) -> str:
        return "nats per token" if self.is_text else "SmoothL1"

    @property
    def reference_name(self) -> str:
        return "unigram entropy" if self.is_text else "copying the last frame"

    @property
    def reference_loss(self) -> float:
        """What can be had without any model of the context: token frequencies for text, the last
        frame for video.
        """
        key = "unigram_entropy" if self.is_text else "persistence_loss"
        return next(
            (v for v in (number(row.get(key)) for row in reversed(self.validation)) if v == v),
            math.nan,
        )

    @property
    def last_step(self) -> int:
        steps = [row["step"] for row in self.validation[-1:]]
        if self.training.num_rows:
            steps.append(self.training.last_step)
        return max(steps)
