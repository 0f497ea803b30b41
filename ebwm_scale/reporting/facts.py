"""The table of facts of a report: what is known of model, data and training, as text."""

from __future__ import annotations

import math
from typing import Any

from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.run_data import Run

MAX_FACTS = 60
MODEL_KEYS = (
    "size",
    "num_layers",
    "width",
    "num_heads",
    "conditioning",
    "predicted_input",
    "predicted_layers",
    "own_keys",
    "reach",
    "energy_head",
)
REFINEMENT_KEYS = ("num_steps", "graph", "loss", "loss_weights", "update", "landscapes")
TRAINING_KEYS = ("global_batch_size", "max_steps", "precision", "seed")
# name, key of metrics.jsonl, unit
MEDIANS = (
    ("Median step time", "step_time_s", "s"),
    ("Median throughput", "tokens_per_s", "tokens per second"),
    ("Median throughput", "frames_per_s", "frames per second"),
    ("Median throughput", "patches_per_s", "patches per second"),
    ("Model compute", "model_tflops", "TFLOP/s"),
)
UNITS = ("tokens", "frames", "patches")  # what is counted
NO_MFU = "not measured (no accelerator, or its peak is not known)"
Facts = list[tuple[str, Any]]


def facts_of(run: Run, baseline: Run | None) -> list[tuple[str, str]]:
    """(name, value) of what is known, at most MAX_FACTS."""
    facts = _of_model(run) + _of_data(run)
    facts.append(("Training", _settings(run, "train", TRAINING_KEYS)))
    facts.append(("Context", _settings(run, "data", ("context_length",))))
    if run.training.num_rows:
        facts += _of_training(run)
    if run.validation:
        facts += _of_validation(run)
    if baseline:
        there = f"{baseline.name} ({baseline.label}, {baseline.last_step:,} steps)"
        facts.append(("Compared with", there))
    known = [(name, value) for name, value in facts if value not in ("", None)]
    return [
        (page_text(str(name), 120), page_text(str(value), 400)) for name, value in known[:MAX_FACTS]
    ]


def parameters_of(run: Run) -> dict[str, int]:
    """Parameters by part with their total last; empty when they are not known."""
    parts = (run.summary or {}).get("parameters")
    if not isinstance(parts, dict):
        return {}
    counts = {
        name: count
        for name, count in list(parts.items())[:20]
        if isinstance(count, int) and not isinstance(count, bool)
    }
    total = counts.pop("total", sum(counts.values()))
    return {**counts, "total": total} if counts or total else {}


def _of_model(run: Run) -> Facts:
    facts: Facts = [("Model", _settings(run, "model", MODEL_KEYS))]
    for name, count in parameters_of(run).items():
        facts.append((f"Parameters, {name.replace('_', ' ')}", f"{count:,}"))
    loops = run.setting("model", "loops")
    if isinstance(loops, int) and loops > 1:
        facts.append(("Loops", str(loops)))
    if run.refines:
        facts.append(("Refinement", _settings(run, "refinement", REFINEMENT_KEYS)))
    return facts


def _of_data(run: Run) -> Facts:
    data = (run.summary or {}).get("data")
    if not isinstance(data, dict):
        return []
    facts: Facts = []
    for key, value in data.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        facts.append((f"Data, {str(key).replace('_', ' ')}", shown))
    return facts


def _of_training(run: Run) -> Facts:
    facts: Facts = []
    for unit in UNITS:
        seen = run.training.curves.get(f"{unit}_seen")
        if seen is not None and seen.num_finite:
            facts.append(("Seen in training", f"{int(seen.last):,} {unit}"))
    for name, key, unit in MEDIANS:
        value = run.training.median(key)
        if math.isfinite(value):
            facts.append((name, f"{show(value)} {unit}"))
    mfu = run.training.median("mfu")
    facts.append(("Model FLOPs utilisation", f"{mfu:.1%}" if math.isfinite(mfu) else NO_MFU))
    peak = run.training.curves.get("peak_memory_gib")
    if peak is not None and peak.num_finite:
        facts.append(("Peak memory", f"{show(peak.highest)} GiB"))
    return facts


def _of_validation(run: Run) -> Facts:
    facts: Facts = []
    best = run.validated.best
    if best is not None:
        facts.append(("Lowest validation loss", f"{show(best['loss'])} at step {best['step']:,}"))
    for unit in UNITS:
        count = number(run.validation[-1].get(f"num_{unit}"))
        if math.isfinite(count):
            facts.append(("Validation", f"{int(count):,} {unit}"))
    return facts


def _settings(run: Run, section: str, keys: tuple[str, ...]) -> str:
    """Those of a section that are known: "num layers 2 · width 64"."""
    pieces = []
    for key in keys:
        value = run.setting(section, key)
        if value is not None:
            pieces.append(f"{key.replace('_', ' ')} {value}")
    return " · ".join(pieces)
