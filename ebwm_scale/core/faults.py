"""Faults on purpose, so that what the documentation promises can be tried on the machine it is
promised for. Off unless EBWM_FAULTS is set.

    EBWM_FAULTS="kill@step=7,rank=1; enospc@save=2; enospc@write=5,times=100"

A fault is action@place=number[,rank=r][,seconds=s][,times=t][,until=file]; without rank it happens
on all, with times at that many visits in a row. Places:

    step        before the update that follows n updates: the first is number 0
    batch       the same for the step that holds the n-th batch of the order of data
    save        while the n-th checkpoint of this process is written
    io          the n-th write, fsync, rename or deletion of this process in checkpoints/
    write       the n-th write of this process to any other file of the run folder
    load        while the n-th checkpoint is read
    evaluation  the n-th
    start       1: before the model is built

Actions:

    kill        SIGKILL to this process
    hang        sleep, seconds=... or for ever; with until=FILE, make FILE.reached and sleep until
                there is a FILE: what is to happen meanwhile can be timed by what is on disk
    slow        sleep 1 s, or seconds=...
    enospc      OSError: no space left on device
    nan         the loss becomes NaN (step and batch only)
    spike       the loss becomes a thousand times as large (step and batch only)
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import ConfigError

ACTIONS = ("kill", "hang", "slow", "enospc", "nan", "spike")
OF_LOSS = {"nan": float("nan"), "spike": 1000.0}  # what a loss is multiplied by
PLACES = ("step", "batch", "save", "io", "write", "load", "evaluation", "start")


@dataclass(frozen=True)
class Fault:
    action: str
    place: str
    number: int
    rank: int | None
    seconds: float | None
    times: int
    until: Path | None

    def is_due(self, place: str, number: int, rank: int) -> bool:
        if place != self.place or self.rank not in (None, rank):
            return False
        return self.number <= number < self.number + self.times


class Faults:
    """at(place) counts the visits to a place, at(place, n) names one; what is due there happens,
    and its action is returned if it is one of OF_LOSS. rank -1: a process that is no rank.
    """

    def __init__(self, text: str | None, rank: int):
        self.rank, self.visits = rank, Counter()
        self.faults = [_parse(part.strip()) for part in (text or "").split(";") if part.strip()]

    def at(self, place: str, number: int | None = None) -> str | None:
        if not self.faults:
            return None
        self.visits[place] += 1
        number = self.visits[place] if number is None else number
        for fault in self.faults:
            if fault.is_due(place, number, self.rank) and _happen(fault) in OF_LOSS:
                return fault.action
        return None

    def loss_factor(self, step: int, batch: int) -> float | None:
        """What a step's loss is multiplied by, after what else is due there; None: nothing.

        batch: its number in the order of data.
        """
        actions = (self.at("step", step), self.at("batch", batch))
        return next((OF_LOSS[action] for action in actions if action is not None), None)

    def through(self, place: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        """function(*arguments, **options), after what is due at the place; what it returns."""
        self.at(place)
        return function(*arguments, **options)


def _happen(fault: Fault) -> str | None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "hang" and fault.until is not None:
        _wait_for(fault.until)
    elif fault.action == "hang":
        time.sleep(fault.seconds or 10**6)
    if fault.action == "slow":
        time.sleep(fault.seconds or 1.0)
    if fault.action == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device (EBWM_FAULTS)")
    return fault.action


def _wait_for(file: Path) -> None:
    file.with_name(f"{file.name}.reached").touch()
    while not file.exists():
        time.sleep(0.02)


def _parse(text: str) -> Fault:
    match = re.fullmatch(
        r"(\w+)@(\w+)=(\d+)((?:,(?:rank=\d+|times=\d+|seconds=\d+(?:\.\d+)?|until=[^,;=]+))*)",
        re.sub(r"\s*([@=,])\s*", r"\1", text),
    )
    allowed = ("hang",) if "until=" in text else ACTIONS
    if not match or match[1] not in allowed or match[2] not in PLACES:
        raise ConfigError(
            f"EBWM_FAULTS: {text!r} is no fault; expected action@place=number[,rank=r][,seconds=s]"
            f"[,times=t], or hang@place=number,until=file, with an action of {', '.join(ACTIONS)} "
            f"and a place of {', '.join(PLACES)}, for example kill@step=7,rank=1"
        )
    options = dict(option.split("=") for option in match[4].split(",")[1:])
    return Fault(
        match[1],
        match[2],
        int(match[3]),
        int(options["rank"]) if "rank" in options else None,
        float(options["seconds"]) if "seconds" in options else None,
        int(options.get("times", 1)),
        Path(options["until"]) if "until" in options else None,
    )
