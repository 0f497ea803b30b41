"""What `ebwm top` shows of a run: (name, text) pairs for a screen, one line for a log."""

from __future__ import annotations

import math
from typing import Any

from ebwm_scale.core.plain_text import cut
from ebwm_scale.reporting.curves import losses_of, named_results, number, values_of
from ebwm_scale.reporting.following import LiveRun, share_gained

BARS = "▁▂▃▄▅▆▇█"
MAX_NAMED = 6  # further evaluations that are listed
UNITS = ("tokens", "frames", "patches")


def facts(run: LiveRun) -> list[tuple[str, str]]:
    """Everything a person wants to know at a glance, in the order of a screen."""
    row = run.training
    shown = [("run", str(run.folder)), ("state", run.state())]
    if not row:
        return [*shown, ("step", "none is logged yet"), *_kept(run)]
    shown += [
        ("step", _progress(run)),
        ("loss", _loss(run)),
        ("rate", _figure(row, "learning_rate", ".3e")),
        ("speed", _speed(row)),
        ("gradient norm", _figure(row, "grad_norm", ".4g")),
        *_refinement(row),
        *_evaluation(run),
        *_kept(run),
    ]
    return shown


def line(run: LiveRun) -> str:
    """The newest step in one line."""
    row = run.training
    if not row:
        return f"no step is logged yet; {run.state()}"
    words = [
        f"step {_progress(run)}",
        f"loss {_figure(row, 'loss', '.4f')}",
        f"lr {_figure(row, 'learning_rate', '.2e')}",
        _speed(row),
        *(f"{name} {text}" for name, text in _refinement(row)),
        *(f"{name} {text}" for name, text in _kept(run)),
    ]
    return "; ".join(words)


def _progress(run: LiveRun) -> str:
    step = run.training["step"]
    most = run.max_steps
    text = f"{step:,}"
    if most is not None:
        text += f" of {most:,} ({step / most:.1%})"
    eta = number(run.training.get("eta_s"))
    return f"{text}, {duration(eta)} left" if math.isfinite(eta) else text


def _loss(run: LiveRun) -> str:
    text = _figure(run.training, "loss", ".4f")
    drawn = sparkline(list(run.losses))
    return f"{text}  {drawn}" if drawn else text


def _speed(row: dict[str, Any]) -> str:
    parts = [
        f"{number(row[f'{unit}_per_s']):,.0f} {unit}/s"
        for unit in UNITS
        if math.isfinite(number(row.get(f"{unit}_per_s")))
    ]
    parts.append(f"{_figure(row, 'step_time_s', '.3g')} s a step")
    if math.isfinite(number(row.get("mfu"))):
        parts.append(f"MFU {number(row['mfu']):.1%}")
    if math.isfinite(number(row.get("peak_memory_gib"))):
        parts.append(f"{number(row['peak_memory_gib']):.2f} GiB at most")
    return ", ".join(parts)


def _refinement(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Of an energy model: losses and energies from step to step, what they gain, alpha."""
    energies = values_of(row, "energy_per_step")
    if not energies:
        return []
    losses = losses_of(row)
    text = f"losses {_chain(losses, '.4f')}"
    if math.isfinite(share_gained(losses)):
        text += f" ({share_gained(losses):.1%} lower)"
    text += f", energies {_chain(energies, '.4g')}, alpha {_figure(row, 'step_size', '.4g')}"
    return [("refinement", text)]


def _evaluation(run: LiveRun) -> list[tuple[str, str]]:
    row = run.validation
    if not row:
        return [("validation", "none yet")]
    shown = [("validation", f"{_figure(row, 'loss', '.4f')} at step {row.get('step')}")]
    shown += list(named_results(row).items())[:MAX_NAMED]
    return shown


def _kept(run: LiveRun) -> list[tuple[str, str]]:
    saved = "none yet"
    if run.last_save is not None:
        step, seconds = run.last_save
        saved = f"step {step:,}, {duration(seconds)} ago"
    if run.best is not None:
        saved += f"; best: step {run.best:,}"
    shown = [("last checkpoint", saved), ("skipped steps", f"{run.num_skipped:,}")]
    if run.num_warnings:
        text = f"{run.num_warnings:,}, the last: {cut(run.last_warning, 160)}"
        shown.append(("warnings", text))
    return shown


def sparkline(values: list[float]) -> str:
    """Finite values as bars between their lowest and their highest; none of fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    places = [round((value - low) / span * (len(BARS) - 1)) if span else 0 for value in finite]
    return "".join(BARS[place] for place in places)


def duration(seconds: float) -> str:
    """3:07, 2:03:07 or 4 days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours // 24} days"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figure(row: dict[str, Any], key: str, form: str) -> str:
    value = number(row.get(key))
    return format(value, form) if math.isfinite(value) else "not finite"


def _chain(values: list[float], form: str) -> str:
    return " -> ".join(format(value, form) for value in values)
