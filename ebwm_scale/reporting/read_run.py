"""A run folder -> Run (reporting/run_data.py).

Read leniently: what is missing or damaged is named in the page.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ebwm_scale.config.strict_yaml import parse_yaml
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.renamed_keys import with_new_names
from ebwm_scale.core.rows import Rows
from ebwm_scale.reporting.curves import read_metrics
from ebwm_scale.reporting.plain import bounded, page_text
from ebwm_scale.reporting.run_data import Events, Run

MAX_EVENTS = 300  # newest events that are shown
MAX_EVENT_NAMES = 100  # names that are counted; ours are some twenty
MAX_BYTES = {"config.yaml": 2**18, "samples.json": 2**26, "summary.json": 2**22}
MAX_NODES = {"config.yaml": 4_000, "samples.json": 200_000, "summary.json": 4_000}


def read_run(folder: Path) -> Run:
    """The run in `folder`; UserError when it is no folder or has no metrics, notes for everything
    else.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run folder; give the folder that train.py wrote (--run-dir)"
        )
    path, notes = folder / "metrics.jsonl", []
    if not path.is_file():
        raise UserError(
            f"{folder}: has no metrics.jsonl; give a run folder in which training has logged at "
            "least one step"
        )
    training, validation, unreadable = read_metrics(Rows(path))
    if not training.num_rows and not validation.num_rows:
        raise UserError(
            f"{path}: has no complete row ({unreadable} unreadable); let the run log at least one "
            "step, then try again"
        )
    if unreadable:
        lines = "line" if unreadable == 1 else "lines"
        notes.append(
            f"metrics.jsonl: {unreadable:,} unreadable {lines} left out (a killed process leaves "
            "one)."
        )
    if not validation.num_rows:
        notes.append(
            "No validation row in metrics.jsonl, so most of the verdict is unknown: "
            "the run was not evaluated yet (evaluation.every_steps)."
        )
    if not training.num_rows:
        notes.append(
            "No training row in metrics.jsonl, so there are no training curves: "
            "the run is shorter than logging.every_steps."
        )
    events = read_events(Rows(folder / "events.jsonl"), notes)
    config = _read_mapping(
        folder / "config.yaml",
        lambda text: parse_yaml(text, "config.yaml"),
        notes,
        "the settings are not known",
    )
    samples = _read_mapping(
        folder / "samples.json",
        lambda text: with_new_names(json.loads(text)),
        notes,
        "no continuations to show; the evaluation writes them",
    )
    summary = _read_mapping(
        folder / "summary.json", json.loads, notes, "the numbers of parameters are not known"
    )
    return Run(folder, config or {}, training, validation, events, samples, summary, tuple(notes))


def read_events(rows: Rows, notes: list[str]) -> Events:
    """The events, counted by name, and the newest of them."""
    events, newest = Events(), deque(maxlen=MAX_EVENTS)
    for row in rows:
        name = page_text(str(row.get("event", "unnamed"))[:200], 40)
        if name not in events.counts and len(events.counts) >= MAX_EVENT_NAMES:
            name = "other"
        events.counts[name] = events.counts.get(name, 0) + 1
        events.total += 1
        newest.append(bounded(row, nodes=200, characters=2_000))
    events.newest = list(newest)
    if not events.total:
        notes.append("events.jsonl is missing or empty: starts, resumes and signals are not known.")
    if rows.unreadable:
        notes.append(f"{rows.in_words()}.")
    return events


def _read_mapping(
    path: Path, parse: Callable[[str], object], notes: list[str], consequence: str
) -> dict | None:
    """The bounded content of a file, or None with a note."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES[path.name]:
            notes.append(
                f"{path.name} has {size:,} bytes, more than the {MAX_BYTES[path.name]:,} that are "
                "read: "
                f"{consequence}."
            )
            return None
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return None
    except (
        OSError,
        ValueError,
        RecursionError,
        TypeError,
        AttributeError,
        UserError,
    ) as error:
        notes.append(
            f"{path.name} cannot be read ({page_text(' '.join(str(error)[:400].split()), 160)}): "
            f"{consequence}."
        )
        return None
    if not isinstance(value, dict):
        notes.append(
            f"{path.name} holds a {type(value).__name__} where a mapping is expected: "
            f"{consequence}."
        )
        return None
    return bounded(value, nodes=MAX_NODES[path.name])
