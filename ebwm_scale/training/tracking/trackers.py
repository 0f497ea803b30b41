"""The interface of trackers, and all of a run's trackers as one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shorten

Row = dict[str, Any]
Rows = Callable[[], Iterable[Row]]
"""Reads the rows of metrics.jsonl from its first one on."""


class Tracker(Protocol):
    """One place that shows rows. Whatever it raises ends it for this start, never the run.

    name: in messages.
    """

    name: str

    def catch_up(self, rows: Rows, step: int) -> list[str]:
        """Before the first row of a start: hold the rows of metrics.jsonl, which end at `step`.

        Returns what a person should know, one line each.
        """
        ...

    def log(self, index: int, row: Row) -> None:
        """The row with this number, from 0, in metrics.jsonl."""
        ...

    def finish(self) -> str | None:
        """At the end; a line for a person, or None."""
        ...


class Trackers:
    """All of a run's. One that fails is given up with one warning: the next start fills in from
    metrics.jsonl what it has missed.

    warn, say: to people.
    """

    def __init__(
        self, trackers: list[Tracker], warn: Callable[[str], None], say: Callable[[str], None]
    ):
        self._trackers = trackers
        self._warn, self._say = warn, say

    def catch_up(self, rows: Rows, step: int) -> None:
        for tracker, lines in self._each(lambda tracker: tracker.catch_up(rows, step)):
            for line in lines:
                self._say(f"{tracker.name}: {line}")

    def log(self, index: int, row: Row) -> None:
        for _ in self._each(lambda tracker: tracker.log(index, row)):
            pass

    def finish(self) -> None:
        for _, line in self._each(lambda tracker: tracker.finish()):
            if line is not None:
                self._say(line)

    def _each(self, function: Callable[[Tracker], Any]) -> Iterator[tuple[Tracker, Any]]:
        """(tracker, the function's result) of those that it does not fail for."""
        for tracker in list(self._trackers):
            try:
                result = function(tracker)
            except Exception as error:  # noqa: BLE001  a full disk, a service: no run ends for it
                self._trackers.remove(tracker)
                self._warn(
                    f"{tracker.name} failed ({type(error).__name__}: {shorten(error, 300)}); this "
                    "start goes on without it, and metrics.jsonl has every row: the next start "
                    "fills in what it lacks"
                )
            else:
                yield tracker, result


def check_trackers(config: Config) -> None:
    """ConfigError if a package of a tracker that is asked for is not installed."""
    asked = {}
    if config.logging.wandb != "off":
        asked["wandb"] = (f"logging.wandb is {config.logging.wandb}", "logging.wandb=off")
    if config.logging.tensorboard:
        asked["tensorboard"] = ("logging.tensorboard is true", "logging.tensorboard=false")
    for package, (setting, without) in asked.items():
        if not _is_installed(package):
            raise ConfigError(
                f"{setting}: the package {package} is not installed; pip install {package}, or "
                f"{without}"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification, put there by hand
        return True


def prefix_of(row: Row) -> str:
    """train/ or validation/: what stands before the names of a row's numbers."""
    return "validation/" if row.get("split") == "validation" else "train/"


def flat_row(row: Row) -> dict[str, float | str]:
    """The numbers of a row, and its generated texts, by name: train/loss, train/loss_per_step/0,
    validation/sets/NAME/loss, validation/samples/0.

    The step, and what is null in metrics.jsonl, are left out.
    """
    flat: dict[str, float | str] = {}
    prefix = prefix_of(row)
    for key, value in row.items():
        if key == "samples":
            for index, sample in enumerate(value):
                flat[f"{prefix}samples/{index}"] = f"{sample['prompt']} >> {sample['continuation']}"
        elif key not in ("step", "split"):
            _flatten(prefix + key, value, flat)
    return flat


def _flatten(name: str, value: Any, flat: dict[str, float | str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}/{key}", item, flat)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _flatten(f"{name}/{index}", item, flat)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        flat[name] = value
